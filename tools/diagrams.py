"""Write nbs/images/diagram-NAME.svg, the diagrams of the notebooks.

`--check` says whether the pictures are up to date. They are drawn by the modules in
tools/drawings/, one function for each.
"""

import argparse
import sys
from pathlib import Path

from drawings import data, generation, model, start, training  # noqa: F401  (register diagrams)
from drawings.canvas import DIAGRAMS, render

IMAGES = Path(__file__).resolve().parent.parent / "nbs" / "images"


def is_up_to_date(path: Path, content: str) -> bool:
    """Say whether a file holds this content."""
    return path.exists() and path.read_text("utf-8") == content


def main() -> int:
    """Read the flags of this script, and do what they say."""
    as_written = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=as_written)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if it is stale")
    check = parser.parse_args().check

    # Compare the pictures with those that exist.
    files = {IMAGES / f"diagram-{name}.svg": render(name) for name in DIAGRAMS}
    changed = [path for path in files if not is_up_to_date(path, files[path])]
    stale = sorted(set(IMAGES.glob("diagram-*.svg")) - files.keys())
    if check:
        for path in changed + stale:
            print(f"{path.name} is out of date; python tools/diagrams.py")
        return 1 if changed or stale else 0

    # Write what changed, and delete pictures that are gone.
    for path in stale:
        path.unlink()
    IMAGES.mkdir(parents=True, exist_ok=True)
    for path in changed:
        path.write_text(files[path], "utf-8")
    print(f"{len(changed)} of {len(files)} diagrams written")
    return 0


if __name__ == "__main__":
    sys.exit(main())
