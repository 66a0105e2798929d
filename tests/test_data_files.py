"""Data as users have it: odd records, long texts, no network, a damaged cache."""

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from itertools import islice
from pathlib import Path

import datasets
import numpy as np
import pytest
import tokenizers
import torch
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from tinylm import files, token_cache
from tinylm.chat import to_messages
from tinylm.chat_template import Tokenizer
from tinylm.checkpoints import save_model
from tinylm.cli import main
from tinylm.corpus import Story, stories
from tinylm.data import TokenFile
from tinylm.files import DataConfig, open_hub, read_splits
from tinylm.model import ModelConfig, TinyLM
from tinylm.token_cache import prepare, tokenize

ROOT = Path(__file__).resolve().parent.parent
TINY = replace(
    ModelConfig(), vocab_size=300, hidden_size=32, num_hidden_layers=1, max_position_embeddings=64
)
SHORT = "--train.max-steps 1 --train.batch-size 2 --data.seq-len 32 --train.sample-tokens 3".split()
ANSWERS = [
    {"instruction": f"Sing line {i}.", "output": f'"La"\nand "lo", {i} times'} for i in range(6)
]
TALES = [story.text for story in islice(stories(7), 300)]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A small model and its tokenizer."""
    folder = tmp_path_factory.mktemp("run")
    torch.manual_seed(0)
    save_model(TinyLM(TINY), folder)
    Tokenizer.train(TALES, 300).save_pretrained(folder)
    return folder


def spoiled(value) -> list[dict]:
    """The answers, with another value in the fourth."""
    return [*ANSWERS[:3], ANSWERS[3] | {"output": value}, *ANSWERS[4:]]


def write_array(folder: Path, records: list) -> str:
    (folder / "songs.json").write_text(json.dumps(records))
    return "songs.json"


def write_lines(folder: Path, records: list) -> str:
    (folder / "songs.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return "songs.jsonl"


def write_folder(folder: Path, records: list) -> str:
    (folder / "songs").mkdir()
    write_lines(folder / "songs", records)
    (folder / "songs" / "first.jsonl").write_text(json.dumps(ANSWERS[0]) + "\n")
    return "songs"


def write_folder_of_arrays(folder: Path, records: list) -> str:
    (folder / "songs").mkdir()
    write_array(folder / "songs", records)
    (folder / "songs" / "first.json").write_text(json.dumps(ANSWERS[:1]))
    return "songs"


WRITERS = [write_array, write_lines, write_folder, write_folder_of_arrays]


@pytest.mark.parametrize("value", [5, 0.5, True, ["la"], {"text": "la"}], ids=str)
@pytest.mark.parametrize("write", WRITERS)
def test_one_odd_value_is_named_and_changes_no_other(tmp_path, monkeypatch, write, value):
    monkeypatch.chdir(tmp_path)
    path = write(tmp_path, spoiled(value))
    with pytest.raises(
        ValueError, match=r"^path: 'songs[\w./]*', record 4: messages\[1\]=.* needs a role"
    ) as error:
        list(read_splits(DataConfig(path=path), to_messages)[0]())
    assert "\n" not in str(error.value)
    parts = read_splits(DataConfig(path=path), lambda record: record["output"])
    read = [answer for part in parts for answer in part()]
    assert all(read.count(record["output"]) >= 1 for record in spoiled(value))


def test_sft_refuses_the_record_by_name(tmp_path, monkeypatch, run, capsys):
    monkeypatch.chdir(tmp_path)
    write_array(tmp_path, spoiled(5))
    assert (
        main(["sft", "--run", str(run), "--out", "new", "--data.path", "songs.json", *SHORT]) == 2
    )
    assert "path: 'songs.json', record 4: messages[1]" in capsys.readouterr().err
    assert not Path("new").exists()


@pytest.mark.parametrize("column", ["output", "instruction", "input"])
def test_a_column_of_numbers_is_refused(tmp_path, monkeypatch, column):
    monkeypatch.chdir(tmp_path)
    rows = [record | {column: i} for i, record in enumerate(ANSWERS, start=1)]
    datasets.Dataset.from_list(rows).to_parquet("songs.parquet")
    with pytest.raises(ValueError, match="path: 'songs.parquet', record 1: "):
        read_splits(DataConfig(path="songs.parquet"), to_messages)


@pytest.mark.parametrize("streaming", [True, False])
def test_a_dataset_of_the_hub_is_not_turned_into_json(tmp_path, monkeypatch, streaming):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    write_folder_of_arrays(tmp_path, ANSWERS[:3])  # a local folder stands for it
    config = DataConfig(path=str(tmp_path / "songs"), streaming=streaming)
    read = [
        answer
        for batch in open_hub(config)["train"].iter(batch_size=9)
        for answer in batch["output"]
    ]
    assert read == [record["output"] for record in [ANSWERS[0], *ANSWERS[:3]]]
    write_array(tmp_path / "songs", spoiled(5))
    with pytest.raises(Exception, match="(?s)."):
        for batch in open_hub(config)["train"].iter(batch_size=9):
            assert all(
                answer in read or answer == ANSWERS[4]["output"] for answer in batch["output"]
            )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"text": "a"}\n\n{"text": "b"\n', "line 3 column"),
        ('{"text": "a"}\n7\n', "record 2: is 7; give an object"),
        ('[{"text": "a"}, null]', "record 2: is None; give an object"),
        ('[{"text": "a"}', "Expecting"),
        ('{"text": "a"}\n{"words": "b"}\n', "record 2: has None for text in 'text'"),
    ],
)
def test_a_broken_json_file_is_one_line(tmp_path, content, message):
    (tmp_path / "poems.json").write_text(content)
    with pytest.raises(ValueError, match=message) as error:
        files.load_documents(DataConfig(path=str(tmp_path / "poems.json")))
    assert "\n" not in str(error.value) and "poems.json" in str(error.value)


def trained(normalizer, pre_tokenizer, decoder=None, model=None, trainer=None) -> Tokenizer:
    """A tokenizer of another family, trained on the tales."""
    backend = tokenizers.Tokenizer(model or models.BPE(unk_token="<unk>"))
    if normalizer is not None:
        backend.normalizer = normalizer
    if pre_tokenizer is not None:
        backend.pre_tokenizer = pre_tokenizer
    options = {"vocab_size": 500, "special_tokens": ["<unk>", "</s>"], "show_progress": False}
    backend.train_from_iterator(TALES[:100], (trainer or trainers.BpeTrainer)(**options))
    return Tokenizer(
        PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")
    )


LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
FAMILIES = {
    "ours": lambda: Tokenizer.train(TALES, 500),
    "characters": lambda: Tokenizer.from_chars("".join(TALES) + ODD),
    "gpt2": lambda: trained(None, pre_tokenizers.ByteLevel(add_prefix_space=False)),
    "prefix space": lambda: trained(None, pre_tokenizers.ByteLevel(add_prefix_space=True)),
    "llama3": lambda: trained(
        None, pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(LLAMA3), "isolated"), BYTES])
    ),
    "qwen": lambda: trained(
        normalizers.NFC(),
        pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(LLAMA3), "isolated"), BYTES]),
    ),
    "digits": lambda: trained(
        None,
        pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        ),
    ),
    "llama2": lambda: trained(
        normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]),
        None,
        decoders.Metaspace(),
    ),
    "metaspace first": lambda: trained(None, pre_tokenizers.Metaspace(prepend_scheme="first")),
    "unigram": lambda: trained(
        None,
        pre_tokenizers.Metaspace(),
        model=models.Unigram(),
        trainer=lambda **options: trainers.UnigramTrainer(unk_token="<unk>", **options),
    ),
    "bert": lambda: trained(
        normalizers.BertNormalizer(),
        pre_tokenizers.BertPreTokenizer(),
        model=models.WordPiece(unk_token="<unk>"),
        trainer=trainers.WordPieceTrainer,
    ),
}
DRAW = random.Random(3)
SCRAPS = ["a", "bc ", " ", "  ", "\n", "\r\n", "12", "'s", "!", "…", "é", "e\u0301", "猫"]
SCRAPS.append(".\n")
ODD = "".join(DRAW.choices(SCRAPS, k=9000))
LONG = {
    "words": " ".join(TALES[:60]),
    "odd": ODD,
    "no spaces": "".join(DRAW.choices("acgt", k=12_000)),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_pieces_of_a_long_text_have_the_ids_of_the_whole(family):
    tokenizer = FAMILIES[family]()
    for name, text in LONG.items():
        pieces = list(tokenizer.pieces(text, size=3000))
        assert "".join(pieces) == text, name
        assert sum(tokenizer.encode_batch(pieces), []) == tokenizer.encode(text), name
        assert len(pieces) > 2 or family == "llama2" or name == "no spaces", name


@pytest.mark.parametrize("kind", ["bpe", "char"])
def test_a_long_document_is_encoded_in_pieces_and_its_bytes_are_counted(
    tmp_path, monkeypatch, kind, progress_bars
):
    text = "\n".join(TALES) * 3 + "é"
    tokenizer = token_cache.TOKENIZERS[kind](
        DataConfig(), lambda: iter([Story(text, np.nan)]), lambda: iter([])
    )
    whole = tokenizer.encode_document(text)
    sizes = []
    bars = []
    real = Tokenizer.encode_batch

    def encode_batch(self, texts):
        sizes.append(sum(map(len, texts)))
        return real(self, texts)

    class Bar(token_cache.tqdm):
        def close(self):
            bars.append((self.unit, self.n))
            super().close()

    monkeypatch.setattr(Tokenizer, "encode_batch", encode_batch)
    monkeypatch.setattr(token_cache, "GROUP", 100_000)
    monkeypatch.setattr(token_cache, "tqdm", Bar)
    counts = tokenize(
        lambda: iter([Story("the cat", np.nan), Story(text, np.nan)]),
        tokenizer,
        tmp_path / "tokens",
    )
    assert TokenFile(tmp_path / "tokens").tokens(1).tolist() == whole
    assert max(sizes) < 200_000 < len(text)
    assert counts["bytes"] == len(("the cat" + text).encode())
    assert bars[0] == ("B", counts["bytes"])


@pytest.mark.parametrize("alphabet", ["acgt", "+-*/=", " "])
def test_a_word_of_any_length_is_learned_quickly(alphabet):
    text = "".join(random.Random(0).choices(alphabet, k=300_000))
    begin = time.process_time()
    tokenizer = Tokenizer.train([text], 600)
    assert time.process_time() - begin < 60  # seconds of computing; without a bound, minutes
    assert max(map(len, tokenizer.hf_tokenizer.get_vocab())) <= 3 * 256
    assert tokenizer.decode(tokenizer.encode(text[:2000])) == text[:2000]


def test_ordinary_text_has_the_words_of_gpt2():
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    ours = Tokenizer.train([*TALES, ODD], 700)
    options = {
        "special_tokens": ["<|endoftext|>", "<|pad|>", "<|im_start|>", "<|im_end|>"],
        "show_progress": False,
    }
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=700, min_frequency=2, initial_alphabet=alphabet, **options
    )
    backend.train_from_iterator([*TALES, ODD], trainer)
    assert ours.hf_tokenizer.get_vocab() == backend.get_vocab()
    for text in (*TALES[:9], ODD):
        assert ours.encode(text) == backend.encode(text).ids


def test_ctrl_c_ends_the_learning_of_a_tokenizer():
    code = """
