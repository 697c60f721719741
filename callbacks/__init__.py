"""Training hooks, one framework a file, each thin over :class:`neuronscope.Scope`.

``DeadNeuronMonitor`` is bound lazily: importing this package loads no framework.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from neuronscope.callbacks.lightning import DeadNeuronMonitor

__all__ = ["DeadNeuronMonitor"]


def __getattr__(name: str) -> Any:
    if name == "DeadNeuronMonitor":
        from neuronscope.callbacks.lightning import DeadNeuronMonitor

        return DeadNeuronMonitor
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
