"""What does routing cost? A training step with experts, beside a dense model that uses as many parameters per token.

    python benchmarks/moe_step.py                          256 wide, 4 layers, 2 of 8 experts, 512 wide each
    python benchmarks/moe_step.py --modes fp32 --repeats 15

Both are models of this library. The same batch, the same optimiser; they take turns in one process.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
import tyro
from common import LLAMA, report, take_turns
from train_step import our_step, train_config

from tinylm.engine import matmul_precision
from tinylm.model import TinyLM, count_parameters


@dataclass
class Options:
    """What is measured."""

    modes: tuple[Literal["fp32", "bf16"], ...] = ("fp32", "bf16")  # precisions of TrainConfig
    hidden_size: int = 256  # width
    layers: int = 4  # blocks
    expert_size: int = (
        512  # width of an expert; the dense model is twice as wide, because two experts work
    )
    rows: int = 8  # of a batch
    length: int = 256  # tokens of a row
    repeats: int = 9  # steps of which the median is taken
    warmup: int = 3  # steps before them
    device: str = "cpu"  # or "cuda"
    threads: int | None = None  # CPU threads; None: as PyTorch chooses
    out: Path | None = None  # JSON file for the figures


def main(options: Options) -> None:
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    shape = dict(
        hidden_size=options.hidden_size, num_hidden_layers=options.layers, num_attention_heads=8
    )
    dense = replace(LLAMA, **shape, intermediate_size=2 * options.expert_size, vocab_size=4096)
    sparse = replace(
        dense, num_experts=8, num_experts_per_tok=2, moe_intermediate_size=options.expert_size
    )
    ids = torch.randint(dense.vocab_size, (options.rows, options.length), device=options.device)
    rows, figures = [], {}
    for mode in options.modes:
        train = train_config(mode, options.rows, options.device)
        steps = {
            name: our_step(TinyLM(c).to(options.device), train, ids)
            for name, c in (("moe", sparse), ("dense", dense))
        }
        with matmul_precision(train.precision):
            take_turns(steps, options.warmup, options.device)
            seconds = take_turns(steps, options.repeats, options.device)
        times = {name: sorted(values)[len(values) // 2] for name, values in seconds.items()}
        ratios = sorted(a / b for a, b in zip(seconds["moe"], seconds["dense"], strict=True))
        figures[mode] = {
            "moe_over_dense": times["moe"] / times["dense"],
            "lowest": ratios[0],
            "highest": ratios[-1],
        }
        row = {"mode": mode, "active": f"{count_parameters(sparse)['active']:,}"}
        row |= {f"{name} ms": f"{1000 * value:.1f}" for name, value in times.items()}
        rows.append(
            row
            | {
                "ratio": f"{figures[mode]['moe_over_dense']:.2f}",
                "range": f"{ratios[0]:.2f} to {ratios[-1]:.2f}",
            }
        )
    report(rows, {"figures": figures}, options.device, options.out)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
