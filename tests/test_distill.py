"""Distillation: the command, stopped runs, two processes, bad input."""

import json
import os
import re
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from preloaded import python, ranks
from torch.testing import assert_close

from tinylm.chat_template import Tokenizer
from tinylm.checkpoints import save_model
from tinylm.cli import main
from tinylm.distill import WAYS, DistillConfig, distill
from tinylm.files import DataConfig
from tinylm.model import ModelConfig, TinyLM
from tinylm.pretrain import Hook, TrainConfig

ROOT = Path(__file__).resolve().parent.parent
TEACHER = ROOT / "nbs" / "models" / "stories"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with `student`, an untrained tiny model, and `other`, with other tokens."""
    place = tmp_path_factory.mktemp("distill")
    others = {
        "student": Tokenizer.from_pretrained(TEACHER),
        "other": Tokenizer.train(["the cat sat on the mat"], vocab_size=270),
    }
    for name, tokenizer in others.items():
        torch.manual_seed(0)
        shape = ModelConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            embedding_range=0.2,
        )
        save_model(TinyLM(shape), place / name)
        tokenizer.save_pretrained(place / name)
    return place


def recipe(place: Path, out: Path, way: str, **train) -> DistillConfig:
    """A run of 4 steps with rows of 128 tokens."""
    settings = TrainConfig(
        **{"max_steps": 4, "batch_size": 4, "optimizer": "adamw", "learning_rate": 0.01}
        | {"warmup_steps": 1, "precision": "fp32", "device": "cpu", "num_threads": 1}
        | {"checkpoint_interval": 2, "eval_interval": 2, "log_interval": 1, "sample_interval": 0}
        | train
    )
    return DistillConfig(
        run=str(place / "student"),
        teacher=str(TEACHER),
        way=way,
        teacher_stories=8,
        written_tokens=6,
        data=DataConfig(
            stories=40, validation_stories=8, seq_len=128, cache_dir=str(place / "cache")
        ),
        train=settings,
        out=str(out),
    )


def lines(out: Path) -> list[dict]:
    """Return the losses that a run logged."""
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    names = ("step", "loss", "validation_loss")
    return [{name: row[name] for name in names if name in row} for row in rows]


class Stop(Exception):
    """The machine is gone."""


@pytest.mark.parametrize("way", WAYS)
def test_stopped_and_resumed_is_never_stopped(place, tmp_path, way):
    class PowerCut(Hook):
        def on_step(self, trainer, figures):
            if trainer.progress.step == 3:
                raise Stop

    whole = recipe(place, tmp_path / "whole", way)
    distill(whole)
    cut = replace(whole, out=str(tmp_path / "cut"))
    with pytest.raises(Stop):
        distill(cut, hooks=[PowerCut()])
    assert not (tmp_path / "cut" / "model.safetensors").exists()
    distill(replace(cut, resume=True))
    assert lines(tmp_path / "cut") == lines(tmp_path / "whole")
    one, other = (tmp_path / name / "model.safetensors" for name in ("cut", "whole"))
    assert one.read_bytes() == other.read_bytes()


RUN = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[3])
from test_distill import recipe
from tinylm.distill import distill

distill(recipe(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[4]))
"""


@pytest.mark.parametrize("way", ["samples", "forward", "reverse"])
def test_two_processes_equal_one(place, tmp_path, way):
    for name, start in (("one", python), ("two", partial(ranks, 2))):
        done = start(RUN, str(place), str(tmp_path / name), str(ROOT / "tests"), way)
        assert done.returncode == 0, done.stdout + done.stderr
    for row, other in zip(lines(tmp_path / "one"), lines(tmp_path / "two"), strict=True):
        assert_close(row, other, rtol=1e-3, atol=1e-4)


def test_the_teacher_does_not_change_and_the_student_does(place, tmp_path):
    before = (TEACHER / "model.safetensors").read_bytes()
    result = distill(recipe(place, tmp_path / "out", "forward"))
    assert (TEACHER / "model.safetensors").read_bytes() == before
    assert all(weight.requires_grad for weight in result.model.parameters())
    losses = [row["validation_loss"] for row in lines(tmp_path / "out") if "validation_loss" in row]
    assert losses[-1] < losses[0]


FEW = "--train.max-steps 2 --train.batch-size 4 --data.stories 40 --data.validation-stories 8"


def test_command(place, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TINYLM_CACHE", str(tmp_path / "cache"))
    words = ["distill", "--run", str(place / "student"), "--teacher", str(TEACHER), *FEW.split()]
    assert main(words) == 0
    printed = capsys.readouterr().out
    for name in ("loss", "floor", "distance to the floor", "parameters", "tokens", "time"):
        assert f"\n{name} " in f"\n{printed}"
    assert "next:  tinylm generate --run runs/distill" in printed

    # A run that is resumed knows its recipe; one that is not finished names its command.
    assert main(["distill", "--resume", "--train.max-steps", "3"]) == 0
    os.remove("runs/distill/model.safetensors")
    capsys.readouterr()
    assert main(["generate", "--run", "runs/distill"]) != 0
    assert "`tinylm distill --out runs/distill --resume` goes on" in capsys.readouterr().err


MISTAKES = {
    "--run none": "run='none' does not exist; `tinylm pretrain --out none` makes it",
    "--teacher none": "teacher='none' does not exist.*or give --teacher",
    "--way guess": "way='guess': give one of data, samples, forward, reverse",
    "--teacher OTHER": "splits texts into other tokens than the student",
    "--data.tokenizer OTHER": "data.tokenizer='.*': splits texts into other tokens",
    "--written-tokens 0": "written_tokens=0: give 1 or more",
    "--way samples --data.seq-len 8": "data.seq_len=8: the teacher finished no story",
}


@pytest.mark.parametrize("words", MISTAKES)
def test_bad_input_is_one_line(place, tmp_path, words, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TINYLM_CACHE", str(place / "cache"))
    typed = f"--run {place / 'student'} --teacher {TEACHER} --teacher-stories 2 {FEW} {words}"
    assert main(["distill", *typed.replace("OTHER", str(place / "other")).split()]) != 0
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1
    assert re.search(MISTAKES[words], error[0])
    assert not (tmp_path / "runs").exists()
