"""A block that reads across the documents of a packed row is reported at the end of a run."""

from pathlib import Path

import pytest
from torch.nn import functional as F

from tinylm.cli import main
from tinylm.files import DataConfig
from tinylm.model import Block, ModelConfig
from tinylm.pretrain import PretrainConfig, TrainConfig, pretrain

ALARM = "DOCUMENTS IN A ROW SEE EACH OTHER"
BLOCK = '''
from torch.nn import functional as F

from tinylm.model import Block


class CrossingConvolution(Block):
    """Add twice the position before, whatever its document."""

    def forward(self, x, *args, **options):
        before = F.pad(x[:, :-1], (0, 0, 1, 0))
        return super().forward(x + 2 * before, *args, **options)
'''
SMALL = "--model.hidden-size 16 --model.num-hidden-layers 1 --model.num-attention-heads 1"
DATA = "--data.stories 60 --data.validation-stories 20 --data.vocab-size 400"
PLAIN = "--model.layer-types full_attention --model.no-value-residual"
SHORT = "--train.max-steps 2 --train.batch-size 2 --train.sample-tokens 3 --train.warmup-steps 1"


class CrossingConvolution(Block):
    """Add twice the position before, whatever its document."""

    def forward(self, x, *args, **options):
        before = F.pad(x[:, :-1], (0, 0, 1, 0))
        return super().forward(x + 2 * before, *args, **options)


def tiny_recipe(out):
    """Return a recipe of two steps; the embeddings start large enough for a leak to show."""
    shape = ModelConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=1, embedding_range=0.2
    )
    data = DataConfig(stories=60, validation_stories=20, vocab_size=400)
    train = TrainConfig(max_steps=2, batch_size=2, sample_tokens=3, warmup_steps=1)
    return PretrainConfig(shape, data, train, out=str(out))


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    """Keep the prepared stories of these tests in one folder."""
    folder = tmp_path_factory.getbasetemp() / "packing-cache"
    monkeypatch.setenv("TINYLM_CACHE", str(folder))


@pytest.mark.parametrize(
    "flag, alarms", [("", 0), (" --model.block crossing:CrossingConvolution", 1)]
)
def test_the_closing_table_of_pretrain_has_the_alarm(flag, alarms, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    Path("crossing.py").write_text(BLOCK)
    words = f"pretrain {DATA} {SMALL} {SHORT} {PLAIN} --out runs/tiny{flag}"
    assert main(words.split()) == 0
    printed = capsys.readouterr().out
    table_lines = [line for line in printed.splitlines() if line.startswith("loss ")]
    assert len(table_lines) == 1
    assert table_lines[0].count(ALARM) == alarms


@pytest.mark.parametrize("block, alarms", [(Block, 0), (CrossingConvolution, 1)])
def test_pretrain_from_python_warns(block, alarms, tmp_path, capsys):
    result = pretrain(tiny_recipe(tmp_path / "run"), block=block)
    summary = dict(result.summary)
    assert summary.get("packed rows", "").count(ALARM) == alarms
    assert capsys.readouterr().out.count(f"warning: {ALARM}") == alarms


def test_batches_of_your_own_are_not_checked(tmp_path):
    result = pretrain(tiny_recipe(tmp_path / "run"), block=CrossingConvolution, validation=[])
    assert "packed rows" not in dict(result.summary)
