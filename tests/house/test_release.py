"""What a package index shows: README's links and the project's addresses, as a release writes them."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path
from typing import Any

import neuronscope

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[2]
HOST = "https://code.example/neuronscope"
SCRIPT: dict[str, Any] = runpy.run_path(str(ROOT / "scripts" / "release_metadata.py"))
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_every_link_of_the_published_readme_leads_to_a_file_of_the_release() -> None:
    published = SCRIPT["with_absolute_links"](README, HOST, "v1")
    links = re.findall(r"(!?)\[[^\]]*\]\(([^)]*)\)", published)
    assert len(links) == len(re.findall(r"\]\(", README)) > 10
    for picture, link in links:
        prefix = f"{HOST}/{'raw' if picture else 'blob'}/v1/"
        assert link.startswith(prefix), link
        assert (ROOT / link.removeprefix(prefix).partition("#")[0]).exists(), link


def test_other_links_stay() -> None:
    text = "[a](https://else.example/x.md) [b](#here) ![c](docs/c.png) [d](docs/d.md#e)"
    assert SCRIPT["with_absolute_links"](text, HOST, "v1") == (
        f"[a](https://else.example/x.md) [b](#here) ![c]({HOST}/raw/v1/docs/c.png) [d]({HOST}/blob/v1/docs/d.md#e)"
    )


def test_the_addresses_of_the_project_are_added_and_nothing_else_changes() -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    before, after = tomllib.loads(text), tomllib.loads(SCRIPT["with_urls"](text, HOST, "v1"))
    urls = after["project"].pop("urls")
    assert after == before
    assert urls["Repository"] == HOST
    for url in urls.values():
        inside = url.removeprefix(f"{HOST}/blob/v1/")
        assert url in (HOST, f"{HOST}/issues") or (ROOT / inside).exists()


def test_the_changelog_names_the_version() -> None:
    assert neuronscope.__version__ in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
