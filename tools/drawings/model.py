"""Diagrams of part 1: positions, attention, feed-forward, experts, the block, LoRA, files."""

from math import cos, sin

from .canvas import BLUE, GOLD, GREY, INK, MARGIN, PURPLE, QUIET, RED, SKY, Drawing, diagram


def _draw_output(d: Drawing) -> None:
    """Draw the way from a vector back to the vocabulary."""
    # Back to the vocabulary.
    d.arrow((316, 576), (316, 624))
    d.arrow((70, 350), (70, 600), (308, 600), dashed=True)
    d.text(86, 590, "times all rows", 15, QUIET, "start")
    d.text(86, 622, "of this table", 15, QUIET, "start")
    d.row(210, 626, ["z₀", "z₁", "z₂", "…", "z₈₀₂"], 40, 38, "soft", 3, 15)
    d.text(198, 652, "logits", 16, anchor="end")
    d.arrow((316, 664), (316, 704))
    d.text(328, 690, "softmax", 15, QUIET, "start")
    d.row(210, 706, ["p₀", "p₁", "p₂", "…", "p₈₀₂"], 40, 38, "gold", 3, 15)
    d.text(198, 732, "probabilities", 16, anchor="end")


@diagram(
    "token-path",
    770,
    "The path of one token, with its shapes",
    "The token the has the id 263. Row 263 of the embedding table, which has 803 rows of 128 "
    "numbers, is its vector. Three blocks change the vector, which keeps its 128 numbers. A norm "
    "follows. The product with all 803 rows of the same table gives 803 logits, softmax turns "
    "them into probabilities.",
)
def draw_token_path(d: Drawing) -> None:
    """Draw the steps from a token to probabilities, one below the other."""
    d.text(MARGIN, 66, "default recipe: V = 803, D = 128, L = 3", 15, QUIET, "start")
    shapes = [(112, "text"), (176, "1 id"), (300, "(128,)"), (470, "(128,)"), (564, "(128,)")]
    shapes += [(652, "(803,)"), (732, "(803,)")]
    for y, shape in shapes:
        d.text(540, y, shape, 16, QUIET, "end", mono=True)

    # Token, id, row of the table.
    d.box(150, 88, 180, 38, "␣the", "soft", 18, mono=True)
    d.arrow((240, 126), (240, 150))
    d.box(150, 152, 180, 38, "263", "gold", 18, mono=True)
    d.arrow((150, 171), (110, 171), (110, 206))
    for i in range(6):
        kind = "main" if i == 3 else "white"
        d.box(30, 208 + i * 16, 160, 13, "", kind)
    d.text(110, 324, "embed_tokens", 15, QUIET, mono=True)
    d.text(110, 344, "(803, 128)", 15, QUIET, mono=True)
    d.arrow((190, 262), (234, 262), (234, 278))
    d.note(250, 236, "row 263 is the\nvector of the token", 15)

    # The vector passes the blocks.
    d.row(210, 280, [""] * 8, 24, 30, "main", 3)
    d.arrow((316, 310), (316, 350))
    d.box(
        210,
        352,
        214,
        80,
        "3 blocks\nread the tokens before,\nadd to the vector",
        "sky",
        15,
        bold=True,
    )
    d.arrow((316, 432), (316, 448))
    d.row(210, 450, [""] * 8, 24, 30, "main", 3)
    d.arrow((316, 480), (316, 498))
    d.box(210, 500, 214, 34, "norm", "grey")
    d.arrow((316, 534), (316, 544))
    d.row(210, 546, [""] * 8, 24, 30, "main", 3)
    _draw_output(d)


def _draw_mix(d: Drawing, left: float, middles: list[float]) -> None:
    """Draw scores, weights, and the mix of the values."""
    d.row(left, 264, ["0", "6", "0"], 128, 34, "white", 4, 17)
    d.text(132, 280, "scores", 16, anchor="end")
    d.text(132, 298, "q·k / √d", 15, QUIET, "end", mono=True)
    d.arrow((342, 298), (342, 336))
    d.text(354, 323, "softmax: positive, sum 1", 15, QUIET, "start")
    d.row(left, 338, ["0.002", "0.995", "0.002"], 128, 34, "gold", 4, 17)
    d.text(132, 361, "weights", 16, anchor="end")
    for x, width in zip(middles, (1.5, 14, 1.5), strict=True):
        d.line((x, 374), (x, 414), color=BLUE, thick=width)

    # The values, and what comes out.
    d.row(left, 414, ["v₁", "v₂", "v₃"], 128, 34, "purple", 4, 18)
    d.text(132, 430, "values", 16, anchor="end")
    d.text(132, 448, "W_v x", 15, QUIET, "end", mono=True)
    for x in middles:
        d.line((x, 448), (x, 474), color=GREY)
    d.line((middles[0], 474), (middles[2], 474), color=GREY)
    d.arrow((342, 474), (342, 502), color=GREY)
    d.box(146, 504, 392, 40, "0.002 v₁ + 0.995 v₂ + 0.002 v₃", "main", 17, mono=True)
    d.text(132, 529, "result y₃", 16, anchor="end")
    d.note(
        MARGIN,
        582,
        "sat has found out who sat. A query sees the keys of its own token\n"
        "and of those before it; later tokens are hidden.",
        15,
    )


