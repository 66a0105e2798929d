"""Settings of all tests: no progress bars or notes, one line of error; what takes long first."""

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


# The files that take longest, the longest first. Each of them has a folder or a run that its tests
# share, so its tests stay together.
SLOW = "cli torchrun grpo decoding families benchmarks runs resume command_line".split()


def pytest_collection_modifyitems(config, items):
    """With two workers, begin with what takes long, so that nothing long is left over at the end.

    `--dist worksteal` gives each worker one half of the tests; a worker that has done its half
    takes tests from the end of the other's. So one half begins with the notebooks, the other one
    with the slow files.
    """
    if not hasattr(config, "workerinput"):
        return
    notebooks, slow, rest = [], [], []
    for item in items:
        name = item.path.stem.removeprefix("test_")
        group = notebooks if name == "notebooks" else slow if name in SLOW else rest
        group.append(item)
    slow.sort(key=lambda item: SLOW.index(item.path.stem.removeprefix("test_")))
    rest_of_first_half = max(len(items) // 2 - len(notebooks), 0)
    items[:] = notebooks + rest[:rest_of_first_half] + slow + rest[rest_of_first_half:]
