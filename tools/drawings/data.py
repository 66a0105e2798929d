"""Diagrams of part 3: the corpus, questions, labels, packed rows, token files, leaks."""

from .canvas import BLUE, GREY, MARGIN, QUIET, RED, Drawing, diagram


@diagram(
    "corpus",
    650,
    "The corpus is a program that draws words",
    "A story is written by a program with a state: who is where, who holds what, who has how many. "
    "For the sentence Mia was in the garden it draws a person, 1 of 16, and a place, 1 of 10, "
    "which costs 2.77 and 2.30 nats. The sentence changes the state. The answer to a question "
    "follows from the state and costs 0 nats. The sum of all nats is the floor of the loss.",
)
def draw_corpus(d: Drawing) -> None:
    """Draw the state, a sentence with its choices, and an answer."""
    # State and grammar.
    d.box(
        MARGIN,
        62,
        250,
        88,
        "state of the world\nwho is where, who holds\nwhat, how many coins",
        "gold",
        16,
        bold=True,
    )
    d.box(
        290,
        62,
        250,
        88,
        "grammar\nsentences with slots,\nand how likely each is",
        "sky",
        16,
        bold=True,
    )
    d.arrow((145, 150), (145, 176))
    d.arrow((415, 150), (415, 176))

    # A sentence.
    d.box(MARGIN, 178, 520, 38, "… {new} was in the {start}.", "white", 17, mono=True)
    d.arrow((96, 216), (96, 262))
    d.arrow((412, 216), (412, 262))
    d.text(108, 246, "1 of 16 people", 15, QUIET, "start")
    d.text(400, 246, "1 of 10 places", 15, QUIET, "end")
    words = [("␣Mia", 100, "main"), ("␣was ␣in ␣the", 208, "empty"), ("␣garden", 128, "main")]
    words += [(".", 60, "empty")]
    nats = ["ln 16 = 2.77", "0", "ln 10 = 2.30", "0"]
    x = 20.0
    for (word, width, kind), cost in zip(words, nats, strict=True):
        d.box(x, 264, width, 40, word, kind, 17, mono=True)
        d.text(x + width / 2, 326, cost, 15, mono=True)
        x += width + 6
    d.text(MARGIN, 350, "nats of each choice, −ln(probability)", 15, QUIET, "start")

    d.text(MARGIN, 384, "The state now says: Mia is in the garden.", 16, anchor="start")

    # A question.
    d.text(MARGIN, 424, "A later question has one right answer:", 16, anchor="start", bold=True)
    d.row(MARGIN, 438, ["Where was Mia?", "Mia was in the"], 176, 38, "soft", 6, 16)
    d.box(384, 438, 108, 38, "␣garden", "purple", 16, mono=True)
    d.text(438, 498, "0 nats: it follows", 15, QUIET)

    # The floor.
    d.box(
        MARGIN,
        524,
        520,
        62,
        "floor = all nats of the stories / all tokens\nno model can have a lower expected loss",
        "main",
        17,
    )
    d.text(
        MARGIN,
        622,
        "So we know how far a model is from the best possible loss.",
        15,
        QUIET,
        "start",
    )


