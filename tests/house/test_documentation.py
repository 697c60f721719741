"""The documentation site holds every page of docs/ and every public name. `make docs` finds broken links."""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import neuronscope as ns
from neuronscope import callbacks

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
SITE = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
PAGES = {path.relative_to(DOCS).as_posix(): path.read_text(encoding="utf-8") for path in DOCS.rglob("*.md")}


def navigation() -> list[str]:
    """The pages that the site's navigation lists."""
    return re.findall(r"^ +- [^#\n]*: (\S+\.md)$", SITE.partition("\nnav:\n")[2].partition("\ntheme:")[0], re.MULTILINE)


def test_every_page_is_in_the_navigation_once() -> None:
    listed = navigation()
    assert len(listed) == len(set(listed))
    assert {name for name in listed if not name.startswith("examples/")} == set(PAGES)
    for name in set(listed) - set(PAGES):  # made from an example
        assert (ROOT / name.removesuffix(".md")).exists(), name


def test_every_public_name_is_in_the_api_page() -> None:
    shown = set(re.findall(r"^::: (\S+)$", PAGES["api.md"], re.MULTILINE))
    names = {f"neuronscope.{name}" for name in ns.__all__ if name != "__version__"}
    names |= {f"neuronscope.callbacks.{name}" for name in callbacks.__all__}
    frameworks = ("stable_baselines3", "transformers")
    assert names | {f"neuronscope.callbacks.{each}.DeadNeuronCallback" for each in frameworks} <= shown
    assert "neuronscope.__version__" in PAGES["api.md"]


def test_links_out_of_the_pages_lead_to_files_of_the_repository() -> None:
    # Links between pages are checked by `make docs`; the site has a page for each file of examples/ and for no others.
    for name, text in PAGES.items():
        for target in re.findall(r"\]\((\.\./[^)#]*)", text):
            assert (DOCS / target).exists(), f"{name}: {target}"
            assert target.startswith("../examples/"), f"{name}: {target}"


def test_every_diagram_has_its_picture() -> None:
    # `python scripts/draw_diagrams.py` draws them.
    sources = [
        source
        for text in PAGES.values()
        for source in re.findall(r"^```mermaid\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    ]
    wanted = {hashlib.sha256(source.strip().encode()).hexdigest()[:12] + ".svg" for source in sources}
    assert {path.name for path in (DOCS / "images" / "diagrams").iterdir()} == wanted


def test_nothing_of_the_site_comes_from_the_network() -> None:
    # Material's own address of its fonts, and of what lets the search work from a disk, are replaced in mkdocs.yml.
    assert "font: false" in SITE
    assert "polyfills: [javascripts/iframe-worker.js]" in SITE
    assert not re.search(r"https?://", SITE)
    for path in [*DOCS.rglob("*.css"), *DOCS.rglob("*.js")]:
        assert not re.search(r"https?://|@import", path.read_text(encoding="utf-8")), path


def test_the_built_site_loads_nothing_from_the_network_and_tells_programs_of_each_page(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs", reason="the extra `docs` is not installed")
    subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        check=True,
        capture_output=True,
    )
    for path in tmp_path.rglob("*.html"):
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"""<(?:script|img|iframe)[^>]* src=["']?(?:https?:)?//""", text), path
        assert not re.search(r"""<link[^>]* href=["']?(?:https?:)?//""", text), path
    api = (tmp_path / "api.html").read_text(encoding="utf-8")
    assert not re.search(r":(?:class|func|meth|attr|mod|data):|<blockquote>|``", api)  # roles and doctests
    programs = (tmp_path / "llms.txt").read_text(encoding="utf-8")
    told = re.findall(r"^- \[[^\]]+\]\(([^)]+)\): \S", programs, re.MULTILINE)
    assert [name for name in told if name in navigation()] == navigation()
    assert {f"examples/{path.name}.md" for path in (ROOT / "examples").glob("*.py")} <= set(told)
    assert all((tmp_path / name).read_text(encoding="utf-8").startswith("# ") for name in told)
