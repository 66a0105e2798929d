"""The command line as people use it: quick help, hints, chats, notes, and torchrun."""

import json
import os
import re
import select
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from tinylm.checkpoints import save_model
from tinylm.cli import main, read_words, stored_commands
from tinylm.recipes import spell_values

ROOT = Path(__file__).resolve().parent.parent
COMMANDS = stored_commands()
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


QUICK = [f"{name} --help" for name in COMMANDS] + [
    "help sft",
    "--version",
    "pretrain --recipe 25m --help",
]
QUICK += [
    "pretrian",
    "pretrain --train.max-stepz 3",
    "pretrain --train.max-steps many",
    "sft --lora.rank 4",
]
QUICK += [
    "chat --run nowhere",
    "evaluate nowhere",
    "dpo --betta 0.1",
    "pretrain --recipe defualt",
    "pretrain my.text",
]
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
    flags = [flag for flag in COMMANDS[command].flags if flag.kind != "section"]
    assert code == 0 and flags
    assert all(f"--{flag.name.replace('_', '-')}" in out and flag.help for flag in flags)
    assert answer(capsys, f"help {command}")[1] == out


def test_help_shows_what_matters_first(capsys):
    out = answer(capsys, "pretrain --help")[1]
    order = [
        "--recipe",
        "--out",
        "--train.max-steps",
        "--data.path",
        "--model.hidden-size",
        "--model.kv-lora-rank",
    ]
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
    "pretrain --recipe typo.yaml": (
        "train.max_step is no field of a recipe: did you mean 'max_steps'?"
    ),
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


UNDERSTOOD = {
    "pretrain --train.fsdp True": {"train.fsdp": True},
    "pretrain --train.fsdp=false": {"train.fsdp": False},
    "pretrain --resume true --train.max_steps 1e3": {"resume": True, "train.max_steps": 1000},
    "pretrain text.txt --overwrite": {"overwrite": True, "data.path": "text.txt"},
    "pretrain --overwrite text.txt": {"overwrite": True, "data.path": "text.txt"},
    "pretrain 25m": {"recipe": "25m"},
    "pretrain --model.head-dim None": {"model.head_dim": None},
    "generate 'One day' --run run": {"run": "run", "prompt": "One day"},
    "chat run": {"run": "run"},
    "sft run": {"run": "run"},
    "export run": {"run": "run"},
    "evaluate run run --stories 3": {"run": ("run", "run"), "stories": 3},
    "evaluate --stories 3 run": {"run": ("run",), "stories": 3},
    "sft run --lora.target-modules q_proj v_proj": {
        "run": "run",
        "lora.target_modules": ("q_proj", "v_proj"),
    },
    "sft run --lora.init-lora-weights pissa": {"run": "run", "lora.init_lora_weights": "pissa"},
}


@pytest.mark.parametrize("command", UNDERSTOOD)
def test_what_people_type_is_understood(command, tmp_path):
    (tmp_path / "text.txt").write_text("a text")
    (tmp_path / "run").mkdir()
    name, *words = shlex.split(command)
    values = read_words(name, words)
    assert values == UNDERSTOOD[command]
    assert read_words(name, spell_values(values, stored_commands()[name].flags)) == values


# ---- Commands on a run ----


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """An untrained model with a tokenizer; greedily it never ends its answers."""
    import torch

    from tinylm.chat_template import Tokenizer
    from tinylm.model import ModelConfig, TinyLM

    folder = tmp_path_factory.mktemp("runs") / "small"
    torch.manual_seed(0)
    tokenizer = Tokenizer.train(["the cat sat on the mat and the dog sat on the cat"] * 9, 290)
    shape = {
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "max_position_embeddings": 20_000,
    }
    model = TinyLM(ModelConfig(vocab_size=len(tokenizer), **shape))
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    save_model(model, folder, **{name: getattr(tokenizer, name) for name in names})
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def talk(run):
    """A conversation in this process, with answers of at most 5 tokens in a context of 60."""
    from tinylm.commands import open_model
    from tinylm.generate import SamplingConfig
    from tinylm.talk import Chat

    model, tokenizer = open_model(run, "cpu")
    object.__setattr__(model.config, "max_position_embeddings", 60)
    return Chat(model, tokenizer, SamplingConfig(5, temperature=0))


