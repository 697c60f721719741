"""Everything that the other modules need to know about ``torch.compile``.

``torch.compile`` traces our hooks and our function mode as part of the graph of the model. No other module asks torch
whether it is being traced, or what was compiled: each imports the answer from here.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import itertools
import operator
import os
import sys
import weakref
from collections import ChainMap, Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from pathlib import Path
from types import CodeType, FunctionType, ModuleType
from typing import Any, NamedTuple, ParamSpec, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch._C._dynamo.eval_frame import reset_code, set_eval_frame
from torch._dynamo import OptimizedModule, variables
from torch._dynamo.comptime import ComptimeContext, comptime
from torch._dynamo.eval_frame import skip_code
from torch._dynamo.side_effects import SideEffects
from torch._dynamo.symbolic_convert import tls as tracing_thread
from torch._dynamo.variables import UserFunctionVariable
from torch._ops import HigherOrderOperator
from torch.autograd.function import BackwardCFunction
from torch.utils._python_dispatch import _disable_current_modes, _get_current_dispatch_mode_stack

from neuronscope.attach.tensor_map import TensorMap, nested_tensors
from neuronscope.count.compiled_graphs import alias_in_graph, graph_thread, handled_as, random_states_unchecked

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")

__all__ = [
    "GraphListener",
    "GraphRuns",
    "ModelWatch",
    "OptimizedModule",
    "TracedEnd",
    "ask_modes_about",
    "at_graph_end",
    "call_traced",
    "code_of_forward",
    "compiles_here",
    "comptime",
    "count_compilations",
    "enters_graph",
    "forget_watch",
    "guards_hooks",
    "has_real_tensors",
    "hidden",
    "in_autograd_function",
    "in_backward",
    "in_body",
    "in_compiled_graph",
    "in_operator",
    "is_compiled",
    "is_in_graph",
    "is_quantized_in_graph",
    "is_recorded",
    "is_tracing",
    "operator_around",
    "original_code",
    "refuse_earlier_graphs",
    "seen_by_modes",
    "set_integer",
    "set_variable",
    "skip_frames",
    "skip_when_hooked",
    "stop_asking_modes_about",
    "stop_skipping",
    "trace_attempt",
    "traced_call",
    "traced_in_body",
    "traced_modules",
    "unwatched",
    "while_tracing",
    "write_call",
]

#: Whether ``torch.compile`` is tracing the code that asks. It is torch's own function under another name, because the
#: compiler replaces a call of it by a constant, and because eager mode asks it several times for each tensor.
is_tracing = torch.compiler.is_compiling


# Under names that are quick to find.
_count_dispatch_modes, _count_function_modes = torch._C._len_torch_dispatch_stack, torch._C._len_torch_function_stack


def seen_by_modes() -> bool:
    """Whether a mode would see our own arithmetic, in eager mode; of plain tensors nothing else would."""
    return bool(_count_function_modes() or _count_dispatch_modes())


def unwatched(traced: bool | None = None) -> Any:
    """Return a context that hides our own arithmetic from modes and subclasses of users. It does nothing while traced.

    Modes that torch itself keeps while it traces, and no user enters, go on seeing what is done.

    Args:
        traced: What :func:`is_tracing` says, if the caller has asked.
    """
    if is_tracing() if traced is None else traced:
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


def trace_attempt() -> tuple[Any, int]:
    """Return which frame is being compiled, and which attempt this is: the compiler may begin a frame again."""
    context = torch._guards.CompileContext.try_get()
    return (None, 0) if context is None else (context.compile_id, context.attempt)


def in_backward(traced: bool | None = None) -> bool:
    """Whether a backward pass is running: activation checkpointing runs the forward again inside it.

    Args:
        traced: What :func:`is_tracing` says, if the caller has asked.
    """
    return not (is_tracing() if traced is None else traced) and torch._C._current_graph_task_id() != -1


_APPLY = inspect.unwrap(torch.autograd.Function.apply).__func__.__code__


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def in_autograd_function() -> bool:
    """Whether the ``forward`` of an ``autograd.Function`` runs, such as the first run of reentrant checkpointing.

    Torch turns gradients off in it, and they arrive nevertheless. A graph that is traced is for one of the two.
    """
    frame = sys._getframe(1).f_back
    while frame is not None:
        code = frame.f_code
        if code is _APPLY:  # the `forward` of a function with a `setup_context` has no context
            return True
        named = code.co_name == "forward" and code.co_argcount > 0 and code.co_varnames[0] != "self"
        if named and isinstance(frame.f_locals.get(code.co_varnames[0]), BackwardCFunction):
            return True
        frame = frame.f_back
    return False


def has_real_tensors(traced: bool | None = None) -> bool:
    """Whether tensors hold numbers, or will when the graph runs: not while a graph is recorded for export.

    Args:
        traced: What :func:`is_tracing` says, if the caller has asked.
    """
    if is_tracing() if traced is None else traced:
        return not torch.compiler.is_exporting()
    return torch._C._get_tracing_state() is None and not (_count_dispatch_modes() and is_recorded())


def is_recorded() -> bool:
    """Whether a graph is recorded of what is done to tensors, as ``make_fx`` and ``torch.func.linearize`` do."""
    return torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY) is not None


def in_compiled_graph() -> bool:
    """Whether this thread runs a graph of which a :class:`GraphListener` was told when it was traced.

    A back end may run the functions of a graph one by one in Python, and Inductor runs some of them so. The counting
    calls that are part of the graph count what these functions compute.
    """
    return graph_thread.in_graph


def is_compiled(module: nn.Module) -> bool:
    """Whether ``torch.compile`` was asked to compile this module; it may not have done so yet."""
    return module._compiled_call_impl is not None or isinstance(module, OptimizedModule)


def compiles_here() -> bool:
    """Whether ``torch.compile`` compiles what this thread calls now, or runs what it has compiled before."""
    compiler = set_eval_frame(None)
    set_eval_frame(compiler)
    return compiler is not None


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
    for module in modules:
        codes = [inspect.unwrap(function).__code__ for function in _functions(module)]
        while codes:
            code = codes.pop()
            skip_code(code)
            codes.extend(part for part in code.co_consts if isinstance(part, CodeType))  # functions in it, generators


_skipped: Counter[CodeType] = Counter()  # how many modules with hooks of ours run each


def skip_when_hooked(module: nn.Module) -> CodeType | None:
    """Let ``torch.compile`` treat a module of torch's own as if it had no hooks, until :func:`stop_skipping`.

    If eager code calls such a module behind a graph break, torch runs it as it is, but compiles it if it has a hook. A
    compiled one draws other random numbers, and one that works in place may fail in its backward pass.

    Args:
        module: A module that gets hooks.

    Returns:
        For :func:`stop_skipping`; ``None`` if it is no module of torch's own.
    """
    code = code_of_forward(module)
    if code is None or not type(module).__module__.startswith(("torch.nn.", "torch.ao.")):
        return None
    _skipped[code] += 1
    skip_code(code)
    return code


def stop_skipping(codes: Iterable[CodeType]) -> None:
    """Undo what :func:`skip_when_hooked` did.

    Args:
        codes: What it returned, once for each call.
    """
    for code in codes:
        _skipped[code] -= 1
        if not _skipped[code]:
            del _skipped[code]
            reset_code(code)


def ask_modes_about(functions: Iterable[Callable[..., Any]]) -> None:
    """Tell the compiler to ask function modes about these functions, as eager code does about all of torch's functions.

    The compiler asks about those alone that torch's protocol for subclasses lists, which leaves out ``torch.relu_`` and
    ``F.hardswish``, among others. It writes them into the graph without a word to any mode.
    """
    from torch._dynamo.variables.torch import get_overridable_functions

    get_overridable_functions().update(functions)


def stop_asking_modes_about(functions: Iterable[Callable[..., Any]]) -> None:
    """Undo what :func:`ask_modes_about` did.

    Args:
        functions: Functions that torch's own list does not hold.
    """
    from torch._dynamo.variables.torch import get_overridable_functions

    get_overridable_functions().difference_update(functions)


def guards_hooks() -> bool:
    """Whether the compiler is set to look at the hooks of a module again each time that a graph is about to run."""
    return not torch._dynamo.config.skip_nnmodule_hook_guards


def _functions(module: ModuleType) -> Iterator[FunctionType]:
    for value in vars(module).values():
        if getattr(value, "__module__", None) != module.__name__:
            continue
        members = vars(value).values() if isinstance(value, type) else (value,)
        for member in members:
            function = member.fget if isinstance(member, property) else getattr(member, "__func__", member)
            if isinstance(function, FunctionType):
                yield function


class GraphListener(Protocol):
    """Is told where the graphs begin and end that ``torch.compile`` traces.

    Attributes:
        trace_error: An error of its own that must wait until nothing is traced any more.
    """

    trace_error: Exception | None

    def begin_graph(self, code: CodeType, owner: Any, given: Iterable[Tensor]) -> Hashable:
        """Note that a graph begins to be traced, and return for what of ours it is made, so that others need another.

        Args:
            code: The function that is traced, or what torch made of the rest of one behind a break.
            owner: The ``self`` of that function; ``None`` if it has none, or does not need it any more.
            given: The tensors among the arguments and variables of that function.
        """

    def end_graph(self, end: TracedEnd | None) -> GraphRuns | None:
        """Note that a graph was traced, and return what is to be done around each of its runs, if anything is.

        Args:
            end: What was traced; ``None`` if there is no graph, because the compiler dropped it and begins again, or
                because nothing is called in it.
        """


class GraphRuns(Protocol):
    """Is told of each run of a graph.

    Attributes:
        guarded: Whether the graph may run only for inputs that it serves.
    """

    guarded: bool

    def serves(self, inputs: Sequence[Tensor]) -> bool:
        """Whether the graph may run for inputs.

        Args:
            inputs: The tensors among them.
        """

    def begin(self, inputs: Sequence[Any]) -> Callable[[Sequence[Any] | None], None] | None:
        """Note that the graph is about to run.

        Args:
            inputs: What it is given.

        Returns:
            What is to be called with its outputs when it has run, if anything is, or with ``None`` if it raised.
        """


class TracedEnd(NamedTuple):
    """What was traced.

    Attributes:
        ends: Whether the function ends with the graph; otherwise code of it follows that is not compiled.
        inputs: What the graph is given: the tensors, with ``None`` for numbers.
        outputs: What it returns: fake tensors, with ``None`` for numbers.
        used: Of each of these, whether the graph itself uses it, so that its gradient outside is a part of it.
    """

    ends: bool
    inputs: tuple[Tensor | None, ...]
    outputs: tuple[Tensor | None, ...]
    used: tuple[bool, ...]


class _GraphEnd(NamedTuple):
    """What the compiler calls when it has traced a graph."""

    graph: Any
    listener: GraphListener

    def __call__(self) -> None:
        root, reason = self.graph.root_tx, getattr(self.graph, "compile_subgraph_reason", None)
        try:
            with torch._C.DisableTorchFunction(), _tracing(root):
                # Of a graph without calls the compiler has forgotten the code by now.
                if reason is None or root is None:
                    self.listener.end_graph(None)
                else:
                    _end_graph(self.graph, self.listener, ends=not reason.graph_break)
        except Exception as error:
            self.listener.trace_error = error
        finally:
            _nodes.clear()  # a node holds its tensor
            _variables.clear()


def _end_graph(output: Any, listener: GraphListener, *, ends: bool) -> None:
    """Tell the listener what was traced, and have it told of the runs of the graph."""
    nodes = [node for node in output.graph.nodes if node.op == "placeholder"]
    last = next(node for node in output.graph.nodes if node.op == "output")
    (returned,) = last.args
    inputs, outputs = (
        tuple([found if isinstance(found := _tensor_of(node), Tensor) else None for node in each])
        for each in (nodes, returned)
    )
    used = tuple([any(user is not last and not _is_count(user) for user in node.users) for node in returned])
    for node in [*output.graph.nodes]:
        _give_aliases(node, output.nn_modules)
    runs = listener.end_graph(TracedEnd(ends, inputs, outputs, used))
    if runs is not None and runs.guarded:
        sources = [node.meta["grapharg"].source for node, each in zip(nodes, inputs, strict=True) if each is not None]
        _guard_inputs(runs, [_expression(source) for source in sources], listener)
    output.compiler_fn = _told_of_runs(output.compiler_fn, runs, listener)


def _is_count(node: Any) -> bool:
    """Whether a node of a graph is a call that counts."""
    return getattr(node.target, "__module__", "").startswith(f"{_OWN}.") or node.target in ("detach", torch.detach)


def _give_aliases(node: Any, modules: dict[str, Any]) -> None:
    """Give an operator of activation checkpointing aliases of our tensors; the node may be any other, too.

    A back end that runs the operator as it is saves what the operator is given for the backward pass, and torch raises
    there if that has changed: it does not see that an alias changes.

    Args:
        node: A node of the graph that was traced.
        modules: The functions that operators are given, by their names.
    """
    if node.op != "call_function" or _CHECKPOINT not in str(node.target):
        return
    args = [*node.args]
    for place, arg in enumerate(args):
        value = getattr(arg, "meta", {}).get("example_value")
        ours = isinstance(value, Tensor) and (arg.op == "get_attr" or not value.is_floating_point())
        if place and ours and _is_counted_with(node, place, modules):
            with node.graph.inserting_before(node):
                args[place] = node.graph.call_function(alias_in_graph, (arg,))
            args[place].meta.update(arg.meta)
    node.args = tuple(args)


def _is_counted_with(node: Any, place: int, modules: dict[str, Any]) -> bool:
    """Whether the function that an operator is given only counts with one of its other arguments."""
    body = modules[node.args[0].target].graph
    inner = [each for each in body.nodes if each.op == "placeholder"][place - 1]
    return all(
        _is_count(user) or (_CHECKPOINT in str(user.target) and _is_counted_with(user, user.args.index(inner), modules))
        for user in inner.users
    )


def _expression(source: Any) -> str:
    """Return the expression that gives an input of a graph, of variables ``L`` and ``G`` of the traced function."""
    name: str | Callable[[], str] = source.name
    return name() if callable(name) else name


def _guard_inputs(runs: GraphRuns, expressions: Sequence[str], listener: GraphListener) -> None:
    """Let the graph that is traced run only for inputs that it serves.

    Args:
        runs: The graph.
        expressions: What gives its inputs.
        listener: Is told of an error of our own.
    """
    from torch._dynamo import guards
    from torch._dynamo.guards import install_guard
    from torch._dynamo.source import GlobalStateSource

    code = compile(f"({''.join(f'{each}, ' for each in expressions)})", "<inputs of a graph>", "eval")
    known: dict[str, Any] = getattr(guards, "CLOSURE_VARS", None) or guards._get_closure_vars()  # in older torch

    def guard_inputs(builder: Any, _: Any) -> None:
        names = {**known, "G": builder.scope["G"]}

        def is_served(local: Any) -> bool:
            try:
                with torch._C.DisableTorchFunction():
                    return runs.serves(eval(code, names, {"L": local}))  # noqa: S307, the compiler's own expressions
            except Exception as error:
                listener.trace_error = error
                return False

        builder.guard_manager.root.add_epilogue_lambda_guard(is_served, [_OWN], *_no_stack())

    install_guard(GlobalStateSource().make_guard(guard_inputs))


def _no_stack() -> tuple[None, ...]:
    """Return the last arguments of torch's methods that add guards: newer ones take the stack of the user, too."""
    from torch._C._dynamo.guards import RootGuardManager

    return (None,) if "arg2" in str(RootGuardManager.add_epilogue_lambda_guard.__doc__) else ()


