"""Print how many lines of code each part of the library has; comments, docstrings, imports and blank lines do not count.

python tools/count_lines.py
"""

import ast
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PARTS = {
    "0": "start",
    "1": "model",
    "2": "generation",
    "3": "data",
    "4": "pretraining",
    "5": "post-training",
    "6": "use and study",
    "7": "proofs",
}
# What is not the language model itself: the built-in corpus, other people's formats, experiments, the command line.
AROUND = ("corpus", "hub", "recipes", "experiments", "commands", "cli")


def lines_of_code(source: str) -> int:
    """Lines that hold a statement: no comment, docstring, import or blank line."""
    left_out = set()
    for node in ast.walk(ast.parse(source)):
        is_text = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        if is_text or isinstance(node, (ast.Import, ast.ImportFrom)):
            left_out |= set(range(node.lineno, node.end_lineno + 1))
    numbered = enumerate(source.splitlines(), start=1)
    return sum(
        bool(line.strip()) and not line.strip().startswith("#") and number not in left_out
        for number, line in numbered
    )


def count_by_module() -> dict[str, int]:
    """Lines of code of each module that a notebook exports, in the order of the notebooks."""
    names = [path.stem for path in sorted((ROOT / "nbs").glob("[0-9]*.ipynb"))]
    modules = {name: ROOT / "tinylm" / f"{re.sub(r'^[0-9]+_', '', name)}.py" for name in names}
    return {
        name: lines_of_code(path.read_text("utf-8"))
        for name, path in modules.items()
        if path.exists()
    }


def main() -> int:
    counts = count_by_module()
    for digit, part in PARTS.items():
        modules = {name: count for name, count in counts.items() if name[0] == digit}
        if modules:
            details = ", ".join(f"{name[3:]} {count}" for name, count in modules.items())
            print(f"{digit} {part:14} {sum(modules.values()):6,}   {details}")
    proper = {name: count for name, count in counts.items() if name[3:] not in AROUND}
    print(f"all              {sum(counts.values()):6,}")
    print(f"language model   {sum(proper.values()):6,}   all but {', '.join(AROUND)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
