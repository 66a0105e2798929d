"""Check that every figure in prose has a source: `python tools/claims.py [NOTEBOOK ...]`.

A figure is a number that somebody measured: a decimal, a percentage, a large number with commas,
or a number with a unit. Its source is one of these:

- an output or the code of a cell on the same page,
- a file of results, nbs/results/NAME.json, that its paragraph, table or list item links,
- a published page that its paragraph, table or list item links (https://...).

Lines of code are counted and checked by tools/count_lines.py.
Numbers in formulas, in code, in headings and in section numbers are not figures.
"""

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import nbformat

NBS = Path(__file__).resolve().parent.parent / "nbs"

UNIT = (
    r"(?:times|×|x|nats?|seconds?|minutes?|hours?|ms|s|min|MB|GB|kB|KB|MiB|GiB|bytes|bits"
    r"|tokens/s|tokens per second|GFLOP/s|TFLOP/s|FLOPs|parameters|points?)"
)
NUMBER = r"\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d+\.\d+|\d+"
FIGURE = re.compile(
    rf"(?<![\w.,/-])(?P<number>{NUMBER})(?P<percent>\s?%)?(?P<unit>[ -]{UNIT}\b)?(?![\w]|[.,]\d)"
)
# What looks like a figure and is none: versions, sections, equations, the head's reading time.
NO_FIGURE = re.compile(
    r"(?:Python|PyTorch|transformers|torch|nbdev|trl|peft|CUDA|version|sections?|equations?|eq\."
    r"|figures?|tables?|algorithm|chapter|appendix|arXiv:?|§)[ ~]*\d+(?:\.\d+)*"
    r"|\b\d+ (?:minutes?|seconds?) to (?:read|run)"
    r"|\*\*(?:Warm-up|Ten minutes|An hour)\.?\*\*",
    re.IGNORECASE,
)
EXERCISES = re.compile(r"^## Exercises\n.*?(?=^## |\Z)", re.M | re.S)  # they ask, and claim nothing
LINK = re.compile(r"\]\(([^)\s]+)\)")


def without_code(text: str) -> str:
    """Remove code blocks, code spans, formulas, link targets, HTML tags, headings."""
    text = re.sub(r"```.*?```", " ", text, flags=re.S)
    text = re.sub(r"\$\$.*?\$\$", " ", text, flags=re.S)
    text = re.sub(r"`[^`]*`", " ", text)
    text = re.sub(r"\$[^$]*\$", " ", text)
    text = re.sub(r"\]\([^)]*\)", "]", text)
    text = re.sub(r"<[^>]+>", " ", text)
    text = re.sub(r"^#+ .*$", " ", text, flags=re.M)
    return NO_FIGURE.sub(" ", text)


def blocks(text: str) -> Iterator[str]:
    """Split prose into paragraphs, lists, and tables with their neighbors."""
    text = re.sub(r"```.*?```|\$\$.*?\$\$", " ", text, flags=re.S)
    parts = [part for part in re.split(r"\n\s*\n", text) if part.strip()]
    for i, part in enumerate(parts):
        if part.lstrip().startswith("|"):
            # A table is explained by the paragraph before it or behind it.
            yield "\n".join(parts[max(0, i - 1) : i + 2])
        else:
            yield part


def is_figure(match: re.Match) -> bool:
    """Say whether a number was measured: it has a decimal point, a comma, a % sign or a unit."""
    number = match["number"]
    if match["percent"] or "." in number:
        return True
    if "," in number:
        return True
    return bool(match["unit"]) and float(number) > 10


def figures(block: str) -> list[str]:
    """List the figures of a block of prose."""
    matches = [match for match in FIGURE.finditer(without_code(block)) if is_figure(match)]
    return [match["number"] + ("%" if match["percent"] else "") for match in matches]


def numbers_in(text: str) -> list[float]:
    """List all numbers of a text."""
    pattern = r"\d+(?:,\d{3})+(?:\.\d+)?|\d*\.\d+(?:e[+-]?\d+)?|\d+(?:e[+-]?\d+)?"
    return [float(number.replace(",", "")) for number in re.findall(pattern, text, re.I)]


def has_source(
    figure: str,  # as it stands in the prose
    values: list[float],  # what was measured
) -> bool:  # one of the values rounds to the figure
    """Say whether a figure comes from one of some values."""
    digits = figure.rstrip("%").replace(",", "")
    number = float(digits)
    decimals = len(digits.partition(".")[2])

    # In 521,664 all digits count; in 36,000 the last three may be rounded.
    step = 10.0**-decimals
    if not decimals and number >= 1000:
        step = 10.0 ** (len(digits) - len(digits.rstrip("0")))
    scales = (1.0, 100.0) if figure.endswith("%") else (1.0,)
    for value in values:
        for scale in scales:
            if abs(value * scale - number) <= 0.5001 * step:
                return True
    return False


def values_of(entry: object) -> list[float]:
    """List all numbers of a results file."""
    if isinstance(entry, dict):
        return [value for part in entry.values() for value in values_of(part)]
    if isinstance(entry, list):
        return [value for part in entry for value in values_of(part)]
    if isinstance(entry, bool):
        return []
    if isinstance(entry, (int, float)):
        return [float(entry)]
    return numbers_in(entry) if isinstance(entry, str) else []


def output_text(cell: nbformat.NotebookNode) -> str:
    """Return what a code cell printed and returned, with its code."""
    texts = [cell.source]
    for output in cell.outputs:
        texts.append("".join(output.get("text", "")))
        texts.append("".join(output.get("data", {}).get("text/plain", "")))
        texts.append("".join(output.get("data", {}).get("text/markdown", "")))
    return "\n".join(texts)


def without_source(path: Path) -> list[tuple[str, str]]:
    """List the figures of a notebook that have no source, each with its block."""
    cells = nbformat.read(path, as_version=4).cells
    page = "\n".join(output_text(cell) for cell in cells if cell.cell_type == "code")
    prose = [cell.source for cell in cells if cell.cell_type == "markdown"]
    prose = [EXERCISES.sub("", text) for text in prose]

    # Code blocks in the prose itself are examples, which are tested elsewhere.
    examples = "\n".join(re.findall(r"```.*?```", "\n".join(prose), flags=re.S))
    on_page = numbers_in(page + examples)
    problems = []
    for text in prose:
        for block in blocks(text):
            links = LINK.findall(block)
            if any(link.startswith(("http://", "https://")) for link in links):
                continue
            if "lines of code" in block:
                continue
            values = list(on_page)
            for link in links:
                file = (path.parent / link).resolve()
                if file.suffix == ".json" and file.exists():
                    values += values_of(json.loads(file.read_text("utf-8")))
            for figure in figures(block):
                if not has_source(figure, values):
                    problems.append((figure, " ".join(block.split())))
    return problems


def main() -> int:
    """Print the figures without a source."""
    paths = [Path(name) for name in sys.argv[1:]] or sorted(NBS.glob("*.ipynb"))
    count = 0
    for path in paths:
        for figure, block in without_source(path):
            count += 1
            place = block.find(figure)
            print(f"{path.name}: {figure} in: ...{block[max(0, place - 60) : place + 60]}...")
    if count:
        print(f"{count} figures have no source: print them in a cell, or link results or a page")
    return int(count > 0)


if __name__ == "__main__":
    sys.exit(main())