import random, signal, time
from tinylm.chat_template import Tokenizer

def interrupt(*_):
    pressed.append(time.process_time())
    raise KeyboardInterrupt

pressed = []
text = "".join(random.Random(0).choices("acgt", k=5_000_000))
signal.signal(signal.SIGINT, interrupt)
try:
    print("begins", flush=True)
    Tokenizer.train([text], 20_000)  # takes 12 seconds of computing
except KeyboardInterrupt:
    print("interrupted", time.process_time() - pressed[0] < 5, flush=True)
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code]
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "begins\n"
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    rest, errors = process.communicate(timeout=300)
    assert (rest, errors, process.returncode) == ("interrupted True\n", "", 0)


@pytest.fixture
def no_network(monkeypatch):
    """Every attempt to reach a host fails and is listed; no environment variable forbids it."""
    attempts = []

    def refuse(*args, **options):
        attempts.append(args)
        raise OSError("a host was asked")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    return attempts


def test_local_files_need_no_host(tmp_path, monkeypatch, no_network, run):
    monkeypatch.chdir(tmp_path)
    Path("tales.txt").write_text("\n".join(TALES))
    write_lines(tmp_path, ANSWERS)
    pairs = [{"prompt": "Sing.", "chosen": f"La {i}.", "rejected": "No."} for i in range(6)]
    datasets.Dataset.from_list(pairs).to_parquet("pairs.parquet")
    model = [
        "--model.hidden-size",
        "32",
        "--model.num-hidden-layers",
        "1",
        "--data.cache-dir",
        "cache",
    ]
    model += ["--data.vocab-size", "300"]
    assert main(["pretrain", "--out", "a", "--data.path", "tales.txt", *model, *SHORT]) == 0
    assert main(["sft", "--run", "a", "--out", "b", "--data.path", "songs.jsonl", *SHORT]) == 0
    assert main(["dpo", "--run", "a", "--out", "c", "--data.path", "pairs.parquet", *SHORT]) == 0
    assert no_network == []


