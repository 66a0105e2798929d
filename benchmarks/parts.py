"""Train a small recipe with one part exchanged, and write nbs/results/parts.json.

    python benchmarks/parts.py                                 # every part, with three seeds
    python benchmarks/parts.py --parts sinks --seeds 0         # some of the runs, no file
    python benchmarks/parts.py --finished                      # the file, from the runs so far

Every run keeps its folder in --out, so a script that was stopped goes on where it was, and finished
runs are read. All parts get the same training FLOPs as the baseline.
"""

import argparse
import json
import os
import statistics
import time
from dataclasses import replace
from pathlib import Path
from statistics import fmean

import torch
from record import interval, percent, write
from torch import Tensor

from tinylm.checkpoints import load_model
from tinylm.cost import count_parameters
from tinylm.data import Batches
from tinylm.engine import Engine, next_token_loss
from tinylm.evaluate import loss_by_kind
from tinylm.experiments import ablate, step_flops
from tinylm.model import Block, TinyLM
from tinylm.parts import (
    AttentionBlock,
    GatedBlock,
    ReLUSquaredBlock,
    ShiftBlock,
    SinkBlock,
    SoftcapBlock,
    StepwiseAttention,
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
    "value residual": {"model.value_residual": True},
    "ReLU squared": {"block": ReLUSquaredBlock},
    "sinks": {"block": SinkBlock},
    "softcap": {"block": SoftcapBlock},
}
STORIES = 100  # for the loss by kind of token


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


def finished_runs(recipe: PretrainConfig, seeds: list[int]) -> dict[str, dict[int, dict]]:
    """Read the results of finished runs, by part and seed; those of the baseline come first."""
    finished: dict[str, dict[int, dict]] = {}
    for name in ("baseline", *PARTS):
        folders = {seed: Path(recipe.out, name, f"seed-{seed}") for seed in seeds}
        for seed, folder in folders.items():
            result = folder / "result.json"
            if result.exists():
                row = json.loads(result.read_text("utf-8"))
                finished.setdefault(name, {})[seed] = {**row, "folder": folder}
    return finished


def by_kind(
    recipe: PretrainConfig,  # of the runs
    run: Path,  # folder of one of them
    block: type[Block],  # what its model is made of
) -> dict[str, float]:
    """Return nats above the floor for each kind of token, over the first validation stories."""
    prepared = prepare(recipe.data)
    stories = validation_stories(prepared)[:STORIES]
    losses = loss_by_kind(load_model(run, block=block), prepared.tokenizer, stories)
    return {entry.kind: entry.loss - entry.floor for entry in losses}


class LogitRecorder(StepwiseAttention):
    """Attention that remembers its largest logit."""

    largest = 0.0

    def mix(
        self,
        q: Tensor,  # (B, H, T, d) rotated queries
        k: Tensor,  # (B, K, S, d) rotated keys
        v: Tensor,  # (B, K, S, d) values
        mask: Tensor | None,  # True = may attend; None: causal
    ) -> Tensor:  # (B, H, T, d)
        """Look at the logits, then go on as usual."""
        keys = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
        logits = q @ keys.mT * q.shape[-1] ** -0.5
        hidden = torch.zeros((), dtype=torch.bool) if mask is None else ~mask
        self.largest = max(self.largest, logits.masked_fill(hidden, 0.0).abs().max().item())
        return super().mix(q, k, v, mask)


class LogitRecorderBlock(AttentionBlock):
    """A block with `LogitRecorder`."""

    attention_class = LogitRecorder


def largest_logits(recipe: PretrainConfig, run: Path) -> list[float]:
    """Return the largest attention logit in each layer, over a batch of validation rows."""
    model = load_model(run, block=LogitRecorderBlock).eval()
    batch = Batches(prepare(recipe.data).validation, recipe.data.seq_len, 16).batch(0)
    with torch.no_grad():
        model.loss_sum(**batch)
    return [round(layer.self_attn.largest, 2) for layer in model.model.layers]


