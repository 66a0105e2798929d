"""Reading documents: values of mixed types, no network for local files, typing mistakes."""

import json
import socket

import datasets
import pytest

from tinylm.files import (
    DataConfig,
    LocalSplit,
    convert_records,
    load_documents,
    open_splits,
    read_splits,
)

LINES = "".join(json.dumps({"text": text}) + "\n" for text in ("the cat", "sat", "on the mat"))
MIXED = [{"text": 'say "miau"\ntwice'}, {"text": 5}, {"text": "and go"}]


def only_text(record: dict) -> str:
    """Refuse what is no text."""
    if not isinstance(record["text"], str):
        raise ValueError(f"{record['text']!r} is no text")
    return record["text"]


@pytest.mark.parametrize(
    ("name", "place"), [("odd", "odd/b.jsonl', record 2"), ("odd.json", "odd.json', record 2")]
)
def test_values_of_mixed_types_stay_as_they_are(tmp_path, name, place):
    """One record of three has a number for a text: the others stay, and the error names it."""
    lines = [json.dumps(row) + "\n" for row in MIXED]
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "a.jsonl").write_text(lines[0] * 2)
    (tmp_path / "odd" / "b.jsonl").write_text("\n".join(lines))
    (tmp_path / "odd.json").write_text(json.dumps(MIXED, indent=2))

    split = open_splits(DataConfig(path=str(tmp_path / name)))["train"]
    assert [record for *_, record in split][-3:] == MIXED
    with pytest.raises(ValueError) as error:
        list(convert_records(split, DataConfig(), only_text))
    assert f"{place}: 5 is no text" in str(error.value)


@pytest.mark.parametrize(
    ("content", "texts"), [('{\n "text": "a"\n}', ["a"]), ('["a", "b"]', ["a", "b"])]
)
def test_a_record_on_many_lines_and_bare_strings_are_read(tmp_path, content, texts):
    """JSON comes in several forms."""
    (tmp_path / "some.json").write_text(content)
    records = [record for *_, record in LocalSplit("json", [str(tmp_path / "some.json")])]
    assert records == [{"text": text} for text in texts]


def test_local_files_need_no_network(tmp_path, monkeypatch):
    """No host is looked up, not even for a mistyped path."""
    look_ups = []
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **options: look_ups.append(args))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    (tmp_path / "lines.jsonl").write_text(LINES)
    assert list(open_splits(DataConfig(path=str(tmp_path / "lines.jsonl")))["train"])

    mistyped = ["lines.jsnl.parquet", "./nothing", "~/no such folder", "nbs/lines/a"]
    for path in (str(tmp_path / "nothing"), *mistyped):
        with pytest.raises(ValueError, match="no such file or folder"):
            open_splits(DataConfig(path=path))
    assert not look_ups


WRONG = [
    {"path": "missing.txt"},
    {"path": "nobody/nothing"},
    {"path": "notes.docx"},
    {"path": "mixed"},
    {"path": "broken.jsonl"},
    {"path": "empty.jsonl"},
    {"path": "latin.txt"},
    {"path": "one.txt"},
    {"path": "lines.jsonl", "text_column": "body"},
    {"path": "lines.jsonl", "split": "test"},
    {"path": "lines.jsonl", "validation_split": "dev"},
]


@pytest.mark.parametrize("fields", WRONG, ids=lambda fields: "-".join(fields.values()))
def test_a_typing_mistake_gives_one_line(tmp_path, monkeypatch, fields):
    """The line names the field, the value, and what would be right."""
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    (tmp_path / "lines.jsonl").write_text(LINES)
    (tmp_path / "broken.jsonl").write_text('{"text": "fine"}\n{"text": "no end of the string}\n')
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "one.txt").write_text("x")
    (tmp_path / "latin.txt").write_bytes("café".encode("latin-1"))
    (tmp_path / "mixed").mkdir()
    for name in ("notes.docx", "mixed/a.txt", "mixed/b.parquet"):
        (tmp_path / name).write_text("x")

    name = fields["path"]
    if (tmp_path / name).exists():
        fields = {**fields, "path": str(tmp_path / name)}
    with pytest.raises(ValueError) as error:
        for part in load_documents(DataConfig(**fields)):
            list(part())
    message = str(error.value).replace(f"{tmp_path}/", "")
    assert message.split(":")[0] in ("path", "text_column", "split", "validation_split")
    assert repr(name) in message
    assert "\n" not in message and len(message) < 400


def test_a_single_record_that_is_no_text_cannot_be_cut(tmp_path):
    """One text is cut in two, no other record is."""
    (tmp_path / "single.jsonl").write_text('{"text": "the cat sat on the mat"}\n')
    single = DataConfig(path=str(tmp_path / "single.jsonl"))
    with pytest.raises(ValueError, match="validation_split: "):
        read_splits(single, dict)


@pytest.mark.parametrize(
    ("name", "value"),
    [("validation_fraction", 0), ("seq_len", 1), ("stories", 0), ("vocab_size", 10**9)],
)
def test_wrong_values_are_refused_by_name(name, value):
    """Each says what is right."""
    with pytest.raises(ValueError, match=f"{name}={value}: use "):
        DataConfig(**{name: value})
