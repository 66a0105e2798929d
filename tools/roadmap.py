"""Write nbs/images/roadmap-NN.svg: all stages in a few rows, with stage NN lit.

`--check` says whether the pictures are up to date. Every word stands on a filled box, so that
the picture can be read on a light and on a dark page.
"""

import argparse
import sys
from pathlib import Path
from typing import NamedTuple

IMAGES = Path(__file__).resolve().parent.parent / "nbs" / "images"

# One line per group of stages: the group's name, then its notebooks. A new notebook is added here.
GROUPS = [
    ("0 start", ["01 tokenizer", "02 chat_template", "09 basics"]),
    (
        "1 the model",
        [
            "10 rope",
            "11 attention",
            "12 mla",
            "13 feedforward",
            "14 moe",
            "15 model",
            "16 cost",
            "18 checkpoints",
            "19 lora",
        ],
    ),
    ("2 generation", ["20 kv_cache", "21 generate", "22 decoding"]),
    ("3 data", ["30 corpus", "31 data", "32 files", "33 token_cache"]),
    (
        "4 pretraining",
        ["40 optim", "41 engine", "42 runs", "43 pretrain", "44 evaluate", "45 report"],
    ),
    ("5 tuning", ["50 chat", "51 sft", "52 dpo", "55 talk"]),
    (
        "6 use, study",
        ["60 hub", "61 recipes", "62 experiments", "63 commands", "64 cli", "70 proofs"],
    ),
]
STAGES = [stage for _, stages in GROUPS for stage in stages]

BOX = 66  # width of a box
GAP = 4  # space between two boxes
LEFT = 4  # margin
ROW = 72  # height of a row: boxes, and the bars of their groups below
MOST_BOXES = 13  # in a row, so that the words can be read at the width of a page
WIDTH = 2 * LEFT + MOST_BOXES * (BOX + GAP) - GAP


class Colors(NamedTuple):
    """How a box is painted."""

    fill: str
    ink: str  # of the words in it


DONE = Colors("#3d6f8e", "#ffffff")
HERE = Colors("#c2410c", "#ffffff")
AHEAD = Colors("#e4e8ec", "#37424d")
GROUP = Colors("#55606b", "#ffffff")


def rect(
    x: float,  # left edge
    y: float,  # upper edge
    width: float,  # in pixels, as all lengths here
    height: float,  # downward
    fill: str,  # color
) -> str:
    """Draw a filled box."""
    return f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="4" fill="{fill}"/>'


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


def colors_of(stage: int, here: int) -> Colors:
    """Choose the colors of a stage: passed, lit, or still ahead."""
    if stage == here:
        return HERE
    return DONE if stage < here else AHEAD


class Place(NamedTuple):
    """Where a group begins."""

    row: int  # counted from the top
    column: int  # boxes to the left of it


def place_groups() -> list[Place]:
    """Put the groups into rows, each whole."""
    places = []
    row = 0
    column = 0
    for _, stages in GROUPS:
        if column + len(stages) > MOST_BOXES:
            row += 1
            column = 0
        places.append(Place(row, column))
        column += len(stages)
    return places


def draw_stage(
    stage: str,  # number and name
    place: Place,  # of its box
    colors: Colors,  # of its box
    extra: int,  # pixels by which it is taller, above and below
) -> list[str]:
    """Draw the box of a stage, with its number and its name."""
    number, name = stage.split()
    x = LEFT + place.column * (BOX + GAP)
    y = place.row * ROW
    middle = x + BOX / 2
    size = 10 if len(name) < 11 else 8.5  # a long name needs smaller letters
    return [
        rect(x, y + 5 - extra, BOX, 41 + 2 * extra, colors.fill),
        text(middle, y + 22, number, colors.ink, 12, bold=True),
        text(middle, y + 37, name, colors.ink, size),
    ]


def draw_group(
    number: int,  # of the group
    place: Place,  # of its first box
    here: int,  # number of the stage that is lit
) -> list[str]:
    """Draw the boxes of a group, and a labeled bar under them."""
    label, stages = GROUPS[number]
    x = LEFT + place.column * (BOX + GAP)
    y = place.row * ROW
    width = len(stages) * (BOX + GAP) - GAP
    parts = [
        rect(x, y + 53, width, 14, GROUP.fill),
        text(x + width / 2, y + 63.5, label, GROUP.ink, 10),
    ]

    # The stage that is lit is a little taller.
    first = sum(len(others) for _, others in GROUPS[:number])
    for i, stage in enumerate(stages):
        box = Place(place.row, place.column + i)
        extra = 3 if first + i == here else 0
        parts += draw_stage(stage, box, colors_of(first + i, here), extra)
    return parts


def svg(here: int) -> str:
    """Draw the picture with stage number `here` (its place in STAGES) lit."""
    places = place_groups()
    height = (places[-1].row + 1) * ROW
    attributes = (
        'xmlns="http://www.w3.org/2000/svg"',
        f'width="{WIDTH}" height="{height}" viewBox="0 0 {WIDTH} {height}" role="img"',
        'font-family="system-ui, Segoe UI, Helvetica, Arial, sans-serif" text-anchor="middle"',
    )
    head = f"<svg {' '.join(attributes)}>"
    title = f"<title>You are here: {STAGES[here]}</title>"
    groups = [draw_group(number, place, here) for number, place in enumerate(places)]
    parts = [part for group in groups for part in group]
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
    numbers = [stage.split()[0] for stage in STAGES]
    files = {IMAGES / f"roadmap-{number}.svg": svg(i) for i, number in enumerate(numbers)}
    changed = [path for path in files if not is_up_to_date(path, files[path])]
    stale = sorted(set(IMAGES.glob("roadmap-*.svg")) - files.keys())
    if check:
        for path in changed + stale:
            print(f"{path.name} is out of date; python tools/roadmap.py")
        return 1 if changed or stale else 0

    # Write what changed, and delete pictures of stages that are gone.
    for path in stale:
        path.unlink()
    IMAGES.mkdir(parents=True, exist_ok=True)
    for path in changed:
        path.write_text(files[path], "utf-8")
    print(f"{len(changed)} of {len(files)} pictures written")
    return 0


if __name__ == "__main__":
    sys.exit(main())
