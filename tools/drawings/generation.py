"""Diagrams of part 2: the cache, prefill and decode, sampling, speculative decoding, beams."""

from .canvas import BLUE, GREY, INK, MARGIN, QUIET, RED, Drawing, diagram


@diagram(
    "cache",
    690,
    "The cache fills; a ring wraps at the window",
    "Above, a full cache with 8 places after 4, 5 and 6 tokens: each new key and value goes into "
    "the next place. Below, a ring of 4 slots for a window of 4 tokens: position 4 is written over "
    "position 0, position 5 over position 1, so that the memory does not grow.",
)
def draw_cache(d: Drawing) -> None:
    """Draw a full cache and a ring at three moments each."""
    words = ["␣Mia", "␣was", "␣in", "␣the", "␣hall", "."]
    d.text(MARGIN, 72, "KVCache: memory for all positions, taken once", 16, anchor="start")
    d.text(MARGIN, 94, "Each place holds a key and a value, in every layer.", 15, QUIET, "start")
    for i, length in enumerate((4, 5, 6)):
        y = 112 + i * 56
        labels = words[:length] + [""] * (8 - length)
        new = 4 if i == 0 else 1
        kinds = ["soft"] * (length - new) + ["main"] * new + ["empty"] * (8 - length)
        d.row(MARGIN, y, labels, 53, 36, kinds, 3, 14)
        d.text(474, y + 24, "prefill" if i == 0 else "decode", 15, QUIET, "start")
    d.row(MARGIN, 280, [str(i) for i in range(8)], 53, 22, ["empty"] * 8, 3, 14)
    d.text(474, 297, "place", 15, QUIET, "start")

    # The ring.
    d.text(MARGIN, 352, "WindowStore: a ring for a sliding window", 16, anchor="start")
    d.text(MARGIN, 374, "window 4, spare 1: slots = 4 − 1 + 1 = 4", 15, QUIET, "start")
    rings = [["0", "1", "2", "3"], ["4", "1", "2", "3"], ["4", "5", "2", "3"]]
    notes = ["after 4 tokens", "position 4 → slot 4 mod 4 = 0", "position 5 → slot 5 mod 4 = 1"]
    for i, ring in enumerate(rings):
        y = 394 + i * 56
        kinds = ["main" if i == 0 or k == i - 1 else "soft" for k in range(4)]
        labels = [words[int(position)] for position in ring]
        d.row(MARGIN, y, labels, 66, 36, kinds, 3, 15)
        d.text(310, y + 24, notes[i], 15, QUIET, "start")
    d.row(MARGIN, 562, ["0", "1", "2", "3"], 66, 22, "empty", 3, 14)
    d.text(310, 579, "slot", 15, QUIET, "start")
    d.arrow((290, 600), (300, 600), (300, 616), (34, 616), (34, 588), color=RED)
    d.text(166, 636, "after the last slot comes slot 0", 15, RED)
    d.text(
        MARGIN,
        670,
        "Dark: written in this pass. What the window hides is lost.",
        15,
        QUIET,
        "start",
    )


