"""Diagrams of part 0: next-token prediction, the whole model, byte pair encoding."""

from .canvas import BLUE, MARGIN, QUIET, RED, Drawing, diagram


@diagram(
    "next-token",
    560,
    "A language model predicts the next token",
    "The tokens Mia was in the go into a model. The model gives each token of the vocabulary a "
    "probability: ten places have about 10 percent each, all other tokens almost 0. The story "
    "goes on with garden, so the loss is minus the logarithm of 0.10, which is 2.30 nats.",
)
def draw_next_token(d: Drawing) -> None:
    """Draw text, model, probabilities and the loss of the true token."""
    # The text so far, and what is asked for.
    d.text(MARGIN, 74, "the text so far: tokens and their ids", 15, QUIET, "start")
    words = ["␣Mia\n394", "␣was\n266", "␣in\n268", "␣the\n263", "?"]
    d.row(MARGIN, 84, words, 100, 50, ["soft"] * 4 + ["gold"], 5, 17)
    d.arrow((228, 134), (228, 146))
    d.box(100, 148, 256, 46, "model", "main", 19, bold=True)
    d.arrow((228, 194), (228, 222))
    d.text(MARGIN, 244, "a probability for every token of the vocabulary", 15, QUIET, "start")

    # Bars, one for a token.
    places = ["␣garden", "␣kitchen", "␣attic", "␣barn"]
    for i, word in enumerate(places):
        y = 258 + i * 34
        d.text(126, y + 20, word, 16, anchor="end", mono=True, bold=i == 0)
        d.box(138, y, 150, 28, "", "main" if i == 0 else "soft")
        d.text(298, y + 20, "0.10", 16, anchor="start", mono=True)
    d.text(138, 412, "6 more places, 0.10 each", 15, QUIET, "start")
    d.text(126, 442, "␣was", 16, anchor="end", mono=True)
    d.box(138, 424, 3, 24, "", "soft")
    d.text(150, 442, "0.00  and all other tokens", 16, anchor="start")

    # The loss.
    d.arrow((540, 102), (548, 102), (548, 272), (352, 272), color=RED)
    d.text(540, 262, "the text goes on: ␣garden", 15, RED, "end")
    d.box(MARGIN, 472, 520, 66, "", "warm")
    d.text(280, 499, "loss = −ln(probability of the true token)", 17)
    d.text(280, 525, "−ln 0.10 = 2.30 nats", 17, mono=True, color=BLUE, bold=True)


def _chip(
    d: Drawing,  # the canvas
    x: float,  # left edge
    y: float,  # upper edge
    label: str,  # number of the notebook, then the name
    kind: str,  # a name in `PAINTS`
    width: float = 250,  # of the box
) -> None:
    """Draw a part of the model with the number of its notebook in front."""
    number, _, name = label.partition(" ")
    d.box(x, y, width, 38, "", kind)
    d.box(x, y, 40, 38, number, "main", 16, bold=True)
    d.text(x + 20 + width / 2, y + 25, name, 16)


def _draw_model_output(d: Drawing) -> None:
    """Draw what follows the blocks, and the loop of generation."""
    # From vectors to a token.
    d.arrow((195, 569), (195, 636))
    _chip(d, 70, 638, "13 norm", "grey")
    d.arrow((195, 676), (195, 700))
    _chip(d, 70, 702, "15 output layer", "soft")
    d.arrow((195, 740), (195, 776))
    d.text(90, 770, "(B, T, V)", 15, QUIET, "start", mono=True)
    d.text(206, 770, "logits", 15, QUIET, "start")
    _chip(d, 70, 778, "21 sampling", "soft")
    d.arrow((195, 816), (195, 846))
    d.text(195, 868, '" garden"', 17, mono=True)

    # The token becomes part of the text.
    d.arrow((262, 862), (546, 862), (546, 69), (290, 69), dashed=True)
    d.text(536, 884, "generate: append the token, run again", 15, QUIET, "end")


def _draw_model_training(d: Drawing) -> None:
    """Draw what training adds: data, loss, and a step that changes all weights."""
    d.text(440, 598, "training", 16, RED, bold=True)
    for y, label in ((606, "30 corpus"), (654, "31 data"), (702, "15 loss"), (764, "43 step")):
        _chip(d, 352, y, label, "warm", 176)
    for begin, end in (
        ((440, 644), (440, 653)),
        ((440, 692), (440, 701)),
        ((440, 740), (440, 763)),
    ):
        d.arrow(begin, end, color=RED)
    d.arrow((195, 750), (342, 750), (342, 721), (350, 721), color=RED)
    d.arrow((352, 783), (330, 783), (330, 578), color=RED)
    d.text(440, 824, "changes all weights", 15, RED)


