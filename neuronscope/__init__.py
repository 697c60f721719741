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

_NAMES = {
    "act.revival": ("Revival", "revive"),
    "act.rules": ("ContinualBackprop", "Dead", "GraMa", "ReDo", "Resampling", "Rule", "SelfNormalizedResets"),
    "act.shrink": ("Shrunk", "shrink"),
    "attach.activations": ("Activation",),
    "checkpoints.postmortem_report": ("PostmortemReport",),
    "checkpoints.read_postmortem": ("read_postmortem",),
    "checkpoints.run": ("postmortem",),
    "errors": ("NeuronscopeError", "NeuronscopeWarning"),
    "judge.verdicts": ("Policy", "Verdict"),
    "linear.check": ("check_linear",),
    "linear.linear_report": ("LinearLayers", "LinearReport"),
    "options": ("Shards",),
    "report.reading": ("read_report",),
    "report.report": ("Report",),
    "sampled_features": ("LayerRepresentation", "Representation", "representation"),
    "scanning": ("scan",),
    "scope": ("Scope", "watch"),
    "tally.census": ("Census", "Tally"),
}
_MODULE_OF = {name: f"neuronscope.{module}" for module, names in _NAMES.items() for name in names}

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
