"""Settings of all tests: no progress bars or notes, only the result or one line of error."""

import os

import pytest

os.environ.setdefault("TQDM_DISABLE", "1")


@pytest.fixture
def progress_bars(monkeypatch):
    """Show bars and notes in this process."""
    from tqdm import tqdm

    monkeypatch.delenv("TQDM_DISABLE")
    # tqdm has read the variable when it was imported, and keeps it as a default argument.
    monkeypatch.delitem(vars(tqdm)["__init__"].keywords, "disable", raising=False)
