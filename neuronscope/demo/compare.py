"""Train and watch every variant from every seed, with a progress bar and one TensorBoard log per variant."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

import neuronscope
from neuronscope.demo.digits import Digits
from neuronscope.demo.recipe import Recipe, Variant
from neuronscope.demo.results import Comparison, Epoch, Run
from neuronscope.demo.tensorboard_logs import VariantLog
from neuronscope.demo.training import train
from neuronscope.report.report import Report

__all__ = ["compare"]


def compare(
    variants: Sequence[Variant], seeds: Sequence[int], data: Digits, recipe: Recipe, logs: Path, console: Console
) -> tuple[Comparison, dict[str, Report]]:
    """Train every variant from every seed.

    Args:
        variants: The variants to compare.
        seeds: The seeds for each variant.
        data: The digits.
        recipe: The settings that all runs share.
        logs: Folder for TensorBoard logs; each variant is one run in it.
        console: Where to show the progress bar.

    Returns:
        All numbers, and the final report on the first seed of each variant, by variant name.
    """
    runs: list[Run] = []
    reports: dict[str, Report] = {}
    with _progress(console) as bar:
        task = bar.add_task("", total=len(variants) * len(seeds) * recipe.epochs)
        for variant in variants:
            with VariantLog(logs / variant.name, recipe.neurons) as log:
                for seed in seeds:
                    bar.update(task, description=f"{variant.label}, seed {seed}".ljust(24))
                    first = seed == seeds[0]

                    def after_epoch(epoch: Epoch, report: Report, log: VariantLog = log, first: bool = first) -> None:
                        if first:
                            log.epoch(epoch, report)
                        bar.advance(task)

                    run, report = train(variant, seed, data, recipe, after_epoch)
                    runs.append(run)
                    if first:
                        reports[variant.name] = report
                log.means(runs[-len(seeds) :])
        bar.update(task, description=f"{len(runs)} runs".ljust(24))
    result = Comparison(
        recipe={**asdict(recipe), "images": len(data.train_y), "test_images": len(data.test_y)},
        neurons=recipe.neurons,
        labels={variant.name: variant.label for variant in variants},
        runs=tuple(runs),
        versions={
            "neuronscope": neuronscope.__version__,
            "torch": torch.__version__,
            "numpy": np.__version__,
            "python": platform.python_version(),
        },
    )
    return result, reports


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
