"""What both benchmarks share: the shapes, one pair of models with the same weights, taking turns, the table."""

import json
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM

from tinylm import __version__
from tinylm.checkpoints import config_json
from tinylm.model import ModelConfig, TinyLM

LLAMA = ModelConfig(qk_norm=False, tie_word_embeddings=False)  # what LlamaForCausalLM computes
SMALL = dict(
    hidden_size=256,
    intermediate_size=704,
    num_hidden_layers=6,
    num_attention_heads=8,
    vocab_size=4096,
)
LARGE = dict(
    hidden_size=512,
    intermediate_size=1408,
    num_hidden_layers=8,
    num_attention_heads=8,
    vocab_size=6400,
)
TINY = dict(
    hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=64
)
SMOL = dict(
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=30,
    num_attention_heads=9,
    vocab_size=49152,
)
Shape = Literal["256x6", "512x8", "135m", "tiny"]
SHAPES: dict[
    Shape, tuple[ModelConfig, int, int]
] = {  # name: model, rows of a batch, tokens of a row
    "256x6": (replace(LLAMA, **SMALL), 8, 256),
    "512x8": (replace(LLAMA, **LARGE, num_key_value_heads=4), 4, 512),
    "135m": (
        replace(LLAMA, **SMOL, num_key_value_heads=3, tie_word_embeddings=True),
        1,
        256,
    ),  # SmolLM2-135M
    "tiny": (replace(LLAMA, **TINY, num_key_value_heads=2), 2, 16),  # for the tests
}


def make_pair(config: ModelConfig, device: str) -> tuple[TinyLM, LlamaForCausalLM]:
    """A random model of this library and of transformers, with the same weights."""
    torch.manual_seed(0)
    ours = TinyLM(config).to(device)
    theirs = LlamaForCausalLM._from_config(
        LlamaConfig(**config_json(config)), attn_implementation="sdpa"
    ).to(device)
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def take_turns(
    contestants: dict[str, Callable], repeats: int, device: str
) -> dict[str, list[float]]:
    """Seconds of each of `repeats` calls; who begins changes every time, so that no one gets the quiet moments."""
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for turn in range(repeats):
        for name in list(contestants)[:: 1 if turn % 2 else -1]:
            wait(device)
            begin = time.perf_counter()
            contestants[name]()
            wait(device)
            seconds[name].append(time.perf_counter() - begin)
    return seconds


def wait(device: str) -> None:
    """Until a GPU has done what it was told."""
    if device == "cuda":
        torch.cuda.synchronize()


def compare(seconds: dict[str, list[float]], tokens: int) -> dict[str, float]:
    """Median tokens per second of the two, the ratio of these, and the range of the ratio from turn to turn."""
    speed = {name: tokens / statistics.median(times) for name, times in seconds.items()}
    ratios = [
        theirs / ours
        for ours, theirs in zip(seconds["tinylm"], seconds["transformers"], strict=True)
    ]
    return speed | {
        "ratio": speed["tinylm"] / speed["transformers"],
        "lowest": min(ratios),
        "highest": max(ratios),
    }


def environment(device: str) -> dict[str, str | int]:
    """Where the figures come from."""
    cpu = f"{platform.machine()} with {torch.backends.cpu.get_cpu_capability()}"
    name = torch.cuda.get_device_name() if device == "cuda" else cpu
    versions = {
        "tinylm": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    return {"device": device, "name": name, "threads": torch.get_num_threads(), **versions}


def report(rows: list[dict[str, str]], figures: dict, device: str, out: Path | None) -> None:
    """Print the table, and write the figures as JSON if a file is given."""
    widths = {name: max(len(name), *(len(row[name]) for row in rows)) for name in rows[0]}
    print(", ".join(f"{name} {value}" for name, value in environment(device).items()))
    for row in [{name: name for name in widths}, *rows]:
        print(
            "  ".join(
                f"{text:{'<' if i < 2 else '>'}{widths[name]}}"
                for i, (name, text) in enumerate(row.items())
            )
        )
    if out is not None:
        out.write_text(
            json.dumps({"environment": environment(device), **figures}, indent=2) + "\n", "utf-8"
        )
