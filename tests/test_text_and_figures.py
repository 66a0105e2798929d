"""Texts and figures as others see them: start tokens, other folders, pipes, bytes, intervals."""

import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from tinylm.chat_template import Tokenizer
from tinylm.cli import main

ROOT = Path(__file__).resolve().parent.parent
SMALL = "--model.hidden-size 16 --model.num-hidden-layers 1 --model.num-attention-heads 1"
SMALL += " --data.seq-len 48"
PLAIN = "--model.layer-types full_attention --model.no-value-residual"  # can be exported
SHORT = "--train.max-steps 2 --train.batch-size 2 --train.sample-tokens 3 --train.warmup-steps 1"
TALE = "Kim rowed to the isle. The isle was far off."


def call(command: str) -> int:
    """The command in this process: its exit code."""
    return main(command.split())


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A project, made with relative names: text, a run on it, and a run that was tuned from it."""
    folder = tmp_path_factory.mktemp("figures")
    before = dict(os.environ)
    here = os.getcwd()
    os.environ.update(
        TINYLM_CACHE=str(folder / "cache"),
        TQDM_DISABLE="1",
        PYTHONPATH=str(ROOT),
        OMP_NUM_THREADS="1",
    )
    project = folder / "project"
    project.mkdir()
    os.chdir(project)
    lines = [json.dumps({"text": f"{TALE} It took {n} hours."}) for n in range(60)]
    Path("tales.jsonl").write_text("\n".join(lines))
    chats = [json.dumps({"prompt": f"How far, {n}?", "completion": "Far."}) for n in range(20)]
    Path("chats.jsonl").write_text("\n".join(chats))
    data = "--data.path tales.jsonl --data.vocab-size 290"
    assert call(f"pretrain {data} {SMALL} {PLAIN} {SHORT} --out runs/base") == 0
    data = "--data.path chats.jsonl --data.seq-len 48"
    assert call(f"sft --run runs/base {data} {SHORT} --out runs/tuned") == 0
    yield project
    os.chdir(here)
    os.environ.clear()
    os.environ.update(before)


def loss_of(folder: Path, name: str) -> float:
    return json.loads((folder / "report.json").read_text())[name]["loss"]


def test_saved_tokenizers_begin_a_text_once(place):
    assert call("export --run runs/tuned --out handed-on") == 0
    for folder in ("runs/base", "runs/tuned", "handed-on"):
        own = Tokenizer.from_pretrained(folder)
        theirs = AutoTokenizer.from_pretrained(folder)
        assert theirs(TALE).input_ids == own.encode_document(TALE)[:-1]
        ids = theirs([TALE, "Kim"]).input_ids
        assert theirs.batch_decode(ids, skip_special_tokens=True) == [TALE, "Kim"]


READY = {  # the rule of a ready-made tokenizer: None, or what its makers put around a text
    "no rule": None,
    "no token": processors.ByteLevel(),
    "end only": processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)]),
    "start": processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)]),
}


@pytest.mark.parametrize("bos", ["<s>", None])
@pytest.mark.parametrize("rule", READY)
def test_ready_made_tokenizers_begin_a_text_once(rule, bos, tmp_path):
    tokens = ["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    vocab = {token: i for i, token in enumerate(tokens)}
    backend = tokenizers.Tokenizer(models.BPE(vocab, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    if READY[rule]:
        backend.post_processor = READY[rule]
    theirs = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=bos, eos_token="</s>")
    before = theirs("Kim").input_ids
    tokenizer = Tokenizer(theirs)
    opened = theirs("Kim").input_ids
    plain = tokenizer.encode("Kim")
    expected = [0, *plain] if rule == "no rule" and bos else before  # a rule of the makers stays
    assert opened == expected

    tokenizer.add_start_token()  # as for a model that is trained from the beginning
    tokenizer.save_pretrained(tmp_path)
    saved = AutoTokenizer.from_pretrained(tmp_path)
    assert saved("Kim").input_ids == [tokenizer.bos_token_id, *plain]
    assert Tokenizer.from_pretrained(tmp_path).hf_tokenizer("Kim").input_ids == [
        tokenizer.bos_token_id,
        *plain,
    ]


def test_evaluate_does_not_fill_the_cache(place):
    count = len(list((place.parent / "cache").iterdir()))
    for _ in range(2):
        assert call("evaluate runs/base runs/tuned") == 0
    assert len(list((place.parent / "cache").iterdir())) == count


@pytest.mark.parametrize("run", ["runs/base", "runs/tuned"])
def test_a_run_is_measured_on_its_text_from_anywhere(place, run, monkeypatch, capsys):
    assert call(f"evaluate {run} --out {place}/here") == 0
    right = loss_of(place / "here", run)
    monkeypatch.chdir(place.parent)
    assert call(f"evaluate project/{run} --out {place}/there") == 0
    assert loss_of(place / "there", f"project/{run}") == right
    shutil.copytree(place, place.parent / "moved", dirs_exist_ok=True)
    assert call(f"evaluate moved/{run} --out {place}/moved") == 0
    assert loss_of(place / "moved", f"moved/{run}") == right


def test_a_run_in_a_folder_given_in_full(place, monkeypatch, tmp_path):
    out = tmp_path / "far" / "away"
    assert (
        call(f"pretrain --data.path tales.jsonl --data.vocab-size 290 {SMALL} {SHORT} --out {out}")
        == 0
    )
    monkeypatch.chdir(tmp_path)
    assert call(f"evaluate {out}") == 0
    assert "tales.jsonl" in (out / "report" / "report.json").read_text()


def test_nothing_is_measured_on_other_text_silently(place, monkeypatch, tmp_path, capsys):
    shutil.copytree("runs/base", tmp_path / "runs" / "base")
    shutil.copytree("runs/tuned", tmp_path / "alone")
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    assert call("evaluate runs/base") == 2
    assert "data.path='tales.jsonl', which is not where it was" in capsys.readouterr().err
    shutil.rmtree("runs")
    assert call("evaluate alone") == 2
    assert "was tuned from run='runs/base', which is not there" in capsys.readouterr().err
    shutil.copy(place / "tales.jsonl", "other.jsonl")
    assert call("evaluate alone --data.path other.jsonl --data.seq-len 48") == 0
    assert call("info --run alone") == 0
    assert "FLOPs per token at 48 tokens" in capsys.readouterr().out


def test_a_copy_of_a_run_says_that_it_takes_the_text_of_this_folder(place, capsys):
    shutil.copytree("runs/base", "copied")
    capsys.readouterr()
    assert call("evaluate copied") == 0
    assert (
        "tales.jsonl is not where it was, seen from copied: the one in this folder"
        in capsys.readouterr().err
    )


def test_a_model_from_elsewhere_says_what_it_is_measured_on(place, capsys):
    shutil.copytree("runs/base", "foreign")
    Path("foreign/config.yaml").unlink()
    flags = "--data.stories 20 --data.validation-stories 5 --data.seq-len 48 --stories 1"
    assert call(f"evaluate foreign {flags}") == 0
    shown = capsys.readouterr()
    assert "foreign has no config.yaml" in shown.err and "built-in stories" in shown.out


def test_every_interval_says_what_it_is(place, capsys):
    stories = "--data.path None --data.validation-stories 6 --data.stories 20 --stories 3"
    assert call(f"evaluate runs/base {stories}") == 0
    table = Path("runs/base/report/report.md").read_text()
    for text in (capsys.readouterr().out, table):
        assert re.search(r"loss .*± [\d.]+ nats per token \(95% interval, 6 documents\)", text)
        assert re.search(r"distance to the floor .*± [\d.]+% \(95% interval, 6 documents\)", text)
        assert all(
            "95% interval" in line
            for line in text.splitlines()
            if "±" in line or re.search(r"% of \d", line)
        )
        assert re.search(r"bits per byte .*\(of the text; end tokens left out\)", text)


def type_in(
    monkeypatch, words: list[str], typed: bytes = b"", encoding: str = "utf-8"
) -> tuple[int, bytes]:
    """The command as the terminal calls it: its exit code, and what it prints."""
    printed = io.BytesIO()
    monkeypatch.setattr(sys, "argv", ["tinylm", *words])
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(typed), "utf-8"))
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(printed, encoding))
    code = main()
    sys.stdout.flush()
    return code, printed.getvalue()


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_reader_that_leaves_is_no_error(place, unbuffered):
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "tinylm", "--help"]
    environment = os.environ | {"PYTHONUNBUFFERED": unbuffered}
    done = subprocess.run(
        command, stdout=write, stderr=subprocess.PIPE, env=environment, timeout=120
    )
    os.close(write)
    assert (done.returncode, done.stderr) == (141, b"")


@pytest.mark.parametrize("command", ["generate --run runs/base --max-new-tokens 20", "info --help"])
def test_a_reader_that_leaves_a_command(place, command, monkeypatch, capsys):
    read, write = os.pipe()
    os.close(read)
    with open(write, "w") as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        assert call(command) == 141
    assert capsys.readouterr().err == ""


def test_bytes_that_are_no_utf8_get_a_line(place, monkeypatch, capsys):
    prompt = b"Kim \xe9".decode("utf-8", "surrogateescape")  # as Python reads it
    assert type_in(monkeypatch, ["generate", "--run", "runs/base", "--prompt", prompt]) == (2, b"")
    line = r"tinylm: error: --prompt=b'Kim \xe9' is not UTF-8: write the text in UTF-8"
    assert capsys.readouterr().err.splitlines() == [line]

    typed = b"\xef\xbb\xbfKim\nKim \xe9\nKim\n"
    code, shown = type_in(
        monkeypatch, ["chat", "--run", "runs/tuned", "--max-new-tokens", "2"], typed
    )
    assert code == 0 and shown.startswith(b"> Kim\n") and shown.count(b"> Kim") == 3
    assert shown.count(b"is not UTF-8") == 1


def test_a_terminal_of_another_encoding_shows_what_it_can(place, monkeypatch):
    words = ["generate", "--run", "runs/base", "--prompt", "Kim ±", "--max-new-tokens", "1"]
    code, shown = type_in(monkeypatch, words, encoding="ascii")
    assert code == 0 and shown.startswith(b"Kim ?")


@pytest.mark.parametrize(
    "command", ["sft --data.path chats.jsonl --out runs/no", "dpo --out runs/no", "evaluate"]
)
def test_a_tokenizer_with_more_tokens_than_rows(place, command, capsys):
    if not Path("wide").exists():
        shutil.copytree("runs/base", "wide")
        wide = Tokenizer.from_pretrained("wide")
        wide.hf_tokenizer.add_tokens(["<|more|>"], special_tokens=True)
        wide.save_pretrained("wide")
    rows = json.loads(Path("wide/config.json").read_text())["vocab_size"]
    assert call(f"{command} --run wide --data.seq-len 48") == 2
    assert (
        f"its tokenizer has {rows + 1} tokens, but the model has rows for {rows}"
        in capsys.readouterr().err
    )
    assert not Path("runs/no").exists()
