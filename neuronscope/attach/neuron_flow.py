"""Know what each tensor of a forward is: units of a layer, a weight, an input, or none of these.

A :class:`NeuronFlow` receives every torch function that a forward calls, and remembers for each result what the rule of
the function says: see :mod:`neuronscope.attach.operators`. What equal calls led to is remembered too.

While ``torch.compile`` traces, it receives the fake tensors that stand for the traced ones; see
:func:`neuronscope.attach.compiling.while_tracing`.
"""

from __future__ import annotations

import math
import re
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from neuronscope.attach.compiling import seen_by_modes, traced_call, traced_in_body, traced_modules, unwatched
from neuronscope.attach.dtensor import NeuronShard, is_distributed, is_later_shard, local_tensor, neuron_shard
from neuronscope.attach.examples import all_tensors
from neuronscope.attach.expert_rows import ExpertRows
from neuronscope.attach.layer_names import LayerNames, layers_before
from neuronscope.attach.operators import (
    LAYERS,
    Index,
    Listed,
    Operation,
    acted_read,
    is_elementwise,
    keeps_zero,
    lose,
    may_bend,
    origins_of,
    rule_of,
    set_item,
    tensors_in,
)
from neuronscope.attach.origins import (
    ACTIVATED,
    CONSTANT,
    ENDED,
    LOST,
    RAW,
    UNITS,
    UNKNOWN,
    WEIGHT,
    Operand,
    Origin,
    PickedMatrices,
)
from neuronscope.attach.plain_sizes import plain_shape, plain_size
from neuronscope.attach.readers import carry_layer, columns_of, read_dim
from neuronscope.attach.row_masks import RowMasks
from neuronscope.attach.tensor_map import TensorMap, nested_tensors
from neuronscope.attach.torch_functions import spellings
from neuronscope.attach.units import Units, has_units, place
from neuronscope.attach.unsupported import is_wrapped, unwrapped
from neuronscope.count.neuron_layout import Dims
from neuronscope.sites import ReaderColumns

__all__ = ["LEAVING", "SET_DATA", "SHIFTED", "UNSEEN", "NeuronFlow"]

#: Begins the name of a function that autograd's graph shows, and no function mode.
UNSEEN = "unseen "
#: Begins the note that a function may make a neuron that is zero something else before a layer reads it.
SHIFTED = "changed by `"
#: They give values to code outside of torch.
LEAVING = frozenset({Tensor.numpy, Tensor.__array__, Tensor.tolist, Tensor.item, Tensor.__float__, Tensor.__bool__})
#: It is called by ``tensor.data = other``.
SET_DATA: Callable[..., Any] = Tensor.data.__set__  # type: ignore[attr-defined]

_MOST_OUTCOMES = 20_000
_PLAIN = frozenset({int, float, bool, str})
_SETTINGS = _PLAIN | {type(None), torch.dtype, torch.device}
_MIXING_NORMS = spellings("layer_norm", "group_norm", "instance_norm", "rms_norm")
_NORMS = _MIXING_NORMS | spellings("batch_norm")
_MIXING = _MIXING_NORMS | spellings("normalize", "renorm", "local_response_norm", in_place=True)
_SUMS = spellings("add", "sub", "subtract", "__add__", "__radd__", "__sub__", "__rsub__", in_place=True) | spellings(
    "__iadd__", "__isub__"
)
#: By the name of a layer's node in autograd's graph: the place of the weight in it, and the dimension of the units.
_WEIGHT_SLOTS = {
    "AddmmBackward0": (2, -1),
    "MmBackward0": (1, -1),
    **dict.fromkeys(("ConvolutionBackward0", "NativeBatchNormBackward0", "NativeGroupNormBackward0"), (1, 1)),
}
#: The note of a site that is multiplied by a weight.
_WEIGHED = re.compile(r"combined with `.*` by `mul(tiply)?_?`")
_UNKNOWN = Origin.of(UNKNOWN)
_RAW = Origin.of(RAW)
_NAMELESS = frozenset({WEIGHT, UNKNOWN})
_STORED = frozenset({WEIGHT, CONSTANT})


class _Outcome(NamedTuple):
    """What a call leads to.

    Attributes:
        origins: What its outputs are.
        layer: The layer, if it is a call of one.
        call: Its number among the calls of layers.
        reads: The calls of layers that it depends on, as bits.
        readers: The sites that it reads, each with the columns that do, or with its layer where they are not known.
        bends: Layers that it reads after a function that is not linear and no known activation; and the function.
        notes: Sites that it reads in another way than a layer reads its inputs, and how.
        normalises: The layer whose units it normalises one by one, or ``""``; ``None`` if it is no norm.
        nameless: Whether an output may turn out to be a weight: see :func:`_stays_weight`.
        rows: Whether data says which experts its rows are of, or which weights it is.
        terms: Sites whose neurons were mixed by functions that are no layers, and whether one number is left of them.
        acted: Activations of what has no units any more, whose results a layer reads; see :attr:`Origin.acted`.
    """

    origins: tuple[Origin, ...]
    layer: str | None = None
    call: int = -1
    reads: int = 0
    readers: tuple[tuple[Any, ReaderColumns | str], ...] = ()
    bends: tuple[tuple[str, str], ...] = ()
    notes: tuple[tuple[Any, str], ...] = ()
    normalises: str | None = None
    nameless: bool = False
    rows: bool = False
    terms: tuple[tuple[Any, bool], ...] = ()
    acted: tuple[tuple[int, str], ...] = ()


#: A tensor among the arguments of a call: its place, what it is, and its class, shape and type.
_Given = tuple[int, Origin, tuple[type, torch.Size, torch.dtype]]


