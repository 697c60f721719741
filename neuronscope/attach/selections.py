"""Find the sites of what the next layer reads of an activation: gated products, and what data selected of a layer.

A selection sets some neurons of a layer to zero and leaves the others, as sparse autoencoders do:

- a product with a mask: ``x * (x > threshold)`` (JumpReLU), ``relu(x) * (gate > 0)`` (gated);
- a choice by a mask: ``where(x > threshold, x, 0)``, ``x.masked_fill(x < threshold, 0)``;
- a top-k selection whose values are put back into zeros: ``zeros_like(x).scatter(-1, index, values)``.
"""

from __future__ import annotations

import re
import weakref
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

from neuronscope.attach.activations import Activation
from neuronscope.attach.origins import ACTIVATED, UNITS, Origin
from neuronscope.attach.tensor_map import TensorMap
from neuronscope.attach.torch_functions import spellings
from neuronscope.attach.unmeasured import PICKED

if TYPE_CHECKING:
    from neuronscope.attach.forward import ForwardContext
    from neuronscope.attach.site_finder import Call, SiteFinder

__all__ = ["SELECTING", "Selected", "Selections"]

_PRODUCTS = spellings("mul", "multiply", "mul_", "multiply_", "__mul__", "__rmul__", "__imul__")
_PICKING = spellings("topk", "sort", "kthvalue")
_GATHERING = spellings("gather")
_WRITING_BACK = spellings("scatter", "scatter_", "scatter_add", "scatter_add_")
_FILLING = spellings("where", "masked_fill", "masked_fill_")
_READING = spellings("embedding_bag")
#: All functions that may be a part of a selection, or a gated product.
SELECTING = _PRODUCTS | _PICKING | _GATHERING | _WRITING_BACK | _FILLING | _READING

_COMPARISON = re.compile(r"_*(lt|le|gt|ge|greater|greater_equal|less|less_equal|heaviside)_*")
_JUMP = Activation("jumprelu", "sparse")
_LARGEST = Activation("topk", "sparse")


class Selected(NamedTuple):
    """The call of a site that is no activation function.

    Attributes:
        call: The call.
        x: Its pre-activation; ``None`` if that is the one of its gate, or is not known.
    """

    call: Call
    x: Tensor | None = None