@diagram(
    "prefill-decode",
    560,
    "Prefill reads the prompt, decode adds tokens",
    "In prefill the four prompt tokens go through the model at once: 4 queries, 4 keys, a "
    "triangular mask. In each decode step one token goes in: 1 query and 5, then 6 keys. All keys "
    "but the newest come from the cache.",
)
def draw_prefill_decode(d: Drawing) -> None:
    """Draw the attention maps of one prefill and two decode steps."""
    kinds = {"n": "main", "c": "sky", ".": "empty"}
    columns = [(30, "prefill", 4), (230, "decode", 5), (400, "decode", 6)]
    for i, (x, name, S) in enumerate(columns):
        d.text(x, 78, f"{i + 1}. {name}", 17, anchor="start", bold=True)
        T = 4 if i == 0 else 1
        d.text(x, 102, f"T = {T}, S = {S}", 16, anchor="start", mono=True)
    cells = ["n...", "nn..", "nnn.", "nnnn"]
    d.grid(78, 150, cells, 24, kinds)
    for k, word in enumerate(("␣Mia", "␣was", "␣in", "␣the")):
        d.text(72, 167 + 24 * k, word, 14, anchor="end", mono=True)
    d.grid(262, 222, ["ccccn"], 24, kinds)
    d.text(310, 212, "␣hall", 14, mono=True)
    d.grid(390, 222, ["cccccn"], 24, kinds)
    d.text(462, 212, ".", 16, mono=True)
    d.text(MARGIN, 138, "query", 15, QUIET, "start")
    d.text(126, 138, "keys →", 15, QUIET)

    # Shapes.
    d.text(MARGIN, 296, "shapes", 16, anchor="start", bold=True)
    d.box(MARGIN, 308, 172, 56, "q (B, H, 4, d)\nk (B, K, 4, d)", "soft", 15, mono=True)
    d.box(200, 308, 172, 56, "q (B, H, 1, d)\nk (B, K, 5, d)", "soft", 15, mono=True)
    d.box(380, 308, 160, 56, "q (B, H, 1, d)\nk (B, K, 6, d)", "soft", 15, mono=True)
    for x, word in ((106, "␣hall"), (286, "."), (460, "␣Sam")):
        d.arrow((x, 364), (x, 398))
        d.box(x - 46, 400, 92, 36, word, "gold", 16, mono=True)
    d.text(MARGIN, 460, "the token that is drawn", 15, QUIET, "start")

    # What the colors mean.
    d.box(MARGIN, 484, 22, 22, "", "main")
    d.text(50, 501, "computed in this pass", 15, anchor="start")
    d.box(270, 484, 22, 22, "", "sky")
    d.text(300, 501, "keys from the cache", 15, anchor="start")
    d.text(
        MARGIN, 538, "A decode step computes one row only, whatever the length.", 15, QUIET, "start"
    )


@diagram(
    "generation-loop",
    690,
    "The generation loop",
    "The text goes into the model, which uses the cache. The logits of the last position are "
    "changed by the sampling rules in this order: repetition penalty, temperature, top-k, top-p, "
    "min-p. A uniform random number picks a token, which is appended. The loop ends at an end "
    "token or after max_new_tokens.",
)
def draw_generation_loop(d: Drawing) -> None:
    """Draw the circle from text to logits to a token, with the rules beside it."""
    # Down the left side.
    d.row(MARGIN, 62, ["␣Mia", "␣was", "␣in", "␣the"], 62, 36, "soft", 4, 16)
    d.arrow((150, 98), (150, 128))
    d.box(60, 130, 180, 46, "model", "main", 18, bold=True)
    d.box(320, 130, 180, 46, "KV cache", "sky", 17)
    d.arrow((320, 144), (242, 144))
    d.arrow((240, 164), (318, 164))
    d.arrow((150, 176), (150, 214))
    d.text(162, 200, "logits of the last position (B, V)", 15, QUIET, "start")

    # Rules in order.
    d.box(40, 216, 480, 190, "", "white", dashed=True)
    d.text(510, 425, "process_logits", 15, QUIET, "end", mono=True)
    rules = [
        ("repetition_penalty", "tokens of the text become less likely"),
        ("temperature", "divide the logits"),
        ("top_k", "keep the k most likely"),
        ("top_p", "keep the fewest that reach p together"),
        ("min_p", "keep those near the most likely one"),
    ]
    for i, (name, words) in enumerate(rules):
        y = 226 + i * 35
        d.box(52, y, 178, 30, name, "gold", 15, mono=True)
        d.text(240, y + 20, words, 14, QUIET, "start")
        if i:
            d.arrow((141, y - 5), (141, y))
    d.arrow((150, 406), (150, 436))
    d.text(162, 427, "softmax", 15, QUIET, "start")

    # Draw a token.
    d.row(60, 438, ["␣hall", "␣barn", "…"], 60, 32, ["soft", "main", "soft"], 0, 15)
    d.text(262, 452, "cumulative probabilities; a uniform", 15, QUIET, "start")
    d.text(262, 472, "number in [0, 1) hits one token", 15, QUIET, "start")
    d.arrow((150, 470), (150, 502))
    d.box(100, 504, 100, 38, "␣barn", "main", 17, mono=True)
    d.arrow((150, 542), (150, 580))
    d.box(60, 582, 330, 44, "end token, or max_new_tokens reached?", "grey", 15)
    d.arrow((225, 626), (225, 652))
    d.text(237, 648, "yes: stop", 15, QUIET, "start")
    d.arrow((390, 604), (536, 604), (536, 80), (290, 80), color=BLUE)
    d.text(400, 596, "no: append", 15, BLUE, "start")


