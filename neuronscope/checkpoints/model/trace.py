"""Tracing: one forward on an example, written down as a list of steps over numbered values.

Two watchers stand by while the model runs: the project's own
:class:`~neuronscope.attach.hooks.HookManager`, so that sites get exactly
the names that :func:`neuronscope.watch` gives them, and a function mode that writes down every torch function called.
No activation is kept: a tensor is a number in the graph, its shape and its type. What can be kept and looked at is what
does not depend on the input: parameters, buffers, and what was made of them alone.

A step that we do not see cannot lead to a false statement: a tensor whose maker was not seen, or that was changed
behind our back (its version says so), is a value of which nothing is known; and where the model looks at its numbers
in Python, so that another input might take another path, the graph says so in
:attr:`~neuronscope.checkpoints.model.traced_graph.Graph.branches`.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from neuronscope.attach.activations import Activation, Registry
from neuronscope.attach.compiling import unwatched
from neuronscope.attach.hooks import HookManager
from neuronscope.attach.module_paths import walk
from neuronscope.attach.recorder import Call, SiteRecorder
from neuronscope.attach.tensor_map import TensorMap
from neuronscope.checkpoints.data.user_code import told
from neuronscope.checkpoints.model.traced_graph import Graph, Ref, Site, Step, Value, references, substitute
from neuronscope.errors import NeuronscopeError, UsageError
from neuronscope.scanning import left_as_it_was
from neuronscope.sites import SiteInfo, SiteKey

__all__ = ["ForwardError", "trace"]


class ForwardError(NeuronscopeError):
    """A network failed on an example; the message is the first line of its own."""


def trace(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None = None) -> Graph:
    """Run a model once, in evaluation mode and without gradients, and write down what it does.

    The model is left as it was: training flags, gradients and buffers included.

    Args:
        model: The model, with real weights (not on the meta device).
        args: The example's positional arguments.
        kwargs: Its keyword arguments.

    Returns:
        The graph.

    Raises:
        ForwardError: The model failed on this example.
        UsageError: The model ended the program.

    >>> graph = trace(nn.Sequential(nn.Linear(3, 2), nn.ReLU()), (torch.randn(1, 3),))
    >>> [site.name for site in graph.sites], [step.function.__name__ for step in graph.steps]
    (['1'], ['linear', 'relu'])
    """
    kwargs = dict(kwargs or {})
    ledger = _Ledger(model)
    manager = _TracingHookManager(model, ledger)
    ledger.graph.inputs = tuple(ledger.number(tensor) for tensor in _Search().tensors((args, kwargs)))
    with left_as_it_was(model), torch.no_grad():
        model.eval()
        try:
            manager.recorder.set_phase("trace", 0)
            with _Recorder(ledger):
                manager.set_observing(True)
                chance = _chance()
                try:
                    output = model(*args, **kwargs)
                except Exception as error:
                    first = str(error).strip().partition("\n")[0][:200]
                    raise ForwardError(f"{type(error).__name__}: {first}") from error
                except SystemExit as error:
                    raise UsageError(f"Expected the model to run on an example input, but it {told(error)}") from error
                if _chance() != chance:
                    ledger.graph.branches.append("random")
            ledger.drop_overwritten()
        finally:
            manager.detach()
    if manager.failure is not None:
        raise manager.failure
    graph = ledger.graph
    search = _Search()
    graph.outputs = tuple(ledger.number(tensor) for tensor in search.tensors(output))
    graph.opaque = search.failed
    graph.hidden = ledger.hidden
    ran = {site.name for site in graph.sites}
    idle = {path or "(root)" for path in manager.module_sites} - ran
    graph.not_seen = {
        **dict.fromkeys(sorted(idle), "it did not run on the example"),
        **manager.recorder.all_not_measured(),
    }
    return graph


def _chance() -> tuple[int, ...]:
    """The state of the random generators whose numbers no torch function is seen to make: Python's and numpy's."""
    state = np.random.get_state(legacy=False)["state"]  # noqa: NPY002  # the one that a network's code would use
    return hash(random.getstate()), hash(state["key"].tobytes()), state["pos"]


class _Ledger:
    """Gives numbers to tensors while a forward runs."""

    def __init__(self, model: nn.Module) -> None:
        self.graph = Graph()
        self.hidden = 0
        self._numbers: TensorMap[tuple[int, int]] = TensorMap("value")
        self._versions: list[int] = []  # of each value when it was numbered
        self._names: dict[int, tuple[str, int]] = {}  # parameters and buffers, as they were before the forward
        self._kept: list[Tensor] = []  # so that no identity of a constant is given away again
        for path, module in walk(model):
            for table in (module._parameters, module._buffers):
                for name, tensor in table.items():
                    if tensor is not None:
                        self._names.setdefault(id(tensor), (f"{path}.{name}" if path else name, tensor._version))
                        self._kept.append(tensor)
        self._running = False

    def start(self) -> None:
        """From now on, a tensor that is met for the first time was made by a call that was not seen."""
        self._running = True

    def number(self, tensor: Tensor) -> int:
        """The number of a tensor that is met; a new one where it is new, or was changed since it was numbered."""
        known = self._numbers.get(tensor)
        if known is not None and known[1] == tensor._version:
            return int(known[0])
        name, version = self._names.get(id(tensor), ("", 0))
        if name and version == tensor._version:
            return self.put(tensor, constant=True, name=name)
        self.hidden += self._running
        return self.put(tensor)

    def put(self, tensor: Tensor, *, constant: bool = False, name: str = "") -> int:
        """A tensor was made, or changed: give it a number."""
        held = tensor if constant else None
        self.graph.values.append(Value(tuple(tensor.shape), tensor.dtype, held, name))
        self._versions.append(tensor._version)
        number = len(self.graph.values) - 1
        self._numbers.put(tensor, (number, tensor._version))
        return number

    def is_kept(self, tensor: Tensor) -> bool:
        """Whether a tensor is one of the network's parameters and buffers."""
        return id(tensor) in self._names

    def constant(self, number: int) -> Tensor | None:
        """The tensor of a constant, unless it was overwritten since it was numbered."""
        tensor = self.graph.values[number].constant
        return tensor if tensor is not None and tensor._version == self._versions[number] else None

    def drop_overwritten(self) -> None:
        """The forward is over: what was overwritten in it is known no more."""
        values = self.graph.values
        values[:] = [replace(value, constant=self.constant(number)) for number, value in enumerate(values)]


