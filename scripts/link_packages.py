"""Put packages and all that they need into an environment, as links to those that are installed here.

``python scripts/link_packages.py SITE_PACKAGES REQUIREMENT…``. An environment with what a wheel asks for, and with
nothing else, then takes neither a download nor a second copy of torch. Where no link can be made, files are copied.
"""

from __future__ import annotations

import os
import shutil
import sys
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name


def needed(requirements: list[str]) -> dict[str, metadata.Distribution]:
    """Return the installed packages that meet requirements, with those that they need themselves, by name.

    Raises:
        SystemExit: One is not installed, or in another version.
    """
    found: dict[str, metadata.Distribution] = {}
    asked: set[tuple[str, frozenset[str]]] = set()
    queue = [(Requirement(each), frozenset({""})) for each in requirements]
    while queue:
        requirement, extras = queue.pop()
        name = canonicalize_name(requirement.name)
        if requirement.marker and not any(requirement.marker.evaluate({"extra": extra}) for extra in extras):
            continue
        wanted = frozenset({"", *requirement.extras})
        try:
            package = found.setdefault(name, metadata.distribution(name))
        except metadata.PackageNotFoundError:
            sys.exit(f"{requirement} is not installed here.")
        if not requirement.specifier.contains(package.version, prereleases=True):
            sys.exit(f"{requirement} is not met by {name} {package.version}, which is installed here.")
        if (name, wanted) not in asked:
            asked.add((name, wanted))
            queue.extend((Requirement(each), wanted) for each in package.requires or ())
    return found


def link(package: metadata.Distribution, folder: Path) -> None:
    """Link the files of a package into a folder, but for commands, which lie elsewhere.

    Args:
        package: The package.
        folder: Where packages of the environment lie.
    """
    for file in package.files or ():
        if ".." in file.parts or "__pycache__" in file.parts:
            continue
        (place := folder / file).parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(package.locate_file(file), place)
        except FileExistsError:
            continue  # of an earlier call, or of a folder that packages share
        except OSError:
            shutil.copy2(package.locate_file(file), place)


if __name__ == "__main__":
    packages = needed(sys.argv[2:])
    for one in packages.values():
        link(one, Path(sys.argv[1]))
    print("linked", *(f"{name} {package.version}" for name, package in sorted(packages.items())))
