"""Files and flags are checked before they are used; any other error becomes one line."""

import io
import json
import shlex
import shutil
from dataclasses import replace

import pytest
import torch

from tinylm import commands
from tinylm.chat_template import Tokenizer
from tinylm.checkpoints import save_model
from tinylm.cli import main
from tinylm.dpo import DPOConfig
from tinylm.files import DataConfig
from tinylm.model import ModelConfig, TinyLM
from tinylm.pretrain import PretrainConfig, TrainConfig
from tinylm.recipes import find_run
from tinylm.runs import save_config

TINY = replace(
    ModelConfig(), vocab_size=300, hidden_size=32, num_hidden_layers=1, max_position_embeddings=128
)
WORDS = "the owl sat on the roof. where is the owl? on the roof. "


def checkpoint(folder, **entries):
    """Write a small model and its tokenizer, with other entries in config.json."""
    torch.manual_seed(0)
    Tokenizer.train([WORDS] * 9, 300).save_pretrained(folder)
    save_model(TinyLM(TINY), folder)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a small run, pairs to tune it on, and copies with one broken file each."""
    folder = tmp_path_factory.mktemp("errors")
    checkpoint(folder / "run")
    save_config(folder / "run", PretrainConfig(data=DataConfig(seq_len=64)))
    weights = (folder / "run" / "model.safetensors").read_bytes()
    broken = {
        "json-torn": ("config.json", b'{"model_type": "qwen3", "hid'),
        "json-list": ("config.json", b"[1, 2]"),
        "json-number": ("config.json", b"7"),
        "json-deep": ("config.json", b"[" * 50_000),
        "weights-empty": ("model.safetensors", b""),
        "weights-torn": ("model.safetensors", weights[: len(weights) // 2]),
        "weights-header": ("model.safetensors", b"\xff" * 8 + weights[8:]),
        "yaml-list": ("config.yaml", b"- out\n- run\n"),
        "yaml-bytes": ("config.yaml", b"out: \xff\xfe"),
        "yaml-syntax": ("config.yaml", b"data: ["),
        "yaml-deep": ("config.yaml", b"[" * 3000),
        "yaml-type": ("config.yaml", b"data: {seq_len: long}"),
        "yaml-nan": ("config.yaml", b"train: {learning_rate: .nan}"),
    }
    for name, (file, content) in broken.items():
        shutil.copytree(folder / "run", folder / name)
        (folder / name / file).write_bytes(content)
    for name, entries in {
        "text": {"hidden_size": "wide"},
        "huge": {"hidden_size": 400_000_000},
    }.items():
        checkpoint(folder / f"json-{name}", **entries)
    checkpoint(folder / "json-long", max_position_embeddings=10**11)
    pair = {"prompt": "where is the owl?", "chosen": "on the roof.", "rejected": "on the mat."}
    (folder / "pairs.jsonl").write_text("\n".join([json.dumps(pair)] * 8))
    return folder


@pytest.fixture
def call(place, capsys, monkeypatch):
    """A function that runs a command there, and gives its exit code and what it printed."""

    def run(command):
        capsys.readouterr()
        code = main(shlex.split(command))
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    monkeypatch.chdir(place)
    monkeypatch.setenv("TINYLM_CACHE", str(place / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.delenv("TINYLM_DEBUG", raising=False)
    return run


FILES = {  # a run with a broken file: what the line says
    "json-torn": "json-torn/config.json cannot be used",
    "json-list": "it holds a list, not names with values",
    "json-number": "json-number/config.json cannot be used",
    "json-deep": "json-deep/config.json cannot be used",
    "json-text": "hidden_size",
    "json-huge": "make one of these smaller: vocab_size=300, hidden_size=400000000",
    "json-long": "max_position_embeddings=100000000000",
    "weights-empty": "weights-empty/model.safetensors cannot be used",
    "weights-torn": "weights-torn/model.safetensors cannot be used",
    "weights-header": "weights-header/model.safetensors cannot be used",
}


@pytest.mark.parametrize("name", FILES)
def test_a_broken_checkpoint_is_one_line(call, name):
    code, _, errors = call(f"generate --run {name} --prompt owl --max-new-tokens 2")
    assert code == 2 and FILES[name] in errors and len(errors.strip().splitlines()) == 1, errors


RECIPES = {  # a run with a broken config.yaml: what the line says
    "yaml-list": "config.yaml holds no fields",
    "yaml-bytes": "config.yaml is not YAML",
    "yaml-syntax": "config.yaml is not YAML",
    "yaml-deep": "config.yaml is not YAML",
    "yaml-type": "data.seq_len='long' must be int",
    "yaml-nan": "train.learning_rate=nan",
}


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("command", ["evaluate {}", "pretrain --recipe {}/config.yaml --out new"])
def test_a_broken_recipe_is_one_line(call, place, command, name):
    code, _, errors = call(command.format(name))
    assert code == 2 and RECIPES[name] in errors and len(errors.strip().splitlines()) == 1, errors
    assert not (place / "new").exists()


FLAGS = {  # a command: what its line says
    "pretrain --model.hidden-size 100000": "parameters need",
    "pretrain --model.num-hidden-layers 100000000": "num_hidden_layers=100000000",
    "pretrain --model.max-position-embeddings 10000000000": "max_position_embeddings=10000000000",
    "pretrain --model.num-experts 100000000": "parameters need",
    "pretrain --data.vocab-size 1000000000000": "use at most 1,048,576",
    "pretrain --train.num-threads 100000": "train.num_threads=100000: give a number from 1 to",
    "pretrain --train.batch-size 1000000000": "make data.seq_len or train.batch_size smaller",
    "pretrain --train.learning-rate inf": "train.learning_rate=inf: give a finite number",
    "pretrain --train.seed 99999999999999999999": "at most 64 bits",
    "pretrain --model.rms-norm-eps nan": "rms_norm_eps=nan: use a finite number",
    "evaluate run --data.seq-len 100000": (
        "data.seq_len=100000 is above max_position_embeddings=128 of run"
    ),
    "generate --run run --seed 99999999999999999999": "at most 64 bits",
    "dpo --run run --beta inf": "beta=inf: give a finite number",
    "dpo --run none": "`tinylm sft --out none` makes it",
    "chat --run runs/sft": "`tinylm sft --out runs/sft` makes it",
    "speedrun --share 0": "share=0.0: give a number above 0",
}


@pytest.mark.parametrize("command", FLAGS)
def test_an_impossible_flag_is_one_line_before_anything_is_made(call, place, command):
    before = sorted(place.iterdir())
    code, _, errors = call(command)
    assert code == 2 and FLAGS[command] in errors and len(errors.strip().splitlines()) == 1, errors
    assert sorted(place.iterdir()) == before


class PanicException(BaseException):
    """What a library written in Rust raises when it has failed."""


@pytest.mark.parametrize(
    "error", [KeyError("beta"), RuntimeError("a\nb"), PanicException("overflow"), MemoryError()]
)
def test_what_nobody_has_foreseen_is_one_line_with_a_hint(call, monkeypatch, error):
    def fail(config, block):
        raise error

    broken = commands.COMMANDS["info"]._replace(run=fail)
    monkeypatch.setitem(commands.COMMANDS, "info", broken)
    code, _, errors = call("info")
    hint = "not enough memory" if isinstance(error, MemoryError) else "TINYLM_DEBUG=1 shows where"
    assert code == 2 and hint in errors and len(errors.strip().splitlines()) == 1
    monkeypatch.setenv("TINYLM_DEBUG", "1")
    with pytest.raises(type(error)):
        call("info")


def test_the_table_of_dpo_says_what_its_loss_is_made_of(call, monkeypatch, progress_bars):
    bar = io.StringIO()
    monkeypatch.setattr("sys.stderr", bar)
    flags = "--data.path pairs.jsonl --data.seq-len 64 --data.validation-fraction 0.5"
    flags += " --train.max-steps 2 --train.sample-tokens 4 --train.batch-size 2"
    code, printed, _ = call(f"dpo --run run --out both {flags}")
    rows = dict(line.split("  ", 1) for line in printed.splitlines() if "  " in line)
    rows = {name: value.strip() for name, value in rows.items()}
    total = float(rows["validation loss"].split()[0])
    parts = [float(rows[name].split()[0]) for name in ("preference loss", "loss of chosen answers")]
    assert code == 0 and abs(total - sum(parts)) < 2e-4 and "pairs/s" in bar.getvalue()
    assert "preference loss + 1 x loss of chosen answers" in rows["validation loss"]
    assert {"pairs ranked right", "margin", "KL to the reference"} <= rows.keys()
    assert "nats per token of an answer" not in printed

    code, printed, _ = call(f"dpo --run run --out plain --sft-weight 0 {flags}")
    assert code == 0 and "preference loss" in printed and "loss of chosen answers" not in printed


def test_hints_name_the_command_that_made_a_run(place):
    for config, command in ((PretrainConfig(), "pretrain"), (DPOConfig(), "dpo")):
        shutil.rmtree(place / "half", ignore_errors=True)
        (place / "half" / "checkpoints").mkdir(parents=True)
        save_config(place / "half", config)
        with pytest.raises(ValueError, match=f"`tinylm {command} --out .*half --resume` goes on"):
            find_run(str(place / "half"))
    shutil.rmtree(place / "half")


def test_a_speedrun_goes_on(call, place, monkeypatch):
    """If one of its runs is there, it stops before all else; the remedy, `--resume`, works."""
    typed = []
    monkeypatch.setattr(commands, "print_and_start", lambda *words: typed.append(words))
    shutil.copytree(place / "run", place / "speed" / "dpo")
    code, _, errors = call("speedrun --out speed")
    assert code == 2 and "use --resume, --overwrite or another --out" in errors and not typed
    assert call("speedrun --out speed --resume")[0] == 0
    assert [words[0] for words in typed] == ["pretrain", "sft", "sft", "dpo", "grpo", "evaluate"]
    assert all(values["resume"] for _, values in typed[:5])
    shutil.rmtree(place / "speed")


def test_threads_of_a_recipe_are_bounded():
    assert TrainConfig(num_threads=64).num_threads == 64
    with pytest.raises(ValueError, match="num_threads=4096: give a number from 1 to"):
        TrainConfig(num_threads=4096)
