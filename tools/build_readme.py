"""Write README.md (and README_files/) from nbs/index.ipynb.

`--check` says whether they are up to date. No code is run: the page shows the outputs that the
notebook has saved, so it depends on the notebook alone.
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
    """Say whether the cell's `#|` lines keep it out of the rendered page."""
    lines = [DIRECTIVE.match(line) for line in source.splitlines()]
    directives = [match[1].strip() for match in lines if match]
    return any(re.fullmatch(r"hide|include:\s*false", directive) for directive in directives)


def is_shown(cell) -> bool:
    """Say whether a cell is a part of the page."""
    if cell.cell_type == "code":
        return not is_hidden(cell.source)
    return cell.cell_type == "markdown"


def prepare(notebook):
    """Take hidden cells and `#|` lines away, and make links relative to the project's root."""
    notebook.cells = [cell for cell in notebook.cells if is_shown(cell)]
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            text = re.sub(r"(\]\()(?!\w+:|/|#)", r"\1nbs/", cell.source)
            cell.source = text.replace("](nbs/../", "](")
        else:
            lines = [line for line in cell.source.splitlines() if not DIRECTIVE.match(line)]
            cell.source = "\n".join(lines)
    notebook.metadata["language_info"] = {
        "name": "python"
    }  # the exporter marks code blocks with it
    return notebook


def render() -> dict[str, bytes]:
    """Return the content of each file, by its path from the project's root."""
    notebook = prepare(nbformat.read(INDEX, as_version=4))
    resources = {"unique_key": "README", "output_files_dir": "README_files"}
    body, resources = MarkdownExporter().from_notebook_node(notebook, resources)
    body = re.sub(r"[ \t]+\n", "\n", body)
    body = re.sub(r"\n{3,}", "\n\n", body).strip() + "\n"
    return {"README.md": (NOTE + body).encode(), **resources["outputs"]}


def write(files: dict[str, bytes]) -> None:
    """Write each file, by its path from the project's root."""
    for name, content in files.items():
        path = ROOT / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def on_disk() -> dict[str, bytes]:
    """Read README.md and the pictures as they are now."""
    paths = [ROOT / "README.md", *sorted((ROOT / "README_files").glob("**/*"))]
    files = [path for path in paths if path.is_file()]
    return {path.relative_to(ROOT).as_posix(): path.read_bytes() for path in files}


def main() -> int:
    """Read the flags of this script, and do what they say."""
    as_written = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=as_written)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if it is stale")
    check = parser.parse_args().check

    new = render()
    old = on_disk()
    changed = sorted(name for name in new.keys() | old.keys() if new.get(name) != old.get(name))
    if check:
        for name in changed:
            print(f"{name} does not match nbs/index.ipynb; python tools/build_readme.py")
        return 1 if changed else 0

    # Pictures that the page no longer shows go.
    for name in old.keys() - new.keys():
        (ROOT / name).unlink()
    write(new)
    print(f"written: {', '.join(changed) or 'nothing to change'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
