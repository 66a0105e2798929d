"""The `tinylm` command: every command of the README, every recipe, and a clear line for every mistake."""

import json
import os
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tinylm.cli import main
from tinylm.commands import COMMANDS
from tinylm.recipes import recipe_names

ROOT = Path(__file__).resolve().parent.parent
TINY_MODEL = "--model.hidden-size 32 --model.num-hidden-layers 1 --model.num-attention-heads 2"
TINY_MODEL += " --model.num-key-value-heads None --model.max-position-embeddings 512"
TINY_TRAIN = (
    "--train.max-steps 3 --train.batch-size 8 --train.warmup-steps 1 --train.sample-tokens 5"
)
TINY_DATA = (
    "--data.stories 200 --data.validation-stories 20 --data.vocab-size 512 --data.seq-len 256"
)
TINY = f"{TINY_MODEL} {TINY_TRAIN} {TINY_DATA}".split()
HUB = {"tinystories": None, "25m": "sample-10BT", "104m": "sample-10BT", "openwebtext": None}
HUB |= {"wikitext": "wikitext-2-raw-v1"}  # recipe: name of its configuration


def process(words: list[str], cwd: Path) -> subprocess.CompletedProcess:
    """Run a command in a process of its own."""
    return subprocess.run(
        words, cwd=cwd, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=300
    )


