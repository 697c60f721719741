"""Return a post-mortem as columns of a table, for pandas."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from neuronscope.checkpoints.postmortem_report import PostmortemReport
from neuronscope.checkpoints.verdict.evidence import BASES
from neuronscope.checkpoints.verdict.layer_verdicts import LABELS, NO_BASIS
from neuronscope.judge.symptoms import UNDATED

__all__ = ["layer_columns", "neuron_columns"]


def layer_columns(report: PostmortemReport) -> dict[str, Sequence[Any]]:
    """Return one row for each layer: its counts, of which suspected and idle neurons are not among the dead."""
    layers = report.layers
    return {
        "layer": [layer.name for layer in layers],
        **{name: [getattr(layer, name) for layer in layers] for name in ("neurons", "dead", "suspected")},
        "idle": [int(layer.idle.sum()) for layer in layers],
        "contested": [int(layer.contested.sum()) for layer in layers],
        **{
            name.replace(" ", "_"): [layer.count(name) for layer in layers]
            for name in ("silent", "not finite", "unknown")
        },
        **{f"dead_{basis}": [layer.dead_by_basis()[basis] for layer in layers] for basis in BASES[:3]},
        "dead_percent": [layer.dead_percent for layer in layers],
        "collapse": [layer.collapse for layer in layers],
        "in_totals": [layer.in_headlines for layer in layers],
    }


def neuron_columns(report: PostmortemReport) -> dict[str, Sequence[Any]]:
    """Return one row for each neuron of each layer; ``since`` is −1 for the beginning and NaN where it is not known."""
    layers = report.layers
    return {
        "layer": [layer.name for layer in layers for _ in range(layer.neurons)],
        "neuron": [neuron for layer in layers for neuron in range(layer.neurons)],
        "label": [LABELS[code] for layer in layers for code in layer.labels],
        "basis": ["" if code == NO_BASIS else BASES[code] for layer in layers for code in layer.basis],
        "number": [number for layer in layers for number in layer.numbers],
        "since": [np.nan if step == UNDATED else step for layer in layers for step in layer.since],
        "contested": [contested for layer in layers for contested in layer.contested],
        "in_totals": [layer.in_headlines for layer in layers for _ in range(layer.neurons)],
    }
