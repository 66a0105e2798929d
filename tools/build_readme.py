"""Write README.md (and README_files/) from nbs/index.ipynb; `--check` says whether they are up to date.

No code is run: the outputs saved in the notebook are used, so the result depends on the notebook alone.
"""

import argparse
import re
import sys
from pathlib import Path

import nbformat
from nbconvert import MarkdownExporter

ROOT = Path(__file__).resolve().parent.parent
INDEX = ROOT / "nbs" / "index.ipynb"
NOTE = "<!-- written by tools/build_readme.py: edit nbs/index.ipynb instead -->\n\n"
DIRECTIVE = re.compile(r"\s*#\s*\|(.*)")


def is_hidden(source: str) -> bool:
    """Whether the cell's `#|` lines keep it out of the rendered page."""
    words = [match[1].strip() for line in source.splitlines() if (match := DIRECTIVE.match(line))]
    return any(word == "hide" or re.fullmatch(r"include:\s*false", word) for word in words)


def prepared(nb):
    """The notebook without hidden cells and `#|` lines, its relative links seen from the project's root."""
    nb.cells = [
        c
        for c in nb.cells
        if c.cell_type == "markdown" or (c.cell_type == "code" and not is_hidden(c.source))
    ]
    for cell in nb.cells:
        if cell.cell_type == "markdown":
            cell.source = re.sub(r"(\]\()(?!\w+:|/|#)", r"\1nbs/", cell.source).replace(
                "](nbs/../", "]("
            )
        else:
            cell.source = "\n".join(
                line for line in cell.source.splitlines() if not DIRECTIVE.match(line)
            )
    nb.metadata["language_info"] = {"name": "python"}
    return nb


def render() -> dict[str, bytes]:
    """The files to write, by path from the project's root."""
    resources = {"unique_key": "README", "output_files_dir": "README_files"}
    body, resources = MarkdownExporter().from_notebook_node(
        prepared(nbformat.read(INDEX, as_version=4)), resources
    )
    body = re.sub(r"[ \t]+\n", "\n", body)
    body = re.sub(r"\n{3,}", "\n\n", body).strip() + "\n"
    return {"README.md": (NOTE + body).encode(), **resources["outputs"]}


def write(files: dict[str, bytes], root: Path) -> None:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)


def on_disk() -> dict[str, bytes]:
    """README.md and the pictures as they are now."""
    paths = [ROOT / "README.md", *sorted((ROOT / "README_files").glob("**/*"))]
    return {
        path.relative_to(ROOT).as_posix(): path.read_bytes() for path in paths if path.is_file()
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--check", action="store_true", help="write nothing; exit 1 if a file would change"
    )
    check = parser.parse_args().check
    new, old = render(), on_disk()
    changed = sorted(name for name in new.keys() | old.keys() if new.get(name) != old.get(name))
    if check:
        for name in changed:
            print(f"{name} does not match nbs/index.ipynb; python tools/build_readme.py")
        return 1 if changed else 0
    for name in old.keys() - new.keys():
        (ROOT / name).unlink()
    write(new, ROOT)
    print(f"written: {', '.join(changed) or 'nothing to change'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
