"""Learning from rewards: trl's losses and gradients, bad input, stopped runs, two processes."""

import copy
import json
import os
import shutil
import signal
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from preloaded import python, ranks
from torch.testing import assert_close

from tinylm.chat_template import Tokenizer
from tinylm.checkpoints import load_model, save_model
from tinylm.cli import main
from tinylm.corpus import make_corpus
from tinylm.files import DataConfig
from tinylm.generate import SamplingConfig
from tinylm.grpo import GRPOConfig, NoSpread, grpo
from tinylm.lora import LoraConfig
from tinylm.model import IGNORE_INDEX, ModelConfig, TinyLM, shift_labels
from tinylm.policy_gradients import ADVANTAGES, LOSSES, ReplyTerms, policy_loss
from tinylm.pretrain import Hook, TrainConfig
from tinylm.rollouts import (
    QuestionBatches,
    ScoredQuestion,
    drop_even_groups,
    exact,
    exact_sentence,
    reply_batch,
    sample_groups,
    story_questions,
    to_question,
    token_logps,
)

ROOT = Path(__file__).resolve().parent.parent
ANIMALS = "cat dog bird fox".split()
SEATS = "mat rug bed box".split()
RECORDS = [
    {"prompt": f"the {animal} sat on the {seat}. where is it?", "answer": f"on the {seat}"}
    for animal in ANIMALS
    for seat in SEATS
]


def write_lines(path: Path, records: list[dict]) -> str:
    path.write_text("\n".join(json.dumps(record) for record in records), "utf-8")
    return str(path)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with `base`, an untrained tiny model, and `questions.jsonl`."""
    place = tmp_path_factory.mktemp("grpo")
    texts = [" ".join(record.values()) for record in RECORDS]
    tokenizer = Tokenizer.train([*texts, "user\n", "assistant\n"], vocab_size=300)
    torch.manual_seed(0)
    shape = ModelConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=128,
    )
    save_model(TinyLM(shape), place / "base", pad_token_id=tokenizer.pad_token_id)
    tokenizer.save_pretrained(place / "base")
    write_lines(place / "questions.jsonl", RECORDS)
    return place


def vowels(question, reply: str) -> float:
    """Score any text, so that an untrained model has groups with spread."""
    return sum(letter in "aeiou" for letter in reply) / 8


def no_number(question, reply: str) -> list:
    return [1.0, 2.0]


def not_finite(question, reply: str) -> float:
    return float("nan")


def one_parameter(reply: str) -> float:
    return 1.0


def always_one(question, reply: str) -> float:
    return 1.0


def broken(question, reply: str) -> float:
    return 1 / 0


def recipe(place: Path, out: Path, **changes) -> GRPOConfig:
    """A run of 6 steps; 4 questions a step with 4 replies each."""
    train = TrainConfig(
        max_steps=6,
        batch_size=16,
        learning_rate=1e-2,
        optimizer="adamw",
        warmup_steps=1,
        precision="fp32",
        device="cpu",
        num_threads=1,
        log_interval=1,
        eval_interval=3,
        checkpoint_interval=2,
        sample_interval=3,
        spike_factor=0,
    )
    train = replace(train, **changes.pop("train", {}))
    data = DataConfig(path=str(place / "questions.jsonl"), seq_len=64)
    data = replace(data, **changes.pop("data", {}))
    usual = {"reward": f"{__name__}:vowels", "num_generations": 4, "max_completion_length": 6}
    return GRPOConfig(
        run=str(place / "base"), data=data, train=train, out=str(out), **(usual | changes)
    )


# The same losses and gradients as trl


PROMPT, LONGEST = 5, 7  # tokens
LENGTHS = (7, 3, 5, 1)  # tokens of the replies


@pytest.fixture(scope="module")
def replies(place):
    """A batch of four replies, with older and reference log-probabilities that differ."""
    torch.manual_seed(1)
    input_ids = torch.randint(10, 290, (4, PROMPT + LONGEST))
    labels = input_ids.clone()
    labels[:, :PROMPT] = IGNORE_INDEX
    for row, length in enumerate(LENGTHS):
        labels[row, PROMPT + length :] = IGNORE_INDEX
    return {
        "input_ids": input_ids,
        "labels": labels,
        "advantages": torch.tensor([[1.2], [-0.7], [0.4], [-0.9]]),
        "drift": 0.5 * torch.randn(4, PROMPT + LONGEST),
        "ref_drift": 0.3 * torch.randn(4, PROMPT + LONGEST),
    }


@pytest.fixture(scope="module")
def make_trainer(place, tmp_path_factory):
    """Make trl's trainer of the tiny model, with some settings."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    import datasets
    from transformers import AutoModelForCausalLM
    from trl import GRPOConfig as TrlConfig
    from trl import GRPOTrainer

    def trainer(**settings):
        model = AutoModelForCausalLM.from_pretrained(place / "base")
        config = TrlConfig(
            str(tmp_path_factory.mktemp("trl")),
            use_cpu=True,
            bf16=False,
            report_to=[],
            per_device_train_batch_size=4,
            num_generations=4,
            max_completion_length=LONGEST,
            **settings,
        )
        return GRPOTrainer(
            model,
            reward_funcs=lambda completions, **rest: [float(len(text)) for text in completions],
            args=config,
            train_dataset=datasets.Dataset.from_list([{"prompt": "the cat"}] * 4),
            processing_class=Tokenizer.from_pretrained(place / "base").hf_tokenizer,
        )

    return trainer