class _KnownCall:
    """A call that was followed, what it led to, and which call came after it.

    The next call is compared with that one first. The comparison is of all facts that the outcome follows from, and it
    needs no key: see :meth:`NeuronFlow.repeats`.

    Attributes:
        outcome: What it led to.
        effect: The layer, its number among the calls of layers, what it depends on, and its first output, of this.
        next: The call that came after it, the last time.
        function: Its function; ``None`` as long as it cannot be compared. The following are what it was called with:
        given: The tensors that are not told by their identity.
        ids: The identities of all arguments, 0 in the places of those tensors.
        names: The names of the keyword arguments, which come last.
        held: All arguments: a setting, so that it keeps its identity; a reference to a stored tensor; or ``None``.
        gives: The shape of its output.
        changes: How often stored tensors had ended or been overwritten before.
    """

    __slots__ = ("changes", "effect", "function", "given", "gives", "held", "ids", "names", "next", "outcome")

    def __init__(self, outcome: _Outcome) -> None:
        self.outcome = outcome
        self.effect = outcome.layer, outcome.call, outcome.reads, outcome.origins[0]
        self.next: _KnownCall | None = None
        self.function: Any = None
        self.given: tuple[_Given, ...] = ()
        self.ids: list[int] = []
        self.names: tuple[str, ...] = ()
        self.held: tuple[Any, ...] = ()
        self.gives = torch.Size()
        self.changes = 0


