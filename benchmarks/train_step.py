"""How fast is a training step, and how fast is the same step in transformers?

    python benchmarks/train_step.py                        both shapes, six modes: some minutes
    python benchmarks/train_step.py --shapes 256x6 --modes fp32 --repeats 9
    python benchmarks/train_step.py --out step.json        also write the figures

Both have the same weights, the same batch, AdamW in its fused form with the same settings, and the same clipping; they
take turns in one process. After the last turn both must have the same loss, so they have done the same work.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import torch
import tyro
from common import SHAPES, Shape, compare, make_pair, report, take_turns
from transformers import LlamaForCausalLM

from tinylm.engine import (
    PRECISIONS,
    Engine,
    keep_freed_memory,
    matmul_precision,
    measure_matmul_peak,
    next_token_loss,
)
from tinylm.model import ModelConfig, TinyLM, flops_per_token
from tinylm.pretrain import TrainConfig

Mode = Literal["fp32", "bf16_matmul", "bf16", "fp32+compile", "bf16_matmul+compile", "bf16+compile"]


@dataclass
class Options:
    """What is measured."""

    shapes: tuple[Shape, ...] = ("256x6", "512x8")  # "tiny" is for the tests
    modes: tuple[Mode, ...] = get_args(
        Mode
    )  # precisions of TrainConfig; "+compile" needs a C++ compiler
    repeats: int = 5  # steps of which the median is taken
    warmup: int = 3  # steps before them, in which memory is taken and code is compiled
    device: str = "cpu"  # or "cuda"
    threads: int | None = None  # CPU threads; None: as PyTorch chooses
    out: Path | None = None  # JSON file for the figures


def train_config(mode: str, rows: int, device: str) -> TrainConfig:
    """Settings under which both do the same: AdamW at a constant rate."""
    rate = dict(learning_rate=1e-4, warmup_steps=0, max_steps=10**6, weight_decay=0.0)
    precision, _, compiled = mode.partition("+")
    return TrainConfig(
        batch_size=rows,
        optimizer="adamw",
        precision=precision,
        compile=bool(compiled),
        device=device,
        **rate,
    )


def our_step(model: TinyLM, config: TrainConfig, ids: torch.Tensor) -> Callable[[], float]:
    keep_freed_memory()
    engine = Engine(model, next_token_loss(model), config)
    batch = {"input_ids": ids, "labels": ids}

    def step() -> float:
        return engine.step(batch, 0).mean_loss

    return step


def their_step(
    model: LlamaForCausalLM, config: TrainConfig, ids: torch.Tensor
) -> Callable[[], float]:
    rates = dict(lr=config.learning_rate, betas=config.betas, weight_decay=config.weight_decay)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True, **rates)
    module, dtype = (
        torch.compile(model) if config.compile else model,
        PRECISIONS[config.precision][1],
    )

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
    ours, theirs = (step() for step in steps.values())
    tolerance = 0.0001 if precision == "fp32" else 0.01
    if abs(ours - theirs) > tolerance * abs(theirs):
        raise SystemExit(
            f"{precision}: the losses are {ours:.4f} and {theirs:.4f}, so this compares different things"
        )


def measure(
    config: ModelConfig, rows: int, length: int, mode: str, options: Options
) -> dict[str, float]:
    """Speed of both in one mode, and the largest rate of a matrix product in that precision, before and after."""
    torch.compiler.reset()
    train, ours, theirs = (
        train_config(mode, rows, options.device),
        *make_pair(config, options.device),
    )
    ids = torch.randint(config.vocab_size, (rows, length), device=options.device)
    steps = {"tinylm": our_step(ours, train, ids), "transformers": their_step(theirs, train, ids)}
    peak = measure_matmul_peak(options.device, train.precision)
    with matmul_precision(train.precision):
        take_turns(steps, options.warmup, options.device)
        seconds = take_turns(steps, options.repeats, options.device)
        check_same_loss(steps, train.precision)
    peak = max(peak, measure_matmul_peak(options.device, train.precision))
    flops = 3 * flops_per_token(config, length)  # the backward pass is two forward ones
    return compare(seconds, rows * length) | {"flops_per_token": flops, "peak": peak}


def best(modes: dict[str, dict[str, float]]) -> dict[str, float | str]:
    """Each library in its fastest mode."""
    names = {
        library: max(modes, key=lambda mode: modes[mode][library])
        for library in ("tinylm", "transformers")
    }
    speed = {library: modes[mode][library] for library, mode in names.items()}
    modes_used = {f"{library}_mode": mode for library, mode in names.items()}
    return speed | {"ratio": speed["tinylm"] / speed["transformers"]} | modes_used


def as_row(shape: str, mode: str, figures: dict) -> dict[str, str]:
    row = {"shape": shape, "mode": mode}
    for name in ("tinylm", "transformers"):
        rate = figures[name] * figures["flops_per_token"]
        row[f"{name} tokens/s"] = f"{figures[name]:,.0f}"
        row[f"{name} GFLOP/s"] = f"{rate / 1e9:,.1f} ({rate / figures['peak']:.0%})"
    row |= {"peak": f"{figures['peak'] / 1e9:,.0f}", "ratio": f"{figures['ratio']:.2f}"}
    return row | {"turn by turn": f"{figures['lowest']:.2f} to {figures['highest']:.2f}"}


def best_row(shape: str, top: dict, columns: dict[str, str]) -> dict[str, str]:
    """The last row of a shape; here the second column of each library says which mode was its fastest."""
    row = dict.fromkeys(columns, "") | {
        "shape": shape,
        "mode": "best of each",
        "ratio": f"{top['ratio']:.2f}",
    }
    for name in ("tinylm", "transformers"):
        row |= {f"{name} tokens/s": f"{top[name]:,.0f}", f"{name} GFLOP/s": top[f"{name}_mode"]}
    return row


def main(options: Options) -> None:
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    rows, figures = [], {}
    for shape in options.shapes:
        config, batch, length = SHAPES[shape]
        results = {mode: measure(config, batch, length, mode, options) for mode in options.modes}
        rows += [as_row(shape, mode, result) for mode, result in results.items()]
        top = best(results)
        rows.append(best_row(shape, top, rows[0]))
        figures[shape] = {"modes": results, "best": top}
    report(rows, {"repeats": options.repeats, "shapes": figures}, options.device, options.out)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
