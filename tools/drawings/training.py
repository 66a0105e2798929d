"""Diagrams of parts 4 to 6: steps, runs, evaluation, chats, preferences, experiments, commands."""

from .canvas import BLACK, BLUE, GREY, MARGIN, QUIET, RED, WHITE, Drawing, diagram


def _draw_engine_and_folder(d: Drawing) -> None:
    """Draw what works for the trainer."""
    # The engine, below on the left; the folder, below on the right.
    d.arrow((190, 370), (120, 428))
    d.arrow((140, 428), (210, 370))
    d.text(136, 396, "batch", 15, QUIET, "end")
    d.text(178, 414, "loss, norm", 15, QUIET, "start")
    d.box(
        MARGIN,
        430,
        240,
        84,
        "Engine\none optimizer step:\ngradients, clip, update",
        "sky",
        16,
        bold=True,
    )
    d.arrow((360, 370), (430, 428))
    d.text(410, 396, "lines, checkpoints", 15, QUIET, "start")
    d.box(
        300,
        430,
        240,
        84,
        "RunFolder\nmetrics.jsonl, samples.txt,\ncheckpoints/",
        "purple",
        16,
        bold=True,
    )

    # Hooks.
    d.box(
        MARGIN,
        546,
        520,
        66,
        "Hook: your own code, called at\non_gradients, on_step, on_validation, on_checkpoint",
        "white",
        16,
        bold=True,
        dashed=True,
    )
    d.arrow((280, 370), (280, 544), dashed=True)


@diagram(
    "trainer",
    640,
    "The trainer and its four parts",
    "The Trainer is in the middle. The Stage, above, gives it batches, the loss, validation, "
    "samples and how to save: it is what differs between pretraining, fine-tuning and preference "
    "tuning. The Engine, on the left, takes one optimizer step. The RunFolder, on the right, keeps "
    "metrics, samples and checkpoints. Hooks, below, are your own code.",
)
def draw_trainer(d: Drawing) -> None:
    """Draw the trainer in the middle, and what passes between it and its parts."""
    # The stage says what differs between kinds of training.
    d.box(
        100,
        60,
        360,
        104,
        "Stage: what is trained, on what\nnext_batch, loss, validation_batches\n"
        "sample, save, load\nPretrainStage, ChatStage, DPOStage",
        "gold",
        16,
        bold=True,
    )
    d.arrow((280, 164), (280, 218))
    d.text(292, 198, "batch of step n, loss", 15, QUIET, "start")
    d.box(
        150,
        220,
        260,
        150,
        "Trainer\n\nwhile steps are left:\ntake one step\nthen what is due",
        "main",
        17,
        bold=True,
    )
    _draw_engine_and_folder(d)


@diagram(
    "step",
    690,
    "One optimizer step",
    "A batch is split into micro-batches. Each goes forward and backward, and the gradients of the "
    "summed losses add up. Then they are divided by the number of targets, clipped to length 1, "
    "and checked. The optimizers change the weights with the learning rate of this step, and the "
    "gradients are cleared.",
)
def draw_step(d: Drawing) -> None:
    """Draw the way of a batch to new weights."""
    d.box(60, 60, 440, 38, "batch: B rows", "soft", 17)
    names = ["rows 0–3", "rows 4–7"]
    for i, name in enumerate(names):
        x = 60 + 230 * i
        d.arrow((x + 105, 98), (x + 105, 122))
        d.box(x, 124, 210, 38, name, "soft", 16)
        d.arrow((x + 105, 162), (x + 105, 184))
        d.box(x, 186, 210, 56, "forward: summed loss,\nnumber of targets", "sky", 15)
        d.arrow((x + 105, 242), (x + 105, 264))
        d.box(x, 266, 210, 38, "backward", "sky", 16)
        d.arrow((x + 105, 304), (x + 105, 332))

    # Together.
    d.box(60, 334, 440, 44, "gradients add up: of the SUM of losses", "gold", 16)
    d.arrow((280, 378), (280, 398))
    d.box(60, 400, 440, 44, "divide by all targets: now of the mean loss", "gold", 16)
    d.arrow((280, 444), (280, 464))
    d.box(60, 466, 440, 44, "clip: length at most grad_clip = 1", "gold", 16)
    d.arrow((280, 510), (280, 530))
    d.box(60, 532, 440, 44, "check: not finite, or a spike? stop", "warm", 16)
    d.arrow((280, 576), (280, 596))
    d.box(60, 598, 440, 44, "optimizers: new weights, at lr(step)", "main", 17, bold=True)
    d.text(280, 672, "Dividing at the end makes uneven micro-batches exact.", 15, QUIET)


