"""What watching costs a rank as a function of sites, neurons and ranks: memory, joining, state, and what is logged.

Starts gloo ranks as processes of this machine, each with the running counts of made-up sites, and prints a table.
Nothing is trained: the counts are drawn at random, 1 % of the neurons are dead. A rank needs about 0.25 GB for torch
and 250 bytes a neuron.

Run it with ``python -m benchmarks.scale [--ranks 1 2 4 8] [--sites 80] [--neurons 28672]``.
"""

from __future__ import annotations

import argparse
import io
import os
import resource
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.utils.tensorboard import SummaryWriter

import neuronscope as ns
from neuronscope.census import SiteInfo
from neuronscope.ranks import Ranks
from neuronscope.reporting import make_report
from neuronscope.sites import SiteKey
from neuronscope.windows import PhaseRecord
from neuronscope.writers import tensorboard

INFO = SiteInfo("relu", "relu-like", True, 1, "producer (linear)")
POSITIONS, WINDOWS = 10_000, 3


class Costs(NamedTuple):
    """Of one rank.

    Attributes:
        meter_mb: Running counts.
        rows_mb: Rows that wait, on the CPU.
        joined_mb: Given to an exchange.
        join_s: The quickest exchange, reading the counts included.
        close_s: To judge a window and write it down, the quickest.
        state_mb: A checkpoint's state, after the windows.
        report_s: To make a report.
        log_s: To write it to TensorBoard, with pictures, diagnosis and a byte a neuron.
        log_mb: What that wrote.
        peak_gb: The process at its largest.
    """

    meter_mb: float
    rows_mb: float
    joined_mb: float
    join_s: float
    close_s: float
    state_mb: float
    report_s: float
    log_s: float
    log_mb: float
    peak_gb: float


def seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def tensors(record: PhaseRecord) -> Iterator[tuple[list[torch.Tensor], list[torch.Tensor]]]:
    for _, meter in record._meters.values():
        yield list(meter.counters), [meter.outputs._rows, meter.gradients._rows]


def megabytes(parts: Iterator[list[torch.Tensor]]) -> float:
    return sum(tensor.numel() * tensor.element_size() for part in parts for tensor in part) / 1e6


def count(record: PhaseRecord, step: int) -> None:
    """As if every site had run."""
    for _, meter in record._meters.values():
        zeros = torch.randint(POSITIONS // 2, POSITIONS, (meter.neurons,))
        zeros[: meter.neurons // 100] = POSITIONS
        meter.counters.zero_outputs.copy_(zeros)
        meter.counters.zero_gradients.copy_(zeros)
        meter.counters.abs_sum.copy_(POSITIONS - zeros)
        meter.counters.last_active.fill_(step)
        meter.counters.first_active.fill_(step)
        meter.positions = meter.gradient_positions = meter.examples = POSITIONS
    record.note_step(step)


def measure(rank: int, sites: int, neurons: int) -> Costs:
    torch.manual_seed(rank)
    record, ranks = PhaseRecord(ns.Policy()), Ranks()
    for number in range(sites):
        record.add_meter(SiteKey(f"layers.{number}.act", "", 0, False), INFO, neurons, torch.device("cpu"))
    joins, closes = [], []
    for window in range(WINDOWS):
        count(record, window)
        joins.append(seconds(lambda: record.flush(lambda census: ranks.join(census, phase="train"))))
        closes.append(seconds(record.close))
    saved = io.BytesIO()
    torch.save(record.state_dict(), saved)
    options = {"model": "Made up", "phase": "train", "step": WINDOWS, "policy": ns.Policy(), "unseen": {}}
    reports = []
    report_s = seconds(lambda: reports.append(make_report(record, exchanges=ranks.exchanges, **options)))
    with tempfile.TemporaryDirectory() as folder, SummaryWriter(folder) as writer:
        log_s = seconds(lambda: (tensorboard.write(reports[0], writer, WINDOWS), writer.flush()))
        log_mb = sum(path.stat().st_size for path in Path(folder).iterdir()) / 1e6
    return Costs(
        meter_mb=megabytes(counters for counters, _ in tensors(record)),
        rows_mb=megabytes(rows for _, rows in tensors(record)),
        joined_mb=ranks.exchanges.bytes / 1e6,
        join_s=min(joins),
        close_s=min(closes),
        state_mb=saved.tell() / 1e6,
        report_s=report_s,
        log_s=log_s,
        log_mb=log_mb,
        peak_gb=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6,
    )


def run_rank(rank: int, world: int, port: int, sites: int, neurons: int) -> None:
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=world)
    costs = measure(rank, sites, neurons)
    if rank == 0:
        row = " ".join(f"{value:>10.3f}" for value in costs)
        print(f"{sites:>6} {neurons:>8} {world:>6} {row}", flush=True)
    dist.barrier()
    os._exit(0)  # gloo's threads may abort an interpreter that takes itself down in order


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--sites", type=int, default=80)
    parser.add_argument("--neurons", type=int, default=28_672)
    options = parser.parse_args()
    print(f"{'sites':>6} {'neurons':>8} {'ranks':>6} " + " ".join(f"{name:>10}" for name in Costs._fields))
    for world in options.ranks:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        mp.start_processes(
            run_rank,
            args=(world, port, options.sites, options.neurons),
            nprocs=world,
            start_method="spawn",
        )


if __name__ == "__main__":
    main()
