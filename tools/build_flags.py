"""Write tinylm/flags.json, the flags of every command; `--check` says whether it is up to date.

The flags come from the config classes. The command line reads the file first, so that help and
typing mistakes need not wait for PyTorch.
"""

import argparse
import io
import json
import os
import sys
from contextlib import redirect_stdout, suppress
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FILE = ROOT / "tinylm" / "flags.json"
sys.path.insert(0, str(ROOT))


def flags_of(run) -> list:
    """Ask a command for its flags, which it prints when it is called with this word alone."""
    printed = io.StringIO()
    with redirect_stdout(printed), suppress(SystemExit):
        run(["--flags-as-json"])
    return json.loads(printed.getvalue())


def render() -> str:
    """Return the text of the file: for each command a list of flags, one a line."""
    from tinylm.cli import COMMANDS

    parts = []
    for name, run in COMMANDS.items():
        rows = ",\n".join(f"  {json.dumps(row)}" for row in flags_of(run))
        parts.append(f"{json.dumps(name)}: [\n{rows}\n]")
    return "{\n" + ",\n".join(parts) + "\n}\n"


def main() -> int:
    """Read the flags of this script, and do what they say."""
    as_written = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=as_written)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if it is stale")
    check = parser.parse_args().check

    # Commands that are asked for their flags must print nothing else.
    os.environ["TQDM_DISABLE"] = "1"
    text = render()
    if not check:
        FILE.write_text(text, "utf-8")
    elif not FILE.exists() or FILE.read_text("utf-8") != text:
        print("tinylm/flags.json is out of date: python tools/build_flags.py")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
