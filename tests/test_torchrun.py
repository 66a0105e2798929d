"""Two processes give the losses of one process for the same global batch, in every stage."""

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from preloaded import python, ranks

from tinylm.checkpoints import load_model

RUN = """
import json, os, sys, time
from functools import partial
from pathlib import Path
from tinylm.files import DataConfig
from tinylm.dpo import DPOConfig, dpo
from tinylm.model import ModelConfig
from tinylm.pretrain import PretrainConfig, TrainConfig, pretrain
from tinylm.lora import LoraConfig
from tinylm.sft import SFTConfig, sft

model = ModelConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2)
often = dict(eval_interval=5, checkpoint_interval=10, log_interval=1)
often.update(sample_interval=0, sample_tokens=5)
precise = dict(num_threads=1, device="cpu", precision="fp32")
make = {"pretrain": partial(PretrainConfig, model), "sft": SFTConfig, "dpo": DPOConfig}

folder, jobs = Path(sys.argv[1]), json.loads(sys.argv[2])
for stage, name, settings in jobs:
    first = stage == "pretrain"
    count = dict(stories=200 if first else 60, validation_stories=15)
    data = DataConfig(**count, seq_len=256, cache_dir=str(folder / "cache"))
    more = {} if first else dict(run=str(folder / "alone"), lora=LoraConfig(r=settings.pop("r", 0)))
    more |= {"reference": settings.pop("reference")} if "reference" in settings else {}
    train = TrainConfig(**(dict(max_steps=15, batch_size=4) | often | precise | settings))
    config = make[stage](data=data, train=train, out=str(folder / name), resume=True, **more)
    try:
        {"pretrain": pretrain, "sft": sft, "dpo": dpo}[stage](config)
    except ValueError as error:
        if name != "uneven":
            raise
        print(error)

        # The other process may still be connecting to this one.
        (folder / f"refused-{stage}-{os.environ['RANK']}").touch()
        while len([*folder.glob(f"refused-{stage}-*")]) < 2:
            time.sleep(0.01)
"""


def run(folder: Path, *jobs: tuple, processes: int = 1) -> list[list[dict]] | str:
    """Return what each job logs, or prints; a job is (stage, name of the run, settings)."""
    start = python if processes == 1 else partial(ranks, processes)
    done = start(RUN, str(folder), json.dumps(jobs))
    assert done.returncode == 0, done.stdout + done.stderr
    logs = [folder / name / "metrics.jsonl" for _, name, _ in jobs]
    return [read_lines(log) for log in logs if log.exists()] or done.stdout


def read_lines(log: Path) -> list[dict]:
    return [json.loads(line) for line in log.read_text("utf-8").splitlines()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with `alone`, a pretraining run of one process and the base of later stages."""
    folder = tmp_path_factory.mktemp("runs")
    run(folder, ("pretrain", "alone", {}))
    return folder


@pytest.fixture(scope="module")
def alone(folder):
    return read_lines(folder / "alone" / "metrics.jsonl")


def close(rows: list[dict], expected: list[dict]) -> None:
    """Same steps, same number of targets, and the same numbers but for rounding."""
    for name in ("step", "tokens"):
        assert [row[name] for row in rows] == [row[name] for row in expected]
    names = "loss grad_norm validation_loss lr preference_loss reward_chosen accuracy kl"
    for name in names.split():
        values = [row[name] for row in rows if name in row]
        right = [row[name] for row in expected if name in row]
        assert values == pytest.approx(right, rel=2e-3, abs=2e-3), name


def undo(out: Path, newest: Path) -> None:
    """As if a run had been killed after its last but one checkpoint."""
    (out / "checkpoints" / "step-000015").rename(newest)
    (out / "model.safetensors").unlink()


def test_two_processes_give_the_losses_of_one(folder, alone):
    jobs = [("pretrain", f"parts-{parts}", {"grad_accum_steps": parts}) for parts in (1, 2)]
    for (_, name, _), rows in zip(jobs, run(folder, *jobs, processes=2), strict=True):
        close(rows, alone)
        saved = sorted(path.name for path in (folder / name / "checkpoints").iterdir())
        assert saved == ["step-000010", "step-000015"]


def test_two_processes_resume_what_one_began(folder, alone):
    job = ("pretrain", "mixed", {})
    run(folder, job)
    undo(folder / "mixed", folder / "away")
    close(*run(folder, job, processes=2), alone)
    assert (folder / "mixed" / "model.safetensors").exists()


def test_fsdp_gives_the_losses_and_the_files_of_one_process(folder, alone):
    in_parts = {"fsdp": True, "grad_accum_steps": 2}
    close(*run(folder, ("pretrain", "fsdp", in_parts), processes=2), alone)
    weights = [load_model(folder / name).state_dict() for name in ("alone", "fsdp")]
    torch.testing.assert_close(*weights, rtol=0, atol=0.03)  # Muon's directions are rough
    files = [folder / name / "checkpoints/step-000015/trainer.pt" for name in ("alone", "fsdp")]
    states = [torch.load(path, weights_only=True)["optimizers"] for path in files]
    torch.testing.assert_close(*states, rtol=0.1, atol=0.01)  # whole averages of the optimizers
    undo(folder / "fsdp", folder / "once")
    close(*run(folder, ("pretrain", "fsdp", {})), alone)  # one process goes on
    undo(folder / "fsdp", folder / "twice")
    close(*run(folder, ("pretrain", "fsdp", {"fsdp": True}), processes=2), alone)  # and two again


LATER: list[tuple[str, dict]] = [
    ("sft", {}),
    ("sft", {"r": 2, "fsdp": True}),
    ("dpo", {}),
    ("dpo", {"fsdp": True}),
    ("dpo", {"r": 2, "reference": "adapter", "fsdp": True}),
    ("dpo", {"reference": "precomputed", "fsdp": True}),
]


def test_later_stages_give_the_losses_of_one_process(folder):
    short = {"max_steps": 6, "eval_interval": 3, "learning_rate": 0.01, "optimizer": "adamw"}
    jobs = list(enumerate(LATER))
    one = [(stage, f"one-{i}", {**short, **options}) for i, (stage, options) in jobs]
    two = [(stage, f"two-{i}", {**short, **options}) for i, (stage, options) in jobs]
    for expected, rows in zip(run(folder, *one), run(folder, *two, processes=2), strict=True):
        close(rows, expected)
    for i, options in jobs:
        names = (f"one-{i}", f"two-{i}")
        weights = [load_model(folder / name).state_dict() for name in names]
        torch.testing.assert_close(
            *weights, rtol=0, atol=0.01, msg=lambda text, options=options: f"{options}: {text}"
        )


def test_processes_that_do_not_divide_the_batch(folder):
    jobs = [(stage, "uneven", {"batch_size": 3}) for stage in ("pretrain", "sft", "dpo")]
    printed = run(folder, *jobs, processes=2)
    line = "train.batch_size=3 cannot be shared evenly by 2 processes; make it a multiple of 2"
    assert printed.count(line) == 3 * 2 and not (folder / "uneven").exists()
