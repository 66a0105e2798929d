"""How fast is greedy decoding with a cache, and how fast is `transformers.generate`?

    python benchmarks/decode.py                            three shapes, 1 text and 8
    python benchmarks/decode.py --shapes 256x6 --batch-sizes 1 --new-tokens 32
    python benchmarks/decode.py --out decode.json          also write the figures

Both have the same weights. They take turns in one process, and every token must be the same.
"packed" is this library with its weights laid out for few rows (`tinylm.decoding.packed`, float32
on a CPU). "limit" is how often the weights can be read from memory.
"""

import copy
import time
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import tyro
from common import SHAPES, ShapeName, compare, make_pair, report, take_turns
from transformers import GenerationConfig, LlamaForCausalLM

from tinylm.decoding import packed
from tinylm.generate import SamplingConfig, generate
from tinylm.model import ModelConfig, TinyLM


@dataclass
class Options:
    """What is measured."""

    shapes: tuple[ShapeName, ...] = ("256x6", "512x8", "135m")  # "tiny" is for the tests
    batch_sizes: tuple[int, ...] = (1, 8)  # texts at a time
    prompt_tokens: int = 32  # length of each prompt
    new_tokens: int = 128  # tokens added to each
    repeats: int = 5  # calls of which the median is taken
    device: str = "cpu"  # or "cuda"
    threads: int | None = None  # CPU threads; None: as PyTorch chooses
    out: Path | None = None  # JSON file for the figures


def our_tokens(
    model: TinyLM,  # of this library
    prompts: torch.Tensor,  # ids, (rows, tokens)
    new_tokens: int,  # tokens added to each row
) -> list[list[int]]:
    """Generate with this library."""
    return generate(model, prompts, SamplingConfig(new_tokens, temperature=0))


def their_tokens(
    model: LlamaForCausalLM,  # with the same weights
    prompts: torch.Tensor,  # ids, (rows, tokens)
    new_tokens: int,  # tokens added to each row
) -> list[list[int]]:
    """Generate with transformers."""
    config = GenerationConfig(max_new_tokens=new_tokens, do_sample=False, use_cache=True)
    texts = model.generate(prompts, config, attention_mask=torch.ones_like(prompts))
    return texts[:, prompts.shape[1] :].tolist()


def read_speed(device: str, seconds: float = 1.0) -> float:
    """Measure at how many bytes per second a large tensor can be read."""
    x = torch.ones(2**27, device=device)
    best = 0.0
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        begin = time.perf_counter()
        x.sum().item()
        best = max(best, x.nbytes / (time.perf_counter() - begin))
    return best


def measure(
    config: ModelConfig,  # of both models
    batch_size: int,  # texts at a time
    options: Options,  # of the command line
) -> dict[str, float]:
    """Measure the speed of all, prompt included, after a check that their tokens are the same."""
    # Large random weights have clear favorites among the tokens, so that rounding changes none.
    wide = replace(config, initializer_range=0.1)
    ours, theirs = make_pair(wide, options.device)
    ours.eval()
    theirs.eval()
    laid_out = copy.deepcopy(ours)
    shape = (batch_size, options.prompt_tokens)
    prompts = torch.randint(config.vocab_size, shape, device=options.device)

    # Check, then measure.
    contestants = {
        "tinylm": lambda: our_tokens(ours, prompts, options.new_tokens),
        "packed": lambda: our_tokens(laid_out, prompts, options.new_tokens),
        "transformers": lambda: their_tokens(theirs, prompts, options.new_tokens),
    }
    with packed(laid_out) if options.device == "cpu" else nullcontext():
        tokens = [contestant() for contestant in contestants.values()]
        if any(other != tokens[0] for other in tokens):
            raise SystemExit("the tokens differ, so this compares different things")
        seconds = take_turns(contestants, options.repeats, options.device)

    # Each token needs all weights once, for all texts of the batch.
    weight_bytes = sum(parameter.nbytes for parameter in ours.parameters())
    limit = batch_size * read_speed(options.device) / weight_bytes
    tokens = batch_size * options.new_tokens
    pair = {"tinylm": seconds["packed"], "transformers": seconds["transformers"]}
    fast = compare(pair, tokens)
    return {
        **compare(seconds, tokens),
        "packed": fast["tinylm"],
        "packed_ratio": fast["ratio"],
        "limit": limit,
    }


def as_row(
    shape: str,  # its name
    batch_size: int,  # texts at a time
    figures: dict[str, float],  # what `measure` returned
) -> dict[str, str]:
    """Write the figures of one shape and batch size as a row of the table."""
    names = ("tinylm", "packed", "transformers", "limit")
    return {
        "shape": shape,
        "texts": str(batch_size),
        **{f"{name} tokens/s": f"{figures[name]:,.0f}" for name in names},
        "ratio": f"{figures['ratio']:.2f}",
        "turn by turn": f"{figures['lowest']:.2f} to {figures['highest']:.2f}",
        "packed ratio": f"{figures['packed_ratio']:.2f}",
    }


def main(options: Options) -> None:
    """Measure every shape with every batch size, and report."""
    if options.threads is not None:
        torch.set_num_threads(options.threads)

    # Measure.
    rows = []
    figures = []
    for shape in options.shapes:
        for batch_size in options.batch_sizes:
            result = measure(SHAPES[shape].config, batch_size, options)
            rows.append(as_row(shape, batch_size, result))
            figures.append({"shape": shape, "batch_size": batch_size, **result})

    # Report.
    settings = {
        "prompt_tokens": options.prompt_tokens,
        "new_tokens": options.new_tokens,
        "repeats": options.repeats,
    }
    report(rows, {**settings, "figures": figures}, options.device, options.out)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