def of_ours(place, replies, is_old, beta, **settings):
    """Return our loss of the batch, the gradient of the embedding, and the old logps."""
    model = load_model(place / "base")
    logps = token_logps(model, replies["input_ids"], replies["labels"])
    mask = (shift_labels(replies["labels"]) != IGNORE_INDEX).float()
    old_logps = (logps + is_old * replies["drift"] * mask).detach()
    ref_logps = (logps + replies["ref_drift"] * mask).detach()
    terms = ReplyTerms(logps, old_logps, replies["advantages"], mask)
    config = GRPOConfig(max_completion_length=LONGEST, beta=beta, **settings)
    total, count = policy_loss(terms, ref_logps if beta else None, config)
    loss = total / count
    loss.backward()
    return loss.detach(), model.model.embed_tokens.weight.grad, old_logps, ref_logps


CASES = [  # our loss, and trl's settings
    ("grpo", {"loss_type": "grpo"}),
    ("dr_grpo", {"loss_type": "dr_grpo"}),
    ("dapo", {"loss_type": "dapo"}),
    ("dapo", {"loss_type": "bnpo"}),  # the same, where the batch is in one part
    ("gspo", {"loss_type": "grpo", "importance_sampling_level": "sequence"}),
    ("luspo", {"loss_type": "luspo", "importance_sampling_level": "sequence"}),
    ("cispo", {"loss_type": "cispo"}),
    ("sapo", {"loss_type": "sapo"}),
]


