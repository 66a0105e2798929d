"""Build the documentation site into _docs/ without Quarto.

nbdev prepares the notebooks, and smalldocs renders them. Added to that are a page for each part,
links to each notebook's source and to Colab, the answers, the interactive pages, and KaTeX, so
that formulas need no network. npm fetches KaTeX; where it is missing, the pages load it from a
public server.

    pip install -e '.[dev,docs]'        # smalldocs needs Python 3.11 or newer
    python tools/build_docs.py

Only imports and exported cells are run again. The pages show the outputs that the notebooks have
saved.
"""

import ast
import hashlib
import inspect
import json
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
NBS = ROOT / "nbs"
PROC = ROOT / "_proc"
DOCS = ROOT / "_docs"
FOLDERS = ("answers", "results")  # of nbs/, which pages link to

# The parts of the course, by the first digit of a notebook's number.
PARTS = {
    "0": "Start",
    "1": "The model",
    "2": "Generation",
    "3": "Data",
    "4": "Pretraining",
    "5": "Post-training",
    "6": "Use and study",
    "7": "Proofs",
}
LEVEL = re.compile(r"^\*\*(Core path|Going deeper|Reference)", re.MULTILINE)  # in a head

# The version that smalldocs writes into its pages, and the SHA-256 of its archive.
KATEX = "katex@0.16.11"
KATEX_SHA256 = "8c5494c5f7d8e8bf73ff3fe64d4bd09a340e4878b7eec9bbd9ef8d8f3e24193f"
KATEX_CDN = f"https://cdn.jsdelivr.net/npm/{KATEX}/dist"
KATEX_FILE = re.compile(
    r"package/dist/(katex\.min\.(css|js)|contrib/auto-render\.min\.js|fonts/.*\.woff2)"
)


class Page(NamedTuple):
    """A notebook, as the site lists it."""

    file: str  # such as 10_rope.ipynb
    title: str
    summary: str  # one sentence
    level: str = ""  # core path, going deeper or reference, if the head says so

    @property
    def plain(self) -> str:
        """The name on the site: rope.ipynb."""
        return re.sub(r"^\d\d_", "", self.file)


class Part(NamedTuple):
    """Notebooks that belong together."""

    digit: str  # the first one of their numbers
    pages: list[Page]

    @property
    def file(self) -> str:
        """The name of the part's page."""
        return f"part-{self.digit}.md"

    @property
    def title(self) -> str:
        """The title of the part's page."""
        return f"Part {self.digit}: {PARTS[self.digit]}"


def read_page(path: Path) -> Page:
    """Read title, summary and level in the first cells of a notebook."""
    notebook = json.loads(path.read_text("utf-8"))
    texts = ["".join(cell["source"]) for cell in notebook["cells"][:4]]
    title = re.search(r"^# (.*)$", texts[0], re.MULTILINE)
    summary = re.search(r"^> (.*)$", texts[0], re.MULTILINE)
    level = LEVEL.search("\n".join(texts))
    return Page(
        path.name,
        title[1] if title else path.stem,
        summary[1] if summary else "",
        level[1].lower() if level else "",
    )


def read_parts(folder: Path) -> list[Part]:
    """Sort the numbered notebooks of a folder into parts."""
    pages = [read_page(path) for path in sorted(folder.glob("[0-9][0-9]_*.ipynb"))]
    parts = [Part(digit, [page for page in pages if page.file[0] == digit]) for digit in PARTS]
    return [part for part in parts if part.pages]


def colab_link(
    git_url: str,  # https://github.com/OWNER/NAME
    branch: str,  # where the notebooks are
    file: str,  # such as 10_rope.ipynb
) -> str:
    """Return the address at which Google Colab opens a notebook of a GitHub repository."""
    repository = git_url.removeprefix("https://github.com/").strip("/")
    return f"https://colab.research.google.com/github/{repository}/blob/{branch}/nbs/{file}"


