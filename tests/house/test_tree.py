"""What must not be in the repository: marks of one machine, and the addresses of package registries."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# Written in pieces, so that this file passes its own test.
MARKS = re.compile(
    "|".join(
        [
            r"(?<![\w.])/" + "(?:root|work|home)" + r"/\w",  # a path of one machine
            r"\b" + "pypi" + r"\.org\b",
            r"\b" + "pythonhosted" + r"\.org\b",
            r"\bdownload\." + "pytorch" + r"\.org\b",
            r"\bregistry\." + "npmjs" + r"\.org\b",
            r"\bdeb\." + "debian" + r"\.org\b",
        ]
    )
)


def tracked_files() -> list[Path]:
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        pytest.skip("not a git checkout")
    listing = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    )
    paths = [ROOT / name for name in listing.stdout.decode().split("\0") if name]
    return [path for path in paths if path.is_file() and not path.is_symlink()]


def test_no_file_contains_a_machine_path_or_a_registry_address() -> None:
    found = []
    for path in tracked_files():
        content = path.read_bytes()
        if b"\0" in content[:8000]:  # binary
            continue
        for number, line in enumerate(content.decode("utf-8", errors="replace").splitlines(), start=1):
            if MARKS.search(line):
                found.append(f"{path.relative_to(ROOT)}:{number}")
    assert found == []


def test_no_file_is_large() -> None:
    # 16 MB: a clone stays quick. The largest are the inputs that exact counts were made from (tests/truth).
    large = [str(path.relative_to(ROOT)) for path in tracked_files() if path.stat().st_size > 16_000_000]
    assert large == []