def time_steps(recipe: PretrainConfig, steps: int) -> dict[str, float]:
    """Return the milliseconds of a training step relative to the baseline: medians, in turns."""
    prepared = prepare(recipe.data)
    config = replace(recipe.model, vocab_size=len(prepared.tokenizer))
    batches = Batches(prepared.train, recipe.data.seq_len, recipe.train.batch_size)
    engines: dict[str, Engine] = {}
    for name, changes in {"baseline": {}, **PARTS}.items():
        torch.manual_seed(0)
        fields = {
            path.removeprefix("model."): value
            for path, value in changes.items()
            if path.startswith("model.")
        }
        model = TinyLM(replace(config, **fields), changes.get("block", Block))
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


def summary(values: dict[int, float], minus: dict[int, float] | None = None) -> dict:
    """Return mean and half of the 95% interval over seeds; with `minus`, of differences in pairs.

    A single seed has no interval.
    """
    numbers = []
    for seed, value in values.items():
        numbers.append(value - minus[seed] if minus else value)
    figure = interval(numbers)
    if len(numbers) == 1:
        figure["half_of_95_interval"] = None
    by_seed = {str(seed): round(number, 4) for seed, number in zip(values, numbers, strict=True)}
    return {**figure, "by_seed": by_seed}


def figures_of(
    recipe: PretrainConfig,  # of the baseline
    runs: dict[str, dict[int, dict]],  # finished runs, by part and seed
    timed_steps: int,  # for the time of a step
) -> dict:
    """Summarize the runs: each part, and its difference to the baseline, seed by seed."""
    first_run = next(iter(runs["baseline"].values()))["folder"]
    floor = read_metrics(first_run)[-1]["floor"]
    speed = time_steps(recipe, timed_steps)
    config = replace(recipe.model, vocab_size=len(prepare(recipe.data).tokenizer))

    # All that is measured, by part, kind of token and seed; "": all tokens.
    excess: dict[str, dict[str, dict[int, float]]] = {}
    parts = {}
    for name, rows in runs.items():
        block = PARTS.get(name, {}).get("block", Block)
        kinds: dict[str, dict[int, float]] = {"": {}}
        for seed, row in rows.items():
            kinds[""][seed] = row["excess"]
            for kind, value in by_kind(recipe, row["folder"], block).items():
                kinds.setdefault(f"{kind}_tokens_", {})[seed] = value
        excess[name] = kinds

        # The same seed has the same batches, so differences are taken seed by seed.
        entry: dict = {
            "distance_to_the_floor_percent": percent(fmean(kinds[""].values()) / floor),
            "steps": next(iter(rows.values()))["steps"],
            "parameters": count_parameters(config, block)["total"],
            "million_flops_per_step": round(step_flops(recipe, block) / 1e6),
            "time_of_a_step": speed[name],
        }
        for kind, values in kinds.items():
            entry[f"{kind}nats_above_the_floor"] = summary(values)
            if name != "baseline":
                entry[f"{kind}minus_baseline_nats"] = summary(values, excess["baseline"][kind])
        parts[name] = entry

    figures = {"floor": round(floor, 4), "parts": parts}
    return {**figures, "largest_logits_of_the_baseline": largest_logits(recipe, first_run)}


def main() -> None:
    """Train what is asked for; with all parts, write the file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, help="only these runs, and no file")
    parser.add_argument("--finished", action="store_true", help="only read; train nothing")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=400, help="of the baseline")
    parser.add_argument("--out", type=Path, default=Path("runs/parts"), help="folder of the runs")
    parser.add_argument("--commit", default="", help="of the code that made finished runs")
    parser.add_argument("--timed-steps", type=int, default=20)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()

    # Train; finished runs are only read.
    torch.set_num_threads(arguments.threads)
    recipe = short_recipe(arguments.steps, arguments.out)
    if not arguments.finished:
        names = arguments.parts or list(PARTS)
        ablate(recipe, {name: PARTS[name] for name in names}, arguments.seeds)

    # Write the file, unless only some of the runs were asked for.
    if arguments.parts is None:
        runs = finished_runs(recipe, arguments.seeds)
        seeds = list(runs["baseline"])
        figures = figures_of(recipe, runs, arguments.timed_steps)
        command = f"python benchmarks/parts.py --steps {arguments.steps}"
        write("parts", command, seeds, figures, arguments.commit)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
