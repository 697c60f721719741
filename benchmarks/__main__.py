"""Print every table: ``python -m benchmarks [PART …] [--quick] [--threads N]``, about eight minutes on two cores."""

from __future__ import annotations

import argparse
import datetime
import importlib
import logging
import os
import platform
import sys
import time

import torch

from benchmarks.peers import PEERS, missing

#: In the order in which they are printed: modules of this package.
PARTS = ("importing", "counting", "steps", "trainers", "windows", "writing", "growth", "memory", "profiling", "peers")


def machine() -> str:
    """The machine's class; no names."""
    cores = os.cpu_count() or 1
    device = "CPU only" if not torch.cuda.is_available() else torch.cuda.get_device_name()
    return (
        f"{datetime.date.today():%Y-%m-%d}, {cores} cores, {platform.machine()}, {platform.system()}, {device}, "
        f"torch {torch.__version__.partition('+')[0]} with {torch.get_num_threads()} threads, "
        f"Python {platform.python_version()}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; all by default")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, one round: does it run at all?")
    parser.add_argument("--threads", type=int, default=min(os.cpu_count() or 1, 2), help="torch's threads")
    arguments = parser.parse_args()
    unknown = sorted(set(arguments.parts) - set(PARTS))
    if unknown:
        parser.error(f"no such part: {', '.join(unknown)}; there are {', '.join(PARTS)}")
    torch.set_num_threads(arguments.threads)
    logging.disable(logging.INFO)  # Lightning greets at each run
    print(f"{machine()}\n")
    for part in arguments.parts or PARTS:
        if part == "peers" and not arguments.parts and len(missing()) == len(PEERS):
            print("No peer is installed: `make bench-peers` installs and measures them.\n")
            continue
        began = time.perf_counter()
        for table in importlib.import_module(f"benchmarks.{part}").tables(quick=arguments.quick):
            print(table.markdown(), flush=True)
        print(f"({part}: {time.perf_counter() - began:.0f} s)", file=sys.stderr)


if __name__ == "__main__":
    main()
