"""Write nbs/images/roadmap-NN.svg: the row of all stages with stage NN lit; `--check` says whether they are up to date.

Every word stands on a filled box, so the picture reads on a light and on a dark page.
"""

import argparse
import sys
from pathlib import Path

IMAGES = Path(__file__).resolve().parent.parent / "nbs" / "images"

# One line per group of stages: the group's name, then its notebooks. A new notebook is added here.
GROUPS = [
    ("0 start", ["01 tokenizer", "09 basics"]),
    ("1 the model", ["10 rope", "11 attention", "13 feedforward", "14 moe", "15 model", "17 lora"]),
    ("2 generation", ["20 kv_cache", "21 generate"]),
    ("3 data", ["30 corpus", "31 data"]),
    ("4 pretraining", ["43 pretrain", "44 evaluate"]),
    ("5 tuning", ["51 sft", "52 dpo", "55 talk"]),
    (
        "6 use, study",
        ["60 hub", "61 recipes", "62 experiments", "63 commands", "64 cli", "70 proofs"],
    ),
]
STAGES = [stage for _, stages in GROUPS for stage in stages]

BOX, GAP, LEFT = 54, 4, 4  # width of a box, space between two, left margin
WIDTH, HEIGHT = 2 * LEFT + len(STAGES) * (BOX + GAP) - GAP, 70
DONE, HERE, AHEAD = (
    ("#3d6f8e", "#ffffff"),
    ("#c2410c", "#ffffff"),
    ("#e4e8ec", "#37424d"),
)  # (box, text)
GROUP = ("#55606b", "#ffffff")


def rect(x: float, y: float, width: float, height: float, fill: str) -> str:
    return f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="4" fill="{fill}"/>'


def text(x: float, y: float, words: str, fill: str, size: float, bold: bool = False) -> str:
    weight = ' font-weight="bold"' if bold else ""
    return f'<text x="{x:g}" y="{y:g}" fill="{fill}" font-size="{size:g}"{weight}>{words}</text>'


def draw_stages(here: int) -> list[str]:
    """One box per stage: passed, lit (a little taller) or still ahead."""
    parts = []
    for i, stage in enumerate(STAGES):
        number, name = stage.split()
        fill, ink = HERE if i == here else DONE if i < here else AHEAD
        x, middle, grow = (
            LEFT + i * (BOX + GAP),
            LEFT + i * (BOX + GAP) + BOX / 2,
            3 if i == here else 0,
        )
        parts.append(rect(x, 5 - grow, BOX, 41 + 2 * grow, fill))
        parts.append(text(middle, 22, number, ink, 12, bold=True))
        parts.append(text(middle, 37, name, ink, 9 if len(name) < 10 else 8))
    return parts


def draw_groups() -> list[str]:
    """A labelled bar under the boxes of each group."""
    parts, i = [], 0
    for label, stages in GROUPS:
        x, width = LEFT + i * (BOX + GAP), len(stages) * (BOX + GAP) - GAP
        parts += [rect(x, 53, width, 14, GROUP[0]), text(x + width / 2, 63.5, label, GROUP[1], 10)]
        i += len(stages)
    return parts


def svg(here: int) -> str:
    """The picture with stage number `here` (its place in STAGES) lit."""
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}" viewBox="0 0 {WIDTH} {HEIGHT}" '
        'role="img" font-family="system-ui, Segoe UI, Helvetica, Arial, sans-serif" text-anchor="middle">'
    )
    title = f"<title>You are here: {STAGES[here]}</title>"
    return "\n".join([head, title, *draw_groups(), *draw_stages(here), "</svg>"]) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--check", action="store_true", help="write nothing; exit 1 if a picture would change"
    )
    check = parser.parse_args().check
    files = {IMAGES / f"roadmap-{stage.split()[0]}.svg": svg(i) for i, stage in enumerate(STAGES)}
    changed = [
        path
        for path, content in files.items()
        if not path.exists() or path.read_text("utf-8") != content
    ]
    stale = sorted(set(IMAGES.glob("roadmap-*.svg")) - files.keys())
    if check:
        for path in changed + stale:
            print(f"{path.name} is out of date; python tools/roadmap.py")
        return 1 if changed or stale else 0
    for path in stale:
        path.unlink()
    IMAGES.mkdir(parents=True, exist_ok=True)
    for path in changed:
        path.write_text(files[path], "utf-8")
    print(f"{len(changed)} of {len(files)} pictures written")
    return 0


if __name__ == "__main__":
    sys.exit(main())