@pytest.mark.parametrize("kl", ["none", "k3", "k3_weighted"])
@pytest.mark.parametrize("is_old", [False, True], ids=["fresh", "clipped"])
@pytest.mark.parametrize("name, theirs", CASES, ids=[f"{a}-{b['loss_type']}" for a, b in CASES])
def test_losses_and_gradients_are_those_of_trl(
    place, replies, make_trainer, name, theirs, is_old, kl
):
    if name in ("gspo", "luspo") and kl == "k3_weighted":
        pytest.skip("trl weighs each token with the ratio of the whole reply, which is biased")
    beta = 0.0 if kl == "none" else 0.3
    ours = of_ours(place, replies, is_old, beta, loss=name, kl="k3" if kl == "none" else kl)
    loss, gradient, old_logps, ref_logps = ours

    # trl bounds cispo's weight itself, not its distance from 1.
    epsilon_high = 1.28 if name == "cispo" else 0.28
    trainer = make_trainer(
        beta=beta,
        epsilon=0.2,
        epsilon_high=epsilon_high,
        use_bias_correction_kl=kl == "k3_weighted",
        **theirs,
    )

    # Our log-probabilities stand one place before their tokens.
    places = slice(PROMPT - 1, PROMPT + LONGEST - 1)
    lengths = torch.tensor(LENGTHS)
    completion_mask = (torch.arange(LONGEST) < lengths[:, None]).long()
    batch = {
        "prompt_ids": replies["input_ids"][:, :PROMPT],
        "prompt_mask": torch.ones(4, PROMPT, dtype=torch.long),
        "completion_ids": replies["input_ids"][:, PROMPT:],
        "completion_mask": completion_mask,
        "advantages": replies["advantages"][:, 0],
        "old_per_token_logps": old_logps[:, places] if is_old else None,
        "ref_per_token_logps": ref_logps[:, places],
        "num_items_in_batch": lengths.sum(),
    }
    trainer.current_gradient_accumulation_steps = 1
    trainer.args.steps_per_generation = 1
    their_loss = trainer.compute_loss(trainer.model.train(), batch)
    their_loss.backward()
    assert_close(loss, their_loss.detach(), rtol=1e-5, atol=1e-6)
    their_gradient = trainer.model.get_input_embeddings().weight.grad
    assert_close(gradient, their_gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("ours, theirs", [("group_normalized", "group"), ("group_mean", "none")])
def test_advantages_are_those_of_trl(make_trainer, ours, theirs):
    """trl samples with our tiny model; its rewards give its advantages."""
    trainer = make_trainer(scale_rewards=theirs, beta=0.0)
    rewards = []

    def remember(completions, **rest):
        rewards.extend(float(len(text)) for text in completions)
        return rewards

    trainer.reward_funcs = [remember]
    torch.manual_seed(0)
    batch = trainer._generate_and_score_completions([{"prompt": "the cat"}] * 4)
    assert len(set(rewards)) > 1
    assert_close(ADVANTAGES[ours](torch.tensor([rewards]))[0], batch["advantages"])


def test_every_loss_is_compared():
    assert {name for name, _ in CASES} | {"reinforce"} == set(LOSSES)


def test_reinforce_is_the_sum_over_tokens(place, replies):
    """At a ratio of 1 its gradient is that of `dr_grpo`, but for the constant."""
    gradients = [
        of_ours(place, replies, False, 0.0, loss=name)[1] for name in ("reinforce", "luspo")
    ]
    sums = of_ours(place, replies, False, 0.0, loss="dr_grpo")[1] * LONGEST
    assert_close(gradients[0], sums, rtol=1e-4, atol=1e-6)


# Runs


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def lines(folder: Path) -> list[dict]:
    timed = ("elapsed", "tokens_per_second", "rollout_tokens_per_second")
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name not in timed} for row in rows]


class Stop(Exception):
    """The machine is gone."""


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_iterations": 3, "beta": 0.1},
        {"lora": LoraConfig(r=2), "reference": "adapter", "beta": 0.1},
    ],
    ids=["plain", "replies used again", "adapter"],
)
def test_stopped_and_resumed_is_never_stopped(place, tmp_path, changes):
    class PowerCut(Hook):
        def on_step(self, trainer, figures):
            if trainer.progress.step == 5:
                raise Stop

    whole = recipe(place, tmp_path / "whole", **changes)
    grpo(whole)
    cut = replace(whole, out=str(tmp_path / "cut"))
    with pytest.raises(Stop):
        grpo(cut, hooks=[PowerCut()])
    names = [path.name for path in (tmp_path / "cut" / "checkpoints").iterdir()]
    assert sorted(names) == ["step-000002", "step-000004"]
    grpo(replace(cut, resume=True))
    assert weights(tmp_path / "cut") == weights(tmp_path / "whole")
    assert lines(tmp_path / "cut") == lines(tmp_path / "whole")
    samples = [(tmp_path / name / "samples.txt").read_text() for name in ("cut", "whole")]
    assert samples[0] == samples[1] and "(reward " in samples[0]


