"""Bad input, made as a user would make it: one clear line names it and says what to do."""

import io
import json
import os
import re
import shlex
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tinylm.chat_template import Tokenizer
from tinylm.checkpoints import save_model
from tinylm.cli import main
from tinylm.decoding import beam_search, speculative_generate
from tinylm.dpo import DPOConfig
from tinylm.generate import SamplingConfig, generate, stream
from tinylm.hub import load
from tinylm.lora import LoraConfig, add_lora, load_lora, save_lora
from tinylm.model import ModelConfig, TinyLM

TINY = ModelConfig(vocab_size=300, hidden_size=32, num_hidden_layers=1, max_position_embeddings=64)
LATENT = dict(qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=16)
QUESTION = {"role": "user", "content": "Where is the cat?"}
ANSWER = {"role": "assistant", "content": "On the mat."}
CHAT = {"messages": [QUESTION, ANSWER]}
PAIR = {"prompt": "Where?", "chosen": "On the mat.", "rejected": "Here."}
BAD_RECORDS: dict[str, dict] = {  # each is the second of three
    "role": {"messages": [{"role": "asistant", "content": "Hi"}, ANSWER]},
    "no-content": {"messages": [{"role": "user"}, ANSWER]},
    "field": {"instruction": "Where?", "answer": "On the mat."},
    "empty": {"messages": []},
    "user-last": {"messages": [QUESTION, ANSWER, QUESTION]},
    "pair-role": {"prompt": [{"role": "boss", "content": "Hi"}], "chosen": "a", "rejected": "b"},
    "pair-field": {"prompt": "Where?", "chosen": "a"},
    "pair-empty": {"messages": [], "chosen": "a", "rejected": "b"},
    "pair-no-prompt": {"prompt": [], "chosen": "a", "rejected": "b"},
    "pair-user-last": {
        "chosen": [QUESTION, ANSWER, QUESTION],
        "rejected": [QUESTION, ANSWER, QUESTION],
    },
    "pair-prompts": {
        "chosen": [QUESTION, ANSWER],
        "rejected": [{"role": "user", "content": "Who?"}, ANSWER],
    },
}


def save_random_model(folder: Path, config: ModelConfig = TINY) -> TinyLM:
    """Save a random model in a folder."""
    torch.manual_seed(0)
    model = TinyLM(config)
    save_model(model, folder)
    return model


class Damage:
    """Makes copies of the checkpoint `run`, each with one mistake."""

    def __init__(self, folder: Path):
        self.folder = folder

    def copy(self, name: str) -> Path:
        """Copy the checkpoint."""
        shutil.copytree(self.folder / "run", self.folder / name)
        return self.folder / name

    def config(self, name: str, **entries) -> None:
        """Change entries of its config.json."""
        path = self.copy(name) / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **entries}))

    def weights(self, name: str, weights: dict[str, torch.Tensor]) -> None:
        """Replace its weights."""
        save_file(weights, self.copy(name) / "model.safetensors", metadata={"format": "pt"})


def write_adapter(folder: Path, config: ModelConfig) -> None:
    model = TinyLM(config)
    add_lora(model, LoraConfig(r=2))
    save_lora(model, folder, base_model="cats")


