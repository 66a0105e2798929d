"""Chats from end to end: where answers end, and templates and tokenizers that fail."""

import io
import json
import os
import shlex
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import tokenizers
import torch
from tokenizers import decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedTokenizerFast,
)

from tinylm.chat import end_token_ids
from tinylm.chat_template import Tokenizer
from tinylm.checkpoints import save_model
from tinylm.cli import main
from tinylm.generate import generate_text
from tinylm.hub import load, load_sampling, save
from tinylm.model import ModelConfig, TinyLM
from tinylm.tokenizer import CHATML_TEMPLATE, SPECIAL_TOKENS

TEXT = [
    "birds sing in the old pear tree > all day. Who sings? Birds do. user assistant system\n"
] * 30
CHAT = [{"role": "user", "content": "Who sings?"}, {"role": "assistant", "content": "Birds do."}]
FEW = "--data.seq-len 64 --train.max-steps 2 --train.batch-size 2 --train.sample-tokens 3"
FEW += " --train.num-threads 1 --train.checkpoint-interval 1 --overwrite"
HEADS = "{{ bos_token }}{% for m in messages %}"
HEADS += "{{ '<|turn|>' + m['role'] + '\\n' + m['content'] + '<|over|>' }}{% endfor %}"
HEADS += "{% if add_generation_prompt %}{{ '<|turn|>assistant\\n' }}{% endif %}"


def foreign_tokenizer(*special: str) -> PreTrainedTokenizerFast:
    """A tokenizer that others have trained: its special tokens are not ours."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    names = ["<bos>", "<eos>", *special]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=330, special_tokens=names, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(TEXT, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<eos>",
        additional_special_tokens=list(special),
    )


def write_model(
    folder: Path, tokenizer: PreTrainedTokenizerFast, by_heart: list[int] | None = None
) -> None:
    """A tiny checkpoint, which says a row of tokens by heart if it is given one."""
    torch.manual_seed(0)
    shape = dict(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=128
    )
    model = TinyLM(ModelConfig(vocab_size=len(tokenizer), **shape, embedding_range=0.5))
    if by_heart:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        row = torch.tensor([by_heart])
        for _ in range(100):
            loss = model(row, labels=row)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    save_model(
        model, folder, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id
    )
    tokenizer.save_pretrained(folder)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a base, a chat model of others, and chats and pairs; it is the current one."""
    folder = tmp_path_factory.mktemp("chats")
    here = os.getcwd()
    os.chdir(folder)
    write_model(Path("base"), Tokenizer.train(TEXT, 330).hf_tokenizer)
    write_model(Path("plain"), foreign_tokenizer())
    answer = {"prompt": "Who sings?", "completion": "a > b"}
    Path("chats.jsonl").write_text("\n".join([json.dumps(answer)] * 9))
    pair = {"prompt": "Who sings?", "chosen": "Me", "rejected": "A"}
    Path("pairs.jsonl").write_text("\n".join([json.dumps(pair)] * 9))

    # A chat model with two end tokens, of which only generation_config.json knows the second.
    tokenizer = foreign_tokenizer("<|turn|>", "<|over|>")
    tokenizer.chat_template = HEADS
    wrapped = Tokenizer(tokenizer)
    write_model(Path("turns"), tokenizer, wrapped.apply_chat_template(CHAT + CHAT + CHAT))
    GenerationConfig(eos_token_id=[1, tokenizer.convert_tokens_to_ids("<|over|>")]).save_pretrained(
        "turns"
    )
    yield folder
    os.chdir(here)


def listed(folder: str) -> int | list[int]:
    return AutoModelForCausalLM.from_pretrained(folder).generation_config.eos_token_id


@pytest.fixture(scope="module")
def tuned(place):
    """A fine-tuned run."""
    assert main(shlex.split(f"sft --run base --out tuned --data.path chats.jsonl {FEW}")) == 0


def test_every_folder_keeps_the_list_of_end_tokens(tuned):
    """So does one tuned further, its checkpoint, an export, and what is opened and saved again."""
    assert main(shlex.split(f"dpo --run tuned --out further --data.path pairs.jsonl {FEW}")) == 0
    assert main(shlex.split("export --run further --out exported")) == 0
    save(*load("exported"), "saved")
    checkpoint = str(sorted(Path("tuned/checkpoints").iterdir())[-1])
    for folder in ("tuned", checkpoint, "further", "exported", "saved"):
        assert listed(folder) == [0, 3], folder
        assert load_sampling(folder).eos_token_id == (0, 3)
        _, tokenizer = load(folder)
        assert tokenizer.eos_token_ids == [0, 3]


