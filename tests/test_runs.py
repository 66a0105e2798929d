"""Runs that are stopped, shared, or short of disk space: nothing is lost, the remedy is named."""

import json
import os
import re
import resource
import shlex
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

from tinylm.cli import main
from tinylm.runs import TRACKERS, RunFolder

ROOT = Path(__file__).resolve().parent.parent
MODEL = "--model.hidden-size 32 --model.num-hidden-layers 1 --model.num-attention-heads 2"
TRAIN = "--train.batch-size 4 --train.num-threads 1 --train.device cpu --train.sample-interval 0"
SMALL = f"{MODEL} {TRAIN} --train.eval-interval 0 --train.checkpoint-interval 0 --data.seq-len 64"
SEA = "--data.path sea.txt --data.tokenizer char --data.vocab-size 24"
LONG = f"pretrain {SEA} {SMALL} --train.max-steps 20000 --train.log-interval 1"
LONG += " --train.sample-prompt we"


def start(command: str, processes: int = 1) -> subprocess.Popen:
    """Start the command in a session of its own, with `processes` under torchrun."""
    words = [sys.executable, "-m", "tinylm", *shlex.split(command)]
    if processes > 1:
        words[1:1] = [
            "-m",
            "torch.distributed.run",
            "--standalone",
            f"--nproc-per-node={processes}",
        ]
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(words, text=True, start_new_session=True, **pipes)


def wait_for_steps(process: subprocess.Popen, out: Path, steps: int) -> None:
    """Until a run has logged so many lines."""
    log = out / "metrics.jsonl"
    until = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < until:
        if log.exists() and log.read_text("utf-8").count("\n") >= steps:
            return
        time.sleep(0.01)
    process.kill()
    raise AssertionError(process.communicate()[1])


def call(command: str) -> int:
    """The command in this process: its exit code."""
    return main(shlex.split(command))


def last_step(out: Path) -> int:
    """The step of the newest checkpoint."""
    return max(int(path.name[5:]) for path in (out / "checkpoints").glob("step-*"))


def hidden(folder: Path) -> list[str]:
    """Whatever temporary files and folders are left."""
    return [path.name for path in folder.rglob("*") if path.name.startswith((".", "tmp"))]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder to work in, with a text of few letters and a finished run on it."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "sea.txt").write_text(
        "we went to the sea and the water was warm. then we went home.\n" * 300, "utf-8"
    )
    settings = {
        "PYTHONPATH": str(ROOT),
        "TINYLM_CACHE": str(folder / "cache"),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "TQDM_DISABLE": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    before = dict(os.environ)
    here = os.getcwd()
    os.environ.update(settings)
    os.chdir(folder)
    flags = "--out whole --train.max-steps 12 --train.sample-prompt we"
    flags += " --model.layer-types full_attention --model.no-value-residual"  # can be exported
    assert call(f"pretrain {SEA} {SMALL} {flags}") == 0
    yield folder
    os.chdir(here)
    os.environ.clear()
    os.environ.update(before)


def test_one_process_trains_in_a_folder_and_ctrl_c_says_how_to_go_on(place, capsys):
    out = place / "shared"
    process = start(f"{LONG} --out shared")
    wait_for_steps(process, out, 3)
    settings = (out / "config.yaml").read_bytes()
    for way in ("--overwrite", "--resume", ""):
        assert call(f"{LONG} --out shared --train.seed 5 {way}") == 2
        line = capsys.readouterr().err.splitlines()[-1]
        assert line.startswith("tinylm: error: out='shared': another process is training here")
    assert process.poll() is None and (out / "config.yaml").read_bytes() == settings

    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    step = last_step(out)
    command = "tinylm pretrain --out shared --resume"
    assert (
        errors.splitlines()[-1]
        == f"tinylm: stopped after step {step} of 20000; to go on: {command}"
    )
    assert process.returncode == 130 and step >= 3
    assert not (out / "model.safetensors").exists() and not hidden(out)

    # The command needs none of the flags again, and flags still change what may change. What killed
    # processes left behind, a lock included, is in nobody's way, and gone at the end.
    (out / ".lock").touch()
    for litter in (".writing-dead/new", "checkpoints/.step-000900", "checkpoints/tmpabc"):
        (out / litter).mkdir(parents=True)
    assert call(f"{command.removeprefix('tinylm ')} --train.max-steps {step + 2}") == 0
    settings = (out / "config.yaml").read_text("utf-8")
    assert (
        "hidden_size: 32" in settings
        and f"max_steps: {step + 2}" in settings
        and "path: sea.txt" in settings
    )
    assert (out / "model.safetensors").exists() and not hidden(out)


def test_a_signal_stops_all_processes_of_torchrun(place):
    process = start(f"{LONG} --out together", processes=2)
    wait_for_steps(process, place / "together", 3)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=120)
    step = last_step(place / "together")
    assert process.returncode != 0 and step >= 3
    command = "torchrun --nproc-per-node 2 -m tinylm pretrain --out together --resume"
    assert f"stopped after step {step} of 20000; to go on: {command}" in errors


def test_a_prompt_in_other_letters_does_not_cost_the_run(place, capsys):
    flags = "--recipe shakespeare-char --data.path sea.txt --train.max-steps 4 --out letters"
    assert call(f"pretrain {flags} {SMALL}") == 0
    assert (place / "letters" / "model.safetensors").exists()
    warnings = re.findall("^warning: .*no samples of text.*$", capsys.readouterr().out, re.M)
    assert len(warnings) == 1 and "step 0:" in warnings[0] and "sample_prompt" in warnings[0]


def test_a_log_cut_short_neither_grows_nor_costs_the_run(place):
    log = place / "whole" / "metrics.jsonl"
    log.write_bytes(log.read_bytes()[:100])
    (place / "whole" / "model.safetensors").unlink()
    assert call("pretrain --out whole --resume") == 0
    assert (place / "whole" / "model.safetensors").exists() and b"\0" not in log.read_bytes()
    assert "validation_loss" in json.loads(log.read_text("utf-8").splitlines()[-1])


@contextmanager
def full_disk():
    """No file may become longer than so many bytes: what writers meet on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_is_one_line(place, capsys):
    with full_disk():
        assert call("export --run whole --out there/export") == 2
        assert call(f"pretrain {SEA} {SMALL} --out full --train.max-steps 2") == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line]
    assert len(lines) == 2 and all(
        "cannot be written (" in line and "make room" in line for line in lines
    )
    assert lines[0].startswith("tinylm: error: there/export")
    assert not [*(place / "there").iterdir()] and not hidden(place / "full")


def test_a_tracker_of_ones_own_needs_no_package_of_its_name(tmp_path, monkeypatch):
    sent = []
    monkeypatch.setitem(TRACKERS, "my own", lambda folder, settings: sent.append)
    run = RunFolder(tmp_path, tracker="my own")
    run.open_tracker({})
    run.log({"step": 1, "loss": 2.0})
    assert sent == [{"step": 1, "loss": 2.0}]
