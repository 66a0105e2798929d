"""Write a file of results, nbs/results/NAME.json, from finished runs or by measuring now.

    # runs of `tinylm pretrain`, and the report of `tinylm evaluate ... --out runs/report`
    python benchmarks/record.py default runs/seed-0 runs/seed-1 runs/seed-2
    python benchmarks/record.py speedrun runs/speedrun-0 runs/speedrun-1 runs/speedrun-2
    python benchmarks/record.py loop                          # what makes a step fast
    python benchmarks/record.py trials                        # what makes the recipe good
    python benchmarks/record.py trials today=runs/a wider=runs/b wider=runs/c  # runs that are done
    python benchmarks/record.py decoding --llama-cpp FILE     # decode.py on a shape of 135M

Each file says how its figures came about: command, commit, date, machine, seeds. Prose that uses a
figure links its file, and `python tools/claims.py` compares the two.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import asdict
from datetime import date
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
import yaml

from tinylm.data import Batches
from tinylm.engine import Engine, next_token_loss
from tinylm.evaluate import mean_and_interval
from tinylm.experiments import ablate
from tinylm.model import TinyLM
from tinylm.pretrain import PretrainConfig
from tinylm.recipes import change_fields, read_recipe
from tinylm.token_cache import prepare

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "nbs" / "results"


def commit() -> str:
    """Return the commit of the code."""
    command = ["git", "rev-parse", "--short=8", "HEAD"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip() or "unknown"


def machine() -> dict:
    """Describe the machine, without its name."""
    flags = Path("/proc/cpuinfo")
    text = flags.read_text("utf-8") if flags.exists() else ""
    units = [name for name in ("avx2", "avx512f", "amx_bf16") if f" {name} " in text]
    return {
        "cores": os.cpu_count(),
        "architecture": platform.machine(),
        "vector_units": units,
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def write(
    name: str,  # of the file
    command: str,  # what a reader types for the same figures
    seeds: list[int],  # of the runs
    figures: dict,  # what was measured
    of_runs: str = "",  # commit of the code that made finished runs; "": the one checked out
) -> None:
    """Write a file of results."""
    entry = {
        "command": command,
        "commit": of_runs or commit(),
        "date": str(date.today()),
        "machine": machine(),
        "seeds": seeds,
        "figures": figures,
    }
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(entry, indent=1) + "\n", "utf-8")
    print(path)


def rows(run: Path, key: str) -> list[dict]:
    """Return the lines of a run's metrics that have a key."""
    lines = (run / "metrics.jsonl").read_text("utf-8").splitlines()
    return [row for row in map(json.loads, lines) if key in row]


def last(run: Path, key: str) -> dict:
    """Return the last line of a run's metrics that has a key."""
    return rows(run, key)[-1]


def percent(share: float) -> float:
    """Return a share in percent, with two decimals."""
    return round(100 * share, 2)


def interval(values: list[float]) -> dict:
    """Return the mean of some runs, and half its 95% interval."""
    mean, half = mean_and_interval(np.array(values), np.ones(len(values)))
    return {"mean": round(mean, 4), "half_of_95_interval": round(half or 0.0, 4), "n": len(values)}


def by_name(report: dict) -> dict:
    """Name the runs of a report by their folders, without the path."""
    return {Path(run).name: figures for run, figures in report.items()}


def right_percent(score: dict) -> float:
    """Return the share of right answers of a score in a report."""
    return percent(score["right"] / score["total"])


