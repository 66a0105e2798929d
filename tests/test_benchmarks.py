"""The benchmarks run, on a tiny model, and stop if the two libraries do not do the same."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
BENCHMARKS = ROOT / "benchmarks"


def run(script: str, flags: str, out: Path) -> tuple[str, dict]:
    """Run a benchmark; return what it prints and what it writes."""
    settings = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / script), *flags.split(), "--out", str(out)],
        env={**os.environ, **settings},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout, json.loads(out.read_text("utf-8"))


def test_train_step(tmp_path):
    flags = "--shapes tiny --modes fp32 bf16 --repeats 1 --warmup 1"
    table, figures = run("train_step.py", flags, tmp_path / "step.json")
    for words in ("tinylm tokens/s", "transformers GFLOP/s", "best of each"):
        assert words in table
    modes = figures["shapes"]["tiny"]["modes"]
    assert list(modes) == ["fp32", "bf16"]
    for mode in modes.values():
        assert mode["ratio"] == pytest.approx(mode["tinylm"] / mode["transformers"])
        assert 0 < mode["tinylm"] * mode["flops_per_token"] < 2 * mode["peak"]


def test_decode(tmp_path):
    flags = "--shapes tiny --batch-sizes 1 3 --prompt-tokens 5 --new-tokens 8 --repeats 1"
    table, figures = run("decode.py", flags, tmp_path / "decode.json")
    assert "transformers tokens/s" in table
    assert [row["batch_size"] for row in figures["figures"]] == [1, 3]
    assert all(row["ratio"] > 0 for row in figures["figures"])


def test_moe_step(tmp_path):
    flags = "--modes fp32 --hidden-size 32 --layers 1 --expert-size 32 --rows 2 --length 16"
    flags += " --repeats 1 --warmup 1"
    table, figures = run("moe_step.py", flags, tmp_path / "moe.json")
    assert "moe ms" in table and figures["figures"]["fp32"]["moe_over_dense"] > 0


def test_gpu_runs_on_a_cpu(tmp_path):
    table, figures = run("gpu.py", "--dry-run", tmp_path / "gpu.json")
    assert "MFU" in table and "compiled over eager, 25m" in figures["ratios"]
    failed = {name: case["error"] for name, case in figures["figures"].items() if "error" in case}
    assert not failed
    assert "350m, decoding 8" in figures["figures"]


def test_gpu_measures_the_default_path(monkeypatch):
    """The main cases change no setting, and on a GPU the settings mean the fast path."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    import gpu
    import torch

    from tinylm.attention import choose_attention
    from tinylm.engine import choose_compile, choose_precision
    from tinylm.pretrain import TrainConfig
    from tinylm.recipes import read_recipe

    # The recipe, and a bare config, leave these choices to the library.
    cases = gpu.make_cases(dry_run=False)
    assert cases["25m"].settings == {} == cases["350m"].settings
    names = ("precision", "compile", "attn_implementation", "optimizer", "gradient_checkpointing")
    recipe = read_recipe("25m").train
    config = TrainConfig(batch_size=2)
    assert {n: getattr(config, n) for n in names} == {n: getattr(recipe, n) for n in names}

    # A recent GPU, as far as these functions can see.
    device = torch.device("cuda")
    monkeypatch.setattr("tinylm.engine.find_spec", lambda name: object())
    monkeypatch.setattr("tinylm.attention.has_flex_kernel", lambda device: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *args, **kwargs: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *args: (9, 0))
    assert choose_compile(config, device)
    assert choose_precision(config.precision, device) == "bf16"
    attention = choose_attention(
        config.attn_implementation,
        device,
        torch.bfloat16,
        has_documents=True,
        needs_grad=True,
        dropout=0.0,
    )
    assert attention == "flex_attention"


def test_different_work_is_not_compared(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import decode
    import train_step

    with pytest.raises(SystemExit, match="the losses are"):
        train_step.check_same_loss({"tinylm": lambda: 4.0, "transformers": lambda: 4.1}, "bf16")
    monkeypatch.setattr(
        decode, "their_tokens", lambda model, prompts, new_tokens: [[0] * new_tokens]
    )
    with pytest.raises(SystemExit, match="the tokens differ"):
        decode.measure(decode.SHAPES["tiny"][0], 1, decode.Options(prompt_tokens=5, new_tokens=8))
