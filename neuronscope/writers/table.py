"""Give a report as columns of a table, for pandas."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from neuronscope.judge.verdicts import LABELS, rate_bound
from neuronscope.report.report import Report, SiteReport

__all__ = ["layer_columns", "neuron_columns"]

_FIELDS = ("dead", "born_dead", "died", "silent", "dormant", "cut_off", "linear", "not_finite_neurons")
_ARRAYS = ("zero_output_fraction", "zero_gradient_fraction", "mean_abs_output", "last_active_step")
_HISTORY = ("died_step", "revived_step", "deaths", "revivals")


def layer_columns(report: Report) -> dict[str, Sequence[Any]]:
    """Return one row for each layer: its counts, and the bound of its verdicts; NaN where nothing was measured."""
    sites, level = report.layers, report.policy["confidence"]
    return {
        "layer": [site.name for site in sites],
        "activation": [site.activation for site in sites],
        "kind": [site.kind for site in sites],
        "neurons": [site.neurons for site in sites],
        "unseen": [site.unseen for site in sites],
        **{name: [_measured(site, name) for site in sites] for name in _FIELDS},
        "dead_percent": [site.dead_percent for site in sites],
        "positions": [site.positions for site in sites],
        "examples": [site.examples for site in sites],
        "bound": [
            rate_bound(site.examples, level) if site.examples and not site.is_unseen else np.nan for site in sites
        ],
        "in_totals": [site.in_headlines for site in sites],
    }


def neuron_columns(report: Report) -> dict[str, Sequence[Any]]:
    """Return one row for each neuron of each layer; steps are −1 for never."""
    sites = report.layers
    return {
        "layer": [site.name for site in sites for _ in range(site.neurons)],
        "neuron": [neuron for site in sites for neuron in range(site.neurons)],
        "label": [LABELS[code] for site in sites for code in site.judgement.labels()],
        **{name: _joined(sites, name) for name in _ARRAYS},
        **{name: _joined([site.history for site in sites], name) for name in _HISTORY},
        "in_totals": [site.in_headlines for site in sites for _ in range(site.neurons)],
    }


def _measured(site: SiteReport, name: str) -> float:
    """Return a count of a layer; NaN where it was not measured."""
    if site.is_unseen or (name in ("silent", "cut_off") and not site.gradient_positions):
        return np.nan
    number: int = getattr(site, name)
    return number


def _joined(parts: Sequence[Any], name: str) -> Sequence[Any]:
    return [value for part in parts for value in getattr(part, name).tolist()]