@diagram(
    "run-folder",
    560,
    "What a run leaves in its folder",
    "The folder runs/default holds config.yaml with every setting, metrics.jsonl with a line of "
    "figures every 10 steps, samples.txt, loss.png, the finished model, and checkpoints. A "
    "checkpoint holds the model, trainer.pt with the state of the optimizers, and checksums.json. "
    "It is written into a hidden folder that gets its name in one step at the end.",
)
def draw_run_folder(d: Drawing) -> None:
    """Draw the tree of files with a word on each."""
    # Depth, name, what it is for, paint.
    lines = [
        (0, "runs/default/", "", "main"),
        (1, "config.yaml", "every setting", "gold"),
        (1, "metrics.jsonl", "a line every 10 steps", "sky"),
        (1, "samples.txt", "what the model wrote", "sky"),
        (1, "loss.png", "the curve", "sky"),
        (1, "config.json", "the finished model,", "purple"),
        (1, "model.safetensors", "ready to load", "purple"),
        (1, "tokenizer.json", "", "purple"),
        (1, "checkpoints/", "the last two are kept", "grey"),
        (2, "step-003200/", "all that resuming needs:", "grey"),
        (3, "model.safetensors", "weights", "white"),
        (3, "trainer.pt", "optimizers, progress", "white"),
        (3, "checksums.json", "finds damage", "white"),
    ]
    for i, (depth, name, words, kind) in enumerate(lines):
        x = MARGIN + 30 * depth
        y = 58 + i * 34
        d.box(x, y, 196, 29, name, kind, 15, mono=True)
        d.text(x + 206, y + 20, words, 15, QUIET, "start")
    # Resuming.
    d.line((552, 366), (552, 496), color=RED, thick=3)
    d.text(544, 362, "--resume reads", 15, RED, "end")
    d.note(
        MARGIN,
        524,
        "A checkpoint is written under a hidden name and renamed when it\n"
        "is complete: after a crash it is there as a whole, or not at all.",
        14,
    )


@diagram(
    "evaluate",
    500,
    "A loss is the floor plus a distance",
    "Four horizontal bars: all tokens, free, tracked and fixed ones. Each bar is the floor, "
    "dark, up "
    "to a dashed line, plus the distance, red. Free tokens have a high floor. Tracked and fixed "
    "tokens have a floor near 0, so that the loss of tracked tokens is all distance: there the "
    "model "
    "has still to learn. The lengths are an example.",
)
def draw_evaluate(d: Drawing) -> None:
    """Draw stacked bars of floor and distance for each kind of token."""
    # Name, example, length of the floor, length of the distance.
    bars = [
        ("all tokens", "", 130, 90),
        ("free", "␣cold: a random choice", 300, 26),
        ("tracked", "␣garden: where Mia is", 3, 190),
        ("fixed", "␣in, ␣the, the full stop", 3, 12),
    ]
    d.text(140, 74, "loss in nats per token →", 15, QUIET, "start")
    for i, (name, example, floor, distance) in enumerate(bars):
        y = 90 + 82 * i
        d.text(128, y + 24, name, 17, anchor="end", bold=True)
        d.box(140, y, floor, 36, "", "main")
        d.box(140 + floor, y, distance, 36, "", "warm")
        d.line((140 + floor, y - 8), (140 + floor, y + 44), color=BLACK, thick=2.5, dashed=True)
        d.text(150, y + 62, example, 15, QUIET, "start", mono=True)
    d.text(205, 114, "floor", 16, WHITE)
    d.text(315, 114, "distance", 16)
    d.note(
        MARGIN,
        434,
        "The corpus gives the floor of each token exactly: no model is below\n"
        "it but by chance, or by a leak. What is left to learn is the distance;\n"
        "here it lies in the tracked tokens. (The lengths are an example.)",
        14,
    )


CHAT = [
    ("<|im_start|>user", "grey"),
    ("Where was Mia?<|im_end|>", "grey"),
    ("<|im_start|>assistant", "grey"),
    ("Mia was in the garden.", "main"),
    ("<|im_end|>", "main"),
]