@diagram(
    "qkv",
    640,
    "Attention: one query, all keys, a mix of values",
    "Each of the three tokens the, cat, sat has a key and a value. The query of sat is compared "
    "with "
    "every key. The scores 0, 6, 0 become weights 0.002, 0.995, 0.002 by softmax. The result is "
    "the "
    "sum of the values, each multiplied by its weight: almost the value of cat.",
)
def draw_qkv(d: Drawing) -> None:
    """Draw keys, scores, weights and values in three columns, one for each token."""
    # The tokens, and what is made of them.
    left = 146.0
    middles = d.row(left, 60, ["the", "cat", "sat"], 128, 34, "soft", 4, 17)
    d.text(132, 83, "vectors x", 16, anchor="end")
    for x in middles:
        d.arrow((x, 94), (x, 120))
    d.row(left, 122, ["k₁", "k₂", "k₃"], 128, 34, "sky", 4, 18)
    d.text(132, 138, "keys", 16, anchor="end")
    d.text(132, 156, "W_k x", 15, QUIET, "end", mono=True)

    # The query meets every key.
    d.arrow((middles[2] + 64, 77), (552, 77), (552, 207), (540, 207))
    for x in middles:
        d.line((x, 156), (x, 250), color=GREY)
        d.arrow((x, 236), (x, 262), color=GREY)
    d.box(146, 190, 392, 34, "", "white")
    d.box(410, 190, 128, 34, "q₃ = W_q x", "hot", 16, mono=True)
    d.text(398, 212, "query of sat, times each key", 15, QUIET, "end")
    _draw_mix(d, left, middles)


@diagram(
    "heads",
    640,
    "Heads: cut the vector, attend apart, join again",
    "A vector with 128 numbers becomes a query of 128 numbers, which is cut into 4 heads of 32. "
    "Each head attends with its own weights, so that it may look at other tokens. The four "
    "results of 32 numbers are joined to 128 and multiplied by the matrix of o_proj.",
)
def draw_heads(d: Drawing) -> None:
    """Draw the cut into four heads, four attention maps, and the join."""
    kinds = ["soft", "sky", "gold", "purple"]
    d.box(MARGIN, 60, 520, 36, "x of each token    (B, T, 128)", "grey", 16, mono=True)
    d.arrow((280, 96), (280, 122))
    d.text(292, 114, "q_proj (and k_proj, v_proj)", 15, QUIET, "start", mono=True)
    d.row(MARGIN, 124, ["32", "32", "32", "32"], 130, 36, kinds, 0, 16)
    d.brace(MARGIN, 540, 168, "one vector of 128 numbers, cut into H = 4 heads of d = 32")

    # A map for each head.
    maps = [
        ["a...", "ba..", "bba.", "bbba"],
        ["a...", "ab..", "aab.", "aaab"],
        ["a...", "ba..", "abb.", "babb"],
        ["a...", "aa..", "aaa.", "aaaa"],
    ]
    marks = [{"a": "main", "b": "soft", ".": "empty"}, {"a": "sky", "b": "main", ".": "empty"}]
    marks += [{"a": "gold", "b": "main", ".": "empty"}, {"a": "purple", "b": "main", ".": "empty"}]
    for i, cells in enumerate(maps):
        x = MARGIN + 130 * i + 65
        d.arrow((x, 196), (x, 228))
        d.text(x, 246, f"head {i + 1}", 16, bold=True)
        d.grid(x - 44, 256, cells, 22, marks[i])
        d.arrow((x, 346), (x, 396))

    # Join.
    d.row(MARGIN, 398, ["32"] * 4, 130, 36, kinds, 0, 16)
    d.brace(MARGIN, 540, 442, "joined: (B, T, H·d) = (B, T, 128)")
    d.arrow((280, 468), (280, 496))
    d.box(100, 498, 360, 40, "o_proj mixes the heads", "main", 17)
    d.arrow((280, 538), (280, 562))
    d.box(MARGIN, 564, 520, 36, "y of each token    (B, T, 128)", "grey", 16, mono=True)
    d.text(
        MARGIN,
        624,
        "Maps of weights, (B, H, T, S): a row is a query, a column a key.",
        15,
        QUIET,
        "start",
    )