@pytest.mark.parametrize(
    "path", ["tales.tx/x.txt", "./tales", "~/no tales", "/no/tales", "tales.jsonl", "here/tales"]
)
def test_a_mistyped_path_fails_at_once(tmp_path, monkeypatch, no_network, capsys, path):
    monkeypatch.chdir(tmp_path)
    Path("here").mkdir()
    assert main(["pretrain", "--out", "a", "--data.path", path]) == 2
    assert f"path: {path!r} cannot be read: no such file or folder" in capsys.readouterr().err
    assert no_network == [] and not Path("a").exists()


@pytest.mark.parametrize("name", ["./tok", "/no/tok", "here/tok", "runs/a/tok"])
def test_a_mistyped_tokenizer_fails_at_once(tmp_path, monkeypatch, no_network, name):
    monkeypatch.chdir(tmp_path)
    Path("here").mkdir()
    with pytest.raises(ValueError, match=f"'{name}': there is no such folder"):
        Tokenizer.from_pretrained(name)
    assert no_network == []


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGES = {
    "a bit": flip,
    "half": lambda path: os.truncate(path, path.stat().st_size // 2),
    "empty": lambda path: os.truncate(path, 0),
    "gone": Path.unlink,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_cache_is_made_anew(tmp_path, capsys, damage):
    config = DataConfig(
        stories=20, validation_stories=3, vocab_size=300, cache_dir=str(tmp_path / "cache")
    )
    first = prepare(config)
    files = [path for path in sorted(first.folder.rglob("*")) if path.is_file()]
    contents = {path: path.read_bytes() for path in files}
    for path, content in contents.items():
        DAMAGES[damage](path)
        prepare(config)
        assert path.read_bytes() == content
        assert "is damaged; the tokens are made anew" in capsys.readouterr().out
    prepare(config)
    assert "damaged" not in capsys.readouterr().out
    assert os.listdir(tmp_path / "cache") == [first.folder.name]


def test_a_cache_that_cannot_be_replaced_names_its_folder(tmp_path, monkeypatch):
    config = DataConfig(
        stories=20, validation_stories=3, vocab_size=300, cache_dir=str(tmp_path / "cache")
    )
    folder = prepare(config).folder
    flip(folder / "train" / "tokens.bin")

    def refuse(*args):
        raise PermissionError("read-only file system")

    monkeypatch.setattr(os, "rename", refuse)
    with pytest.raises(ValueError, match=f"remove the folder '{folder}'"):
        prepare(config)
    monkeypatch.undo()
    shutil.rmtree(folder)
    prepare(config)
