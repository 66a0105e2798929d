"""Compare ways to learn from a larger model with more training; write distill.json.

    tinylm pretrain --model.hidden-size 256 --model.intermediate-size 448 \\
        --model.num-attention-heads 8 --train.num-threads 1 --out runs/teacher
    python benchmarks/distill.py --teacher runs/teacher

All ways start from the same student: a model of the default recipe, a quarter of the teacher's
size, with a short training behind it. All take about the same processor time. What is in the file
of results is not measured again, so a stopped study goes on where it was. All figures are of one
thread.
"""

import argparse
import contextlib
import io
import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import date
from pathlib import Path

import torch
from record import RESULTS, commit, interval, machine

import tinylm.shortconv  # noqa: F401  (adds its kind of layer)
from tinylm.distill import WAYS, DistillConfig, distill
from tinylm.evaluate import distance_to_floor
from tinylm.files import DataConfig
from tinylm.model import TinyLM
from tinylm.pretrain import PretrainConfig, TrainConfig, pretrain
from tinylm.recipes import read_recipe
from tinylm.report import evaluate
from tinylm.runs import open_run
from tinylm.token_cache import prepare

RECIPE = read_recipe("default")  # of the student
FIRST_STEPS = 400  # of the student, before the ways part

# Steps and rows of each way, so many that all take about the same processor time.
STEPS = {"data": 1370, "samples": 200, "forward": 555, "reverse": 160}
ROWS = {"reverse": 32}
TEACHER_STORIES = 2300


def settings(
    steps: int,  # of training
    rows: int,  # of a batch
    seed: int,  # of weights, order and noise
) -> TrainConfig:
    """Return the settings that all runs have in common."""
    # Those of the default recipe, without reports on the way.
    return replace(
        RECIPE.train,
        max_steps=steps,
        batch_size=rows,
        eval_interval=0,
        checkpoint_interval=0,
        sample_interval=0,
        num_threads=1,
        seed=seed,
    )


def measure(model: TinyLM, data: DataConfig) -> dict[str, float]:
    """Return the distance to the floor, and how many questions are answered right."""
    report = evaluate(model, prepare(data), data.seq_len, as_chats=False)
    assert report.floor is not None
    distance = distance_to_floor(report.loss, report.floor)
    return {
        "distance_to_the_floor_percent": round(100 * distance, 2),
        "questions_right_percent": round(100 * report.exact_match["all"].share, 2),
    }


def run_seed(
    teacher: str,  # folder of its run
    seed: int,  # of weights, order and noise
    figures: dict,  # of all ways; is filled
    scale: float,  # factor of all steps
    save: Callable[[], None],  # is called after each way
) -> None:
    """Train a student, then each way that is missing."""
    # Stories that the teacher did not see, in its tokens; the ways do not repeat the first ones.
    data = DataConfig(tokenizer=teacher, stories=6000, validation_stories=200, seed=1 + 2 * seed)
    further = replace(data, stories=30_000, seed=2 + 2 * seed)
    with tempfile.TemporaryDirectory() as folder:
        start = f"{folder}/start"
        train = replace(settings(round(FIRST_STEPS * scale), 8, seed), decay_fraction=0.01)
        config = PretrainConfig(RECIPE.model, data, train, out=start)
        prepare(data)
        prepare(further)
        with contextlib.redirect_stdout(io.StringIO()):
            first = pretrain(config)
        figures.setdefault("start", {})[str(seed)] = measure(first.model, data)
        for way in WAYS:
            by_seed = figures.setdefault(way, {})
            if str(seed) in by_seed:
                continue

            # What is counted is all that the way needs: also the teacher's writing and reading.
            steps = max(1, round(STEPS[way] * scale))
            recipe = DistillConfig(
                run=start,
                teacher=teacher,
                data=further,
                train=settings(steps, ROWS.get(way, 8), seed),
                out=f"{folder}/{way}",
                way=way,
                teacher_stories=TEACHER_STORIES,
            )
            begin = time.process_time()
            with contextlib.redirect_stdout(io.StringIO()):
                result = distill(recipe)
            seconds = time.process_time() - begin
            by_seed[str(seed)] = measure(result.model, further)
            by_seed[str(seed)] |= {"steps": steps, "cpu_seconds": round(seconds, 1)}
            print(way, seed, by_seed[str(seed)], flush=True)
            save()


def parameters(model: TinyLM) -> int:
    """Count the parameters of a model."""
    return sum(weight.numel() for weight in model.parameters())


def summarize(figures: dict) -> dict:
    """Return mean and 95% interval of each way, and its difference from the data alone."""
    summary = {}
    names = ("distance_to_the_floor_percent", "questions_right_percent")
    for way, by_seed in figures.items():
        seeds = sorted(by_seed)
        summary[way] = {name: interval([by_seed[s][name] for s in seeds]) for name in names}
        if way in ("start", "data"):
            continue

        # Seed by seed: both began with the same student.
        for name in names:
            changes = [round(by_seed[s][name] - figures["data"][s][name], 2) for s in seeds]
            summary[way][f"{name}_minus_data"] = interval(changes)
    return summary


def main() -> None:
    """Run what is missing, and write the file after each way."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--teacher", required=True, help="run of `tinylm pretrain`")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--scale", type=float, default=1.0, help="factor of all steps")
    parser.add_argument("--out", type=Path, default=RESULTS / "distill.json")
    args = parser.parse_args()
    torch.set_num_threads(1)

    # What is there already is not measured again.
    figures: dict = {}
    if args.out.exists():
        figures = json.loads(args.out.read_text("utf-8"))["figures"]["by_seed"]
    teacher, tokenizer = open_run(args.teacher)
    student = TinyLM(replace(RECIPE.model, vocab_size=len(tokenizer)))
    validation = DataConfig(tokenizer=args.teacher, stories=100, validation_stories=1000)
    teacher_figures = measure(teacher, validation)
    scale = "" if args.scale == 1 else f" --scale {args.scale:g}"

    sizes = {"teacher": parameters(teacher), "student": parameters(student)}

    def save() -> None:
        results = {
            "parameters": sizes,
            "teacher": teacher_figures,
            "over_seeds": summarize(figures),
            "by_seed": figures,
        }

        # With where the figures came from.
        entry = {
            "command": f"python benchmarks/distill.py --teacher runs/teacher{scale}",
            "commit": commit(),
            "date": str(date.today()),
            "machine": machine(),
            "seeds": sorted(int(s) for s in figures["data"]),
            "figures": results,
        }
        args.out.write_text(json.dumps(entry, indent=1) + "\n", "utf-8")

    for seed in args.seeds:
        run_seed(args.teacher, seed, figures, args.scale, save)


if __name__ == "__main__":
    main()