def test_accumulation_changes_nothing(place, tmp_path):
    for name, parts in (("one", 1), ("four", 4)):
        train = {"grad_accum_steps": parts, "max_steps": 3}
        grpo(recipe(place, tmp_path / name, loss="dapo", train=train))
    one, four = lines(tmp_path / "one"), lines(tmp_path / "four")
    for row, other in zip(one, four, strict=True):
        assert_close(row, other, rtol=1e-4, atol=1e-5)


def test_no_spread_stops_with_a_usable_checkpoint(place, tmp_path):
    config = recipe(place, tmp_path / "out", reward=f"{__name__}:always_one", max_even_steps=3)
    with pytest.raises(NoSpread, match="after step 3: in 3 steps no group had spread.*step-000003"):
        grpo(config)
    again = recipe(place, tmp_path / "again")
    again.run = str(tmp_path / "out" / "checkpoints" / "step-000003")
    assert grpo(again).progress.step == 6


RUN = """
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path
sys.path.insert(0, sys.argv[3])
from test_grpo import recipe
from tinylm.grpo import grpo


def die(event, args):  # when it has computed a little after its second step
    if event == "os.rename" and os.fspath(args[1]).endswith("step-000002"):
        signal.setitimer(signal.ITIMER_VIRTUAL, 0.02)  # its signal ends the process


place, out, way = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[4]
changes = {"reward": "test_grpo:vowels", "beta": 0.1, "num_iterations": 3}
config = recipe(place, out, **changes, train={"fsdp": way == "fsdp"})
if way == "die":
    sys.addaudithook(die)
grpo(replace(config, resume=way in ("resume", "die")))
"""


def test_killed_and_resumed_is_never_stopped(place, tmp_path):
    def run(name: str, way: str) -> int:
        words = (str(place), str(tmp_path / name), str(ROOT / "tests"), way)
        return python(RUN, *words).returncode

    # Kill it between two steps that use the same replies, or wherever it is by then.
    assert run("whole", "resume") == 0
    assert run("killed", "die") == -signal.SIGVTALRM
    assert (tmp_path / "killed" / "checkpoints" / "step-000002").exists()
    assert not (tmp_path / "killed" / "model.safetensors").exists()
    assert run("killed", "resume") == 0
    assert weights(tmp_path / "killed") == weights(tmp_path / "whole")
    assert lines(tmp_path / "killed") == lines(tmp_path / "whole")


@pytest.mark.parametrize("way", ["ddp", "fsdp"])
def test_two_processes_equal_one(place, tmp_path, way):
    for name, start in (("one", python), ("two", partial(ranks, 2))):
        words = (str(place), str(tmp_path / name), str(ROOT / "tests"), way)
        done = start(RUN, *words)
        assert done.returncode == 0, done.stdout + done.stderr
    one, two = lines(tmp_path / "one"), lines(tmp_path / "two")
    for row, other in zip(one, two, strict=True):
        assert_close(row, other, rtol=1e-3, atol=1e-4)


# Bad input, one line each


WRONG_FIELDS = [
    ({"num_generations": 1}, "num_generations=1: give 2 or more"),
    ({"num_generations": 5}, "num_generations=5: a batch is whole groups"),
    ({"temperature": 0.0}, "temperature=0.0: give a number above 0"),
    ({"beta": -0.1}, "beta=-0.1: give 0 or more"),
    ({"loss": "ppo"}, "loss='ppo': give one of reinforce, grpo"),
    ({"advantage": "gae"}, "advantage='gae': give one of raw_reward"),
    ({"kl": "k4"}, "kl='k4': give one of k1"),
    ({"reference": "adapter"}, "reference='adapter': give copy or adapter"),
    ({"num_iterations": 0}, "num_iterations=0: give 1 or more"),
    ({"max_completion_length": 0}, "max_completion_length=0: give 1 or more"),
]