def test_full_conversation_says_what_to_do(talk):
    answers = ["".join(talk.answer(f"the cat {i}")) for i in range(8)]
    full = [answer for answer in answers if "the conversation is full" in answer]
    assert full and "of 60 tokens; /save FILE keeps it, /reset begins a new one)" in full[0]
    assert "".join(talk.answer("/reset")) == "(forgotten)"
    assert "the message is too long" in "".join(talk.answer("the cat " * 60))
    assert not talk.messages and "full" not in "".join(talk.answer("the cat"))


def test_save_never_replaces_a_file(talk, tmp_path):
    (tmp_path / "mine.json").write_text("mine")
    assert "".join(talk.answer("/save new.json")) == "(nothing was said yet)"
    assert "".join(talk.answer("the cat"))
    assert "is there already" in "".join(talk.answer("/save mine.json"))
    assert (tmp_path / "mine.json").read_text() == "mine"
    assert "".join(talk.answer("/save")) == "(saved in chat.json)"
    assert "is there already" in "".join(talk.answer("/save"))
    assert "No such file or directory" in "".join(talk.answer("/save no/such/folder.json"))


def test_stopped_answer_is_part_of_the_conversation(talk):
    pieces = talk.answer("the cat")
    first = next(pieces)
    pieces.close()
    assert talk.messages[1:] == [{"role": "assistant", "content": first}]


class Terminal:
    """A command in a terminal of its own."""

    def __init__(self, words: list[str]):
        import pty

        self.screen, inside = pty.openpty()
        self.command = subprocess.Popen(
            words, stdin=inside, stdout=inside, stderr=inside, start_new_session=True
        )
        os.close(inside)
        self.text = ""

    def wait_for(self, text: str) -> str:
        """Read until a text appears; what came before it."""
        end = time.monotonic() + 60
        while text not in self.text and time.monotonic() < end:
            if select.select([self.screen], [], [], 0.1)[0]:
                self.text += os.read(self.screen, 4096).decode(errors="replace")
        assert text in self.text, self.text
        before, _, self.text = self.text.partition(text)
        return before

    def wait_for_anything(self) -> None:
        """Read until something is printed; an untrained model may print only newlines."""
        end = time.monotonic() + 60
        while not self.text and time.monotonic() < end:
            if select.select([self.screen], [], [], 0.1)[0]:
                self.text += os.read(self.screen, 4096).decode(errors="replace")
        assert self.text, "nothing was printed"

    def type(self, text: str) -> None:
        os.write(self.screen, text.encode())

    def type_at_prompt(self, text: str) -> None:
        """Type once the line editor reads the keys.

        Before that the terminal itself acts on some of them: it drops a Ctrl-D and a character
        that is erased.
        """
        import termios

        end = time.monotonic() + 60
        while termios.tcgetattr(self.screen)[3] & termios.ICANON and time.monotonic() < end:
            if self.command.poll() is not None:
                return  # nobody reads any more
            time.sleep(0.02)
        self.type(text)

    def press_until(self, key: str, is_done: Callable[[], bool]) -> None:
        """Press a key until it was understood.

        Python looks for a signal before it waits for a key. One that arrives between the two is
        seen at the next key only, so a person too has to press twice now and then.
        """
        end = time.monotonic() + 60
        while not is_done() and time.monotonic() < end:
            self.type_at_prompt(key)
            if select.select([self.screen], [], [], 1)[0]:
                with suppress(OSError):  # Linux: reading from a terminal whose command has ended
                    self.text += os.read(self.screen, 4096).decode(errors="replace")
                time.sleep(0.2)
        assert is_done(), self.text