@diagram(
    "chat-mask",
    590,
    "A chat as tokens: only the answer is learned",
    "Two messages are written with the marks im_start and im_end. The labels of the user's message "
    "and of all role lines are minus 100. The labels of the assistant's words and of the im_end "
    "behind them are their ids, so that the model learns what to say and when to stop.",
)
def draw_chat_mask(d: Drawing) -> None:
    """Draw messages, the rendered text, and tokens with their labels."""
    # Messages and text.
    d.box(MARGIN, 60, 254, 40, "user: Where was Mia?", "grey", 16)
    d.box(286, 60, 254, 40, "assistant: Mia was in the …", "main", 16)
    d.arrow((280, 102), (280, 128))
    d.text(292, 120, "chat template", 15, QUIET, "start")
    for i, (line, kind) in enumerate(CHAT):
        d.box(90, 130 + i * 36, 300, 32, line, kind, 16, mono=True)
        words = "learned" if kind == "main" else "not learned"
        d.text(402, 151 + i * 36, words, 15, BLUE if kind == "main" else QUIET, "start")

    # Tokens and labels of the end.
    d.arrow((240, 312), (240, 338))
    words = ["?", "<|im…", "…", "ant", "\\n", "M", "ia", "␣was", "…", "<|im…"]
    kinds = ["grey"] * 5 + ["main"] * 5
    left = 72.0
    d.row(left, 340, words, 44, 34, kinds, 3, 13)
    d.text(64, 362, "ids", 15, anchor="end")
    labels = ["−100"] * 5 + ["48", "393", "266", "…", "3"]
    d.row(left, 380, labels, 44, 34, ["empty"] * 5 + ["gold"] * 5, 3, 15)
    d.text(64, 402, "labels", 15, anchor="end")
    d.brace(left, left + 232, 420, "−100: no loss")
    d.brace(left + 235, left + 467, 420, "loss on these")
    d.note(
        MARGIN,
        480,
        "The mark <|im_end|> (id 3) is learned too: the model has to\n"
        "stop. The question is read, so that the answer depends on it, but\n"
        "the model is not trained to write questions.",
        15,
    )


@diagram(
    "sft",
    560,
    "Fine-tuning: the same training on other rows",
    "A pretrained model continues stories. Conversations become packed rows whose labels are the "
    "answers only. The same trainer with a lower learning rate trains either all weights or a LoRA "
    "adapter. The result is a model that answers and stops.",
)
def draw_sft(d: Drawing) -> None:
    """Draw base model and chats going into the trainer, and the chat model coming out."""
    d.box(MARGIN, 62, 250, 76, "pretrained model\n(43) continues stories", "soft", 16, bold=True)
    d.box(290, 62, 250, 76, "conversations\n(50) labels: answers only", "gold", 16, bold=True)
    d.arrow((145, 138), (220, 178))
    d.arrow((415, 138), (340, 178))
    d.box(130, 180, 300, 60, "the same Trainer\nChatStage, fewer steps", "main", 17, bold=True)
    d.arrow((220, 240), (145, 276))
    d.arrow((340, 240), (415, 276))
    d.box(MARGIN, 278, 250, 56, "all weights", "sky", 17)
    d.box(290, 278, 250, 56, "or a LoRA adapter (19)", "purple", 17)
    d.arrow((145, 334), (220, 370))
    d.arrow((415, 334), (340, 370))
    d.box(130, 372, 300, 40, "chat model", "main", 17, bold=True)

    # Before and after.
    d.text(MARGIN, 448, "asked: Where was Mia?", 16, anchor="start", bold=True)
    d.text(MARGIN, 476, "before", 15, RED, "start")
    d.box(90, 458, 450, 30, "… no chat: writes on, does not stop", "warm", 15)
    d.text(MARGIN, 514, "after", 15, BLUE, "start")
    d.box(90, 496, 450, 30, "Mia was in the garden.<|im_end|>", "sky", 15, mono=True)


