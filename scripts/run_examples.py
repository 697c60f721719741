"""Run every script and notebook of a folder as a user would, one after the other, and say how long each took.

``python scripts/run_examples.py [FOLDER] [--limit SECONDS] [--part 1/2]``; the folder is ``examples`` unless named.
With a part every second file is run, from the first or from the second on: two parts may run at once. A file that
starts with an underscore is a part of others and is left out. Exit code 1 when one failed or ran over the limit.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

NOTEBOOK = Path(__file__).resolve().parent / "notebook.py"


def main() -> int:
    """Run the scripts; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", nargs="?", default="examples", type=Path)
    parser.add_argument("--limit", type=float, default=600.0, help="seconds that one script may take")
    parser.add_argument("--part", default="1/1", help="which part of the files, of how many")
    arguments = parser.parse_args()
    part, parts = map(int, arguments.part.split("/"))
    scripts = sorted(
        path
        for path in arguments.folder.iterdir()
        if path.suffix in (".py", ".ipynb") and not path.name.startswith("_")
    )[part - 1 :: parts]
    if not scripts:
        print(f"No scripts in {arguments.folder}/.")
        return 1
    failed = []
    for script in scripts:
        print(f"---- {script}", flush=True)
        began = time.monotonic()
        try:
            code = subprocess.run(
                [sys.executable, *([str(NOTEBOOK)] if script.suffix == ".ipynb" else []), str(script)],
                timeout=arguments.limit,
                stdin=subprocess.DEVNULL,
                env={**os.environ, "PYTHONUNBUFFERED": "1"},
                check=False,
            ).returncode
            ending = "ok" if code == 0 else f"exit code {code}"
        except subprocess.TimeoutExpired:
            ending = f"stopped after {arguments.limit:.0f} s"
        print(f"---- {script}: {ending}, {time.monotonic() - began:.1f} s", flush=True)
        if ending != "ok":
            failed.append(script.name)
    print(f"{len(scripts) - len(failed)} of {len(scripts)} scripts in {arguments.folder}/ ran to their end.")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
