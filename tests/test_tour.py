"""The tour: its stories are those of the corpus, its floor is exact, and its code stays short."""

import re
import subprocess
import sys
from pathlib import Path

import nbformat

from tinylm.corpus import make_corpus

ROOT = Path(__file__).resolve().parent.parent
NBS = ROOT / "nbs"
MAX_LINES = 100  # of code, without imports, and without what only prints or draws


def stories() -> list[tuple[float, str]]:
    """Read the file of stories: -log P(story) and its text."""
    lines = (NBS / "data" / "stories.txt").read_text("utf-8").splitlines()
    return [(float(line.split("\t")[0]), line.split("\t")[1]) for line in lines]


def test_the_stories_and_their_nats_are_those_of_the_corpus():
    corpus = [(round(story.nats, 4), story.text) for story in make_corpus(1000, seed=0)]
    assert stories() == corpus


def test_the_tokens_of_the_tour_lose_nothing():
    """Then -log P(story) is also that of its tokens, and the floor per token is exact."""
    for _, story in stories():
        text = " ".join(re.findall(r"\w+|[^\w\s]", story))
        text = re.sub(r" ([.,?])", r"\1", text)
        assert re.sub(r'" (.*?) "', r'"\1"', text) == story


def is_counted(line: str) -> bool:
    """Say whether a line is code: no comment, import, example text, nothing that prints."""
    start = ("#", '"', "print(", "import ", "from ", "for n in", "for p in", "for word in")
    return bool(line.strip()) and not line.strip().startswith(start)


def test_the_tour_is_plain_pytorch_in_few_lines():
    cells = nbformat.read(NBS / "00_tour.ipynb", as_version=4).cells
    code = [cell.source for cell in cells if cell.cell_type == "code"]
    first_import = next(i for i, source in enumerate(code) if "from tinylm" in source)
    assert first_import >= len(code) - 3, "the library comes last"

    own_code = [source for source in code[:first_import] if "plt." not in source]
    lines = [line for source in own_code for line in source.splitlines() if is_counted(line)]
    assert len(lines) < MAX_LINES, f"{len(lines)} lines of code"


def test_the_picture_of_five_models_shows_what_the_tour_has_printed():
    command = [sys.executable, str(ROOT / "tools" / "five_models.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
