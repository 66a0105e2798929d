"""The `tinylm` command: all commands of the README, all recipes, a clear line for each mistake."""

import json
import os
import re
import resource
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from preloaded import python

from tinylm.cli import main
from tinylm.commands import COMMANDS
from tinylm.recipes import recipe_names

ROOT = Path(__file__).resolve().parent.parent
TINY_MODEL = "--model.hidden-size 32 --model.num-hidden-layers 1 --model.num-attention-heads 2"
TINY_MODEL += " --model.num-key-value-heads None --model.max-position-embeddings 512"
TINY_TRAIN = "--train.max-steps 3 --train.batch-size 8 --train.warmup-steps 1"
TINY_TRAIN += " --train.sample-tokens 5 --train.num-threads 1"
TINY_DATA = "--data.stories 200 --data.validation-stories 20 --data.vocab-size 512"
TINY_DATA += " --data.seq-len 256"
TINY = f"{TINY_MODEL} {TINY_TRAIN} {TINY_DATA}".split()
HUB = {  # recipe: which configuration of a dataset of the hub it reads
    "tinystories": "",
    "openwebtext": "",
    "25m": "sample-10BT",
    "104m": "sample-10BT",
    "wikitext": "wikitext-2-raw-v1",
}
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
TINYLM = """
import runpy
runpy.run_module("tinylm", run_name="__main__", alter_sys=True)
"""


def process(words: list[str], cwd: Path) -> subprocess.CompletedProcess:
    """Run a program in a process of its own."""
    return subprocess.run(
        words, cwd=cwd, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=300
    )


def tinylm(words: list[str], cwd: Path) -> subprocess.CompletedProcess:
    """Run the command line in a process of its own."""
    return python(TINYLM, *words, cwd=cwd)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder to work in, with a small run, some text, and a stand-in for a dataset of the hub."""
    folder = tmp_path_factory.mktemp("cli")
    before = dict(os.environ)
    here = os.getcwd()
    os.environ.update(
        TINYLM_CACHE=str(folder / "cache"),
        HF_HUB_OFFLINE="1",
        TQDM_DISABLE="1",
        COLUMNS="100",
        PYTHONPATH=os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        OMP_NUM_THREADS="1",
    )
    os.chdir(folder)
    import datasets  # it reads HF_HUB_OFFLINE when it is imported

    # Texts, and stand-ins for datasets.
    (folder / "mine.txt").write_text("the cat sat on the mat\n" * 300)
    texts = [f"the cat sat on mat number {i}" * (1 + i % 9) for i in range(300)]
    rows = datasets.Dataset.from_dict({"text": texts})
    for name in set(HUB.values()):
        for split in ("train", "validation"):
            path = folder / f"hub-{name}" / name / f"{split}-00000-of-00001.parquet"
            path.parent.mkdir(parents=True, exist_ok=True)
            rows.to_parquet(path)

    # The run.
    done = tinylm(["pretrain", *TINY], folder)
    assert done.returncode == 0, done.stderr
    (folder / "printed.txt").write_text(done.stdout)
    yield folder
    os.chdir(here)
    os.environ.clear()
    os.environ.update(before)


def call(command: str) -> int:
    """Run the command line in this process; return its exit code."""
    return main(shlex.split(command))


def test_help_answers_at_once():
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = process([sys.executable, "-X", "importtime", "-m", "tinylm", "--help"], ROOT)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    # The time that it computes; on a busy machine it also waits.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1.0
    assert done.returncode == 0 and "pretrain" in done.stdout
    assert not re.search(r"\| +(torch|transformers|numpy|tyro)$", done.stderr, re.MULTILINE)


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_has_help(place, command, capsys):
    with pytest.raises(SystemExit) as stop:
        call(f"{command} --help")
    assert stop.value.code == 0 and f"tinylm {command}" in capsys.readouterr().out


def test_no_command_shows_help(capsys):
    assert call("") == 0 and "usage: tinylm" in capsys.readouterr().out


FEW = "--train.max-steps 3 --data.stories 200 --data.validation-stories 5 --overwrite".split()
QUICK = "--recipe runs/default/config.yaml --share 0.002 --overwrite".split()
# `tinylm speedrun` types its commands itself; this adds flags to them that make them short.
QUICK_SPEEDRUN = """
import sys
from tinylm import cli, commands