def test_saved_templates_need_no_extension(tuned):
    """Plain Jinja reads the template of a run; the run can still be tuned: its marks come back."""
    import jinja2

    text = Path("tuned/chat_template.jinja").read_text()
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True)
    written = environment.from_string(text).render(messages=CHAT)
    assert written == AutoTokenizer.from_pretrained("tuned").apply_chat_template(
        CHAT, tokenize=False
    )
    assert "{% generation" not in text
    assert Tokenizer.from_pretrained("tuned").hf_tokenizer.chat_template == CHATML_TEMPLATE


def test_listed_end_tokens_end_a_text(place, capsys, monkeypatch):
    tokenizer = AutoTokenizer.from_pretrained("turns")
    prompt = Tokenizer(tokenizer).apply_chat_template(CHAT[:1], add_generation_prompt=True)
    peer = AutoModelForCausalLM.from_pretrained("turns")
    row = peer.generate(torch.tensor([prompt]), max_new_tokens=40, do_sample=False)[
        0, len(prompt) :
    ]
    answer = tokenizer.decode(row, skip_special_tokens=True)
    assert row[-1] == tokenizer.convert_tokens_to_ids("<|over|>") and len(row) < 40

    model, ours = load("turns")
    sampling = replace(load_sampling("turns"), max_new_tokens=40)
    assert generate_text(model, ours, [prompt], sampling) == [answer]
    for command, typed in (("chat", "Who sings?\n"), ("generate --temperature 0 --prompt Who", "")):
        monkeypatch.setattr("sys.stdin", io.StringIO(typed))
        assert main(shlex.split(f"{command} --run turns --max-new-tokens 40")) == 0
        assert "<|over|>" not in capsys.readouterr().out


def test_chat_ends_where_the_template_ends_an_answer(place, capsys, monkeypatch):
    """Without the list it is still in the template, though nothing is marked there."""
    os.rename("turns/generation_config.json", "turns/hidden.json")
    try:
        monkeypatch.setattr("sys.stdin", io.StringIO("Who sings?\n"))
        assert main(shlex.split("chat --run turns --max-new-tokens 40")) == 0
        assert "Birds do.\n" in capsys.readouterr().out
    finally:
        os.rename("turns/hidden.json", "turns/generation_config.json")


def test_chatml_without_its_tokens_ends_with_the_end_of_text(place):
    """Once the last piece of `<|im_end|>`, a ">", ended all answers."""
    command = f"sft --run plain --chatml --out chatml --data.path chats.jsonl {FEW}"
    assert main(shlex.split(command)) == 0
    tokenizer = Tokenizer.from_pretrained("chatml")
    ids, mask = tokenizer.chat_ids_and_mask(CHAT)
    assert listed("chatml") == 1 and end_token_ids(tokenizer) == [1]
    answer = [token for token, is_answer in zip(ids, mask, strict=True) if is_answer]
    assert tokenizer.decode(answer) == "Birds do.<eos>"


THINK = CHATML_TEMPLATE.replace(
    "assistant\\n' }}{%- endif", "assistant\\n<think>\\nLet me see: ' }}{%- endif"
)


def test_preferences_with_a_prompt_longer_than_a_turn(tuned):
    """Marks show the labels, so none are lost if the prompt opens a place to think: no NaN."""
    model, tokenizer = load("tuned")
    tokenizer.hf_tokenizer.chat_template = THINK
    save(model, tokenizer, "thinking")
    assert main(shlex.split(f"dpo --run thinking --out thought --data.path pairs.jsonl {FEW}")) == 0
    rows = [json.loads(line) for line in Path("thought/metrics.jsonl").read_text().splitlines()]
    losses = [row[name] for row in rows for name in ("loss", "validation_loss") if name in row]
    assert losses and all(loss == loss for loss in losses)


