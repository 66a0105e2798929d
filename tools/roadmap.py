"""Write nbs/images/roadmap-NN.svg: all notebooks in a few rows, with notebook NN lit.

The stages are the notebooks in nbs/ whose names begin with a number, so a new notebook appears by
itself. A gold line under a box marks the core path. `--check` says whether the pictures are up to
date. Every word stands on a filled box, so that the picture can be read on a light and on a dark
page; eight boxes a row keep it readable on a phone.
"""

import argparse
import sys
from pathlib import Path
from typing import NamedTuple

NBS = Path(__file__).resolve().parent.parent / "nbs"
IMAGES = NBS / "images"

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
    width: float,
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
    if check:
        for path in changed + stale:
            print(f"{path.name} is out of date; python tools/roadmap.py")
        return 1 if changed or stale else 0

    # Write what changed, and delete pictures of notebooks that are gone.
    for path in stale:
        path.unlink()
    IMAGES.mkdir(parents=True, exist_ok=True)
    for path in changed:
        path.write_text(files[path], "utf-8")
    print(f"{len(changed)} of {len(files)} pictures written")
    return 0


if __name__ == "__main__":
    sys.exit(main())