@diagram(
    "model",
    904,
    "The whole model, and the notebook of each part",
    "From top to bottom is the way from text to the next token. 01 tokenizer turns text into "
    "ids, 15 model "
    "looks up a vector for each id. A block is repeated L times: norm (13), attention (11) with "
    "positions from rope (10) and a cache (20), an addition, norm, feed-forward (13) or experts "
    "(14), an addition. Then a norm, the output layer with logits (15), and sampling (21). "
    "Training "
    "beside it: corpus (30), data (31), loss (15), and a step (43) that changes all weights.",
)
def draw_model(d: Drawing) -> None:
    """Draw all parts from the text down to the next token."""
    # From text to vectors.
    d.text(195, 74, '"Mia was in the"', 17, mono=True)
    d.arrow((195, 82), (195, 102))
    _chip(d, 70, 104, "01 tokenizer", "soft")
    d.arrow((195, 142), (195, 172))
    d.text(210, 163, "ids (B, T)", 15, QUIET, "start", mono=True)
    _chip(d, 70, 174, "15 embedding", "soft")

    # The block.
    d.box(30, 246, 510, 330, "", "white", dashed=True)
    d.arrow((195, 212), (195, 268))
    d.text(210, 233, "x (B, T, D)", 15, QUIET, "start", mono=True)
    d.text(528, 568, "15 block, L times", 16, anchor="end", bold=True)
    _chip(d, 70, 270, "13 norm", "grey")
    d.arrow((195, 308), (195, 326))
    _chip(d, 70, 328, "11 attention", "sky")
    d.arrow((195, 366), (195, 384))
    d.circle(195, 398, 13, "+")
    d.line((195, 256), (48, 256), (48, 398), color=BLUE, thick=3)
    d.arrow((48, 398), (182, 398), color=BLUE, thick=3)
    d.arrow((195, 411), (195, 436))
    _chip(d, 70, 438, "13 norm", "grey")
    d.arrow((195, 476), (195, 492))
    _chip(d, 70, 494, "13 feed-forward", "gold")
    d.line((195, 423), (48, 423), (48, 556), color=BLUE, thick=3)
    d.arrow((48, 556), (182, 556), color=BLUE, thick=3)
    d.arrow((195, 532), (195, 543))
    d.circle(195, 556, 13, "+")

    # What belongs to parts of the block.
    _chip(d, 352, 300, "10 rope", "sky", 176)
    d.arrow((352, 319), (336, 319), (336, 340), (322, 340))
    _chip(d, 352, 356, "20 KV cache", "sky", 176)
    d.arrow((352, 375), (336, 375), (336, 354), (322, 354), dashed=True)
    _chip(d, 352, 494, "14 experts", "gold", 176)
    d.text(336, 518, "or", 15, QUIET)
    d.text(60, 600, "x (B, T, D)", 15, QUIET, "start", mono=True)
    _draw_model_output(d)
    _draw_model_training(d)


@diagram(
    "bpe",
    520,
    "Byte pair encoding: merge frequent pairs",
    "The text space w a s begins as four bytes. Merge 5 joins space and w, merge 6 joins space-w "
    "and a, merge 7 joins space-wa and s. The result is one token with the id 266. Further merges "
    "of the same tokenizer are h e, space t, i n, space-t he.",
)
def draw_bpe(d: Drawing) -> None:
    """Draw the merges of one word beside the list of merges."""
    # The list that training made.
    d.text(MARGIN, 72, "learned from the stories,", 15, QUIET, "start")
    d.text(MARGIN, 91, "in this order", 15, QUIET, "start")
    merges = ["h + e", "␣ + t", "i + n", "␣t + he", "␣ + w", "␣w + a", "␣wa + s"]
    for i, pair in enumerate(merges):
        kind = "sky" if i > 3 else "white"
        d.box(MARGIN, 104 + i * 42, 34, 36, str(i + 1), kind, 16, bold=True)
        d.box(MARGIN + 38, 104 + i * 42, 120, 36, pair, kind, 17, mono=True)
    d.text(MARGIN, 416, "... 543 merges in all", 15, QUIET, "start")

    # What they do to a word.
    d.text(246, 72, 'encode " was": apply them in order', 15, QUIET, "start")
    steps = [["␣", "w", "a", "s"], ["␣w", "a", "s"], ["␣wa", "s"], ["␣was"]]
    notes = ["4 bytes", "merge 5", "merge 6", "merge 7"]
    for i, tokens in enumerate(steps):
        x = 246.0
        y = 104 + i * 76
        for token in tokens:
            width = 44 * len(token) + 4 * (len(token) - 1)
            kind = "main" if len(token) > 1 else "soft"
            d.box(x, y, width, 40, token, kind, 19, mono=True)
            x += width + 4
        d.text(464, y + 26, notes[i], 16, QUIET, "start")
        if i < 3:
            d.arrow((340, y + 42), (340, y + 74))
    d.arrow((340, 374), (340, 404))
    d.box(246, 406, 188, 44, "id 266", "gold", 19, bold=True)
    d.note(
        MARGIN, 480, "A word that training never met stays in smaller pieces,\nat worst in bytes."
    )
