"""What watching costs a rank as a function of sites, neurons and ranks: memory, joining, state, and what is logged.

Starts gloo ranks as processes of this machine, each with the running counts of made-up sites, and prints the tables of
``docs/scale.md``. Nothing is trained: the counts are drawn at random, 1 % of the neurons are dead. A rank needs about
0.25 GB for torch and 300 bytes a neuron; the first, which saves and logs as well, twice as much.

Run it with ``python -m benchmarks.scale [--ranks 1 2 4 8] [--sites 80 20 1000] [--neurons 28672 28672 64]``: of so many
sites so many neurons each.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.utils.tensorboard import SummaryWriter

import neuronscope as ns
from benchmarks.layers import peak
from benchmarks.tables import Table
from neuronscope.build_report import make_report
from neuronscope.count.counters import SiteCounters
from neuronscope.sites import SiteInfo, SiteKey
from neuronscope.tally.distributed.sync import RankSync
from neuronscope.tally.phase_record import PhaseRecord
from neuronscope.writers import tensorboard

INFO = SiteInfo(activation="relu", kind="relu-like", linear_when_on=True, axis=1, axis_source="layer (fc)")
POSITIONS, WINDOWS = 10_000, 3


class Costs(NamedTuple):
    """Of the first rank.

    Attributes:
        all_counters: Bytes of running counts.
        rows: Bytes of rows that wait, on the CPU.
        given: Bytes given to an exchange.
        collectives: That the last exchange took.
        join_s: The quickest exchange, reading the counts included.
        join_cpu_s: The least processor time of an exchange, reading the counts included.
        join_peak: Bytes of the process at its largest, when the windows are closed.
        close_s: To judge a window and write it down, the quickest.
        state: Bytes of a checkpoint's state, after the windows.
        report_s: To make a report.
        log_s: To write it to TensorBoard, with pictures, diagnosis and a byte a neuron.
        log: Bytes that wrote.
        peak: Bytes of the process at its largest, at the end.
    """

    all_counters: int
    rows: int
    given: int
    collectives: int
    join_s: float
    join_cpu_s: float
    join_peak: int
    close_s: float
    state: int
    report_s: float
    log_s: float
    log: int
    peak: int


class Counted(io.RawIOBase):
    """A file that keeps nothing but its size."""

    size = 0

    def writable(self) -> bool:
        """It is."""
        return True

    def write(self, data: Any) -> int:
        """Count the bytes."""
        self.size += len(data)
        return len(data)


def seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def size(tensors: list[torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def count(all_counters: list[SiteCounters], step: int) -> None:
    """As if every site had run."""
    for counters in all_counters:
        zeros = torch.randint(POSITIONS // 2, POSITIONS, (counters.neurons,))
        zeros[: counters.neurons // 100] = POSITIONS
        tensors, window = counters.room_for(POSITIONS, step, step)
        counters.room_for_gradients(POSITIONS).copy_(zeros)
        tensors.zero_outputs.copy_(zeros)
        tensors.abs_sum.copy_(POSITIONS - zeros)
        tensors.last_active.fill_(step - (0 if window is None else window.first_step))
        tensors.first_active.copy_(tensors.last_active)
        counters.positions = counters.gradient_positions = counters.examples = POSITIONS


def measure(rank: int, sites: int, neurons: int) -> Costs | None:
    """The costs, on the first rank; the others only join."""
    torch.manual_seed(rank)
    record, ranks = PhaseRecord(ns.Policy()), RankSync()
    keys = [SiteKey(f"layers.{number}.fc", "", "relu", 0) for number in range(sites)]
    infos = [replace(INFO, layer=key.layer, units=((key.layer, 0, neurons, 1),)) for key in keys]
    all_counters = [
        record.add_site(key, info, neurons, torch.device("cpu")) for key, info in zip(keys, infos, strict=True)
    ]
    joins, processor, closes, collectives, held = [], [], [], [0], 0
    for window in range(WINDOWS):
        count(all_counters, window)
        held = sum(size(list(counters.window.tensors)) for counters in all_counters if counters.window is not None)
        record.note_step(window)
        used = time.process_time()
        joins.append(seconds(lambda: record.flush(lambda census: ranks.join(census, phase="train"))))
        processor.append(time.process_time() - used)
        closes.append(seconds(record.close))
        collectives.append(ranks.exchanges.collectives)
    join_peak = peak()
    if rank:
        return None
    saved = Counted()
    torch.save(record.state_dict(), saved)
    options = {"model": "Made up", "phase": "train", "step": WINDOWS, "policy": ns.Policy(), "unseen": {}}
    reports = []
    report_s = seconds(lambda: reports.append(make_report(record, exchanges=ranks.exchanges, **options)))
    with tempfile.TemporaryDirectory() as folder, SummaryWriter(folder) as writer:
        log_s = seconds(lambda: (tensorboard.write(reports[0], writer, WINDOWS), writer.flush()))
        log = sum(path.stat().st_size for path in Path(folder).iterdir())
    return Costs(
        all_counters=held,
        rows=sum(
            size([rows.next_rows(rows.room)])
            for counters in all_counters
            for rows in (counters.outputs, counters.gradients)
        ),
        given=ranks.exchanges.bytes,
        collectives=collectives[-1] - collectives[-2],
        join_s=min(joins),
        join_cpu_s=min(processor),
        join_peak=join_peak,
        close_s=min(closes),
        state=saved.size,
        report_s=report_s,
        log_s=log_s,
        log=log,
        peak=peak(),
    )


def run_rank(rank: int, world: int, port: int, sites: int, neurons: int, result: str) -> None:
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=world)
    costs = measure(rank, sites, neurons)
    if costs is not None:
        Path(result).write_text(json.dumps(costs))
    dist.barrier()
    os._exit(0)  # gloo's threads may abort an interpreter that takes itself down in order


def costs_of(world: int, sites: int, neurons: int) -> Costs:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "costs.json"
        arguments = (world, port, sites, neurons, str(result))
        mp.start_processes(run_rank, args=arguments, nprocs=world, start_method="spawn")
        return Costs(*json.loads(result.read_text()))


def megabytes(size: float) -> str:
    return f"{size / 1e6:.1f} MB"


def worked_out(sites: int, neurons: int) -> int:
    """Bytes that a rank gives to an exchange: of a neuron, of a site, and the header and the first and last step."""
    return 48 * sites * neurons + 24 * sites + 64


def tables(shapes: list[tuple[int, int]], worlds: list[int]) -> list[Table]:
    memory = Table(
        "Memory", ["S × N", "running counts", "rows", f"state after {WINDOWS} windows", "worked out: 16 T, 180 T"]
    )
    joining = Table(
        "Joining",
        [
            *("S × N", "R", "given by a rank", "worked out", "collectives"),
            *(f"quickest of {WINDOWS}, reading the counts included", "processor time of a rank"),
            "largest the process was",
        ],
    )
    logging = Table(
        "Logging",
        [
            *("S × N", "judging a window", "making a report", "TensorBoard, all of it, on one rank", "its size"),
            "largest the process was, saving included",
        ],
    )
    for sites, neurons in shapes:
        shape, total = f"{sites:,} × {neurons:,}", sites * neurons
        for place, world in enumerate(worlds):
            costs = costs_of(world, sites, neurons)
            print(f"{shape}, R = {world}: {costs}", file=sys.stderr)
            alone = world == 1
            given, wanted = (
                ("–", "–") if alone else (megabytes(size) for size in (costs.given, worked_out(sites, neurons)))
            )
            times = [f"{costs.join_s:.3f} s", f"{costs.join_cpu_s:.3f} s", f"{costs.join_peak / 1e9:.2f} GB"]
            joining.rows.append([shape, str(world), given, wanted, str(costs.collectives), *times])
            if place == 0:
                expected = f"{megabytes(20 * total)}, {megabytes((177 + WINDOWS) * total)}"
                memory.rows.append([shape, *map(megabytes, (costs.all_counters, costs.rows, costs.state)), expected])
                spent = [f"{costs.close_s:.3f} s", f"{costs.report_s:.3f} s", f"{costs.log_s:.1f} s"]
                logging.rows.append([shape, *spent, f"{costs.log / 1e6:.2g} MB", f"{costs.peak / 1e9:.2f} GB"])
    return [memory, joining, logging]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--sites", type=int, nargs="+", default=[80, 20, 1000])
    parser.add_argument("--neurons", type=int, nargs="+", default=[28_672, 28_672, 64])
    options = parser.parse_args()
    for table in tables(list(zip(options.sites, options.neurons, strict=True)), options.ranks):
        print(table.markdown())


if __name__ == "__main__":
    main()