@diagram(
    "attention-kinds",
    640,
    "MHA, GQA, MQA, MLA: what the cache must keep",
    "Four rows with four query heads each. MHA has four key/value heads and keeps 256 numbers of "
    "each token and layer. GQA has two and keeps 128. MQA has one and keeps 64. MLA keeps one "
    "latent of 32 numbers and a shared rotated key of 16, 48 in all.",
)
def draw_attention_kinds(d: Drawing) -> None:
    """Draw which query heads share which keys and values."""
    d.note(MARGIN, 64, "H = 4 query heads of d = 32. Kept: numbers per token and layer.", 15)
    rows = [
        ("MHA", "one key and value\nper query head", [0, 1, 2, 3], "2 · 4 · 32", "256"),
        ("GQA", "K = 2: two query\nheads share", [0, 0, 1, 1], "2 · 2 · 32", "128"),
        ("MQA", "K = 1: all share\none", [0, 0, 0, 0], "2 · 1 · 32", "64"),
    ]
    for i, (name, words, owner, product, total) in enumerate(rows):
        y = 88 + i * 134
        d.text(MARGIN, y + 24, name, 19, anchor="start", bold=True)
        d.note(MARGIN, y + 50, words, 15)
        d.row(180, y, ["q"] * 4, 44, 34, "soft", 8, 16)
        count = max(owner) + 1
        width = 208 / count
        for key in range(count):
            middle = 176 + width * (key + 0.5)
            for head in range(4):
                if owner[head] == key:
                    d.line((202 + 52 * head, y + 34), (middle, y + 72), color=GREY)
            d.box(middle - 22, y + 72, 44, 34, "k v", "sky", 16, mono=True)
        d.text(540, y + 60, product, 15, QUIET, "end", mono=True)
        d.text(540, y + 92, total, 24, BLUE, "end", bold=True)

    # MLA expands what it keeps.
    y = 490
    d.text(MARGIN, y + 24, "MLA", 19, anchor="start", bold=True)
    d.note(MARGIN, y + 50, "keep one latent,\nmake all heads\nfrom it", 15)
    d.row(180, y, ["q"] * 4, 44, 34, "soft", 8, 16)
    for head in range(4):
        d.line((202 + 52 * head, y + 34), (202 + 52 * head, y + 48), color=GREY)
        d.line((196 + 52 * head, y + 76), (245, y + 94), color=GREY, dashed=True)
        d.line((208 + 52 * head, y + 76), (352, y + 94), color=GREY, dashed=True)
    d.row(180, y + 48, ["k v"] * 4, 44, 28, "empty", 8, 15)
    d.box(180, y + 94, 130, 34, "latent 32", "gold", 16)
    d.box(316, y + 94, 72, 34, "key 16", "gold", 16)
    d.text(540, y + 66, "32 + 16", 15, QUIET, "end", mono=True)
    d.text(540, y + 98, "48", 24, BLUE, "end", bold=True)


