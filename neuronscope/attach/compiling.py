"""Our functions are traced as part of a model's graph, and never as graphs of their own.

``torch.compile(model)`` runs the hooks of the model itself outside of the graph, and tries to compile them too, each
function a graph: to no use, at the cost of guards, and with torch's warnings about the tensors that a hook is given.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from types import FunctionType, ModuleType

__all__ = ["skip_frames"]


def skip_frames(modules: Iterable[ModuleType]) -> None:
    """Tell the compiler to run the functions of these modules as they are, where no graph is being traced."""
    from torch._dynamo.eval_frame import skip_code

    for module in modules:
        for function in _functions(module):
            skip_code(function.__code__)


def _functions(module: ModuleType) -> Iterator[FunctionType]:
    for value in vars(module).values():
        if getattr(value, "__module__", None) != module.__name__:
            continue
        members = vars(value).values() if isinstance(value, type) else (value,)
        for member in members:
            function = member.fget if isinstance(member, property) else getattr(member, "__func__", member)
            if isinstance(function, FunctionType):
                yield function
