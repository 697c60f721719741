"""Print every table: ``python -m benchmarks [PART …] [--into FILE]``, about eight minutes on two quiet cores.

``--into docs/performance.md`` puts them into that page as well, in place of those below its last line of prose.
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import logging
import os
import platform
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from benchmarks.peers import PEERS, missing

#: In the order in which they are printed: modules of this package.
PARTS = (
    *("importing", "counting", "sites", "steps", "trainers", "windows"),
    *("writing", "growth", "memory", "profiling", "peers"),
)


#: The line of a page below which figures stand.
MARK = "<!-- below: python -m benchmarks --into docs/performance.md -->"


def machine() -> str:
    """The machine's class; no names."""
    cores = os.cpu_count() or 1
    device = "CPU only" if not torch.cuda.is_available() else torch.cuda.get_device_name()
    return (
        f"{datetime.date.today():%Y-%m-%d}, {cores} cores, {platform.machine()}, {platform.system()}, {device}, "
        f"torch {torch.__version__.partition('+')[0]} with {torch.get_num_threads()} threads, "
        f"Python {platform.python_version()}"
    )


def figures(parts: Sequence[str], *, quick: bool) -> Iterator[str]:
    """The machine's class and the tables of some parts, one after another."""
    yield f"Measured {machine()}.\n"
    for part in parts:
        began = time.perf_counter()
        for table in importlib.import_module(f"benchmarks.{part}").tables(quick=quick):
            yield table.markdown()
        print(f"({part}: {time.perf_counter() - began:.0f} s)", file=sys.stderr)


def put_into(page: Path, text: str) -> None:
    """Replace what stands below a page's mark.

    Raises:
        ValueError: There is no mark.
    """
    before, mark, _ = page.read_text(encoding="utf-8").partition(MARK)
    if not mark:
        raise ValueError(f"Expected a page with the line {MARK!r}, but {page} has none.")
    page.write_text(f"{before}{mark}\n\n{text.strip()}\n", encoding="utf-8")


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; all by default")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, one round: does it run at all?")
    parser.add_argument("--threads", type=int, default=min(os.cpu_count() or 1, 2), help="torch's threads")
    parser.add_argument("--into", type=Path, metavar="FILE", help="a page to put them into as well")
    arguments = parser.parse_args()
    unknown = sorted(set(arguments.parts) - set(PARTS))
    if unknown:
        parser.error(f"no such part: {', '.join(unknown)}; there are {', '.join(PARTS)}")
    torch.set_num_threads(arguments.threads)
    logging.disable(logging.INFO)  # Lightning greets at each run
    parts = arguments.parts or [part for part in PARTS if part != "peers" or len(missing()) < len(PEERS)]
    printed = []
    for text in figures(parts, quick=arguments.quick):
        print(text, flush=True)
        printed.append(text)
    if arguments.into is not None:
        put_into(arguments.into, "\n".join(printed))


if __name__ == "__main__":
    main()