@pytest.mark.parametrize("changes, message", WRONG_FIELDS, ids=[str(a) for a, _ in WRONG_FIELDS])
def test_wrong_fields(place, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        recipe(place, tmp_path, **changes)


WRONG_REWARDS = [
    ("exakt", "reward='exakt': give one of exact, one_sentence"),
    ("no_such_module:f", "reward='no_such_module:f': cannot be imported .ModuleNotFoundError"),
    (f"{__name__}:no_such_function", "cannot be imported .AttributeError"),
    (f"{__name__}:one_parameter", "does not take two arguments; write a function with two"),
    (f"{__name__}:no_number", r"returned \[1.0, 2.0\] for the reply .*; return one finite number"),
    (f"{__name__}:not_finite", "returned nan for the reply .*; return one finite number"),
    (f"{__name__}:broken", "failed for the reply .*ZeroDivisionError"),
]


@pytest.mark.parametrize("reward, message", WRONG_REWARDS, ids=[name for name, _ in WRONG_REWARDS])
def test_wrong_rewards(place, tmp_path, reward, message):
    with pytest.raises(ValueError, match=message):
        grpo(recipe(place, tmp_path / "out", reward=reward))
    assert not (tmp_path / "out").exists()


def test_wrong_questions(place, tmp_path):
    def run(**changes):
        grpo(recipe(place, tmp_path / "out", **changes))

    # No reference answers for a reward that needs them; without that need they are welcome.
    bare = [{"prompt": record["prompt"]} for record in RECORDS]
    path = write_lines(tmp_path / "bare.jsonl", bare)
    with pytest.raises(ValueError, match="has no reference answer; add one as `answer`"):
        run(data={"path": path}, reward="exact")

    # Prompts that are too long for the model, or for the rows.
    with pytest.raises(ValueError, match="data.seq_len=200: is above max_position_embeddings=128"):
        run(data={"seq_len": 200})
    with pytest.raises(ValueError, match="data.seq_len=12: no question to train.*left out: 1"):
        run(data={"seq_len": 12})

    # Records that are no questions.
    path = write_lines(tmp_path / "wrong.jsonl", [{"text": "a"}, {"text": "b"}])
    with pytest.raises(ValueError, match="give messages, or instruction and output"):
        run(data={"path": path})
    assert not (tmp_path / "out").exists()


def test_a_base_without_chat_template(place, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(place / "base", base)
    for name in ("chat_template.jinja",):
        (base / name).unlink(missing_ok=True)
    settings = json.loads((base / "tokenizer_config.json").read_text())
    settings.pop("chat_template", None)
    (base / "tokenizer_config.json").write_text(json.dumps(settings))
    config = recipe(place, tmp_path / "out")
    config.run = str(base)
    with pytest.raises(ValueError, match="tokenizer without a chat template; use --chatml"):
        grpo(config)


# The command line


SHORT = "--train.max-steps 2 --train.batch-size 8 --num-generations 4 --max-completion-length 6"
FAST = "--train.sample-interval 0 --train.eval-interval 0 --train.num-threads 1"


def test_the_command_trains_with_a_reward_of_a_file(place, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    code = "def letters(question, reply):\n    return len(reply) / 8\n"
    (tmp_path / "my_rewards.py").write_text(code, "utf-8")
    data = ["--data.path", str(place / "questions.jsonl"), "--data.seq-len", "64"]
    words = ["grpo", "--run", str(place / "base"), "--reward", "my_rewards:letters", *data]
    assert main([*words, *SHORT.split(), *FAST.split()]) == 0
    output = capsys.readouterr().out
    assert "reward " in output and "KL to the reference" in output
    assert "next:  tinylm chat --run " in output and "runs/grpo" in output
    assert (tmp_path / "runs" / "grpo" / "loss.png").exists()

    # A run that is resumed knows its recipe.
    assert main(["grpo", "--resume", "--train.max-steps", "3", "--train.num-threads", "1"]) == 0
    rows = lines(tmp_path / "runs" / "grpo")
    assert rows[-1]["step"] == 3


@pytest.mark.parametrize(
    "words, message",
    [
        ("--num-generations 1", "num_generations=1: give 2 or more"),
        ("--temperature 0", "temperature=0.0: give a number above 0"),
        ("--beta -1", "beta=-1.0: give 0 or more"),
        ("--reward exakt", "reward='exakt': give one of exact"),
        ("--train.batch-size 12", "a batch is whole groups"),
    ],
)
def test_a_wrong_flag_is_one_line(place, tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    data = ["--data.path", str(place / "questions.jsonl"), "--data.seq-len", "64"]
    assert main(["grpo", "--run", str(place / "base"), *data, *words.split()]) == 2
    (line,) = [row for row in capsys.readouterr().err.splitlines() if row.startswith("tinylm: ")]
    assert message in line
    assert not (tmp_path / "runs").exists()


# Rollouts


@pytest.fixture(scope="module")
def rollouts(place):
    """The tiny model, two prompts, and replies to them at a temperature of 1.5."""
    model = load_model(place / "base")
    prompts = [[5, 6, 7, 8], [9, 10, 11, 12, 13, 14, 15]]
    sampling = SamplingConfig(9, temperature=1.5)
    return model, prompts, partial(sample_groups, model, count=5, sampling=sampling, end_ids=[20])


def test_a_reply_does_not_depend_on_its_neighbors(rollouts):
    _, prompts, sample = rollouts
    both = sample(prompts=prompts, seeds=[3, 4])
    for prompt, seed, group in zip(prompts, (3, 4), both, strict=True):
        (alone,) = sample(prompts=[prompt], seeds=[seed])
        assert [reply.ids for reply in alone] == [reply.ids for reply in group]


def test_kept_log_probabilities_are_those_of_the_policy(rollouts):
    """Sampled with a cache and at a temperature, computed without a cache."""
    model, prompts, sample = rollouts
    batch = reply_batch(prompts, sample(prompts=prompts, seeds=[3, 4]), torch.ones(2, 5))
    with torch.no_grad():
        logps = token_logps(model, batch["input_ids"], batch["labels"], temperature=1.5)
        others = token_logps(model, batch["input_ids"], batch["labels"])
    assert_close(logps, batch["old_logps"], atol=1e-5, rtol=0)
    assert (others - batch["old_logps"]).abs().max() > 0.05


def test_equal_rows_are_computed_once(rollouts):
    """What comes back, and the gradient, are those of all rows; also with capped logits."""
    model, prompts, sample = rollouts
    model = copy.deepcopy(model)
    batch = reply_batch(prompts, sample(prompts=prompts, seeds=[3, 4]), torch.ones(2, 5))
    rows = torch.tensor([3, 0, 3, 7, 0, 0])
    input_ids, labels = batch["input_ids"][rows], batch["labels"][rows]
    widths = []
    model.model.register_forward_pre_hook(lambda _, inputs: widths.append(len(inputs[0])))
    weights = torch.randn(input_ids.shape, generator=torch.Generator().manual_seed(0))
    for softcap in (None, 0.5):
        model.config = replace(model.config, final_logit_softcapping=softcap)
        gradients = []
        logps = token_logps(model, input_ids, labels, 1.5)
        parts = zip(input_ids.split(1), labels.split(1), strict=True)
        singly = torch.cat([token_logps(model, *part, 1.5) for part in parts])
        for result in (logps, singly):
            (gradient,) = torch.autograd.grad((result * weights).sum(), model.lm_head.weight)
            gradients.append(gradient)
        assert_close(logps, singly, atol=1e-5, rtol=0)
        assert_close(*gradients, atol=1e-5, rtol=1e-4)

        # The definition, from logits.
        logits = model(input_ids)
        log_p = (logits / 1.5).log_softmax(-1)
        targets = shift_labels(labels)
        wanted = log_p.gather(2, targets.clamp(min=0)[..., None])[..., 0]
        assert_close(logps, wanted.masked_fill(targets == IGNORE_INDEX, 0.0), atol=1e-5, rtol=0)
    assert widths[0] == 3


def test_groups_without_spread_are_dropped(rollouts):
    """The rows go, or stay without labels: the loss is the same, and no batch is empty."""
    model, prompts, sample = rollouts
    advantages = torch.randn(2, 5, generator=torch.Generator().manual_seed(0))
    batch = reply_batch(prompts, sample(prompts=prompts, seeds=[3, 4]), advantages)
    has_spread = torch.tensor([True, False])
    assert len(drop_even_groups(batch, has_spread)["labels"]) == 5
    assert len(drop_even_groups(batch, has_spread, remove=False)["labels"]) == 10
    none = drop_even_groups(batch, torch.tensor([False, False]))
    assert len(none["labels"]) == 10 and (none["labels"] == IGNORE_INDEX).all()

    for name in LOSSES:
        results = []
        for remove in (True, False):
            part = drop_even_groups(batch, has_spread, remove)
            with torch.no_grad():
                logps = token_logps(model, part["input_ids"], part["labels"], 1.5)
            mask = (shift_labels(part["labels"]) != IGNORE_INDEX).float()
            terms = ReplyTerms(logps, part["old_logps"], part["advantages"], mask)
            total, count = policy_loss(terms, None, GRPOConfig(loss=name))
            results.append((total / count).item())
        assert results[0] == pytest.approx(results[1], rel=1e-4, abs=1e-6), name


def test_the_end_token_is_learned(rollouts):
    """A reply that ended has its end token as a label; one that was cut has none."""
    _, prompts, sample = rollouts
    groups = sample(prompts=prompts, seeds=[3, 4])
    for group in groups:
        for reply in group:
            assert 20 not in reply.ids[:-1]
            assert len(reply.ids) == 9 or reply.ids[-1] == 20
            assert len(reply.ids) == len(reply.logps) == len(reply.entropies)


# Questions and rewards


def test_records_become_questions():
    turns = [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]
    for record in (
        {"prompt": "2 + 2?", "answer": 4},
        {"prompt": "2 + 2?", "completion": "4"},
        {"instruction": "2 + 2?", "output": "4"},
        {"messages": turns},
        {"messages": turns[:1], "answer": "4"},
    ):
        (question,) = to_question(record)
        assert (question.text, question.answer) == ("2 + 2?", "4")
    assert to_question({"prompt": "2 + 2?"})[0].answer is None


def test_story_questions_have_right_answers():
    for story in make_corpus(30, 0, "train", details=True):
        for question in story_questions(story):
            assert exact(question, f"{question.answer}.") == 1
            assert exact_sentence(question, f"{question.answer}. It was late.") == 0
            assert exact(question, "Nobody knows.") == 0


def test_questions_are_shared_among_processes():
    file = [(ScoredQuestion([], str(i)), [i]) for i in range(10)]
    alone = QuestionBatches(file, batch_size=4, seed=1)
    pairs = [QuestionBatches(file, 4, seed=1, rank=rank, world_size=2) for rank in (0, 1)]
    for step in range(8):
        shared = [None] * 4
        for rank, batches in enumerate(pairs):
            shared[rank::2] = batches.questions(step)
        assert shared == alone.questions(step)
    first_epoch = [ids[0] for step in range(5) for _, ids in alone.questions(step)][:10]
    assert sorted(first_epoch) == list(range(10))