class NeuronFlow:
    """Tracks what the tensors of a forward are.

    Args:
        names: The layers of the model's weights.

    Attributes:
        names: The same.
        read: Calls of layers whose outputs another layer reads, as bits; they are no outputs of the network.
        expert_rows: Knows which expert each row of a layer of experts is of.
        row_masks: Knows which rows are padding of what data picked from a batch.
        layers: The layer of each call, in the order of the calls.
    """

    #: What each call reads. Python finds attributes of an object slowly if it has more than 30 outside of slots.
    __slots__ = (
        *("_begin", "_changes", "_last", "_origins", "_weights", "layers", "names", "overwritten", "read", "row_masks"),
        "__dict__",
    )

    def __init__(self, names: LayerNames) -> None:
        self.names = names
        self._origins: TensorMap[Origin] = TensorMap()
        self._weights: TensorMap[Origin] = TensorMap()
        self._calls: dict[tuple[Any, ...], _KnownCall] = {}  # by the facts that their outcomes follow from
        self._begin = self._last = _KnownCall(_Outcome((_UNKNOWN,)))  # stands for the begin of a forward; the last call
        self._changes = 0  # how often a stored tensor has ended or been overwritten
        self.expert_rows = ExpertRows(self._origin_in_call)
        self.row_masks = RowMasks()
        self.layers: list[str] = []
        self.read = 0
        self._closed: tuple[int, list[str]] = 0, []  # what `_close_calls` noted last: most forwards are alike
        self._returned: tuple[int, list[str]] = 0, []  # what `note_outputs` noted last
        self._given_out: TensorMap[tuple[bool, bool]] = TensorMap()  # what the model returned last; see `gave`
        self.readers: dict[Any, dict[ReaderColumns | str, None]] = {}  # of each site: columns, or layers, that read it
        self.sources: dict[str, dict[Any, None]] = {}  # of each layer: the sites of which it reads known columns
        self.reader_notes: dict[Any, dict[str, None]] = {}  # of each site: other ways in which it is read
        self.terms: dict[Any, bool] = {}  # of sites whose neurons are mixed: whether one number is all that is left
        self.acted: set[tuple[int, str]] = set()  # activations of what has no units any more, which layers read
        self.left = False  # whether units left torch in this forward, so that a new tensor may hold them
        self.activations: dict[Any, dict[Any, None]] = {}  # of each layer and site: the sites that read it
        self.repeated: set[str] = set()  # layers that were called more than once in a forward
        self.bent: dict[str, dict[str, None]] = {}  # layers that another one reads after an unknown function: which
        self.seen: set[str] = set()  # layers that were called
        self.read_layers: set[str] = set()
        self.called: set[str] = set()  # layers that were called in forwards of the model that have ended
        self._ended = 0  # calls of layers whose outputs a reduction reads in this forward, as bits
        self._reached: set[str] = set()  # layers whose outputs a layer or a reduction reads, or the model returns
        self.hidden: dict[str, str] = {}  # layers whose weight an unknown function was given: the function
        self.overwritten: Origin | None = None  # what the last result was before, if it was changed in place
        self.normalised: dict[str, str] = {}  # of each norm: the layer whose units it normalises one by one, or ""
        self.duplicate = False  # whether another rank was seen to hold the same data, and the first part of a weight
        self._shards: dict[str, tuple[torch.Size, int, NeuronShard]] = {}  # of each layer: shape, own neurons, which
        self._distributed: dict[str, Origin] = {}  # of each distributed layer: its last output

    def clear(self) -> None:
        """Forget everything about tensors, because a forward begins or a step is over."""
        self._last = self._begin
        self.left = False
        if not (self._origins.entries or self.layers):
            return
        self._close_calls()
        self._origins.entries.clear()
        if self.expert_rows.noted:
            self.expert_rows.clear()
        if self.row_masks.known:
            self.row_masks.clear()
        self.layers.clear()
        self.read = 0

    def _close_calls(self) -> None:
        if self._ended:
            self._reached.update(self._layers_of(self._ended & (1 << len(self.layers)) - 1))
            self._ended = 0
        if not self.layers or self._closed == (self.read, self.layers):
            return
        self._closed = self.read, self.layers.copy()
        self.seen.update(self.layers)
        if len(set(self.layers)) < len(self.layers):
            self.repeated.update(layer for layer, times in Counter(self.layers).items() if times > 1)
        for call, layer in enumerate(self.layers):
            if self.read >> call & 1:
                self.read_layers.add(layer)

    def unseen_layers(self) -> list[str]:
        """Return the layers of the model that were never seen to be called."""
        self._close_calls()
        seen = {part for layer in self.seen for part in layer.split("+")}
        parts = tuple(sorted(seen))  # of a stack, or of a fused weight: `w1.0`, `w1(0:3)`
        found = self.names.layers() - seen
        return sorted(
            layer for layer in found if not any(part.startswith((f"{layer}.", f"{layer}(")) for part in parts)
        )

    def lost_layers(self) -> set[str]:
        """Return the layers whose outputs were given to nothing that is known, in no forward of the model."""
        self._close_calls()
        return self.called - self._reached - self.read_layers

    def gives_outputs(self, layer: str) -> bool:
        """Whether no layer was seen to read what this layer gives."""
        self._close_calls()
        return not any(part in self.read_layers for part in layer.split("+"))

    def is_output(self, site: Any, layer: str) -> bool:
        """Whether what a function gives at a site is an output of the network, or a term of a loss.

        No layer reads it. But a product with a weight that is summed is a layer that is written out. And a function of
        a hidden layer is a term of a loss if it is only reduced to one number, while layers read the same units in
        another way.

        Args:
            site: The site, of an activation that is no module.
            layer: Path of its layer.
        """
        notes = self.reader_notes.get(site, {})
        if self.gives_outputs(layer):
            return not ("read by `sum`" in notes and any(_WEIGHED.fullmatch(note) for note in notes))
        if not self.terms.get(site, False) or site in self.readers or site in self.activations:
            return False
        kept = all(note.startswith(("read by ", SHIFTED, "combined with ")) for note in notes)
        others = (each for each in self.readers if each == layer or getattr(each, "layer", None) == layer)
        return kept and next(others, None) is not None

    def origin(self, tensor: Tensor) -> Origin:
        """Return what a tensor is."""
        entry = self._origins.entries.get(id(tensor))  # as `get`, without a call
        if entry is not None and entry[0]() is tensor:
            return entry[1]
        found = self._unseen(tensor)
        return self._origin_in_graph(tensor, found) if found.state == UNKNOWN else found

    def origin_before(self, tensor: Tensor, result: Tensor) -> Origin:
        """Return what a tensor was before the last call, which may have changed it in place.

        Args:
            tensor: What the call was given.
            result: What it returned.
        """
        if tensor is result and self.overwritten is not None:
            return self.overwritten
        return self.origin(tensor)

    def known(self, tensor: Tensor) -> Origin | None:
        """Return what the flow has noted of a tensor, or ``None``."""
        return self._origins.get(tensor)

    def all_known(self) -> dict[int, Any]:
        """Return what is known of all tensors of this forward, for :meth:`given`."""
        return dict(self._origins.entries)

    def restore(self, known: dict[int, Any]) -> None:
        """Take what is known of tensors to be what :meth:`all_known` returned before."""
        self._origins.entries = dict(known)

    def given(self, tensor: Tensor, known: Mapping[int, Any] | None = None) -> Origin:
        """Return what a tensor is that a graph is given, as far as no search is needed.

        Args:
            tensor: The tensor.
            known: What was known of all tensors when the graph began to be traced; ``None`` = what is known now.
        """
        entry = (self._origins.entries if known is None else known).get(id(tensor))
        return self._unseen(tensor) if entry is None or entry[0]() is not tensor else entry[1]

    def _origin_in_graph(self, tensor: Tensor, unseen: Origin) -> Origin:
        """Return what a fake tensor is by the call in the graph that gives it, which no function mode has seen."""
        if traced_modules() is None:
            return self._origin_by_autograd(tensor, unseen)
        inner = traced_in_body(tensor)
        if inner is not None:
            self._origins.put(tensor, self.origin(inner))
        elif (call := traced_call(tensor)) is not None:
            self.follow(*call)
        return self._origins.get(tensor) or unseen

    def _origin_by_autograd(self, tensor: Tensor, unseen: Origin) -> Origin:
        """Return what a tensor is that a function gave whose calls no function mode sees, by autograd's graph.

        Such are compiled extensions, scripted functions, and whatever an ``autograd.Function`` does outside of torch.
        """
        base = self._origins.get(tensor._base) if tensor._base is not None else None
        if base is not None and tensor._base.shape == tensor.shape:  # type: ignore[union-attr]  # it changes nothing
            found = base
        elif tensor.grad_fn is None or tensor._base is not None:
            return unseen
        else:
            calls = {layer: 1 << call for call, layer in enumerate(self.layers)}
            layers, hidden, between = layers_before(tensor.grad_fn, calls, self.names)
            upstream = sum(calls[layer] for layer in layers)
            slot, dim = _WEIGHT_SLOTS.get(tensor.grad_fn.name(), (None, 0))
            if slot is not None and (layer := self.names.of_node(tensor.grad_fn.next_functions[slot][0])) in hidden:
                return self._note_call(tensor, layer, dim, upstream)
            for layer in hidden:
                self.hidden.setdefault(layer, tensor.grad_fn.name())
            if not layers:
                return unseen
            name = next((name for name in between if may_bend(name)), None)
            bends = () if name is None else tuple((layer, f"{UNSEEN}{name}") for layer in layers)
            found = Origin.of(LOST, upstream, bends=bends)
            for layer in layers:
                self.reader_notes.setdefault(layer, {})["read by a function that is not seen"] = None
        self._origins.put(tensor, found)
        return found

    def _note_call(self, tensor: Tensor, layer: str, dim: int, upstream: int) -> Origin:
        """Note the call of a layer that was called outside of the model's forward, and return what its output is.

        Args:
            tensor: Its output.
            layer: Path of the layer.
            dim: The dimension of its units.
            upstream: Calls that its input depends on, as bits.
        """
        call, shape = len(self.layers), plain_shape(tensor)
        self.layers.append(layer)
        self.read |= upstream
        width = shape[dim]
        units = Units((call,), layer, ((layer, 0, width, 1),), 0, place(shape, (dim % len(shape),)))
        found = Origin.of(UNITS, upstream | 1 << call, units=units, layer=layer)
        self._origins.put(tensor, found)
        return found

    def _unseen(self, tensor: Tensor) -> Origin:
        """Return what a tensor is that no function of this forward gave: a weight, or not known."""
        found = self._weights.get(tensor)
        if found is not None:
            return found
        known = self.names.of(tensor)
        if known is None:
            if isinstance(tensor, nn.Parameter):
                return Origin.of(WEIGHT)
            if is_wrapped(tensor):
                return self._of_wrapped(tensor)
            return self._of_part(tensor) if is_distributed(tensor) else _UNKNOWN
        layer, is_weight = known
        found = Origin.of(WEIGHT if is_weight else CONSTANT, layer=layer)
        if not self.names.is_shared(tensor):
            self._weights.put(tensor, found)
        return found

    def _of_wrapped(self, tensor: Tensor) -> Origin:
        """Return what a tensor is inside a function transform: on which layers it depends is all that is known.

        It stands for a row of the tensor that the transform was given, along any dimension, or for all of it.
        """
        found = self._origins.get(unwrapped(tensor))
        return Origin.of(LOST, found.upstream) if found is not None and found.upstream else _UNKNOWN

    def _of_part(self, tensor: Tensor) -> Origin:
        """Return what a distributed tensor is: what this rank's part of it is, from which it was made."""
        found = self._origins.get(tensor._local_tensor)  # type: ignore[attr-defined]
        if found is None or found.units is None:
            return found or _UNKNOWN
        units = found.units
        if len(units.dims) != tensor.dim():
            return found.without_units(LOST)
        return found.but(units=units._replace(dims=_local(units.dims, tensor.shape)))

    def put(self, tensor: Tensor, origin: Origin) -> None:
        """Note what a tensor is.

        Args:
            tensor: The tensor.
            origin: What it is.
        """
        if id(tensor) in self._weights.entries:
            self._note_overwritten(tensor)
        self._origins.put(tensor, origin)

    def join(self, output: Any, values: Iterable[Any]) -> None:
        """Note that what an activation gave depends on all tensors that it was given, and not on its first input alone.

        Args:
            output: What it gave.
            values: Its arguments.
        """
        upstream = 0
        for value in values:
            origin = self._origins.get(value) if isinstance(value, Tensor) else None
            upstream |= 0 if origin is None else origin.upstream
        for tensor in nested_tensors((output,)) if upstream else ():
            origin = self._origins.get(tensor)
            if origin is not None and upstream & ~origin.upstream:
                self._origins.put(tensor, origin.but(upstream=origin.upstream | upstream))

    def note_inputs(self, values: Any) -> None:
        """Note that all tensors in nested tuples, lists and mappings are inputs, unless they are known."""
        alone = type(values) is tuple and len(values) == 1 and type(values[0]) is Tensor
        for tensor in values if alone else nested_tensors(values):
            if self._origins.get(tensor) is not None or self.names.of(tensor) is not None:
                continue
            if self.layers and traced_modules() is None:
                with unwatched():  # a part of the model may be called with what another one gave
                    self._origin_by_autograd(tensor, _UNKNOWN)
                if self._origins.get(tensor) is not None:
                    continue
            self._origins.put(tensor, _RAW)

    def repeats(self, function: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Tensor) -> bool:
        """Follow a call if it is the one that came next the last time: quicker than :meth:`follow`.

        It calls no torch function.

        Args:
            function: The function.
            args: The positional arguments of the call.
            kwargs: The keyword arguments of the call.
            result: What the function returned, a plain tensor.

        Returns:
            Whether it is; otherwise nothing is noted.
        """
        if self.row_masks.mask is not None and self.row_masks.concern(function):
            return False
        known, overwritten = self._last.next, None
        if known is None or known.function is not function:
            return len(args) == 2 and result is args[0] and self._stays_stored(args)
        if kwargs:
            values: tuple[Any, ...] = (*args, *kwargs.values())
            names = tuple(kwargs)
        else:
            values, names = args, ()
        if len(values) != len(known.held) or names != known.names:
            return False
        origins, weights, ids = self._origins.entries, self._weights.entries, list(map(id, values))
        try:
            for number, origin, facts in known.given:
                tensor = values[number]
                entry: Any = origins.get(ids[number]) or weights.get(ids[number])
                if entry is None or entry[1] is not origin or entry[0]() is not tensor:
                    return False
                if (type(tensor), tensor.shape, tensor.dtype) != facts:
                    return False
                ids[number] = 0
            if result.shape != known.gives or (ids != known.ids and not _are_equal(ids, values, known)):
                return False
        except RuntimeError:  # strided nested tensors have no shape
            return False
        if result is values[0]:
            if id(result) in weights:
                return False
            overwritten = origins[id(result)][1]
        layer, call, reads, origin = known.effect
        if layer is not None:
            layers = self.layers
            if call != len(layers) or known.changes != self._changes:
                return False
            layers.append(layer)
            self.read |= reads
        self.overwritten = overwritten
        origins[id(result)] = (weakref.ref(result), origin)
        self._last = known
        return True

    def follow(
        self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any
    ) -> None:
        """Note what the results of a torch function are.

        Args:
            function: The function.
            args: The positional arguments of the call.
            kwargs: The keyword arguments of the call.
            result: What the function returned.
        """
        if self.row_masks.mask is not None:
            self.row_masks.follow(function, args, kwargs, result)
        if isinstance(result, Tensor):
            if args and result is args[0] and self._stays_stored(args):
                return
            outputs: tuple[Tensor, ...] = (result,)
        elif isinstance(result, (tuple, list)):
            outputs = tuple(nested_tensors(result))
        elif function is Tensor.__setitem__:
            self._set_item(args)
            return
        else:
            outputs = ()
        if not outputs:
            if function in LEAVING:
                self._note_left(args[0], function.__name__)
            elif function == SET_DATA:
                self._set_data(*args)
            return
        first = outputs[0]
        known = self._known_call(function, args, kwargs, outputs)
        self._last.next = known
        self._last, outcome = known, known.outcome
        if result is first and not (outcome.nameless or outcome.rows):
            self._note_arguments(known, function, args, kwargs, first)
        if kwargs or (args and first is args[0]):
            for output in outputs:
                self._note_overwritten(output)
        self.overwritten = self._origins.get(first) if args and first is args[0] else None
        if outcome.rows:
            self.expert_rows.note(function, args, kwargs, first, outcome.origins[0], outcome.layer is not None)
        if outcome.layer is not None:
            self.layers.append(outcome.layer)
            self.read |= outcome.reads
            if is_wrapped(first):
                self._reached.add(outcome.layer)  # what reads it may lie outside of the transform
            if type(first) is not Tensor and is_distributed(first):
                self._note_distributed((*args, *kwargs.values()), first, outcome.origins[0])
        if result is first and type(first) is Tensor and not outcome.nameless:  # a parameter stays one, see below
            self._origins.put(first, outcome.origins[0])
            return
        for output, origin in zip(outputs, outcome.origins, strict=True):
            if not _stays_weight(output, origin):
                self._origins.put(output, origin)

    def _note_left(self, tensor: Tensor, name: str) -> None:
        """Note that code outside of torch reads a tensor.

        Args:
            tensor: The tensor.
            name: Name of the function that gave it its values.
        """
        origin = self._origin_in_call(tensor)
        for carried in origin.carries:
            self.reader_notes.setdefault(carried.site, {})[f"read by `{name}`"] = None
        if origin.state in (UNITS, LOST) and tensor.dim() and tensor.is_floating_point():
            self.left = True

    def _known_call(
        self, function: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], outputs: tuple[Tensor, ...]
    ) -> _KnownCall:
        """Return an equal call that was followed before, or this one with what it leads to."""
        try:
            key = self._key(function, args, kwargs, outputs)
            known = self._calls.get(key)
        except (RuntimeError, TypeError):  # strided nested tensors have no shape; symbolic sizes are no key
            key = (function, *map(self._describe, (*args, *kwargs.items())), *map(plain_shape, outputs))
            known = self._calls.get(key)
        if known is None or (known.outcome.layer is not None and known.outcome.call != len(self.layers)):
            known = _KnownCall(self._find(function, args, kwargs, outputs))
            self._learn(known.outcome)
            if len(self._calls) >= _MOST_OUTCOMES:
                self._calls.clear()
            self._calls[key] = known
        return known

    def _note_arguments(
        self, known: _KnownCall, function: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Tensor
    ) -> None:
        """Note with what a call was made, so that the next one can be compared with it.

        The tensors of a forward are compared by what they are, and by shape and type. The stored tensors of a layer,
        and settings, are compared by identity, which is quicker (``batch_norm`` has seven). Settings are kept, so that
        nothing else gets their identity; no identity of a stored tensor counts any more when one of them has ended or
        been overwritten. Calls with other arguments cannot be compared.

        Args:
            known: The call.
            function: The function.
            args: The positional arguments of the call.
            kwargs: The keyword arguments of the call.
            output: What it returned.
        """
        is_layer = known.outcome.layer is not None
        if (known.function is not None and not is_layer) or type(output) is not Tensor or self._is_stored(output):
            return
        if "out" in kwargs or not args:
            return
        origins, weights = self._origins.entries, self._weights.entries
        given: list[_Given] = []
        held: list[Any] = []
        values = (*args, *kwargs.values())
        ids = list(map(id, values))
        for number, value in enumerate(values):
            kind = type(value)
            if kind is Tensor or kind is nn.Parameter:
                entry: Any = origins.get(id(value)) or weights.get(id(value))
                if entry is None or entry[0]() is not value or value.is_nested:
                    return
                if is_layer and self._is_stored(value):
                    held.append(weakref.ref(value, self._note_change))
                    continue
                held.append(None)
                given.append((number, entry[1], (kind, value.shape, value.dtype)))
                ids[number] = 0
            elif _SETTINGS.issuperset(map(type, value if kind is tuple else (value,))):
                held.append(value)
            else:
                return
        known.function, known.given, known.ids, known.held = function, tuple(given), ids, tuple(held)
        known.names, known.gives, known.changes = tuple(kwargs), output.shape, self._changes

    def _note_overwritten(self, tensor: Tensor) -> None:
        """Note that a tensor is overwritten, which may be a stored one."""
        if id(tensor) in self._weights.entries:
            self._changes += 1

    def _note_change(self, _: Any) -> None:
        """Note that a stored tensor has ended."""
        self._changes += 1

    def _stays_stored(self, args: tuple[Any, ...]) -> bool:
        """Return whether a call changed a stored tensor in place by a number, as a counter of batches is.

        Args:
            args: The arguments of the call.
        """
        if len(args) != 2 or type(args[1]) not in _PLAIN or not self._is_stored(args[0]):
            return False
        self.overwritten = None
        return True

    def _is_stored(self, tensor: Tensor) -> bool:
        """Whether a tensor is known as a parameter or a buffer of the model, and as nothing else."""
        return self._weights.get(tensor) is not None and self._origins.get(tensor) is None

    def _learn(self, outcome: _Outcome) -> None:
        """Note what an outcome tells about sites and layers; it holds for all forwards."""
        for site, one_number in outcome.terms:
            self.terms[site] = one_number and self.terms.get(site, True)
        for site, note in outcome.notes:
            self.reader_notes.setdefault(site, {})[note] = None
        if outcome.acted and len(self.acted) < _MOST_OUTCOMES:  # paths that differ from step to step add to it
            self.acted.update(outcome.acted)
        if outcome.layer is None:
            return
        for site, reader in outcome.readers:
            self.readers.setdefault(site, {})[reader] = None
            if not isinstance(reader, str):
                self.sources.setdefault(reader.layer, {})[site] = None
        for layer, name in outcome.bends:
            self.bent.setdefault(layer, {})[name] = None
        if outcome.normalises is not None:
            self._note_norm(outcome.layer, outcome.normalises)

    def _key(
        self, function: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], outputs: tuple[Tensor, ...]
    ) -> tuple[Any, ...]:
        """Return all that the results of a function follow from. This runs at every call: it must be quick.

        Raises:
            RuntimeError: A tensor has no shape.
        """
        facts: list[Any] = [function]
        known, weights = self._origins.entries, self._weights.entries
        is_layer = function in LAYERS  # then its settings do not matter, nor the shapes of its weights
        for arg in (*args, *kwargs.values()) if kwargs else args:
            kind = type(arg)
            if kind is Tensor or kind is nn.Parameter:
                entry = known.get(id(arg)) or weights.get(id(arg))
                origin = entry[1] if entry is not None and entry[0]() is arg else self._origin_in_call(arg)
                facts.append(origin)
                if not is_layer:
                    facts += arg.shape, arg.dtype
                elif origin.state not in _STORED:
                    facts.append(arg.shape)
            elif arg is None:
                facts.append(None)
            elif kind in _PLAIN or (kind is tuple and 0 < len(arg) < 3 and type(arg[0]) is type(arg[-1]) is int):
                if not is_layer:
                    facts.append(arg)
            else:
                facts.append(self._describe(arg))
        if kwargs:
            facts += kwargs
        for output in outputs:
            facts.append(output.shape if type(output) is Tensor else plain_shape(output))
        return tuple(facts)

    def _find(
        self, function: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], outputs: tuple[Tensor, ...]
    ) -> _Outcome:
        """Return what a call leads to."""
        call = len(self.layers)
        described = tuple([self._describe(arg) for arg in args])
        named = {name: self._describe(value) for name, value in kwargs.items()}
        shapes = tuple([plain_shape(output) for output in outputs])
        operation = Operation(function, described, named, shapes, call, self.names.sides)
        try:
            origins = origins_of(operation)
        except (AttributeError, IndexError, KeyError, LookupError, TypeError, ValueError, ZeroDivisionError):
            upstream = operation.upstream  # an unknown way to call it
            origins = (Origin.of(LOST, upstream) if upstream else _UNKNOWN,) * len(outputs)
        if any(not layer for origin in origins for layer, _ in origin.bends):
            origins = tuple([self._with_last_layers(origin) for origin in origins])
        if rule_of(function) is lose:
            self._note_hidden(operation)
        nameless = any(_is_nameless(origin) for origin in origins)
        sources = [each.origin for each in operation.tensors]
        carried = tuple(dict.fromkeys(each.site for origin in sources for each in origin.carries))
        if not origins[0].upstream >> call & 1:
            if any(origin.state == ENDED for origin in origins):
                self._ended |= operation.upstream
            kept = {each.site for origin in origins for each in origin.carries}
            read = [(site, _note(function)) for site in carried if site not in kept]
            if function in _MIXING:
                read += [(site, "mixed by a norm") for site in kept]
            elif kept and (stored := _meets_stored(operation, origins[0])) is not None:
                read += [(site, f"combined with {stored} by `{_name(function)}`") for site in kept]
            elif kept and not keeps_zero(operation):
                read += [(site, f"{SHIFTED}{_name(function)}`") for site in kept]
            mixed = [site for site in carried if site not in kept]
            origins, terms = _follow_terms(operation, origins, mixed)
            rows = _tells_rows(operation, origins[0])
            acted = acted_read(operation, origins[0])
            return _Outcome(origins, notes=tuple(read), nameless=nameless, rows=rows, terms=terms, acted=acted)
        acted = tuple(dict.fromkeys(key for origin in sources for key in origin.acted))
        origins = tuple([_as_carried(origin, call) for origin in origins])
        notes = tuple((site, "mixed by a norm") for site in carried) if function in _MIXING_NORMS else ()
        bends = tuple(dict.fromkeys(bend for origin in sources for bend in origin.bends if bend[1] != ACTIVATED))
        normalises = _normalised(sources[0], origins[0]) if function in _NORMS else None
        readers = tuple(dict.fromkeys(self._readers(operation, origins[0].layer)))
        if not notes:
            unknown = dict.fromkeys(site for site, reader in readers if isinstance(reader, str))
            notes = tuple((site, f"columns of `{origins[0].layer}` not known") for site in unknown)
        reads, terms = operation.upstream, tuple((site, False) for origin in sources for site, _ in origin.terms)
        rows = origins[0].units is not None and origins[0].units.experts is not None
        return _Outcome(
            origins, origins[0].layer, call, reads, readers, bends, notes, normalises, nameless, rows, terms, acted
        )

    def _readers(self, operation: Operation, layer: str) -> Iterator[tuple[Any, ReaderColumns | str]]:
        """Yield the sites that a call of a layer reads, each with the columns that do, or the layer; see `_Outcome`."""
        tensors = operation.tensors
        whole = all(each is None for operand in tensors for each in operand.origin.cuts[1:])  # of a weight's inputs
        for place_of, operand in enumerate(tensors):
            units = operand.origin.units
            dim = read_dim(operation.function, place_of, len(tensors) - 1, len(operand.shape)) if whole else None
            for carried in operand.origin.carries:
                found = columns_of(carried, layer, units, dim)
                if found is not None:
                    yield carried.site, found or layer

    def _note_hidden(self, operation: Operation) -> None:
        """Note the layer whose weight an unknown function was given beside data: it may be a call of the layer."""
        weight = next((each.origin for each in operation.tensors if each.origin.state == WEIGHT), None)
        data = any(each.origin.state not in (WEIGHT, CONSTANT) for each in operation.tensors)
        if weight is not None and weight.layer and data:
            self.hidden.setdefault(weight.layer, getattr(operation.function, "__name__", "?"))

    def _with_last_layers(self, origin: Origin) -> Origin:
        """Return an origin whose functions are said of the layers that came last, where their layer is not known."""
        last = self.last_layers(origin)
        found = [(each, name) for layer, name in origin.bends for each in ((layer,) if layer else last)]
        return origin.but(bends=tuple(dict.fromkeys(found)))

    def note_outputs(self, values: Any) -> None:
        """Note what the model returns: a site that it returns is read by whatever the caller does with it."""
        if values is None:  # it failed
            return
        self._given_out.entries.clear()
        if type(values) is Tensor and not seen_by_modes():
            upstream = self._note_output(values)
        else:
            upstream = 0
            with unwatched(False):
                for tensor in (values,) if isinstance(values, Tensor) else all_tensors(values):
                    upstream |= self._note_output(tensor)
        if self._returned != (upstream, self.layers):
            self._returned = upstream, self.layers.copy()
            self.called.update(self.layers)
            self._reached.update(self._layers_of(upstream))

    def _note_output(self, tensor: Tensor) -> int:
        """Note that the model returns a tensor, and return the calls of layers that it depends on, as bits."""
        origin = self._origins.get(tensor)
        if origin is None:
            return 0
        if origin.upstream:
            self._given_out.put(tensor, (torch.is_grad_enabled(), tensor.requires_grad))
        for carried in origin.carries:
            self.reader_notes.setdefault(carried.site, {})["returned by the model"] = None
        for site, one_number in origin.terms:
            if not one_number:
                self.terms[site] = False
        return origin.upstream

    def gave(self, *values: Any) -> bool:
        """Whether any of some values is what the model computed with its layers and returned in its last forward.

        If so, the layers that gave it are read by this forward: a state is no output of the network. With gradients now
        and none then, or the reverse, or detached in place since, it is a new begin.

        Args:
            values: What a forward is given.
        """
        for reference, _ in self._given_out.entries.values():
            if reference() is not None:
                break
        else:  # most often nothing is left, and the search is spared
            return False
        given = False
        with unwatched():
            for tensor in all_tensors(values):  # no generator: see `call_arguments`
                if self._given_out.get(tensor) == (torch.is_grad_enabled(), tensor.requires_grad):
                    origin = self._origins.get(tensor)
                    self.read |= origin.upstream if origin is not None else 0
                    given = True
        return given

    def note_activation(self, origin: Origin, key: Any, name: str) -> None:
        """Note that an activation reads what a tensor carries.

        Args:
            origin: What the tensor is.
            key: The site; ``None`` if the activation is not counted, or its units are not known.
            name: Name of the activation.
        """
        for carried in origin.carries:
            if key is None:
                self.reader_notes.setdefault(carried.site, {})[f"read by `{name}`"] = None
            else:
                self.activations.setdefault(carried.site, {})[key] = None

    def applied_elsewhere(self, layer: str) -> str:
        """Return why a layer's weight is used more than once in a forward; ``""`` if it is not."""
        if layer in self.repeated:
            return "is called more than once in a forward"
        return "shares a weight with another layer" if layer in self.names.shared_layers() else ""

    def _note_norm(self, norm: str, layer: str) -> None:
        """Note which layer's units a norm normalises one by one.

        Args:
            norm: Path of the norm.
            layer: Path of the layer; ``""`` if no layer is known.
        """
        layer = self.normalised.get(layer, "") or layer
        if self.normalised.setdefault(norm, layer) != layer:
            self.normalised[norm] = ""  # it normalises several layers

    def _describe(self, value: Any) -> Any:
        """Return a value as a rule sees it, which can be a key of a dictionary."""
        if isinstance(value, Tensor):
            return Operand(plain_shape(value), self._origin_in_call(value), value.dtype in (torch.bool, torch.uint8))
        if value is None or isinstance(value, (int, float, str)):
            return value
        if isinstance(value, (tuple, list)):
            described = [self._describe(each) for each in value]
            return tuple(described) if isinstance(value, tuple) else Listed(described)
        if isinstance(value, slice):
            return Index(*(plain_size(each) for each in (value.start, value.stop, value.step)))
        if isinstance(value, torch.SymInt):
            return plain_size(value)
        return value if isinstance(value, (torch.dtype, torch.device)) or value is Ellipsis else type(value)

    def _origin_in_call(self, tensor: Tensor) -> Origin:
        found = self._origins.get(tensor)
        if found is not None and not _became_weight(tensor, found):
            return found
        origin = self._unseen(tensor)
        if origin.state in (UNKNOWN, WEIGHT) and (not origin.layer or self.names.is_shared(tensor)):
            layer = self.names.running(tensor, depth=4)
            if layer is not None:
                return Origin.of(WEIGHT, layer=layer)
        return self._origin_in_graph(tensor, origin) if origin.state == UNKNOWN else origin

    def _set_item(self, args: tuple[Any, ...]) -> None:
        target, index, value = args
        self._note_overwritten(target)
        place = self._describe(index)
        if not isinstance(value, Tensor):
            origin = self.origin(target)
            if isinstance(place, Operand):
                self._origins.put(target, origin.inherit([place]))  # h[h < 0] = 0
            return
        before, written = self._describe(target), self._describe(value)
        index = place if type(place) is tuple else (place,)
        self._origins.put(target, set_item(before, index, written).inherit([before, written, *tensors_in(index)]))

    def _set_data(self, target: Tensor, value: Tensor) -> None:
        """Note that a tensor has got the values of another one; a stored one stays what it is."""
        if not (isinstance(target, nn.Parameter) or self._is_stored(target)):
            self._origins.put(target, self._origin_in_call(value))

    def last_layers(self, origin: Origin) -> tuple[str, ...]:
        """Return the layers that a tensor depends on and that no other layer has read so far."""
        return self._layers_of(origin.upstream & ~self.read)

    def _layers_of(self, calls: int) -> tuple[str, ...]:
        """Return the layers of some calls, which are given as bits."""
        found: dict[str, None] = {}
        while calls:
            last = calls.bit_length() - 1
            calls ^= 1 << last
            found.pop(self.layers[last], None)
            found[self.layers[last]] = None
        return tuple(reversed(found))

    def shard(self, tensor: Tensor, axis: int, layer: str) -> NeuronShard | None:
        """Return which neurons of a plain tensor this rank holds; ``None`` if ranks share them and that is not known.

        ``DTensor.to_local`` turns a rank's part into a plain tensor, without its placements. Such a tensor is
        recognized by its size.

        Args:
            tensor: Any tensor ``(…, N, …)``.
            axis: Dimension of the neurons.
            layer: Path of the layer.
        """
        known = self._shards.get(layer)
        if known is None or tensor.dim() <= axis:
            return NeuronShard()
        shape, own, shard = known
        neurons = tensor.shape[axis]
        if neurons == own < shard.whole:
            return shard
        if neurons == shard.whole and math.prod(tensor.shape) < math.prod(shape):
            return NeuronShard(0, neurons)  # sharded along its positions: each rank has its own
        return NeuronShard() if neurons == shard.whole or own == shard.whole else None

    def label_output(self, layer: str, output: Any) -> None:
        """Note what leaves a layer whose weight is distributed: ``to_local`` is seen by no function mode.

        Args:
            layer: Path of the layer.
            output: Its output, a rank's part as a plain tensor.
        """
        last = self._distributed.get(layer)
        if last is None or not isinstance(output, Tensor):
            return
        known = self._origins.get(output)
        if known is not None and known.state != UNKNOWN:  # inside `to_local`, a view of what is not known is seen
            return
        units = last.units
        if units is not None and len(units.dims) == output.dim():
            units = units._replace(dims=_local(units.dims, output.shape))
            if units.size < units.width:  # every rank numbers its own part from 0, so that all have the same names
                units = units._replace(runs=((layer, 0, units.size, 1),))
            self._origins.put(output, last.but(units=units))

    def _note_distributed(self, args: Iterable[Any], output: Tensor, origin: Origin) -> None:
        if origin.units is None or origin.units.layout.dims is not None:
            return
        axis = origin.units.layout.axis
        shard = neuron_shard(output, axis)
        self._shards[origin.layer] = output.shape, local_tensor(output).shape[axis], shard
        self._distributed[origin.layer] = origin
        self.duplicate = self.duplicate or any(
            is_later_shard(weight) for weight in args if isinstance(weight, nn.Parameter)
        )