def test_chat_in_a_terminal(run):
    pytest.importorskip("readline")
    code = "import os, sys, fcntl, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); "
    code += "from tinylm.cli import main; sys.exit(main(sys.argv[1:]))"
    words = [sys.executable, "-c", code, "chat", str(run)]
    terminal = Terminal([*words, "--max-new-tokens", "15000"])
    assert "/reset to forget, /save FILE to keep, /exit or Ctrl-D to end" in terminal.wait_for("> ")
    terminal.type_at_prompt("the cat\n")
    terminal.wait_for("the cat\r\n")
    terminal.wait_for_anything()
    terminal.type("\x03")  # Ctrl-C in an answer
    terminal.wait_for("(stopped)")
    terminal.wait_for("> ")
    hint = "(/exit or Ctrl-D ends the chat)"
    terminal.press_until("\x03", lambda: hint in terminal.text)  # and while nothing is said
    # Go back with the arrow, and correct.
    terminal.type_at_prompt("/savw it.json" + "\x1b[D" * 8 + "\x7fe\n")
    terminal.wait_for("(saved in it.json)")
    terminal.type_at_prompt("\x1b[A\n")  # the line before
    terminal.wait_for("(it.json is there already")
    terminal.press_until("\x04", lambda: terminal.command.poll() is not None)
    assert terminal.command.returncode == 0
    with suppress(OSError):
        os.close(terminal.screen)


def test_evaluate_of_two_runs_lines_up(run, tmp_path, capsys, monkeypatch, progress_bars):
    (tmp_path / "mine.txt").write_text("the cat sat on the mat\n" * 50)
    monkeypatch.setenv("TINYLM_CACHE", str(tmp_path / "cache"))
    (tmp_path / "other").symlink_to(run)
    code, out, err = answer(
        capsys, f"evaluate {run} other --data.path mine.txt --data.seq-len 64 --out report"
    )
    table = [line for line in out.splitlines() if line.startswith("|")]
    assert code == 0 and len(table) > 3 and len({len(line) for line in table}) == 1
    for note in ("loading PyTorch", "reading mine.txt", "measuring other", "measure the loss"):
        assert note in err
    report = (tmp_path / "report" / "report.md").read_text()
    assert report.strip() == "\n".join(table)


UNWRITABLE = [
    "pretrain",
    "sft {run}",
    "dpo {run}",
    "evaluate {run}",
    "export {run}",
    "sweep",
    "speedrun",
]


