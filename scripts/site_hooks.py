"""Hooks of the documentation site, which mkdocs calls while it builds (``mkdocs.yml`` names this file).

They add three things that the pages of ``docs/`` have on a code host, and a site has not by itself:

- a page for each file of ``examples/``, so that links to ``../examples/…`` lead somewhere (notebooks as markdown);
- mermaid diagrams, as the pictures that ``scripts/draw_diagrams.py`` drew, so that no script draws them in the browser;
- ``llms.txt`` and the pages as markdown, for readers that are programs.
"""

from __future__ import annotations

import ast
import hashlib
import json
import logging
import os
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.nav import Navigation
from mkdocs.structure.pages import Page

_LOGGER = logging.getLogger("mkdocs.hooks.site")
ROOT = Path(__file__).resolve().parent.parent
DIAGRAMS = ROOT / "docs" / "images" / "diagrams"


def diagram_name(source: str) -> str:
    """Return the name of the file that holds the picture of a mermaid diagram: the digest of its source."""
    return hashlib.sha256(source.strip().encode()).hexdigest()[:12] + ".svg"


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Let mermaid blocks become pictures, and link the repository if its address is given."""
    config.mdx_configs["pymdownx.superfences"] = {
        "custom_fences": [{"name": "mermaid", "class": "diagram", "format": _picture}]
    }
    if repository := os.environ.get("REPOSITORY_URL"):
        config.extra["social"] = [{"icon": "material/source-repository", "link": repository, "name": "Repository"}]
    return config


def _picture(source: str, language: str, css_class: str, options: Any, md: Any, **kwargs: Any) -> str:
    path = DIAGRAMS / diagram_name(source)
    if not path.exists():
        _LOGGER.warning("A mermaid diagram has no picture: run python scripts/draw_diagrams.py\n%s", source)
        return ""
    return f'<div class="{css_class}">{path.read_text(encoding="utf-8")}</div>'


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add a page for each example."""
    for path in sorted((ROOT / "examples").iterdir()):
        if path.suffix in (".py", ".ipynb"):
            name = path.relative_to(ROOT).as_posix()
            text = path.read_text(encoding="utf-8")
            content = notebook_as_markdown(text) if path.suffix == ".ipynb" else _script_as_markdown(name, text)
            page = File.generated(config, f"{name}.md", content=content, inclusion=InclusionLevel.NOT_IN_NAV)
            files.append(page)
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Lead links to an example to its page on the site."""
    return re.sub(r"\]\(\.\./(examples/\w+\.\w+)\)", r"](\1.md)", markdown)


def notebook_as_markdown(notebook: str) -> str:
    """Return a notebook as markdown: its text, its code, and what the code printed.

    Args:
        notebook: The contents of an ``.ipynb`` file whose outputs are text.
    """
    parts = []
    for cell in json.loads(notebook)["cells"]:
        source = "".join(cell["source"])
        parts.append(source.replace("](../docs/", "](../") if cell["cell_type"] == "markdown" else _code(source))
        for output in cell.get("outputs", []):
            text = output["text"] if output["output_type"] == "stream" else output["data"]["text/plain"]
            parts.append(_code("".join(text), "text"))
    return "\n\n".join(parts)


def _script_as_markdown(name: str, script: str) -> str:
    about = (ast.get_docstring(ast.parse(script)) or "").partition("\n")[0]
    return f"# {name}\n\n{about}\n\n{_code(script)}"


def _code(source: str, language: str = "python") -> str:
    return f"````{language}\n{source.rstrip()}\n````"


_navigation: list[Page] = []
_descriptions: dict[str, str] = {}


def on_nav(nav: Navigation, config: MkDocsConfig, files: Files) -> None:
    """Note the pages in their order, those outside of the navigation last."""
    rest = [file.page for file in files.documentation_pages() if file.page and file.page not in nav.pages]
    _navigation[:] = [*nav.pages, *rest]


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> None:
    """Note the page's first sentence."""
    first = re.search(r"<p>(.*?)</p>", html, flags=re.DOTALL)
    words = " ".join(re.sub(r"<[^>]+>", "", first[1]).split()) if first else ""
    _descriptions[page.file.src_uri] = re.split(r"(?<=[.?!]) ", words)[0].rstrip(".:")


def on_post_build(config: MkDocsConfig) -> None:
    """Write ``llms.txt`` and each page's markdown."""
    site = Path(config.site_dir)
    lines = [f"# {config.site_name}", "", f"> {config.site_description}"]
    section = ""
    for page in _navigation:
        of = page.ancestors[-1].title if page.ancestors else page.title
        title = "Examples" if page.file.inclusion.is_not_in_nav() and not page.ancestors else of
        if title != section:
            section = title
            lines += ["", f"## {section}", ""]
        lines.append(f"- [{page.title}]({page.file.src_uri}): {_descriptions[page.file.src_uri]}")
        target = site / page.file.src_uri
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(page.markdown or "", encoding="utf-8")
    (site / "llms.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