@diagram(
    "dpo",
    690,
    "DPO: the loss of one pair of answers",
    "The prompt has a chosen and a rejected answer. The model and the frozen reference give the "
    "log-probability of each: minus 4 and minus 6 for the chosen one, minus 14 and minus 10 for "
    "the rejected one. With beta 0.1 the rewards are 0.2 and minus 0.4, the gap is 0.6, and the "
    "loss "
    "minus ln sigmoid of 0.6 is 0.44.",
)
def draw_dpo(d: Drawing) -> None:
    """Draw two answers, four log-probabilities, two rewards, a gap and a loss."""
    d.box(MARGIN, 60, 520, 36, "prompt: Where was Mia?", "grey", 16)
    columns = [(MARGIN, "soft", "chosen", "Mia was in the garden."), (290, "warm", "rejected", "")]
    for x, kind, name, answer in columns:
        answer = answer or "In the garden. It was a …"
        d.arrow((x + 125, 96), (x + 125, 118))
        d.box(x, 120, 250, 56, f"{name}\n{answer}", kind, 16, bold=True)
        d.arrow((x + 60, 176), (x + 60, 206))
        d.arrow((x + 190, 176), (x + 190, 206))
        d.box(x, 208, 120, 44, "model", "main", 17)
        d.box(x + 130, 208, 120, 44, "reference\n(frozen)", "grey", 14)
        d.arrow((x + 60, 252), (x + 60, 280))
        d.arrow((x + 190, 252), (x + 190, 280))
    for x, number, kind in (
        (20, "−4", "soft"),
        (150, "−6", "grey"),
        (290, "−14", "warm"),
        (420, "−10", "grey"),
    ):
        d.box(x, 282, 120, 36, number, kind, 18, mono=True)
    d.text(280, 342, "log-probability of the whole answer, in nats", 15, QUIET)

    # Rewards, gap, loss.
    rewards = [(MARGIN, "soft", "0.1 · (−4 + 6) = 0.2"), (290, "warm", "0.1 · (−14 + 10) = −0.4")]
    for x, kind, words in rewards:
        d.arrow((x + 125, 350), (x + 125, 376))
        d.box(x, 378, 250, 40, words, kind, 16, mono=True)
    d.text(280, 442, "reward = beta · (model − reference)", 15, QUIET)
    d.arrow((145, 450), (220, 480))
    d.arrow((415, 450), (340, 480))
    d.box(120, 482, 320, 40, "gap = 0.2 − (−0.4) = 0.6", "purple", 17, mono=True)
    d.arrow((280, 522), (280, 548))
    d.box(120, 550, 320, 44, "loss = −ln σ(0.6) = 0.44", "main", 18, mono=True)
    d.note(
        MARGIN,
        626,
        "A larger gap means a smaller loss: the chosen answer gains on the\n"
        "rejected one, each compared with the reference.",
        15,
    )


@diagram(
    "grpo",
    690,
    "GRPO: sample, score, push up what was better",
    "For one prompt the model writes four answers. A program scores each: 1, 0, 1, 0. The "
    "advantage is the score minus the mean of the group, divided by its spread: plus 1, minus 1, "
    "plus 1, "
    "minus 1. The loss makes tokens of good answers more likely and of bad ones less likely, and "
    "keeps "
    "the model near a reference.",
)
def draw_grpo(d: Drawing) -> None:
    """Draw a group of answers with their scores and advantages, and the update."""
    d.box(MARGIN, 60, 520, 36, "prompt: Where was Mia?", "grey", 16)
    d.arrow((280, 96), (280, 120))
    d.box(160, 122, 240, 40, "model samples", "main", 17, bold=True)
    answers = ["garden", "hall", "garden", "attic"]
    scores = ["1", "0", "1", "0"]
    advantages = ["+1", "−1", "+1", "−1"]
    left = 120.0
    kinds = ["soft", "warm", "soft", "warm"]
    middles = d.row(left, 196, answers, 100, 38, kinds, 6, 16)
    for x in middles:
        d.arrow((280, 162), (x, 194), color=GREY)
        d.arrow((x, 234), (x, 264))
        d.arrow((x, 304), (x, 334))
        d.arrow((x, 374), (x, 408))
    d.text(108, 220, "a group", 15, anchor="end")
    d.row(left, 266, scores, 100, 38, "gold", 6, 18)
    d.text(108, 290, "score", 15, anchor="end")
    d.row(left, 336, advantages, 100, 38, kinds, 6, 18)
    d.text(108, 360, "advantage", 15, anchor="end")

    # The update.
    d.box(
        MARGIN,
        410,
        520,
        62,
        "loss: advantage × ratio of new and old probability,\nclipped, for every token",
        "purple",
        16,
    )
    d.arrow((280, 472), (280, 500))
    d.box(160, 502, 240, 40, "optimizer step", "main", 17, bold=True)
    d.arrow((400, 522), (552, 522), (552, 142), (402, 142), color=BLUE)
    d.note(
        MARGIN,
        582,
        "advantage = (score − mean of the group) / spread of the group.\n"
        "The score comes from a program that checks the answer: no\n"
        "pairs and no second model are needed. A term of the loss keeps\n"
        "the model near a reference.",
        15,
    )