def write_checkpoints(folder: Path) -> None:
    """Write a checkpoint, copies of it with one mistake each, and two adapters."""
    model = save_random_model(folder / "run")
    tokenizer = Tokenizer.train(["the cat sat on the mat. "] * 9, 300)
    tokenizer.save_pretrained(folder / "run")
    damage = Damage(folder)

    # One whose width is no multiple of 32.
    save_random_model(folder / "narrow", replace(TINY, hidden_size=24))
    tokenizer.save_pretrained(folder / "narrow")

    # Weights that do not belong to the config.
    weights = load_file(folder / "run" / "model.safetensors")
    norm = "model.norm.weight"
    incomplete = {name: weight for name, weight in weights.items() if name != norm}
    damage.weights("incomplete", incomplete)
    damage.weights("too-much", {**weights, "model.more.weight": torch.ones(2)})
    damage.weights("misshapen", {**weights, norm: torch.ones(5)})

    # Configs that this library cannot build.
    damage.config("foreign", model_type="bert")
    damage.config("spiral", rope_parameters={"rope_type": "spiral", "rope_theta": 1e4})

    # A file of weights that is cut off, and one of another format.
    torn = damage.copy("torn") / "model.safetensors"
    torn.write_bytes(torn.read_bytes()[:999])
    pickled = damage.copy("pickled")
    (pickled / "model.safetensors").unlink()
    torch.save(model.state_dict(), pickled / "pytorch_model.bin")

    # A tokenizer without a chat template, and adapters.
    save_random_model(folder / "mute")
    tokenizer.hf_tokenizer.chat_template = None
    tokenizer.save_pretrained(folder / "mute")
    write_adapter(folder / "adapter", TINY)
    write_adapter(folder / "wide-adapter", replace(TINY, hidden_size=48))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with checkpoints, adapters and conversations; it is the current one."""
    folder = tmp_path_factory.mktemp("bad")
    here = os.getcwd()
    write_checkpoints(folder)
    files = {"same": [{**PAIR, "rejected": PAIR["chosen"]}] * 3, "good": [CHAT] * 9}
    for name, record in BAD_RECORDS.items():
        good = PAIR if name.startswith("pair") else CHAT
        files[name] = [good, record, good]
    for name, records in files.items():
        lines = [json.dumps(record) for record in records]
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
    os.chdir(folder)
    yield folder
    os.chdir(here)


def build(**changes) -> TinyLM:
    return TinyLM(replace(TINY, **changes))


def stream_beams():
    tokenizer = Tokenizer.from_pretrained("run")
    beams = partial(beam_search, num_beams=2)
    return list(stream(build(), tokenizer, "the", SamplingConfig(3), steps=beams))


def draft():
    return speculative_generate(build(), build(vocab_size=100), [1, 2], SamplingConfig(3))


LONG = "shorten the prompt, ask for at most 4, or stretch the model"
CALLS = {  # name of the case: the call, and what its message says
    "lora 0": (lambda: add_lora(build(), LoraConfig(r=0)), "r=0: .*use 1"),
    "lora -1": (lambda: LoraConfig(r=-1), "r=-1: use"),
    "lora 99": (lambda: add_lora(build(), LoraConfig(r=99)), "r=99: .*, use .*32"),
    "mla 0": (lambda: build(**LATENT, kv_lora_rank=0), "kv_lora_rank=0: use"),
    "mla 99": (lambda: build(**LATENT, kv_lora_rank=99), "kv_lora_rank is 99: use 1 to 32"),
    "mla queries -1": (
        lambda: build(**LATENT, kv_lora_rank=8, q_lora_rank=-1),
        "q_lora_rank=-1: use",
    ),
    "mla queries 99": (
        lambda: build(**LATENT, kv_lora_rank=8, q_lora_rank=99),
        "q_lora_rank is 99: use 1 to 32",
    ),
    "experts": (
        lambda: build(num_experts=4, num_experts_per_tok=5),
        "num_experts_per_tok=5: .* 4",
    ),
    "groups": (
        lambda: build(num_experts=8, n_group=3),
        "n_group=3: make it divide num_experts=8",
    ),
    "kept groups": (
        lambda: build(num_experts=8, n_group=2, topk_group=3),
        "topk_group=3: use .*2",
    ),
    "kv heads": (lambda: build(num_key_value_heads=3), "num_key_value_heads=3: make it divide"),
    "window": (lambda: build(sliding_window=0), "sliding_window=0: use a number above 0"),
    "rope": (
        lambda: build(rope_scaling={"rope_type": "spiral"}),
        "'spiral': use one of default, linear",
    ),
    "too long": (lambda: generate(build(), [[1] * 60], SamplingConfig(10)), LONG),
    "too long, beams": (lambda: beam_search(build(), [1] * 60, 2, 10), LONG),
    "no prompt": (lambda: generate(build(), [], SamplingConfig(3)), "prompts is empty: give"),
    "empty prompt": (
        lambda: generate(build(), [[1], []], SamplingConfig(3)),
        r"prompts\[1\]=\[\]: give",
    ),
    "unknown token": (
        lambda: generate(build(), [[1, 999]], SamplingConfig(3)),
        "999, but vocab_size=300: use",
    ),
    "token below 0": (
        lambda: generate(build(), [[1, -1]], SamplingConfig(3)),
        r"prompts\[0\]=\[1, -1\]: give",
    ),
    "draft": (draft, "vocab_size=100 for a model with 300, .* use a draft of the same tokenizer"),
    "beams": (stream_beams, "they must come one by one, and beam search knows none until its end"),
    "missing": (lambda: load("incomplete"), "incomplete .*model.norm.weight.* missing"),
    "extra": (lambda: load("too-much"), "model.more.weight is not expected"),
    "misshapen": (lambda: load("misshapen"), r"model.norm.weight is \[5\] and should be \[32\]"),
    "family": (lambda: load("foreign"), "model_type='bert': this reads llama"),
    "rope of a file": (lambda: load("spiral"), "'spiral': use one of default, linear"),
    "pickles": (lambda: load("pickled"), "pickled.*pickles.* can run code"),
    "torn": (lambda: load("torn"), "torn.* cannot be used .*: (copy|give)"),
    "adapter, other shape": (
        lambda: load_lora(build(), "wide-adapter"),
        "not for this model: missing",
    ),
    "adapter, other base": (
        lambda: load_lora(build(), "adapter", base_model="dogs"),
        "base_model='dogs': adapter is for 'cats'",
    ),
    "beta": (lambda: DPOConfig(beta=-1.0), "beta=-1.0: give a number above 0"),
}
SHORT = "--out new --train.max-steps 1 --train.batch-size 2 --train.sample-tokens 3"
SHORT += " --data.seq-len 32"
SFT = f"sft {SHORT} --run run --data.path"
DPO = f"dpo {SHORT} --run run --data.path"
COMMANDS = {  # command: what its message says
    f"{SFT} good.jsonl --lora.r -1": "r=-1: use",
    f"{SFT} good.jsonl --lora.r 99": "r=99: .*, use .*32",
    "pretrain --out new --model.kv-lora-rank 0": "kv_lora_rank=0: use",
    "info --model.num-experts 4 --model.num-experts-per-tok 5": "num_experts_per_tok=5: .* 4",
    "info --model.num-experts 8 --model.n-group 3": "n_group=3: make it divide num_experts=8",
    "pretrain --out new --model.sliding-window -4": "sliding_window=-4: use a number above 0",
    "pretrain --out new --model.layer-types spiral": (
        "model.layer_types=.'spiral',.: spiral is unknown: use full_attention, sliding_attention"
    ),
    "pretrain --out new --model.layer-types full_attention full_attention": (
        "model.layer_types=.*: give .* for each of the 3 layers"
    ),
    "pretrain --out new --model.layer-types full_attention --model.sliding-window 8": (
        "model.sliding_window=8: no layer has it, layer_types needs a sliding_attention"
    ),
    "pretrain --out new --model.layer-types sliding_attention": (
        "model.sliding_window=None: layer_types has sliding_attention: give the number"
    ),
    "pretrain --out new --model.block nowhere:MyBlock": (
        "model.block='nowhere:MyBlock': cannot be imported .ModuleNotFoundError: .*; write it as"
    ),
    "generate --run run --model.block tinylm.model:MyBlock": "tinylm.model has no MyBlock; write",
    "pretrain --out new --model.block tinylm.model:TinyLM": "TinyLM is no subclass of tinylm.model",
    "generate --run narrow --quantize int4": (
        "quantize='int4': .*q_proj has 24 inputs, which groups of 32 do not divide; use int8"
    ),
    "export --run run --out new --quantize int5": "quantize='int5': use one of int8, int4",
    "generate --run run --prompt cat --max-new-tokens 63": (
        "ask for at most 6[0-9], or stretch the model"
    ),
    "generate --run incomplete": "incomplete .*model.norm.weight.* missing",
    "generate --run foreign": "model_type='bert': this reads llama",
    "generate --run pickled": "pickled.*pickles.* can run code",
    "generate --run torn": "torn.* cannot be used .*: (copy|give)",
    f"{SFT} role.jsonl": "'role.jsonl', record 2: messages.0.=.*'asistant'.* needs a role .system",
    f"{SFT} no-content.jsonl": (
        "'no-content.jsonl', record 2: messages.0.={'role': 'user'} needs .* a content"
    ),
    f"{SFT} field.jsonl": (
        r"'field.jsonl', record 2: has \['answer', 'instruction'\]; give messages, or"
    ),
    f"{SFT} empty.jsonl": r"'empty.jsonl', record 2: messages=\[\] is no conversation; give",
    f"{SFT} user-last.jsonl": (
        "'user-last.jsonl', record 2: the last message is the user's; let the assistant answer"
    ),
    f"{DPO} pair-role.jsonl": "'pair-role.jsonl', record 2: messages.0.=.*'boss'.* needs a role",
    f"{DPO} pair-field.jsonl": "'pair-field.jsonl', record 2: has no rejected answer; give",
    f"{DPO} pair-empty.jsonl": (
        r"'pair-empty.jsonl', record 2: messages=\[\] is no conversation; give"
    ),
    f"{DPO} pair-user-last.jsonl": (
        "record 2: the last message is the user's; let the assistant answer"
    ),
    f"{DPO} pair-prompts.jsonl": "record 2: chosen and rejected answer different prompts; make",
    f"{DPO} same.jsonl": "'same.jsonl' has no pair .*; left out: 3 with the same answer twice",
    f"sft {SHORT} --data.path good.jsonl --run mute": (
        "'mute' has a tokenizer without a chat template; use --chatml"
    ),
    f"dpo {SHORT} --data.path good.jsonl --run mute": (
        "'mute' has a tokenizer without a chat template; use --chatml"
    ),
    f"sft {SHORT} --data.path good.jsonl --run none": (
        "'none' does not exist; `tinylm pretrain --out none` makes it"
    ),
    f"dpo {SHORT} --data.path good.jsonl --run none": (
        "'none' does not exist; `tinylm sft --out none` makes it"
    ),
    "chat --run none": "'none' does not exist; `tinylm pretrain --out none` makes it",
    "evaluate run none": "'none' does not exist; `tinylm pretrain --out none` makes it",
    f"{DPO} good.jsonl --beta 0": "beta=0.0: give a number above 0",
    f"sft {SHORT} --data.path good.jsonl --run adapter": "adapter.* is an adapter",
    f"sft {SHORT} --data.path good.jsonl --run pickled": "pickled.*pickles.* can run code",
    "chat --run adapter": "adapter.* is an adapter",
    "generate --run adapter": "adapter.* is an adapter",
    "chat --run mute": "chat template",
    f"{DPO} pair-no-prompt.jsonl": "'pair-no-prompt.jsonl', record 2",
}


def check_one_line(message: str, expected: str) -> None:
    assert len(message.strip().splitlines()) == 1, message
    assert re.search(expected, message), message


@pytest.mark.parametrize("name", CALLS)
def test_call_gets_one_line(place, name):
    call, expected = CALLS[name]
    with pytest.raises(ValueError) as error:
        call()
    check_one_line(str(error.value), expected)


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.replace(f" {SHORT}", ""))
def test_command_gets_one_line_and_leaves_nothing(place, command, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("Hello\n"))
    try:
        assert main(shlex.split(command)) == 2
        check_one_line(capsys.readouterr().err, f"^tinylm: error: .*{COMMANDS[command]}")
        assert not Path("new").exists()
    finally:
        shutil.rmtree("new", ignore_errors=True)


@pytest.mark.parametrize("device", ["cuda", "mps", "tpu"])
@pytest.mark.parametrize(
    "command",
    [f"{SFT} good.jsonl --train.device", "generate --run run --device", "evaluate run --device"],
    ids=lambda command: command.split()[0],
)
def test_a_device_that_is_absent_gets_one_line(place, command, device, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert main(shlex.split(f"{command} {device}")) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    assert f"device='{device}': PyTorch sees no GPU here; give cpu or auto" in line
    assert not Path("new").exists()
