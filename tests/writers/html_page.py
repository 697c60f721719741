"""An HTML page of a report as a parser sees it."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from html.parser import HTMLParser
from typing import Any


class Page(HTMLParser):
    """Elements with their attributes, the text of scripts and styles, and the rows of the sites' table."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.raw: list[tuple[str, str]] = []
        self.words: list[str] = []
        self.rows: list[list[tuple[str, str | None]]] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag in ("script", "style"):
            self.raw.append((tag, ""))
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th") and self.rows:
            self.rows[-1].append(("", dict(attrs).get("data-key")))

    def handle_data(self, data: str) -> None:
        if self.cdata_elem:
            self.raw[-1] = (self.raw[-1][0], self.raw[-1][1] + data)
            return
        self.words.append(data)
        if self.rows and self.rows[-1]:
            text, key = self.rows[-1][-1]
            self.rows[-1][-1] = (text + data.strip(), key)

    @property
    def data(self) -> Any:
        return json.loads(next(text for _, text in self.raw if text.startswith("{")))

    def assert_loads_nothing_from_elsewhere(self) -> None:
        for _, attributes in self.elements:
            for name, value in attributes.items():
                assert not name.startswith("on")
                assert name != "style"
                if name in ("src", "href"):
                    assert value is not None
                    assert value.startswith("#") or value == "data:,"
        assert [tag for tag, _ in self.elements if tag in ("img", "iframe", "object", "base", "form")] == []
        style = next(text for tag, text in self.raw if tag == "style")
        assert "url(" not in style
        assert "@import" not in style

    def assert_policy_allows_only_its_own_script_and_style(self) -> None:
        policy = next(a["content"] for tag, a in self.elements if tag == "meta" and "Content-Security" in str(a))
        assert policy is not None
        assert [tag for tag, _ in self.raw] == ["style", "script", "script"]
        style, data, script = (text for _, text in self.raw)
        for directive, text in (("style-src", style), ("script-src", script)):
            digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
            assert f"{directive} 'sha256-{digest}'" in policy
        assert "unsafe" not in policy
        assert policy.startswith("default-src 'none'")
        assert not re.search("[<>&]", data)
