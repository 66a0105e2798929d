"""Compare learning from rewards with other ways to spend the same time; write grpo.json.

    python benchmarks/rewards.py --runs runs/speedrun-0/sft runs/speedrun-1/sft runs/speedrun-2/sft
    python benchmarks/rewards.py --runs runs/speedrun-0/sft --arms coin mentions

Each way ("arm") starts from the run of `tinylm sft` that is named, and trains on stories that this
run did not see. The i-th run has the seed i. What is in the file of results is not measured again,
so a stopped study goes on where it was. All figures are of one thread.
"""

import argparse
import contextlib
import io
import json
import math
import random
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import date
from functools import partial
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

import torch
from record import RESULTS, commit, interval, machine

import tinylm.shortconv  # noqa: F401  (adds its kind of layer)
from tinylm.chat import end_token_ids
from tinylm.corpus import Question, make_corpus
from tinylm.dpo import DPOConfig, dpo, kl_to_reference
from tinylm.evaluate import answer_all, as_chat, score_replies
from tinylm.files import DataConfig
from tinylm.generate import SamplingConfig
from tinylm.grpo import GRPOConfig, grpo
from tinylm.hub import load
from tinylm.model import TinyLM
from tinylm.pretrain import TrainConfig
from tinylm.rollouts import REWARDS, ScoredQuestion, exact, sample_groups, story_questions
from tinylm.sft import SFTConfig, sft

LONGEST = 24  # tokens of a reply
QUESTIONS_OF_SAMPLES = 1500  # questions that a model answers for its own training data


class Asked(NamedTuple):
    """Questions, and what a model samples for them."""

    questions: list[ScoredQuestion]
    texts: list[list[str]]  # of each question, its sampled replies
    logps: list[list[float]]  # of each reply
    tokens: int  # of all replies


def coin(question: ScoredQuestion, reply: str) -> float:
    """Return 0 or 1 by chance: a reward that says nothing."""
    return float(random.random() < 0.5)


def mentions(question: ScoredQuestion, reply: str) -> float:
    """Return 1 if the last word of the right answer stands anywhere in the reply."""
    word = (question.answer or "").split()[-1]
    return float(word in reply.replace(".", " ").split())


REWARDS["coin"] = coin
REWARDS["mentions"] = mentions


def sample_replies(
    run: tuple[TinyLM, object],  # model and tokenizer
    questions: list[ScoredQuestion],  # what is asked
    count: int,  # replies to each
    seed: int,  # of the noise
    longest: int = LONGEST,  # most tokens of a reply
) -> Asked:
    """Sample replies to each question at a temperature of 1."""
    model, tokenizer = run
    end_ids = end_token_ids(tokenizer)
    texts, logps = [], []
    tokens = 0

    # Sixteen questions at a time.
    for begin in range(0, len(questions), 16):
        part = questions[begin : begin + 16]
        prompts = [
            tokenizer.apply_chat_template(q.messages, add_generation_prompt=True) for q in part
        ]
        seeds = [seed * 1_000_003 + begin + i for i in range(len(part))]
        groups = sample_groups(model, prompts, count, SamplingConfig(longest), end_ids, seeds)
        for group in groups:
            ids = [[i for i in reply.ids if i not in end_ids] for reply in group]
            texts.append([tokenizer.decode(row).strip() for row in ids])
            logps.append([sum(reply.logps) for reply in group])
            tokens += sum(len(reply.ids) for reply in group)
    return Asked(questions, texts, logps, tokens)