BODY = "{% for m in messages %}{% generation %}{{ m['content'] }}{% endgeneration %}{% endfor %}"
TEMPLATES = {
    "raises": (
        BODY + "{{ raise_exception('roles must alternate') }}",
        "the chat template fails: roles must alternate",
    ),
    "syntax": (BODY + "{% if %}", "the chat template fails: line 1: "),
    "undefined": (BODY + "{{ messages[7].role }}", "the chat template fails: "),
    "wrong-type": (BODY + "{{ 'a' + 1 }}", "the chat template fails: "),
    "recursion": (BODY + "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
    "huge": (BODY + "{% set a = 'cat' * 9999999999 %}", "more than 512 MB of memory"),
    "doubling": (
        BODY
        + "{% set n = namespace(a='cat') %}"
        + "{% for i in range(40) %}{% set n.a = n.a ~ n.a %}{% endfor %}",
        "more than 512 MB of memory",
    ),
    "long": (BODY + "{{ 'cat ' * 9999999 }}", "the chat template fails: it writes "),
    "power": (BODY + "{{ 7 ** 999999999 }}", "it computes a power"),
    "range": (BODY + "{% for i in range(999999999) %}{% endfor %}", "the chat template fails: "),
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_failing_template_is_one_line(place, name, capsys, monkeypatch):
    template, message = TEMPLATES[name]
    folder = Path(f"template-{name}")
    folder.mkdir()
    for path in Path("base").iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    (folder / "chat_template.jinja").write_text(template)
    for command in ("chat", f"sft --data.path chats.jsonl --out new {FEW}"):
        monkeypatch.setattr("sys.stdin", io.StringIO("Who sings?\n"))
        assert main(shlex.split(f"{command} --run {folder}")) == 2
        error = capsys.readouterr().err
        assert len(error.splitlines()) == 1 and message in error, error
        assert not Path("new").exists()


def test_template_that_refuses_a_record_shows_it(place, capsys):
    """A template that knows no system message: the line shows the chat that has one."""
    refuses = "{% if messages[0]['role'] == 'system' %}"
    refuses += "{{ raise_exception('no system, please') }}{% endif %}"
    model, tokenizer = load("base")
    tokenizer.hf_tokenizer.chat_template = refuses + CHATML_TEMPLATE
    save(model, tokenizer, "strict")
    with_system = [{"role": "system", "content": "Sing!"}, *CHAT]
    Path("system.jsonl").write_text(
        "\n".join(json.dumps({"messages": chat}) for chat in [CHAT, CHAT, with_system])
    )
    assert main(shlex.split(f"sft --run strict --out new --data.path system.jsonl {FEW}")) == 2
    error = capsys.readouterr().err
    assert "no system, please; in the chat [('system', 'Sing!')" in error
    assert len(error.splitlines()) == 1


def test_answers_without_an_end_are_refused(place, capsys):
    """If the end mark stands outside of the answer, the model would never learn to stop."""
    model, tokenizer = load("base")
    tokenizer.hf_tokenizer.chat_template = CHATML_TEMPLATE.replace(
        "+ '<|im_end|>' }}{% endgeneration %}", "}}{% endgeneration %}{{ '<|im_end|>' }}"
    )
    save(model, tokenizer, "outside")
    for stage, data in (("sft", "chats.jsonl"), ("dpo", "pairs.jsonl")):
        assert main(shlex.split(f"{stage} --run outside --out new --data.path {data} {FEW}")) == 2
        error = capsys.readouterr().err
        assert "the chat template ends no answer with a special token" in error
        assert not Path("new").exists()


BROKEN = {  # a file of a checkpoint: what it holds, and what is said
    "tokenizer.json": {"": "is damaged", "[]": "holds a list", '{"model": 3}': "files are damaged"},
    "tokenizer_config.json": {
        "{": "is damaged",
        "3": "holds a int",
        '{"eos_token": 4}': "files are damaged",
    },
    "special_tokens_map.json": {"{'": "is damaged"},
    "generation_config.json": {
        "{": "generation_config.json is damaged",
        '{"eos_token_id": "end"}': "give the id",
    },
}
CASES = [(file, text) for file, texts in BROKEN.items() for text in texts]


@pytest.mark.parametrize("file, text", CASES)
def test_broken_tokenizer_is_one_line(place, tmp_path, file, text, capsys):
    for path in Path("base").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / file).write_text(text)
    assert main(shlex.split(f"generate --run {tmp_path} --max-new-tokens 2")) == 2
    error = capsys.readouterr().err
    assert (
        len(error.splitlines()) == 1 and BROKEN[file][text] in error and str(tmp_path) in error
    ), error


def test_code_of_a_checkpoint_never_runs(place, capsys, monkeypatch):
    """A piped chat whose first line is "y" once agreed to run the code of the folder."""
    folder = Path("own-code")
    folder.mkdir()
    for path in Path("base").iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    (folder / "bird.py").write_text("open('ran', 'w').close()\n")
    config = {"tokenizer_class": "Bird", "auto_map": {"AutoTokenizer": ["bird.Bird", "bird.Bird"]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    monkeypatch.setattr("sys.stdin", io.StringIO("y\ny\n"))
    assert main(["chat", "--run", str(folder)]) == 2
    printed = capsys.readouterr()
    assert (
        "code of its own (auto_map), which is not run here" in printed.err
        and len(printed.err.splitlines()) == 1
    )
    assert printed.out == "" and sys.stdin.read() == "y\ny\n" and not Path("ran").exists()


def test_special_tokens_of_ours_are_as_they_were():
    """The end of a turn is the fourth of them; `chatml_template` depends on it."""
    assert SPECIAL_TOKENS[3] == "<|im_end|>" and "<|im_end|>" in CHATML_TEMPLATE