def _are_equal(ids: list[int], values: tuple[Any, ...], known: _KnownCall) -> bool:
    """Whether the settings of two calls are equal numbers and texts, where they are not the same objects.

    Args:
        ids: The identities of the arguments of one; see :class:`_KnownCall`.
        values: Its arguments.
        known: The other call.
    """
    for own, other, value, held in zip(ids, known.ids, values, known.held, strict=True):
        if own != other and not (type(value) is type(held) and type(value) in _PLAIN and value == held):
            return False
    return True


def _normalised(source: Origin, result: Origin) -> str:
    """Return the path of the layer whose units a norm normalises one by one; ``""`` if it normalises none.

    Args:
        source: What the norm is applied to.
        result: What it gives.
    """
    if source.units is None or result.units is None or source.site is not None:
        return ""
    alike = source.units.tensor_runs() == ((source.layer, 0, result.units.width, 1),)  # and nothing was mixed in
    return source.layer if alike else ""


def _as_carried(origin: Origin, call: int) -> Origin:
    """Return what a layer gives, with its own units among those that it carries.

    Args:
        origin: What it gives.
        call: Number of its call.
    """
    units = origin.units
    return origin if units is None or units.call != (call,) else origin.but(carries=(carry_layer(units),))


def _meets_stored(operation: Operation, result: Origin) -> str | None:
    """Return which weight or constant has a value for each unit in an elementwise function, ``None`` if none has.

    Args:
        operation: The call of a function.
        result: What it gives.
    """
    units = result.units
    if units is None or not is_elementwise(operation.function):
        return None
    places = [place - len(units.dims) for place, dim in enumerate(units.dims) if has_units(dim)]
    for each in operation.tensors:
        if each.origin.state in _STORED and any(-dim <= len(each.shape) and each.shape[dim] > 1 for dim in places):
            return f"`{each.origin.layer}`" if each.origin.layer else "a constant"
    return None