def _told_of_runs(backend: Callable[..., Any], runs: GraphRuns | None, listener: GraphListener) -> Callable[..., Any]:
    """Return a back end that tells of the runs of the graph that it compiles.

    Args:
        backend: What compiles it.
        runs: Is told, besides :func:`in_compiled_graph`.
        listener: Is told of an error of our own.
    """

    @functools.wraps(backend)
    def compile_graph(*args: Any, **kwargs: Any) -> Any:
        with random_states_unchecked():
            compiled = backend(*args, **kwargs)

        def run(*inputs: Any) -> Any:
            end = None
            try:
                if runs is not None:
                    end = runs.begin(inputs)
            except Exception as error:
                listener.trace_error = error
            outputs, outside = None, graph_thread.in_graph
            try:
                graph_thread.in_graph = True
                outputs = compiled(*inputs)
            finally:
                graph_thread.in_graph = outside
                try:
                    if end is not None:
                        end(outputs)
                except Exception as error:
                    listener.trace_error = error
            return outputs

        return run

    return compile_graph


class ModelWatch(Protocol):
    """A watch of a model.

    Attributes:
        observing: Whether it counts what runs now.
    """

    observing: bool

    def shares_modules(self, module: nn.Module) -> bool:
        """Whether a module, or one inside it, belongs to the model."""


