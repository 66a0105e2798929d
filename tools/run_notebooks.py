"""Run notebooks from top to bottom and save their outputs.

    python tools/run_notebooks.py                         every notebook
    python tools/run_notebooks.py nbs/10_rope.ipynb       one notebook
    python tools/run_notebooks.py --flags slow cuda       with the cells that are skipped by default
    python tools/run_notebooks.py --check                 run nothing; exit 1 if an output is stale

A run stores a hash of the code cells in the notebook's metadata (`ran`). Editors keep old outputs
under changed code, so `--check` compares that hash with the code as it is now.
"""

import argparse
import hashlib
import os
import re
import sys
import time
from configparser import ConfigParser
from pathlib import Path

import nbformat
from nbclient import NotebookClient

# The kernel inherits these, so saved outputs have no progress bars, warnings or random order.
STABLE = {
    "IN_TEST": "1",
    "TQDM_DISABLE": "1",
    "PYTHONWARNINGS": "ignore",
    "PYTHONHASHSEED": "0",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "true",
}
ROOT = Path(__file__).resolve().parent.parent
NBS = ROOT / "nbs"


def notebooks(names: list[str]) -> list[Path]:
    """List the notebooks of these names, or all; those that begin with `_` or `.` are drafts."""
    if not names:
        return [path for path in sorted(NBS.glob("*.ipynb")) if path.name[0] not in "_."]
    missing = [name for name in names if not Path(name).is_file()]
    if missing:
        raise SystemExit(f"no such notebook: {', '.join(missing)}")
    return [Path(name).resolve() for name in names]


def test_flags() -> set[str]:
    """Read `tst_flags` of settings.ini: cells with one of these flags are skipped by default."""
    parser = ConfigParser(delimiters=["="])
    parser.read(ROOT / "settings.ini", encoding="utf-8")
    return set(parser["DEFAULT"]["tst_flags"].split())


def directives(source: str) -> list[str]:
    """Return the `#|` lines at the top of a cell, without their marker."""
    words = []
    for line in source.splitlines():
        if not re.match(r"\s*#\s*\|", line):
            break
        words.append(line.split("|", 1)[1].strip())
    return words


def is_skipped(source: str, flags: set[str]) -> bool:
    """Say whether `nbdev_test` would skip this cell."""
    words = directives(source)
    return bool(flags.intersection(words)) or any(
        re.fullmatch(r"eval:\s*false", word) for word in words
    )


def is_text_only(notebook) -> bool:
    """Say whether the notebook has `- skip_exec: true` under its title."""
    return bool(notebook.cells) and "skip_exec: true" in notebook.cells[0].source


def code_hash(notebook) -> str:
    """Compute a short hash of the code cells, in order."""
    code_cells = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    code = "\n\0\n".join(code_cells)
    return hashlib.sha256(code.encode()).hexdigest()[:16]


class Client(NotebookClient):
    """Runs a notebook, apart from cells with certain flags, which keep their saved outputs."""

    skip_flags: frozenset[str] = frozenset()

    async def async_execute_cell(self, cell, cell_index, **kwargs):
        """Run a cell if it has none of the flags."""
        if cell.cell_type == "code" and is_skipped(cell.source, self.skip_flags):
            return cell
        return await super().async_execute_cell(cell, cell_index, **kwargs)


def run(
    path: Path,  # of a notebook
    skip_flags: set[str],  # cells with one of these flags are not run
    timeout: int,  # seconds allowed for one cell
) -> None:
    """Run one notebook in a kernel of its own, in its folder, and write it back."""
    notebook = nbformat.read(path, as_version=4)
    if not is_text_only(notebook):
        client = Client(
            notebook,
            timeout=timeout,
            resources={"metadata": {"path": str(path.parent)}},
            kernel_name="python3",
            coalesce_streams=True,
            record_timing=False,
        )
        client.skip_flags = frozenset(skip_flags)
        client.execute()

    # The hash says which code the outputs belong to.
    notebook.metadata["ran"] = code_hash(notebook)
    nbformat.write(notebook, path)


def is_fresh(path: Path) -> bool:
    """Say whether the saved outputs belong to the code as it is now."""
    notebook = nbformat.read(path, as_version=4)
    return notebook.metadata.get("ran") == code_hash(notebook)


def check(paths: list[Path]) -> int:
    """Print the notebooks whose outputs are stale; return the exit code."""
    stale = [path.name for path in paths if not is_fresh(path)]
    for name in stale:
        remedy = f"python tools/run_notebooks.py nbs/{name}"
        print(f"{name}: code changed since it was last run; {remedy}")
    return 1 if stale else 0


def main() -> int:
    """Read the flags of this script, and do what they say."""
    as_written = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=as_written)
    parser.add_argument("notebooks", nargs="*", help="paths of notebooks (default: all of nbs/)")
    parser.add_argument("--check", action="store_true", help="exit 1 if an output is stale")
    parser.add_argument("--flags", nargs="*", default=[], help="also run cells with these flags")
    parser.add_argument("--timeout", type=int, default=1800, help="seconds allowed for one cell")
    options = parser.parse_args()
    paths = notebooks(options.notebooks)
    if options.check:
        return check(paths)

    # Settings of the kernels.
    os.environ.update(STABLE)
    search_path = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, search_path))

    # Run one notebook after the other.
    skip_flags = test_flags() - set(options.flags)
    for path in paths:
        start = time.perf_counter()
        run(path, skip_flags, options.timeout)
        print(f"{path.name}: {time.perf_counter() - start:.1f} s", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
