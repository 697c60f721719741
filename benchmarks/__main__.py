"""Print every table: ``python -m benchmarks [PART …] [--into FILE]``, below ten minutes on two quiet cores.

``--into docs/performance.md`` puts the tables into that page as well, each part as soon as it is measured, in place of
the same part's tables; what other parts left there stays, with its own date. Pictures go into ``images`` beside it.
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
from pathlib import Path

import torch

from benchmarks.pages import check, put_into, section
from benchmarks.peers import PEERS, missing
from benchmarks.tables import Picture

#: In the order in which they are printed: modules of this package.
PARTS = (
    *("importing", "counting", "sites", "steps", "compile_times", "trainers", "windows"),
    *("writing", "reports", "growth", "memory", "profiling", "peers", "planted"),
)

#: Torch's threads where nobody says otherwise: what the page's figures are of.
THREADS = 1


def machine() -> str:
    """The machine's class; no names."""
    cores = os.cpu_count() or 1
    device = "CPU only" if not torch.cuda.is_available() else torch.cuda.get_device_name()
    threads = torch.get_num_threads()
    return (
        f"{datetime.date.today():%Y-%m-%d}, {cores} cores, {platform.machine()}, {platform.system()}, {device}, "
        f"torch {torch.__version__.partition('+')[0]} with {threads} thread{'s' * (threads > 1)}, "
        f"Python {platform.python_version()}"
    )


def measure(part: str, *, quick: bool, into: Path | None = None) -> None:
    """Print a part's tables, and put them into a page where one is given."""
    began = time.perf_counter()
    pieces = []
    print(f"### {part}\n")
    for piece in importlib.import_module(f"benchmarks.{part}").tables(quick=quick):
        pieces.append(piece)
        if not isinstance(piece, Picture):
            print(piece.markdown(), flush=True)
        elif into is not None:
            (into.parent / "images").mkdir(exist_ok=True)
            (into.parent / "images" / piece.name).write_bytes(piece.draw())
    took = time.perf_counter() - began
    if into is not None:
        put_into(into, part, section(part, f"Measured {machine()}, in {took:.0f} s.", pieces), PARTS)
    print(f"({part}: {took:.0f} s)", file=sys.stderr, flush=True)


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; all by default")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, one round: does it run at all?")
    parser.add_argument("--threads", type=int, default=THREADS, help="torch's threads (default: %(default)s)")
    parser.add_argument("--into", type=Path, metavar="FILE", help="a page to put them into as well")
    arguments = parser.parse_args()
    unknown = sorted(set(arguments.parts) - set(PARTS))
    if unknown:
        parser.error(f"no such part: {', '.join(unknown)}; there are {', '.join(PARTS)}")
    installed = len(missing()) < len(PEERS)
    parts = arguments.parts or [part for part in PARTS if installed or part not in ("peers", "planted")]
    if arguments.into is not None:  # what would fail after minutes fails at once
        check(arguments.into)
        if "growth" in parts:
            importlib.import_module("benchmarks.curves").load_figure()
    torch.set_num_threads(arguments.threads)
    logging.disable(logging.INFO)  # Lightning greets at each run
    print(f"Measured {machine()}.\n")
    for part in parts:
        measure(part, quick=arguments.quick, into=arguments.into)


if __name__ == "__main__":
    main()