FEW = {"data.stories": 200, "data.validation_stories": 5}
FLAGS = {"sft": FEW, "dpo": FEW, "grpo": FEW, "evaluate": {"stories": 5}}
print_and_start = commands.print_and_start
commands.print_and_start = lambda name, values: print_and_start(name, values | FLAGS.get(name, {}))
sys.exit(cli.main(sys.argv[1:]))
"""


def readme_commands() -> list[str]:
    """List the commands in the code blocks of the README, as they stand there."""
    blocks = re.findall(r"```\w*\n(.*?)```", (ROOT / "README.md").read_text("utf-8"), re.DOTALL)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    parts = [part for line in lines for part in line.strip().removeprefix("$ ").split("&&")]
    commands = [re.split(r"\s+#\s", part)[0].strip() for part in parts]
    return [word for word in commands if re.match(r"(tinylm|torchrun .*-m tinylm)\b", word)]


def stand_in(recipe: str) -> str:
    """Name the data that is read in place of a recipe's own; "" for the built-in stories."""
    if recipe in HUB:
        return f"hub-{HUB[recipe]}"
    return "mine.txt" if recipe == "shakespeare-char" else ""


def value_of(words: list[str], flag: str) -> str:
    """Return the value of a flag in a command, or an empty string."""
    return words[words.index(flag) + 1] if flag in words else ""


def in_small(command: str) -> list[str]:
    """Return a command of the README with short training, and stand-ins for files and datasets."""
    _, *words = shlex.split(command)

    # Data.
    data = value_of(words, "--data.path")
    if data and Path(data).suffix in (".txt", ""):
        words[words.index("--data.path") + 1] = "mine.txt"
    replacement = stand_in(value_of(words, "--recipe"))
    if "pretrain" in words and not data and replacement:
        words += ["--data.path", replacement]

    # Every test stands alone, so it uses the run of the fixture, not what another test left.
    if "--run" in words:
        words[words.index("--run") + 1] = "runs/default"
    if "sft" in words:
        words = ["runs/default" if word == "runs/two" else word for word in words]

    # Training, short.
    if words[0] == "chat":
        words += ["--run", "runs/default"]
    if words[0] == "speedrun":
        words += QUICK
    if words[0] == "grpo" or "sft" in words:
        words += FEW
    if "pretrain" in words and "--help" not in words:
        words += TINY
        if "--resume" not in words:
            words.append("--overwrite")
    return words


def test_readme_shows_the_main_commands():
    commands = readme_commands()
    assert "tinylm pretrain" in commands
    assert any(command.startswith("torchrun") and "pretrain" in command for command in commands)


@pytest.mark.parametrize("command", readme_commands())
def test_readme_command(place, command):
    words = in_small(command)
    if command.startswith("torchrun"):
        done = process([*TORCHRUN, *words], place)
    else:
        done = python(QUICK_SPEEDRUN if "speedrun" in words else TINYLM, *words, cwd=place)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    if command.startswith("torchrun"):
        assert done.stdout.count("next:") == 1, "only the first process prints"


def test_a_short_model_is_asked_only_what_it_has_positions_for(place, capsys):
    few = "--data.seq-len 128 --data.stories 200 --data.validation-stories 20 --overwrite"
    few += " --train.max-steps 2 --train.batch-size 4"
    shape = "--model.hidden-size 32 --model.max-position-embeddings 128"
    assert call(f"pretrain {shape} {few} --out runs/short") == 0
    capsys.readouterr()
    assert call(f"sft --run runs/short {few} --out runs/short-sft") == 0
    printed = capsys.readouterr().out
    assert re.search(r"^not asked +[1-9]\d* questions too long for 128 positions$", printed, re.M)
    assert re.search(r"^right replies +\S+ of [1-9]", printed, re.M)


def test_the_run_is_complete(place):
    names = {path.name for path in (place / "runs" / "default").iterdir()}
    expected = "config.yaml config.json tokenizer.json model.safetensors metrics.jsonl loss.png"
    expected += " samples.txt checkpoints"
    assert set(expected.split()) <= names


def test_closing_table(place):
    printed = (place / "printed.txt").read_text()
    names = "loss|floor|distance to the floor|perplexity|answers, all|parameters|tokens|time|speed"
    for name in names.split("|"):
        assert re.search(rf"^{name} +\S", printed, re.MULTILINE), name

    # What it says at the end is true.
    curve = re.search(r"^curve: (\S+)$", printed, re.MULTILINE)[1]
    assert (place / curve).exists()
    command = re.search(r"^next:  tinylm (.*)$", printed, re.MULTILINE)[1]
    assert call(command) == 0