@diagram(
    "questions",
    560,
    "Three kinds of questions about a story",
    "A story says that Mia was in the garden, that Mia had a red ball, that Tom had three coins, "
    "and that Mia gave the ball to Tom. Where was Mia: garden. Who had the ball: Tom. How many "
    "coins did Tom have: three. Each answer is stored with a wrong one.",
)
def draw_questions(d: Drawing) -> None:
    """Draw a story, and questions that point to its sentences."""
    story = [
        "Mia was in the garden.",
        "Mia had a red ball.",
        "Tom had three coins.",
        "Mia gave the ball to Tom.",
    ]
    for i, sentence in enumerate(story):
        d.box(MARGIN, 62 + i * 40, 34, 34, str(i + 1), "main", 16, bold=True)
        d.box(58, 62 + i * 40, 260, 34, sentence, "soft", 16)

    # A question names the sentences that its answer follows from.
    questions = [
        ("where", "Where was Mia?", "1", "garden", "hall"),
        ("who has", "Who had the ball?", "2, 4", "Tom", "Mia"),
        ("how many", "How many coins did Tom have?", "3", "three", "two"),
    ]
    for x, word in ((65, "kind"), (222, "question"), (368, "from"), (434, "right"), (505, "wrong")):
        d.text(x, 256, word, 15, QUIET)
    for i, (kind, question, source, right, wrong) in enumerate(questions):
        y = 268 + i * 54
        d.box(MARGIN, y, 82, 42, kind, "grey", 15)
        d.box(106, y, 234, 42, question, "white", 14)
        d.box(344, y, 50, 42, source, "main", 15)
        d.box(398, y, 72, 42, right, "sky", 16)
        d.box(474, y, 66, 42, wrong, "warm", 16)
    d.text(MARGIN, 462, "Two ways to score a model", 17, anchor="start", bold=True)
    d.note(
        MARGIN,
        488,
        "exact match: the model writes, and begins with the right answer\n"
        "multiple choice: the right answer is more likely than the wrong",
        15,
    )


@diagram(
    "shifted-labels",
    510,
    "Labels are the next tokens: shift by one",
    "The row of input ids begins with the end-of-text token 0, then Mia, was, in, the, garden. The "
    "labels are the same ids with minus 100 in the first place. shift_labels moves them one place "
    "to the left, so that position t is compared with the token at t + 1; the last is minus 100.",
)
def draw_shifted_labels(d: Drawing) -> None:
    """Draw ids, labels and targets as three rows of six places."""
    left = 112.0
    words = ["<|end…", "␣Mia", "␣was", "␣in", "␣the", "␣garden"]
    ids = ["0", "394", "266", "268", "263", "346"]
    d.row(left, 66, words, 68, 30, "empty", 4, 14)
    d.text(100, 87, "token", 16, anchor="end")
    middles = d.row(left, 104, ids, 68, 38, "soft", 4, 17)
    d.text(100, 129, "input_ids", 16, anchor="end", mono=True)
    d.row(left, 162, ["−100", *ids[1:]], 68, 38, ["grey"] + ["gold"] * 5, 4, 17)
    d.text(100, 187, "labels", 16, anchor="end", mono=True)

    # The shift.
    for i in range(5):
        d.arrow((middles[i + 1], 200), (middles[i] + 6, 250), color=RED)
    d.text(MARGIN, 232, "shift_labels", 15, RED, "start", mono=True)
    d.row(left, 252, [*ids[1:], "−100"], 68, 38, ["gold"] * 5 + ["grey"], 4, 17)
    d.text(100, 277, "targets", 16, anchor="end", mono=True)

    # What is compared.
    for x in middles:
        d.line((x, 290), (x, 304), color=GREY)
    d.row(left, 304, ["loss"] * 5 + ["–"], 68, 32, ["main"] * 5 + ["empty"], 4, 15, mono=False)
    for x in middles:
        d.line((x, 336), (x, 352), color=GREY)
    d.row(left, 352, ["z₀", "z₁", "z₂", "z₃", "z₄", "z₅"], 68, 38, "sky", 4, 17)
    d.text(100, 377, "logits", 16, anchor="end", mono=True)
    d.note(
        MARGIN,
        426,
        "The logits at ␣the have seen everything up to ␣the. Their target\n"
        "is ␣garden. −100 means: nothing is predicted here.\n"
        "Without the shift, the model would only copy its input.",
        15,
    )


def _mask(row: str) -> list[str]:
    """Return the causal mask of a packed row, whose letters are documents; "-" is padding."""
    return [
        "".join(row[j] if j <= i and row[i] == row[j] else "." for j in range(len(row)))
        for i in range(len(row))
    ]


