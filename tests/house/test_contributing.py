"""CONTRIBUTING.md: the files that it names exist, and its diffs apply to the code as it is."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")


def diffs() -> Iterator[tuple[str, str]]:
    """Yield the file and the lines of each change of a file that exists."""
    for block in re.findall(r"```diff\n(.*?)```", PAGE, flags=re.DOTALL):
        for part in re.split(r"^--- ", block, flags=re.MULTILINE)[1:]:
            path, _, lines = part.partition("\n")
            if path.startswith("a/"):
                yield path.removeprefix("a/"), lines


DIFFS = list(diffs())


def test_each_kind_of_addition_has_a_diff() -> None:
    assert len(re.findall(r"```diff", PAGE)) >= 5


@pytest.mark.parametrize(("path", "lines"), DIFFS, ids=[path for path, _ in DIFFS])
def test_a_diff_applies_to_the_code_as_it_is(path: str, lines: str) -> None:
    before = "".join(f"{line[1:]}\n" for line in lines.splitlines() if not line.startswith("+"))
    assert before.strip()
    assert (ROOT / path).read_text(encoding="utf-8").count(before) == 1


@pytest.mark.parametrize("path", sorted(set(re.findall(r"`((?:neuronscope|callbacks|tests|docs)/[\w./]+)`", PAGE))))
def test_a_file_that_is_named_exists(path: str) -> None:
    assert (ROOT / path).exists()
