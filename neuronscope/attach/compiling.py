"""Everything that the other modules need to know about ``torch.compile``.

``torch.compile`` traces our hooks and our function mode as part of the graph of the model. No other module asks torch
whether it is being traced, or what was compiled: each imports the answer from here.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from types import FunctionType, ModuleType
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor, nn
from torch._dynamo import OptimizedModule
from torch._dynamo.comptime import ComptimeContext, comptime
from torch.utils._python_dispatch import _disable_current_modes, _get_current_dispatch_mode_stack

from neuronscope.attach.tensor_map import TensorMap

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")

__all__ = [
    "comptime",
    "count_compilations",
    "has_real_tensors",
    "hidden",
    "in_backward",
    "in_compiled_graph",
    "is_compiled",
    "is_tracing",
    "skip_frames",
    "thread_id",
    "trace_attempt",
    "traced_call",
    "traced_modules",
    "unwatched",
    "while_tracing",
]

#: Whether ``torch.compile`` is tracing the code that asks. It is torch's own function under another name, because the
#: compiler replaces a call of it by a constant, and because eager mode asks it several times for each tensor.
is_tracing = torch.compiler.is_compiling


_count_dispatch_modes = torch._C._len_torch_dispatch_stack  # under a name that is quick to find


def unwatched() -> Any:
    """Return a context that hides our own arithmetic from modes and subclasses of users. It does nothing while traced.

    Modes that torch itself keeps while it traces, and no user enters, go on seeing what is done.
    """
    if is_tracing():
        return contextlib.nullcontext()
    return _without_modes() if _count_dispatch_modes() else torch._C.DisableTorchFunction()


@contextlib.contextmanager
def _without_modes() -> Iterator[None]:
    torchs_own = any(mode.is_infra_mode() for mode in _get_current_dispatch_mode_stack())
    with torch._C.DisableTorchFunction(), contextlib.nullcontext() if torchs_own else _disable_current_modes():
        yield


def hidden(function: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
    """Return the function, hidden from modes and subclasses of users as by :func:`unwatched`."""

    @functools.wraps(function)
    def call(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
        with unwatched():
            return function(*args, **kwargs)

    return call


def thread_id() -> int:
    """Return the number of the running thread; 0 while traced, because the compiler cannot trace the question."""
    return 0 if is_tracing() else threading.get_ident()


def trace_attempt() -> tuple[Any, int]:
    """Return which frame is being compiled, and which attempt this is: the compiler may begin a frame again."""
    context = torch._guards.CompileContext.try_get()
    return (None, 0) if context is None else (context.compile_id, context.attempt)


def in_backward() -> bool:
    """Whether a backward pass is running: activation checkpointing runs the forward again inside it."""
    return not is_tracing() and torch._C._current_graph_task_id() != -1


def has_real_tensors() -> bool:
    """Whether tensors hold numbers, or will when the graph runs: not while a graph is recorded for export."""
    if is_tracing():
        return not torch.compiler.is_exporting()
    return torch._C._get_tracing_state() is None and not _is_recorded()


def _is_recorded() -> bool:
    """Whether a graph is recorded of what is done to tensors, as ``make_fx`` does."""
    return torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY) is not None


def in_compiled_graph() -> bool:
    """Whether the caller was called by a compiled graph: a debugging back end runs its functions one by one in Python.

    The counting calls that are part of the graph count what these functions compute.
    """
    if is_tracing():
        return False
    frame = sys._getframe(2)
    for _ in range(4):  # between the mode and the graph's code are the function and its dispatcher
        if frame.f_code.co_filename.startswith("<eval_with_key>"):
            return frame.f_back is not None and "_dynamo" in frame.f_back.f_code.co_filename
        if frame.f_back is None:
            return False
        frame = frame.f_back
    return False


def is_compiled(module: nn.Module) -> bool:
    """Whether ``torch.compile`` was asked to compile this module; it may not have done so yet."""
    return module._compiled_call_impl is not None or isinstance(module, OptimizedModule)


def count_compilations() -> tuple[int, int]:
    """Return how many frames and graphs ``torch.compile`` has traced in this process so far."""
    convert = sys.modules.get("torch._dynamo.convert_frame")
    utils = sys.modules.get("torch._dynamo.utils")
    if convert is None or utils is None:
        return 0, 0
    return convert.FRAME_COUNTER, utils.counters["stats"]["unique_graphs"]


def skip_frames(modules: Iterable[ModuleType]) -> None:
    """Tell the compiler to run the functions of these modules as they are when no graph is being traced.

    ``torch.compile(model)`` runs the hooks of the model itself outside of the graph. Without this it would compile each
    function that they call as a graph of its own. That gains nothing, costs guards, and makes torch warn about the
    tensors that a hook receives.
    """
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


def while_tracing(function: Callable[..., None], *names: str) -> Callable[[ComptimeContext], None]:
    """Return a function for ``comptime``: it runs while ``torch.compile`` traces the code that calls ``comptime``.

    The function is run instead of being traced, so that nothing of what it does is part of the graph. It receives local
    variables of the code. For a traced tensor it receives the fake tensor that stands for it, or the real one if the
    tensor is an input of the graph, such as a parameter. A function that is not traced must not call ``comptime``.

    Args:
        function: Receives the variables, in their order.
        names: Names of the variables.
    """

    def run(context: ComptimeContext) -> None:
        with torch._C.DisableTorchFunction():
            _translators.append(context._ComptimeContext__tx)  # type: ignore[attr-defined]
            try:
                function(*(_value(_variable(context.get_local(name))) for name in names))
            finally:
                _translators.pop()

    return run


_translators: list[Any] = []  # what traces the code that called `comptime`


def traced_modules() -> Iterator[nn.Module] | None:
    """Return the modules whose methods are being traced, the innermost first; ``None`` if nothing is traced.

    For a function that :func:`while_tracing` runs.
    """
    return _modules_of(_translators[-1]) if _translators else None


def _modules_of(translator: Any) -> Iterator[nn.Module]:
    while translator is not None:
        module = getattr(translator.symbolic_locals.get("self"), "value", None)
        if isinstance(module, nn.Module):
            yield module
        translator = getattr(translator, "parent", None)


_nodes: TensorMap[Any] = TensorMap()  # of each fake tensor that was looked at: its node in the graph


def traced_call(tensor: Tensor) -> tuple[Any, tuple[Any, ...], dict[str, Any]] | None:
    """Return the call that gives a fake tensor in the graph; ``None`` if it is not known.

    The compiler writes some calls into the graph without a word to a function mode: attributes such as ``x.T``, the
    parts of ``a, b = x``, and what torch's own modules call.

    Args:
        tensor: A fake tensor that :func:`while_tracing` gave.

    Returns:
        The function, its positional and its keyword arguments, with a fake tensor for each tensor.
    """
    node = _nodes.get(tensor)
    if node is None or node.op not in ("call_function", "call_method"):
        return None
    args = torch.fx.map_arg(node.args, _tensor_of)
    kwargs = torch.fx.map_arg(node.kwargs, _tensor_of)
    function = node.target
    if node.op == "call_method":
        function = getattr(Tensor, function, None)
    elif function is getattr:
        function, args = getattr(getattr(Tensor, args[1], None), "__get__", None), args[:1]
    elif getattr(function, "__module__", "") == "_operator" and args and isinstance(args[0], Tensor):
        function = getattr(Tensor, f"__{function.__name__.strip('_')}__", None)  # operator.mul → Tensor.__mul__
    return None if function is None else (function, tuple(args), dict(kwargs))


def _tensor_of(node: Any) -> Any:
    """Return the tensor that stands for a node, and note that it does."""
    argument = node.meta.get("grapharg")
    real = None if argument is None else argument.example
    found = real if isinstance(real, Tensor) else node.meta.get("example_value")
    if isinstance(found, Tensor):
        _nodes.put(found, node)
    return found


def _variable(local: Any) -> Any:
    return local._ComptimeVar__variable


def _value(variable: Any) -> Any:
    """Return the value of a variable of a function that is traced; of what has none here, its class."""
    from torch._dynamo import variables

    if isinstance(variable, (variables.LazyVariableTracker,)):
        variable = variable.realize()
    if isinstance(variable, variables.TensorVariable):
        return _tensor_of(variable.as_proxy().node)
    if isinstance(variable, variables.tensor.SymNodeVariable):
        return variable.sym_num
    if isinstance(variable, variables.ConstDictVariable):
        return {key.vt.as_python_constant(): _value(item) for key, item in variable.items.items()}
    if isinstance(variable, variables.SliceVariable):
        return slice(*(_value(item) for item in variable.items))
    if isinstance(variable, variables.BaseListVariable):
        return tuple(_value(item) for item in variable.items)
    if variable.is_python_constant():
        return variable.as_python_constant()
    return getattr(variable, "value", type(variable))
