"""Every cell of every notebook, one test per notebook, each in a process of its own."""

import re
from pathlib import Path

import nbformat
import pytest
from preloaded import python

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = [path for path in sorted((ROOT / "nbs").glob("*.ipynb")) if path.name[0] not in "_."]

# The tests that take long begin first, so that none of them is left over at the end. What is not
# listed takes a few seconds.
LONG = "51 56 53 54 70 00 72 71 20 43 15 65 14 55 52 62".split()
NOTEBOOKS.sort(key=lambda path: LONG.index(path.name[:2]) if path.name[:2] in LONG else len(LONG))

RUN = """
import sys
from pathlib import Path
from nbdev.config import get_config
from nbdev.test import test_nb

passed, _ = test_nb(Path(sys.argv[1]), get_config().tst_flags.split(), basepath=sys.argv[2])
sys.exit(not passed)
"""


def run_notebook(notebook: Path) -> str:
    """Run all cells; the result is an empty string, or a report of the first cell that failed."""
    done = python(RUN, str(notebook), str(ROOT), PYTHONPATH=str(ROOT))
    if done.returncode == 0:
        return ""
    place = place_of_failure(notebook, done.stderr)
    return f"{notebook.name}: {place}\n{done.stdout}\n{done.stderr}"


def place_of_failure(notebook: Path, errors: str) -> str:
    """Where the failing cell is: the heading above it, its number, and the line that failed."""
    cell_number = re.search(r"While Executing Cell #(\d+)", errors)
    if cell_number is None:
        return "it failed outside its cells"
    index = int(cell_number[1]) - 1
    cells = nbformat.read(notebook, as_version=4).cells
    heading = heading_above(cells, index)
    place = f"cell {index + 1}, under the heading {heading!r}"

    # A call adds frames of other cells below; the frame of the failing cell itself is a <module>.
    frames = re.findall(r'File "<ipython-input[^"]*", line (\d+), in <module>', errors)
    if not frames:  # a syntax error has no frame, only a line
        frames = re.findall(r'File "<ipython-input[^"]*", line (\d+)', errors)
    if not frames:
        return place

    # Before a cell runs, its `#|` lines and the blank lines at its top are taken away.
    lines = cells[index].source.splitlines()
    lines_left_out = 0
    while re.fullmatch(r"\s*(#\s*\|.*)?", lines[lines_left_out]):
        lines_left_out += 1
    line_number = int(frames[-1]) + lines_left_out
    return f"{place}, line {line_number}: {lines[line_number - 1].strip()}"


def heading_above(cells: list, index: int) -> str:
    """The last heading in the Markdown cells before cell number `index`."""
    for cell in reversed(cells[:index]):
        if cell.cell_type != "markdown":
            continue
        headings = re.findall(r"^#+ +(.+)$", cell.source, re.MULTILINE)
        if headings:
            return headings[-1].strip()
    return "(none)"


def test_there_are_notebooks():
    assert NOTEBOOKS, "nbs/ holds no notebook, so nothing below was tested"


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(notebook):
    report = run_notebook(notebook)
    if report:
        pytest.fail(report, pytrace=False)


def write_notebook(path: Path, *code: str) -> None:
    """Write a notebook with two headings, a cell without a fault, and then the cells of `code`."""
    heading = nbformat.v4.new_markdown_cell("# Roots\n\nWhat they are.\n\n## The square root")
    prose = nbformat.v4.new_markdown_cell("A cell without a heading.")
    healthy = nbformat.v4.new_code_cell("import math")
    cells = [nbformat.v4.new_code_cell(source) for source in code]
    nbformat.write(nbformat.v4.new_notebook(cells=[heading, healthy, prose, *cells]), path)


ROOT_CELL = "def root(x):\n    y = math.sqrt(x)\n    return y"
BROKEN = {
    "a false claim": ("#| hide\n\nn = 9\nassert root(n) == 4", "line 4: assert root(n) == 4"),
    "an error in a function": ("n = -1\nroot(n)", "line 2: root(n)"),
    "no Python": ("n = 1\nn = = 2", "line 2: n = = 2"),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_report_names_heading_and_line(tmp_path, fault):
    source, line = BROKEN[fault]
    notebook = tmp_path / "broken.ipynb"
    write_notebook(notebook, ROOT_CELL, source)
    first_line = run_notebook(notebook).splitlines()[0]
    assert first_line == f"broken.ipynb: cell 5, under the heading 'The square root', {line}"


def test_notebook_without_a_fault_has_no_report(tmp_path):
    notebook = tmp_path / "healthy.ipynb"
    write_notebook(notebook, ROOT_CELL, "assert root(9) == 3")
    assert run_notebook(notebook) == ""
