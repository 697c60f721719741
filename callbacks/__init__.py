"""Callbacks that watch a training: for Lightning, for Hugging Face, and the base for any other trainer.

Every name is imported on first use: importing this package loads neither torch nor a training framework. The callback
for Hugging Face has a module of its own, :mod:`neuronscope.callbacks.transformers`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from neuronscope.callbacks.lightning import DeadNeuronMonitor
    from neuronscope.callbacks.logs import Log, SummaryWriterLog
    from neuronscope.callbacks.monitor import Monitor
    from neuronscope.callbacks.publishing import summary, totals

__all__ = ["DeadNeuronMonitor", "Log", "Monitor", "SummaryWriterLog", "summary", "totals"]

_MODULES = {
    "DeadNeuronMonitor": "lightning",
    "Log": "logs",
    "Monitor": "monitor",
    "SummaryWriterLog": "logs",
    "summary": "publishing",
    "totals": "publishing",
}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
