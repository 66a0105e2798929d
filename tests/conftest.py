"""Settings of all tests: no notes of progress, so that a command prints its result, or one line of error."""

import pytest


@pytest.fixture(autouse=True)
def no_progress_notes(monkeypatch):
    monkeypatch.setenv("TQDM_DISABLE", "1")
