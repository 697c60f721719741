"""Train and watch every variant from every seed, with a progress bar and one TensorBoard log per variant."""

from __future__ import annotations

import contextlib
import multiprocessing
import platform
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

import neuronscope
from neuronscope.demo.digits import Digits
from neuronscope.demo.recipe import Recipe, Variant, build_network
from neuronscope.demo.results import Comparison, Network, Run
from neuronscope.demo.tensorboard_logs import VariantLog
from neuronscope.demo.training import train
from neuronscope.report.report import Report

__all__ = ["compare"]


def compare(
    variants: Sequence[Variant],
    seeds: Sequence[int],
    data: Digits,
    recipe: Recipe,
    logs: Path,
    console: Console,
    processes: int = 1,
) -> tuple[Comparison, dict[str, Report]]:
    """Train every variant from every seed.

    Args:
        variants: The variants to compare.
        seeds: The seeds for each variant.
        data: The digits.
        recipe: The settings that all runs share.
        logs: Folder for TensorBoard logs; each variant is one run in it.
        console: Where to show the progress bar.
        processes: Number of processes that train; 1 = this one. The results do not depend on it.

    Returns:
        All numbers, and the final report on the first seed of each variant, by variant name.
    """
    runs: list[Run] = []
    final: dict[str, Report] = {}
    networks = {variant.name: _network(variant, recipe) for variant in variants}
    with _progress(console) as bar, _mapping(processes) as mapped:
        task = bar.add_task("".ljust(32), total=len(variants) * len(seeds))
        trained = mapped(
            partial(_trained, data=data, recipe=recipe, reported=seeds[0]),
            [variant for variant in variants for _ in seeds],
            [*seeds] * len(variants),
        )
        for variant in variants:
            with VariantLog(logs / variant.name, networks[variant.name].neurons) as log:
                for seed in seeds:
                    run, reports = next(trained)
                    runs.append(run)
                    bar.update(task, advance=1, description=f"{variant.label}, seed {seed}".ljust(32))
                    for epoch, report in zip(run.epochs, reports, strict=bool(reports)):
                        log.epoch(epoch, report)
                        final[variant.name] = report
                log.means(runs[-len(seeds) :])
        bar.update(task, description=f"{len(runs)} runs".ljust(32))
    result = Comparison(
        recipe={**asdict(recipe), "images": len(data.train_y), "test_images": len(data.test_y)},
        networks=networks,
        runs=tuple(runs),
        versions={
            "neuronscope": neuronscope.__version__,
            "torch": torch.__version__,
            "numpy": np.__version__,
            "python": platform.python_version(),
        },
    )
    return result, final


def _network(variant: Variant, recipe: Recipe) -> Network:
    parameters = sum(each.numel() for each in build_network(variant, recipe, 0).parameters())
    return Network(variant.label, recipe.layers * variant.width(recipe), parameters)


def _trained(variant: Variant, seed: int, *, data: Digits, recipe: Recipe, reported: int) -> tuple[Run, list[Report]]:
    """Train one network; return the reports of one seed only, since they go from process to process."""
    run, reports = train(variant, seed, data, recipe)
    return run, reports if seed == reported else []


@contextlib.contextmanager
def _mapping(processes: int) -> Iterator[Callable[..., Iterator[Any]]]:
    """Give a function like :func:`map` that calls in processes of its own, and cancel what is left at the end.

    Processes are started anew rather than forked, so that none inherits the locks of torch's threads.
    """
    pool = None
    if processes > 1:
        with contextlib.suppress(ImportError, NotImplementedError, OSError):  # a system without semaphores
            pool = ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), _begin_process)
    if pool is None:
        yield map
        return
    try:
        yield pool.map
    finally:
        pool.shutdown(cancel_futures=True)


def _begin_process() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the program, which then ends its processes
    torch.set_num_threads(1)


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=None),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TextColumn("left:"),
        TimeRemainingColumn(),
        console=console,
        expand=True,
    )