@diagram(
    "block",
    726,
    "One block, with its shapes",
    "The vectors x of shape B, T, D run down a thick line, the residual stream. A copy is "
    "normalized, goes through attention, and is added. Another copy is normalized, goes through "
    "the feed-forward layer, and is added. In attention, projections make queries of shape B, H, "
    "T, d and keys and values of shape B, K, S, d; queries and keys are normalized and rotated.",
)
def draw_block(d: Drawing) -> None:
    """Draw the residual stream, and the two branches beside it."""
    # The stream.
    d.line((66, 88), (66, 640), color=BLUE, thick=5)
    d.arrow((66, 622), (66, 684), color=BLUE, thick=5)
    d.text(MARGIN, 76, "x  (B, T, D)", 17, anchor="start", mono=True)
    d.text(MARGIN, 708, "x  (B, T, D)", 17, anchor="start", mono=True)

    # Attention.
    d.box(130, 128, 410, 268, "", "white", dashed=True)
    d.text(530, 118, "gather from earlier tokens", 15, QUIET, "end")
    d.arrow((66, 104), (211, 104), (211, 142))
    d.box(150, 144, 374, 32, "input_layernorm", "grey", 16, mono=True)
    projections = ["q_proj\n(B, H, T, d)", "k_proj\n(B, K, T, d)", "v_proj\n(B, K, T, d)"]
    for x in d.row(150, 192, projections, 122, 46, "sky", 4, 15):
        d.arrow((x, 176), (x, 190))
    for i in range(2):
        d.arrow((211 + 126 * i, 238), (211 + 126 * i, 252))
        d.box(150 + 126 * i, 254, 122, 32, "norm, rotate", "sky", 16)
        d.arrow((211 + 126 * i, 286), (211 + 126 * i, 302))
    d.arrow((463, 238), (463, 302))
    d.box(150, 304, 374, 32, "softmax(q kᵀ / √d) v", "main", 16, mono=True)
    d.arrow((211, 336), (211, 352))
    d.box(150, 354, 240, 32, "o_proj   (B, T, D)", "sky", 16, mono=True)
    d.arrow((150, 370), (80, 370))
    d.circle(66, 370, 14, "+")

    # Feed-forward.
    d.box(130, 440, 410, 208, "", "white", dashed=True)
    d.text(530, 430, "compute on each token alone", 15, QUIET, "end")
    d.arrow((66, 416), (211, 416), (211, 454))
    d.box(150, 456, 374, 32, "post_attention_layernorm", "grey", 16, mono=True)
    for i, name in enumerate(("gate_proj", "up_proj")):
        x = 150 + 194 * i
        d.arrow((x + 90, 488), (x + 90, 502))
        d.box(x, 504, 180, 32, f"{name} (…, F)", "gold", 15, mono=True)
        d.arrow((x + 90, 536), (x + 90, 550))
    d.box(150, 552, 180, 32, "silu", "gold", 16, mono=True)
    d.arrow((330, 568), (417, 568))
    d.circle(434, 568, 15, "×")
    d.line((434, 583), (434, 622), color=INK)
    d.arrow((434, 622), (392, 622))
    d.box(150, 606, 240, 32, "down_proj (B, T, D)", "gold", 16, mono=True)
    d.arrow((150, 622), (80, 622))
    d.circle(66, 622, 14, "+")


def _dial(
    d: Drawing,  # the canvas
    x: float,  # middle
    y: float,  # middle
    radians: float,  # angle of the hand, counterclockwise from the right
    color: str,  # of the hand
) -> None:
    """Draw a circle with a hand."""
    d.circle(x, y, 34, kind="white")
    d.line((x, y), (x + 34, y), color=GREY, thick=1, dashed=True)
    d.arrow((x, y), (x + 32 * cos(radians), y - 32 * sin(radians)), color=color, thick=2.5)


@diagram(
    "rope",
    620,
    "RoPE: turn each pair of numbers by its position",
    "Two rows of five dials for the positions 0 to 4. The hand of the first pair turns by 1 radian "
    "with each position, that of the fifth pair by 0.1 radian. Below, a query at position 5 and a "
    "key at position 2, and the same 3 positions later: the difference of the angles is the same.",
)
def draw_rope(d: Drawing) -> None:
    """Draw dials of a fast and a slow pair, then the relative angle."""
    # Two pairs at five positions.
    middles = [176 + 82 * i for i in range(5)]
    for i, x in enumerate(middles):
        d.text(x, 74, str(i), 17, bold=True)
        _dial(d, x, 122, i, BLUE)
        _dial(d, x, 210, 0.1 * i, SKY)
    d.text(MARGIN, 74, "position", 16, anchor="start")
    d.note(MARGIN, 118, "pair 0\n1 radian", 15)
    d.note(MARGIN, 206, "pair 4\n0.1 radian", 15)
    d.note(
        MARGIN,
        272,
        "d = 32, theta = 10,000: pair i turns by 10,000^(−2i/32) radians\n"
        "per position. Fast pairs for near tokens, slow pairs for far.",
        15,
    )

    # Only the distance counts.
    d.text(MARGIN, 344, "Only the distance of query and key counts", 17, anchor="start", bold=True)
    for i, (key, query) in enumerate(((1.0, 2.2), (2.0, 3.2))):
        x = 130 + 280 * i
        d.circle(x, 440, 64, kind="white")
        for angle, color, name in ((key, SKY, "key"), (query, RED, "query")):
            d.arrow((x, 440), (x + 62 * cos(angle), 440 - 62 * sin(angle)), color=color, thick=3)
            d.text(x + 84 * cos(angle), 446 - 78 * sin(angle), name, 15, INK)
        arc = [(x + 30 * cos(key + t * 0.12), 440 - 30 * sin(key + t * 0.12)) for t in range(11)]
        d.line(*arc, color=PURPLE, thick=3)
    d.text(130, 530, "positions 2 and 5", 16)
    d.text(410, 530, "positions 7 and 10", 16)
    d.text(270, 500, "same angle", 16, PURPLE, bold=True)
    d.note(
        MARGIN,
        568,
        "Both were turned further by the same amount, so their product\n"
        "q · k is the same. Number i pairs with number i + d/2.",
        15,
    )


