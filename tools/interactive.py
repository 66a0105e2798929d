"""Write the data of nbs/interactive/sampling.html, and pictures of the interactive pages.

    python tools/interactive.py                  # the logits of the model, into the page
    python tools/interactive.py --pictures       # nbs/images/interactive-NAME.png, by Chromium

`--check` compares the logits in the page with those of the model.
"""

import argparse
import hashlib
import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "nbs" / "interactive" / "sampling.html"
MODEL = ROOT / "nbs" / "models" / "stories"
DATA = re.compile(r'(<script type="application/json" id="data">)(.*?)(</script>)', re.DOTALL)
OPENING = "It was a cold morning. Mia was in the"
PROMPTS = [
    OPENING,
    f"{OPENING} garden. Tom was in the barn. Mia had a red ball. Mia had two coins. "
    "Tom had three coins. Mia",
    f"{OPENING} garden. Tom was in the barn. Mia had a red ball. Where was Mia? Mia was in the",
]
TOLERANCE = 0.01  # of a logit, between machines

# The pages and the settings in which they are photographed: address, width, height.
PICTURES = {
    "sampling": ("sampling.html?prompt=1&temperature=0.8&top_k=8&top_p=0.9", 720, 980),
    "masks": ("masks.html?tokens=10&window=4&starts=6", 720, 990),
}


def compute(folder: Path) -> dict:
    """Return the logits of the next token for each prompt, with the tokens and their source."""
    import torch

    from tinylm.chat_template import Tokenizer
    from tinylm.checkpoints import load_model

    # One row for each prompt, behind the token that begins a text.
    tokenizer = Tokenizer.from_pretrained(folder)
    model = load_model(folder).float().eval()
    prompts = []
    for text in PROMPTS:
        ids = [tokenizer.bos_token_id, *tokenizer.encode(text)]
        with torch.no_grad():
            logits = model(torch.tensor([ids]))[0, -1].double()
        prompts.append({"text": text, "logits": [round(z, 4) for z in logits.tolist()]})

    weights = (folder / "model.safetensors").read_bytes()
    return {
        "command": "tools/interactive.py",
        "model_sha256": hashlib.sha256(weights).hexdigest(),
        "parameters": sum(p.numel() for p in model.parameters()),
        "tokens": [tokenizer.decode([i]) for i in range(len(tokenizer))],
        "prompts": prompts,
    }


def differences(old: dict, new: dict) -> list[str]:
    """Say in which parts the data of the page differs from the model's."""
    parts = [name for name in new if name != "prompts" and old.get(name) != new[name]]
    pairs = zip(old.get("prompts", []), new["prompts"], strict=False)
    for old_prompt, new_prompt in pairs:
        rows = zip(old_prompt["logits"], new_prompt["logits"], strict=True)
        is_close = all(abs(a - b) <= TOLERANCE for a, b in rows)
        if old_prompt["text"] != new_prompt["text"] or not is_close:
            parts.append(new_prompt["text"])
    return parts


def check(old: dict, folder: Path) -> int:
    """Compare the page with the model, if that is here; return an exit code."""
    if not old.get("prompts"):
        print(f"{PAGE.name} has no data; python tools/interactive.py")
        return 1
    if not folder.exists():
        print(f"{folder.name} is not here: the data of {PAGE.name} cannot be compared")
        return 0
    parts = differences(old, compute(folder))
    for part in parts:
        print(f"{PAGE.name} is out of date ({part}); python tools/interactive.py")
    return 1 if parts else 0


def take_pictures() -> int:
    """Photograph the pages; return an exit code."""
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        print("no Chromium is installed: no pictures were taken")
        return 1

    # A fresh profile, so that no settings of the user show.
    for name, (address, width, height) in PICTURES.items():
        out = ROOT / "nbs" / "images" / f"interactive-{name}.png"
        with tempfile.TemporaryDirectory() as profile:
            command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
            command += [f"--user-data-dir={profile}", f"--window-size={width},{height}"]
            command += [f"--screenshot={out}", f"{PAGE.parent.as_uri()}/{address}"]
            subprocess.run(command, check=True, capture_output=True, timeout=120)
        print(f"wrote {out.name}")
    return 0


def main() -> int:
    """Read the flags of this script, and do what they say."""
    as_written = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=as_written)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if it is stale")
    parser.add_argument("--pictures", action="store_true", help="photograph the pages")
    parser.add_argument("--model", type=Path, default=MODEL, help="folder of the trained model")
    flags = parser.parse_args()
    if flags.pictures:
        return take_pictures()

    # "<" would end the script element too early.
    page = PAGE.read_text("utf-8")
    old = json.loads(DATA.search(page)[2])
    if flags.check:
        return check(old, flags.model)
    text = json.dumps(compute(flags.model), ensure_ascii=False, separators=(",", ":"))
    text = text.replace("<", "\\u003c")
    PAGE.write_text(DATA.sub(lambda match: match[1] + text + match[3], page), "utf-8")
    print(f"wrote the logits of {len(PROMPTS)} prompts into {PAGE.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
