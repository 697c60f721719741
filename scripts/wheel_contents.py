"""Say whether a wheel holds every file of the package folders, once, under the name it is imported by.

``python scripts/wheel_contents.py WHEEL``; exit code 1 and a list when something is missing or too much.
"""

from __future__ import annotations

import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def expected() -> set[str]:
    """Every file under ``neuronscope/`` and ``callbacks/``, by its path in the wheel."""
    names = set()
    for folder, prefix in ((ROOT / "neuronscope", "neuronscope"), (ROOT / "callbacks", "neuronscope/callbacks")):
        for path in folder.rglob("*"):
            inside = path.relative_to(folder)
            through_link = folder.name == "neuronscope" and inside.parts[0] == "callbacks"
            if path.is_file() and not through_link and "__pycache__" not in inside.parts:
                names.add(f"{prefix}/{inside.as_posix()}")
    return names


def main() -> int:
    """Compare; see the module's docstring."""
    with zipfile.ZipFile(sys.argv[1]) as wheel:
        shipped = [name for name in wheel.namelist() if ".dist-info/" not in name]
        licensed = any(name.endswith("/LICENSE") for name in wheel.namelist())
    problems = [f"missing: {name}" for name in sorted(expected() - set(shipped))]
    problems += [f"too much: {name}" for name in sorted(set(shipped) - expected())]
    if len(shipped) != len(set(shipped)):
        problems.append("a file is in it twice")
    if not licensed:
        problems.append("missing: LICENSE")
    print("\n".join(problems) if problems else f"the wheel holds all {len(shipped)} files of the package")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
