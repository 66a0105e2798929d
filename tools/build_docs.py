"""Build the documentation site into _docs/ without Quarto.

nbdev prepares the notebooks, and smalldocs renders them.

    pip install -e '.[dev,docs]'        # smalldocs needs Python 3.11 or newer
    python tools/build_docs.py

Only imports and exported cells are run again. The pages show the outputs that the notebooks have
saved.
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
PROC = ROOT / "_proc"
DOCS = ROOT / "_docs"


def plain_names(folder: Path) -> dict[str, str]:
    """Rename 00_core.ipynb to core.ipynb, as nbdev's links say; return old and new names."""
    names = {path.name: path.name[3:] for path in folder.glob("[0-9][0-9]_*.ipynb")}
    for old, new in names.items():
        (folder / old).rename(folder / new)
    return names


def relink(
    folder: Path,  # of the prepared notebooks
    names: dict[str, str],  # the old name of each notebook, and its new one
    site: str,  # address of the published site
) -> None:
    """Point links at the new names, and links to the published site at the pages beside them."""
    for path in [*folder.glob("*.ipynb"), folder / "sidebar.yml"]:
        text = path.read_text("utf-8")
        for old, new in names.items():
            text = text.replace(f"({old}", f"({new}")
            text = text.replace(f"- {old}", f"- {new}")
        text = re.sub(re.escape(site) + r"(?=[\w./-]*\.html)", "", text)
        path.write_text(text, "utf-8")


def signature_of(symbol: Any, **options: Any) -> inspect.Signature:
    """Read a signature, also one with annotations that cannot be evaluated.

    PyTorch writes some annotations as text, with names that it imports for type checkers only.
    """
    try:
        return inspect.signature(symbol, **options)
    except NameError:
        return inspect.signature(symbol)


def is_run(cell: Any) -> bool:
    """Say whether a cell must be run to show signatures.

    These are exported code, plain imports and `show_doc`. nbdev also runs cells with an import
    anywhere inside, such as one in a function. Their other lines need a notebook that has been run
    from the top.
    """
    if cell.cell_type != "code" or not cell.source:
        return False
    statements = cell.parsed_()
    if not statements:
        return False
    if cell.directives_.keys() & {"export", "exports", "exporti", "exec_doc"}:
        return True
    only_imports = all(
        isinstance(statement, (ast.Import, ast.ImportFrom)) for statement in statements
    )
    shows_a_signature = re.search(r"^show_doc\(", cell.source.lstrip(), re.MULTILINE)
    return only_imports or bool(shows_a_signature)


def main() -> int:
    """Build the site."""
    import fastcore.docments
    import nbdev.processors
    from nbdev.config import get_config
    from nbdev.quarto import nbdev_sidebar, refresh_quarto_yml
    from nbdev.serve import proc_nbs

    # Replace two functions of nbdev. It must not start other processes, which would not know them.
    fastcore.docments.signature = signature_of
    nbdev.processors._do_eval = is_run

    # Prepare the notebooks in _proc/.
    shutil.rmtree(PROC, ignore_errors=True)
    refresh_quarto_yml()
    nbdev_sidebar()
    proc_nbs(force=True, n_workers=0)
    config = get_config()
    relink(PROC, plain_names(PROC), f"{config.doc_host}{config.doc_baseurl}/")

    # Render the pages, and replace the old ones.
    renderer = [sys.executable, "-m", "smalldocs.cli", "render", str(PROC)]
    if subprocess.run(renderer, cwd=ROOT).returncode:
        return 1
    shutil.rmtree(DOCS, ignore_errors=True)
    shutil.move(PROC / "_docs", DOCS)
    pages = list(DOCS.glob("*.html"))
    print(f"{len(pages)} pages in {DOCS.name}/")
    return 0


if __name__ == "__main__":
    sys.exit(main())
