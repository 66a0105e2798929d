"""Draw the map of the notebooks: pictures for their heads, and the table in nbs/index.ipynb.

nbs/images/roadmap-NN.svg shows all notebooks in a few rows, with notebook NN lit and a gold line
under the core path. The table says what each notebook is about, in the sentence under its title.
The notebooks are those in nbs/ whose names begin with a number, so a new one appears by itself.
`--check` says whether pictures and table are up to date. After a change of the table, README.md is
rebuilt with tools/build_readme.py.

Every word stands on a filled box, so that the picture can be read on a light and on a dark page;
eight boxes a row keep it readable on a phone.
"""

import argparse
import re
import sys
from pathlib import Path
from typing import NamedTuple

import nbformat

NBS = Path(__file__).resolve().parent.parent / "nbs"
IMAGES = NBS / "images"
INDEX = NBS / "index.ipynb"
TABLE_HEAD = "| | notebook | what it is about |\n|---|---|---|"
TABLE = re.compile(re.escape(TABLE_HEAD) + r"(?:\n\|[^\n]*)*")

# The parts of the course, by the first digit of a notebook's number.
PARTS = {
    "0": "start",
    "1": "model",
    "2": "generation",
    "3": "data",
    "4": "pretraining",
    "5": "tuning",
    "6": "use, study",
    "7": "use, study",
}
# What a first-time reader needs: from text to a trained model that writes and answers.
CORE_PATH = ("00", "01", "10", "11", "13", "15", "21", "30", "31", "43", "51")

COLUMNS = 8  # boxes in a row
BOX = 62  # width of a box, in pixels, as all lengths here
HEIGHT = 40  # of a box
GAP = 4  # space between two boxes
MARGIN = 4
LINE = 4  # thickness of the line under the core path
ROW = HEIGHT + LINE + 2 * GAP
WIDTH = 2 * MARGIN + COLUMNS * (BOX + GAP) - GAP


class Colors(NamedTuple):
    """How a box is painted."""

    fill: str
    ink: str  # of the words in it


DONE = Colors("#3d6f8e", "#ffffff")
HERE = Colors("#c2410c", "#ffffff")
AHEAD = Colors("#e4e8ec", "#37424d")
PART = Colors("#55606b", "#ffffff")
CORE = "#e0a100"  # the line under the core path


class Box(NamedTuple):
    """A box of the picture."""

    head: str  # first line, in bold type
    words: list[str]  # the lines below it
    colors: Colors
    core: bool = False  # a line under it


def stages() -> list[str]:
    """List the notebooks, such as `10_rope`, in their order."""
    return [path.stem for path in sorted(NBS.glob("[0-9][0-9]_*.ipynb"))]


def lines_of(name: str) -> list[str]:
    """Split the name of a notebook into lines that fit a box."""
    words = name.split("_")
    one_line = " ".join(words)
    return [one_line] if len(one_line) < 11 or len(words) == 1 else [words[0], " ".join(words[1:])]


def colors_of(stage: int, here: int) -> Colors:
    """Choose the colors of a stage: passed, lit, or still ahead."""
    if stage == here:
        return HERE
    return DONE if stage < here else AHEAD


def boxes(names: list[str], here: int) -> list[Box]:
    """List the boxes in their order; a dark one opens each part, and the last one is a legend."""
    result = []
    part = ""
    for i, name in enumerate(names):
        if PARTS[name[0]] != part:
            part = PARTS[name[0]]
            result.append(Box("", part.split(", "), PART))
        core = name[:2] in CORE_PATH
        result.append(Box(name[:2], lines_of(name[3:]), colors_of(i, here), core))
    result.append(Box("", ["core path"], AHEAD, core=True))
    return result


def rect(
    x: float,  # left edge
    y: float,  # upper edge
    width: float,  # in pixels, as all lengths here
    height: float,  # downward
    fill: str,  # color
) -> str:
    """Draw a filled box."""
    return f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="3" fill="{fill}"/>'


def text(
    x: float,  # middle of the words
    y: float,  # the line they stand on
    words: str,  # what is written
    fill: str,  # color
    size: float,  # of the font
    bold: bool = False,  # in bold type
) -> str:
    """Write words."""
    weight = ' font-weight="bold"' if bold else ""
    return f'<text x="{x:g}" y="{y:g}" fill="{fill}" font-size="{size:g}"{weight}>{words}</text>'


