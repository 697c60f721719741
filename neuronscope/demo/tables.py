"""Make the tables of the comparison for a terminal."""

from __future__ import annotations

import io
from collections.abc import Callable

from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from neuronscope.demo.conclusions import number
from neuronscope.demo.results import NUMBERS, Comparison, Run, Spread

__all__ = ["layer_table", "main_table"]

_BAD, _WARN, _NONE = "bold red", "yellow", "dim"
#: Fraction of the neurons from which on a number is coloured.
_MANY = 0.1
#: Fraction of the neurons of a variant from which on a rare label gets a column.
_FEW = 0.01

Number = Callable[[Run], float]


def main_table(comparison: Comparison, width: int) -> Table:
    """Return a table with one row per variant: dead at four moments, other labels, accuracy; mean ± deviation.

    Args:
        comparison: All runs.
        width: Width of the terminal in characters; narrow terminals get fewer columns.
    """
    before, after = comparison.around_spike
    # Heading, number, style if it is large, priority: higher ones are left out first in narrow terminals, 0 never.
    columns: list[tuple[str, Number, str, int]] = [
        ("dead at\nthe start", NUMBERS["dead_at_start"], "", 0),
        (f"dead after\nepoch {before}", lambda run: sum(run.scans[before].dead), "", 5),
        (f"dead after\nepoch {after}", lambda run: sum(run.scans[after].dead), "", 3),
        ("dead at\nthe end", NUMBERS["dead_at_end"], _BAD, 0),
        ("died in\ntraining", NUMBERS["died_in_training"], "", 4),
        ("dormant at\nthe end", NUMBERS["dormant_at_end"], _WARN, 0),
    ]
    for label, heading, priority in (("silent", "silent at\nthe end", 3), ("cut_off", "cut\noff", 2)):
        if any(comparison.share(name, label) >= _FEW for name in comparison.networks):
            columns.append((heading, NUMBERS[f"{label}_at_end"], _WARN, priority))
    for left_out in (6, 5, 4, 3, 2):
        shown = [column for column in columns if column[3] < left_out]
        table = _main_table(comparison, shown, zeros=left_out == 6)
        if _width(table) <= width:
            break
    return table


def _main_table(comparison: Comparison, columns: list[tuple[str, Number, str, int]], *, zeros: bool) -> Table:
    seeds = len(comparison.seeds)
    over = f"mean ± deviation over {seeds} seeds" if seeds > 1 else "one seed"
    sizes = {network.neurons for network in comparison.networks.values()}
    of = f"Of {sizes.pop()} neurons" if len(sizes) == 1 else "Neurons"
    table = _table(f"{of}, over all training images; {over}")
    table.add_column("activation", overflow="fold")
    if sizes:
        table.add_column("neurons", justify="right")
    for heading in [*(column[0] for column in columns), *(["zero\noutputs"] if zeros else []), "test\naccuracy"]:
        table.add_column(heading, justify="right", overflow="fold")
    for name, network in comparison.networks.items():
        cells = [Text(str(network.neurons))] if sizes else []
        for _, number_of, style, _ in columns:
            spread = Spread.of(number_of(run) for run in comparison.of(name))
            cells.append(_count(spread, style, network.neurons))
        if zeros:
            cells.append(Text(f"{100 * comparison.spread(name, 'zero_outputs_at_end').mean:.1f}%"))
        table.add_row(Text(network.label, style="bold"), *cells, f"{number(comparison.accuracy(name))}%")
    return table


def layer_table(comparison: Comparison, width: int) -> Table:
    """Return a table of the dead and dormant neurons in each layer at the end, in percent, by variants that have some.

    Args:
        comparison: All runs.
        width: Width of the terminal in characters; narrow terminals get dead neurons only.
    """
    table = _layer_table(comparison, dormant=True)
    return table if _width(table) <= width else _layer_table(comparison, dormant=False)


def _layer_table(comparison: Comparison, *, dormant: bool) -> Table:
    layers = len(comparison.runs[0].end.dead)
    table = _table(f"By layer at the end, % of its neurons: dead{' + dormant' if dormant else ''}")
    table.add_column("activation", overflow="fold")
    for layer in range(1, layers + 1):
        table.add_column(f"layer {layer}", justify="right", overflow="fold")
    none = []
    for name, network in comparison.networks.items():
        size = network.neurons / layers
        dead = comparison.by_layer(name, "dead")
        dormant_counts = comparison.by_layer(name, "dormant")
        if not any([*dead, *dormant_counts]):
            none.append(network.label)
            continue
        cells = []
        for layer in range(layers):
            cell = _share(dead[layer] / size, _BAD)
            if dormant:
                cell.append(" + ", style=_NONE).append(_share(dormant_counts[layer] / size, _WARN))
            cells.append(cell)
        table.add_row(Text(network.label, style="bold"), *cells)
    if none:
        table.caption = f"None in any layer: {', '.join(none)}."
    return table


def _width(table: Table) -> int:
    """Return the width of a table in characters if space is unlimited."""
    console = Console(width=500, file=io.StringIO())
    return Measurement.get(console, console.options, table).maximum


def _table(title: str) -> Table:
    return Table(
        title=title,
        title_justify="left",
        title_style="bold",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )


def _count(spread: Spread, style: str, neurons: int) -> Text:
    if spread.most == 0:
        return Text("0", style=_NONE)
    return Text(number(spread), style=style if spread.mean >= _MANY * neurons else "")


def _share(share: float, style: str) -> Text:
    """Return a fraction in percent, four characters wide, without the sign."""
    shown = "0" if share == 0 else f"{100 * share:.1f}"
    return Text(f"{shown:>4}", style=style if share >= _MANY else "" if share else _NONE)
