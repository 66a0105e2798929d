"""What holds for the whole project: its layers, and generated files that match their sources."""

import ast
import re
import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path

import nbformat
import pytest
from import_graph import imports_of, library_imports, module_numbers  # in tools/
from run_notebooks import is_fresh

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "tinylm"
NBS = ROOT / "nbs"
NOTEBOOKS = [path for path in sorted(NBS.glob("*.ipynb")) if path.name[0] not in "_."]
NUMBER = module_numbers()
ABOVE_ALL = 100  # the number of what no notebook exports: __init__, __main__, the index
MODULES = [path for path in sorted(PACKAGE.glob("**/*.py")) if path.name != "_modidx.py"]

notebook_param = pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
module_param = pytest.mark.parametrize("module", MODULES, ids=lambda path: path.stem)


def settings() -> dict[str, str]:
    """Read settings.ini."""
    parser = ConfigParser(delimiters=["="])
    parser.read(ROOT / "settings.ini", encoding="utf-8")
    return dict(parser["DEFAULT"])


def functions(tree: ast.Module) -> dict[str, ast.AST]:
    """Return top-level functions and classes, and the methods of these classes, by name."""
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    nodes = {}
    for node in tree.body:
        if not isinstance(node, kinds):
            continue
        nodes[node.name] = node
        if isinstance(node, ast.ClassDef):
            methods = [child for child in node.body if isinstance(child, kinds)]
            nodes.update({f"{node.name}.{child.name}": child for child in methods})
    return nodes


def code_cells(notebook: Path) -> dict[int, nbformat.NotebookNode]:
    """Return the code cells of a notebook, by their number, counted from 1."""
    cells = enumerate(nbformat.read(notebook, as_version=4).cells, start=1)
    return {number: cell for number, cell in cells if cell.cell_type == "code"}