_watch_numbers = itertools.count()
_watches: weakref.WeakKeyDictionary[ModelWatch, int] = weakref.WeakKeyDictionary()
_earlier_graphs: weakref.WeakSet[Any] = weakref.WeakSet()  # their guards


def refuse_earlier_graphs(watch: ModelWatch) -> None:
    """Let no graph that was traced before a watch began run for the model while the watch counts.

    Such a graph does not count, or only for an earlier watch, and the compiler does not ask whether hooks were added
    since it was traced. So it gets one more guard. The compiler then traces another graph, and runs the earlier one
    again where the watch does not count.

    Args:
        watch: A watch that begins.
    """
    convert = sys.modules.get("torch._dynamo.convert_frame")
    if convert is None:
        return
    number = _watches[watch] = next(_watch_numbers)
    for reference in [*convert.input_codes.seen]:
        code = reference()
        for entry in () if code is None else torch._C._dynamo.eval_frame._debug_get_cache_entry_list(code):
            guards = entry.guard_manager
            if guards not in _earlier_graphs:
                _earlier_graphs.add(guards)
                _refuse_for_later_watches(guards, number)


def forget_watch(watch: ModelWatch) -> None:
    """Let all graphs that were traced before a watch run again, since it ended; does nothing if that was done."""
    _watches.pop(watch, None)