# What is asked of a tensor other than its numbers.
_METADATA = frozenset(
    getattr(Tensor, name)
    for name in (
        *("size", "dim", "ndimension", "numel", "nelement", "stride", "storage_offset", "__len__", "element_size"),
        *("is_contiguous", "is_floating_point", "is_complex", "is_signed", "get_device", "__hash__", "__repr__"),
        *(
            "data_ptr",
            "untyped_storage",
            "is_pinned",
            "is_shared",
            "type",
            "is_inference",
            "dim_order",
            "requires_grad_",
        ),
    )
    if hasattr(Tensor, name)
) | {torch.numel, torch.is_floating_point, torch.is_complex, torch.is_tensor, torch.get_device}

# Calls whose result has a shape that depends on numbers, or whose result shares memory without a common version.
_LEAKS = frozenset(
    getattr(home, name)
    for home in (torch, Tensor)
    for name in (
        "nonzero",
        "argwhere",
        "masked_select",
        "unique",
        "unique_consecutive",
        "bincount",
        "equal",
        "allclose",
    )
    if hasattr(home, name)
) | {Tensor.data.__get__}  # type: ignore[attr-defined]
_PICKS = (Tensor.__getitem__, torch.where)
_UNWRITTEN = frozenset(
    getattr(home, name)
    for home in (torch, Tensor)
    for name in ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "empty_permuted")
    if hasattr(home, name)
)


class _Recorder(TorchFunctionMode):
    """Writes down every torch function that is called, and how its tensors hang together."""

    def __init__(self, ledger: _Ledger) -> None:
        super().__init__()
        self.ledger = ledger

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        ledger = self.ledger
        with unwatched():
            ledger.start()
            given = substitute(
                (args, kwargs), lambda leaf: Ref(ledger.number(leaf)) if isinstance(leaf, Tensor) else leaf
            )
            reads = tuple(references(given))
            constant = all(ledger.constant(number) is not None for number in reads)
            luck = torch.random.get_rng_state() if constant else None
        output = func(*args, **kwargs)
        with unwatched():
            made = list(_Search().tensors(output))
            out = kwargs.get("out")
            written = args[0] if output is None and args and isinstance(args[0], Tensor) else out
            made += [tensor for tensor in _Search().tensors(written) if all(tensor is not other for other in made)]
            if luck is not None:
                known = func not in _UNWRITTEN and torch.equal(luck, torch.random.get_rng_state())
                for tensor in made:  # a buffer that the forward writes is restored after it
                    ledger.put(tensor, constant=known and not ledger.is_kept(tensor))
                return output
            self._escapes(func, args, reads, output)
            if made:
                numbers = tuple(ledger.put(tensor) for tensor in made)
                ledger.graph.steps.append(Step(func, given[0], given[1], numbers, reads))
        return output

    def _escapes(self, func: Callable[..., Any], args: tuple[Any, ...], reads: tuple[int, ...], output: Any) -> None:
        """Note where numbers that depend on the input become Python's, or a shape."""
        ledger = self.ledger
        masks = any(
            ledger.graph.values[number].dtype in (torch.bool, torch.uint8) and ledger.constant(number) is None
            for number in reads
        )
        picked = masks and func in _PICKS and (func is not torch.where or len(args) == 1)
        getter = getattr(func, "__name__", "") == "__get__"
        plain = (
            output is not None
            and not getter
            and func not in _METADATA
            and not any(True for _ in _Search().tensors(output))
        )
        if picked or plain or func in _LEAKS:
            name = getattr(func, "__name__", str(func))
            if name not in ledger.graph.branches:
                ledger.graph.branches.append(name)