def record_default(
    runs: list[Path],  # folders of the runs, which differ in their seed
    reports: list[dict],  # the report of each
    of_runs: str,  # commit of the code that made them
) -> None:
    """Write down the first run of the default recipe, its report, and means over all runs."""
    run = runs[0]
    report = reports[0]
    final = last(run, "validation_loss")
    answers = report["exact_match"]["all"]
    curve = {row["step"]: round(row["validation_loss"], 4) for row in rows(run, "validation_loss")}

    # The names say the units.
    figures = {
        "loss": round(report["loss"], 4),
        "loss_half_of_95_interval": round(report["loss_interval"], 4),
        "floor": round(report["floor"], 4),
        "distance_to_the_floor_percent": percent(report["distance_to_floor"]),
        "distance_half_of_95_interval_percent": percent(report["gap_interval"] / report["floor"]),
        "documents": report["documents"],
        "perplexity": round(report["perplexity"], 3),
        "bits_per_byte": round(report["bits_per_byte"], 4),
        "questions": answers["total"],
        "questions_right_percent": right_percent(answers),
        "tokens": final["tokens"],
        "steps": final["step"],
        "seconds_of_training": round(final["elapsed"], 1),
        "validation_loss_by_step": curve,
    }
    distances = [percent(report["distance_to_floor"]) for report in reports]
    right = [right_percent(report["exact_match"]["all"]) for report in reports]
    figures["over_seeds"] = {
        "distance_to_the_floor_percent": {**interval(distances), "by_seed": distances},
        "questions_right_percent": {**interval(right), "by_seed": right},
    }
    seeds = []
    for run in runs:
        config = yaml.safe_load((run / "config.yaml").read_text("utf-8"))
        seeds.append(config["train"]["seed"])
    write("default", "tinylm pretrain --train.seed N", seeds, figures, of_runs)


def stage_figures(reports: list[dict]) -> dict:
    """Summarize the reports of one stage, one report for each seed."""
    chats = {}
    for kind in reports[0]["chat"]:
        shares = [right_percent(report["chat"][kind]) for report in reports]
        chats[kind] = {**interval(shares), "by_seed": shares}
    in_story = [right_percent(report["exact_match"]["all"]) for report in reports]
    distances = [percent(report["distance_to_floor"]) for report in reports]
    return {
        "right_replies_percent": chats,
        "words_in_a_reply": interval([report["reply_words"] for report in reports]),
        "answers_in_the_story_percent": {**interval(in_story), "by_seed": in_story},
        "distance_to_the_floor_percent": {**interval(distances), "by_seed": distances},
    }


def record_speedrun(folders: list[Path], of_runs: str) -> None:
    """Write down several runs of the whole path, that differ in their seed."""
    seeds = []
    reports = []
    for folder in folders:
        config = yaml.safe_load((folder / "base" / "config.yaml").read_text("utf-8"))
        seeds.append(config["train"]["seed"])
        report = json.loads((folder / "report" / "report.json").read_text("utf-8"))
        reports.append(by_name(report))
    figures = {}
    for stage in ("base", "sft", "lora", "dpo", "grpo"):
        # Older runs have no stage that learns from rewards.
        if all(stage in report for report in reports):
            figures[stage] = stage_figures([report[stage] for report in reports])

    # What preferences and rewards change, seed by seed.
    before = figures["sft"]["right_replies_percent"]["all"]["by_seed"]
    for stage in ("dpo", "grpo"):
        after = figures[stage]["right_replies_percent"]["all"]["by_seed"]
        changes = [round(new - old, 2) for new, old in zip(after, before, strict=True)]
        figures[f"{stage}_minus_sft_percent"] = {**interval(changes), "by_seed": changes}
    figures["questions"] = reports[0]["sft"]["chat"]["all"]["total"]
    write(
        "speedrun", "tinylm speedrun --seed N; record.py speedrun FOLDERS", seeds, figures, of_runs
    )


def default_recipe() -> PretrainConfig:
    """Return the recipe of `tinylm pretrain`."""
    return read_recipe("default")


