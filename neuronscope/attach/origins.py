"""Say what a tensor of a forward is: units of a layer, a weight, an input, or something that has no units any more."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar, NamedTuple

from neuronscope.attach.readers import Carried, aligned
from neuronscope.attach.units import Units, broadcast

__all__ = [
    "ACTIVATED",
    "CONSTANT",
    "ENDED",
    "LOST",
    "PICKED",
    "RAW",
    "ROWS",
    "SCORES",
    "UNITS",
    "UNKNOWN",
    "WEIGHT",
    "Operand",
    "Origin",
    "PickedMatrices",
    "PickedUnits",
    "combine",
]

#: Its elements are units of a layer.
UNITS = "units"
#: Its elements are no units: a dimension of units was summed, sorted, compared with another one, and so on.
ENDED = "ended"
#: It is a parameter, or was computed from parameters, buffers and numbers alone.
WEIGHT = "weight"
#: It was computed from buffers and numbers alone.
CONSTANT = "constant"
#: It is an input of the model, or was computed from inputs alone.
RAW = "raw"
#: Layers came before it, and which of their units its elements are is not known.
LOST = "lost"
#: Its rows are units of several layers, as of the experts that were picked for each of them.
ROWS = "rows"
#: Nothing is known of it.
UNKNOWN = "unknown"

#: Stands for the first index of positions that data picked.
PICKED = -1

#: Stands for the function where a known activation was applied to the units of a layer.
ACTIVATED = ""

#: Among activations, stands for a softmax: what it gives are scores, and no activation of them works on neurons.
SCORES = (0, "softmax")

# Which of several equally wide sources decides what the result is.
_PRECEDENCE = {state: place for place, state in enumerate((UNITS, ROWS, ENDED, LOST, UNKNOWN, RAW))}


class PickedMatrices(NamedTuple):
    """The stack of weights that data picked matrices from.

    Attributes:
        layer: Path of the layer of the stack.
        matrices: How many matrices the stack has.
        dims: Number of dimensions of the index: the first dimensions of what was picked.
    """

    layer: str
    matrices: int
    dims: int


#: The start, the end and the step of a slice of a weight.
Cut = tuple[int, int, int]


class PickedUnits(NamedTuple):
    """The units that data picked some of, such as the largest.

    Attributes:
        units: The units of the tensor they were picked from, as they lie in it.
        site: The site that gave it, if there was one.
    """

    units: Units
    site: Any


class Origin:
    """What a tensor is. Two origins are equal if they are one object; :meth:`of` returns the same one for equal facts.

    Attributes:
        state: One of :data:`UNITS`, :data:`ENDED` and the others of this module.
        upstream: The calls of layers that the tensor depends on: bit ``n`` stands for call number ``n``.
        units: Which units it holds, if its state is :data:`UNITS`.
        layer: Path of the layer of a weight; of the layer that gave the units, if nothing was mixed into them since; or
            of the layer some of whose units were picked by data, if its state is :data:`ENDED`. ``""`` for other
            tensors, and if that layer is not known.
        cuts: Of a part of a weight: the slice of each dimension, or ``None`` where it is whole.
        picked: What data selected from a stack of weights, so that one index is a unit of several layers. ``True`` if
            more than this is not known; ``False`` if nothing was selected.
        site: The site that gave the tensor, if nothing but its activation changed the values since.
        bends: Layers whose units a function was applied to that is not linear, and not known as an activation, each
            with the name of the function; and :data:`ACTIVATED` for a layer whose activation is known. The layer ``""``
            stands for those that came last.
        carries: The sites whose neurons the elements are or are multiplied by, and where each of these lies.
        picks: Of a tensor that was picked by data from the units of another one, such as the largest or their indices:
            these units, as they lie in the other one, and its site.
        zeros: Whether it is a constant of which every element is zero.
        turned: Whether it is a weight whose last two dimensions are exchanged.
        part: Which positions it holds, if some were taken: the dimension, the first index, their number and the step of
            each index or slice, in their order.
        begins: Whether it is what a layer gave for constants or weights alone, as for the first state of a recurrence.
        acted: The activations that were applied to it, or to what it was computed from, while that had no units any
            more (:data:`ENDED`): the calls that each depends on, as bits, and its name, ``""`` for a module. Or
            :data:`SCORES` alone.
        terms: The sites of which a function has mixed neurons on the way here, and whether one number was left.
        factors: Of a product, element by element, of several tensors that are neither weights nor constants: these.
        made: Whether it is weights that data made: each row of a weight, multiplied by units of a layer.
        unit_set: The calls, the first unit and the factors of the units, wherever they lie in the tensor; and the runs,
            if the units are not each unit of the layers once.
    """

    __slots__ = (
        *("bends", "carries", "cuts", "layer", "picked", "picks", "site", "state", "unit_set", "units", "upstream"),
        *("acted", "begins", "factors", "made", "part", "terms", "turned", "zeros"),
    )

    _known: ClassVar[dict[tuple[Any, ...], Origin]] = {}
    _MOST_KNOWN: ClassVar[int] = 100_000

    state: str
    upstream: int
    units: Units | None
    layer: str
    cuts: tuple[Cut | None, ...]
    picked: bool | PickedMatrices
    site: Any
    bends: tuple[tuple[str, str], ...]
    carries: tuple[Carried, ...]
    picks: PickedUnits | None
    zeros: bool
    turned: bool
    part: tuple[tuple[int, int, int, int], ...]
    begins: bool
    acted: tuple[tuple[int, str], ...]
    terms: tuple[tuple[Any, bool], ...]
    factors: tuple[Operand, ...]
    made: bool
    unit_set: tuple[Any, ...]

    @classmethod
    def of(
        cls,
        state: str,
        upstream: int = 0,
        *,
        units: Units | None = None,
        layer: str = "",
        cuts: tuple[Cut | None, ...] = (),
        picked: bool | PickedMatrices = False,
        site: Any = None,
        bends: tuple[tuple[str, str], ...] = (),
        carries: tuple[Carried, ...] = (),
        picks: PickedUnits | None = None,
        zeros: bool = False,
        turned: bool = False,
        part: tuple[tuple[int, int, int, int], ...] = (),
        begins: bool = False,
        acted: tuple[tuple[int, str], ...] = (),
        terms: tuple[tuple[Any, bool], ...] = (),
        factors: tuple[Operand, ...] = (),
        made: bool = False,
    ) -> Origin:
        """Return the origin with these attributes; see the class.

        Args:
            state: As in the class, and so are the others.
            upstream: Bits of calls.
            units: Units.
            layer: Path of a layer.
            cuts: Slices of a weight.
            picked: What data picked from a weight.
            site: A site.
            bends: Layers and functions.
            carries: Sites, and where their neurons lie.
            picks: Units and a site.
            zeros: Whether every element is zero.
            turned: Whether the last two dimensions are exchanged.
            part: Some of the positions.
            begins: Whether constants or weights alone led to it.
            acted: Activations.
            terms: Sites, and whether one number was left.
            factors: Tensors.
            made: Whether it is weights that data made.
        """
        flags = zeros, turned, part, begins, acted, terms, factors, made
        facts = (state, upstream, units, layer, cuts, picked, site, bends, carries, picks, *flags)
        found = cls._known.get(facts)
        if found is None:
            if len(cls._known) >= cls._MOST_KNOWN:
                cls._known.clear()
            found = cls._known[facts] = cls()
            found.state, found.upstream, found.units, found.layer = state, upstream, units, layer
            found.cuts, found.picked, found.site, found.bends = cuts, picked, site, bends
            found.carries, found.picks = carries, picks
            found.zeros, found.turned, found.part, found.begins, found.acted = flags[:5]
            found.terms, found.factors, found.made = flags[5:]
            found.unit_set = () if units is None else (units.call, units.first, units.order)
            if units is not None and units.explicit:
                found.unit_set += (units.runs,)
        return found

    def but(self, **changes: Any) -> Origin:
        """Return this origin with some attributes changed.

        Args:
            changes: The attributes and their new values.
        """
        facts = {name: getattr(self, name) for name in Origin.__slots__ if name != "unit_set"}
        return Origin.of(**{**facts, **changes})

    def as_layer(self) -> Origin:
        """Return the origin of a part of a weight as a layer of its own, as ``in_proj(0:8)``."""
        texts = [
            "" if cut is None else f"{cut[0]}:{cut[1]}" + (f":{cut[2]}" if cut[2] > 1 else "") for cut in self.cuts
        ]
        while texts and not texts[-1]:
            texts.pop()
        return self.but(
            layer=f"{self.layer}({','.join(text or ':' for text in texts)})" if texts else self.layer, cuts=()
        )

    def without_units(self, state: str = ENDED) -> Origin:
        """Return what the tensor becomes if its units cannot be followed, or are no units any more.

        Args:
            state: :data:`ENDED` or :data:`LOST`.
        """
        return self if self.state != UNITS else Origin.of(state, self.upstream)

    def after(self, activation: str) -> Origin:
        """Return what it is after an activation that is not counted, if it has no units any more.

        Args:
            activation: Name of a function, or ``""``.
        """
        if self.state != ENDED or SCORES in self.acted:
            return self
        return self.but(acted=tuple(dict.fromkeys((*self.acted, (self.upstream, activation)))))

    def inherit(self, operands: Sequence[Operand]) -> Origin:
        """Return this origin with the functions that were applied to what it was computed from.

        They end where the units do, as in a sum over a layer. Of masks, only those count that were computed from the
        same units, as in ``h * (h > 0)``. Activations of what has no units end where there are units again, as of a
        layer that they gate.

        Args:
            operands: What it was computed from.
        """
        if self.state in (ENDED, LOST):
            given = (each.origin.acted for each in operands if not each.boolean)
            acted = dict.fromkeys((*self.acted, *(key for keys in given for key in keys)))
            if len(acted) > len(self.acted):
                return self.but(acted=tuple(acted)).inherit(operands)
        if self.state not in (UNITS, ROWS, LOST):
            return self
        sources = (each.origin for each in operands if not each.boolean or each.origin.units == self.units)
        found = dict.fromkeys((*self.bends, *(bend for origin in sources for bend in origin.bends)))
        if self.site is not None and self.units is not None:
            own = self.units.layer.split("+")
            found = dict.fromkeys(bend for bend in found if bend[1] == ACTIVATED or bend[0] not in own)
        return self if len(found) == len(self.bends) else self.but(bends=tuple(found))

    def __repr__(self) -> str:
        known = {name: getattr(self, name) for name in Origin.__slots__ if name != "unit_set" and getattr(self, name)}
        return f"Origin({', '.join(f'{name}={value!r}' for name, value in known.items())})"


class Operand(NamedTuple):
    """A tensor among the arguments of an operator, or its result: what a rule needs to know of it.

    Attributes:
        shape: Its shape.
        origin: What it is.
        boolean: Whether its elements are truth values.
    """

    shape: tuple[int, ...]
    origin: Origin
    boolean: bool = False


_UNKNOWN = Origin.of(UNKNOWN)


def combine(operands: Sequence[Operand], shape: Sequence[int], *, bent: str = "", product: bool = False) -> Origin:
    """Return what an elementwise function of several tensors is.

    Of several sources, the widest decides, so that a gate that is broadcast never wins over what it gates. Nor does one
    that has no units win over units that it is multiplied with, as in ``h * mask`` with a mask of the largest. Those
    that are upstream of another source drop out: ``x + f(x)`` has the units of ``f``. Of parallel ones the first that
    was called decides, but for the first step of a recurrence: see :func:`_is_step`. Truth values are masks: they
    decide nothing beside numbers.

    Args:
        operands: The tensors.
        shape: The shape of the result.
        bent: Name of the function if it is not linear.
        product: Whether it multiplies.
    """
    data = [each for each in operands if each.origin.state not in (WEIGHT, CONSTANT)]
    if not data:
        return _of_weights(operands, len(shape))
    upstream = 0
    for each in data:
        upstream |= each.origin.upstream
    data = [each for each in data if not each.boolean] or data
    chosen = data[0] if len(data) == 1 else _source(data, product)
    origin, factors = chosen.origin, _factors(data) if product else ()
    if origin.units is None:
        lost = (("", bent),) if bent and origin.state == LOST else ()
        alone = origin if len(data) == 1 else _UNKNOWN
        state = LOST if origin.state == RAW and _writes_out_a_layer(operands, data, shape) else origin.state
        return Origin.of(state, upstream, layer=alone.layer, bends=lost, picks=alone.picks, factors=factors)
    if len(chosen.shape) > len(shape):
        return Origin.of(LOST, upstream)
    alike = all(each.origin.units == origin.units and each.origin.site == origin.site for each in data)
    site = origin.site if alike else None
    units = origin.units
    if tuple(chosen.shape) != tuple(shape):
        units = units._replace(dims=broadcast(units.dims, shape))
    bends: dict[tuple[str, str], None] = {}
    if bent and not site:
        bends = {(each.origin.units.layer, bent): None for each in data if each.origin.units is not None}
    elif product and not site:
        same = [each for each in data if each.origin.units == origin.units or _is_pick(each, chosen)]
        if len(same) > 1 and any(
            (units.layer, ACTIVATED) not in each.origin.bends for each in same if each.origin.units
        ):
            bends = {(units.layer, "mul"): None}  # h * h, or an activation that is written out: h * sigmoid(h)
    layer, carries = origin.layer if len(data) == 1 else "", _carried(data, units, product)
    made = any(each.origin.made for each in data) or (product and _writes_out_a_layer(operands, data, shape))
    return Origin.of(
        UNITS,
        upstream,
        units=units,
        layer=layer,
        site=site,
        bends=tuple(bends),
        carries=carries,
        part=origin.part,
        factors=factors,
        made=made,
    )


def _factors(data: Sequence[Operand]) -> tuple[Operand, ...]:
    """Return the tensors that were multiplied, if there are several; what they are products of is left out."""
    if len(data) < 2:
        return ()
    return tuple([each._replace(origin=each.origin.but(factors=())) if each.origin.factors else each for each in data])


def _carried(data: Sequence[Operand], units: Units, product: bool) -> tuple[Carried, ...]:
    """Return the sites whose neurons a result has, each at its own index.

    Args:
        data: The tensors that it was computed from.
        units: The units of the result.
        product: Whether they were multiplied, so that a neuron that is zero makes the product zero.
    """
    carries = data[0].origin.carries
    if all(each.origin.carries == carries for each in data[1:]):
        return carries
    if not product:
        return ()
    found: dict[Carried, None] = {}
    for each in data:
        own = each.origin.units
        if own is not None and own.size == units.size:
            same = own.which[1:] == units.which[1:]  # the same numbers
            found |= dict.fromkeys(each.origin.carries if same else aligned(each.origin.carries, own, units))
    return tuple(found)


def _is_pick(gate: Operand, source: Operand) -> bool:
    """Whether an operand marks those units of another one that data picked from it, as a mask of the largest does."""
    own = source.origin.units
    is_alike = own is not None and gate.origin.layer == own.layer and gate.shape == source.shape
    return is_alike and gate.origin.state == ENDED


def _source(data: Sequence[Operand], product: bool) -> Operand:
    """Return the operand whose units the result has."""
    widest = max(_size(each.shape) for each in data)
    wide = [each for each in data if _size(each.shape) == widest]
    if product:
        wide = [each for each in wide if each.origin.state == UNITS] or wide
    left = [each for each in wide if not any(_is_upstream(each.origin, other.origin) for other in wide)] or wide
    first = any(each.origin.begins for each in left)
    return min(
        left,
        key=lambda each: (
            _PRECEDENCE[each.origin.state],
            first and _is_step(each.origin),
            _first_call(each.origin),
        ),
    )


def _is_step(origin: Origin) -> bool:
    """Whether a tensor is a single step, or row, of what a layer gave.

    In ``ih(x)[:, t] + hh(h)``, the state ``h`` depends on earlier steps of ``ih(x)``, so the sum has the units of
    ``hh``. The first step, whose state is zeros or a weight, must have the same.
    """
    return any(number == 1 for _, _, number, _ in origin.part)


def _writes_out_a_layer(operands: Sequence[Operand], data: Sequence[Operand], shape: Sequence[int]) -> bool:
    """Whether each row of a weight is applied to each input, which may be summed next: a layer in disguise.

    A position embedding that is added to the input, or a mask that is learned, meets each number of it once.
    """
    matrix = any(each.origin.state == WEIGHT and sum(size > 1 for size in each.shape) > 1 for each in operands)
    return matrix and all(math.prod(each.shape) < math.prod(shape) for each in data)


def _is_upstream(origin: Origin, other: Origin) -> bool:
    if origin.units is None or (other.units is not None and other.units.call == origin.units.call):
        return False
    return all(other.upstream >> call & 1 for call in origin.units.call)


def _first_call(origin: Origin) -> int:
    return 0 if origin.units is None else min(origin.units.call)


def _size(shape: Iterable[int]) -> int:
    size = 1
    for length in shape:
        size *= length
    return size


def _of_weights(operands: Sequence[Operand], rank: int) -> Origin:
    """Return the origin of what was computed from weights, with a number of dimensions; a part of one stays a part."""
    weights = [each for each in operands if each.origin.state == WEIGHT]
    if not weights:
        return Origin.of(CONSTANT)
    named = next((each for each in weights if each.origin.layer), weights[0])
    origin = named.origin if len(named.shape) == rank else named.origin.as_layer()
    picked = _picked(weights, rank)
    return Origin.of(WEIGHT, layer=origin.layer, cuts=origin.cuts, picked=picked, turned=origin.turned)


def _picked(weights: Sequence[Operand], rank: int) -> bool | PickedMatrices:
    """Return what data picked, of several weights that were computed from another."""
    found = [each for each in weights if each.origin.picked]
    if len(found) > 1 or any(len(each.shape) != rank for each in found):
        return True
    return found[0].origin.picked if found else False