@diagram(
    "swiglu",
    520,
    "SwiGLU: one branch opens or closes the other",
    "The vector x with D = 128 numbers goes through gate_proj and through up_proj, to F = 192 "
    "numbers each. The first branch goes through silu. The two are multiplied number by number. "
    "down_proj brings the product back to 128 numbers.",
)
def draw_swiglu(d: Drawing) -> None:
    """Draw the two branches, their product, and the way back."""
    d.box(180, 60, 200, 38, "x   (128,)", "soft", 17, mono=True)
    d.arrow((220, 98), (220, 116), (140, 116), (140, 136))
    d.arrow((340, 98), (340, 116), (420, 116), (420, 136))
    d.box(40, 138, 200, 44, "gate_proj\n192 × 128", "gold", 15, mono=True)
    d.box(320, 138, 200, 44, "up_proj\n192 × 128", "gold", 15, mono=True)
    d.text(152, 206, "(192,)", 15, QUIET, "start", mono=True)
    d.text(432, 206, "(192,)", 15, QUIET, "start", mono=True)
    d.arrow((140, 182), (140, 222))
    d.box(40, 224, 200, 92, "", "white")

    # The curve of silu(z) = z sigmoid(z) for z from -5 to 3.
    curve = []
    for i in range(33):
        z = -5 + i / 4
        curve.append((54 + (z + 5) * 21.5, 292 - 19 * z / (1 + 2.718281828 ** (-z))))
    d.line((50, 292), (230, 292), color=GREY, thick=1)
    d.line((161.5, 230), (161.5, 308), color=GREY, thick=1)
    d.line(*curve, color=BLUE, thick=3)
    d.text(54, 250, "silu", 16, anchor="start", mono=True)
    d.arrow((240, 270), (402, 270))
    d.arrow((420, 182), (420, 250))
    d.circle(420, 270, 18, "×")
    d.note(452, 262, "number by\nnumber", 15)

    # Back to D numbers.
    d.arrow((420, 288), (420, 342), (280, 342), (280, 360))
    d.box(180, 362, 200, 44, "down_proj\n128 × 192", "gold", 15, mono=True)
    d.arrow((280, 406), (280, 430))
    d.box(180, 432, 200, 38, "y   (128,)", "soft", 17, mono=True)
    d.text(
        MARGIN,
        502,
        "A gate near 0 switches its number off, a large one lets it pass.",
        15,
        QUIET,
        "start",
    )


@diagram(
    "residual-norm",
    560,
    "Residual stream and norm",
    "On the left the vector x runs down unchanged, and each part adds its result to it. Each part "
    "reads a normalized copy. On the right an example: 3, minus 1, 2, minus 4 have the root mean "
    "square 2.74. Divided by it they are 1.10, minus 0.37, 0.73, minus 1.46.",
)
def draw_residual_norm(d: Drawing) -> None:
    """Draw the stream with two additions, and a norm in numbers."""
    # The stream.
    d.line((50, 84), (50, 506), color=BLUE, thick=6)
    d.arrow((50, 470), (50, 530), color=BLUE, thick=6)
    d.text(MARGIN, 74, "x", 18, anchor="start", mono=True)
    for i, (name, kind) in enumerate((("attention", "sky"), ("feed-forward", "gold"))):
        y = 104 + i * 206
        d.arrow((50, y), (160, y), (160, y + 28))
        d.box(90, y + 30, 140, 34, "norm", "grey")
        d.arrow((160, y + 64), (160, y + 86))
        d.box(90, y + 88, 140, 40, name, kind)
        d.line((160, y + 128), (160, y + 154))
        d.arrow((160, y + 154), (65, y + 154))
        d.circle(50, y + 154, 14, "+")
    d.note(70, 504, "x is never replaced,\nonly added to", 15)

    # A norm in numbers.
    d.text(270, 84, "RMSNorm in numbers", 17, anchor="start", bold=True)
    d.row(270, 100, ["3", "−1", "2", "−4"], 64, 36, "soft", 4, 17)
    d.arrow((404, 136), (404, 164))
    d.note(270, 184, "root of the mean square:", 15)
    d.text(270, 210, "√((9 + 1 + 4 + 16) / 4) = 2.74", 15, INK, "start", mono=True)
    d.arrow((404, 222), (404, 250))
    d.text(416, 242, "divide", 15, QUIET, "start")
    d.row(270, 252, ["1.10", "−0.37", "0.73", "−1.46"], 64, 36, "main", 4, 17)
    d.arrow((404, 288), (404, 316))
    d.text(416, 308, "times learned w", 15, QUIET, "start")
    d.row(270, 318, ["·w₁", "·w₂", "·w₃", "·w₄"], 64, 36, "grey", 4, 17)
    d.note(
        270,
        396,
        "Each part reads numbers of one\nusual size, however large x grew.\n"
        "The gradient flows back along\nthe additions, past every part.",
        15,
    )