def training_questions(count: int) -> list[ScoredQuestion]:
    """Return questions about stories that no run was trained on."""
    stories = make_corpus(count // 2, 1, "train", details=True)
    questions = [question for story in stories for question in story_questions(story)]
    return questions[:count]


# The arms. Each takes the run to start from, a folder for its own run, the seed and steps.


def training(
    steps: int,  # of training
    rate: float,  # learning rate
    rows: int,  # of a batch
    seed: int,  # of questions and samples
) -> TrainConfig:
    """Return the settings that all arms have in common."""
    return TrainConfig(
        steps,
        # Short runs: no weight decay, no validation, no checkpoint on the way.
        optimizer="adamw",
        learning_rate=rate,
        batch_size=rows,
        warmup_steps=5,
        weight_decay=0.0,
        eval_interval=0,
        checkpoint_interval=0,
        sample_interval=0,
        spike_factor=0,
        log_interval=10,
        num_threads=1,
        seed=seed,
    )


STORIES = DataConfig(seq_len=256, stories=3300, validation_stories=20, seed=1)


def train_sft(
    run: str,  # the run to start from
    out: Path,  # folder of the new run
    seed: int,  # of questions and samples
    steps: int,  # of training
    habit: float,  # share of chats in which the assistant rambles
    rate: float,  # learning rate
) -> TinyLM:
    """Fine-tune further on chats of the built-in stories."""
    train = training(steps, rate, 16, seed)
    return sft(SFTConfig(run=run, data=STORIES, train=train, out=str(out), habit=habit)).model


def chosen_lines(path: Path) -> None:
    """Write the prompts and the chosen answers of DPO's pairs."""
    from tinylm.dpo import story_pair

    lines = []
    for story in make_corpus(STORIES.stories, STORIES.seed, "train", details=True):
        pair = story_pair(story)
        answer = {"role": "assistant", "content": pair["chosen"]}
        lines.append(json.dumps({"messages": [*pair["messages"], answer]}))
    path.write_text("\n".join(lines), "utf-8")


def train_on_chosen(
    run: str,  # the run to start from
    out: Path,  # folder of the new run
    seed: int,  # of questions and samples
    steps: int,  # of training
) -> TinyLM:
    """Fine-tune on the chosen answers of DPO's pairs."""
    path = out.parent / "chosen.jsonl"
    chosen_lines(path)
    data = DataConfig(path=str(path), seq_len=256)
    train = training(steps, 1e-3, 16, seed)
    return sft(SFTConfig(run=run, data=data, train=train, out=str(out))).model


def train_on_right(
    run: str,  # the run to start from
    out: Path,  # folder of the new run
    seed: int,  # of questions and samples
    steps: int,  # of training
) -> TinyLM:
    """Fine-tune on the right ones of one's own samples: rejection sampling."""
    samples = sample_replies(load(run)[:2], training_questions(QUESTIONS_OF_SAMPLES), 4, seed)
    lines = []
    for question, texts in zip(samples.questions, samples.texts, strict=True):
        right = [text for text in texts if exact(question, text)]
        for text in sorted(set(right))[:1]:
            answer = {"role": "assistant", "content": text}
            lines.append(json.dumps({"messages": [*question.messages, answer]}))
    path = out.parent / "right.jsonl"
    path.write_text("\n".join(lines), "utf-8")
    train = training(steps, 5e-4, 16, seed)
    data = DataConfig(path=str(path), seq_len=256)
    return sft(SFTConfig(run=run, data=data, train=train, out=str(out))).model


def train_on_own_pairs(
    run: str,  # the run to start from
    out: Path,  # folder of the new run
    seed: int,  # of questions and samples
    steps: int,  # of training
) -> TinyLM:
    """Tune on pairs of a right and a wrong sample of one's own."""
    samples = sample_replies(load(run)[:2], training_questions(QUESTIONS_OF_SAMPLES), 4, seed)
    lines = []
    for question, texts in zip(samples.questions, samples.texts, strict=True):
        right = sorted({text for text in texts if exact(question, text)})
        wrong = sorted({text for text in texts if not exact(question, text)})
        for chosen, rejected in list(zip(right, wrong, strict=False))[:1]:
            record = {"messages": question.messages, "chosen": chosen, "rejected": rejected}
            lines.append(json.dumps(record))

    # Preference tuning on them.
    path = out.parent / "pairs.jsonl"
    path.write_text("\n".join(lines), "utf-8")
    data = DataConfig(path=str(path), seq_len=256)
    train = training(steps, 3e-4, 16, seed)
    return dpo(DPOConfig(run=run, data=data, train=train, out=str(out))).model


def train_dpo(
    run: str,  # the run to start from
    out: Path,  # folder of the new run
    seed: int,  # of questions and samples
    steps: int,  # of training
) -> TinyLM:
    """Tune on DPO's pairs, with the settings of the package."""
    train = training(steps, DPOConfig().train.learning_rate, 16, seed)
    return dpo(DPOConfig(run=run, data=STORIES, train=train, out=str(out))).model


def train_grpo(
    run: str,  # the run to start from
    out: Path,  # folder of the new run
    seed: int,  # of questions and samples
    steps: int,  # of training
    parts: int = 1,  # in which a batch is computed
    **changes: object,  # fields of `GRPOConfig`
) -> TinyLM:
    """Learn from rewards."""
    rows = 1024  # replies of a step
    train = replace(training(steps, 3e-4, rows, seed), grad_accum_steps=parts)
    values = {
        "reward": "exact_sentence",
        "loss": "dr_grpo",
        "num_generations": 16,
        "max_completion_length": 12,
        # Warmer than the policy itself: without spread in a group nothing is learned.
        "temperature": 1.5,
    }
    config = GRPOConfig(run=run, data=STORIES, train=train, out=str(out), **(values | changes))
    return grpo(config).model


class Arm(NamedTuple):
    """A way to spend the time."""

    train: Callable[[str, Path, int, int], TinyLM]  # (run, out, seed, steps) -> the model
    steps: int  # chosen so that no arm takes much longer than GRPO


ARMS = {
    "sft": Arm(partial(train_sft, habit=0.8, rate=1e-3), 1000),
    "sft on chosen answers": Arm(train_on_chosen, 1000),
    "rejection sampling": Arm(train_on_right, 900),
    "dpo": Arm(train_dpo, 300),
    "dpo on own samples": Arm(train_on_own_pairs, 350),
    "grpo": Arm(train_grpo, 150),
    # By chance all groups have spread: the whole batch at once would need 11 GB of memory.
    "coin": Arm(partial(train_grpo, reward="coin", parts=4), 25),
    "mentions": Arm(partial(train_grpo, reward="mentions", max_completion_length=24), 75),
}


# What is measured.


def pass_at(
    right: int,  # right samples
    count: int,  # all samples
    k: int,  # so many may be tried
) -> float:
    """Return the probability that one of k samples is right (Chen et al. 2021, section 2.1)."""
    return 1 - math.comb(count - right, k) / math.comb(count, k)


def first_sentence(text: str) -> str:
    """Return a reply up to its first full stop."""
    return text.partition(".")[0]


def percent(values: list[float]) -> float:
    """Return the mean of shares, in percent."""
    return round(100 * sum(values) / len(values), 2)


def sampled_figures(samples: Asked, count: int) -> dict[str, float]:
    """Return pass@k, majority vote, and the best of n by the model's own probability."""
    figures: dict[str, float] = {}
    rights = []
    for question, texts in zip(samples.questions, samples.texts, strict=True):
        rights.append([exact(question, text) for text in texts])
    for k in (1, 8, 32, 64):
        if k <= count:
            values = [pass_at(int(sum(right)), count, k) for right in rights]
            figures[f"pass@{k}"] = percent(values)

    # Without a checker: the most frequent reply, and the likeliest one.
    for n in (8, 32, 64):
        votes, likeliest = [], []
        for question, texts, right, logps in zip(
            samples.questions, samples.texts, rights, samples.logps, strict=True
        ):
            heads = Counter(first_sentence(text) for text in texts[:n])
            winner = heads.most_common(1)[0][0] + "."
            votes.append(exact(question, winner))
            best = max(range(min(n, len(texts))), key=lambda i: logps[i])
            likeliest.append(right[best])
        if n <= count:
            figures[f"majority of {n}"] = percent(votes)
            figures[f"likeliest of {n}"] = percent(likeliest)
    return figures


def held_out() -> list[Question]:
    """Return the questions that all measurements of the package ask."""
    stories = make_corpus(100, 0, "heldout", details=True)
    questions = [question for story in stories for question in story.questions]
    return [q for q in questions if '"' not in q.prompt.rpartition("?")[2]]


def measure(
    model: TinyLM,  # the one to measure
    reference: TinyLM,  # the run to start from
    tokenizer,  # the model's
    count: int,  # all samples
) -> dict:
    """Ask the held-out questions."""
    questions = held_out()
    samples = []
    for question in questions:
        text, right, _ = as_chat(question)
        samples.append(ScoredQuestion([{"role": "user", "content": text}], right))
    prompts = [
        tokenizer.apply_chat_template(q.messages, add_generation_prompt=True) for q in samples
    ]

    # The likeliest reply to each, then sampled ones.
    replies = answer_all(model, tokenizer, prompts, 32, ["<|im_end|>"])
    scores = score_replies(questions, replies)
    figures = {name: percent([score.share]) for name, score in scores.items()}
    figures["words"] = round(sum(len(reply.split()) for reply in replies) / len(replies), 2)
    figures |= sampled_figures(sample_replies((model, tokenizer), samples, count, 0), count)
    sampling = SamplingConfig(LONGEST)
    end_ids = end_token_ids(tokenizer)

    @contextlib.contextmanager
    def opened():
        yield reference

    kl = kl_to_reference(model, opened, prompts[:64], sampling, end_ids)
    figures["kl"] = round(float(kl), 3)
    figures["replies"] = replies[:4]
    return figures


@contextlib.contextmanager
def rollouts_counted() -> Iterator[dict[str, float]]:
    """Count the tokens of all rollouts, and the processor time that they take."""
    counted = {"tokens": 0, "seconds": 0.0}

    def sample_counted(*arguments):
        begin = time.process_time()
        groups = sample_groups(*arguments)
        counted["seconds"] += time.process_time() - begin
        counted["tokens"] += sum(len(reply.ids) for group in groups for reply in group)
        return groups

    with patch("tinylm.grpo.sample_groups", sample_counted):
        yield counted


def last_figures(out: Path) -> dict:
    """Return what the last lines of a run's log say of rollouts."""
    lines = (out / "metrics.jsonl").read_text("utf-8").splitlines()
    rows = [row for row in map(json.loads, lines) if "reward" in row]
    names = ("step", "reward", "reply_tokens", "entropy", "even_groups")
    return {name: [round(row[name], 4) for row in rows] for name in names} if rows else {}


def run_arm(
    name: str,  # of the arm
    run: str,  # the run to start from
    seed: int,  # of questions and samples
    scale: float,  # factor of its steps
    count: int,  # all samples
) -> dict:
    """Train an arm, and measure it."""
    model, tokenizer = load(run)[:2]
    if name == "before":
        return measure(model, model, tokenizer, count)
    arm = ARMS[name]
    steps = max(1, round(arm.steps * scale))
    with tempfile.TemporaryDirectory() as folder, rollouts_counted() as rollouts:
        out = Path(folder) / "run"
        begin = time.process_time()
        with contextlib.redirect_stdout(io.StringIO()):
            tuned = arm.train(run, out, seed, steps)
        seconds = time.process_time() - begin
        log = last_figures(out)
    figures: dict = {"steps": steps, "cpu_seconds": round(seconds, 1)}

    # Of one thread; what is not a rollout is training, and the encoding of the questions.
    if rollouts["tokens"]:
        of_training = seconds - rollouts["seconds"]
        figures["rollout_tokens_per_cpu_second"] = round(rollouts["tokens"] / rollouts["seconds"])
        figures["rollout_cpu_seconds"] = round(rollouts["seconds"], 1)
        figures["training_tokens_per_cpu_second"] = round(rollouts["tokens"] / of_training)
    return figures | measure(tuned, model, tokenizer, count) | ({"log": log} if log else {})


def over_seeds(values: list[float]) -> dict:
    """Return mean and half of the 95% interval, which a single run does not have."""
    summary = interval(values)
    if len(values) == 1:
        summary["half_of_95_interval"] = None
    return summary


def summarize(arms: dict) -> dict:
    """Return mean and 95% interval over the seeds, and what each arm adds to its start."""
    summary: dict = {}
    names = ("all", "to the point", "words", "kl", "pass@1", "pass@8", "pass@64")
    names += ("majority of 64", "likeliest of 64", "cpu_seconds")
    for arm, by_seed in arms.items():
        seeds = sorted(by_seed)
        rows = [by_seed[seed] for seed in seeds]
        summary[arm] = {}
        for name in names:
            if all(name in row for row in rows):
                summary[arm][name] = over_seeds([row[name] for row in rows])

        # Seed by seed: which share of the errors of the start is left?
        starts = arms.get("before", {})
        if arm != "before" and all(seed in starts for seed in seeds):
            gains = [by_seed[seed]["all"] - starts[seed]["all"] for seed in seeds]
            left = [(100 - by_seed[s]["all"]) / (100 - starts[s]["all"]) for s in seeds]
            summary[arm]["added to the start"] = over_seeds(gains)
            summary[arm]["errors left of those at the start"] = over_seeds(left)
    return summary


def measure_speed(run: str) -> dict:  # a run that `transformers` can open
    """Let this library and `transformers.generate` sample the same number of tokens, in turns."""
    from transformers import AutoModelForCausalLM

    # Eight replies of twelve tokens to each of 32 questions; none may end early.
    model, tokenizer = load(run)[:2]
    theirs = AutoModelForCausalLM.from_pretrained(run).eval()
    prompts = [tokenizer.encode(question.prompt) for question in held_out()[:32]]
    longest = max(len(prompt) for prompt in prompts)
    padding = [[tokenizer.pad_token_id] * (longest - len(prompt)) for prompt in prompts]
    input_ids = torch.tensor([pad + ids for pad, ids in zip(padding, prompts, strict=True)])
    mask = torch.tensor([[0] * len(pad) + [1] * (longest - len(pad)) for pad in padding])

    def ours(turn: int) -> None:
        seeds = [100 * turn + i for i in range(len(prompts))]
        sample_groups(model, prompts, 8, SamplingConfig(12), [], seeds)

    def with_transformers(turn: int) -> None:
        torch.manual_seed(turn)
        theirs.generate(
            input_ids,
            attention_mask=mask,
            do_sample=True,
            top_k=0,
            num_return_sequences=8,
            min_new_tokens=12,
            max_new_tokens=12,
        )

    # The first turn does not count.
    tokens = 8 * 12 * len(prompts)
    speeds: dict[str, list[float]] = {"tinylm": [], "transformers": []}
    for turn in range(6):
        for name, sample in (("tinylm", ours), ("transformers", with_transformers)):
            begin = time.process_time()
            sample(turn)
            speeds[name].append(round(tokens / (time.process_time() - begin)))
    medians = {name: statistics.median(values[1:]) for name, values in speeds.items()}
    ratio = round(medians["tinylm"] / medians["transformers"], 2)
    return {"tokens_per_cpu_second": medians, "by_turn": speeds, "ratio": ratio}


def main() -> None:
    """Run what is missing, and write the file after each arm."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", nargs="+", default=[], help="runs of `tinylm sft`")
    parser.add_argument("--arms", nargs="+", default=["before", *ARMS])
    parser.add_argument("--seeds", nargs="+", type=int, default=None, help="default: all runs")
    parser.add_argument("--scale", type=float, default=1.0, help="factor of all steps")
    parser.add_argument("--count", type=int, default=64, help="samples of a question")
    parser.add_argument("--base", default="", help="how the runs were made, for the file")
    parser.add_argument("--speed", help="a run of a family of `transformers`: compare the speeds")
    parser.add_argument("--out", type=Path, default=RESULTS / "grpo.json")
    args = parser.parse_args()
    torch.set_num_threads(1)

    # What is there already is not measured again.
    entry: dict = {"figures": {"arms": {}}}
    if args.out.exists():
        entry = json.loads(args.out.read_text("utf-8"))
    figures = entry["figures"]
    arms = figures["arms"]

    def write() -> None:
        figures["over_seeds"] = summarize(arms)
        scale = "" if args.scale == 1 else f" --scale {args.scale:g}"
        if args.base:
            entry["base"] = args.base
        entry["command"] = f"python benchmarks/rewards.py --runs RUN-0 RUN-1 RUN-2{scale}"
        entry["commit"] = commit()
        entry["date"] = str(date.today())
        entry["machine"] = machine()
        entry["seeds"] = sorted({int(s) for runs in arms.values() for s in runs})
        args.out.write_text(json.dumps(entry, indent=1) + "\n", "utf-8")

    if args.speed:
        figures["speed"] = measure_speed(args.speed)
        write()
    for seed in args.seeds if args.seeds is not None else range(len(args.runs)):
        for name in args.arms:
            arm = arms.setdefault(name, {})
            if str(seed) in arm:
                continue
            arm[str(seed)] = run_arm(name, args.runs[seed], seed, args.scale, args.count)
            shown = {k: v for k, v in arm[str(seed)].items() if not isinstance(v, list | dict)}
            print(name, seed, shown, flush=True)
            write()
    write()  # the summary, if nothing was missing


if __name__ == "__main__":
    main()
