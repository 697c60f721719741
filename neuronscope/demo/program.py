"""Run the whole demo: train the comparison, print the results and write them to a folder."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from neuronscope.demo.compare import compare
from neuronscope.demo.conclusions import findings, headline
from neuronscope.demo.digits import Digits, load_digits
from neuronscope.demo.picture import comparison_png, import_matplotlib
from neuronscope.demo.recipe import QUICK, VARIANTS, Recipe, Variant
from neuronscope.demo.results import Comparison
from neuronscope.demo.tables import layer_table, main_table
from neuronscope.demo.tensorboard_logs import remove_earlier_logs
from neuronscope.errors import UsageError
from neuronscope.output import write_file

__all__ = ["run_demo"]

#: Names of what the demo writes to its folder; these are replaced when it runs again.
LOGS, RESULTS, PICTURE, REPORT = "tensorboard", "results.json", "comparison.png", "report-ReLU.html"

_PIPE_WIDTH = 120


def run_demo(
    out: Path,
    seeds: int = 5,
    *,
    quick: bool = False,
    recipe: Recipe | None = None,
    console: Console | None = None,
    processes: int = 1,
) -> Comparison:
    """Train all variants, show the comparison and return it.

    Args:
        out: Output folder; only files of an earlier demo are replaced in it.
        seeds: Number of training runs per variant.
        quick: Whether to train ReLU, GELU and SiLU only.
        recipe: The settings that all runs share; by default those of :class:`Recipe`.
        console: Where to print; standard output by default.
        processes: Number of processes that train; 1 = this one. The results do not depend on it. If it is not 1, the
            main module of the program must be one that can be imported.
    """
    if seeds < 1:
        raise UsageError(f"Expected the number of seeds to be at least 1, but got {seeds}.")
    recipe = recipe or Recipe()
    console = console or _console()
    data = load_digits()
    import_matplotlib()
    removed = _prepare(out)
    variants = [variant for variant in VARIANTS if not quick or variant.name in QUICK]
    _announce(console, variants, seeds, recipe, data)
    if removed:
        console.print(f"Replacing the logs of an earlier demo in {out / LOGS} ({removed} files).", style="dim")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # with matrices this small, more threads are slower
    try:
        result, reports = compare(variants, range(seeds), data, recipe, out / LOGS, console, processes)
    finally:
        torch.set_num_threads(threads)
    write_file(out / RESULTS, json.dumps(result.to_dict(), allow_nan=False) + "\n")
    write_file(out / PICTURE, comparison_png(result))
    reports["ReLU"].to_html(out / REPORT)
    _conclude(console, result, out)
    return result


def _console() -> Console:
    """Return a console on standard output, as wide as the terminal; without one, wide enough for the tables."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=_PIPE_WIDTH)


def _prepare(out: Path) -> int:
    """Make the folder, remove the logs of an earlier demo, and return the number of removed files."""
    try:
        (out / LOGS).mkdir(parents=True, exist_ok=True)
        return remove_earlier_logs(out / LOGS, [variant.name for variant in VARIANTS])
    except OSError as error:
        raise UsageError(f"Expected a folder that can be written to, but got {out}: {error}.") from error


def _announce(console: Console, variants: list[Variant], seeds: int, recipe: Recipe, data: Digits) -> None:
    first, last = recipe.spike_epochs
    console.print(Text("Neuronscope demo: which activation functions die?", style="bold"))
    console.print(
        f"The same network ({recipe.layers} layers of {recipe.width} neurons) learns scikit-learn's digits "
        f"({len(data.train_y)} training images, {len(data.test_y)} test images) with {len(variants)} set-ups, {seeds} "
        f"seed{'s' if seeds > 1 else ''} each: the same initial weights (He) and batches, Adam "
        f"{recipe.learning_rate:g}, {recipe.epochs} epochs, "
        f"the learning rate {recipe.spike_factor:g} times as high in epochs {first} and {last}."
    )


def _conclude(console: Console, result: Comparison, out: Path) -> None:
    console.print()
    console.print(Text(f"{headline(result)}.", style="bold"))
    for table in (main_table(result, console.width), layer_table(result, console.width)):
        console.print()
        console.print(table)
    console.print()
    console.print(Text("What this shows", style="bold"))
    paragraphs = Table.grid(padding=(0, 1))
    for paragraph in findings(result):
        paragraphs.add_row("-", Text(paragraph))
    console.print(paragraphs)
    console.print()
    for what, name in (("picture", PICTURE), ("report of the ReLU run", REPORT), ("all numbers", RESULTS)):
        console.print(Text(f"{what + ':':24}{out / name}"), soft_wrap=True)
    command = Text(f"tensorboard --logdir {shlex.quote(str(out / LOGS))}", style="bold")
    console.print(Text("curves in TensorBoard:".ljust(24)).append(command), soft_wrap=True)