# Four tokens, and the eight rows that their choices make, sorted by expert.
TOKENS = ["␣Mia", "␣was", "␣in", "␣the"]
TOKEN_KINDS = ["soft", "sky", "gold", "purple"]
TOKEN_COLORS = [BLUE, SKY, GOLD, PURPLE]
TOKEN_OF_ROW = [0, 2, 1, 0, 2, 3, 1, 3]
EXPERT_OF_ROW = [0, 0, 1, 2, 2, 2, 3, 3]


def _draw_answers(d: Drawing, middles: list[float]) -> None:
    """Draw how the answers return to their tokens."""
    # Answers back to their tokens.
    for i, token in enumerate(TOKEN_OF_ROW):
        x = 40 + 60 * i
        kind = TOKEN_KINDS[TOKEN_OF_ROW[i]]
        d.box(x, 474, 56, 30, f"E{EXPERT_OF_ROW[i]}", kind, 15, mono=True)
        d.line((x + 28, 504), (middles[token], 562), color=TOKEN_COLORS[token], thick=2.2)
    sums = [".7 E0+.3 E2", ".6 E1+.4 E3", ".5 E2+.5 E0", ".8 E3+.2 E2"]
    d.row(60, 564, sums, 106, 36, TOKEN_KINDS, 6, 14)
    d.note(60, 624, "times the weight, added up for each token (index_add)", 15)
    d.note(
        60,
        664,
        "The layer has the parameters of four experts, but a token\ncosts only as much as two.",
        15,
    )


@diagram(
    "moe",
    700,
    "Experts: sort the tokens, multiply, add back",
    "Four tokens choose two of four experts each. The eight choices are sorted by expert, so that "
    "the rows of one expert stand next to each other: expert 0 gets Mia and in, expert 1 was, "
    "expert 2 Mia, in, the, expert 3 was and the. Each expert is a SwiGLU. The answers are "
    "multiplied by the router's weights and added up for each token.",
)
def draw_moe(d: Drawing) -> None:
    """Draw tokens, the router's choices, the sorted rows and the experts."""
    # Tokens and the router.
    middles = d.row(60, 56, TOKENS, 106, 34, TOKEN_KINDS, 6, 17)
    d.box(60, 108, 442, 44, "router: scores of E = 4 experts, the best k = 2 stay", "main", 15)
    for x in middles:
        d.arrow((x, 90), (x, 106))
    choices = ["0: .7  2: .3", "1: .6  3: .4", "2: .5  0: .5", "3: .8  2: .2"]
    d.row(60, 172, choices, 106, 32, TOKEN_KINDS, 6, 14)
    d.note(60, 226, "expert: weight; the weights of a token add up to 1", 15)

    # Rows sorted by expert.
    for i, token in enumerate(TOKEN_OF_ROW):
        x = 40 + 60 * i
        d.line((middles[token], 236), (x + 28, 292), color=TOKEN_COLORS[token], thick=2.2)
        d.box(x, 292, 56, 32, TOKENS[token], TOKEN_KINDS[token], 14, mono=True)
    d.note(40, 346, "rows sorted by expert, so each expert multiplies one slice", 15)

    # Experts.
    begins = [0, 2, 3, 6]
    stops = [2, 3, 6, 8]
    for expert in range(4):
        left = 40 + 60 * begins[expert]
        right = 40 + 60 * stops[expert] - 4
        d.line((left, 356), (right, 356), color=QUIET, thick=3)
        d.arrow(((left + right) / 2, 358), ((left + right) / 2, 384))
        name = f"expert {expert}" if right - left > 70 else "exp. 1"
        d.box(left, 386, right - left, 44, name, "white", 15, bold=True)
    d.text(40, 456, "stops = [2, 3, 6, 8]", 16, anchor="start", mono=True)
    d.text(516, 456, "each one a SwiGLU", 15, QUIET, "end")
    _draw_answers(d, middles)