def source_link(
    git_url: str,  # https://github.com/OWNER/NAME
    branch: str,  # where the notebooks are
    file: str,  # such as 10_rope.ipynb
) -> str:
    """Return the address of a notebook on GitHub."""
    return f"{git_url.strip('/')}/blob/{branch}/nbs/{file}"


def add_links(
    folder: Path,  # of the prepared notebooks
    parts: list[Part],  # what is linked
    git_url: str,  # https://github.com/OWNER/NAME
    branch: str,  # where the notebooks are
) -> None:
    """Put a line below the title of each notebook: its source, Colab, its part."""
    for part in parts:
        for page in part.pages:
            colab = colab_link(git_url, branch, page.file)
            source = source_link(git_url, branch, page.file)
            line = f"[Open in Colab]({colab}) · [source notebook]({source})"
            line += f" · [{part.title}]({part.file})\n\n"
            line += f"In Colab, first run `!pip install git+{git_url}`."
            text = f"::: {{.page-links}}\n{line}\n:::"
            cell = {"cell_type": "markdown", "id": "links", "metadata": {}, "source": text}

            # The first cell holds the title.
            path = folder / page.plain
            notebook = json.loads(path.read_text("utf-8"))
            notebook["cells"].insert(1, cell)
            path.write_text(json.dumps(notebook), "utf-8")


class Interactive(NamedTuple):
    """A page that answers to clicks."""

    file: str  # such as sampling.html
    title: str
    notebook: str  # the one that it belongs to: 21_generate.ipynb


def interactive_pages() -> list[Interactive]:
    """List the interactive pages, with the notebook that each of them links to."""
    pages = []
    for path in sorted((NBS / "interactive").glob("*.html")):
        text = path.read_text("utf-8")
        title = re.search(r"<title>(.*?)</title>", text)
        notebook = re.search(r'href="\.\./([\w.]+\.ipynb)"', text)
        assert title and notebook, f"{path.name} has no title, or links to no notebook"
        pages.append(Interactive(path.name, title[1], notebook[1]))
    return pages


def write_parts(folder: Path, parts: list[Part]) -> None:
    """Write a page for each part: the map, its notebooks, its interactive pages."""
    for part in parts:
        first = part.pages[0]
        lines = ["---", f'title: "{part.title}"', "---", ""]
        lit = NBS / "images" / f"roadmap-{first.file[:2]}.svg"
        if lit.exists():
            lines += [
                f"![The map, with the first notebook of this part lit](images/{lit.name})",
                "",
            ]

        # One paragraph for each notebook.
        for page in part.pages:
            level = f" · {page.level}" if page.level else ""
            link = f"**[{page.file[:2]} {page.title}]({page.plain})**{level}  "
            lines += [link, page.summary, ""]
        files = {page.file for page in part.pages}
        for interactive in interactive_pages():
            if interactive.notebook in files:
                address = f"interactive/{interactive.file}"
                lines += [f"Try it: [{interactive.title}]({address}) (interactive)", ""]
        (folder / part.file).write_text("\n".join(lines), "utf-8")


def write_sidebar(folder: Path, parts: list[Part]) -> None:
    """List all pages at the side, in sections."""
    lines = ["website:", "  sidebar:", "    contents:", "      - index.ipynb"]
    if (folder / "glossary.ipynb").exists():
        lines.append("      - glossary.ipynb")

    # A section opens its part's page.
    for part in parts:
        lines += [f'      - section: "{part.title}"', f"        href: {part.file}"]
        lines.append("        contents:")
        lines += [f"          - {page.plain}" for page in part.pages]
    answers = sorted((folder / "answers").glob("*.md"))
    if answers:
        lines += ['      - section: "answers"', "        contents:"]
        lines += [f"          - answers/{path.name}" for path in answers]
    (folder / "sidebar.yml").write_text("\n".join(lines) + "\n", "utf-8")


def copy_folders(folder: Path, names: dict[str, str]) -> None:
    """Copy what pages link to, and point its links at the new names of the notebooks."""
    for name in FOLDERS:
        if (NBS / name).exists():
            shutil.copytree(NBS / name, folder / name, dirs_exist_ok=True)
    for path in NBS.glob("models/*/README.md"):
        copy = folder / path.relative_to(NBS)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, copy)
    for path in (folder / "answers").glob("*.md"):
        text = path.read_text("utf-8")
        for old, new in names.items():
            text = text.replace(f"../{old}", f"../{new}")
        path.write_text(text, "utf-8")