def size_of(words: str) -> float:
    """Choose the size of the font, so that the words fit a box."""
    if words.isdigit():
        return 13
    return 10.5 if len(words) < 10 else 9.5


def draw(box: Box, place: int) -> list[str]:
    """Draw a box at its place, counted from the upper left corner, row by row."""
    row, column = divmod(place, COLUMNS)
    x = MARGIN + column * (BOX + GAP)
    y = MARGIN + row * ROW
    middle = x + BOX / 2
    parts = [rect(x, y, BOX, HEIGHT, box.colors.fill)]

    # The words, centered.
    lines = [box.head, *box.words] if box.head else box.words
    spacing = 11 if len(lines) > 2 else 12.5
    baseline = y + HEIGHT / 2 - spacing * len(lines) / 2 + 9.5
    for words in lines:
        size = size_of(words)
        bold = words == box.head or box.colors is PART
        parts.append(text(middle, baseline, words, box.colors.ink, size, bold))
        baseline += spacing

    if box.core:
        parts.append(rect(x, y + HEIGHT + 2, BOX, LINE, CORE))
    return parts


def svg(names: list[str], here: int) -> str:
    """Draw the picture with stage number `here` (its place in `names`) lit."""
    drawn = boxes(names, here)
    rows = -(-len(drawn) // COLUMNS)
    height = 2 * MARGIN + rows * ROW - GAP
    attributes = (
        'xmlns="http://www.w3.org/2000/svg"',
        f'width="{WIDTH}" height="{height}" viewBox="0 0 {WIDTH} {height}" role="img"',
        'font-family="system-ui, Segoe UI, Helvetica, Arial, sans-serif" text-anchor="middle"',
    )
    head = f"<svg {' '.join(attributes)}>"
    title = f"<title>You are here: {names[here].replace('_', ' ', 1)}</title>"
    parts = [part for place, box in enumerate(drawn) for part in draw(box, place)]
    return "\n".join([head, title, *parts, "</svg>"]) + "\n"


def sentence_of(name: str) -> str:
    """Read the sentence under the title of a notebook."""
    cells = nbformat.read(NBS / f"{name}.ipynb", as_version=4).cells
    match = re.search(r"^> *(.+)$", cells[0].source, re.MULTILINE)
    return match[1] if match else ""


def table(names: list[str]) -> str:
    """Write the table of all notebooks; a dot marks the core path."""
    rows = [TABLE_HEAD]
    for name in names:
        dot = "●" if name[:2] in CORE_PATH else ""
        link = f"[{name.replace('_', ' ')}]({name}.ipynb)"
        rows.append(f"| {dot} | {link} | {sentence_of(name)} |")
    return "\n".join(rows)


def write_table(names: list[str], check: bool) -> bool:
    """Put the table into the index, or only say whether it is up to date."""
    index = nbformat.read(INDEX, as_version=4)
    cell = next(cell for cell in index.cells if TABLE.search(cell.source))
    new = TABLE.sub(lambda _: table(names), cell.source)
    if new == cell.source:
        return True
    if not check:
        cell.source = new
        nbformat.write(index, INDEX)
    return False


def is_up_to_date(path: Path, content: str) -> bool:
    """Say whether a file holds this content."""
    return path.exists() and path.read_text("utf-8") == content


def main() -> int:
    """Read the flags of this script, and do what they say."""
    as_written = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=as_written)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if it is stale")
    check = parser.parse_args().check

    # Compare the pictures with those that exist.
    names = stages()
    files = {IMAGES / f"roadmap-{name[:2]}.svg": svg(names, i) for i, name in enumerate(names)}
    changed = [path for path in files if not is_up_to_date(path, files[path])]
    stale = sorted(set(IMAGES.glob("roadmap-*.svg")) - files.keys())
    is_table_new = not write_table(names, check)
    if check:
        outdated = [path.name for path in changed + stale]
        if is_table_new:
            outdated.append("the table in nbs/index.ipynb")
        for name in outdated:
            print(f"{name} is out of date; python tools/roadmap.py && python tools/build_readme.py")
        return 1 if outdated else 0

    # Write what changed, and delete pictures of notebooks that are gone.
    for path in stale:
        path.unlink()
    IMAGES.mkdir(parents=True, exist_ok=True)
    for path in changed:
        path.write_text(files[path], "utf-8")
    table_note = ", and the table in nbs/index.ipynb" if is_table_new else ""
    print(f"written: {len(changed)} of {len(files)} pictures{table_note}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
