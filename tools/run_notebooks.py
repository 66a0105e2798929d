"""Run notebooks from top to bottom and save their outputs; `--check` says, without running, which outputs are stale.

    python tools/run_notebooks.py                         every notebook
    python tools/run_notebooks.py nbs/10_rope.ipynb       one notebook
    python tools/run_notebooks.py --flags slow cuda       with the cells that are skipped by default
    python tools/run_notebooks.py --check                 exit 1 if code changed since its outputs were saved

A run stores a hash of the code cells in the notebook's metadata (`ran`). Editors keep old outputs under changed
code, so `--check` compares that hash with the code as it is now.
"""

import argparse
import hashlib
import os
import re
import sys
import time
from pathlib import Path

# Set before the kernel starts: it inherits them. Saved outputs then have no progress bars, warnings or random order.
STABLE = {"IN_TEST": "1", "TQDM_DISABLE": "1", "PYTHONWARNINGS": "ignore", "PYTHONHASHSEED": "0"}
STABLE |= {
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "true",
}
ROOT = Path(__file__).resolve().parent.parent
NBS = ROOT / "nbs"


def notebooks(names: list[str]) -> list[Path]:
    """The notebooks asked for, or all of them; names that begin with `_` or `.` are drafts."""
    if not names:
        return [path for path in sorted(NBS.glob("*.ipynb")) if path.name[0] not in "_."]
    missing = [name for name in names if not Path(name).is_file()]
    if missing:
        raise SystemExit(f"no such notebook: {', '.join(missing)}")
    return [Path(name).resolve() for name in names]


def test_flags() -> set[str]:
    """The words of `tst_flags` in settings.ini: cells that carry one are skipped unless asked for."""
    from configparser import ConfigParser

    parser = ConfigParser(delimiters=["="])
    parser.read(ROOT / "settings.ini", encoding="utf-8")
    return set(parser["DEFAULT"]["tst_flags"].split())


def directives(source: str) -> list[str]:
    """The `#|` lines at the top of a cell, without their marker."""
    found = []
    for line in source.splitlines():
        if not re.match(r"\s*#\s*\|", line):
            break
        found.append(line.split("|", 1)[1].strip())
    return found


def skipped(source: str, flags: set[str]) -> bool:
    """Whether `nbdev_test` would skip this cell."""
    return any(re.fullmatch(r"eval:\s*false", line) or line in flags for line in directives(source))


def skip_exec(nb) -> bool:
    """Whether the notebook says `- skip_exec: true` under its title."""
    return bool(nb.cells) and "skip_exec: true" in nb.cells[0].source


def code_hash(nb) -> str:
    """A short hash of the code cells, in order."""
    code = "\n\0\n".join(cell.source for cell in nb.cells if cell.cell_type == "code")
    return hashlib.sha256(code.encode()).hexdigest()[:16]


def run(path: Path, flags: set[str], timeout: int) -> None:
    """Execute one notebook in a kernel of its own, in its folder, and write it back."""
    import nbformat
    from nbclient import NotebookClient

    class Client(NotebookClient):
        async def async_execute_cell(self, cell, cell_index, **kwargs):
            if cell.cell_type == "code" and skipped(cell.source, flags):
                return cell  # not run; what was saved before stays
            return await super().async_execute_cell(cell, cell_index, **kwargs)

    nb = nbformat.read(path, as_version=4)
    if not skip_exec(nb):
        resources = {"metadata": {"path": str(path.parent)}}
        options = {"kernel_name": "python3", "coalesce_streams": True, "record_timing": False}
        Client(nb, timeout=timeout, resources=resources, **options).execute()
    nb.metadata["ran"] = code_hash(nb)
    nbformat.write(nb, path)


def is_fresh(path: Path) -> bool:
    """Whether the saved outputs belong to the code as it is now."""
    import nbformat

    nb = nbformat.read(path, as_version=4)
    return nb.metadata.get("ran") == code_hash(nb)


def check(paths: list[Path]) -> int:
    stale = [path.name for path in paths if not is_fresh(path)]
    for name in stale:
        print(
            f"{name}: code changed since it was last run; python tools/run_notebooks.py nbs/{name}"
        )
    return 1 if stale else 0


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("notebooks", nargs="*", help="paths of notebooks (default: all of nbs/)")
    parser.add_argument(
        "--check", action="store_true", help="run nothing; exit 1 if an output is stale"
    )
    parser.add_argument(
        "--flags", nargs="*", default=[], help="also run cells that carry these flags"
    )
    parser.add_argument("--timeout", type=int, default=1800, help="seconds allowed for one cell")
    args = parser.parse_args()
    paths = notebooks(args.notebooks)
    if args.check:
        return check(paths)
    os.environ.update(STABLE)
    os.environ["PYTHONPATH"] = os.pathsep.join(
        filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])
    )
    for path in paths:
        start = time.perf_counter()
        run(path, test_flags() - set(args.flags), args.timeout)
        print(f"{path.name}: {time.perf_counter() - start:.1f} s", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
