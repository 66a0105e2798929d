"""What does routing cost? A training step with experts, beside one of a dense model.

    python benchmarks/moe_step.py                          2 of 8 experts, 512 wide each
    python benchmarks/moe_step.py --modes fp32 --repeats 15

Both are models of this library, and use the same number of parameters for a token. They have the
same batch and the same optimizer, and take turns in one process.
"""

import statistics
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
import tyro
from common import LLAMA, report, take_turns
from train_step import our_step, train_config

from tinylm.cost import count_parameters
from tinylm.engine import matmul_precision
from tinylm.model import ModelConfig, TinyLM


@dataclass
class Options:
    """What is measured."""

    modes: tuple[Literal["fp32", "bf16"], ...] = ("fp32", "bf16")  # precisions of TrainConfig
    hidden_size: int = 256  # width
    layers: int = 4  # blocks
    expert_size: int = (
        512  # width of an expert; two work on a token, so the dense model has twice it
    )
    rows: int = 8  # of a batch
    length: int = 256  # tokens of a row
    repeats: int = 9  # steps of which the median is taken
    warmup: int = 3  # steps before them
    device: str = "cpu"  # or "cuda"
    threads: int | None = None  # CPU threads; None: as PyTorch chooses
    out: Path | None = None  # JSON file for the figures


def make_configs(options: Options) -> dict[str, ModelConfig]:
    """Return the shapes of the two models; two of eight experts work on each token."""
    dense = replace(
        LLAMA,
        hidden_size=options.hidden_size,
        num_hidden_layers=options.layers,
        num_attention_heads=8,
        intermediate_size=2 * options.expert_size,
        vocab_size=4096,
    )

    # The same, with experts.
    moe = replace(
        dense,
        num_experts=8,
        num_experts_per_tok=2,
        moe_intermediate_size=options.expert_size,
    )
    return {"moe": moe, "dense": dense}


def measure(mode: str, options: Options) -> dict[str, list[float]]:
    """Measure the seconds of each step of both models in one precision."""
    torch.manual_seed(0)
    configs = make_configs(options)
    shape = (options.rows, options.length)
    ids = torch.randint(configs["dense"].vocab_size, shape, device=options.device)
    train = train_config(mode, options.rows, options.device)
    steps = {}
    for name, config in configs.items():
        steps[name] = our_step(TinyLM(config).to(options.device), train, ids)

    # The first steps take memory, and do not count.
    with matmul_precision(train.precision):
        take_turns(steps, options.warmup, options.device)
        return take_turns(steps, options.repeats, options.device)


def main(options: Options) -> None:
    """Measure in every precision, and report."""
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    active = count_parameters(make_configs(options)["moe"])["active"]
    rows = []
    figures = {}
    for mode in options.modes:
        seconds = measure(mode, options)

        # Medians, and the ratio of each turn.
        moe = statistics.median_high(seconds["moe"])
        dense = statistics.median_high(seconds["dense"])
        turns = zip(seconds["moe"], seconds["dense"], strict=True)
        ratios = [moe_seconds / dense_seconds for moe_seconds, dense_seconds in turns]
        figures[mode] = {
            "moe_over_dense": moe / dense,
            "lowest": min(ratios),
            "highest": max(ratios),
        }
        row = {
            "mode": mode,
            "active": f"{active:,}",
            "moe ms": f"{1000 * moe:.1f}",
            "dense ms": f"{1000 * dense:.1f}",
            "ratio": f"{moe / dense:.2f}",
            "range": f"{min(ratios):.2f} to {max(ratios):.2f}",
        }
        rows.append(row)
    report(rows, {"figures": figures}, options.device, options.out)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
