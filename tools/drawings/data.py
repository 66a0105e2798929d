"""Diagrams of part 3: the corpus, questions, labels, packed rows, token files, leaks."""

from .canvas import BLUE, GREY, MARGIN, QUIET, RED, Drawing, diagram


def _draw_floor(d: Drawing) -> None:
    """Draw what a story costs, and what follows for every model."""
    # From one story to all models.
    d.box(
        MARGIN,
        396,
        520,
        62,
        "P = 1/2 · 1/3 = 1/6\n−ln P = 0.69 + 1.10 = 1.79 nats",
        "main",
        18,
        mono=True,
    )
    d.text(
        MARGIN, 494, "floor = nats of the choices / number of words", 17, anchor="start", bold=True
    )
    d.text(MARGIN, 520, "1.79 / 6 = 0.30 nats per word", 17, anchor="start", mono=True)
    d.note(
        MARGIN,
        552,
        "A model cannot know the choices in advance, so no model has a lower\n"
        "expected loss. The stories have more choices, and a state: who is\n"
        "where, who holds what. What follows from the state costs 0 nats.",
        14,
    )


@diagram(
    "corpus",
    604,
    "A program with two choices, and its floor",
    "The program writes the, then cat or dog with probability one half each, then sat on the, then "
    "mat, rug or bed with one third each. The story the cat sat on the rug has probability 1/6 and "
    "costs 0.69 plus 1.10, that is 1.79 nats. Divided by its 6 words this is the floor, 0.30 nats "
    "per word: no model has a lower expected loss.",
)
def draw_corpus(d: Drawing) -> None:
    """Draw the tree of choices, with one story in dark boxes."""
    # Fixed words are grey.
    d.box(180, 60, 100, 38, "the", "grey", 17, mono=True)
    for x, word, kind in ((80, "cat", "main"), (260, "dog", "soft")):
        d.arrow((230, 98), (x + 60, 138))
        d.box(x, 140, 120, 38, word, kind, 17, mono=True)
        d.arrow((x + 60, 178), (230, 222))
        d.text(x + (14 if x < 200 else 106), 130, "1/2", 16, BLUE, bold=True)
    d.box(140, 224, 180, 38, "sat on the", "grey", 17, mono=True)
    for x, word, kind in ((20, "mat", "soft"), (165, "rug", "main"), (310, "bed", "soft")):
        d.arrow((230, 262), (x + 55, 318))
        d.box(x, 320, 110, 38, word, kind, 17, mono=True)
        d.text(x + (84 if x > 100 else 30), 304, "1/3", 16, BLUE, bold=True)

    # What each word costs.
    costs = [(85, "0: no choice", QUIET), (165, "ln 2 = 0.69", BLUE), (249, "0: no choice", QUIET)]
    costs.append((345, "ln 3 = 1.10", BLUE))
    for y, words, color in costs:
        d.text(540, y, words, 15, color, "end", mono=True)
    d.text(540, 384, "dark: one story of six", 15, QUIET, "end")
    _draw_floor(d)


@diagram(
    "questions",
    590,
    "A story, the state of the world, questions",
    "The story: Mia and Tom were in the hall. Mia had a red ball. Tom had three coins. Mia gave "
    "the "
    "ball to Tom. Beside it the state after the story: Mia and Tom are in the hall, Tom holds the "
    "ball, Tom has 3 coins. Where was the ball: hall, wrong cellar. Who had the ball: Tom, wrong "
    "Mia. "
    "How many coins did Tom have: three, wrong two.",
)
def draw_questions(d: Drawing) -> None:
    """Draw a story and its state, and questions with a right and a wrong answer."""
    story = ["Mia and Tom were in the hall.", "Mia had a red ball."]
    story += ["Tom had three coins.", "Mia gave the ball to Tom."]
    d.text(MARGIN, 72, "the story", 15, QUIET, "start")
    for i, sentence in enumerate(story):
        d.box(MARGIN, 82 + i * 40, 34, 34, str(i + 1), "main", 16, bold=True)
        d.box(58, 82 + i * 40, 246, 34, sentence, "soft", 15)
    d.arrow((308, 159), (338, 159))
    d.text(340, 72, "the state after it", 15, QUIET, "start")
    state = "Mia: hall\nTom: hall\nball: Tom holds it\ncoins: Tom 3, Mia 0"
    d.box(340, 82, 200, 154, state, "gold", 17)
    d.arrow((440, 236), (440, 262))

    # A question names the sentences that its answer follows from.
    questions = [
        ("where", "Where was the ball?", "1, 4", "hall", "cellar"),
        ("who has", "Who had the ball?", "2, 4", "Tom", "Mia"),
        ("how many", "How many coins did Tom have?", "3", "three", "two"),
    ]
    for x, word in ((65, "kind"), (222, "question"), (368, "from"), (434, "right"), (505, "wrong")):
        d.text(x, 280, word, 15, QUIET)
    for i, (kind, question, source, right, wrong) in enumerate(questions):
        y = 292 + i * 54
        d.box(MARGIN, y, 82, 42, kind, "grey", 15)
        d.box(106, y, 234, 42, question, "white", 14)
        d.box(344, y, 50, 42, source, "main", 15)
        d.box(398, y, 72, 42, right, "sky", 16)
        d.box(474, y, 66, 42, wrong, "warm", 16)
    d.text(MARGIN, 488, "Two ways to score a model", 17, anchor="start", bold=True)
    d.note(
        MARGIN,
        514,
        "exact match: the model writes, and begins with the right answer\n"
        "multiple choice: the right answer is more likely than the wrong",
        15,
    )
    d.text(MARGIN, 568, "The answer involves no chance: it costs 0 nats.", 15, QUIET, "start")