@diagram(
    "lora",
    470,
    "LoRA: a frozen matrix and two thin ones",
    "A frozen weight W of 128 by 128, 16,384 numbers. Beside it B, 128 by 8, and A, 8 by 128, "
    "2,048 numbers in all. Their product B A, times alpha / r = 16 / 8 = 2, is added to W. "
    "B begins at 0, so that the model begins unchanged.",
)
def draw_lora(d: Drawing) -> None:
    """Draw the matrices as rectangles in proportion."""
    # Shapes in proportion: 128 numbers are 160 pixels.
    d.box(MARGIN, 110, 160, 160, "W\nfrozen", "grey", 20, bold=True)
    d.text(100, 292, "128 × 128", 16, mono=True)
    d.text(100, 314, "16,384 numbers", 15, QUIET)
    d.text(196, 196, "+", 26, bold=True)
    d.text(252, 196, "16/8 ·", 18, mono=True)
    d.box(290, 110, 14, 160, "", "main")
    d.text(297, 100, "B", 20, bold=True)
    d.text(297, 292, "128 × 8", 16, mono=True)
    d.box(330, 183, 160, 14, "", "main")
    d.text(508, 198, "A", 20, bold=True)
    d.text(410, 226, "8 × 128", 16, mono=True)
    d.text(318, 196, "·", 22, bold=True)
    d.text(400, 314, "2 · 128 · 8 = 2,048 numbers", 15, QUIET)
    d.text(MARGIN, 76, "the weight in use  =", 17, anchor="start")

    # What is known about it.
    d.box(MARGIN, 340, 520, 38, "y = W x + (lora_alpha / r) · B (A x)", "soft", 17, mono=True)
    d.note(
        MARGIN,
        408,
        "Only A and B are trained. B begins at 0: at first no change.\n"
        "merge_lora adds the product to W: then there is no extra work.",
        15,
    )


def _draw_mla_queries(d: Drawing) -> None:
    """Draw the two parts of a query, and what meets in attention."""
    # Queries.
    d.arrow((180, 74), (90, 74), (90, 116))
    d.box(MARGIN, 118, 140, 36, "q_proj", "sky", 16, mono=True)
    d.arrow((60, 154), (60, 204))
    d.arrow((130, 154), (130, 204))
    d.text(138, 184, "rotate", 15, QUIET, "start")
    d.box(MARGIN, 206, 74, 40, "q: 32", "soft", 16, mono=True)
    d.box(98, 206, 74, 40, "q: 16", "soft", 16, mono=True)
    d.text(96, 270, "per head", 15, QUIET)

    # Together.
    d.arrow((540, 240), (540, 494))
    d.arrow((237, 446), (237, 494))
    d.arrow((357, 446), (357, 494))
    d.arrow((60, 246), (60, 494))
    d.box(
        MARGIN,
        496,
        520,
        60,
        "attention: q = [32 | 16],  k = [32 | 16]\nall heads share the rotated 16",
        "main",
        16,
    )
    d.note(MARGIN, 588, "MHA would keep 2 · 4 · 32 = 256 numbers per token and layer.", 15)
    d.note(
        MARGIN,
        614,
        "Absorbed form: multiply the query by the matrix of kv_b_proj,\n"
        "not every key. Same result, less work for long texts.",
        15,
    )


@diagram(
    "mla",
    656,
    "MLA: keep one latent for keys and values",
    "A linear layer makes a latent of R = 32 numbers and one rotated key of 16 numbers from the "
    "vector x. Only these are kept in the cache. From the normalized latent kv_b_proj makes, for "
    "each head, the part of the key that is not rotated and the value. Each head's key is that "
    "part and the shared rotated key. Queries have the same two parts.",
)
def draw_mla(d: Drawing) -> None:
    """Draw compression, cache, expansion and the two parts of a query."""
    # Compress.
    d.box(180, 56, 200, 36, "x   (D = 128)", "soft", 17, mono=True)
    d.arrow((380, 74), (450, 74), (450, 116))
    d.box(330, 118, 210, 36, "kv_a_proj_with_mqa", "sky", 16, mono=True)
    d.box(300, 178, 254, 96, "", "gold", dashed=True)
    d.arrow((380, 154), (380, 204))
    d.arrow((490, 154), (490, 204))
    d.text(482, 196, "rotate", 15, QUIET, "end")
    d.text(370, 196, "norm", 15, QUIET, "end")
    d.box(310, 206, 120, 34, "latent 32", "main", 16)
    d.box(440, 206, 104, 34, "key 16", "main", 16)
    d.text(428, 264, "kept in the cache: 48", 15)

    # Expand to heads.
    d.arrow((360, 274), (360, 312))
    d.box(280, 314, 160, 36, "kv_b_proj", "sky", 16, mono=True)
    for i in range(4):
        y = 386 + i * 6
        d.box(296 + i * 6, y, 86, 40, "", "purple")
        d.box(176 + i * 6, y, 86, 40, "", "purple")
    d.box(194, 404, 86, 40, "k: 32", "purple", 16, mono=True)
    d.box(314, 404, 86, 40, "v: 32", "purple", 16, mono=True)
    d.arrow((320, 350), (238, 382))
    d.arrow((360, 350), (350, 382))
    d.text(412, 408, "for each of", 15, QUIET, "start")
    d.text(412, 428, "H = 4 heads", 15, QUIET, "start")
    _draw_mla_queries(d)


