"""Build the documentation site into _docs/ without Quarto: nbdev prepares the notebooks, smalldocs renders them.

    pip install -e '.[dev,docs]'        # smalldocs needs Python 3.11 or newer
    python tools/build_docs.py

Code is not run again, apart from imports and exported cells: pages show the outputs saved in the notebooks.
"""

import re
import shutil
import subprocess
import sys
from pathlib import Path

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


def main() -> int:
    from nbdev.config import get_config
    from nbdev.quarto import nbdev_sidebar, refresh_quarto_yml
    from nbdev.serve import proc_nbs

    shutil.rmtree(PROC, ignore_errors=True)
    refresh_quarto_yml()
    nbdev_sidebar()
    proc_nbs(force=True)
    config = get_config()
    relink(PROC, plain_names(PROC), f"{config.doc_host}{config.doc_baseurl}/")
    if subprocess.run([sys.executable, "-m", "smalldocs.cli", "render", str(PROC)], cwd=ROOT).returncode:
        return 1
    shutil.rmtree(DOCS, ignore_errors=True)
    shutil.move(PROC / "_docs", DOCS)
    print(f"{len(list(DOCS.glob('*.html')))} pages in {DOCS.name}/")
    return 0


if __name__ == "__main__":  # nbdev starts worker processes, which import this file
    sys.exit(main())
