"""Follow a forward: of which earlier tensor is each tensor an affine function, and through which layers.

A tensor that is no affine function of an earlier one is a *source*: the network's input, the output of a nonlinear
function, a sum of two sources. All that is affine in one source is one affine map of it.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from neuronscope.attach.examples import all_tensors
from neuronscope.attach.layer_names import LayerNames
from neuronscope.attach.neuron_flow import NeuronFlow
from neuronscope.attach.origins import CONSTANT, WEIGHT
from neuronscope.attach.read_outs import reads_out
from neuronscope.attach.tensor_map import TensorMap, nested_tensors
from neuronscope.linear.affine_functions import Function, Kind, attention_arguments, is_norm, kind_of_call

__all__ = ["CONVOLUTION", "EACH_POSITION", "WHOLE", "Affine", "AffineFlow", "Made", "Passed", "Stretch"]

#: The last dimension is mapped, in the same way at each position.
EACH_POSITION = "each position"
#: Channels are mapped by a convolution.
CONVOLUTION = "convolution"
#: All elements of an example are mapped together.
WHOLE = "whole"

_DATA = Tensor.data.__get__  # type: ignore[attr-defined]
_NEVER_ALIKE = itertools.count(-1, -1)

_Args = tuple[Any, ...]
_Kwargs = Mapping[str, Any]


class Made(NamedTuple):
    """Says where a tensor was made."""

    call: int  # number of the call of a torch function in the forward; −1 for the inputs, −2 if it was no call
    #: Number of the tensor among what the call returned, or among the inputs or the tensors that no call gave.
    output: int


class Passed(NamedTuple):
    """A layer, or an activation that acts linear, between a source and a tensor."""

    call: int  # number of its call in the forward
    name: str  # path of the layer, or name of the activation's site
    kind: str  # ``layer``, ``norm`` or ``activation``


class Affine(NamedTuple):
    """Says of which source a tensor is an affine function."""

    source: Made  # where the source was made
    passed: tuple[Passed, ...]  # what lies between, in the order of the calls
    end: Made  # where the output of the last layer was made
    places: str = ""  # :data:`EACH_POSITION`, :data:`CONVOLUTION` or :data:`WHOLE`; ``""`` if no layer was passed
    moved: bool = False  # whether elements were moved since the last layer
    #: Number of the call in which attention mixed positions, by weights that depend on the data; −1 if none.
    mixing: int = -1


class Stretch(NamedTuple):
    """Two or more layers that compute one affine map."""

    affine: Affine
    source_name: str  # what the source is, in words

    @property
    def layers(self) -> tuple[str, ...]:
        """The layers, norms included, in the order of their calls."""
        return tuple(each.name for each in self.affine.passed if each.kind != "activation")

    @property
    def activations(self) -> tuple[str, ...]:
        """The activations that act linear."""
        return tuple(each.name for each in self.affine.passed if each.kind == "activation")

    @property
    def only_folds(self) -> bool:
        """Whether all of its layers but one are norms, which can be folded into that one."""
        return sum(each.kind == "layer" for each in self.affine.passed) < 2


class _FunctionCall(NamedTuple):
    """A call of a torch function, at least one argument of which depends on the input."""

    function: Function
    args: _Args
    kwargs: _Kwargs
    kind: Kind
    tensors: Sequence[Tensor]  # all tensors among its arguments
    data: Sequence[Affine]  # what those of them are that depend on the input
    passes: Passed  # the layer or the activation that the call is
    output: Tensor  # the first tensor that it returned


class AffineFlow:
    """Tracks of which source each tensor of a forward is an affine function, with the named activations as linear.

    ``reads_out``: the program read numbers that depend on the input, so it may compute otherwise for another input.
    """

    def __init__(self, model: nn.Module, acting_linear: Collection[str] = ()) -> None:
        self.neurons = NeuronFlow(LayerNames(model))
        self.reads_out = False
        self._acting_linear = acting_linear
        self._model = model
        self._known: TensorMap[Affine | None] = TensorMap()  # None: a constant
        self._versions: TensorMap[int] = TensorMap()
        self._sources: dict[Made, str] = {}
        self._found: dict[tuple[Made, tuple[Passed, ...]], Stretch] = {}
        self._site_calls: dict[str, int] = {}
        self._call = -1
        self._strays = 0

    def begin(self, inputs: Any) -> None:
        """Begin a forward on these arguments of the model, nested."""
        for facts in (self._known, self._versions, self._sources, self._found, self._site_calls, self.neurons):
            facts.clear()
        self._call = -1
        self._strays = 0
        for held in (*self._model.parameters(), *self._model.buffers()):
            self._put(held, None)
        self.neurons.note_inputs(inputs)
        for number, tensor in enumerate(all_tensors(inputs)):
            self._put_source(tensor, Made(-1, number), "the input")

    def end(self, outputs: Any) -> list[Stretch]:
        """End a forward that returned these outputs, nested, and return its stretches."""
        for tensor in all_tensors(outputs):
            self.note_writes(tensor)
            self._close([self._known.get(tensor)])
        found = list(self._found.values())
        return [each for each in found if not any(_is_part(each, other) for other in found)]

    def name_of(self, function: Function, tensor: Tensor) -> str:
        """Return the name of an activation's site before it runs: ``fc/relu``, and ``fc/relu#1`` for the next one.

        Args:
            function: The activation function.
            tensor: Its input.
        """
        units = self.neurons.origin(tensor).units
        name = f"{'(unknown)' if units is None else units.layer}/{function.__name__.rstrip('_')}"
        number = self._site_calls[name] = self._site_calls.get(name, -1) + 1
        return f"{name}#{number}" if number else name

    def depends_on_input(self, tensor: Tensor) -> bool:
        """Whether a tensor is no constant."""
        return self._lookup(tensor) is not None

    def note_writes(self, values: Any) -> None:
        """Note which tensors were written into, as by ``h[0] = x``, since a call gave them.

        Call it before each call with what the call is given, nested.
        """
        for tensor in nested_tensors(values):
            version = self._versions.get(tensor)
            if version is not None and version != _version(tensor):
                self._close([self._known.get(tensor)])
                self._put_stray(tensor, "a tensor that was written into")

    def follow(self, function: Function, args: _Args, kwargs: _Kwargs, result: Any, site: str = "") -> None:
        """Note what a call gave.

        Args:
            function: The function.
            args: The positional arguments of the call.
            kwargs: The keyword arguments of the call.
            result: What it returned.
            site: The name of the site if the call is of an activation.
        """
        self._call += 1
        called = len(self.neurons.layers)
        tensors = list(nested_tensors((args, dict(kwargs))))
        data = [affine for affine in map(self._lookup, tensors) if affine is not None]
        self.neurons.follow(function, args, kwargs, result)
        layer = self.neurons.layers[-1] if len(self.neurons.layers) > called else ""
        outputs = list(nested_tensors(result))
        if function == _DATA:  # what is written into it shows in no version
            self.reads_out = True
        if data and not self.reads_out:
            masks = any(each.dtype in (torch.bool, torch.uint8) and self._lookup(each) is not None for each in tensors)
            self.reads_out = reads_out(function, args, result, gives_tensors=bool(outputs), masks=masks)
        if not outputs:
            return
        if not data:
            for tensor in outputs:
                self._put(tensor, None)
            return
        passes = Passed(self._call, site or layer, "activation" if site else "norm" if is_norm(function) else "layer")
        call = _FunctionCall(
            function, args, kwargs, kind_of_call(function, args, kwargs), tensors, data, passes, outputs[0]
        )
        numbers = all(each.is_floating_point() or each.is_complex() for each in outputs)  # integers are rounded
        found = self._affine(call) if numbers else None
        self._close([affine for affine in data if found is None or affine.source != found.source])
        name = passes.name or f"`{function.__name__}`"
        if call.kind == Kind.MOVING:
            name = self._sources.get(data[0].source, name)
        for number, tensor in enumerate(outputs):
            if found is None:
                self._put_source(tensor, Made(self._call, number), name)
            elif found.end.call == self._call:
                self._put(tensor, found._replace(end=Made(self._call, number)))
            else:
                self._put(tensor, found)

    def _affine(self, call: _FunctionCall) -> Affine | None:
        """Return of what the result of a call is an affine function; ``None`` if it is a source."""
        kind, first = call.kind, self._lookup(call.tensors[0])
        if kind == Kind.ACTIVATION:
            linear = first is not None and call.passes.name in self._acting_linear
            return first._replace(passed=(*first.passed, call.passes)) if first is not None and linear else None
        if kind in (Kind.SUM, Kind.JOIN):
            return self._sum(call.data, joined=kind == Kind.JOIN)
        if kind == Kind.MATRIX_PRODUCT and len(call.data) > 1:
            return self._mixed(call)
        if kind == Kind.FUSED_ATTENTION:
            return self._fused_attention(call)
        if len(call.data) > 1 or (first is None and kind not in (Kind.PRODUCT, Kind.MATRIX_PRODUCT)):
            return None
        (only,) = call.data
        if kind in (Kind.PRODUCT, Kind.QUOTIENT):
            factors = [each for each in call.tensors if self._lookup(each) is None]
            alike = all(_is_alike(each, call.output.dim(), only.places) for each in factors)
            return only if alike or not only.passed else only._replace(places=WHOLE)
        if kind == Kind.IN_PLACE_ORDER:
            return only
        if kind == Kind.MOVING:
            return only._replace(moved=True) if only.passed else None
        if kind == Kind.LAYER or (kind == Kind.MATRIX_PRODUCT and call.passes.name):
            return self._through_layer(only, call)
        return None

    def _through_layer(self, affine: Affine, call: _FunctionCall) -> Affine:
        """Return what the output of a layer is, given what its input is."""
        first_factor = len(call.tensors) - 2 if call.function.__name__.startswith("add") else 0
        if self._lookup(call.tensors[first_factor]) is None:  # its input is the second factor, as in ``weight @ x``
            own = WHOLE
        elif "conv" in call.function.__name__ or (is_norm(call.function) and call.output.dim() > 2):
            own = CONVOLUTION
        else:
            own = EACH_POSITION
        places = own if not affine.places or (affine.places == own and not affine.moved) else WHOLE
        passed = (*affine.passed, call.passes)
        return affine._replace(passed=passed, places=places, moved=False, end=Made(self._call, 0))

    def _sum(self, data: Sequence[Affine], *, joined: bool) -> Affine | None:
        """Return what a sum is, or several tensors that are put side by side, given what the terms are."""
        head = data[0]
        if any(each.source != head.source or each.mixing != head.mixing for each in data):
            return None
        passed = tuple(sorted({step for each in data for step in each.passed}))
        if not passed:
            return None if joined else head
        if len(data) == 1 and not joined:
            return head
        alike = len({each.places for each in data if each.places}) == 1 and not any(each.moved for each in data)
        places = head.places if len(data) == 1 else next(each.places for each in data if each.places)
        return head._replace(
            passed=passed, places=places if alike and not joined else WHOLE, moved=False, end=Made(self._call, 0)
        )

    def _mixed(self, call: _FunctionCall) -> Affine | None:
        """Return what attention gives: an affine function of its values while the weights of the mixture stay."""
        if call.function.__name__ == "scaled_dot_product_attention":
            values = call.args[2] if len(call.args) > 2 else call.kwargs["value"]
        elif len(call.tensors) == 2 and self._mixes_positions_only(call):
            values = call.tensors[1]
        else:
            return None
        affine = self._lookup(values)
        if affine is None or not affine.passed or affine.mixing >= 0:
            return None
        self._close([self._lookup(each) for each in call.tensors if each is not values])
        return affine._replace(mixing=self._call, moved=True)

    def _mixes_positions_only(self, call: _FunctionCall) -> bool:
        """Whether each unit of a product of two matrices is a sum over the same unit of the second factor."""
        values, output = call.tensors[1], call.output
        if call.function is torch.einsum:
            equation = call.args[0] if isinstance(call.args[0], str) else ""
            read, _, kept = equation.replace(" ", "").partition("->")
            if not kept or set(read.split(",")[1]) <= set(kept):  # nothing of it is added up: a gate
                return False
        given, units = self.neurons.origin(values).units, self.neurons.origin(output).units
        alike = given is not None and units is not None and given.call == units.call
        return alike and output.shape[-1] == values.shape[-1]

    def _fused_attention(self, call: _FunctionCall) -> Affine | None:
        """Return what attention with its projections gives: the value and the output projection lie in it."""
        given = attention_arguments(call.args, call.kwargs)
        affine = self._lookup(given["value"])
        weight = given.get("v_proj_weight") if given.get("use_separate_proj_weight") else given["in_proj_weight"]
        if affine is None or weight is None or affine.mixing >= 0:
            return None
        width = given["embed_dim_to_check"]
        name = self.neurons.origin(weight).layer
        value_projection = name if weight.shape[0] == width else f"{name}({2 * width}:{3 * width})"
        return affine._replace(
            passed=(*affine.passed, Passed(self._call, value_projection, "layer"), call.passes),
            places=WHOLE,
            mixing=self._call,
            moved=False,
            end=Made(self._call, 0),
        )

    def _lookup(self, tensor: Tensor) -> Affine | None:
        """Return what a tensor is; what no call gave is a constant if it is held by the model, else a source."""
        entry = self._known.entries.get(id(tensor))
        if entry is not None and entry[0]() is tensor:
            return entry[1]
        if isinstance(tensor, nn.Parameter) or self.neurons.origin(tensor).state in (WEIGHT, CONSTANT):
            return None
        return self._put_stray(tensor, "a tensor that no torch function gave")

    def _put(self, tensor: Tensor, affine: Affine | None) -> None:
        self._known.put(tensor, affine)
        self._versions.put(tensor, _version(tensor))

    def _put_stray(self, tensor: Tensor, name: str) -> Affine:
        """Note a source that no call gave; ``name`` says in words what it is."""
        self._strays += 1
        return self._put_source(tensor, Made(-2, self._strays), name)

    def _put_source(self, tensor: Tensor, made: Made, name: str) -> Affine:
        self._sources[made] = name
        affine = Affine(made, (), made)
        self._put(tensor, affine)
        return affine

    def _close(self, read: Collection[Affine | None]) -> None:
        """Note the stretches that end because what they give is read by something that is not affine in it."""
        for affine in read:
            if affine is None or sum(each.kind != "activation" for each in affine.passed) < 2:
                continue
            passed = affine.passed
            while passed[-1].kind == "activation":
                passed = passed[:-1]
            stretch = Stretch(affine._replace(passed=passed), self._sources.get(affine.source, ""))
            self._found.setdefault((affine.source, passed), stretch)


def _version(tensor: Tensor) -> int:
    """Return a number that changes if a tensor, or a view of it, is written into.

    Inference mode keeps no such number: then each call returns another one, as if it were always written into.
    """
    return next(_NEVER_ALIKE) if tensor.is_inference() else tensor._version


def _is_part(stretch: Stretch, other: Stretch) -> bool:
    own, whole = stretch.affine, other.affine
    return own.source == whole.source and set(own.passed) < set(whole.passed)


def _is_alike(factor: Tensor, dimensions: int, places: str) -> bool:
    """Whether a constant factor of a product with so many dimensions is the same at all positions."""
    units = {EACH_POSITION: dimensions - 1, CONVOLUTION: 1}.get(places, -1)
    sizes = (1,) * (dimensions - factor.dim()) + tuple(factor.shape)
    return all(size == 1 or dim == units for dim, size in enumerate(sizes))