@diagram(
    "checkpoint",
    560,
    "A checkpoint: three files, and the names inside",
    "A folder with config.json, model.safetensors and tokenizer.json. Inside model.safetensors the "
    "names follow the modules: model.embed_tokens.weight with shape 803, 128; for each layer "
    "input_layernorm, self_attn with q_proj, k_proj, v_proj, o_proj, post_attention_layernorm, and "
    "mlp with gate_proj, up_proj, down_proj; and model.norm.weight.",
)
def draw_checkpoint(d: Drawing) -> None:
    """Draw the files of a folder, and the tree of weight names."""
    # Files.
    d.box(MARGIN, 62, 166, 54, "config.json\nsizes, family", "gold", 15, bold=True)
    d.box(197, 62, 166, 54, "model.safetensors\nweights", "main", 15, bold=True)
    d.box(374, 62, 166, 54, "tokenizer.json\ntext to ids", "sky", 15, bold=True)
    d.arrow((280, 116), (280, 142))

    # Names and shapes.
    d.box(MARGIN, 144, 520, 348, "", "white")
    lines = [
        (0, "model.embed_tokens.weight", "(803, 128)", "soft"),
        (0, "model.layers.0.", "block 0", "grey"),
        (1, "input_layernorm.weight", "(128,)", ""),
        (1, "self_attn.q_proj.weight", "(128, 128)", ""),
        (1, "… k_proj, v_proj, o_proj", "(128, 128)", ""),
        (1, "… q_norm, k_norm", "(32,)", ""),
        (1, "post_attention_layernorm.weight", "(128,)", ""),
        (1, "mlp.gate_proj, up_proj", "(192, 128)", ""),
        (1, "mlp.down_proj.weight", "(128, 192)", ""),
        (0, "model.layers.1. and 2.", "the same", "grey"),
        (0, "model.norm.weight", "(128,)", "soft"),
    ]
    for i, (depth, name, shape, kind) in enumerate(lines):
        y = 154 + i * 30
        if kind:
            d.box(28, y, 504, 27, "", kind)
        d.text(38 + 28 * depth, y + 19, name, 15, anchor="start", mono=True)
        d.text(524, y + 19, shape, 15, QUIET, "end", mono=True)
    d.note(
        MARGIN,
        518,
        "lm_head.weight is not stored: it is the embedding table itself\n"
        "(tie_word_embeddings). A family is a kind of model.",
        15,
    )


@diagram(
    "shortconv",
    360,
    "A short convolution: itself, one back, two back",
    "Seven positions in a row: four of document 0 and three of document 1. Each output gets an "
    "arrow from the input at its position and from the two inputs before it. Arrows that would "
    "cross from document 0 to document 1 are dashed and red: the mask removes them.",
)
def draw_shortconv(d: Drawing) -> None:
    """Draw inputs below, outputs above, and the taps between them."""
    documents = [0, 0, 0, 0, 1, 1, 1]
    paints = ["soft" if document == 0 else "gold" for document in documents]
    subscripts = "₀₁₂₃₄₅₆"
    d.text(MARGIN, 72, "outputs", 15, QUIET, "start")
    middles = d.row(24, 84, [f"y{i}" for i in subscripts], 68, 38, paints, 6, 16)

    # Each output reads its own position and the two before it.
    for t, x in enumerate(middles):
        for distance in (2, 1, 0):
            if distance > t:
                continue
            source = middles[t - distance]
            crosses = documents[t] != documents[t - distance]
            color = RED if crosses else (BLUE if t == 3 else GREY)
            thick = 3.0 if t == 3 else 1.8
            d.arrow((source, 228), (x, 124), color=color, thick=thick, dashed=crosses)

    # The inputs, and to which document they belong.
    d.row(24, 230, [f"u{i}" for i in subscripts], 68, 38, paints, 6, 16)
    d.text(24 + 145, 292, "document 0", 15, QUIET)
    d.text(24 + 4 * 74 + 108, 292, "document 1", 15, QUIET)
    d.text(MARGIN, 320, "Blue: the three taps of one output.", 15, BLUE, "start")
    d.text(
        MARGIN, 344, "Red: taps into another document, which the mask removes.", 15, RED, "start"
    )
