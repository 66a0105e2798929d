"""What the benchmarks share: shapes, pairs of models with the same weights, turns, the table."""

import json
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Literal, NamedTuple

import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM

from tinylm import __version__
from tinylm.checkpoints import config_json
from tinylm.model import ModelConfig, TinyLM


class Shape(NamedTuple):
    """A model, and the batch that it is measured with."""

    config: ModelConfig
    rows: int  # of a batch
    length: int  # tokens of a row


LLAMA = ModelConfig(qk_norm=False, tie_word_embeddings=False)  # what LlamaForCausalLM computes
SMALL = replace(
    LLAMA,
    hidden_size=256,
    intermediate_size=704,
    num_hidden_layers=6,
    num_attention_heads=8,
    vocab_size=4096,
)
LARGE = replace(
    LLAMA,
    hidden_size=512,
    intermediate_size=1408,
    num_hidden_layers=8,
    num_attention_heads=8,
    num_key_value_heads=4,
    vocab_size=6400,
)
SMOLLM2_135M = replace(
    LLAMA,
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    vocab_size=49152,
    tie_word_embeddings=True,
)
TINY = replace(
    LLAMA,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=64,
)
ShapeName = Literal["256x6", "512x8", "135m", "tiny"]
SHAPES: dict[ShapeName, Shape] = {
    "256x6": Shape(SMALL, rows=8, length=256),
    "512x8": Shape(LARGE, rows=4, length=512),
    "135m": Shape(SMOLLM2_135M, rows=1, length=256),
    "tiny": Shape(TINY, rows=2, length=16),  # for the tests
}


def make_pair(config: ModelConfig, device: str) -> tuple[TinyLM, LlamaForCausalLM]:
    """Make a random model of this library and one of transformers, with the same weights."""
    torch.manual_seed(0)
    ours = TinyLM(config).to(device)
    llama = LlamaConfig(**config_json(config))
    theirs = LlamaForCausalLM._from_config(llama, attn_implementation="sdpa").to(device)
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def take_turns(
    contestants: dict[str, Callable],  # what is measured, by name
    repeats: int,  # calls of each
    device: str,  # where they work
) -> dict[str, list[float]]:
    """Measure the seconds of each call.

    Who begins changes from turn to turn, so that nobody always gets the quiet moments.
    """
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    names = list(contestants)
    for _ in range(repeats):
        names.reverse()
        for name in names:
            wait(device)
            begin = time.perf_counter()
            contestants[name]()
            wait(device)
            seconds[name].append(time.perf_counter() - begin)
    return seconds


def wait(device: str) -> None:
    """Wait until a GPU has finished its work."""
    if device == "cuda":
        torch.cuda.synchronize()


def compare(seconds: dict[str, list[float]], tokens: int) -> dict[str, float]:
    """Compute tokens per second and their ratio, from medians, and the range of the ratio."""
    speed = {name: tokens / statistics.median(times) for name, times in seconds.items()}
    turns = zip(seconds["tinylm"], seconds["transformers"], strict=True)
    ratios = [theirs / ours for ours, theirs in turns]
    return {
        **speed,
        "ratio": speed["tinylm"] / speed["transformers"],
        "lowest": min(ratios),
        "highest": max(ratios),
    }


def environment(device: str) -> dict[str, str | int]:
    """Say where the figures come from."""
    cpu = f"{platform.machine()} with {torch.backends.cpu.get_cpu_capability()}"
    return {
        "device": device,
        "name": torch.cuda.get_device_name() if device == "cuda" else cpu,
        "threads": torch.get_num_threads(),
        "tinylm": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def report(
    rows: list[dict[str, str]],  # of the table: the text of each column
    figures: dict,  # what is written
    device: str,  # where it was measured
    out: Path | None,  # JSON file for the figures
) -> None:
    """Print the table, and write the figures as JSON if a file is named."""
    print(", ".join(f"{name} {value}" for name, value in environment(device).items()))

    # The table: the first two columns are words, and stand at the left; numbers stand at the right.
    header = {name: name for name in rows[0]}
    table = [header, *rows]
    widths = {name: max(len(row[name]) for row in table) for name in header}
    words = list(header)[:2]
    for row in table:
        cells = []
        for name, text in row.items():
            width = widths[name]
            cells.append(text.ljust(width) if name in words else text.rjust(width))
        print("  ".join(cells))

    # The figures.
    if out is not None:
        content = {"environment": environment(device), **figures}
        out.write_text(json.dumps(content, indent=2) + "\n", "utf-8")
