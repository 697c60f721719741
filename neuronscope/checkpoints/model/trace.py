"""Trace one forward on an example: record a list of steps over numbered values.

The model runs under two observers: the project's own hooks, so that sites have exactly the names that
:func:`neuronscope.watch` gives them, and a function mode that records every call of a torch function. No activation is
kept: of a tensor, the graph has its number, shape and dtype. Only tensors that do not depend on the input are kept:
parameters, buffers, and what is computed from them alone.

A call that we do not see cannot lead to a false claim. A tensor that was made by an unseen call, or that was changed by
one (its version shows that), becomes a value of which nothing is known. Where the model reads numbers in Python code,
so that another input could take another path, the graph says so in
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

from neuronscope.attach.compiling import unwatched
from neuronscope.attach.read_outs import reads_out
from neuronscope.attach.site_finder import Call
from neuronscope.attach.tensor_map import TensorMap
from neuronscope.attach.torch_functions import spellings
from neuronscope.checkpoints.model.load_model import held_tensors
from neuronscope.checkpoints.model.observed_network import SiteCallHooks
from neuronscope.checkpoints.model.traced_graph import Graph, Site, Step, TensorRef, Value, leaves, substitute
from neuronscope.checkpoints.user_code import describe_exception
from neuronscope.count.neuron_layout import neurons_first
from neuronscope.errors import NeuronscopeError, UsageError
from neuronscope.running import model_state_restored
from neuronscope.sites import SiteInfo, SiteKey

__all__ = ["ForwardError", "trace"]


class ForwardError(NeuronscopeError):
    """A network failed on an example; the message is the first line of its own."""


def trace(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None = None, *, training: bool = False
) -> Graph:
    """Return the graph of one forward, in evaluation mode and without gradients. The model is left as it was.

    Args:
        model: The model, with real weights (not on the meta device).
        args: The example's positional arguments.
        kwargs: Its keyword arguments.
        training: Run it in training mode instead.

    Raises:
        ForwardError: The model failed on this example.
        UsageError: The model ended the program.

    >>> graph = trace(nn.Sequential(nn.Linear(3, 2), nn.ReLU()), (torch.randn(1, 3),))
    >>> [site.name for site in graph.sites], [step.function.__name__ for step in graph.steps]
    (['0/relu'], ['linear', 'relu'])
    """
    kwargs = dict(kwargs or {})
    builder = _GraphBuilder(model)
    met: dict[SiteKey, SiteInfo] = {}

    def note(call: Call, before: int | None, y: Tensor) -> None:
        met.setdefault(call.key, call.info)
        builder.add_site(call, before, y)

    hooks = SiteCallHooks(model, builder.number, note)
    builder.graph.inputs = tuple(builder.number(tensor) for tensor in _Search().tensors((args, kwargs)))
    with model_state_restored(model), torch.no_grad():
        model.train(training)
        try:
            hooks.recorder.set_phase("trace", 0)
            with builder:
                hooks.set_observing(True)
                random_states = _random_states()
                try:
                    output = model(*args, **kwargs)
                except Exception as error:
                    first = str(error).strip().partition("\n")[0][:200]
                    raise ForwardError(f"{type(error).__name__}: {first}") from error
                except SystemExit as error:
                    raise UsageError(
                        f"Expected the model to run on an example input, but it {describe_exception(error)}"
                    ) from error
                if _random_states() != random_states:
                    builder.graph.branches.append("random")
            builder.drop_overwritten()
            builder.note_changed(model)
        finally:
            hooks.detach()
    if hooks.failure is not None:
        raise hooks.failure
    graph = builder.graph
    search = _Search()
    graph.outputs = tuple(builder.number(tensor) for tensor in search.tensors(output))
    graph.output_not_searchable = search.failed
    recorder = hooks.recorder
    infos = {key.name: recorder.sites.current_info(key, info) for key, info in met.items()}
    graph.sites = [replace(site, info=infos[site.name]) for site in graph.sites]
    idle = set(hooks.module_sites) - {*recorder.unmeasured.phases_of_modules}
    graph.not_seen = {
        **dict.fromkeys(sorted(path or "(root)" for path in idle), "it did not run on the example"),
        **recorder.sites.all_not_measured(compiled=recorder.compiled),
    }
    return graph


def _random_states() -> tuple[int, ...]:
    """Return the states of Python's and numpy's random generators, which are used without a torch function."""
    state = np.random.get_state(legacy=False)["state"]  # noqa: NPY002  # a network's code uses the global one
    return hash(random.getstate()), hash(state["key"].tobytes()), state["pos"]


# Functions whose result has no numbers yet.
_UNINITIALISED = spellings("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "empty_permuted")


class _GraphBuilder(TorchFunctionMode):
    """Builds the graph of a forward while it runs: records every call of a torch function, and numbers the tensors."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.graph = Graph()
        self._numbers: TensorMap[tuple[int, int]] = TensorMap()
        self._versions: list[int] = []  # of each value when it was numbered
        self._names: dict[int, tuple[str, int]] = {}  # of parameters and buffers: name, and version before the forward
        self._kept: list[Tensor] = []  # keeps the ids of these tensors in use
        for name, held in held_tensors(model):
            self._names.setdefault(id(held.tensor), (name, held.tensor._version))
            self._kept.append(held.tensor)
        self._running = False  # from the first call on, a tensor that is new was made by a call that was not seen

    def number(self, tensor: Tensor) -> int:
        """Return the number of a tensor: a new one if the tensor is new or was changed since it was numbered."""
        known = self._numbers.get(tensor)
        if known is not None and known[1] == tensor._version:
            return int(known[0])
        name, version = self._names.get(id(tensor), ("", 0))
        if name and version == tensor._version:
            return self.put(tensor, constant=True, name=name, sources=frozenset([name]))
        self.graph.unseen_tensors += self._running
        return self.put(tensor)

    def put(
        self, tensor: Tensor, *, constant: bool = False, name: str = "", sources: frozenset[str] = frozenset()
    ) -> int:
        """Give a new number to a tensor that was made or changed; the other arguments are fields of :class:`Value`."""
        kept = tensor if constant else None
        self.graph.values.append(Value(tuple(tensor.shape), tensor.dtype, kept, name, sources))
        self._versions.append(tensor._version)
        number = len(self.graph.values) - 1
        self._numbers.put(tensor, (number, tensor._version))
        return number

    def add_site(self, call: Call, before: int | None, y: Tensor) -> None:
        """Add one call of a site; ``before`` is ``None`` for a product, which follows the output of its gate."""
        if before is None:
            before = next(
                site.after for site in reversed(self.graph.sites) if call.gate and site.name == call.gate.name
            )
        by_neuron, axis = neurons_first(y, *call.layout)
        self.graph.sites.append(
            Site(call.key.name, call.info, call.layout, before, self.number(y), by_neuron.shape[axis])
        )

    def constant(self, number: int) -> Tensor | None:
        """Return the tensor of a constant, or ``None`` if it was overwritten since it was numbered."""
        tensor = self.graph.values[number].constant
        return tensor if tensor is not None and tensor._version == self._versions[number] else None

    def sources(self, numbers: Iterable[int]) -> frozenset[str]:
        """Return the names of the parameters and buffers that constants are or were computed from."""
        return frozenset[str]().union(*(self.graph.values[number].sources for number in numbers))

    def note_changed(self, model: nn.Module) -> None:
        """After the forward, note the names of parameters and buffers that were overwritten or replaced in it."""
        now = {name: (id(held.tensor), held.tensor._version) for name, held in held_tensors(model)}
        before = {name: (key, version) for key, (name, version) in self._names.items()}
        self.graph.changed |= {name for name, was in before.items() if now.get(name) != was}

    def drop_overwritten(self) -> None:
        """After the forward, forget the constants that were overwritten in it."""
        values = self.graph.values
        values[:] = [replace(value, constant=self.constant(number)) for number, value in enumerate(values)]

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        with unwatched():
            self._running = True
            arguments = substitute(
                (args, kwargs), lambda leaf: TensorRef(self.number(leaf)) if isinstance(leaf, Tensor) else leaf
            )
            reads = tuple(leaf.value for leaf in leaves(arguments) if isinstance(leaf, TensorRef))
            constant = all(self.constant(number) is not None for number in reads)
            random_state = torch.random.get_rng_state() if constant else None
        output = func(*args, **kwargs)
        with unwatched():
            made = list(_Search().tensors(output))
            out = kwargs.get("out")
            written = args[0] if output is None and args and isinstance(args[0], Tensor) else out
            made += [tensor for tensor in _Search().tensors(written) if all(tensor is not other for other in made)]
            if random_state is not None:
                known = func not in _UNINITIALISED and torch.equal(random_state, torch.random.get_rng_state())
                for tensor in made:  # not a buffer that the forward writes: it is restored after the forward
                    constant = known and id(tensor) not in self._names
                    self.put(tensor, constant=constant, sources=self.sources(reads))
                return output
            self._note_branches(func, args, reads, output)
            if made:
                numbers = tuple(self.put(tensor) for tensor in made)
                self.graph.steps.append(Step(func, arguments[0], arguments[1], numbers, reads))
        return output

    def _note_branches(
        self, func: Callable[..., Any], args: tuple[Any, ...], reads: tuple[int, ...], output: Any
    ) -> None:
        """Note a call through which numbers that depend on the input reach Python code, or decide a shape."""
        masks = any(
            self.graph.values[number].dtype in (torch.bool, torch.uint8) and self.constant(number) is None
            for number in reads
        )
        gives_tensors = any(True for _ in _Search().tensors(output))
        if reads_out(func, args, output, gives_tensors=gives_tensors, masks=masks):
            name = getattr(func, "__name__", str(func))
            if name not in self.graph.branches:
                self.graph.branches.append(name)


class _Search:
    """Searches for tensors in arguments or results of a network, also in attributes of objects, each object once."""

    def __init__(self) -> None:
        self.failed = False  # whether something was met that cannot be searched
        self._met: list[Any] = []  # keeps the ids of these objects in use

    def tensors(self, tree: Any) -> Iterator[Tensor]:
        """Yield every tensor in nested tuples, lists, mappings and objects."""
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
        elif hasattr(tree, "__dict__") and not callable(tree):  # such as a dataclass, or a cache of keys and values
            yield from self._all(vars(tree).values())
        else:
            self.failed = True

    def _all(self, parts: Iterable[Any]) -> Iterator[Tensor]:
        for part in parts:
            yield from self.tensors(part)


_PLAIN = (int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size)
