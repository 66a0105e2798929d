"""How fast does greedy decoding with a cache go, and how fast is `transformers.generate` with the same weights?

    python benchmarks/decode.py                            three shapes, one text and eight at a time
    python benchmarks/decode.py --shapes 256x6 --batch-sizes 1 --new-tokens 32
    python benchmarks/decode.py --out decode.json          also write the figures

They take turns in one process, and every token must be the same. "packed" is this library with its weights laid out for
few rows (`tinylm.decoding.packed`, float32 on a CPU). "limit" is how often the weights can be read from memory.
"""

import copy
import time
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import tyro
from common import SHAPES, Shape, compare, make_pair, report, take_turns
from transformers import GenerationConfig, LlamaForCausalLM

from tinylm.decoding import packed
from tinylm.generate import SamplingConfig, generate
from tinylm.model import ModelConfig, TinyLM


@dataclass
class Options:
    """What is measured."""

    shapes: tuple[Shape, ...] = ("256x6", "512x8", "135m")  # "tiny" is for the tests
    batch_sizes: tuple[int, ...] = (1, 8)  # texts at a time
    prompt_tokens: int = 32  # length of each prompt
    new_tokens: int = 128  # tokens added to each
    repeats: int = 5  # calls of which the median is taken
    device: str = "cpu"  # or "cuda"
    threads: int | None = None  # CPU threads; None: as PyTorch chooses
    out: Path | None = None  # JSON file for the figures


def our_tokens(model: TinyLM, prompts: torch.Tensor, new_tokens: int) -> list[list[int]]:
    return generate(model, prompts, SamplingConfig(new_tokens, temperature=0))


def their_tokens(
    model: LlamaForCausalLM, prompts: torch.Tensor, new_tokens: int
) -> list[list[int]]:
    how = GenerationConfig(max_new_tokens=new_tokens, do_sample=False, use_cache=True)
    out = model.generate(prompts, how, attention_mask=torch.ones_like(prompts))
    return out[:, prompts.shape[1] :].tolist()


def read_speed(device: str, seconds: float = 1.0) -> float:
    """Bytes per second at which a large tensor can be read."""
    x, best, end = torch.ones(2**27, device=device), 0.0, time.perf_counter() + seconds
    while time.perf_counter() < end:
        begin = time.perf_counter()
        x.sum().item()
        best = max(best, x.nbytes / (time.perf_counter() - begin))
    return best


def measure(config: ModelConfig, batch_size: int, options: Options) -> dict[str, float]:
    """Speed of all, prompt included, once they are seen to give the same tokens."""
    wide = replace(
        config, initializer_range=0.1
    )  # random models with clear favourites among the tokens
    ours, theirs = (model.eval() for model in make_pair(wide, options.device))
    laid_out = copy.deepcopy(ours)
    prompts = torch.randint(
        config.vocab_size, (batch_size, options.prompt_tokens), device=options.device
    )
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
    n = batch_size * options.new_tokens
    fast = compare({"tinylm": seconds["packed"], "transformers": seconds["transformers"]}, n)
    limit = batch_size * read_speed(options.device) / sum(p.nbytes for p in ours.parameters())
    return compare(seconds, n) | {
        "packed": fast["tinylm"],
        "packed_ratio": fast["ratio"],
        "limit": limit,
    }


def main(options: Options) -> None:
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    rows, figures = [], []
    for shape in options.shapes:
        for batch_size in options.batch_sizes:
            result = measure(SHAPES[shape][0], batch_size, options)
            names = ("tinylm", "packed", "transformers", "limit")
            speed = {f"{name} tokens/s": f"{result[name]:,.0f}" for name in names}
            turns = {
                "ratio": f"{result['ratio']:.2f}",
                "turn by turn": f"{result['lowest']:.2f} to {result['highest']:.2f}",
                "packed ratio": f"{result['packed_ratio']:.2f}",
            }
            rows.append({"shape": shape, "texts": str(batch_size), **speed, **turns})
            figures.append({"shape": shape, "batch_size": batch_size, **result})
    settings = {
        "prompt_tokens": options.prompt_tokens,
        "new_tokens": options.new_tokens,
        "repeats": options.repeats,
    }
    report(rows, {**settings, "figures": figures}, options.device, options.out)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
