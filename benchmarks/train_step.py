"""How fast is a training step, and how fast is the same step in transformers?

    python benchmarks/train_step.py                        both shapes, six modes: some minutes
    python benchmarks/train_step.py --shapes 256x6 --modes fp32 --repeats 9
    python benchmarks/train_step.py --out step.json        also write the figures

Both have the same weights, the same batch, AdamW in its fused form with the same settings, and the
same clipping. They take turns in one process. After the last turn both must have the same loss, so
they have done the same work.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import torch
import tyro
from common import SHAPES, Shape, ShapeName, compare, make_pair, report, take_turns
from transformers import LlamaForCausalLM

from tinylm.cost import flops_per_token
from tinylm.engine import (
    PRECISIONS,
    Engine,
    keep_freed_memory,
    matmul_precision,
    measure_matmul_peak,
    next_token_loss,
)
from tinylm.model import TinyLM
from tinylm.pretrain import TrainConfig

Mode = Literal["fp32", "bf16_matmul", "bf16", "fp32+compile", "bf16_matmul+compile", "bf16+compile"]


@dataclass
class Options:
    """What is measured."""

    shapes: tuple[ShapeName, ...] = ("256x6", "512x8")  # "tiny" is for the tests
    modes: tuple[Mode, ...] = get_args(Mode)  # of TrainConfig; "+compile" needs a C++ compiler
    repeats: int = 5  # steps of which the median is taken
    warmup: int = 3  # steps before them, in which memory is taken and code is compiled
    device: str = "cpu"  # or "cuda"
    threads: int | None = None  # CPU threads; None: as PyTorch chooses
    out: Path | None = None  # JSON file for the figures


def train_config(
    mode: str,  # a precision, perhaps with "+compile"
    rows: int,  # of a batch
    device: str,  # where both work
) -> TrainConfig:
    """Return settings under which both do the same: AdamW at a constant rate."""
    precision, _, compiled = mode.partition("+")
    return TrainConfig(
        batch_size=rows,
        optimizer="adamw",
        precision=precision,
        compile=bool(compiled),
        device=device,
        learning_rate=1e-4,
        warmup_steps=0,
        max_steps=10**6,
        weight_decay=0.0,
    )


def our_step(
    model: TinyLM,  # of this library
    config: TrainConfig,  # precision, optimizer, clipping
    ids: torch.Tensor,  # the batch, (rows, tokens)
) -> Callable[[], float]:
    """Make a function that trains for a step, and returns the loss."""
    keep_freed_memory()
    engine = Engine(model, next_token_loss(model), config)
    batch = {"input_ids": ids, "labels": ids}

    def step() -> float:
        return engine.step(batch, 0).mean_loss

    return step


def their_step(
    model: LlamaForCausalLM,  # with the same weights
    config: TrainConfig,  # precision, optimizer, clipping
    ids: torch.Tensor,  # the batch, (rows, tokens)
) -> Callable[[], float]:
    """Make a function that trains for a step, and returns the loss."""
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=config.learning_rate,
        betas=config.betas,
        weight_decay=config.weight_decay,
        fused=True,
    )
    module = torch.compile(model) if config.compile else model
    dtype = PRECISIONS[config.precision][1]

    # One step, as a loop of one's own in PyTorch would have it.

    def step() -> float:
        with torch.autocast(ids.device.type, dtype, enabled=dtype is not None):
            loss = module(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def check_same_loss(steps: dict[str, Callable[[], float]], precision: str) -> None:
    """Stop if the two have different losses, because then they did not do the same work."""
    ours = steps["tinylm"]()
    theirs = steps["transformers"]()
    tolerance = 0.0001 if precision == "fp32" else 0.01
    if abs(ours - theirs) > tolerance * abs(theirs):
        losses = f"the losses are {ours:.4f} and {theirs:.4f}"
        raise SystemExit(f"{precision}: {losses}, so this compares different things")


def measure(
    shape: Shape,  # the model, and the size of a batch
    mode: str,  # a precision, perhaps with "+compile"
    options: Options,  # of the command line
) -> dict[str, float]:
    """Measure the speed of both in one mode, and the peak: the fastest matrix product."""
    torch.compiler.reset()
    train = train_config(mode, shape.rows, options.device)
    ours, theirs = make_pair(shape.config, options.device)
    batch_shape = (shape.rows, shape.length)
    ids = torch.randint(shape.config.vocab_size, batch_shape, device=options.device)
    steps = {"tinylm": our_step(ours, train, ids), "transformers": their_step(theirs, train, ids)}

    # The peak is measured before and after, because a shared machine is not always as fast.
    peak = measure_matmul_peak(options.device, train.precision)
    with matmul_precision(train.precision):
        take_turns(steps, options.warmup, options.device)
        seconds = take_turns(steps, options.repeats, options.device)
        check_same_loss(steps, train.precision)
    peak = max(peak, measure_matmul_peak(options.device, train.precision))

    # The backward pass does twice the work of the forward pass.
    flops = 3 * flops_per_token(shape.config, shape.length)
    tokens = shape.rows * shape.length
    return {**compare(seconds, tokens), "flops_per_token": flops, "peak": peak}


def best(modes: dict[str, dict[str, float]]) -> dict[str, float | str]:
    """Compare the libraries, each in its fastest mode."""
    our_mode = max(modes, key=lambda mode: modes[mode]["tinylm"])
    their_mode = max(modes, key=lambda mode: modes[mode]["transformers"])
    ours = modes[our_mode]["tinylm"]
    theirs = modes[their_mode]["transformers"]
    return {
        "tinylm": ours,
        "transformers": theirs,
        "ratio": ours / theirs,
        "tinylm_mode": our_mode,
        "transformers_mode": their_mode,
    }


def as_row(
    shape: str,  # its name
    mode: str,  # a precision, perhaps with "+compile"
    figures: dict,  # what `measure` returned
) -> dict[str, str]:
    """Write the figures of one mode as a row of the table."""
    row = {"shape": shape, "mode": mode}
    for name in ("tinylm", "transformers"):
        rate = figures[name] * figures["flops_per_token"]
        row[f"{name} tokens/s"] = f"{figures[name]:,.0f}"
        row[f"{name} GFLOP/s"] = f"{rate / 1e9:,.1f} ({rate / figures['peak']:.0%})"
    row["peak"] = f"{figures['peak'] / 1e9:,.0f}"
    row["ratio"] = f"{figures['ratio']:.2f}"
    row["turn by turn"] = f"{figures['lowest']:.2f} to {figures['highest']:.2f}"
    return row


def best_row(
    shape: str,  # its name
    top: dict,  # what `best` returned
    columns: dict[str, str],  # any other row
) -> dict[str, str]:
    """Write the last row of a shape.

    The second column of each library says which mode was its fastest.
    """
    row = dict.fromkeys(columns, "")
    row["shape"] = shape
    row["mode"] = "best of each"
    row["ratio"] = f"{top['ratio']:.2f}"
    for name in ("tinylm", "transformers"):
        row[f"{name} tokens/s"] = f"{top[name]:,.0f}"
        row[f"{name} GFLOP/s"] = top[f"{name}_mode"]
    return row


def main(options: Options) -> None:
    """Measure every shape in every mode, and report."""
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    rows = []
    figures = {}
    for shape in options.shapes:
        results = {mode: measure(SHAPES[shape], mode, options) for mode in options.modes}
        rows += [as_row(shape, mode, result) for mode, result in results.items()]
        top = best(results)
        rows.append(best_row(shape, top, rows[0]))
        figures[shape] = {"modes": results, "best": top}
    report(rows, {"repeats": options.repeats, "shapes": figures}, options.device, options.out)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