class _TracingHookManager(HookManager):
    """The project's tap, whose observer counts nothing and notes where each site begins and ends."""

    def __init__(self, model: nn.Module, ledger: _Ledger) -> None:
        met: list[tuple[SiteKey, SiteInfo]] = []

        def new_counters(_phase: str, key: SiteKey, info: SiteInfo, _neurons: int, _device: torch.device) -> None:
            met.append((key, info))

        super().__init__(
            model,
            registry=Registry(),
            new_counters=new_counters,
            declared_axis=lambda _: None,
            functional=True,
            tolerance=0.0,
        )
        not_measured = self.recorder.not_measured
        self.recorder: SiteRecorder = _TracingRecorder(ledger, met, new_counters, self.fail)
        self.recorder.not_measured = not_measured


class _TracingRecorder(SiteRecorder):
    def __init__(
        self,
        ledger: _Ledger,
        met: list[tuple[SiteKey, SiteInfo]],
        new_counters: Any,
        fail: Callable[[Exception], None],
    ) -> None:
        super().__init__(new_counters=new_counters, declared_axis=lambda _: None, tolerance=0.0, fail=fail)
        self._ledger = ledger
        self._met = met  # what a meter was asked for; nothing is counted
        self._begun: list[int] = []

    def begin(self, path: str, function: str, activation: Activation, x: Any, glu_dim: int | None) -> Call | None:
        call = super().begin(path, function, activation, x, glu_dim)
        if call is not None:
            self._begun.append(self._ledger.number(x))
        return call

    def end(self, call: Call, x: Any, y: Any) -> None:
        super().end(call, x, y)
        before = self._begun.pop()
        if isinstance(y, Tensor):
            applied = call.activation
            info = SiteInfo(applied.name, applied.kind, applied.linear_when_on, call.axis, call.axis_source)
            self._note(call.key, info, before, y)

    def product(self, args: tuple[Any, ...], y: Any) -> None:
        seen = len(self._met)
        super().product(args, y)
        for key, info in self._met[seen:]:
            gate = key._replace(gated=False).name
            before = next(site.after for site in self._ledger.graph.sites if site.name == gate)
            self._note(key, info, before, y)

    def _note(self, key: SiteKey, info: SiteInfo, before: int, y: Tensor) -> None:
        if y.dim() > info.axis:
            after = self._ledger.number(y)
            self._ledger.graph.sites.append(Site(key.name, info, before, after, y.shape[info.axis]))


class _Search:
    """A search for tensors in what a network was given or returned; objects are taken apart, each once.

    Attributes:
        failed: Whether something was met that cannot be taken apart.
    """

    def __init__(self) -> None:
        self.failed = False
        self._met: list[Any] = []  # held, so that no identity is given away again

    def tensors(self, tree: Any) -> Iterator[Tensor]:
        """Every tensor in nested tuples, lists, mappings and objects."""
        if isinstance(tree, Tensor):
            yield tree
            return
        if isinstance(tree, _PLAIN) or any(tree is met for met in self._met):
            return
        self._met.append(tree)
        if isinstance(tree, Mapping):
            yield from self._all(tree.values())
        elif isinstance(tree, (tuple, list)):
            yield from self._all(tree)
        elif hasattr(tree, "__dict__") and not callable(tree):  # a dataclass, a cache of keys and values
            yield from self._all(vars(tree).values())
        else:
            self.failed = True

    def _all(self, parts: Iterable[Any]) -> Iterator[Tensor]:
        for part in parts:
            yield from self.tensors(part)


_PLAIN = (int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size)
