"""Every cell of every notebook, one test per notebook, each in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = [path for path in sorted((ROOT / "nbs").glob("*.ipynb")) if path.name[0] not in "_."]

# The path goes in as an argument of the function: run with `python -c`, nbdev ignores the command line.
RUN = "import sys; from nbdev.test import nbdev_test; nbdev_test(path=sys.argv[1], n_workers=1)"
QUIET = {
    "OMP_NUM_THREADS": "1",
    "MPLBACKEND": "agg",
    "TQDM_DISABLE": "1",
    "TOKENIZERS_PARALLELISM": "true",
}
OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}


def test_there_are_notebooks():
    assert NOTEBOOKS, "nbs/ holds no notebook, so nothing below was tested"


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(notebook):
    done = subprocess.run(
        [sys.executable, "-c", RUN, str(notebook)],
        cwd=ROOT,
        env={**os.environ, **QUIET, **OFFLINE},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=900,
    )
    # A path that matches no notebook exits with 0 as well: only the word "Success" says that cells were run.
    if done.returncode or "Success." not in done.stdout:
        pytest.fail(f"{notebook.name}\n{done.stdout}\n{done.stderr}", pytrace=False)