def _refuse_for_later_watches(guards: Any, number: int) -> None:
    """Add a guard to a graph: it does not run for the model of a watch with this number, or a higher one, that counts.

    Args:
        guards: The guards of the graph.
        number: The number of the first watch that began after the graph was traced.
    """
    sources = [compile(source, "<a module of a graph>", "eval") for source in _sources_of_modules(guards.root)]
    if not sources:
        return
    graph = weakref.ref(guards)  # a guard that held it would keep all that the graph holds

    def may_run(local: Any) -> bool:
        watches = [watch for watch, begun in [*_watches.items()] if begun >= number and watch.observing]
        held = graph() if watches else None
        if held is None:
            return True
        names = ChainMap({"L": local}, held.closure_vars or {})
        modules = [eval(source, held.global_scope or {}, names) for source in sources]  # noqa: S307, the compiler's own
        return not any(watch.shares_modules(module) for watch in watches for module in modules)

    def guard(local: Any) -> bool:
        try:
            with torch._C.DisableTorchFunction():
                return may_run(local)
        except Exception:
            return True

    guards.root.add_epilogue_lambda_guard(guard, [_OWN], *_no_stack())


def _sources_of_modules(manager: Any) -> Iterator[str]:
    """Yield the expressions that give the outermost modules that a graph was traced for, by its tree of guards."""
    kind = manager.get_type_of_guarded_value() if hasattr(manager, "get_type_of_guarded_value") else None  # newer torch
    if isinstance(kind, type) and issubclass(kind, nn.Module):
        yield manager.get_source()
        return
    children = [*manager.get_child_managers()]
    for pair in getattr(manager, "get_key_value_managers", dict)().values():
        children += [each for each in pair if each is not None]
    for child in children:
        yield from _sources_of_modules(child)


