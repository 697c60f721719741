"""Write a comparison of two reports as text for a terminal."""

from __future__ import annotations

from types import SimpleNamespace

from neuronscope.arrays import IntArray
from neuronscope.report.comparison import LayerComparison, ReportComparison
from neuronscope.writers import wording
from neuronscope.writers.console import Column, Page
from neuronscope.writers.formatting import NONE, count, plural, visible, when

__all__ = ["render"]

COLUMNS = (
    Column("neurons", "neurons", narrowest=70),
    Column("dead\nbefore", "before"),
    Column("died", "died"),
    Column("revived", "revived"),
    Column("not\nfinite", "broken", optional=True),
    Column("dead\nafter", "after"),
    Column("died when", "when", right=False, narrowest=90, wraps=True, optional=True),
    Column("which died", "which", right=False, narrowest=80, wraps=True, optional=True),
)
#: Most neurons that a row names.
NAMED = 6


def render(found: ReportComparison, top: int = 20) -> str:
    """Write a comparison, as wide as the terminal, or 120 columns without colour codes outside of one.

    Args:
        found: The comparison.
        top: Most layers that get a row: of more, those in which most died.
    """
    page = Page()
    page.line("Neuronscope diff", "bold")
    for place, report in (("before", found.before), ("after", found.after)):
        basis = f"{place + ':':7} {wording.title(report)} · {plural(report.dead, 'dead neuron')}"
        page.line(f"{basis}{' · provisional' if report.provisional else ''}", "yellow" if report.provisional else "")
    page.line()
    broken = sum(layer.broken for layer in found.layers)
    if broken:
        page.alarm(f"NOT FINITE: {plural(broken, 'neuron')} more give NaN or infinity.")
    page.line(f"{plural(found.died, 'neuron')} died between the two, {count(found.revived)} revived.")
    changed = [layer for layer in found.layers if layer.changed]
    if changed:
        order = sorted(changed, key=lambda layer: (layer.broken, layer.died.size / layer.neurons), reverse=True)
        shown = {layer.name for layer in order[:top]}
        left_out = [f"… {plural(len(order) - top, 'more layer')} with changes"] if len(order) > top else []
        same = len(found.layers) - len(changed)
        left_out += [f"… {plural(same, 'more layer')} without a change"] if same else []
        page.table(COLUMNS, [_row(layer) for layer in changed if layer.name in shown], left_out)
    if any(not layer.in_headlines for layer in changed):
        page.line("* not in the totals", "dim")
    page.list("Not compared", [f"{name}: {reason}" for name, reason in found.left_out])
    return page.text()


def _row(layer: LayerComparison) -> SimpleNamespace:
    return SimpleNamespace(
        name=f"{visible(layer.name)}{'' if layer.in_headlines else ' *'}",
        neurons=count(layer.neurons),
        before=_number(layer.dead_before),
        died=_number(layer.died.size),
        revived=_number(layer.revived.size),
        broken=_number(layer.broken),
        after=_number(layer.dead_after),
        when=when(layer.died_step) or NONE,
        which=_named(layer.died) or NONE,
        tone="alarm" if layer.broken else "bad" if layer.died.size else "calm",
    )


def _number(value: int) -> str:
    return count(value) if value else NONE


def _named(neurons: IntArray) -> str:
    more = " …" if neurons.size > NAMED else ""
    return ", ".join(str(neuron) for neuron in neurons[:NAMED].tolist()) + more