def tinylm(words: list[str], cwd: Path) -> subprocess.CompletedProcess:
    return process([sys.executable, "-m", "tinylm", *words], cwd)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder to work in, with a small run, some text, and a stand-in for a dataset of the hub."""
    folder = tmp_path_factory.mktemp("cli")
    settings = {
        "TINYLM_CACHE": str(folder / "cache"),
        "HF_HUB_OFFLINE": "1",
        "TQDM_DISABLE": "1",
        "COLUMNS": "100",
    }
    settings |= {
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        "OMP_NUM_THREADS": "1",
    }
    before, here = dict(os.environ), os.getcwd()
    os.environ.update(settings)
    os.chdir(folder)
    import datasets  # now that it is told to stay offline

    (folder / "mine.txt").write_text("the cat sat on the mat\n" * 300)
    rows = datasets.Dataset.from_dict(
        {"text": [f"the cat sat on mat number {i}" * (1 + i % 9) for i in range(300)]}
    )
    for name in {"", *filter(None, HUB.values())}:
        for split in ("train", "validation"):
            path = folder / f"hub-{name}" / name / f"{split}-00000-of-00001.parquet"
            path.parent.mkdir(parents=True, exist_ok=True)
            rows.to_parquet(path)
    done = tinylm(["pretrain", *TINY], folder)
    assert done.returncode == 0, done.stderr
    yield folder
    os.chdir(here)
    os.environ.clear()
    os.environ.update(before)


def call(command: str) -> int:
    """The command in this process: its exit code."""
    return main(shlex.split(command))


def test_help_answers_at_once():
    start = time.perf_counter()
    done = process([sys.executable, "-X", "importtime", "-m", "tinylm", "--help"], ROOT)
    assert time.perf_counter() - start < 1.0
    assert done.returncode == 0 and "pretrain" in done.stdout
    assert not re.search(r"\| +(torch|transformers|numpy|tyro)$", done.stderr, re.M)


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_has_help(place, command, capsys):
    with pytest.raises(SystemExit) as stop:
        call(f"{command} --help")
    assert stop.value.code == 0 and f"tinylm {command}" in capsys.readouterr().out


def test_no_command_shows_help(capsys):
    assert call("") == 0 and "usage: tinylm" in capsys.readouterr().out


FEW = "--train.max-steps 3 --data.stories 200 --data.validation-stories 5 --overwrite".split()
QUICK = "--recipe runs/default/config.yaml --share 0.002 --overwrite".split()


def readme_commands() -> list[str]:
    """Every line of a code block of the README that calls the command, as it stands there."""
    blocks = re.findall(r"```\w*\n(.*?)```", (ROOT / "README.md").read_text("utf-8"), re.S)
    lines = [
        line.strip().removeprefix("$ ")
        for block in blocks
        for line in block.replace("\\\n", " ").splitlines()
    ]
    parts = [re.split(r"\s+#\s", part)[0].strip() for line in lines for part in line.split("&&")]
    return [part for part in parts if re.match(r"(tinylm|torchrun .*-m tinylm)\b", part)]


def in_small(command: str, place: Path) -> list[str]:
    """A command of the README, with flags that make its training short, and stand-ins for files and datasets."""
    words = shlex.split(command)
    words = [sys.executable, "-m", "tinylm", *words[1:]] if words[0] == "tinylm" else words
    words = (
        [sys.executable, "-m", "torch.distributed.run", *words[1:]]
        if words[0] == "torchrun"
        else words
    )
    recipe = words[words.index("--recipe") + 1] if "--recipe" in words else ""
    if "--data.path" in words:
        at = words.index("--data.path") + 1
        words[at] = "mine.txt" if Path(words[at]).suffix in (".txt", "") else words[at]
    elif recipe in HUB and "pretrain" in words:
        words += ["--data.path", f"hub-{HUB[recipe] or ''}"]
    elif recipe == "shakespeare-char" and "pretrain" in words:
        words += ["--data.path", "mine.txt"]
    if "--run" in words:  # every test stands alone, so none can use what another left
        words[words.index("--run") + 1] = "runs/default"
    words = ["runs/default" if word == "runs/two" and "sft" in words else word for word in words]
    words += {"chat": ["--run", "runs/default"], "speedrun": QUICK}.get(words[3], [])
    words += FEW if "sft" in words else []
    if "pretrain" in words and "--help" not in words:
        words += [*TINY, *([] if "--resume" in words else ["--overwrite"])]
    return words


def test_readme_shows_the_main_commands():
    assert {"tinylm pretrain"} <= set(readme_commands())


@pytest.mark.parametrize("command", readme_commands())
def test_readme_command(place, command):
    done = process(in_small(command, place), place)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"


def test_the_run_is_complete(place):
    names = {path.name for path in (place / "runs" / "default").iterdir()}
    expected = "config.yaml model.safetensors config.json tokenizer.json metrics.jsonl loss.png samples.txt checkpoints"
    assert set(expected.split()) <= names


def test_closing_table(place):
    done = tinylm(["pretrain", *TINY, "--overwrite"], place)
    for name in "loss|floor|distance to the floor|perplexity|answers, all|parameters|tokens|time|speed".split(
        "|"
    ):
        assert re.search(rf"^{name} +\S", done.stdout, re.M), name
    assert (place / re.search(r"^curve: (\S+)$", done.stdout, re.M)[1]).exists()
    assert (
        tinylm(
            shlex.split(re.search(r"^next:  tinylm (.*)$", done.stdout, re.M)[1]), place
        ).returncode
        == 0
    )


def test_generate_is_repeatable(place, capsys):
    texts = []
    for seed in (1, 1, 2):
        assert call(f"generate --prompt 'One day' --seed {seed} --max-new-tokens 20") == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2] and texts[0].startswith("One day")


def test_evaluate_finds_the_loss_of_training(place, capsys):
    assert call("evaluate") == 0
    report = json.loads((place / "runs" / "default" / "report" / "report.json").read_text())[
        "runs/default"
    ]
    rows = [
        json.loads(line)
        for line in (place / "runs" / "default" / "metrics.jsonl").read_text().splitlines()
    ]
    loss = [row["validation_loss"] for row in rows if "validation_loss" in row][-1]
    assert abs(report["loss"] - loss) < 2e-3 and not report["leak"]
    capsys.readouterr()
    assert call("evaluate --data.path mine.txt") == 0
    assert "floor" not in capsys.readouterr().out


def test_info_of_a_run_counts_its_parameters(place, capsys):
    from safetensors.torch import load_file

    assert call("info --run runs/default") == 0
    weights = load_file(place / "runs" / "default" / "model.safetensors").values()
    total = re.search(r"^  total +([\d,]+)$", capsys.readouterr().out, re.M)[1]
    assert int(total.replace(",", "")) == sum(weight.numel() for weight in weights)


@pytest.mark.parametrize("recipe", ["shakespeare-char", *HUB])
def test_recipe_on_a_stand_in(place, recipe, capsys):
    path = f"hub-{HUB[recipe] or ''}" if recipe in HUB else "mine.txt"
    assert call(f"info --recipe {recipe}") == 0
    small = f"{TINY_MODEL} {TINY_TRAIN} --data.vocab-size 300 --data.seq-len 64 --train.sample-prompt the"
    assert call(f"pretrain --recipe {recipe} --data.path {path} --out runs/{recipe} {small}") == 0
    out = capsys.readouterr().out
    assert "perplexity" in out and "floor" not in out
    assert call(f"generate --run runs/{recipe} --prompt 'the cat' --max-new-tokens 5") == 0


def test_config_of_a_run_is_a_recipe(place):
    assert call("pretrain --recipe runs/default/config.yaml --out runs/again") == 0
    weights = [
        (place / "runs" / name / "model.safetensors").read_bytes() for name in ("default", "again")
    ]
    assert weights[0] == weights[1]


def test_every_recipe_has_a_stand_in():
    assert set(recipe_names()) == {"default", "shakespeare-char", *HUB}


BAD_YAML = {
    "broken.yaml": "model: [",
    "list.yaml": "- 1",
    "key.yaml": "train: {max_step: 3}",
    "type.yaml": "out: 3",
}
MISTAKES = {
    "pretrian": "did you mean 'pretrain'",
    "pretrain --train.max-stepz 3": "did you mean --train.max-steps",
    "pretrain --train.max-steps many": "'many'",
    "pretrain extra": "extra",
    "pretrain --recipe": "--recipe: expected one argument",
    "pretrain --recipe defualt": "did you mean 'default'",
    "pretrain --recipe none.yaml": "No such file or directory: 'none.yaml'",
    "pretrain --recipe broken.yaml": "broken.yaml is not YAML",
    "pretrain --recipe list.yaml": "list.yaml holds no fields",
    "pretrain --recipe key.yaml": "did you mean 'max_steps'",
    "pretrain --recipe type.yaml": "out=3 must be str",
    "pretrain": "'runs/default' already exists; use --resume, --overwrite",
    "pretrain --out mine.txt": "already exists",
    "pretrain --out new --data.path none.txt": "none.txt",
    "pretrain --out new --data.path some/name": "some/name",
    "pretrain --out new --data.path empty.txt": "empty.txt",
    "pretrain --out new --data.path binary.txt": "binary.txt",
    "pretrain --out new --data.path hub- --data.text-column story": "has None for text in 'story'",
    "pretrain --out new --data.path hub- --data.split test": "no split 'test'",
    "pretrain --out new --data.vocab-size 100": "vocab_size",
    "pretrain --out new --model.num-attention-heads 3": "num_attention_heads",
    "pretrain --out new --model.head-dim 7": "head_dim",
    "pretrain --out new --model.num-key-value-heads 3": "num_key_value_heads",
    "pretrain --out new --model.max-position-embeddings 8": "max_position_embeddings",
    "pretrain --out new --model.rope-scaling '{rope_type: magic}'": "rope_type",
    "pretrain --out new --train.schedule sine": "schedule",
    "pretrain --resume --data.stories 300": "stories",
    "pretrain --resume --model.hidden-size 64": "hidden_size",
    "generate --run none": "run='none' does not exist",
    "generate --run half": "'half' is not finished",
    "generate --run foreign": "model_type",
    "generate --run torn": "torn",
    "generate --temperature -1": "temperature",
    "generate --top-p 2": "top_p",
    "generate --prompt cat --max-new-tokens 600": "max_position_embeddings",
    "evaluate --run none": "run='none' does not exist",
    "evaluate --data.path none.txt": "none.txt",
    "info --recipe none": "recipe='none' is unknown",
    "info --run none": "run='none' does not exist",
    "info --run runs/default --model.hidden-size 64": "leave --model.hidden-size 64 out",
}


@pytest.fixture(scope="module")
def traps(place):
    """Files and folders to stumble over."""
    for name, text in BAD_YAML.items():
        (place / name).write_text(text)
    (place / "empty.txt").write_text("")
    (place / "binary.txt").write_bytes(bytes(range(128, 256)))
    (place / "half" / "checkpoints").mkdir(parents=True)
    for name, text in {"foreign": '{"model_type": "bert"}', "torn": ""}.items():
        (place / name).mkdir()
        for file in (place / "runs" / "default").glob("*.json"):
            (place / name / file.name).write_bytes(file.read_bytes())
        weights = (place / "runs" / "default" / "model.safetensors").read_bytes()
        (place / name / "model.safetensors").write_bytes(weights if text else weights[:1000])
        if text:
            (place / name / "config.json").write_text(text)
    return place


def files(place: Path) -> set[tuple[Path, int]]:
    return {
        (p, p.stat().st_mtime_ns)
        for p in place.rglob("*")
        if p.is_file() and "cache" not in p.parts
    }


@pytest.mark.parametrize("command", MISTAKES)
def test_mistake_gets_one_line_and_leaves_nothing(traps, command, capsys):
    before = files(traps)
    words = shlex.split(command)
    tiny = TINY if {"--out", "--resume"} & set(words) else []
    pairs = [tiny[i : i + 2] for i in range(0, len(tiny), 2)]
    words[1:1] = [word for pair in pairs if pair[0] not in words for word in pair]
    code = call(shlex.join(words))
    error = capsys.readouterr().err
    lines = [
        line for line in re.split("[\r\n]+", error) if line.strip() and "documents/s" not in line
    ]
    assert code == 2 and len(lines) == 1 and lines[0].startswith("tinylm: error: "), error
    assert MISTAKES[command] in error, error
    assert files(traps) == before and not (traps / "new").exists()


@pytest.mark.skipif(Path("/dev/nvidia0").exists(), reason="there is a GPU")
def test_cuda_without_gpu_is_one_line(place, capsys):
    assert call("generate --device cuda") == 2
    assert "no GPU" in capsys.readouterr().err


def test_mistake_in_a_real_process(place):
    done = tinylm(["generate", "--run", "none"], place)
    assert done.returncode == 2 and done.stdout == "" and len(done.stderr.strip().splitlines()) == 1


def test_only_the_first_process_prints(place):
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
    ]
    done = process([*torchrun, "-m", "tinylm", "pretrain", "--out", "runs/one-voice", *TINY], place)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("perplexity") == 1 and done.stdout.count("next:") == 1
