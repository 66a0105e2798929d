"""Train a recipe of half a million parameters with one small part exchanged, and write nbs/results/parts.json.

    python benchmarks/parts.py                                 # every part, with three seeds
    python benchmarks/parts.py --parts gate sinks --seeds 0    # some of the runs, no file

Every run keeps its folder in --out, so a script that was stopped goes on where it was, and finished
runs are read. All parts get the same training FLOPs as the baseline.
"""

import argparse
import os
import statistics
import time
from dataclasses import replace
from pathlib import Path

import torch
from record import interval, percent, write

from tinylm.checkpoints import load_model
from tinylm.cost import count_parameters
from tinylm.data import Batches
from tinylm.engine import Engine, next_token_loss
from tinylm.evaluate import loss_by_kind
from tinylm.experiments import ablate, step_flops
from tinylm.model import Block, TinyLM
from tinylm.parts import (
    GatedBlock,
    ReLUSquaredBlock,
    ShiftBlock,
    SinkBlock,
    SoftcapBlock,
    ValueResidualBlock,
)
from tinylm.pretrain import PretrainConfig
from tinylm.recipes import change_fields, read_recipe
from tinylm.report import validation_stories
from tinylm.runs import read_metrics
from tinylm.token_cache import prepare

RECIPE = Path(__file__).resolve().parent / "parts.yaml"
PARTS: dict[str, dict] = {
    "shifts": {"block": ShiftBlock},
    "output gate": {"block": GatedBlock},
    "value residual": {"block": ValueResidualBlock},
    "ReLU squared": {"block": ReLUSquaredBlock},
    "sinks": {"block": SinkBlock},
    "softcap": {"block": SoftcapBlock},
}
STORIES = 300  # for the loss by kind of token


def short_recipe(steps: int, out: Path) -> PretrainConfig:
    """Return the recipe with fewer steps; the schedule shrinks with them."""
    changes = {
        "train.max_steps": steps,
        "train.sample_interval": 0,
        "train.sample_tokens": 1,
        "train.eval_interval": 0,
        "train.checkpoint_interval": 0,
        "out": str(out),
    }
    return change_fields(read_recipe(str(RECIPE)), changes)


def train(
    recipe: PretrainConfig,  # of the baseline
    names: list[str],  # of the parts
    seeds: list[int],  # of the runs
) -> list[dict]:  # a row for each run, those of the baseline first
    """Train the baseline and some parts, or read what was trained before."""
    return ablate(recipe, {name: PARTS[name] for name in names}, seeds)


def by_kind(recipe: PretrainConfig, run: Path, block: type[Block]) -> dict[str, float]:
    """Return nats above the floor for each kind of token, over the first validation stories."""
    prepared = prepare(recipe.data)
    stories = validation_stories(prepared)[:STORIES]
    losses = loss_by_kind(load_model(run, block=block), prepared.tokenizer, stories)
    return {entry.kind: entry.loss - entry.floor for entry in losses}


def time_steps(recipe: PretrainConfig, steps: int) -> dict[str, float]:
    """Return the milliseconds of a training step relative to the baseline: medians, in turns."""
    prepared = prepare(recipe.data)
    config = replace(recipe.model, vocab_size=len(prepared.tokenizer))
    batches = Batches(prepared.train, recipe.data.seq_len, recipe.train.batch_size)
    engines: dict[str, Engine] = {}
    for name, changes in {"baseline": {}, **PARTS}.items():
        torch.manual_seed(0)
        model = TinyLM(config, changes.get("block", Block))
        engines[name] = Engine(model, next_token_loss(model), recipe.train)

    # In turns, so that a slow minute of the machine hits all of them; the first two do not count.
    ratios: dict[str, list[float]] = {name: [] for name in engines}
    for step in range(steps):
        batch = batches.batch(step)
        times = {}
        for name, engine in engines.items():
            begin = time.perf_counter()
            engine.step(batch, step)
            times[name] = time.perf_counter() - begin
        for name, seconds in times.items():
            ratios[name].append(seconds / times["baseline"])
    return {name: round(statistics.median(values[2:]), 3) for name, values in ratios.items()}


def figures_of(recipe: PretrainConfig, rows: list[dict], timed_steps: int) -> dict:
    """Summarize the runs: each part, and its difference to the baseline, seed by seed."""
    floor = read_metrics(Path(recipe.out, "baseline", f"seed-{rows[0]['seed']}"))[-1]["floor"]
    speed = time_steps(recipe, timed_steps)
    config = replace(recipe.model, vocab_size=len(prepare(recipe.data).tokenizer))
    baseline_kinds: list[dict[str, float]] = []
    baseline: list[float] = []
    parts = {}
    for name, changes in {"baseline": {}, **PARTS}.items():
        block = changes.get("block", Block)
        group = [row for row in rows if row["name"] == name]
        excess = [row["excess"] for row in group]
        kinds = []
        for row in group:
            run = Path(recipe.out, name, f"seed-{row['seed']}")
            kinds.append(by_kind(recipe, run, block))
        if name == "baseline":
            baseline = excess
            baseline_kinds = kinds

        # The same seed has the same batches, so differences are taken seed by seed.
        entry = {
            "nats_above_the_floor": {**interval(excess), "by_seed": [round(x, 4) for x in excess]},
            "distance_to_the_floor_percent": interval([percent(x / floor) for x in excess]),
            "steps": group[0]["steps"],
            "parameters": count_parameters(config, block)["total"],
            "million_flops_per_step": round(step_flops(recipe, block) / 1e6),
            "time_of_a_step": speed[name],
        }
        if name != "baseline":
            entry["minus_baseline_nats"] = paired(excess, baseline)
        for kind in kinds[0]:
            values = [losses[kind] for losses in kinds]
            entry[f"{kind}_tokens_nats_above_the_floor"] = interval(values)
            if name != "baseline":
                others = [losses[kind] for losses in baseline_kinds]
                entry[f"{kind}_tokens_minus_baseline_nats"] = paired(values, others)
        parts[name] = entry
    return {"floor": round(floor, 4), "threads": torch.get_num_threads(), "parts": parts}


def paired(values: list[float], others: list[float]) -> dict:
    """Return the mean of the differences of pairs, with its interval."""
    differences = [value - other for value, other in zip(values, others, strict=True)]
    return {**interval(differences), "by_seed": [round(x, 4) for x in differences]}


def main() -> None:
    """Train what is asked for; with all parts, write the file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, help="only these runs, and no file")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=400, help="of the baseline")
    parser.add_argument("--out", type=Path, default=Path("runs/parts"), help="folder of the runs")
    parser.add_argument("--commit", default="", help="of the code that made finished runs")
    parser.add_argument("--timed-steps", type=int, default=20)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()

    torch.set_num_threads(arguments.threads)
    recipe = short_recipe(arguments.steps, arguments.out)
    rows = train(recipe, arguments.parts or list(PARTS), arguments.seeds)
    if arguments.parts is None:
        figures = figures_of(recipe, rows, arguments.timed_steps)
        command = f"python benchmarks/parts.py --steps {arguments.steps}"
        write("parts", command, arguments.seeds, figures, arguments.commit)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