@diagram(
    "shifted-labels",
    510,
    "Targets are the next tokens: shift by one",
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
    592,
    "A token file: one array, and where to cut",
    "tokens.bin holds the ids of all documents one after the other. offsets.npy holds 0, 5, 8, 12: "
    "where each document begins, and the end. meta.json holds the type of the numbers and the size "
    "of the vocabulary. Token files for training and validation lie with the tokenizer in a folder "
    "named by a hash of all that decides its content, so it is found again the next time.",
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

    # The name of the folder, and what is in it.
    d.text(MARGIN, 294, "What decides the tokens names the folder", 17, anchor="start", bold=True)
    for i, name in enumerate(["the data settings", "files, tokenizer", "the code"]):
        d.box(MARGIN + 176 * i, 308, 168, 38, name, "grey", 15)
        d.arrow((104 + 176 * i, 346), (280 + 60 * (i - 1), 374))
    d.box(180, 376, 200, 38, "hash", "main", 17)
    d.arrow((280, 414), (280, 438))
    d.box(MARGIN, 440, 520, 100, "", "white")
    d.text(34, 464, "cache folder 3fa9c1…", 16, anchor="start", mono=True)
    for i, (name, kind) in enumerate(
        (("tokenizer/", "gold"), ("train/", "main"), ("validation/", "sky"))
    ):
        d.box(34 + 166 * i, 478, 160, 48, name, kind, 16, mono=True)
    d.text(
        MARGIN, 570, "train/ and validation/ each hold the three files above.", 15, QUIET, "start"
    )


@diagram(
    "leak",
    640,
    "A leak: one part that ignores documents",
    "A packed row with the documents A and B of four tokens each, and a dashed boundary. Above it "
    "attention: arrows from B go to B only. Below it a part that ignores documents, such as a "
    "convolution: a red arrow crosses the boundary from A to B. Then B alone in a row, with "
    "nothing "
    "before it. The test compares the loss of B in both rows.",
)
def draw_leak(d: Drawing) -> None:
    """Draw a packed row with honest and with leaking arrows, and the test."""
    kinds = ["soft"] * 4 + ["sky"] * 4
    words = ["A₁", "A₂", "A₃", "A₄", "B₁", "B₂", "B₃", "B₄"]
    d.text(MARGIN, 76, "attention stays in its document", 16, BLUE, "start", bold=True)
    middles = d.row(MARGIN, 140, words, 61, 40, kinds, 4, 17)
    for query in (3, 7):
        for step in (1, 2, 3):
            end = middles[query - step]
            top = 138 - 14 * step
            start = middles[query] + 6 * (step - 2)
            d.arrow((end, 138), (end, top), (start, top), (start, 138), color=BLUE)
    d.line((280, 88), (280, 250), color=GREY, dashed=True)
    d.text(280, 268, "boundary", 15, QUIET)

    # The part that crosses.
    for i in range(7):
        crosses = i == 3
        color = RED if crosses else GREY
        points = [(middles[i] + 8, 180), (middles[i] + 8, 206), (middles[i + 1] - 8, 206)]
        d.arrow(*points, (middles[i + 1] - 8, 182), color=color, thick=3.5 if crosses else 1.8)
    d.text(540, 236, "a convolution does not", 16, RED, "end", bold=True)
    d.note(MARGIN, 226, "each token also\nreads its neighbor", 15)

    # The same document alone.
    d.text(MARGIN, 316, "document B alone", 16, anchor="start", bold=True)
    d.row(MARGIN, 328, ["B₁", "B₂", "B₃", "B₄"], 61, 40, "sky", 4, 17)
    d.note(296, 344, "nothing stands before it,\nas when the model writes", 15)
    d.box(
        MARGIN, 392, 520, 42, "test: the loss of B in the packed row = its loss alone?", "main", 17
    )
    d.arrow((145, 434), (145, 462))
    d.arrow((415, 434), (415, 462))
    d.box(MARGIN, 464, 250, 44, "equal: no leak", "sky", 17)
    d.box(290, 464, 250, 44, "different: A leaked into B", "warm", 17)
    d.note(
        MARGIN,
        546,
        "What is there to gain? Rows are packed until they are full, so a\n"
        "model that knows how much stands before B can tell where B ends.\n"
        "The loss looks better, the model is not.",
        15,
    )