@pytest.mark.parametrize("command", UNWRITABLE)
def test_unwritable_out_is_refused_at_once(command, run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(
        "tinylm.token_cache.prepare", lambda *args, **more: pytest.fail("the text was read first")
    )
    (tmp_path / "file").write_text("")
    code, out, err = answer(capsys, f"{command.format(run=run)} --out file/runs/new")
    assert code == 2 and err.count("\n") == 1 and "out='file/runs/new" in err
    assert "file cannot be written: Not a directory; give another --out" in err
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


SMALL = """
out: base
model: {hidden_size: 16, num_hidden_layers: 1, num_attention_heads: 2}
data: {path: mine.txt, tokenizer: char, seq_len: 32}
train: {max_steps: 4, batch_size: 2, eval_interval: 2, sample_tokens: 1, sample_prompt: the}
"""


def test_sweep_of_a_recipe_says_how_far_it_is(tmp_path, capsys, monkeypatch, progress_bars):
    monkeypatch.setenv("TINYLM_CACHE", str(tmp_path / "cache"))
    (tmp_path / "mine.txt").write_text("the cat sat on the mat\n" * 50)
    (tmp_path / "small.yaml").write_text(SMALL)
    change = "'{train.learning_rate: [1e-3, 5E-3]}'"
    code, out, err = answer(
        capsys, f"sweep --recipe small.yaml --change {change} --seeds 1 --out search"
    )
    assert code == 0
    assert "2 trials, then 1 runs of the best with other seeds; all are kept in search" in err
    announced = [line for line in re.split("[\r\n]", err) if line.startswith("run ")]
    assert re.fullmatch(r"run 1 of 3: learning_rate=0.00\d, seed 0", announced[0])
    assert {line.split(": ")[1] for line in announced[:2]} == {
        f"learning_rate={x}, seed 0" for x in (0.001, 0.005)
    }
    assert (
        re.search(r"run 3 of 3, about \d:\d\d:\d\d left", err) and "above the floor, after" in err
    )
    assert "files: search/table.md search/results.jsonl search/sweep.png" in out
    words = shlex.split(re.search("^next:  tinylm (.*)$", out, re.M)[1])
    assert words[:2] == ["pretrain", "--recipe"] and Path(words[2]).exists()
    lines = [len(line) for line in out.splitlines() if line.startswith("|")]
    assert len(set(lines)) == 1


# ---- Under torchrun ----


def test_every_flag_passes_through_torchrun():
    from torch.distributed.run import parse_args

    for command in COMMANDS:
        for flag in COMMANDS[command].flags:
            words = [command, f"--{flag.name.replace('_', '-')}", "x"]
            if (
                flag.kind != "section" and flag.name != "run"
            ):  # taken for --run-path: the run is a word without a flag
                assert (
                    parse_args(["--standalone", "-m", "tinylm", *words]).training_script_args
                    == words
                )


def test_the_mark_behind_the_flags_of_torchrun_is_no_command(capsys):
    assert answer(capsys, "-- --version")[:2] == (0, "tinylm 0.1.0\n")


def test_readme_gives_torchrun_no_flag_that_it_takes_for_its_own():
    from torch.distributed.run import parse_args

    lines = re.findall(r"^torchrun (.*)$", (ROOT / "README.md").read_text("utf-8"), re.M)
    commands = [
        parse_args(shlex.split(line, comments=True)).training_script_args[0] for line in lines
    ]
    assert {"pretrain", "sft"} <= set(commands)


# ---- Numbers in YAML ----


@pytest.mark.parametrize(
    "number", ["1.0e-3", "1E-3", "1.e-3", ".1e-2", "+1e-3", "0.001", "1e-03", "10.0E-4"]
)
def test_numbers_with_an_exponent(number, tmp_path):
    from tinylm.recipes import read_recipe

    fields = f"learning_rate: {number}, betas: [9e-1, {number}], max_steps: 1e3, batch_size: 1.6E1"
    scaling = "{rope_type: linear, factor: 4E0}"
    (tmp_path / "numbers.yaml").write_text(
        f"train: {{{fields}}}\nmodel: {{rope_scaling: {scaling}}}\nout: 1e5"
    )
    recipe = read_recipe("numbers.yaml")
    assert (recipe.train.learning_rate, recipe.train.betas) == (0.001, (0.9, 0.001))
    assert (recipe.train.max_steps, recipe.train.batch_size, recipe.out) == (1000, 16, "1e5")
    assert recipe.model.rope_scaling["factor"] == 4.0


def test_tokenizing_and_measuring_show_a_bar(run, tmp_path, capsys, monkeypatch, progress_bars):
    chat = {
        "messages": [
            {"role": "user", "content": "the cat"},
            {"role": "assistant", "content": "sat"},
        ]
    }
    pair = {"prompt": "the cat", "chosen": "sat", "rejected": "the dog"}
    few = "--train.max-steps 1 --train.batch-size 2 --train.sample-tokens 1 --data.seq-len 64"
    for command, record, bar in (
        ("sft", chat, "tokenize the conversations"),
        ("dpo", pair, "tokenize the pairs"),
    ):
        (tmp_path / "data.jsonl").write_text(
            "".join(json.dumps(record | {"n": n}) + "\n" for n in range(9))
        )
        code, _, err = answer(
            capsys, f"{command} {run} --out {command} --data.path data.jsonl {few}"
        )
        assert code == 0, err
        for what in (
            f"opening {run}; chats: data.jsonl; run: {command}",
            bar,
            "measure the validation loss",
        ):
            assert what in err
