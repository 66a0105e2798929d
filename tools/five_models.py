"""Draw nbs/images/five-models.svg: what five models write, and how far each is above the floor.

The first four rows are read from the saved outputs of nbs/00_tour.ipynb. The last one is the
default run, nbs/results/default.json; its text is from the last sample of that run. `--check` says
whether the picture is up to date.
"""

import argparse
import re
import sys
import textwrap
from pathlib import Path
from typing import NamedTuple

import nbformat

NBS = Path(__file__).resolve().parent.parent / "nbs"
PICTURE = NBS / "images" / "five-models.svg"

# The default run: its loss minus the floor, and parts of the last text in samples.txt.
DEFAULT_DISTANCE = 0.6594 - 0.6461
DEFAULT_TEXT = (
    "One cloudy afternoon, Rosa and Lily were in the kitchen. Rosa had a green drum. "
    "... Where was Rosa? Rosa was in the kitchen. Who had the drum? Rosa had it."
)

WIDTH = 520  # of the picture, in pixels, as all lengths here
MARGIN = 16
ROW = 62  # height of a row without its text
LINE = 20  # height of a line of text
COLUMNS = 54  # characters of text in a line
LINES = 4  # of text in a row, at most
LONGEST_BAR = WIDTH - 2 * MARGIN
FONT = "system-ui, Segoe UI, Helvetica, Arial, sans-serif"


class Row(NamedTuple):
    """A model of the picture."""

    name: str
    distance: float  # nats per token above the floor
    text: str  # what it writes


def printed(notebook: Path) -> str:
    """Return all that the cells of a notebook have printed."""
    cells = nbformat.read(notebook, as_version=4).cells
    outputs = [output for cell in cells for output in cell.get("outputs", [])]
    return "\n".join(output.get("text", "") for output in outputs)


def rows() -> list[Row]:
    """Read the models of the tour, and add the default run."""
    # What the tour has printed.
    text = printed(NBS / "00_tour.ipynb")
    distances = re.findall(r"^(.+?) +([\d.]+) nats above the floor", text, re.MULTILINE)
    distance = {name: float(number) for name, number in distances}
    before, _ = re.findall(r"^before: +(It was .+)$", text, re.MULTILINE)
    pairs, head = re.findall(r"^after: +(It was .+)$", text, re.MULTILINE)
    library = re.findall(r"^tinylm: +(It was .+)$", text, re.MULTILINE)[0]

    # From the worst model to the best.
    return [
        Row("no training", distance["no training"], before),
        Row("a table of word pairs", distance["word pairs"], pairs),
        Row("one attention head", distance["one head"], head),
        Row("two layers of tinylm", distance["tinylm"], library),
        Row("tinylm pretrain", DEFAULT_DISTANCE, DEFAULT_TEXT),
    ]


def text(
    x: float,  # left edge of the words, or the right one, as the attributes say
    y: float,  # the line they stand on
    words: str,  # what is written
    attributes: str,  # of the SVG element: font and color
) -> str:
    """Write words."""
    escaped = words.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return f'<text x="{x:g}" y="{y:g}" {attributes}>{escaped}</text>'


def lines_of(row: Row) -> list[str]:
    """Break the text of a row into lines, and leave out what does not fit."""
    lines = textwrap.wrap(row.text.removesuffix(" <end>"), COLUMNS)
    if len(lines) > LINES:
        lines = [*lines[: LINES - 1], lines[LINES - 1] + " ..."]
    return lines


def height_of(row: Row) -> int:
    """Return the height of a row."""
    return ROW + LINE * len(lines_of(row))


def draw(
    row: Row,  # what to draw
    y: float,  # upper edge
    longest: float,  # distance of the longest bar
) -> list[str]:
    """Draw a row: name and distance, a bar, and the text."""
    # Name, distance, and a bar as long as the distance.
    distance = f"{row.distance:.2f} nats above the floor"
    bar = max(2, row.distance / longest * LONGEST_BAR)
    right = f'fill="#55606b" font-size="15" text-anchor="end" font-family="{FONT}"'
    parts = [
        text(MARGIN, y + 18, row.name, f'font-size="17" font-weight="bold" font-family="{FONT}"'),
        text(WIDTH - MARGIN, y + 18, distance, right),
        f'<rect x="{MARGIN}" y="{y + 27}" width="{bar:g}" height="9" rx="2" fill="#17386f"/>',
    ]

    # What the model writes.
    style = 'font-size="15.5" font-style="italic" font-family="Georgia, serif" fill="#37424d"'
    for i, line in enumerate(lines_of(row)):
        parts.append(text(MARGIN, y + 57 + LINE * i, line, style))
    return parts


def svg() -> str:
    """Draw the picture."""
    # The page.
    drawn = rows()
    height = MARGIN + sum(height_of(row) for row in drawn)
    longest = max(row.distance for row in drawn)
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" '
        f'viewBox="0 0 {WIDTH} {height}" role="img" fill="#09162c">'
    )
    title = "<title>What five models write, and how far each is above the floor</title>"
    page = f'<rect x="1" y="1" width="{WIDTH - 2}" height="{height - 2}" rx="10" fill="#f8f8f9"'

    # The rows, one under the other.
    parts = []
    y = MARGIN
    for row in drawn:
        parts += draw(row, y, longest)
        y += height_of(row)
    return "\n".join([head, title, f'{page} stroke="#d1d2d4"/>', *parts, "</svg>"]) + "\n"


def main() -> int:
    """Read the flags of this script, and do what they say."""
    as_written = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=as_written)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if it is stale")
    check = parser.parse_args().check

    # Compare the picture with the one that exists.
    new = svg()
    if check:
        if not PICTURE.exists() or PICTURE.read_text("utf-8") != new:
            print(f"{PICTURE.name} is out of date; python tools/five_models.py")
            return 1
        return 0

    PICTURE.write_text(new, "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