def original_code(code: CodeType) -> CodeType:
    """Return the code of a function; of one that torch made of the rest of a function, the code of the whole."""
    from torch._dynamo.resume_execution import ContinueExecutionCache

    resumed: Any = ContinueExecutionCache.generated_code_metadata.get(code)
    original: CodeType = code if resumed is None else resumed.code
    return original


def code_of_forward(module: nn.Module) -> CodeType | None:
    """Return the code of the forward of a module; ``None`` if it is not written in Python, or scripted."""
    return getattr(getattr(type(module), "forward", None), "__code__", None)


def while_tracing(
    function: Callable[..., None], *names: str, listener: GraphListener | None = None
) -> Callable[[ComptimeContext], None]:
    """Return a function for ``comptime``: it runs while ``torch.compile`` traces the code that calls ``comptime``.

    The function is run instead of being traced, so that nothing of what it does is part of the graph. It receives local
    variables of the code. For a traced tensor it receives the fake tensor that stands for it, or the real one if the
    tensor is an input of the graph, such as a parameter. A function that is not traced must not call ``comptime``.

    Args:
        function: Receives the variables, in their order.
        names: Names of the variables.
        listener: Is told that the graph begins, if this is the first call in it, and when it ends.
    """

    def run(context: ComptimeContext) -> None:
        translator = context._ComptimeContext__tx  # type: ignore[attr-defined]
        with _running(translator, listener):
            function(*(_value(_variable(context.get_local(name))) for name in names))

    return run


@contextlib.contextmanager
def _running(translator: Any, listener: GraphListener | None) -> Iterator[None]:
    """While code of ours runs that is not traced. The listener is told if a graph begins."""
    with torch._C.DisableTorchFunction():
        if listener is not None and (end := _GraphEnd(translator.output, listener)) not in end.graph.cleanup_hooks:
            end.graph.add_cleanup_hook(end)
            root = end.graph.root_tx
            given = nested_tensors(root.f_locals)
            state = listener.begin_graph(root.f_code, root.f_locals.get("self"), given)
            if _leave_uncounted(root.f_code, state):
                listener.trace_error = RuntimeError(_CROWDED.format(root.f_code.co_qualname))
        with _tracing(translator):
            yield