def _follow_terms(
    operation: Operation, origins: tuple[Origin, ...], mixed: Sequence[Any]
) -> tuple[tuple[Origin, ...], tuple[tuple[Any, bool], ...]]:
    """Return what a function gives that is no layer, with :attr:`Origin.terms`; and what is known of them by now.

    A number for each row, such as a norm, is a term of a loss if it is reduced to one number, and no other data is
    combined with it before. A number that a layer reads, or that the model returns, is not a term of a loss.

    Args:
        operation: The call of the function.
        origins: What it gives.
        mixed: The sites whose neurons it mixes.
    """
    pending = dict.fromkeys(mixed, False)
    for each in operation.tensors:
        pending |= {site: pending.get(site, False) or one_number for site, one_number in each.origin.terms}
    if not pending:
        return origins, ()
    one_number = operation.outputs[0] == ()
    known: dict[Any, bool] = {}
    for site, was_one in pending.items():
        if was_one:
            continue
        meets = not all(_is_of(site, each.origin) for each in operation.tensors)
        if one_number or meets:
            known[site] = one_number and (site in mixed or not meets)
    kept = tuple((site, was_one or one_number) for site, was_one in pending.items())
    return tuple([each.but(terms=kept) for each in origins]), tuple(known.items())


def _is_of(site: Any, origin: Origin) -> bool:
    """Whether a tensor is stored, or was computed from the neurons of a site.

    Args:
        site: The site.
        origin: What the tensor is.
    """
    own = (*(each for each, _ in origin.terms), *(each.site for each in origin.carries))
    return origin.state in _STORED or site in own


