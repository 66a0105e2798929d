"""The diagrams and the interactive pages: drawn by their scripts, legible, used, and correct."""

import json
import re
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path
from urllib.parse import quote
from xml.etree import ElementTree

import pytest
import torch
from diagrams import DIAGRAMS
from drawings.canvas import ALLOWED_COLORS, WIDTH, text_width

from tinylm.attention import attention_mask
from tinylm.generate import SamplingConfig, process_logits

ROOT = Path(__file__).resolve().parent.parent
NBS = ROOT / "nbs"
PICTURES = sorted((NBS / "images").glob("diagram-*.svg"))
FUTURE = {"grpo"}  # drawn for notebooks that are still to come
SVG = "{http://www.w3.org/2000/svg}"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "google-chrome", "chrome"))), None)
needs_browser = pytest.mark.skipif(not CHROMIUM, reason="no Chromium is installed")


def run_script(*command: str) -> None:
    """Run a script of tools/, and show what it prints if it fails."""
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_diagrams_are_up_to_date():
    """The pictures are what tools/diagrams.py draws."""
    run_script("tools/diagrams.py", "--check")


def test_the_interactive_pages_are_up_to_date():
    """Their parts that a script writes are what it writes."""
    run_script("tools/interactive.py", "--check")


@cache
def embedded() -> set[str]:
    """List the diagrams that the notebooks and their answers show."""
    pages = [*NBS.glob("*.ipynb"), *NBS.glob("answers/*.md")]
    text = "\n".join(page.read_text("utf-8") for page in pages)
    return set(re.findall(r"images/diagram-([\w-]+)\.svg", text))


def test_notebooks_show_only_diagrams_that_exist():
    """A picture that is missing is a hole in the page."""
    missing = sorted(embedded() - DIAGRAMS.keys())
    assert not missing, f"tools/diagrams.py draws no {', '.join(missing)}"


@pytest.mark.skipif(not embedded(), reason="no notebook shows diagrams yet")
def test_every_diagram_is_shown():
    """A diagram that nobody sees is not worth keeping."""
    unused = sorted(DIAGRAMS.keys() - embedded() - FUTURE)
    assert not unused, f"no notebook shows {', '.join(unused)}"


@pytest.mark.parametrize("path", PICTURES, ids=lambda path: path.stem)
def test_a_diagram_can_be_read(path):
    """It has a title and a description, its words stay inside, and are not too small."""
    root = ElementTree.parse(path).getroot()
    assert root.findtext(f"{SVG}title") and len(root.findtext(f"{SVG}desc")) > 60
    _, _, width, height = map(float, root.get("viewBox").split())
    assert width == WIDTH <= 720

    for element in root.iter(f"{SVG}text"):
        size = float(element.get("font-size"))
        is_code = "monospace" in element.get("font-family", "")
        is_bold = element.get("font-weight") == "bold"
        length = text_width(element.text, size, is_code, is_bold)
        share = {"start": 0, "middle": 0.5, "end": 1}[element.get("text-anchor", "middle")]
        left = float(element.get("x")) - share * length
        assert size >= 13, f"{element.text!r} has only {size} px"
        assert 0 <= left and left + length <= width, f"{element.text!r} leaves the card"
        assert 0 < float(element.get("y")) < height, f"{element.text!r} leaves the card"


@pytest.mark.parametrize("path", PICTURES, ids=lambda path: path.stem)
def test_a_diagram_uses_the_palette(path):
    """The colors are those of the plots and their tints, on a card that hides the page."""
    text = path.read_text("utf-8")
    colors = set(re.findall(r"#[0-9a-f]{6}", text))
    assert colors <= ALLOWED_COLORS, f"{path.name}: {sorted(colors - ALLOWED_COLORS)}"
    assert f'<rect x="1" y="1" width="{WIDTH - 2}"' in text


# The interactive pages: what they show, compared with the library.


def open_page(name: str, cases: list[dict]) -> list:
    """Open an interactive page once, and return what it computes for each of some settings."""
    address = f"{(NBS / 'interactive' / name).as_uri()}?cases={quote(json.dumps(cases))}"
    with tempfile.TemporaryDirectory() as profile:
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run"]
        flags += ["--disable-background-networking", f"--user-data-dir={profile}", "--dump-dom"]
        done = subprocess.run([CHROMIUM, *flags, address], capture_output=True, timeout=120)
    page = done.stdout.decode()
    results = re.search(r'<script type="application/json" id="shown">(.*?)</script>', page)
    assert results, done.stderr.decode()[-2000:]
    return json.loads(results[1])


def sampling_logits() -> list[list[float]]:
    """Read the logits of each prompt from the page."""
    page = (NBS / "interactive" / "sampling.html").read_text("utf-8")
    data = re.search(r'<script type="application/json" id="data">(.*?)</script>', page)
    return [prompt["logits"] for prompt in json.loads(data[1])["prompts"]]


RULES = [
    {},
    {"temperature": 0.5},
    {"temperature": 2.0, "top_k": 3},
    {"top_p": 0.5},
    {"temperature": 0.8, "top_k": 5, "top_p": 0.9},
    {"temperature": 0},
]


@needs_browser
def test_the_sampling_page_equals_generate():
    """The page's JavaScript gives the probabilities of `process_logits`."""
    prompts = sampling_logits()
    cases = [{"prompt": i, **rules} for i in range(len(prompts)) for rules in RULES]
    results = open_page("sampling.html", cases)
    nothing = torch.zeros(1, 0, dtype=torch.long)
    for case, probabilities in zip(cases, results, strict=True):
        logits = torch.tensor([prompts[case["prompt"]]], dtype=torch.float64)
        rules = {name: value for name, value in case.items() if name != "prompt"}
        expected = process_logits(logits, nothing, SamplingConfig(**rules)).softmax(-1)[0]
        actual = torch.tensor(probabilities, dtype=torch.float64)
        torch.testing.assert_close(actual, expected, atol=1e-6, rtol=0, msg=str(case))


@needs_browser
def test_the_mask_page_equals_attention():
    """The page's grid is the mask of `attention_mask`."""
    cases = [
        {"tokens": 6},
        {"tokens": 8, "window": 3},
        {"tokens": 8, "starts": [3, 5]},
        {"tokens": 10, "window": 2, "starts": [4]},
        {"tokens": 7, "window": 1},
    ]
    for case, mask in zip(cases, open_page("masks.html", cases), strict=True):
        T = case["tokens"]
        begins = torch.zeros(T, dtype=torch.long)
        begins[case.get("starts", [])] = 1
        documents = begins.cumsum(0)[None]
        expected = attention_mask(T, T, window=case.get("window"), document_ids=documents)
        assert torch.equal(torch.tensor(mask), expected[0, 0]), case
