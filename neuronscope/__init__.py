"""Neuronscope finds dead neurons in PyTorch networks: which, since when, how certain that is, why, and what to do.

Public names are imported when they are first used (PEP 562). ``import neuronscope`` itself does not load torch, so
TensorBoard and command lines that only read reports start quickly.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from neuronscope.act.revival import Revival, revive
    from neuronscope.act.rules import ContinualBackprop, Dead, GraMa, ReDo, Resampling, Rule, SelfNormalizedResets
    from neuronscope.act.shrink import Shrunk, shrink
    from neuronscope.attach.activations import Activation
    from neuronscope.checkpoints.postmortem_report import PostmortemReport
    from neuronscope.checkpoints.read_postmortem import read_postmortem
    from neuronscope.checkpoints.run import postmortem
    from neuronscope.errors import NeuronscopeError, NeuronscopeWarning
    from neuronscope.judge.verdicts import Policy, Verdict
    from neuronscope.linear.check import check_linear
    from neuronscope.linear.linear_report import LinearLayers, LinearReport
    from neuronscope.options import Shards
    from neuronscope.report.reading import read_report
    from neuronscope.report.report import Report
    from neuronscope.sampled_features import LayerRepresentation, Representation, representation
    from neuronscope.scanning import scan
    from neuronscope.scope import Scope, watch
    from neuronscope.tally.census import Census, Tally

__version__ = "0.1.0"

_MODULE_OF = {
    "Activation": "neuronscope.attach.activations",
    "Census": "neuronscope.tally.census",
    "ContinualBackprop": "neuronscope.act.rules",
    "Dead": "neuronscope.act.rules",
    "GraMa": "neuronscope.act.rules",
    "LayerRepresentation": "neuronscope.sampled_features",
    "LinearLayers": "neuronscope.linear.linear_report",
    "LinearReport": "neuronscope.linear.linear_report",
    "NeuronscopeError": "neuronscope.errors",
    "NeuronscopeWarning": "neuronscope.errors",
    "Policy": "neuronscope.judge.verdicts",
    "PostmortemReport": "neuronscope.checkpoints.postmortem_report",
    "ReDo": "neuronscope.act.rules",
    "Report": "neuronscope.report.report",
    "Representation": "neuronscope.sampled_features",
    "Resampling": "neuronscope.act.rules",
    "Revival": "neuronscope.act.revival",
    "Rule": "neuronscope.act.rules",
    "Scope": "neuronscope.scope",
    "Shards": "neuronscope.options",
    "SelfNormalizedResets": "neuronscope.act.rules",
    "Shrunk": "neuronscope.act.shrink",
    "Tally": "neuronscope.tally.census",
    "Verdict": "neuronscope.judge.verdicts",
    "check_linear": "neuronscope.linear.check",
    "postmortem": "neuronscope.checkpoints.run",
    "read_postmortem": "neuronscope.checkpoints.read_postmortem",
    "read_report": "neuronscope.report.reading",
    "representation": "neuronscope.sampled_features",
    "revive": "neuronscope.act.revival",
    "scan": "neuronscope.scanning",
    "shrink": "neuronscope.act.shrink",
    "watch": "neuronscope.scope",
}

__all__ = [
    "Activation",
    "Census",
    "ContinualBackprop",
    "Dead",
    "GraMa",
    "LayerRepresentation",
    "LinearLayers",
    "LinearReport",
    "NeuronscopeError",
    "NeuronscopeWarning",
    "Policy",
    "PostmortemReport",
    "ReDo",
    "Report",
    "Representation",
    "Resampling",
    "Revival",
    "Rule",
    "Scope",
    "SelfNormalizedResets",
    "Shards",
    "Shrunk",
    "Tally",
    "Verdict",
    "__version__",
    "check_linear",
    "postmortem",
    "read_postmortem",
    "read_report",
    "representation",
    "revive",
    "scan",
    "shrink",
    "watch",
]


def __getattr__(name: str) -> Any:
    if name in _MODULE_OF:
        value = getattr(importlib.import_module(_MODULE_OF[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
