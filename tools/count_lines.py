"""Count the lines of code of each part of the library, and keep the table in nbs/index.ipynb.

    python tools/count_lines.py             print the lines of each notebook, and the table
    python tools/count_lines.py --write     also put it into nbs/index.ipynb
    python tools/count_lines.py --check     exit 1 if nbs/index.ipynb holds another one

Comments, docstrings, imports, blank lines and the lists that nbdev writes do not count. After
--write, README.md is rebuilt with tools/build_readme.py.
"""

import argparse
import ast
import re
import sys
from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parent.parent
INDEX = ROOT / "nbs" / "index.ipynb"
PARTS = {  # the first digit of a notebook's number: the part it belongs to
    "0": "start",
    "1": "the model",
    "2": "generation",
    "3": "data",
    "4": "pretraining",
    "5": "post-training",
    "6": "use and study",
    "7": "proofs",
}
# Notebooks that are not the language model itself: the built-in stories, the checkpoint formats of
# other projects, experiments, exercises, the command line.
AROUND = (
    "corpus",
    "floor",
    "proofs",
    "checkpoints",
    "hub",
    "recipes",
    "experiments",
    "scaling",
    "studies",
    "preference_study",
    "exercise_bank",
    "exercises",
    "commands",
    "talk",
    "cli",
)
LIMIT = 5000  # lines of code that the language model itself may have
TABLE = re.compile(r"\| part \| lines of code \|.*?lines of code; [^\n]*", re.DOTALL)


def is_counted(node: ast.stmt) -> bool:
    """Say whether a statement is code: no import, no docstring, no list that nbdev writes."""
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
        return False
    if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
        return False
    return not isinstance(node, (ast.Import, ast.ImportFrom))


def lines_of_code(source: str) -> int:
    """Count the lines that hold code."""
    left_out: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.stmt) and not is_counted(node):
            left_out.update(range(node.lineno, node.end_lineno + 1))
    for number, line in enumerate(source.splitlines(), start=1):
        if not line.strip() or line.strip().startswith("#"):
            left_out.add(number)
    return len(source.splitlines()) - len(left_out)


def count_by_notebook() -> dict[str, int]:
    """Count the lines of the module of each notebook, such as `10_rope`, in their order."""
    counts = {}
    for notebook in sorted((ROOT / "nbs").glob("[0-9]*.ipynb")):
        module = ROOT / "tinylm" / f"{notebook.stem[3:]}.py"
        if module.exists():
            counts[notebook.stem] = lines_of_code(module.read_text("utf-8"))
    return counts


def render() -> str:
    """Write the table, and the sentence below it."""
    counts = count_by_notebook()
    rows = ["| part | lines of code |", "|---|---|"]
    for digit, part in PARTS.items():
        names = [name for name in counts if name[0] == digit]
        lines = sum(counts[name] for name in names)
        if names:
            rows.append(f"| {digit} {part} | {lines:,} |")
    rows.append(f"| all | {sum(counts.values()):,} |")

    # The language model itself.
    around = [name for name in counts if name[3:] in AROUND]
    proper = sum(counts.values()) - sum(counts[name] for name in around)
    comparison = "below" if proper < LIMIT else "above"
    sentence = (
        f"The language model itself has {proper:,} lines of code; our own limit is {LIMIT:,}, and "
        f"it is {comparison} that. The rest is the built-in stories, the checkpoint formats "
        "of other projects, experiments, exercises and the command line."
    )
    return "\n".join([*rows, "", sentence])


def main() -> int:
    """Read the flags of this script, and do what they say."""
    as_written = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=as_written)
    parser.add_argument("--check", action="store_true", help="exit 1 if the index is out of date")
    parser.add_argument("--write", action="store_true", help="put the table into nbs/index.ipynb")
    options = parser.parse_args()
    table = render()
    if not options.check:
        for name, lines in count_by_notebook().items():
            print(f"{name:20} {lines:6,}")
        print(table)

    # Find the cell of the index that holds a table.
    index = nbformat.read(INDEX, as_version=4)
    cells = [cell for cell in index.cells if TABLE.search(cell.source)]
    if len(cells) != 1:
        print(f"nbs/index.ipynb has {len(cells)} cells with a table of lines of code; give it one")
        return 1

    # Compare it with the table of today, or put that in its place.
    is_stale = TABLE.search(cells[0].source)[0] != table
    if options.check and is_stale:
        print("the lines of code in nbs/index.ipynb are out of date:")
        print("python tools/count_lines.py --write && python tools/build_readme.py")
        return 1
    if options.write and is_stale:
        cells[0].source = TABLE.sub(lambda _: table, cells[0].source)
        nbformat.write(index, INDEX)
    return 0


if __name__ == "__main__":
    sys.exit(main())
