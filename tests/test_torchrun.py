"""Two processes under `torchrun` give the losses of one process for the same global batch."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
RUN = """
import sys
from tinylm.data import DataConfig
from tinylm.model import ModelConfig
from tinylm.pretrain import PretrainConfig, TrainConfig, pretrain

out, cache, parts = sys.argv[1], sys.argv[2], int(sys.argv[3])
model = ModelConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2)
data = DataConfig(stories=200, validation_stories=15, seq_len=256, cache_dir=cache)
often = dict(eval_interval=5, checkpoint_interval=10, sample_interval=0, sample_tokens=5, log_interval=1)
precise = dict(num_threads=1, device="cpu", precision="fp32")
train = TrainConfig(max_steps=15, batch_size=4, grad_accum_steps=parts, **often, **precise)
pretrain(PretrainConfig(model, data, train, out=out, resume=True))
"""


def run(out: Path, cache: Path, processes: int = 1, parts: int = 1) -> list[dict]:
    script = out.with_suffix(".py")
    script.write_text(RUN, "utf-8")
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"] if processes > 1 else []
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    env["TQDM_DISABLE"] = "1"
    command = [sys.executable, *launcher, str(script), str(out), str(cache), str(parts)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text("utf-8").splitlines()]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    return run(folder / "alone", folder / "cache"), folder / "cache"


def close(rows: list[dict], expected: list[dict]) -> None:
    """Same steps, same number of targets, and the same numbers but for rounding."""
    assert [(row["step"], row["tokens"]) for row in rows] == [(row["step"], row["tokens"]) for row in expected]
    for name in ("loss", "grad_norm", "validation_loss", "lr"):
        values = [row[name] for row in rows if name in row]
        assert values == pytest.approx([row[name] for row in expected if name in row], rel=2e-3), name


@pytest.mark.parametrize("parts", [1, 2])
def test_two_processes_give_the_losses_of_one(alone, tmp_path, parts):
    expected, cache = alone
    close(run(tmp_path / "two", cache, processes=2, parts=parts), expected)
    assert sorted(path.name for path in (tmp_path / "two" / "checkpoints").iterdir()) == ["step-000010", "step-000015"]


def test_two_processes_resume_what_one_began(alone, tmp_path):
    expected, cache = alone
    out = tmp_path / "mixed"
    run(out, cache)
    newest = out / "checkpoints" / "step-000015"
    newest.rename(tmp_path / "away")
    (out / "model.safetensors").unlink()
    close(run(out, cache, processes=2), expected)
    assert (out / "model.safetensors").exists()