@diagram(
    "packing",
    744,
    "Packing: whole documents in rows, kept apart",
    "Five documents of 7, 5, 4, 4 and 3 tokens are packed into two rows of 12. The longest comes "
    "first, and each goes to the fullest row that has room. Row 0 holds A and B, row 1 holds C, D, "
    "E and one place of padding. Positions start again with each document. The mask of row 1 has "
    "one triangle for each document.",
)
def draw_packing(d: Drawing) -> None:
    """Draw documents, packed rows with their tensors, and the mask."""
    kinds = {"A": "main", "B": "sky", "C": "gold", "D": "purple", "E": "warm", "-": "grey"}
    # The documents.
    d.text(MARGIN, 70, "documents, longest first", 15, QUIET, "start")
    for i, (name, length) in enumerate((("A", 7), ("B", 5), ("C", 4), ("D", 4), ("E", 3))):
        x = MARGIN + (0 if i < 2 else 270) * 1.0
        y = 80 + (i if i < 2 else i - 2) * 32
        d.row(x, y, [name] * length, 26, 26, kinds[name], 1, 15)
        d.text(x + 27 * length + 8, y + 19, str(length), 15, QUIET, "start")
    d.arrow((280, 182), (280, 206))
    d.text(292, 200, "to the fullest row with room", 15, QUIET, "start")

    # The rows and their tensors.
    rows = ["AAAAAAABBBBB", "CCCCDDDDEEE-"]
    for i, row in enumerate(rows):
        y = 218 + i * 34
        d.row(140, y, list(row.replace("-", " ")), 32, 28, [kinds[c] for c in row], 1, 15)
        d.text(130, y + 20, f"row {i}", 16, anchor="end")
    positions = ["0", "1", "2", "3", "0", "1", "2", "3", "0", "1", "2", "0"]
    documents = ["0", "0", "0", "0", "1", "1", "1", "1", "2", "2", "2", "−1"]
    labels = ["−", "C", "C", "C", "−", "D", "D", "D", "−", "E", "E", "−"]
    tensors = (("position_ids", positions), ("document_ids", documents), ("labels", labels))
    for i, (name, values) in enumerate(tensors):
        y = 304 + i * 32
        d.row(140, y, values, 32, 27, [kinds[c] for c in rows[1]], 1, 14)
        d.text(132, y + 19, name, 15, anchor="end", mono=True)
    d.text(
        MARGIN,
        416,
        "of row 1; − stands for −100: the first token is not predicted",
        14,
        QUIET,
        "start",
    )

    # The mask.
    d.grid(140, 456, _mask(rows[1]), 20, {**kinds, ".": "empty"})
    d.text(130, 472, "query", 15, QUIET, "end")
    d.text(260, 446, "keys of row 1", 15, QUIET)
    d.note(400, 476, "A token sees\nits own document\nonly, and only\nearlier tokens.", 15)
    d.note(400, 586, "Row 1 is used\nto 11 of 12\nplaces.", 15)
    d.text(MARGIN, 724, "The result is the same as with each document alone.", 15, QUIET, "start")