def copy_interactive(folder: Path, names: dict[str, str]) -> None:
    """Copy the interactive pages as they are, but for their links to notebooks."""
    (folder / "interactive").mkdir(exist_ok=True)
    for page in interactive_pages():
        text = (NBS / "interactive" / page.file).read_text("utf-8")
        plain = names.get(page.notebook, page.notebook)
        target = f"../{plain.removesuffix('.ipynb')}.html"
        text = text.replace(f"../{page.notebook}", target)
        (folder / "interactive" / page.file).write_text(text, "utf-8")


def fetch_katex(folder: Path) -> bool:
    """Let npm fetch KaTeX, and unpack what pages need; False if that is not possible."""
    npm = shutil.which("npm")
    if npm is None:
        print("npm is not installed: the formulas of these pages need a network")
        return False
    with tempfile.TemporaryDirectory() as scratch:
        command = [npm, "pack", KATEX, "--silent"]
        done = subprocess.run(command, cwd=scratch, capture_output=True, text=True, timeout=300)
        archives = list(Path(scratch).glob("*.tgz"))
        if done.returncode or not archives:
            print("npm could not fetch KaTeX: the formulas of these pages need a network")
            return False
        digest = hashlib.sha256(archives[0].read_bytes()).hexdigest()
        if digest != KATEX_SHA256:
            raise ValueError(f"{KATEX} has the SHA-256 {digest}, expected {KATEX_SHA256}")

        # Copy single files, so that no path of the archive leads elsewhere.
        with tarfile.open(archives[0]) as archive:
            for member in archive.getmembers():
                match = KATEX_FILE.fullmatch(member.name)
                content = archive.extractfile(member) if match else None
                if match and content:
                    path = folder / match[1]
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_bytes(content.read())
    return True


def use_local_katex(folder: Path) -> None:
    """Let all pages load the KaTeX that lies in the site."""
    for path in folder.rglob("*.html"):
        text = path.read_text("utf-8")
        if KATEX_CDN in text:
            up = "../" * (len(path.relative_to(folder).parts) - 1)
            path.write_text(text.replace(KATEX_CDN, f"{up}site_libs/katex"), "utf-8")


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
    files: str,  # address of the project's files, for links out of nbs/
) -> None:
    """Point links at the new names, and links to the published site at the pages beside them."""
    for path in [*folder.glob("*.ipynb"), folder / "sidebar.yml"]:
        text = path.read_text("utf-8")
        for old, new in names.items():
            text = text.replace(f"({old}", f"({new}")
            text = text.replace(f"- {old}", f"- {new}")
        text = text.replace("](../", f"]({files}/")
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
    parts = read_parts(NBS)
    names = plain_names(PROC)
    files = f"{config.git_url}/blob/{config.branch}"
    relink(PROC, names, f"{config.doc_host}{config.doc_baseurl}/", files)

    # Add what the site has besides the notebooks.
    copy_folders(PROC, names)
    copy_interactive(PROC, names)
    add_links(PROC, parts, config.git_url, config.branch)
    write_parts(PROC, parts)
    write_sidebar(PROC, parts)

    # Render the pages, and replace the old ones.
    renderer = [sys.executable, "-m", "smalldocs.cli", "render", str(PROC)]
    if subprocess.run(renderer, cwd=ROOT).returncode:
        return 1
    shutil.rmtree(DOCS, ignore_errors=True)
    shutil.move(PROC / "_docs", DOCS)
    copy_interactive(DOCS, names)
    if fetch_katex(DOCS / "site_libs" / "katex"):
        use_local_katex(DOCS)
    pages = list(DOCS.rglob("*.html"))
    print(f"{len(pages)} pages in {DOCS.name}/")
    return 0


if __name__ == "__main__":
    sys.exit(main())