def _tells_rows(operation: Operation, result: Origin) -> bool:
    """Whether data says by a call that is no layer's which expert's weights its result is, or which experts' rows."""
    if isinstance(result.picked, PickedMatrices):
        return True
    if result.units is None or result.units.experts is None or result.picks is not None:
        return False
    return all(each.origin.units is None or each.origin.units.call != result.units.call for each in operation.tensors)


def _name(function: Callable[..., Any]) -> str:
    return str(getattr(function, "__name__", function))


def _note(function: Callable[..., Any]) -> str:
    """Return how a function that is no layer reads a site."""
    return "added in" if function in _SUMS else f"read by `{_name(function)}`"


def _became_weight(tensor: Tensor, origin: Origin) -> bool:
    """Whether a distributed tensor was made a parameter after it was made, as FSDP does with the parts of a layer."""
    nameless = not origin.layer and origin.state in (CONSTANT, *_NAMELESS)
    return nameless and is_distributed(tensor) and isinstance(tensor, nn.Parameter)


def _stays_weight(output: Tensor, origin: Origin) -> bool:
    """Whether what a function returned is a weight still, or may turn out to be one; nothing is noted of it then.

    An optimizer changes a parameter in place. FSDP makes the parameters of a forward as views of one long parameter,
    of which the layer is found when the module runs. In a graph, a cast that changes nothing gives a fake parameter.

    Args:
        output: What it returned.
        origin: What its rule says of it.
    """
    if type(output) is not Tensor and isinstance(output, nn.Parameter):
        return not origin.layer or traced_modules() is None
    return _is_nameless(origin) and output._is_view()


def _is_nameless(origin: Origin) -> bool:
    """Whether a tensor may turn out to be a weight, because nothing else is known of it."""
    return not origin.layer and origin.state in _NAMELESS


def _local(dims: Dims, shape: Sequence[int]) -> Dims:
    """Return the dimensions of a rank's part of a tensor."""
    return tuple(
        () if size == 1 else ((size, next((stride for _, stride in dim if stride), 0) if has_units(dim) else 0),)
        for dim, size in zip(dims, shape, strict=True)
    )
