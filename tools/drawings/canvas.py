"""A canvas for diagrams: boxes, arrows, grids and braces in one visual language, as SVG.

The colors are those of the plots (tinylm/figures.mplstyle) and their tints. Everything stands on
a light card, so that a diagram can be read on a light and on a dark page.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple
from xml.sax.saxutils import escape

WIDTH = 560  # of every diagram; on a phone it is shrunk to about 360 pixels
MARGIN = 20  # between the card's edge and what is drawn
LETTER = 0.55  # estimated width of a letter, as a share of the font size
CODE_LETTER = 0.61  # the same for code

BLUE = "#17386f"  # what the page is about
RED = "#d2491f"  # what it is compared with, or what is broken
SKY = "#4aa3c7"
GOLD = "#e2b23a"
PURPLE = "#6b2d87"
GREY = "#8b8f94"
WHITE = "#ffffff"
BLACK = "#000000"  # the floor, as in the plots
PALETTE = (BLUE, RED, SKY, GOLD, PURPLE, GREY, WHITE, BLACK)

SANS = "system-ui, 'Segoe UI', Helvetica, Arial, sans-serif"
MONO = "ui-monospace, 'SF Mono', Menlo, Consolas, 'DejaVu Sans Mono', monospace"


def mix(
    color: str,  # as #rrggbb
    other: str,  # the color it is mixed with
    share: float,  # of the first color
) -> str:
    """Mix two colors."""
    pairs = [(int(color[i : i + 2], 16), int(other[i : i + 2], 16)) for i in (1, 3, 5)]
    return "#" + "".join(f"{round(share * a + (1 - share) * b):02x}" for a, b in pairs)


def tint(color: str, share: float = 0.18) -> str:
    """Mix a color with white."""
    return mix(color, WHITE, share)


def shade(color: str, share: float = 0.5) -> str:
    """Mix a color with black."""
    return mix(color, BLACK, share)


INK = shade(BLUE, 0.4)  # of words and arrows
QUIET = shade(GREY, 0.65)  # of words that explain
CARD = tint(GREY, 0.06)


class Paint(NamedTuple):
    """How a box is painted."""

    fill: str
    stroke: str
    ink: str  # of the words in it


PAINTS = {
    "main": Paint(BLUE, BLUE, WHITE),
    "soft": Paint(tint(BLUE, 0.13), BLUE, INK),
    "hot": Paint(RED, RED, WHITE),
    "warm": Paint(tint(RED), RED, INK),
    "sky": Paint(tint(SKY, 0.25), SKY, INK),
    "gold": Paint(tint(GOLD, 0.28), GOLD, INK),
    "purple": Paint(tint(PURPLE), PURPLE, INK),
    "grey": Paint(tint(GREY, 0.2), GREY, INK),
    "white": Paint(WHITE, GREY, INK),
    "empty": Paint(WHITE, tint(GREY, 0.5), QUIET),
}
ALLOWED_COLORS = {CARD, INK, QUIET, tint(GREY, 0.4)}
ALLOWED_COLORS |= {color for paint in PAINTS.values() for color in paint} | set(PALETTE)

Point = tuple[float, float]


def text_width(
    words: str,  # one line
    size: float,  # of the font
    mono: bool = False,  # code
    bold: bool = False,  # in bold type
) -> float:
    """Estimate how wide a line of text is."""
    letter = LETTER * 1.07 if bold else LETTER
    return len(words) * size * (CODE_LETTER if mono else letter)


class Drawing:
    """One diagram: things are drawn on it from back to front."""

    def __init__(
        self,
        title: str,  # stands at the top, and is read aloud
        description: str,  # what the picture shows, in words, for those who cannot see it
        height: float,  # of the card
    ):
        self.title = title
        self.description = description
        self.height = height
        self.parts: list[str] = []
        self.text(MARGIN, 36, title, size=19, bold=True, anchor="start")

    def text(
        self,
        x: float,  # where it is anchored
        y: float,  # the line that the letters stand on
        words: str,  # one line
        size: float = 16,  # of the font
        color: str = INK,  # of the letters
        anchor: str = "middle",  # middle, start or end
        bold: bool = False,  # in bold type
        mono: bool = False,  # code and shapes
    ) -> None:
        """Write one line."""
        if not words:
            return

        # A word that leaves the card is a mistake of the drawing.
        width = text_width(words, size, mono, bold)
        left = x - {"start": 0, "middle": width / 2, "end": width}[anchor]
        if left < 0 or left + width > WIDTH or not 0 < y < self.height:
            raise ValueError(f"{self.title}: {words!r} leaves the card: {left:.0f} + {width:.0f}")
        attributes = f'x="{x:g}" y="{y:g}" font-size="{size:g}" fill="{color}"'
        if anchor != "middle":
            attributes += f' text-anchor="{anchor}"'
        if bold:
            attributes += ' font-weight="bold"'
        if mono:
            attributes += f' font-family="{MONO}"'
        self.parts.append(f'<text {attributes} xml:space="preserve">{escape(words)}</text>')

    def note(
        self,
        x: float,  # left edge
        y: float,  # line of the first words
        words: str,  # lines, divided by newlines
        size: float = 15,  # of the font
        color: str = QUIET,  # of the letters
        anchor: str = "start",  # start, middle or end
    ) -> None:
        """Write lines that explain."""
        for i, line in enumerate(words.split("\n")):
            self.text(x, y + i * size * 1.3, line, size, color, anchor)

    def box(
        self,
        x: float,  # left edge
        y: float,  # upper edge
        width: float,  # in pixels
        height: float,  # downward
        label: str = "",  # lines in its middle
        kind: str = "soft",  # a name in `PAINTS`
        size: float = 16,  # of the font
        bold: bool = False,  # the first line in bold type
        mono: bool = False,  # code and shapes
        dashed: bool = False,  # a dashed outline: not there, or optional
    ) -> None:
        """Draw a box with a label in its middle."""
        paint = PAINTS[kind]
        attributes = f'x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="5"'
        attributes += f' fill="{paint.fill}" stroke="{paint.stroke}" stroke-width="1.5"'
        if dashed:
            attributes += ' stroke-dasharray="5 4"'
        self.parts.append(f"<rect {attributes}/>")

        # The lines stand around the middle.
        lines = label.split("\n") if label else []
        step = size * 1.25
        first = y + height / 2 - (len(lines) - 1) * step / 2 + size * 0.35
        for i, line in enumerate(lines):
            if text_width(line, size, mono) > width + 2:
                raise ValueError(f"{self.title}: {line!r} is wider than its box of {width}")
            place = (x + width / 2, first + i * step)
            self.text(*place, line, size, paint.ink, bold=bold and i == 0, mono=mono)

    def row(
        self,
        x: float,  # left edge of the first box
        y: float,  # upper edge
        labels: Sequence[str],  # one for each box
        width: float,  # of a box
        height: float = 32,  # of a box
        kind: str | Sequence[str] = "soft",  # of all boxes, or of each
        gap: float = 4,  # between two boxes
        size: float = 15,  # of the font
        mono: bool = True,  # tokens and numbers
    ) -> list[float]:  # the middle of each box
        """Draw boxes side by side, such as tokens."""
        kinds = [kind] * len(labels) if isinstance(kind, str) else kind
        middles = []
        for i, label in enumerate(labels):
            left = x + i * (width + gap)
            self.box(left, y, width, height, label, kinds[i], size, mono=mono)
            middles.append(left + width / 2)
        return middles

    def grid(
        self,
        x: float,  # left edge
        y: float,  # upper edge
        cells: Sequence[str],  # a word of letters for each row; a letter is a key of `kinds`
        size: float,  # of a cell
        kinds: dict[str, str],  # what a letter stands for: a name in `PAINTS`
    ) -> None:
        """Draw a matrix of colored cells."""
        for i, word in enumerate(cells):
            for j, letter in enumerate(word):
                paint = PAINTS[kinds[letter]]
                place = f'x="{x + j * size:g}" y="{y + i * size:g}"'
                extent = f'width="{size:g}" height="{size:g}"'
                colors = f'fill="{paint.fill}" stroke="{WHITE}"'
                self.parts.append(f"<rect {place} {extent} {colors}/>")
        height = len(cells) * size
        width = len(cells[0]) * size
        extent = f'x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}"'
        self.parts.append(f'<rect {extent} fill="none" stroke="{GREY}"/>')

    def line(
        self,
        *points: Point,  # from the first to the last
        color: str = INK,  # of the line
        thick: float = 1.8,  # its width
        dashed: bool = False,  # optional, or sometimes
    ) -> None:
        """Draw a line through points."""
        places = " ".join(f"{x:g},{y:g}" for x, y in points)
        dash = ' stroke-dasharray="6 4"' if dashed else ""
        stroke = f'fill="none" stroke="{color}" stroke-width="{thick:g}"{dash}'
        self.parts.append(f'<polyline points="{places}" {stroke}/>')

    def arrow(
        self,
        *points: Point,  # from the first to the last
        color: str = INK,  # of line and head
        thick: float = 1.8,  # width of the line
        dashed: bool = False,  # optional, or sometimes
    ) -> None:
        """Draw a line through points, with a head at the last one."""
        # The head points along the last piece.
        (x0, y0), (x1, y1) = points[-2:]
        length = ((x1 - x0) ** 2 + (y1 - y0) ** 2) ** 0.5
        dx = (x1 - x0) / length
        dy = (y1 - y0) / length
        back = (x1 - 9 * dx, y1 - 9 * dy)
        left = (back[0] - 5 * dy, back[1] + 5 * dx)
        right = (back[0] + 5 * dy, back[1] - 5 * dx)

        # The line ends where the head begins.
        self.line(*points[:-1], back, color=color, thick=thick, dashed=dashed)
        places = " ".join(f"{x:.1f},{y:.1f}" for x, y in ((x1, y1), left, right))
        self.parts.append(f'<polygon points="{places}" fill="{color}"/>')

    def circle(
        self,
        x: float,  # middle
        y: float,  # middle
        radius: float,  # in pixels
        label: str = "",  # in its middle
        kind: str = "white",  # a name in `PAINTS`
        size: float = 18,  # of the font
    ) -> None:
        """Draw a circle, such as the sign of a sum."""
        paint = PAINTS[kind]
        place = f'cx="{x:g}" cy="{y:g}" r="{radius:g}"'
        colors = f'fill="{paint.fill}" stroke="{paint.stroke}" stroke-width="1.5"'
        self.parts.append(f"<circle {place} {colors}/>")
        if label:
            self.text(x, y + size * 0.35, label, size, paint.ink, bold=True)

    def brace(
        self,
        left: float,  # where it begins
        right: float,  # where it ends
        y: float,  # of its line
        label: str = "",  # behind it
        up: bool = False,  # it opens downward, with the label above
    ) -> None:
        """Draw a bracket below something, or above it, with a label."""
        tip = 6 if up else -6
        self.line((left, y + tip), (left, y), (right, y), (right, y + tip), color=QUIET, thick=1.5)
        if label:
            self.text((left + right) / 2, y - 7 if up else y + 18, label, 15, QUIET)

    def svg(self) -> str:
        """Return the whole picture."""
        attributes = (
            'xmlns="http://www.w3.org/2000/svg"',
            f'width="{WIDTH}" height="{self.height:g}" viewBox="0 0 {WIDTH} {self.height:g}"',
            'role="img" aria-labelledby="title description"',
            f'font-family="{SANS}" text-anchor="middle"',
        )

        # The card comes first, so that everything stands on it.
        card = f'<rect x="1" y="1" width="{WIDTH - 2}" height="{self.height - 2:g}" rx="10"'
        lines = [
            f"<svg {' '.join(attributes)}>",
            f'<title id="title">{escape(self.title)}</title>',
            f'<desc id="description">{escape(self.description)}</desc>',
            f'{card} fill="{CARD}" stroke="{tint(GREY, 0.4)}"/>',
            *self.parts,
            "</svg>",
        ]
        return "\n".join(lines) + "\n"


class Diagram(NamedTuple):
    """A picture that can be drawn."""

    title: str
    description: str
    height: float
    draw: Callable[[Drawing], None]


DIAGRAMS: dict[str, Diagram] = {}


def diagram(
    name: str,  # the file is diagram-NAME.svg
    height: float,  # of the card
    title: str,  # stands at the top
    description: str,  # what the picture shows, in words
) -> Callable[[Callable[[Drawing], None]], Callable[[Drawing], None]]:
    """Register the decorated function, which draws on the canvas that it is given."""

    def register(draw: Callable[[Drawing], None]) -> Callable[[Drawing], None]:
        DIAGRAMS[name] = Diagram(title, description, height, draw)
        return draw

    return register


def render(name: str) -> str:
    """Draw the diagram of a name."""
    entry = DIAGRAMS[name]
    drawing = Drawing(entry.title, entry.description, entry.height)
    entry.draw(drawing)
    return drawing.svg()
