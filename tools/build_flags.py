"""Write tinylm/flags.json, help and flags of every command; `--check`: is it up to date?

The flags come from the config classes. The command line reads the file first, so that help and
typing mistakes need not wait for PyTorch.
"""

import argparse
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FILE = ROOT / "tinylm" / "flags.json"
sys.path.insert(0, str(ROOT))


def render() -> str:
    """Return the text of the file: for each command its help and a list of flags, one a line."""
    from tinylm.commands import COMMANDS, class_defaults, flags_of

    entries = []
    for name, command in COMMANDS.items():
        rows = ",\n".join(f"  {json.dumps(flag)}" for flag in flags_of(command))
        defaults = f'"class_defaults": {json.dumps(class_defaults(command))}'
        entry = f'{{"help": {json.dumps(command.help)}, {defaults}, "flags": [\n{rows}\n]}}'
        entries.append(f"{json.dumps(name)}: {entry}")
    return "{\n" + ",\n".join(entries) + "\n}\n"


def main() -> int:
    """Write the file, or compare it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--check", action="store_true", help="write nothing; exit 1 if the file is out of date"
    )
    only_check = parser.parse_args().check

    # Write the table, or compare it with the file.
    text = render()
    if not only_check:
        FILE.write_text(text, "utf-8")
    elif not FILE.exists() or FILE.read_text("utf-8") != text:
        print("tinylm/flags.json is out of date: python tools/build_flags.py")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
