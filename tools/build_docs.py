"""Build the documentation site into _docs/ without Quarto: nbdev prepares the notebooks, smalldocs renders them.

    pip install -e '.[dev,docs]'        # smalldocs needs Python 3.11 or newer
    python tools/build_docs.py

Code is not run again, apart from imports and exported cells: pages show the outputs saved in the notebooks.
"""

import ast
import inspect
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PROC, DOCS = ROOT / "_proc", ROOT / "_docs"


def plain_names(folder: Path) -> dict[str, str]:
    """Rename 00_core.ipynb to core.ipynb, which is what nbdev's links say; give back old and new names."""
    names = {path.name: path.name[3:] for path in folder.glob("[0-9][0-9]_*.ipynb")}
    for old, new in names.items():
        (folder / old).rename(folder / new)
    return names


def relink(folder: Path, names: dict[str, str], site: str) -> None:
    """Point links at the new names, and links to the published site at the pages beside them."""
    for path in [*folder.glob("*.ipynb"), folder / "sidebar.yml"]:
        text = path.read_text("utf-8")
        for old, new in names.items():
            text = text.replace(f"({old}", f"({new}").replace(f"- {old}", f"- {new}")
        path.write_text(re.sub(re.escape(site) + r"(?=[\w./-]*\.html)", "", text), "utf-8")


def signature_of(symbol: Any, **options: Any) -> inspect.Signature:
    """Read a signature, also of a class that inherits `__init__` with annotations that cannot be evaluated.

    PyTorch writes some of its annotations as text, with names that it imports for type checkers only.
    """
    try:
        return inspect.signature(symbol, **options)
    except NameError:
        return inspect.signature(symbol)


def is_run(cell: Any) -> bool:
    """Say whether a cell must be run to show signatures: exported code, plain imports and `show_doc`, nothing else.

    nbdev also runs cells with an import anywhere inside, such as one in a function, whose other lines need a notebook
    that has been run from the top.
    """
    statements = cell.parsed_() if cell.cell_type == "code" and cell.source else []
    if not statements:
        return False
    if cell.directives_.keys() & {"export", "exports", "exporti", "exec_doc"}:
        return True
    only_imports = all(
        isinstance(statement, (ast.Import, ast.ImportFrom)) for statement in statements
    )
    return (
        only_imports or cell.source.lstrip().startswith("show_doc(") or "\nshow_doc(" in cell.source
    )


def main() -> int:
    import fastcore.docments
    import nbdev.processors
    from nbdev.config import get_config
    from nbdev.quarto import nbdev_sidebar, refresh_quarto_yml
    from nbdev.serve import proc_nbs

    # In place of nbdev's own; in this process, since worker processes would not know them.
    fastcore.docments.signature = signature_of
    nbdev.processors._do_eval = is_run
    shutil.rmtree(PROC, ignore_errors=True)
    refresh_quarto_yml()
    nbdev_sidebar()
    proc_nbs(force=True, n_workers=0)
    config = get_config()
    relink(PROC, plain_names(PROC), f"{config.doc_host}{config.doc_baseurl}/")
    if subprocess.run(
        [sys.executable, "-m", "smalldocs.cli", "render", str(PROC)], cwd=ROOT
    ).returncode:
        return 1
    shutil.rmtree(DOCS, ignore_errors=True)
    shutil.move(PROC / "_docs", DOCS)
    print(f"{len(list(DOCS.glob('*.html')))} pages in {DOCS.name}/")
    return 0


if __name__ == "__main__":
    sys.exit(main())
