"""The ledger of claims: a figure in prose has a source, or the check says so."""

import importlib.util
import json
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).resolve().parent.parent
specification = importlib.util.spec_from_file_location("claims", ROOT / "tools" / "claims.py")
claims = importlib.util.module_from_spec(specification)
specification.loader.exec_module(claims)


def page(folder: Path, prose: str) -> Path:
    """Write a notebook with one cell of code, which printed a loss, and one of prose."""
    cell = nbformat.v4.new_code_cell("print(loss)")
    cell.outputs = [nbformat.v4.new_output("stream", text="loss 0.6764, 79.7% of 521,664\n")]
    notebook = nbformat.v4.new_notebook(cells=[cell, nbformat.v4.new_markdown_cell(prose)])
    path = folder / "page.ipynb"
    nbformat.write(notebook, path)
    return path


@pytest.mark.parametrize(
    "prose",
    [
        "The loss is 0.6764.",
        "The loss is 0.68, and 80% are right.",
        "It has 522,000 parameters, or 521,664.",
        "It took 47.3 ms a step ([results](results/loop.json)).",
        "| a | b |\n|---|---|\n| fp32 | 47.3 |\n\nFrom [results](results/loop.json).",
        "They report 12.5% ([paper](https://arxiv.org/abs/1706.03762)).",
        "Use Python 3.10, see section 3.2.1 and $p = 0.9$ and `top_p=0.9`.",
        "**Core path** · about 12 minutes to read, 15 seconds to run",
        "Two of 3 runs, 10 tokens, year 2026.",
    ],
)
def test_a_figure_with_a_source_passes(tmp_path, prose):
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "loop.json").write_text(json.dumps({"figures": {"ms": [47.31]}}))
    assert claims.without_source(page(tmp_path, prose)) == []


@pytest.mark.parametrize(
    ("prose", "figure"),
    [
        ("The loss is 0.6864.", "0.6864"),
        ("Right are 81%.", "81%"),
        ("It has 520,664 parameters.", "520,664"),
        ("It took 47.3 ms a step.", "47.3"),
        ("It took 48.3 ms a step ([results](results/loop.json)).", "48.3"),
        ("It is 35 times as fast.", "35"),
        ("| a | b |\n|---|---|\n| fp32 | 12.9 |", "12.9"),
    ],
)
def test_a_figure_without_a_source_is_named(tmp_path, prose, figure):
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "loop.json").write_text(json.dumps({"figures": {"ms": [47.31]}}))
    problems = claims.without_source(page(tmp_path, prose))
    assert [name for name, _ in problems] == [figure]


def test_every_results_file_says_how_it_came_about():
    paths = list((ROOT / "nbs" / "results").glob("*.json"))
    for path in paths:
        entry = json.loads(path.read_text("utf-8"))
        missing = {"command", "commit", "date", "machine", "seeds", "figures"} - entry.keys()
        assert not missing, f"{path.name} lacks {missing}"


def test_every_figure_of_the_notebooks_has_a_source():
    problems = []
    for path in sorted((ROOT / "nbs").glob("*.ipynb")):
        problems += [
            f"{path.name}: {figure}: {block}" for figure, block in claims.without_source(path)
        ]
    assert not problems, "\n".join(problems)