def tool(name: str, *args: str) -> None:
    """Run a script of tools/ and fail with what it printed."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools" / name), *args],
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
    )
    if done.returncode:
        pytest.fail(done.stdout + done.stderr, pytrace=False)


@module_param
def test_public_functions_have_a_docstring(module):
    named = functions(ast.parse(module.read_text("utf-8")))
    public = [name for name in named if not re.search(r"(^|\.)_|forward", name)]
    bare = [name for name in public if ast.get_docstring(named[name]) is None]
    assert not bare, f"{module.name}: no docstring: {bare}"


def test_every_module_has_a_notebook_with_a_number_of_its_own():
    without = {module.stem for module in MODULES} - NUMBER.keys() - {"__init__", "__main__"}
    assert not without, f"no notebook exports {sorted(without)}"
    assert len(set(NUMBER.values())) == len(NUMBER), f"two notebooks have one number: {NUMBER}"


@module_param
def test_module_imports_only_earlier_ones(module):
    """Then there are no circles, because numbers only go down along the imports."""
    own_number = NUMBER.get(module.stem, ABOVE_ALL)
    imports = library_imports(module.read_text("utf-8"))
    later = sorted(name for name in imports if NUMBER.get(name, -1) >= own_number)
    assert not later, f"{module.name} imports {later}, which do not come before it"


SPELLINGS = [
    "import tinylm.moe",
    "import tinylm.moe as moe",
    "from tinylm.moe import MoE",
    "from tinylm import moe",
    "from .moe import MoE",
    "from . import moe",
    "def f():\n    from tinylm.moe import MoE",
    "import_module('tinylm.moe')",
    "TABLE = {'mixture': 'tinylm.moe:MoE'}",
]


@pytest.mark.parametrize("code", SPELLINGS)
def test_every_spelling_of_an_import_is_seen(code):
    assert library_imports(code) == {"moe"}


def test_prose_that_mentions_a_module_is_no_import():
    assert not library_imports("'See `tinylm.moe`.'\nraise ValueError('use tinylm.moe')")


def declared_packages() -> set[str]:
    """Return the names under which the packages of settings.ini are imported."""
    lists = [settings()[key] for key in ("requirements", "trackers_requirements")]
    requirements = [word for words in lists for word in words.split()]
    names = {re.split(r"[<>=!;]", word)[0].lower().replace("-", "_") for word in requirements}
    return {"yaml" if name == "pyyaml" else name for name in names}


@module_param
def test_module_imports_only_what_is_installed_with_it(module):
    imports = imports_of(ast.parse(module.read_text("utf-8")))
    packages = {name.split(".")[0] for name in imports}
    allowed = {"tinylm", *sys.stdlib_module_names, *declared_packages()}
    missing = sorted(packages - allowed)
    assert not missing, (
        f"{module.name} imports {missing}; add them to `requirements` in settings.ini"
    )


def test_version_stands_in_one_place():
    text = (PACKAGE / "__init__.py").read_text("utf-8")
    assert f'__version__ = "{settings()["version"]}"' in text


def test_import_is_quick():
    code = "import sys, tinylm; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    slow = {"torch", "transformers", "numpy"}.intersection(done.stdout.split())
    assert done.returncode == 0, done.stderr
    assert not slow, f"`import tinylm` imports {slow}"


def test_readme_matches_index():
    tool("build_readme.py", "--check")


def test_readme_reports_the_lines_of_code():
    tool("count_lines.py", "--check")


def test_roadmap_pictures_match_their_script():
    tool("roadmap.py", "--check")


@notebook_param
def test_saved_outputs_belong_to_the_code(notebook):
    remedy = f"python tools/run_notebooks.py nbs/{notebook.name}"
    assert is_fresh(notebook), f"{notebook.name} changed since it was last run; {remedy}"


def saved_text(cell) -> str:
    """Return all text saved under a code cell, without pictures."""
    parts = []
    for output in cell.get("outputs", []):
        parts.append(output.get("text", ""))
        parts += output.get("traceback", [])
        for kind, value in output.get("data", {}).items():
            if kind.startswith("text/") and isinstance(value, (str, list)):
                parts.append("".join(value))
    return "\n".join(parts)


@notebook_param
def test_saved_outputs_are_clean(notebook):
    path = r"(?<![\w.:/<>])/[\w.-]+/[\w.-]|[A-Z]:\\|site-packages"
    bad = re.compile(path + r"|\w*Warning\b:|Traceback \(|\bit/s\b")
    for number, cell in code_cells(notebook).items():
        assert not any(output.get("name") == "stderr" for output in cell.outputs), (
            f"cell {number} saved stderr"
        )
        assert not any(output.output_type == "error" for output in cell.outputs), (
            f"cell {number} saved an error"
        )
        text = saved_text(cell)
        match = bad.search(text)
        assert not match, f"cell {number} saved {match[0]!r}: {text[:300]}"


@notebook_param
def test_notebook_imports_only_earlier_ones(notebook):
    code = "\n".join(cell.source for cell in code_cells(notebook).values())
    exports = "#| default_exp" in code  # nobody imports one without; the tour shows what comes
    own_number = NUMBER[notebook.stem[3:]] if exports else ABOVE_ALL
    imports = re.findall(r"^\s*(?:from|import) tinylm\.(\w+)", code, re.MULTILINE)
    imports += re.findall(r"""import_module\(\s*f?["']tinylm\.(\w+)""", code)
    later = sorted(name for name in set(imports) if NUMBER.get(name, -1) > own_number)
    assert not later, f"{notebook.name} imports {later}, which come after it"


@notebook_param
def test_notebook_uses_no_private_names_of_another(notebook):
    """A name that begins with an underscore may change, so only its own notebook uses it."""
    private = []
    for cell in code_cells(notebook).values():
        imports = re.findall(
            r"^\s*from tinylm\.(\w+) import ([^(#\n]+|\([^)]+\))", cell.source, re.M
        )
        for module, names in imports:
            if module != notebook.stem[3:]:
                private += re.findall(r"\b_[a-z]\w*", names)
    assert not private, f"{notebook.name} imports {private}: make them public"


@notebook_param
def test_imports_stand_in_cells_of_their_own(notebook):
    for number, cell in code_cells(notebook).items():
        if re.match(r"\s*[%!]|#\|\s*export", cell.source):
            continue
        statements = ast.parse(cell.source).body
        are_imports = {isinstance(node, (ast.Import, ast.ImportFrom)) for node in statements}
        assert are_imports != {True, False}, (
            f"cell {number} of {notebook.name} mixes imports with other code"
        )


@notebook_param
def test_local_links_lead_somewhere(notebook):
    cells = nbformat.read(notebook, as_version=4).cells
    prose = "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    links = re.findall(r"\]\((?!\w+:|#)([^)\s]+)", prose)
    targets = {link.split("#")[0] for link in links}
    missing = sorted(target for target in targets if not (NBS / target).exists())
    assert not missing, f"{notebook.name} links to {missing}"
