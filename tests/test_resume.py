"""A run that is killed at any moment and resumed ends with the bytes of one never stopped."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
RUN = """
import sys
from tinylm.files import DataConfig
from tinylm.model import ModelConfig
from tinylm.pretrain import PretrainConfig, TrainConfig, pretrain

out, cache, steps = sys.argv[1], sys.argv[2], int(sys.argv[3])
heads = dict(num_attention_heads=2, attention_dropout=0.1)
model = ModelConfig(hidden_size=32, num_hidden_layers=2, **heads)
data = DataConfig(stories=300, validation_stories=20, seq_len=256, cache_dir=cache)
often = dict(eval_interval=7, checkpoint_interval=3, log_interval=1)
samples = dict(sample_interval=20, sample_tokens=10)
exact = dict(num_threads=1, device="cpu", precision="fp32")
train = TrainConfig(max_steps=steps, batch_size=2, **often, **samples, **exact)
pretrain(PretrainConfig(model, data, train, out=out, resume=True))
"""
STEPS = 60


def start(out: Path, cache: Path, steps: int = STEPS) -> subprocess.Popen:
    env = os.environ | {"PYTHONPATH": str(ROOT), "TQDM_DISABLE": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-c", RUN, str(out), str(cache), str(steps)]
    return subprocess.Popen(
        command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def finish(out: Path, cache: Path, steps: int = STEPS) -> str:
    process = start(out, cache, steps)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return output


def wait_for(process: subprocess.Popen, condition) -> None:
    while process.poll() is None and not condition():
        time.sleep(0.001)


def kill(process: subprocess.Popen) -> None:
    process.send_signal(signal.SIGKILL)
    process.communicate()


def lines(out: Path) -> list[dict]:
    timed = ("elapsed", "tokens_per_second")
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text("utf-8").splitlines()]
    return [{name: value for name, value in row.items() if name not in timed} for row in rows]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that was never stopped, and the cache of its data."""
    folder = tmp_path_factory.mktemp("runs")
    finish(folder / "whole", folder / "cache")
    return folder / "whole", folder / "cache"


def test_killed_and_resumed_is_never_stopped(whole, tmp_path):
    expected, cache = whole
    out = tmp_path / "killed"
    rng = random.Random(0)
    writing = out / "checkpoints"

    def torn() -> bool:
        return any(writing.glob(".step*"))

    for attempt in range(5):
        process = start(out, cache)
        at = STEPS * (attempt + 1) // 6
        wait_for(process, lambda at=at: (writing / f"step-{at // 3 * 3:06d}").exists())
        if attempt % 2:
            wait_for(process, torn)  # in the middle of writing a checkpoint
        else:
            time.sleep(rng.random() * 0.1)
        assert process.poll() is None, process.communicate()[0]
        kill(process)
        assert not (out / "model.safetensors").exists(), "the run was over before it was killed"
    finish(out, cache)
    assert (out / "model.safetensors").read_bytes() == (expected / "model.safetensors").read_bytes()
    assert (out / "samples.txt").read_bytes() == (expected / "samples.txt").read_bytes()
    assert lines(out) == lines(expected)


def test_killed_at_the_very_beginning(whole, tmp_path):
    expected, cache = whole
    out = tmp_path / "early"
    process = start(out, cache)
    wait_for(process, out.exists)
    kill(process)
    finish(out, cache)
    assert (out / "model.safetensors").read_bytes() == (expected / "model.safetensors").read_bytes()


def test_a_finished_run_is_not_trained_again(whole):
    expected, cache = whole
    before = (expected / "model.safetensors").read_bytes(), lines(expected)
    finish(expected, cache)
    assert ((expected / "model.safetensors").read_bytes(), lines(expected)) == before


def test_another_model_is_refused(whole, tmp_path):
    expected, cache = whole
    code = RUN.replace("hidden_size=32", "hidden_size=48")
    command = [sys.executable, "-c", code, str(expected), str(cache), str(STEPS)]
    env = os.environ | {"PYTHONPATH": str(ROOT), "TQDM_DISABLE": "1"}
    settings = (expected / "config.yaml").read_bytes()
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    assert "ValueError: model.hidden_size was 32 in this run and is now 48" in done.stderr
    assert (expected / "config.yaml").read_bytes() == settings