@diagram(
    "batch-padding",
    540,
    "Prompts of different lengths: pad on the left",
    "Three prompts of 2, 4 and 3 tokens end in the same column, so that all rows get their next "
    "token in one step. Empty places stand on the left. Padding is masked, and positions count the "
    "tokens of a row only.",
)
def draw_batch_padding(d: Drawing) -> None:
    """Draw three padded rows, their positions and the new column."""
    texts = [["pad", "pad", "␣Mia", "␣was"], ["␣Sam", "␣and", "␣Tom", "␣were"]]
    texts += [["pad", "␣It", "␣was", "␣a"]]
    news = ["␣in", "␣in", "␣cold"]
    places = [["0", "0", "0", "1", "2"], ["0", "1", "2", "3", "4"], ["0", "0", "1", "2", "3"]]
    d.text(200, 74, "prompts", 16, bold=True)
    d.text(480, 74, "new token", 16, bold=True)
    for i, words in enumerate(texts):
        y = 88 + i * 52
        kinds = ["empty" if word == "pad" else "soft" for word in words]
        d.row(MARGIN, y, words, 92, 38, kinds, 4, 16)
        d.box(432, y, 96, 38, news[i], "main", 16, mono=True)
        d.arrow((402, y + 19), (428, y + 19))
    d.note(MARGIN, 262, "All prompts end in one column: one step serves every row.", 15)

    # Positions and mask.
    d.text(MARGIN, 304, "positions: padding does not count", 16, anchor="start", bold=True)
    for i, row in enumerate(places):
        kinds = ["empty" if texts[i][k] == "pad" else "sky" for k in range(4)] + ["sky"]
        labels = [
            "–" if kind == "empty" else number for kind, number in zip(kinds, row, strict=True)
        ]
        d.row(MARGIN, 318 + i * 38, labels, 60, 32, kinds, 4, 16)
    d.text(390, 304, "keys seen", 16, anchor="start", bold=True)
    for i, cells in enumerate(["..nnn", "nnnnn", ".nnnn"]):
        d.grid(392, 318 + i * 38, [cells], 30, {"n": "main", ".": "empty"})
    d.note(
        MARGIN,
        460,
        "With padding on the right, the next token would have to go into\n"
        "a gap. The mask hides padding as a key. An empty place is −1.",
        15,
    )


def _draw_decisions(d: Drawing, left: float, middles: list[float]) -> None:
    """Draw which draft tokens are accepted, and what replaces the rest."""
    # The decisions.
    chances = ["1", "1", "1/6", "–"]
    d.row(left, 364, chances, 100, 34, "white", 6, 16)
    d.text(106, 380, "accept with", 15, anchor="end")
    d.text(106, 398, "min(1, p/q)", 14, QUIET, "end", mono=True)
    for x in middles[:3]:
        d.arrow((x, 398), (x, 424))
    decisions = ["accepted", "accepted", "rejected", "dropped"]
    d.row(left, 426, decisions, 100, 36, ["sky", "sky", "warm", "empty"], 6, 15, mono=False)
    d.arrow((middles[2], 462), (middles[2], 496), color=RED)
    d.box(
        228,
        498,
        312,
        58,
        "draw from max(0, p − q), scaled to\nsum 1: what the draft lacks",
        "warm",
        15,
    )
    d.arrow((middles[2], 556), (middles[2], 584), color=RED)
    kinds = ["sky", "sky", "hot"]
    d.row(left, 586, ["␣was", "␣in", "␣the"], 100, 36, kinds, 6, 16)
    d.text(106, 609, "new text", 15, anchor="end")
    d.note(
        MARGIN,
        654,
        "If all four are accepted, the same pass gives a fifth token.\n"
        "The text has exactly the target's distribution.",
        15,
    )


