"""The tables of the comparison, for a terminal."""

from __future__ import annotations

from collections.abc import Callable

from rich import box
from rich.table import Table
from rich.text import Text

from neuronscope.demo.findings import number
from neuronscope.demo.results import Comparison, Run, Spread

__all__ = ["layer_table", "main_table"]

_BAD, _WARN, _NONE = "bold red", "yellow", "dim"
#: Share of the neurons from which on a number is coloured.
_MANY = 0.1

Number = Callable[[Run], float]


def main_table(comparison: Comparison, width: int) -> Table:
    """A row a variant: dead at four moments, dormant, cut off, accuracy; mean ± deviation over the seeds.

    Args:
        comparison: All runs.
        width: Of the terminal, in characters; a narrow one gets fewer columns.
    """
    before, after = comparison.around_spike
    seeds = len(comparison.seeds)
    over = f"mean ± deviation over {seeds} seeds" if seeds > 1 else "one seed"
    table = _table(f"Of {comparison.neurons} neurons, over all training images; {over}")
    # Heading, number, style where it is large, narrowest terminal that shows it.
    columns: list[tuple[str, Number, str, int]] = [
        ("dead at\nthe start", lambda run: sum(run.start.dead), "", 0),
        (f"dead after\nepoch {before}", lambda run: sum(run.scans[before].dead), "", 110),
        (f"dead after\nepoch {after}", lambda run: sum(run.scans[after].dead), "", 90),
        ("dead at\nthe end", lambda run: sum(run.end.dead), _BAD, 0),
        ("died in\ntraining", lambda run: run.died, "", 100),
        ("dormant at\nthe end", lambda run: sum(run.end.dormant), _WARN, 0),
        ("cut\noff", lambda run: sum(run.end.cut_off), _WARN, 0),
    ]
    anywhere = any(sum(run.end.cut_off) for run in comparison.runs)
    columns = [column for column in columns if width >= column[3] and (anywhere or column[0] != "cut\noff")]
    table.add_column("activation", no_wrap=True)
    for heading, *_ in columns:
        table.add_column(heading, justify="right", no_wrap=True)
    zeros = width >= 100
    if zeros:
        table.add_column("zero\noutputs", justify="right", no_wrap=True)
    table.add_column("test\naccuracy", justify="right", no_wrap=True)
    for name, label in comparison.labels.items():
        cells = [_count(comparison.spread(name, of), style, comparison.neurons) for _, of, style, _ in columns]
        if zeros:
            cells.append(Text(f"{100 * comparison.spread(name, lambda run: run.end.zero_outputs).mean:.1f}%"))
        accuracy = comparison.spread(name, lambda run: 100 * run.accuracy)
        table.add_row(Text(label, style="bold"), *cells, f"{number(accuracy)}%")
    return table


def layer_table(comparison: Comparison, width: int) -> Table:
    """A row a variant: share of dead and of dormant neurons in each layer at the end, means over the seeds.

    Args:
        comparison: All runs.
        width: Of the terminal, in characters; a narrow one gets the dead alone.
    """
    layers = len(comparison.runs[0].end.dead)
    both = width >= 96
    size = comparison.neurons / layers
    table = _table(f"By layer at the end, % of {size:.0f} neurons: dead{' + dormant' if both else ''}")
    table.add_column("activation", no_wrap=True)
    for layer in range(1, layers + 1):
        table.add_column(f"layer {layer}", justify="right", no_wrap=True)
    for name, label in comparison.labels.items():
        dead = comparison.by_layer(name, lambda run: run.end.dead)
        dormant = comparison.by_layer(name, lambda run: run.end.dormant)
        cells = []
        for ill, weak in zip(dead, dormant, strict=True):
            cell = _share(ill / size, _BAD)
            if both:
                cell.append(" + ", style=_NONE).append(_share(weak / size, _WARN))
            cells.append(cell)
        table.add_row(Text(label, style="bold"), *cells)
    return table


def _table(title: str) -> Table:
    return Table(
        title=title,
        title_justify="left",
        title_style="bold",
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
    """A share in percent, four characters wide, without the sign."""
    shown = "0" if share == 0 else f"{100 * share:.1f}"
    return Text(f"{shown:>4}", style=style if share >= _MANY else "" if share else _NONE)
