"""Print which modules of the library each module imports, in the order of the notebooks.

    python tools/import_graph.py

A module imports only from notebooks with a lower number; tests/test_project.py checks that.
"""

import ast
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def module_numbers() -> dict[str, int]:
    """Return the number of each module, which is that of its notebook."""
    notebooks = sorted((ROOT / "nbs").glob("[0-9][0-9]_*.ipynb"))
    return {path.stem[3:]: int(path.stem[:2]) for path in notebooks}


def from_import(node: ast.ImportFrom) -> list[str]:
    """Return the modules of `from ... import ...`; `from .rope import x` counts as tinylm.rope."""
    names = [alias.name for alias in node.names]
    if node.level:
        return [f"tinylm.{name}" for name in ([node.module] if node.module else names)]
    if node.module == "tinylm":
        return [f"tinylm.{name}" for name in names]
    return [node.module or ""]


def imports_of(tree: ast.AST) -> list[str]:
    """List every imported module, wherever the import stands.

    A string that names a module of the library, such as "tinylm.moe" or "tinylm.moe:MoE", counts as
    an import, because somebody may hand it to `import_module`.
    """
    modules = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            modules += from_import(node)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            # Only a string that holds nothing else: docstrings and messages may mention modules.
            if re.fullmatch(r"tinylm\.\w+(:\w+)?", node.value):
                modules.append(node.value.split(":")[0])
    return modules


def library_imports(source: str) -> set[str]:
    """Return the modules of the library that a piece of code imports, such as {"rope", "moe"}."""
    modules = imports_of(ast.parse(source))
    return {name.split(".")[1] for name in modules if name.startswith("tinylm.")}


def main() -> int:
    """Print a line for each module."""
    numbers = module_numbers()
    for name, number in numbers.items():
        path = ROOT / "tinylm" / f"{name}.py"
        if not path.exists():
            continue
        imports = library_imports(path.read_text("utf-8")).intersection(numbers)
        ordered = sorted(imports, key=lambda module: numbers[module])
        print(f"{number:02d} {name:12} {', '.join(ordered) or '-'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