@diagram(
    "token-file",
    540,
    "A token file: one array, and where to cut",
    "tokens.bin holds the ids of all documents one after the other. offsets.npy holds 0, 5, 8, 12: "
    "where each document begins, and the end. meta.json holds the type of the numbers and the size "
    "of the vocabulary. The folder is named by a hash of all that decides its content, so it is "
    "found again the next time.",
)
def draw_token_file(d: Drawing) -> None:
    """Draw the array with its offsets, and how the folder gets its name."""
    # The array.
    names = "AAAAABBBCCCC"
    kinds = {"A": "main", "B": "sky", "C": "gold"}
    ids = ["0", "394", "266", "17", "0", "0", "300", "0", "0", "389", "275", "0"]
    d.text(MARGIN, 74, "tokens.bin", 16, anchor="start", mono=True, bold=True)
    d.text(540, 74, "uint16, mapped into memory", 15, QUIET, "end")
    d.row(MARGIN, 86, ids, 41, 36, [kinds[c] for c in names], 2, 15)
    bounds = [0, 5, 8, 12]
    for number in bounds:
        d.line((MARGIN - 1 + 43 * number, 124), (MARGIN - 1 + 43 * number, 150), color=BLUE)
    for i, words in enumerate(("document 0", "document 1", "document 2")):
        middle = MARGIN + 43 * (bounds[i] + bounds[i + 1]) / 2
        d.text(middle, 144, words, 15, QUIET)
    d.text(MARGIN, 188, "offsets.npy", 16, anchor="start", mono=True, bold=True)
    d.row(160, 166, ["0", "5", "8", "12"], 60, 34, "soft", 4, 17)
    d.text(MARGIN, 236, "meta.json", 16, anchor="start", mono=True, bold=True)
    d.text(160, 236, '"dtype": "uint16", "vocab_size": 803, …', 15, anchor="start", mono=True)
    d.line((MARGIN, 262), (540, 262), color=GREY)

    # The name of the folder.
    d.text(MARGIN, 294, "What decides the content names the folder", 17, anchor="start", bold=True)
    inputs = ["the data settings", "the tokenizer", "the code that reads"]
    for i, name in enumerate(inputs):
        d.box(MARGIN + 176 * i, 308, 168, 38, name, "grey", 15)
        d.arrow((104 + 176 * i, 346), (280 + 60 * (i - 1), 374))
    d.box(180, 376, 200, 38, "hash", "main", 17)
    d.arrow((280, 414), (280, 438))
    d.box(120, 440, 320, 38, "cache/…/3fa9c1…/", "soft", 16, mono=True)
    d.note(
        MARGIN, 508, "There already: use it.  Not there: tokenize, write, rename at the end.", 14
    )


@diagram(
    "leak",
    636,
    "A leak: tokens that should be hidden are seen",
    "Two documents A and B in one row. On the left the mask with one triangle for each document. "
    "On the right the document ids were forgotten: the tokens of B also see A, in a red rectangle. "
    "Below, the graver leak: a mask without the triangle shows each token the next one, and the "
    "loss falls below the floor, which no honest model can reach.",
)
def draw_leak(d: Drawing) -> None:
    """Draw a correct mask and two broken ones."""
    right = _mask("AAAABBBB")
    forgotten = [row if i < 4 else "xxxx" + row[4:] for i, row in enumerate(right)]
    future = [
        "".join("x" if j > i else c for j, c in enumerate(row)) for i, row in enumerate(forgotten)
    ]
    kinds = {"A": "main", "B": "sky", "x": "hot", ".": "empty"}
    panels = [
        (40, 100, right, "correct"),
        (310, 100, forgotten, "document ids forgotten"),
        (310, 392, future, "no causal mask"),
    ]
    for x, y, cells, name in panels:
        d.text(x, y - 12, name, 16, anchor="start", bold=True)
        d.grid(x, y, cells, 24, kinds)
    d.note(310, 314, "B reads A: not the loss of\na document alone", 15)
    d.note(310, 610, "each token sees the next one", 15, RED)

    # The alarm.
    d.note(40, 330, "A and B: two documents\nin one packed row", 15)
    d.line((40, 480), (270, 480), color=BLUE, thick=2, dashed=True)
    d.text(268, 498, "floor", 16, anchor="end", bold=True)
    points = [(44, 390), (70, 430), (110, 455), (160, 468), (210, 473), (268, 475)]
    d.line(*points, color=BLUE, thick=3)
    d.line((44, 390), (66, 450), (100, 510), (150, 540), (268, 550), color=RED, thick=3)

    d.text(268, 440, "honest model", 15, BLUE, "end")
    d.text(268, 570, "leak: below the floor", 15, RED, "end")
    d.note(40, 610, "loss against steps", 15)
