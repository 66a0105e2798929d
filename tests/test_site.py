"""The documentation site: links, parts, formulas. Building it takes minutes, so CI does that."""

import json
import re
from pathlib import Path

import build_docs
import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
NBS = ROOT / "nbs"
PARTS = build_docs.read_parts(NBS)
FILES = [page.file for part in PARTS for page in part.pages]


@pytest.mark.parametrize("file", FILES)
def test_a_notebook_opens_in_colab_and_on_github(file):
    """The links have the form that Colab and GitHub expect, and name a notebook that exists."""
    arguments = ("https://github.com/tinylm/tinylm", "main", file)
    colab = re.fullmatch(
        r"https://colab\.research\.google\.com/github/tinylm/tinylm/blob/main/nbs/(.*)",
        build_docs.colab_link(*arguments),
    )
    source = re.fullmatch(
        r"https://github\.com/tinylm/tinylm/blob/main/nbs/(.*)", build_docs.source_link(*arguments)
    )
    assert colab and source and colab[1] == source[1]
    assert (NBS / colab[1]).exists()


def test_each_numbered_notebook_is_in_one_part():
    """A page that is in no part cannot be found."""
    assert sorted(FILES) == sorted(path.name for path in NBS.glob("[0-9][0-9]_*.ipynb"))
    for part in PARTS:
        assert all(page.title and page.summary for page in part.pages), part.title


def test_links_part_pages_and_sidebar_are_written(tmp_path):
    """Each notebook gets its line of links, each part a page, and the sidebar names them all."""
    for file in FILES:
        notebook = {"cells": [{"cell_type": "raw", "source": "title"}]}
        (tmp_path / build_docs.Page(file, "", "").plain).write_text(json.dumps(notebook), "utf-8")
    build_docs.add_links(tmp_path, PARTS, "https://github.com/tinylm/tinylm", "main")
    build_docs.write_parts(tmp_path, PARTS)
    build_docs.write_sidebar(tmp_path, PARTS)

    sidebar = yaml.safe_load((tmp_path / "sidebar.yml").read_text("utf-8"))
    sections = [entry for entry in sidebar["website"]["sidebar"]["contents"] if "section" in entry]
    listed = [name for section in sections for name in section["contents"]]
    for part in PARTS:
        text = (tmp_path / part.file).read_text("utf-8")
        assert part.file in [section["href"] for section in sections if "href" in section]
        for page in part.pages:
            assert f"({page.plain})" in text and page.plain in listed
            cells = json.loads((tmp_path / page.plain).read_text("utf-8"))["cells"]
            assert f"/nbs/{page.file})" in cells[1]["source"]


def test_interactive_pages_link_to_pages_of_the_site(tmp_path):
    """An interactive page names its notebook; on the site that is a page."""
    pages = build_docs.interactive_pages()
    assert {page.file for page in pages} >= {"sampling.html", "masks.html"}
    names = {file: build_docs.Page(file, "", "").plain for file in FILES}
    build_docs.copy_interactive(tmp_path, names)
    for page in pages:
        assert page.notebook in FILES
        text = (tmp_path / "interactive" / page.file).read_text("utf-8")
        links = re.findall(r'href="\.\./([^"]*)"', text)
        assert links == [f"{names[page.notebook].removesuffix('.ipynb')}.html"]
        assert "http" not in re.sub(r'"data">.*?</script>', "", text), "it would need a network"


def test_pages_load_formulas_from_the_site(tmp_path):
    """No address of the public server is left, also in a page that lies deeper."""
    (tmp_path / "answers").mkdir()
    for name in ("rope.html", "answers/rope.html"):
        link = f'<link href="{build_docs.KATEX_CDN}/katex.min.css">'
        (tmp_path / name).write_text(link, "utf-8")
    build_docs.use_local_katex(tmp_path)
    assert '"site_libs/katex/katex.min.css"' in (tmp_path / "rope.html").read_text("utf-8")
    deeper = (tmp_path / "answers" / "rope.html").read_text("utf-8")
    assert '"../site_libs/katex/katex.min.css"' in deeper


def test_the_site_says_so_without_npm(tmp_path, monkeypatch, capsys):
    """A missing npm costs the formulas their independence, not the build."""
    monkeypatch.setattr(build_docs.shutil, "which", lambda name: None)
    assert build_docs.fetch_katex(tmp_path) is False
    assert "npm is not installed" in capsys.readouterr().out
