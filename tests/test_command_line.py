"""The command line as people use it: quick help, hints, chats, notes, and the commands of the README under torchrun."""

import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tinylm.cli import COMMANDS, check_words, main, read_flags, stored_flags

ROOT = Path(__file__).resolve().parent.parent
HEAVY = "torch|transformers|numpy|datasets|matplotlib"


@pytest.fixture(autouse=True)
def quiet(monkeypatch, tmp_path):
    """A fresh folder, no bars, and a cache that all tests share."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TQDM_DISABLE", "1")
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def answer(capsys, command: str) -> tuple[int, str, str]:
    """Exit code, output and messages of a command in this process."""
    try:
        code = main(shlex.split(command))
    except SystemExit as stop:
        code = stop.code
    printed = capsys.readouterr()
    return code, printed.out, printed.err


# ---- Help and typing mistakes without PyTorch ----


def test_flags_are_those_of_the_configs():
    words = [sys.executable, str(ROOT / "tools" / "build_flags.py"), "--check"]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


QUICK = [f"{name} --help" for name in COMMANDS] + ["help sft", "--version", "pretrain --recipe 25m --help"]
QUICK += ["pretrian", "pretrain --train.max-stepz 3", "pretrain --train.max-steps many", "sft --lora.rank 4"]
QUICK += ["chat --run nowhere", "evaluate nowhere", "dpo --betta 0.1", "pretrain --recipe defualt", "pretrain my.text"]
QUICK += ["sweep --chang '{}'", "info --recipe typo.yaml", "pretrain --recipe typo.yaml"]


def test_help_and_typing_mistakes_do_not_wait_for_pytorch(tmp_path):
    (tmp_path / "typo.yaml").write_text("train: {max_step: 3}")
    code = f"""
import contextlib, io, re, shlex, sys
from tinylm.cli import main
for command in {QUICK!r}:
    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()):
        main(shlex.split(command))
    heavy = [name for name in sys.modules if re.fullmatch({HEAVY!r}, name)]
    assert not heavy, (command, heavy)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert all(line.startswith("tinylm: error: ") for line in done.stderr.splitlines())


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command_lists_its_flags(command, capsys):
    code, out, _ = answer(capsys, f"{command} --help")
    flags = [flag for flag in stored_flags(command) if flag.kind != "section"]
    assert code == 0 and flags
    assert all(f"--{flag.name.replace('_', '-')}" in out and flag.help for flag in flags)
    assert answer(capsys, f"help {command}")[1] == out


def test_help_shows_what_matters_first(capsys):
    out = answer(capsys, "pretrain --help")[1]
    order = ["--recipe", "--out", "--train.max-steps", "--data.path", "--model.hidden-size", "--model.kv-lora-rank"]
    places = [out.index(flag) for flag in order]
    assert places == sorted(places)
    assert "(default: 1300)" in answer(capsys, "pretrain --recipe shakespeare-char --help")[1]


MISTAKES = {
    "pretrain --max-steps 5": "did you mean --train.max-steps?",
    "pretrain --model.hiddensize 5": "did you mean --model.hidden-size?",
    "pretrain --train.fsdp maybe": "maybe",
    "pretrain --train.max-steps 2.5": "--train.max-steps: '2.5' is not a whole number",
    "pretrain --train.learning-rate fast": "--train.learning-rate: 'fast' is not a number",
    "pretrain --train.betas 0.9": "--train.betas: expected 2 arguments",
    "pretrain --model.rope-scaling 3": "'3' is not a mapping; write it as",
    "pretrain none.txt": "'none.txt' is no file, folder or recipe; write --data.path none.txt",
    "generate One day": "write it in quotes: 'One day'",
    "generate ./": "'./' is a folder; write --run ./",
    "chat a b": "'b' belongs to no flag",
    "help pretrian": "did you mean 'pretrain'",
    "pretrain --recipe typo.yaml": "train.max_step is no field of a recipe: did you mean 'max_steps'?",
}


@pytest.mark.parametrize("command", MISTAKES)
def test_mistake_is_one_line_with_a_hint(command, capsys, tmp_path):
    (tmp_path / "typo.yaml").write_text("train: {max_step: 3}")
    code, out, err = answer(capsys, command)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert MISTAKES[command] in err


def test_version_and_help_without_a_command(capsys):
    assert answer(capsys, "--version") == (0, "tinylm 0.1.0\n", "")
    assert answer(capsys, "help")[1] == answer(capsys, "--help")[1] == answer(capsys, "")[1]


def test_nothing_is_colored_in_a_terminal(capsys, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b" not in answer(capsys, "pretrain --help")[1]


# ---- What people type ----


SPELLINGS = {
    "pretrain --train.fsdp True": "--train.fsdp",
    "pretrain --train.fsdp=false": "--train.no-fsdp",
    "pretrain --resume true --train.max_steps 1e3": "--resume --train.max-steps 1000",
    "pretrain text.txt --overwrite": "--overwrite --data.path text.txt",
    "pretrain --overwrite text.txt": "--overwrite --data.path text.txt",
    "pretrain 25m": "--recipe 25m",
    "pretrain --model.head-dim None": "--model.head-dim None",
    "generate 'One day' --run run": "--run run --prompt 'One day'",
    "chat run": "--run run",
    "sft run": "--run run",
    "export run": "--run run",
    "evaluate run run --stories 3": "run run --stories 3",
    "evaluate --stories 3 run": "run --stories 3",
    "sft run --lora.target-modules q_proj v_proj": "--lora.target-modules q_proj v_proj --run run",
    "sft run --lora.init-lora-weights pissa": "--lora.init-lora-weights pissa --run run",
}


@pytest.mark.parametrize("command", SPELLINGS)
def test_what_people_type_is_understood(command, tmp_path):
    (tmp_path / "text.txt").write_text("a text")
    (tmp_path / "run").mkdir()
    name, *words = shlex.split(command)
    words = check_words(name, words)
    assert words == shlex.split(SPELLINGS[command])
    values, runs = read_flags(stored_flags(name), words, name)
    assert values and runs == [word for word in words if word == "run" and name == "evaluate"]