class Selections:
    """Finds gated products and selections.

    Args:
        sites: Finds the sites.
        forward: The forward that is running.
        call_of: Returns the last call of a site, ``None`` if there was none.
    """

    def __init__(self, sites: SiteFinder, forward: ForwardContext, call_of: Callable[[Any], Call | None]) -> None:
        self._sites = sites
        self._forward = forward
        self._call_of = call_of
        self._picked_from: TensorMap[weakref.ref[Tensor]] = TensorMap()  # of each index: from what it was picked

    def find(
        self, phase: str, function: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], y: Any, traced: bool = False
    ) -> Selected | None:
        """Return the call of a product or selection, ``None`` if the function gave none.

        Args:
            phase: The phase that it belongs to.
            function: One of :data:`SELECTING`.
            args: The positional arguments of its call.
            kwargs: The keyword arguments.
            y: What it returned.
            traced: Whether the tensors are the fake tensors of a graph.
        """
        if function in _PICKING:
            self._note_picked(args, y)
        elif function in _GATHERING:
            self._note_gathered(args, kwargs, y)
        elif not isinstance(y, Tensor) or not (y.is_floating_point() or y.is_complex()):
            return None  # as where two masks are joined
        elif function in _READING:
            self._note_sparse_reader(args)
        elif function in _WRITING_BACK:
            return self._put_back(phase, args, kwargs, y, traced)
        elif function in _FILLING:
            left = _left(args, kwargs)
            return None if left is None else self._masked(phase, *left, y, traced)
        elif len(args) == 2:
            for factor, other in (args, args[::-1]):
                if isinstance(factor, Tensor) and isinstance(other, Tensor) and other is not factor:
                    found = self._masked(phase, factor, other, y, traced)
                    if found is not None:
                        return found
            return self._sites.find_product(phase, args, y, traced)
        return None

    def _masked(self, phase: str, x: Tensor, mask: Tensor, y: Tensor, traced: bool) -> Selected | None:
        """Return the call of what a mask leaves of a tensor."""
        if x.shape != y.shape or mask.shape != y.shape:
            return None
        flow = self._forward.flow
        origin = flow.origin_before(x, y)
        before = flow.origin_before(mask, y)
        if origin.units is None or not origin.units.layer:
            return None
        if not _is_mask(mask, before, origin):
            self._note_switch(before, origin)
            return None
        gate = self._call_of(origin.site)
        if gate is not None:
            return self._derived(phase, gate, origin, y, traced, f"masked {gate.activation.name}")
        if any(name == ACTIVATED for _, name in origin.bends) or _is_mask(x, origin, origin):
            return None  # an activation came before that is not counted, or two masks are joined
        if x is y:
            return None  # it was changed in place, so that its pre-activation is gone
        return self._new(phase, _JUMP, x, x, y, traced)

    def _note_switch(self, mask: Origin, selected: Origin) -> None:
        """Note that a comparison of one layer's units switches those of another layer on and off, if it does.

        Args:
            mask: What the mask is.
            selected: What it selects from.
        """
        switch, units = mask.units, selected.units
        if switch is None or units is None or not switch.layer or switch.layer == units.layer or not _compares(mask):
            return
        if switch.size == units.size and switch.dims == units.dims:
            what = "and no activation that is known. Count the product: `scope.count()`"
            self._sites.unmeasured.note_unless_measured(
                switch.layer, f"it is only compared with something, which switches `{units.layer}` on and off, {what}"
            )
            self._sites.unmeasured.note_unless_measured(
                units.layer, f"a comparison of `{switch.layer}` switches its units on and off, {what}"
            )

    def _note_picked(self, args: tuple[Any, ...], y: Any) -> None:
        """Note from which tensor an index was picked."""
        if len(args) and isinstance(args[0], Tensor) and isinstance(y, (tuple, list)) and len(y) == 2:
            self._picked_from.put(y[1], weakref.ref(args[0]))

    def _note_gathered(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], y: Any) -> None:
        """Note from which tensor the values of what was picked are, as after a choice by absolute size."""
        index = kwargs.get("index", args[2] if len(args) > 2 else None)
        if args and isinstance(index, Tensor) and self._forward.flow.origin(y).picks is not None:
            self._picked_from.put(index, weakref.ref(args[0]))

    def _note_sparse_reader(self, args: tuple[Any, ...]) -> None:
        """Note that a layer reads the units that were picked without the zeros between them."""
        picks = self._forward.flow.origin(args[0]).picks if args and isinstance(args[0], Tensor) else None
        if picks is not None:
            self._sites.unmeasured.note(
                picks.units.layer,
                f"{PICKED}, and `embedding_bag` reads these alone, so that no tensor has all of them: only what comes "
                "before is counted. Put the values back into zeros, and count that: `scope.count()`",
            )

    def _put_back(
        self, phase: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], y: Tensor, traced: bool
    ) -> Selected | None:
        """Return the call of a top-k selection that was put back into zeros."""
        index = kwargs.get("index", args[2] if len(args) > 2 else None)
        source = None if index is None else self._picked_from.get(index)
        picks = self._forward.flow.origin(y).picks
        if picks is None or not picks.units.layer:
            return None
        self._sites.unmeasured.withdraw(picks.units.layer, PICKED)
        gate = self._call_of(picks.site)
        if gate is not None:
            return self._derived(phase, gate, self._forward.flow.origin(y), y, traced, f"topk {gate.activation.name}")
        return self._new(phase, _LARGEST, None if source is None else source(), y, y, traced)

    def _new(
        self, phase: str, activation: Activation, x: Tensor | None, like: Tensor, y: Tensor, traced: bool
    ) -> Selected | None:
        """Return the call of a selection that no counted activation came before.

        Args:
            phase: The phase.
            activation: The selection.
            x: Its pre-activation, if it is known.
            like: A tensor whose units lie as in the result.
            y: The result.
            traced: Whether the tensors are those of a graph.
        """
        call = self._sites.find(phase, self._forward.current_path, activation.name, activation, like, None, traced)
        if call is None:
            return None
        self._forward.flow.put(y, call.after)
        return Selected(call, x if x is not None and x.shape == y.shape else None)

    def _derived(
        self, phase: str, gate: Call, origin: Origin, y: Tensor, traced: bool, selection: str
    ) -> Selected | None:
        units = origin.units
        if units is None or gate.after.units is None or units.size != gate.after.units.size:
            return None  # a part of what the site gave: its gradients are not counted apart
        call = self._sites.find_derived(phase, gate, origin, units, y, traced, selection)
        return None if call is None else Selected(self._sites.with_owners(call, units))


def _is_mask(tensor: Tensor, origin: Origin, selected: Origin) -> bool:
    """Whether a tensor tells which units of the layer are above or below something: truth values, or 1 and 0 for them.

    Args:
        tensor: The tensor.
        origin: What it is.
        selected: What it selects from.
    """
    own, other = origin.units, selected.units
    if own is None or other is None or own.layer != other.layer or own.size != other.size or own.dims != other.dims:
        return False
    if not tensor.dtype.is_floating_point:
        return True
    return origin.state == UNITS and _compares(origin)


def _compares(origin: Origin) -> bool:
    """Whether what a tensor is was made of a layer's units by comparisons alone."""
    functions = {name for _, name in origin.bends if name != ACTIVATED}
    return bool(functions) and all(map(_COMPARISON.fullmatch, functions))


def _left(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Tensor, Tensor] | None:
    """Return what a call of ``where`` or ``masked_fill`` leaves, and the mask; ``None`` if it fills in no zeros."""
    values = [*args, *kwargs.values()]
    tensors = [each for each in values if isinstance(each, Tensor) and each.dim()]
    fills_zero = any(isinstance(each, (int, float)) and each == 0 for each in values)
    if len(values) != 3 or len(tensors) != 2 or not fills_zero:
        return None
    masks = [each for each in tensors if not each.dtype.is_floating_point]
    return None if len(masks) != 1 else (next(each for each in tensors if each is not masks[0]), masks[0])
