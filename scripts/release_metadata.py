"""Write the repository's address into what is published: ``README.md`` and ``pyproject.toml``.

``python scripts/release_metadata.py URL REF``, before a release is built (``.github/workflows/release.yml``). On a code
host the relative links of README lead to the files beside it; on a package index they would lead nowhere. So there they
become links to the repository's files at ``REF``, a tag. The repository itself does not hold its own address.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

LINK = re.compile(r"(!?)(\[[^\]]*\])\((?!https?:|#)([^)\s]+)\)")


def with_absolute_links(readme: str, repository: str, ref: str) -> str:
    """Return the text of README with links and pictures that work anywhere.

    Args:
        readme: The text.
        repository: The repository's address.
        ref: The tag, branch or commit whose files are linked.
    """
    return LINK.sub(lambda it: f"{it[1]}{it[2]}({repository}/{'raw' if it[1] else 'blob'}/{ref}/{it[3]})", readme)


def with_urls(pyproject: str, repository: str, ref: str) -> str:
    """Return the text of ``pyproject.toml`` with the project's addresses.

    Args:
        pyproject: The text.
        repository: The repository's address.
        ref: The tag, branch or commit whose files are linked.
    """
    urls = {
        "Repository": repository,
        "Documentation": f"{repository}/blob/{ref}/docs/index.md",
        "Changelog": f"{repository}/blob/{ref}/CHANGELOG.md",
        "Issues": f"{repository}/issues",
    }
    table = "".join(f'{name} = "{url}"\n' for name, url in urls.items())
    before, header, after = pyproject.partition("[project.optional-dependencies]\n")
    return f"{before}[project.urls]\n{table}\n{header}{after}"


def main() -> int:
    """Change both files; see the module's docstring."""
    _, repository, ref = sys.argv
    for name, change in (("README.md", with_absolute_links), ("pyproject.toml", with_urls)):
        path = Path(name)
        path.write_text(change(path.read_text(encoding="utf-8"), repository.rstrip("/"), ref), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
