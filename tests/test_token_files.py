"""Token files: what is refused, what a killed writer leaves behind, and what damage is noticed."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tinylm.data import TokenFile, write_tokens
from tinylm.files import DataConfig
from tinylm.token_cache import cache_key

DOCUMENTS = [[0, 2, 3, 0], [0, 4, 0], [0, 5, 6, 7, 0]]


def test_what_is_read_is_what_was_written(tmp_path):
    """Two bytes a token, and all tokens are targets but the first of each document."""
    file = write_tokens(iter(DOCUMENTS), tmp_path / "tokens", 8, pad_token_id=1, note="mine")
    assert [file.tokens(i).tolist() for i in range(len(file))] == DOCUMENTS
    assert file.num_targets == 12 - 3
    assert (tmp_path / "tokens" / "tokens.bin").stat().st_size == 2 * 12
    assert (file.meta["pad_token_id"], file.meta["note"]) == (1, "mine")
    assert not file.ids.flags.writeable


@pytest.mark.parametrize(("size", "dtype"), [(65536, np.uint16), (65537, np.uint32)])
def test_the_type_follows_from_the_vocabulary(tmp_path, size, dtype):
    """The largest ids that fit survive."""
    file = write_tokens([[0, size - 1]], tmp_path / "tokens", size)
    assert (file.ids.dtype, file.ids.tolist()) == (dtype, [0, size - 1])


@pytest.mark.parametrize(
    ("message", "documents"),
    [
        ("from 0 to 7", [[0, 8]]),
        ("number 0 is [0, -1]", [[0, -1]]),
        ("number 1 is [0]; give at least 2", [[0, 1], [0]]),
    ],
)
def test_wrong_documents_are_refused_and_nothing_is_left(tmp_path, message, documents):
    """A narrow integer would wrap a wrong id around without a word."""
    with pytest.raises(ValueError) as error:
        write_tokens(documents, tmp_path / "wrong", 8)
    assert message in str(error.value)
    assert not list(tmp_path.iterdir())


def test_an_existing_folder_is_refused(tmp_path):
    """Nothing is overwritten."""
    write_tokens(DOCUMENTS, tmp_path / "tokens", 8)
    with pytest.raises(ValueError, match="exists; give another one"):
        write_tokens(DOCUMENTS, tmp_path / "tokens", 8)


KILLED = """
import os, pathlib, sys
from tinylm.data import write_tokens
def documents():
    for i in range(10_000):
        yield [0, 1, 0]
    os._exit(9)  # no exception, no cleaning up: like kill -9
write_tokens(documents(), pathlib.Path(sys.argv[1]), 8)
"""


def test_a_killed_writer_leaves_no_folder_of_that_name(tmp_path):
    """What it leaves begins with a dot, and the next writer removes it."""
    target = tmp_path / "tokens"
    root = str(Path(__file__).resolve().parent.parent)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([root, *sys.path])}
    command = [sys.executable, "-c", KILLED, target]
    assert subprocess.run(command, cwd=tmp_path, env=environment).returncode == 9
    assert [path.name[:9] for path in tmp_path.iterdir()] == [".writing-"]
    with pytest.raises(ValueError, match="not a complete token file"):
        TokenFile(target)
    write_tokens(DOCUMENTS, target, 8)
    assert not [*tmp_path.glob(".*")]


@pytest.mark.parametrize("damage", [b"x", b"xx"])
def test_a_longer_file_is_noticed(tmp_path, damage):
    """Half a token or one too many."""
    file = write_tokens([[0, 1, 0]], tmp_path / "tokens", 8)
    with open(file.folder / "tokens.bin", "ab") as damaged:
        damaged.write(damage)
    with pytest.raises(ValueError, match="not a complete token file"):
        TokenFile(file.folder)


@pytest.mark.parametrize("name", ["tokens.bin", "offsets.npy", "meta.json"])
@pytest.mark.parametrize("content", [b"", b"[1]", b"{}", b"\x93NUMPY"])
def test_a_file_with_other_content_is_noticed(tmp_path, name, content):
    """Each of the three files may be damaged."""
    file = write_tokens(DOCUMENTS, tmp_path / "tokens", 8)
    (file.folder / name).write_bytes(content)
    with pytest.raises(ValueError, match="not a complete token file"):
        TokenFile(file.folder)


@pytest.mark.parametrize(("path", "maker"), [(None, "corpus.py"), ("text.txt", "files.py")])
def test_cached_tokens_depend_on_the_code_that_makes_them(tmp_path, monkeypatch, path, maker):
    (tmp_path / "text.txt").write_text("the cat")
    config = DataConfig(path=path and str(tmp_path / path))
    before = cache_key(config)
    read_bytes = Path.read_bytes

    # As if one line more stood in a module.
    for name in ("data.py", maker):
        monkeypatch.setattr(
            Path,
            "read_bytes",
            lambda self, name=name: read_bytes(self) + b"#" * (self.name == name),
        )
        assert cache_key(config)["code"] != before["code"], name
    monkeypatch.setattr(Path, "read_bytes", read_bytes)
    assert cache_key(config) == before
