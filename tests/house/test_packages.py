"""The build ships every package folder and every file in it, and asks for what it needs in the agreed way."""

from __future__ import annotations

import os
import sys
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[2]
PYPROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
SETUPTOOLS: dict[str, Any] = PYPROJECT["tool"]["setuptools"]


def package_folders() -> dict[str, Path]:
    """Every package by its name; the link neuronscope/callbacks is left out, for callbacks/ itself."""
    found = {}
    for top, name in (("neuronscope", "neuronscope"), ("callbacks", "neuronscope.callbacks")):
        for folder, subfolders, files in os.walk(ROOT / top):
            subfolders[:] = [sub for sub in subfolders if not (Path(folder) / sub).is_symlink()]
            if "__init__.py" in files:
                found[".".join([name, *Path(folder).relative_to(ROOT / top).parts])] = Path(folder)
    return found


def test_every_package_folder_is_listed() -> None:
    assert sorted(SETUPTOOLS["packages"]) == sorted(package_folders())


def test_every_python_file_lies_in_a_package_folder() -> None:
    folders = set(package_folders().values())
    stray = [path for top in ("neuronscope", "callbacks") for path in (ROOT / top).rglob("*.py")]
    assert [path for path in stray if path.parent not in folders and "callbacks" not in path.parent.parts] == []


def test_every_other_file_is_package_data() -> None:
    folders = package_folders()
    patterns = SETUPTOOLS["package-data"]
    left_out = []
    for top in ("neuronscope", "callbacks"):
        for folder, subfolders, files in os.walk(ROOT / top):
            subfolders[:] = [s for s in subfolders if s != "__pycache__" and not (Path(folder) / s).is_symlink()]
            for path in (Path(folder) / name for name in files if not name.endswith((".py", ".pyc"))):
                owner = max((n for n, home in folders.items() if path.is_relative_to(home)), key=len)
                inside = path.relative_to(folders[owner]).as_posix()
                if not any(fnmatch(inside, pattern) for pattern in patterns.get(owner, [])):
                    left_out.append(f"{owner}: {inside}")
    assert left_out == []


@pytest.mark.skipif(sys.platform == "win32", reason="git makes a text file of the link on Windows; nothing needs it")
def test_the_link_for_static_tools_is_relative() -> None:
    link = ROOT / "neuronscope" / "callbacks"
    assert link.is_symlink()
    assert link.readlink().as_posix() == "../callbacks"


def requirements() -> list[str]:
    project = PYPROJECT["project"]
    extras = [line for lines in project["optional-dependencies"].values() for line in lines]
    return [line for line in [*project["dependencies"], *extras] if not line.startswith("neuronscope[")]


@pytest.mark.parametrize("line", requirements())
def test_a_requirement_has_a_lower_bound_and_no_upper_one(line: str) -> None:
    assert [clause.operator for clause in Requirement(line).specifier] == [">="]


def test_constraints_fit_the_requirements() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    assert next(pin for pin in pins if pin.name == "torch").marker is None  # pinned for every Python
    wanted = {requirement.name: requirement for requirement in map(Requirement, requirements())}
    assert sorted(wanted.keys() - {pin.name for pin in pins}) == []
    for pin in pins:
        (clause,) = pin.specifier
        assert clause.operator == "=="
        assert pin.name not in wanted or wanted[pin.name].specifier.contains(clause.version)
