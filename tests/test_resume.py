"""A run that is killed at any moment and resumed ends with the bytes of one never stopped."""

import json
import random
import signal
from pathlib import Path

import pytest
from preloaded import python

# A run that may end itself. Its last argument says when: "birth", as soon as its folder exists;
# "torn N", while the checkpoint of step N is written; "after N S", when it has computed for S
# seconds since that checkpoint. Nothing of this depends on how busy the machine is.
RUN = """
import os
import signal
import sys
from pathlib import Path

from tinylm.files import DataConfig
from tinylm.model import ModelConfig
from tinylm.pretrain import PretrainConfig, TrainConfig, pretrain

out, cache, width, *end = sys.argv[1:]


def at_birth(event, args, made=[]):
    if made and event != "os.kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if event == "os.mkdir" and os.fspath(args[0]) == out:
        made.append(out)


def at_a_checkpoint(event, args):
    if event == "os.rename" and os.fspath(args[1]).endswith(f"step-{int(end[1]):06d}"):
        if end[0] == "torn":
            os.truncate(Path(args[0]) / "trainer.pt", 1000)
            os.kill(os.getpid(), signal.SIGKILL)
        signal.setitimer(signal.ITIMER_VIRTUAL, float(end[2]))  # its signal ends the process


heads = dict(num_attention_heads=2, attention_dropout=0.1)
model = ModelConfig(hidden_size=int(width), num_hidden_layers=2, **heads)
data = DataConfig(stories=300, validation_stories=20, seq_len=256, cache_dir=cache)
often = dict(eval_interval=7, checkpoint_interval=3, log_interval=1)
samples = dict(sample_interval=20, sample_tokens=10)
exact = dict(num_threads=1, device="cpu", precision="fp32")
train = TrainConfig(max_steps=60, batch_size=2, **often, **samples, **exact)
if end:
    sys.addaudithook(at_birth if end == ["birth"] else at_a_checkpoint)
pretrain(PretrainConfig(model, data, train, out=out, resume=True))
"""


def start(out: Path, cache: Path, *end: object, width: int = 32):
    """Run it, and return its end."""
    return python(RUN, str(out), str(cache), str(width), *map(str, end))


def finish(out: Path, cache: Path) -> None:
    done = start(out, cache)
    assert done.returncode == 0, done.stderr


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
    for attempt in range(5):
        step = 9 * (attempt + 1)
        if attempt % 2:
            done = start(out, cache, "torn", step)  # in the middle of writing a checkpoint
            assert done.returncode == -signal.SIGKILL, done.stderr
            assert (out / "checkpoints" / f".step-{step:06d}").exists()
        else:
            done = start(out, cache, "after", step, 0.01 + 0.1 * rng.random())
            assert done.returncode == -signal.SIGVTALRM, done.stderr
        assert not (out / "model.safetensors").exists(), "the run was over before it was killed"
    finish(out, cache)
    assert (out / "model.safetensors").read_bytes() == (expected / "model.safetensors").read_bytes()
    assert (out / "samples.txt").read_bytes() == (expected / "samples.txt").read_bytes()
    assert lines(out) == lines(expected)


def test_killed_at_the_very_beginning(whole, tmp_path):
    expected, cache = whole
    out = tmp_path / "early"
    assert start(out, cache, "birth").returncode == -signal.SIGKILL and out.exists()
    finish(out, cache)
    assert (out / "model.safetensors").read_bytes() == (expected / "model.safetensors").read_bytes()


def test_a_finished_run_is_not_trained_again(whole):
    expected, cache = whole
    before = (expected / "model.safetensors").read_bytes(), lines(expected)
    finish(expected, cache)
    assert ((expected / "model.safetensors").read_bytes(), lines(expected)) == before


def test_another_model_is_refused(whole):
    expected, cache = whole
    settings = (expected / "config.yaml").read_bytes()
    done = start(expected, cache, width=48)
    assert "ValueError: model.hidden_size was 32 in this run and is now 48" in done.stderr
    assert (expected / "config.yaml").read_bytes() == settings
