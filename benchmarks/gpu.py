"""How fast does this library train and generate on a GPU?

    python benchmarks/gpu.py --out gpu.json      one CUDA GPU: under eight minutes
    python benchmarks/gpu.py --dry-run           tiny models on a CPU, in seconds: does it run?

It trains the shape of the recipe `25m` and one of 350 million parameters on random tokens, in rows
that are packed with documents. It compares a dense mask with FlexAttention, eager code with
compiled code, and experts with a dense model, and measures decoding. MFU is the share of the
fastest matrix product, measured just before. What fails is reported by name, and the rest goes on.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import tyro
from common import report, wait

from tinylm.basics import first_line
from tinylm.cost import count_parameters, flops_per_token
from tinylm.engine import (
    Engine,
    describe_engine,
    list_fallbacks,
    matmul_precision,
    measure_matmul_peak,
    next_token_loss,
)
from tinylm.generate import SamplingConfig, generate
from tinylm.model import ModelConfig, TinyLM
from tinylm.pretrain import TrainConfig
from tinylm.recipes import read_recipe

DOCUMENT = 200  # mean length of a document, in tokens
SECONDS = 440  # no further measurement begins after that


@dataclass
class Options:
    """What is measured."""

    dry_run: bool = False  # tiny shapes, on a CPU, two steps each
    repeats: int = 12  # steps of which the median is taken
    warmup: int = 4  # steps before them, in which code is compiled
    out: Path | None = None  # JSON file for the figures


@dataclass
class Case:
    """A training run that is measured."""

    model: ModelConfig
    rows: int  # of a batch
    length: int  # tokens of a row
    settings: dict  # fields of a TrainConfig


def make_cases(dry_run: bool) -> dict[str, Case]:
    """List what is trained, the most important first."""
    recipe = read_recipe("25m")
    small = replace(recipe.model, vocab_size=recipe.data.vocab_size)
    large = replace(
        small,
        hidden_size=1024,
        num_hidden_layers=28,
        num_attention_heads=16,
        num_key_value_heads=4,
        vocab_size=32768,
        max_position_embeddings=2048,
    )
    sizes = {"25m": (64, recipe.data.seq_len), "350m": (16, 2048)}
    if dry_run:
        small = replace(small, hidden_size=32, num_hidden_layers=2, vocab_size=64)
        large = replace(small, hidden_size=64)
        sizes = dict.fromkeys(sizes, (2, 64))

    # Experts: two of eight work on a token, each half as wide as the dense layer.
    moe = replace(small, num_experts=8, num_experts_per_tok=2)
    dense_mask = {"attn_implementation": "sdpa"}
    return {
        "25m": Case(small, *sizes["25m"], {}),
        "350m": Case(large, *sizes["350m"], {}),
        "25m, dense mask": Case(small, *sizes["25m"], dense_mask),
        "350m, dense mask": Case(large, *sizes["350m"], dense_mask),
        "25m, eager": Case(small, *sizes["25m"], {"compile": False}),
        "350m, gradient checkpointing": Case(
            large, *sizes["350m"], {"gradient_checkpointing": True}
        ),
        "25m, experts": Case(moe, *sizes["25m"], {}),
        "25m, experts, eager": Case(moe, *sizes["25m"], {"compile": False}),
        "25m, AdamW": Case(small, *sizes["25m"], {"optimizer": "adamw"}),
    }


def make_batch(case: Case, device: str) -> dict[str, torch.Tensor]:
    """Draw random tokens, in rows that are packed with documents of random lengths."""
    generator = torch.Generator().manual_seed(0)
    shape = (case.rows, case.length)
    ids = torch.randint(case.model.vocab_size, shape, generator=generator)
    begins = torch.rand(shape, generator=generator) < 1 / DOCUMENT
    batch = {"input_ids": ids, "labels": ids, "document_ids": begins.long().cumsum(-1)}
    return {name: tensor.to(device) for name, tensor in batch.items()}


def median_seconds(
    call: Callable[[], object],  # what is measured
    options: Options,  # warmup, repeats
    device: str,  # where it works
) -> float:
    """Measure the median time of a call."""
    for _ in range(options.warmup):
        call()
    times = []
    for _ in range(options.repeats):
        wait(device)
        begin = time.perf_counter()
        call()
        wait(device)
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


def measure_training(
    case: Case,  # what is trained
    options: Options,  # warmup, repeats
    device: str,  # where
    peak: float,  # operations per second of the fastest matrix product
) -> dict[str, float | str]:
    """Measure a training step."""
    torch.manual_seed(0)
    torch.compiler.reset()
    train = TrainConfig(batch_size=case.rows, device=device, **case.settings)
    model = TinyLM(case.model).to(device).train()
    engine = Engine(model, next_token_loss(model), train)
    batch = make_batch(case, device)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    with matmul_precision(engine.precision):
        seconds = median_seconds(lambda: engine.step(batch, 1), options, device)

    # The backward pass does twice the work of the forward pass.
    speed = case.rows * case.length / seconds
    flops = 3 * flops_per_token(case.model, case.length)
    machine = describe_engine(train, case.model)
    return {
        "tokens_per_second": speed,
        "mfu": speed * flops / peak,
        "milliseconds": 1000 * seconds,
        "gigabytes": torch.cuda.max_memory_allocated() / 1e9 if device == "cuda" else 0.0,
        "parameters": count_parameters(case.model)["total"],
        "precision": machine["precision"],
        "compile": machine["compile"],
        "attention": machine["attention of packed rows"],
    }


def measure_decoding(
    model: ModelConfig,  # the shape
    rows: int,  # texts at a time
    options: Options,  # whether it is a dry run
    device: str,  # where
) -> dict[str, float]:
    """Measure greedy decoding with a cache, in bfloat16 on a GPU."""
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    random_model = TinyLM(model).to(device, dtype).eval()
    prompts = torch.randint(model.vocab_size, (rows, 32), device=device)
    settings = SamplingConfig(8 if options.dry_run else 128, temperature=0)

    # Without end tokens every text has its full length.
    fewer = replace(options, repeats=min(3, options.repeats), warmup=1)
    seconds = median_seconds(lambda: generate(random_model, prompts, settings), fewer, device)
    return {"tokens_per_second": rows * settings.max_new_tokens / seconds}


def as_row(name: str, figures: dict) -> dict[str, str]:
    """Write the figures of a case as a row of the table."""
    # A case that failed has a reason instead of figures.
    if "error" in figures:
        texts = ["", "", "", ""]
        attention = figures["error"][:60]
    else:
        texts = [
            f"{figures['tokens_per_second']:,.0f}",
            f"{figures['mfu']:.1%}" if "mfu" in figures else "",
            f"{figures['milliseconds']:.1f}" if "milliseconds" in figures else "",
            f"{figures['gigabytes']:.1f}" if "gigabytes" in figures else "",
        ]
        attention = figures.get("attention", "")
    columns = ("tokens/s", "MFU", "ms", "GB")
    return {"case": name, "attention": attention, **dict(zip(columns, texts, strict=True))}


def measure_all(
    options: Options,  # of the command line
    device: str,  # where it is measured
    peak: float,  # operations per second of the fastest matrix product
) -> dict[str, dict]:
    """Measure case by case, until the time is over; a case that fails is noted."""
    # List what is to be done.
    begin = time.perf_counter()
    cases = make_cases(options.dry_run)
    jobs: dict[str, Callable[[], dict]] = {}
    for name, case in cases.items():
        jobs[name] = lambda case=case: measure_training(case, options, device, peak)
        if name == "350m":  # decoding comes before what is only compared
            for shape in ("25m", "350m"):
                for rows in (1, 8):
                    model = cases[shape].model
                    jobs[f"{shape}, decoding {rows}"] = lambda model=model, rows=rows: (
                        measure_decoding(model, rows, options, device)
                    )

    # Do it, as long as there is time.
    figures: dict[str, dict] = {}
    for name, job in jobs.items():
        if time.perf_counter() - begin > SECONDS:
            figures[name] = {"error": "not measured: the time is over"}
            continue
        try:
            figures[name] = job()
        except Exception as error:  # the other cases are worth having
            figures[name] = {"error": first_line(error)}
        if device == "cuda":
            torch.cuda.empty_cache()
    return figures


def compare(figures: dict[str, dict]) -> dict[str, float]:
    """Compute the ratios that the cases are there for."""
    # Each ratio is the speed of the first case over that of the second.
    pairs = {
        "flex_attention over dense mask, 25m": ("25m", "25m, dense mask"),
        "flex_attention over dense mask, 350m": ("350m", "350m, dense mask"),
        "compiled over eager, 25m": ("25m", "25m, eager"),
        "step with experts over dense step, 25m": ("25m", "25m, experts"),
        "the same, eager": ("25m, eager", "25m, experts, eager"),
    }
    ratios = {}
    for title, (first, second) in pairs.items():
        speeds = [figures[name].get("tokens_per_second") for name in (first, second)]
        if all(speeds):
            ratios[title] = speeds[0] / speeds[1]
    return ratios


def main(options: Options) -> None:
    """Measure, and report."""
    if not options.dry_run and not torch.cuda.is_available():
        raise SystemExit("PyTorch sees no CUDA GPU here; --dry-run runs tiny models on a CPU")
    device = "cpu" if options.dry_run else "cuda"
    if options.dry_run:
        options = replace(options, repeats=1, warmup=1)

    begin = time.perf_counter()
    peak = measure_matmul_peak(device)
    figures = measure_all(options, device, peak)
    ratios = compare(figures)
    seconds = time.perf_counter() - begin

    # What this machine cannot compute in the fastest way, which is the default.
    large = make_cases(options.dry_run)["350m"]
    slow_parts = list_fallbacks(TrainConfig(device=device, **large.settings), large.model)

    # Dry runs say nothing about speed.
    rows = [as_row(name, values) for name, values in figures.items()]
    content = {"peak": peak, "seconds": seconds, "figures": figures, "ratios": ratios}
    content["slow_parts"] = slow_parts
    report(rows, content, device, options.out)
    print(f"peak {peak / 1e12:,.2f} TFLOP/s, {seconds:.0f} s in all")
    for title, ratio in ratios.items():
        print(f"{title}: {ratio:.2f}")
    for line in slow_parts:
        print(line)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