@diagram(
    "speculative",
    700,
    "Speculative decoding: accept or replace",
    "A small draft model proposes four tokens. The target model reads them in one pass. Token by "
    "token the draft is accepted with probability min(1, p / q). The first two are accepted, the "
    "third is rejected, the fourth dropped. In place of the third a token is drawn from what q "
    "lacks of p.",
)
def draw_speculative(d: Drawing) -> None:
    """Draw proposals, probabilities, decisions, and the replacement."""
    # The draft.
    left = 118.0
    d.box(MARGIN, 66, 520, 34, "draft: small and fast, 4 passes", "grey", 16)
    words = ["␣was", "␣in", "␣attic", "."]
    middles = d.row(left, 126, words, 100, 36, "gold", 6, 16)
    for x in middles:
        d.arrow((x, 100), (x, 124))
    d.text(106, 149, "draft tokens", 15, anchor="end")

    # The target.
    for x in middles:
        d.arrow((x, 162), (x, 184))
    d.box(MARGIN, 186, 520, 40, "target: reads all of them in ONE pass", "main", 17, bold=True)
    draft = [0.9, 0.8, 0.6, 0.9]
    target = [0.95, 0.9, 0.1, 0.9]
    for x, p, q in zip(middles, target, draft, strict=True):
        d.box(x - 34, 326 - 74 * p, 30, 74 * p, "", "main")
        d.box(x + 4, 326 - 74 * q, 30, 74 * q, "", "gold")
        d.text(x - 19, 344, f"{p:g}", 14, mono=True)
        d.text(x + 19, 344, f"{q:g}", 14, mono=True)
    d.line((left, 326), (540, 326), color=GREY)
    d.text(106, 280, "p of target", 15, BLUE, "end", bold=True)
    d.text(106, 302, "q of draft", 15, anchor="end")
    _draw_decisions(d, left, middles)


@diagram(
    "beams",
    580,
    "Beam search: follow the n most likely texts",
    "Two beams. From the start the tokens A with 0.6 and B with 0.4 are kept. Continued by every "
    "token they give A C 0.30, A D 0.30, B C 0.36, B D 0.04. The two best, B C and A C, stay. The "
    "best text begins with B although A was the best first token.",
)
def draw_beams(d: Drawing) -> None:
    """Draw a tree with two beams over two steps."""
    d.text(MARGIN, 72, "n = 2 beams, probabilities of whole texts", 15, QUIET, "start")
    # The first step.
    d.box(MARGIN, 226, 92, 42, "prompt", "grey", 16)
    firsts = [("␣Mia", "0.6", 140), ("␣Sam", "0.4", 312)]
    for word, p, y in firsts:
        d.arrow((112, 247), (164, y + 21))
        d.box(166, y, 120, 42, f"{word} {p}", "main", 16, mono=True)
    d.box(166, 420, 120, 42, "␣Tom 0.0", "empty", 16, mono=True, dashed=True)
    d.arrow((112, 247), (164, 441), color=GREY, dashed=True)

    # The second step: all continuations compete.
    seconds = [
        ("␣Mia ␣was", "0.6 · 0.5", "0.30", 96, "main", 161),
        ("␣Mia ␣had", "0.6 · 0.4", "0.24", 176, "empty", 161),
        ("␣Sam ␣was", "0.4 · 0.9", "0.36", 286, "main", 333),
        ("␣Sam ␣had", "0.4 · 0.1", "0.04", 366, "empty", 333),
    ]
    for words, product, total, y, kind, begin in seconds:
        is_kept = kind == "main"
        color = INK if is_kept else GREY
        d.arrow((286, begin), (344, y + 30), color=color, dashed=not is_kept)
        d.box(
            346,
            y,
            194,
            60,
            f"{words}\n{product} = {total}",
            kind,
            15,
            mono=True,
            dashed=not is_kept,
        )
    d.text(226, 124, "step 1", 16, bold=True)
    d.text(443, 82, "step 2", 16, bold=True)

    # What to see.
    d.text(MARGIN, 506, "dark: kept      dashed: dropped", 15, anchor="start")
    d.note(
        MARGIN,
        536,
        "The best text of two tokens begins with ␣Sam, although ␣Mia\n"
        "is more likely as first token. A greedy choice misses it.",
        15,
    )
