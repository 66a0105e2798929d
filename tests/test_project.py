"""What holds for the project as a whole: its layers, and that generated files match their sources."""

import ast
import re
import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE, NBS, TOOLS = ROOT / "tinylm", ROOT / "nbs", ROOT / "tools"
NOTEBOOKS = [path for path in sorted(NBS.glob("*.ipynb")) if path.name[0] not in "_."]
NUMBER = {path.stem[3:]: int(path.stem[:2]) for path in NOTEBOOKS if path.stem[:2].isdigit()}
MODULES = [path for path in sorted(PACKAGE.glob("**/*.py")) if path.name != "_modidx.py"]

notebook_param = pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
module_param = pytest.mark.parametrize("module", MODULES, ids=lambda path: path.stem)


def settings() -> dict[str, str]:
    parser = ConfigParser(delimiters=["="])
    parser.read(ROOT / "settings.ini", encoding="utf-8")
    return dict(parser["DEFAULT"])


def functions(tree: ast.Module) -> list:
    """Top-level functions and methods of top-level classes, as (name, node)."""
    found = []
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            found.append((node.name, node))
        elif isinstance(node, ast.ClassDef):
            methods = [
                child
                for child in node.body
                if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef))
            ]
            found += [(f"{node.name}.{child.name}", child) for child in methods]
    return found


def imports(tree: ast.AST) -> list[str]:
    """Every imported module, wherever the import stands; `from .rope import x` counts as tinylm.rope."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level:
            names = [node.module] if node.module else [alias.name for alias in node.names]
            found += [f"tinylm.{name}" for name in names]
        elif isinstance(node, ast.ImportFrom) and node.module == "tinylm":
            found += [f"tinylm.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found.append(node.module)
    return found


def tool(name: str, *args: str) -> None:
    """Run a script of tools/ and fail with what it printed."""
    command = [sys.executable, str(TOOLS / name), *args]
    done = subprocess.run(
        command, cwd=ROOT, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=300
    )
    if done.returncode:
        pytest.fail(done.stdout + done.stderr, pytrace=False)


@module_param
def test_public_functions_have_a_docstring(module):
    tree = ast.parse(module.read_text("utf-8"))
    named = functions(tree) + [
        (node.name, node) for node in tree.body if isinstance(node, ast.ClassDef)
    ]
    public = [
        (name, node)
        for name, node in named
        if not re.search(r"(^|\.)_", name) and "forward" not in name
    ]
    bare = [name for name, node in public if ast.get_docstring(node) is None]
    assert not bare, f"{module.name}: no docstring: {bare}"


@module_param
def test_module_imports_only_earlier_ones(module):
    own = NUMBER.get(module.stem, 100)  # __init__ and __main__ stand above all notebooks
    used = {
        name.split(".")[1]
        for name in imports(ast.parse(module.read_text("utf-8")))
        if name.startswith("tinylm.")
    }
    later = sorted(name for name in used if NUMBER.get(name, -1) >= own)
    assert not later, f"{module.name} imports {later}, which do not come before it"


@module_param
def test_module_imports_only_what_is_installed_with_it(module):
    listed = [
        words
        for key, words in settings().items()
        if key in ("requirements", "trackers_requirements")
    ]
    declared = {re.split(r"[<>=!;]", word)[0].lower() for words in listed for word in words.split()}
    declared = {"yaml" if name == "pyyaml" else name.replace("-", "_") for name in declared} | {
        "tinylm"
    }
    used = {name.split(".")[0] for name in imports(ast.parse(module.read_text("utf-8")))}
    missing = sorted(used - set(sys.stdlib_module_names) - declared)
    assert not missing, (
        f"{module.name} imports {missing}; add them to `requirements` in settings.ini"
    )


def test_version_is_said_once():
    text = (PACKAGE / "__init__.py").read_text("utf-8")
    assert f'__version__ = "{settings()["version"]}"' in text


def test_import_is_quick():
    code = "import sys, tinylm; sys.exit(any(name in sys.modules for name in ('torch', 'transformers', 'numpy')))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0, (
        "import tinylm pulls in torch"
    )


def test_readme_matches_index():
    tool("build_readme.py", "--check")


def test_roadmap_pictures_match_their_script():
    tool("roadmap.py", "--check")


@notebook_param
def test_saved_outputs_belong_to_the_code(notebook):
    tool("run_notebooks.py", "--check", str(notebook))


def saved_text(cell) -> str:
    """All text saved under a code cell; pictures left out."""
    parts = []
    for output in cell.get("outputs", []):
        parts += [output.get("text", ""), "\n".join(output.get("traceback", []))]
        data = output.get("data", {}).items()
        parts += [
            "".join(value)
            for kind, value in data
            if kind.startswith("text/") and isinstance(value, (str, list))
        ]
    return "\n".join(parts)


@notebook_param
def test_saved_outputs_are_clean(notebook):
    path = r"(?<![\w.:/<>])/[\w.-]+/[\w.-]|[A-Z]:\\|site-packages"
    bad = re.compile(path + r"|\w*Warning\b:|Traceback \(|\bit/s\b")
    for number, cell in enumerate(nbformat.read(notebook, as_version=4).cells, start=1):
        if cell.cell_type != "code":
            continue
        assert not any(output.get("name") == "stderr" for output in cell.outputs), (
            f"cell {number} saved stderr"
        )
        assert not any(output.output_type == "error" for output in cell.outputs), (
            f"cell {number} saved an error"
        )
        found = bad.search(saved_text(cell))
        assert not found, f"cell {number} saved {found[0]!r}: {saved_text(cell)[:300]}"


@notebook_param
def test_notebook_imports_only_earlier_ones(notebook):
    own = int(notebook.stem[:2]) if notebook.stem[:2].isdigit() else 100
    code = "\n".join(
        c.source for c in nbformat.read(notebook, as_version=4).cells if c.cell_type == "code"
    )
    used = set(re.findall(r"^\s*(?:from|import) tinylm\.(\w+)", code, re.M))
    later = sorted(name for name in used if NUMBER.get(name, -1) > own)
    assert not later, f"{notebook.name} imports {later}, which come after it"


@notebook_param
def test_imports_stand_in_cells_of_their_own(notebook):
    for number, cell in enumerate(nbformat.read(notebook, as_version=4).cells, start=1):
        if cell.cell_type != "code" or re.match(r"\s*[%!]|#\|\s*export", cell.source):
            continue
        kinds = {
            isinstance(node, (ast.Import, ast.ImportFrom)) for node in ast.parse(cell.source).body
        }
        assert kinds != {True, False}, (
            f"cell {number} of {notebook.name} mixes imports with other code"
        )


@notebook_param
def test_local_links_lead_somewhere(notebook):
    prose = "\n".join(
        c.source for c in nbformat.read(notebook, as_version=4).cells if c.cell_type == "markdown"
    )
    targets = [target.split("#")[0] for target in re.findall(r"\]\((?!\w+:|#)([^)\s]+)", prose)]
    missing = sorted({target for target in targets if not (NBS / target).exists()})
    assert not missing, f"{notebook.name} links to {missing}"