def test_generate_is_repeatable(place, capsys):
    texts = []
    for seed in (1, 1, 2):
        assert call(f"generate --prompt 'One day' --seed {seed} --max-new-tokens 20") == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2] and texts[0].startswith("One day")


def test_evaluate_finds_the_loss_of_training(place, capsys):
    assert call("evaluate") == 0
    run = place / "runs" / "default"
    report = json.loads((run / "report" / "report.json").read_text())["runs/default"]
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [row["validation_loss"] for row in rows if "validation_loss" in row]
    assert abs(report["loss"] - losses[-1]) < 2e-3 and not report["leak"]

    # Text of one's own has no known floor.
    capsys.readouterr()
    assert call("evaluate --data.path mine.txt") == 0
    assert "floor" not in capsys.readouterr().out


def test_info_of_a_run_counts_its_parameters(place, capsys):
    from safetensors.torch import load_file

    assert call("info --run runs/default") == 0
    weights = load_file(place / "runs" / "default" / "model.safetensors").values()
    total = re.search(r"^  total +([\d,]+)$", capsys.readouterr().out, re.MULTILINE)[1]
    assert int(total.replace(",", "")) == sum(weight.numel() for weight in weights)


@pytest.mark.parametrize("recipe", ["shakespeare-char", *HUB])
def test_recipe_on_a_stand_in(place, recipe, capsys):
    assert call(f"info --recipe {recipe}") == 0
    small = f"{TINY_MODEL} {TINY_TRAIN} --data.vocab-size 300 --data.seq-len 64"
    small += f" --train.sample-prompt the --data.path {stand_in(recipe)}"
    assert call(f"pretrain --recipe {recipe} --out runs/{recipe} {small}") == 0
    out = capsys.readouterr().out
    assert "perplexity" in out and "floor" not in out
    assert call(f"generate --run runs/{recipe} --prompt 'the cat' --max-new-tokens 5") == 0


def test_config_of_a_run_is_a_recipe(place):
    assert call("pretrain --recipe runs/default/config.yaml --out runs/again") == 0
    first = (place / "runs" / "default" / "model.safetensors").read_bytes()
    again = (place / "runs" / "again" / "model.safetensors").read_bytes()
    assert first == again


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

    # Copies of the run, one with a foreign config and one with weights that are cut off.
    weights = (place / "runs" / "default" / "model.safetensors").read_bytes()
    for name in ("foreign", "torn"):
        (place / name).mkdir()
        for file in (place / "runs" / "default").glob("*.json"):
            (place / name / file.name).write_bytes(file.read_bytes())
        (place / name / "model.safetensors").write_bytes(weights)
    (place / "foreign" / "config.json").write_text('{"model_type": "bert"}')
    (place / "torn" / "model.safetensors").write_bytes(weights[:1000])
    return place


def files(place: Path) -> dict[Path, int]:
    """Return when each file was written last; the cache may change."""
    paths = [path for path in place.rglob("*") if path.is_file() and "cache" not in path.parts]
    return {path: path.stat().st_mtime_ns for path in paths}


def make_tiny(command: str) -> str:
    """Give a command that would train the flags of a tiny run, apart from flags that it has."""
    name, *words = shlex.split(command)
    if "--out" not in words and "--resume" not in words:
        return command
    flags = []
    for flag, value in zip(TINY[::2], TINY[1::2], strict=True):
        if flag not in words:
            flags += [flag, value]
    return shlex.join([name, *flags, *words])


@pytest.mark.parametrize("command", MISTAKES)
def test_mistake_gets_one_line_and_leaves_nothing(traps, command, capsys):
    before = files(traps)
    code = call(make_tiny(command))
    error = capsys.readouterr().err
    lines = [line for line in re.split("[\r\n]+", error) if line.strip()]
    lines = [line for line in lines if "documents/s" not in line]  # a progress bar
    assert code == 2 and len(lines) == 1 and lines[0].startswith("tinylm: error: "), error
    assert MISTAKES[command] in error, error
    assert files(traps) == before and not (traps / "new").exists()


@pytest.mark.skipif(Path("/dev/nvidia0").exists(), reason="there is a GPU")
def test_cuda_without_gpu_is_one_line(place, capsys):
    assert call("generate --device cuda") == 2
    assert "no GPU" in capsys.readouterr().err


def test_mistake_in_a_real_process(place):
    done = tinylm(["generate", "--run", "none"], place)
    assert done.returncode == 2 and done.stdout == ""
    assert len(done.stderr.strip().splitlines()) == 1