@diagram(
    "experiment",
    560,
    "An experiment: variants, seeds, intervals",
    "A recipe and two variants are each trained with three seeds. Each run ends with its excess, "
    "the validation loss above the floor. A table gives the mean of each variant and its "
    "difference to the first, with a 95 percent interval over seeds. Only an interval without 0 "
    "shows a "
    "difference.",
)
def draw_experiment(d: Drawing) -> None:
    """Draw a grid of runs, and the intervals of their differences."""
    names = [("baseline", "main"), ("variant 1", "sky"), ("variant 2", "gold")]
    for k in range(3):
        d.text(194 + 84 * k, 76, f"seed {k}", 15, QUIET)
    for i, (name, kind) in enumerate(names):
        y = 88 + i * 54
        d.box(MARGIN, y, 120, 42, name, kind, 16, bold=True)
        d.row(156, y, ["run"] * 3, 76, 42, kind, 8, 16, mono=False)
        d.arrow((406, y + 21), (430, y + 21))
        d.box(432, y, 108, 42, "mean ± 95%", "white", 15)
    d.note(
        MARGIN,
        274,
        "Each run ends with its excess: validation loss − floor.\n"
        "With ablate, all variants get the same training FLOPs.",
        15,
    )

    # Differences with intervals.
    d.text(MARGIN, 330, "difference to the baseline", 17, anchor="start", bold=True)
    d.line((300, 350), (300, 456), thick=2, dashed=True)
    d.text(300, 476, "0", 16, bold=True)
    rows = [
        ("variant 1", 190, 170, 210, "better: interval below 0"),
        ("variant 2", 320, 250, 390, "may be luck"),
    ]
    for i, (name, middle, low, high, words) in enumerate(rows):
        y = 376 + 56 * i
        d.text(MARGIN, y + 5, name, 16, anchor="start")
        d.line((low, y), (high, y), color=BLUE, thick=3)
        d.line((low, y - 8), (low, y + 8), color=BLUE, thick=3)
        d.line((high, y - 8), (high, y + 8), color=BLUE, thick=3)
        d.circle(middle, y, 7, kind="main")
        x = 322 if i == 0 else 406
        d.text(x, y + 5, words, 15, QUIET, "start")
    d.note(MARGIN, 512, "One run per variant shows nothing: seeds alone move the loss.", 15)


@diagram(
    "command",
    584,
    "What happens to a command",
    "The line tinylm pretrain my.yaml with a flag is typed. flags.json, which loads without "
    "PyTorch, knows all flags and their help. Values come from the defaults, then the recipe file, "
    "then flags, the last one wins. Then PyTorch is loaded and the config checks every field. A "
    "mistake is one line and exit code 2. Otherwise the function of the command runs.",
)
def draw_command(d: Drawing) -> None:
    """Draw the way from typed words to a running function."""
    d.box(
        MARGIN, 60, 520, 40, "tinylm pretrain my.yaml --train.max-steps 500", "white", 16, mono=True
    )
    d.arrow((200, 100), (200, 130))
    d.box(60, 132, 280, 52, "cli (69): which command,\nwhich flags?", "soft", 16)
    d.box(400, 132, 140, 52, "flags.json\nhelp, types", "gold", 15)
    d.arrow((400, 158), (342, 158))
    d.arrow((200, 184), (200, 214))

    # Values.
    d.box(
        60,
        216,
        280,
        104,
        "recipes (61): values\n1. defaults of the config\n2. recipe file: my.yaml\n"
        "3. flags: the last one wins",
        "soft",
        15,
        bold=True,
    )

    # From here on PyTorch is needed.
    d.line((MARGIN, 362), (540, 362), color=GREY, dashed=True)
    d.text(540, 356, "above: without PyTorch", 15, QUIET, "end")
    d.arrow((200, 320), (200, 380))
    d.box(
        60,
        382,
        280,
        66,
        "commands (68)\nbuild the config,\ncheck every field",
        "soft",
        15,
        bold=True,
    )
    d.arrow((340, 415), (398, 415), color=RED)
    d.text(470, 386, "a mistake:", 15, RED)
    d.box(400, 394, 140, 44, "one line,\nexit code 2", "warm", 15)
    d.arrow((200, 448), (200, 478))
    d.box(60, 480, 280, 44, "run_pretrain(config)", "main", 16, mono=True)
    d.arrow((340, 502), (398, 502))
    d.box(400, 480, 140, 44, "runs/…", "purple", 16, mono=True)
    d.text(MARGIN, 560, "From Python the same: pretrain(PretrainConfig(...)).", 15, QUIET, "start")