def median_step(
    config: PretrainConfig,  # the recipe
    steps: int,  # how many are timed; the first three do not count
    wrong: dict,  # names of the library, and what replaces them
) -> float:  # milliseconds
    """Measure a training step with parts of the library replaced."""
    prepared = prepare(config.data)
    batches = Batches(prepared.train, config.data.seq_len, config.train.batch_size)

    # The replacements last for one measurement.
    with ExitStack() as stack:
        for target, replacement in wrong.items():
            stack.enter_context(patch(target, replacement))
        torch.manual_seed(0)
        model = TinyLM(change_fields(config.model, {"vocab_size": len(prepared.tokenizer)}))
        engine = Engine(model, next_token_loss(model), config.train)
        times = []
        for step in range(steps):
            begin = time.perf_counter()
            engine.step(batches.batch(step), step)
            times.append(1000 * (time.perf_counter() - begin))
    return statistics.median(times[3:])


def record_loop(steps: int) -> None:
    """Measure what each lever of the training loop is worth, in turns."""
    recipe = default_recipe()
    ways: dict[str, tuple[PretrainConfig, dict]] = {
        "bf16, attention at once": (recipe, {}),
        "bf16, attention in blocks": (recipe, {"tinylm.attention.SHORT": 0}),
        "fp32": (change_fields(recipe, {"train.precision": "fp32"}), {}),
    }

    # In turns, so that a slow minute of the machine hits all of them.
    rounds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(3):
        for name, (config, wrong) in ways.items():
            rounds[name].append(round(median_step(config, steps, wrong), 1))
    figures: dict = {}
    for name, times in rounds.items():
        figures[name] = {"milliseconds_per_step": statistics.median(times), "by_round": times}
    figures["tokens_in_a_step"] = recipe.train.batch_size * recipe.data.seq_len
    write("loop", "python benchmarks/record.py loop", [0], figures)


TRIALS = {
    "embeddings start at 0.02": {"model.embedding_range": 0.02},
    "embeddings start at 0.1": {"model.embedding_range": 0.1},
    "Muon at 0.003": {"train.muon_learning_rate": 0.003},
    "Muon at 0.012": {"train.muon_learning_rate": 0.012},
    "AdamW for all": {"train.optimizer": "adamw"},
    "without QK-norm": {"model.qk_norm": False},
    "a cosine schedule": {"train.schedule": "cosine"},
    "4 layers": {"model.num_hidden_layers": 4},
}


def record_trials(steps: int, seeds: list[int]) -> None:
    """Train short runs of the default recipe with one change each."""
    # The runs are not kept, only how far each is above the floor.
    with tempfile.TemporaryDirectory() as folder:
        short = {
            "train.max_steps": steps,
            "train.sample_interval": 0,
            "train.eval_interval": steps,
            "train.checkpoint_interval": steps,
            "out": folder,
        }
        runs = ablate(change_fields(default_recipe(), short), TRIALS, seeds)
    by_name: dict[str, list[float]] = {}
    for row in runs:
        by_name.setdefault(row["name"], []).append(round(row["excess"], 4))
    figures = {
        name: {"nats_above_the_floor": {**interval(values), "by_seed": values}}
        for name, values in by_name.items()
    }
    # The file of finished runs stays.
    write("short_trials", f"python benchmarks/record.py trials --steps {steps}", seeds, figures)


def flat(config: dict, prefix: str = "") -> dict:
    """Name the values of nested settings by their paths: train.seed."""
    values: dict = {}
    for name, value in config.items():
        path = prefix + name
        values |= flat(value, path + ".") if isinstance(value, dict) else {path: value}
    return values