class TracedMode(Protocol):
    """A function mode that ``torch.compile`` traces only where it may add something to the graph.

    Attributes:
        listener: See :func:`while_tracing`.
    """

    listener: GraphListener

    def may_count(self, func: Any) -> bool:
        """Whether ``trace`` must be traced for a call of this function."""

    def trace(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call a function, and add to the graph what there is to add; is traced.

        Args:
            func: The function.
            args: The positional arguments of its call.
            kwargs: The keyword arguments of its call.
        """

    def follow_traced(self, func: Any, args: Any, kwargs: Any, output: Any, *facts: Any) -> None:
        """Note a call of any other function; is not traced.

        Args:
            func: The function.
            args: The positional arguments of its call, with a fake tensor for each tensor.
            kwargs: The keyword arguments of its call.
            output: What it returned.
            facts: See :func:`call_traced`.
        """


def call_traced(
    mode: TracedMode,  # noqa: ARG001
    func: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *facts: Any,  # noqa: ARG001
) -> Any:
    """Call a function for a function mode, and let the mode follow the call, while ``torch.compile`` traces.

    The compiler runs :class:`_CallTraced` in its place: to trace the mode's code took longer than the call itself.

    Args:
        mode: The mode.
        func: The function.
        args: The positional arguments of its call.
        kwargs: The keyword arguments of its call.
        facts: What else ``follow_traced`` needs, so that the graph is for that; nothing if it is not to be called.
    """
    return func(*args, **kwargs)


class _CallTraced(UserFunctionVariable):
    """What the compiler has for :func:`call_traced`."""

    def call_function(self, tx: Any, args: Any, kwargs: Any) -> Any:
        """Do what :func:`call_traced` says, with the compiler's variables.

        Args:
            tx: The compiler's translator of the code that calls.
            args: The variables of the arguments of :func:`call_traced`.
            kwargs: Empty: no argument is given by name.
        """
        del kwargs
        mode, func, given, named, *facts = args
        function, watcher = _value(func), _value(mode)
        build = functools.partial(variables.VariableTracker.build, tx)
        if str(getattr(function, "__name__", "")).startswith(_QUANTIZE):
            vars(tx.output)[_QUANTIZED] = True
        if function is Tensor.unflatten:  # the compiler cannot trace the method under a function mode
            func = build(torch.unflatten)
        counts = not (in_compiled_graph() or _traces_backward(tx))  # a back end may compile what it was given again
        if counts and watcher.may_count(function):
            trace = build(getattr).call_function(tx, [mode, build("trace")], {})
            return trace.call_function(tx, [func, given, named], {})
        if isinstance(function, HigherOrderOperator) and hasattr(func, "_call_function"):
            state = tx.symbolic_torch_function_state
            state.push_torch_function_mode(mode)  # it sees what the functions call that the operator is given
            try:
                with _without_reuse():
                    output = func._call_function(tx, list(given.items), named.keys_as_python_constant())
            finally:
                state.pop_torch_function_mode()
            if _CHECKPOINT in str(function) and _MAY_CHANGE:
                return output  # what it is was noted in the checkpoint
        else:
            output = func.call_function(tx, list(given.items), named.keys_as_python_constant())
        if counts and facts:
            with _running(tx, watcher.listener):
                watcher.follow_traced(function, *map(_value, (given, named, output, *facts)))
        return output


handled_as(_CallTraced, call_traced)


def _traces_backward(translator: Any) -> bool:
    """Whether the backward of an ``autograd.Function`` is traced: it is inside its forward, which has been traced."""
    return any(each.graph.find_nodes(op="output") for each in translator.output.tracers)


@contextlib.contextmanager
def _without_reuse() -> Iterator[None]:
    """While an operator is traced that is given a function: trace the function anew for each call of the operator.

    For ``nested_compile_region`` the compiler would compare what the function read before, our mode's own attributes
    among it. It cannot find these while it traces, and raises. And what it does not trace shows no layers.
    """
    regions = sys.modules.get("torch._dynamo.variables.invoke_subgraph")
    names = ("build_reuse_condition", "save_reuse_entry")  # of torch 2.13 on
    before = {name: getattr(regions, name) for name in names if hasattr(regions, name)}
    try:
        for name in before:
            setattr(regions, name, _nothing)
        yield
    finally:
        for name, function in before.items():
            setattr(regions, name, function)


def _nothing(*_: Any, **__: Any) -> None:
    pass


#: Torch's name, old and new, for the question of whether traced code in a checkpoint may change what is outside of it.
_MAY_CHANGE = next(
    (
        name
        for name in ("should_allow_side_effects_in_hop", "should_allow_side_effects_under_checkpoint")
        if hasattr(SideEffects, name)
    ),
    "",
)
#: How the files of our own code begin; a folder of the user may bear our name.
_PACKAGE = f"{Path(__file__).parents[1]}{os.sep}"
_OPERATORS = variables.higher_order_ops.__file__


def _let_hooks_change(output: Any) -> None:
    """Let our hooks change what is ours in a checkpoint that is traced, until the graph ends.

    Torch refuses that to all code, because the checkpoint runs again, and would not do again what it does to objects
    outside of it. Our hooks must not. If torch refused, the graph would break, or torch raise if it must not break.

    Args:
        output: The graph that is traced.
    """
    original: Callable[[SideEffects], bool] = getattr(SideEffects, _MAY_CHANGE)
    if original is _may_change:
        return

    def undo() -> None:
        setattr(SideEffects, _MAY_CHANGE, _refused.pop())

    _refused.append(original)
    setattr(SideEffects, _MAY_CHANGE, _may_change)
    output.add_cleanup_hook(undo)


_refused: list[Callable[[SideEffects], bool]] = []  # torch's own question, while ours stands in its place


def _may_change(effects: SideEffects) -> bool:
    if _refused[-1](effects):
        return True
    graph = effects.output_graph_weakref()
    translator = None if graph is None else graph.current_tx
    while translator is not None and translator.f_code.co_filename == torch.overrides.__file__:  # enters our mode
        translator = getattr(translator, "parent", None)
    return translator is not None and translator.f_code.co_filename.startswith(_PACKAGE)


def _is_counted_in(tracer: Any, output: Any) -> bool:
    """Whether what runs in a checkpoint that is traced is counted; then our hooks may change what is ours.

    Not if a function of the user is asked about each operator in it, or if torch is too old.

    Args:
        tracer: Traces the checkpoint.
        output: The graph that is traced.
    """
    if _OWN not in vars(tracer):
        frame, selective = sys._getframe(), False
        while frame.f_back is not None and not selective:
            frame = frame.f_back
            selective = frame.f_code.co_filename == _OPERATORS and frame.f_locals.get("context_fn") is not None
        vars(tracer)[_OWN] = bool(_MAY_CHANGE) and not selective
    if vars(tracer)[_OWN]:
        _let_hooks_change(output)
        return True
    return False


class _GraphState:
    """Stands among the guards of a compiled graph for what of ours it was made for, so that torch does not count it.

    Torch makes at most ``recompile_limit`` graphs of a function, and then raises or runs it uncompiled. It counts those
    alone that were made for the same objects as the frame that it is about to compile, as far as these are alive. This
    is another object, of no frame.

    Args:
        state: What the graph was made for; ``None`` if nothing of ours is in it.
    """

    def __init__(self, state: Hashable) -> None:
        self.state = state
        self.counts = False

    def __call__(self) -> _GraphState | None:
        """Return this object if it is alive, as a weak reference does."""
        return None if self.counts else self


_OWN = "neuronscope"
_CROWDED = (
    "torch.compile is about to reach torch._dynamo.config.accumulated_recompile_limit, because each module that runs "
    "{} has graphs of its own while it is watched. Set the limit higher, or compile the whole model"
)


def _leave_uncounted(code: CodeType, state: Hashable) -> bool:
    """Let the graph that is traced, and those before it, not count towards torch's limit of recompilations.

    An unwatched function needs as many graphs as a watched one needs for one state of ours. So the graphs count, all of
    them, as soon as there are more than the limit for one state: one later than unwatched.

    Args:
        code: The function.
        state: What of ours the graph is made for.

    Returns:
        Whether the limit of all graphs of a function is so near that an unwatched run might soon have none left.
    """
    from torch._dynamo import config
    from torch._dynamo.guards import install_guard
    from torch._dynamo.source import GlobalStateSource

    entries: list[Any] = torch._C._dynamo.eval_frame._debug_get_cache_entry_list(code)
    made = [entry.guard_manager.id_matched_objs.setdefault(_OWN, _GraphState(None)) for entry in entries]
    made.append(_GraphState(state))
    most = max(Counter(graph.state for graph in made).values())
    for graph in made:
        graph.counts = most > config.recompile_limit

    def leave_uncounted(guards: Any, _: Any) -> None:
        guards.id_matched_objs[_OWN] = made[-1]

    install_guard(GlobalStateSource().make_guard(leave_uncounted))
    most = config.accumulated_recompile_limit
    return len(made) > max(most - 2 * config.recompile_limit, most // 2)  # `torch.cond` sets both as high as can be


_translators: list[Any] = []  # what traces the code that called `comptime`


def at_graph_end(function: Callable[[], None]) -> None:
    """Call a function when the graph that is traced ends, or is dropped.

    For a function that :func:`while_tracing` runs.

    Args:
        function: The function.
    """
    _translators[-1].output.add_cleanup_hook(function)


@contextlib.contextmanager
def _tracing(translator: Any) -> Iterator[None]:
    _translators.append(translator)
    try:
        yield
    finally:
        _translators.pop()


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


#: Parts of the names of operators that run their function once and are followed as if they were not there.
_ONCE = ("wrap", "autograd", "custom_function_call")
#: A part of the names of those that run it again in the backward pass, where nothing is counted again.
_CHECKPOINT = "checkpoint"


def operator_around() -> str:
    """Return the name of the operator around the traced function, such as ``torch.cond``; ``""`` outside of operators.

    It traces the function apart, and runs it any number of times.
    """
    translator = getattr(tracing_thread, "current_tx", None)  # `None` where `torch.export` runs the model
    output = None if translator is None else translator.output
    tracer = None if output is None else output.current_tracer
    while tracer is not None and tracer.parent is not None:
        name = getattr(tracer.source_target, "_name", None) or str(tracer.source_target)
        followed = any(part in name for part in _ONCE)
        if _CHECKPOINT in name:
            followed = _is_counted_in(tracer, output)
        if not followed:
            return name.rpartition(".")[2]
        tracer = tracer.parent
    return ""


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def in_operator() -> bool:
    """Whether code that is traced belongs to such an operator."""
    return bool(operator_around())


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def in_body() -> bool:
    """Whether code that is traced belongs to any operator that is given functions."""
    translator = getattr(tracing_thread, "current_tx", None)
    return translator is not None and translator.output.current_tracer.parent is not None


_nodes: TensorMap[Any] = TensorMap()  # of each fake tensor that was looked at: its node in the graph
_variables: TensorMap[Any] = TensorMap()  # likewise: the variable that was last seen to have it


def traced_call(tensor: Tensor) -> tuple[Any, tuple[Any, ...], dict[str, Any], Any] | None:
    """Return the call that gives a fake tensor in the graph, alone or among others; ``None`` if it is not known.

    The compiler writes some calls into the graph without a word to a function mode: attributes such as ``x.T``, the
    parts of ``a, b = x``, and what torch's own modules call.

    Args:
        tensor: A fake tensor that :func:`while_tracing` gave.

    Returns:
        The function, its positional and its keyword arguments and its result, with a fake tensor for each tensor.
    """
    node = _nodes.get(tensor)
    result: Any = tensor
    while node is not None and node.target is operator.getitem and isinstance(given := _tensor_of(node.args[0]), tuple):
        node, result = node.args[0], given
    if node is None or node.op not in ("call_function", "call_method"):
        return None
    if _CHECKPOINT in str(node.target) and isinstance(node.target, HigherOrderOperator):
        return None  # no function mode saw what runs in it
    args = torch.fx.map_arg(node.args, _tensor_of)
    kwargs = torch.fx.map_arg(node.kwargs, _tensor_of)
    function = node.target
    if node.op == "call_method":
        function = getattr(Tensor, function, None)
    elif function is getattr:
        function, args = getattr(getattr(Tensor, args[1], None), "__get__", None), args[:1]
    elif getattr(function, "__module__", "") == "_operator" and args and isinstance(args[0], Tensor):
        function = getattr(Tensor, f"__{function.__name__.strip('_')}__", None)  # operator.mul → Tensor.__mul__
    return None if function is None else (function, tuple(args), dict(kwargs), result)


def traced_in_body(tensor: Tensor) -> Tensor | None:
    """Return what the forward of an ``autograd.Function`` returned that gives a fake tensor; ``None`` if none does.

    Args:
        tensor: A fake tensor that :func:`while_tracing` gave.
    """
    node: Any = _nodes.get(tensor)
    if node is None or node.target is not operator.getitem:
        return None
    call, place = node.args
    if str(call.target) != "autograd_function_apply":
        return None
    body = _translators[-1].output.nn_modules[call.args[0].target]
    returned = body.graph.output_node().args[0][0]  # what follows is kept for the backward pass
    if not isinstance(returned, (tuple, list)):  # older torch: the only result
        return None
    found: Tensor | None = _tensor_of(returned[place])
    return found


def enters_graph(tensor: Tensor) -> bool:
    """Whether a tensor that :func:`while_tracing` gave is an input of the graph, so that other code may use it too."""
    node = _nodes.get(tensor)
    return node is not None and node.op == "placeholder"


def is_quantized_in_graph(tensor: Tensor) -> bool:
    """Whether the graph makes a fake tensor of a quantised one: fake tensors say themselves that they are not.

    Args:
        tensor: A tensor that :func:`while_tracing` gave.
    """
    if _QUANTIZED not in vars(_translators[-1].output):
        return False
    first: Any = _nodes.get(tensor)
    nodes, seen = [first] if first is not None else [], set()
    while nodes:
        node = nodes.pop()
        name = str(getattr(node.target, "__name__", node.target))
        if name.startswith(_QUANTIZE):
            return True
        if node not in seen and name != "dequantize":
            seen.add(node)
            nodes.extend(node.all_input_nodes)
    return False


_QUANTIZE = "quantize_per_"  # how the names of functions begin that quantise a tensor
_QUANTIZED = "neuronscope_quantized"  # an attribute of a graph in which one was called


def is_in_graph(tensor: Tensor) -> bool:
    """Whether a fake tensor stands for a value of the graph that is traced, and not for one of an earlier graph."""
    node = _nodes.get(tensor)
    return node is not None and _tracer_of(node) is not None


def write_call(function: Callable[..., Tensor], *args: Any) -> Tensor | None:
    """Write a call of a function into the graph that is traced. If nothing reads its result, the back end drops it.

    Args:
        function: A function of tensors and settings that returns a tensor.
        args: Its arguments, with a fake tensor for each tensor.

    Returns:
        The fake tensor of its result; ``None`` if an argument is no value of the graph.
    """
    from torch._dynamo.variables.builder import wrap_fx_proxy

    translator, written = _translators[-1], []
    for arg in args:
        proxy = _proxy_of(arg) if isinstance(arg, Tensor) else arg
        if proxy is None:
            return None
        written.append(proxy)
    variable = wrap_fx_proxy(translator, translator.output.create_proxy("call_function", function, tuple(written), {}))
    found: Tensor = _value(variable)
    return found


def set_variable(name: str, tensor: Tensor) -> None:
    """Give a local variable of the traced code that called ``comptime`` another value.

    Args:
        name: The variable, which the code has set before.
        tensor: What :func:`while_tracing` gave or :func:`write_call` returned.
    """
    _translators[-1].symbolic_locals[name] = _variables.get(tensor)


def set_integer(name: str, owner: str, attribute: str) -> None:
    """Give a local variable of the traced code the integer that an attribute was when the graph began to run.

    Torch treats it as an integer that the traced function was given: with ``dynamic=True`` the graph serves any. If the
    code read it through our function mode, torch would take it for a global constant, and compile for each value. The
    variable stays as it is if the traced code has set the attribute itself.

    Args:
        name: The variable, which the code has set before.
        owner: The local variable of the object that has the attribute.
        attribute: Its name.
    """
    from torch._dynamo.source import AttrSource
    from torch._dynamo.variables.builder import VariableBuilder

    translator = _translators[-1]
    held = translator.symbolic_locals[owner].realize()
    if translator.output.side_effects.has_pending_mutation_of_attr(held, attribute):
        return
    builder = VariableBuilder(translator, AttrSource(held.source, attribute))
    translator.symbolic_locals[name] = builder.wrap_symint(getattr(held.value, attribute))


def _proxy_of(tensor: Tensor) -> Any:
    """Return the value of the graph that a fake tensor stands for; ``None`` if it is none."""
    node: Any = _nodes.get(tensor)
    tracer = None if node is None else _tracer_of(node)
    return None if tracer is None else torch.fx.Proxy(node, tracer)


def _tracer_of(node: Any) -> Any:
    """Return what traces the graph of a node, which may be one around the innermost one; ``None`` if it was traced."""
    tracers = _translators[-1].output.tracers if _translators else ()
    return next((each for each in tracers if each.graph is node.graph), None)


def _outside(node: Any) -> Any:
    """Return the node that stands for a value where it was made, if it is given to the function of an operator."""
    while node.op == "placeholder":
        tracer = _tracer_of(node)
        lifted = {} if tracer is None or tracer.parent is None else tracer.lifted_freevars
        outer = next((each.node for each, inner in lifted.items() if inner.node is node), None)
        if outer is None:
            break
        node = outer
    return node


def _tensor_of(node: Any) -> Any:
    """Return the tensor that stands for a node, and note that it does."""
    node = _outside(node)
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
    if isinstance(variable, (variables.LazyVariableTracker,)):
        variable = variable.realize()
    if isinstance(variable, variables.TensorVariable):
        found = _tensor_of(variable.as_proxy().node)
        if isinstance(found, Tensor):
            _variables.put(found, variable)
        return found
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