def record_finished_trials(
    named: list[str],  # NAME=FOLDER of each run; runs of one name differ in their seed
    of_runs: str,  # commit of the code that made them
) -> None:
    """Write down finished runs, each with what it changes in the first."""
    folders: dict[str, list[Path]] = {}
    for argument in named:
        name, equals, folder = argument.partition("=")
        if not equals:
            raise SystemExit(f"{argument}: give NAME=FOLDER")
        folders.setdefault(name, []).append(Path(folder))

    # What has no part in the result is left out: where the run lies, and how often it reports.
    silent = ("out", "train.seed", "train.num_threads", "train.tracker", "train.sample_prompt")
    first: dict = {}
    figures = {}
    seeds = set()
    for name, runs in folders.items():
        files = [yaml.safe_load((run / "config.yaml").read_text("utf-8")) for run in runs]
        configs = [flat(asdict(PretrainConfig())) | flat(file) for file in files]  # in full
        first = first or configs[0]
        changes = {
            path: value
            for path, value in configs[0].items()
            if path not in silent and "interval" not in path and value != first.get(path)
        }
        if changes.get("model.block"):
            changes["model.block"] = "one of its own"  # a trial's class need not be published

        # The last loss is that of all validation stories in float32; they are packed in rows.
        results = [last(run, "validation_loss") for run in runs]
        losses = [round(end["validation_loss"], 4) for end in results]
        distances = [percent(end["validation_loss"] / end["floor"] - 1) for end in results]
        of_name = [config["train.seed"] for config in configs]
        seeds.update(of_name)
        figures[name] = {
            "changes": changes if configs[0] is not first else {},
            "seeds": of_name,
            "steps": results[0]["step"],
            "validation_loss": losses,
            "distance_to_the_floor_percent": distances,
        }
        if len(runs) > 1:
            figures[name]["distance_over_seeds_percent"] = interval(distances)
    command = "python benchmarks/record.py trials NAME=FOLDER ..."
    write("trials", command, sorted(seeds), figures, of_runs)


def record_decoding(
    llama_cpp: Path | None,  # GGUF file for llama.cpp; None: without it
    repeats: int,  # of each measurement
    new_tokens: int,  # that each text gets
) -> None:
    """Run decode.py and keep its figures."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "decode.json"
        command = [sys.executable, str(ROOT / "benchmarks" / "decode.py")]
        flags = ["--shapes", "135m", "--repeats", str(repeats), "--new-tokens", str(new_tokens)]
        further = ["--out", str(out)]
        if llama_cpp is not None:
            further += ["--llama-cpp", str(llama_cpp)]
        subprocess.run([*command, *flags, *further], check=True)
        figures = json.loads(out.read_text("utf-8"))
    if llama_cpp is not None:
        flags += ["--llama-cpp", llama_cpp.name]
    write("decoding", "python benchmarks/decode.py " + " ".join(flags), [0], figures)


def main() -> None:
    """Record what is asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", choices=["default", "speedrun", "loop", "trials", "decoding"])
    parser.add_argument("runs", nargs="*", help="folders of finished runs; trials: NAME=FOLDER")
    parser.add_argument("--steps", type=int, default=400, help="of a trial, or to time (loop: 30)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--commit", default="", help="of the code that made finished runs")
    parser.add_argument("--llama-cpp", type=Path, help="decoding: GGUF file for llama.cpp")
    parser.add_argument("--repeats", type=int, default=3, help="decoding: turns of the median")
    parser.add_argument("--new-tokens", type=int, default=48, help="decoding: tokens of a text")
    arguments = parser.parse_args()

    # The first two read finished runs, the others measure now.
    if arguments.name == "default":
        runs = [Path(run) for run in arguments.runs]
        report = json.loads((runs[0].parent / "report" / "report.json").read_text("utf-8"))
        reports = [by_name(report)[run.name] for run in runs]
        record_default(runs, reports, arguments.commit)
    elif arguments.name == "speedrun":
        record_speedrun([Path(run) for run in arguments.runs], arguments.commit)
    elif arguments.name == "loop":
        record_loop(min(arguments.steps, 30))
    elif arguments.name == "trials" and arguments.runs:
        record_finished_trials(arguments.runs, arguments.commit)
    elif arguments.name == "trials":
        record_trials(arguments.steps, arguments.seeds)
    else:
        record_decoding(arguments.llama_cpp, arguments.repeats, arguments.new_tokens)


if __name__ == "__main__":
    main()
