"""What the rule of each torch function claims of units is what the function does with them.

Two ways to try a claim. A function that moves elements is run on a tensor whose elements are the numbers of their
units: what it claims must be what came out. Any other function is run twice, and one unit of the source is changed
between the runs: only elements that are claimed to be that unit may change. A rule may answer that units are lost.
"""

from __future__ import annotations

import ast
import importlib
import math
import pkgutil
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from neuronscope.attach import operators, unit_rules
from neuronscope.attach.layer_names import LayerNames
from neuronscope.attach.neuron_flow import NeuronFlow
from neuronscope.attach.origins import CONSTANT, LOST, RAW, UNITS, WEIGHT, Origin
from neuronscope.attach.torch_functions import spellings
from neuronscope.attach.unit_rules import elementwise_rules
from neuronscope.attach.unit_rules.operation import end
from neuronscope.attach.units import Units, has_rows, place, reshape, select, slice_dim

#: Some of torch's functions warn that they are new, or old.
pytestmark = pytest.mark.filterwarnings("ignore")

Draw = Callable[[Any], Any]
#: Numbers of layer ``b``'s units begin here, so that no two units of the layers ``a`` and ``b`` have one number.
OF_B = 1000
UNWRITTEN = -1.0

TRIED = settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck), database=None)


class Following(TorchFunctionMode):
    """Tells a flow what is called."""

    def __init__(self) -> None:
        super().__init__()
        self.flow = NeuronFlow(LayerNames(nn.Module()))
        self.flow.layers.extend(["a", "b", "c"])

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        with torch._C.DisableTorchFunction():
            self.flow.follow(func, args, kwargs or {}, output)
        return output


def numbers(units: Units, shape: Sequence[int]) -> Tensor:
    """The number of the unit that each element is said to be."""
    found = torch.full((), units.first, dtype=torch.int64)
    for dim in units.dims:
        steps = [0]
        for size, stride in dim:
            steps = [step + index * stride for step in steps for index in range(size)]
        found = found.unsqueeze(-1) + torch.tensor(steps, dtype=torch.int64)
    assert found.shape == tuple(shape)
    every = [
        unit + (OF_B if layer == "b" else 0)
        for layer, start, stop, step in units.runs
        for unit in range(start, stop, step)
    ]
    return torch.tensor(every)[found].double()


def numbers_of_rows(mode: Following, units: Units, shape: Sequence[int]) -> Tensor:
    """The number of the unit that each element is said to be, where each row may have the units of another layer."""
    if units.experts is None:
        return numbers(units, shape)
    (dim,) = (place for place, each in enumerate(units.dims) if has_rows(each))
    positions_only = tuple(((each[0][0], 0),) if has_rows(each) else each for each in units.dims)
    found = numbers(units._replace(dims=positions_only), shape)
    parts = mode.flow.expert_rows.owners(units)
    layers = [units.experts.layers[number] for number, size in parts for _ in range(size)]
    of_b = torch.tensor([OF_B if layer == "b" else 0 for layer in layers], dtype=torch.float64)
    return found + of_b.view([-1 if place == dim else 1 for place in range(len(shape))])


def integers(low: int, high: int) -> st.SearchStrategy[int]:
    return st.integers(low, high)


def regroup(draw: Draw, shape: Sequence[int]) -> list[int]:
    """Another shape of as many elements."""
    factors = [factor for size in shape for factor in _factors(size)]
    found = [1] * draw(integers(0, 1))
    for factor in factors:
        if found and draw(st.booleans()):
            found[-1] *= factor
        else:
            found.append(factor)
    return found


def _factors(size: int) -> list[int]:
    for prime in (2, 3, 5, 7):
        if size % prime == 0 and size > prime:
            return [prime, *_factors(size // prime)]
    return [size]


def draw_units(draw: Draw, call: int = 0, layer: str = "a", ranks: tuple[int, int] = (1, 4)) -> tuple[Units, list[int]]:
    """Units of a layer in a random layout, and the shape of their tensor."""
    rank = draw(integers(*ranks))
    shape = [draw(st.sampled_from([1, 2, 3, 4])) for _ in range(rank)]
    how_many = min(rank, draw(st.sampled_from([1, 1, 1, 2])))
    unit_dims = sorted(draw(st.permutations(range(rank)))[:how_many])
    width = math.prod(shape[dim] for dim in unit_dims)
    units = Units((call,), layer, ((layer, 0, width, 1),), 0, place(shape, unit_dims))
    for _ in range(draw(integers(0, 2))):
        units, shape = _changed(draw, units, shape)
    assume(ranks[0] <= len(shape) <= ranks[1])
    return units, shape


def _changed(draw: Draw, units: Units, shape: list[int]) -> tuple[Units, list[int]]:
    """The units after a slice, a selection, a view or a permutation."""
    way = draw(st.sampled_from(["slice", "select", "view", "permute"]))
    if way == "view":
        after = regroup(draw, shape)
        dims = reshape(units.dims, after)
        return (units, shape) if dims is None else (units._replace(dims=dims), after)
    if way == "permute":
        order = draw(st.permutations(range(len(shape))))
        return units._replace(dims=tuple(units.dims[dim] for dim in order)), [shape[dim] for dim in order]
    if not shape:
        return units, shape
    dim = draw(integers(0, len(shape) - 1))
    if way == "select":
        index = draw(integers(0, shape[dim] - 1))
        return select(units, dim, index), shape[:dim] + shape[dim + 1 :]
    start = draw(integers(0, shape[dim] - 1))
    step = draw(st.sampled_from([1, 1, 2]))
    length = len(range(start, draw(integers(start + 1, shape[dim])), step))
    found = slice_dim(units, dim, start, length, step)
    return (units, shape) if found is None else (found, [*shape[:dim], length, *shape[dim + 1 :]])


def upstream_of(units: Units) -> int:
    return sum(1 << call for call in units.call)


def source(mode: Following, units: Units, tensor: Tensor) -> Tensor:
    """Tell the flow that a tensor holds these units."""
    mode.flow.put(tensor, Origin.of(UNITS, upstream_of(units), units=units))
    return tensor


def spell(draw: Draw, given_args: Sequence[tuple[str, Any]]) -> tuple[list[Any], dict[str, Any]]:
    """Some arguments by position, and the others by name."""
    by_place = draw(integers(0, len(given_args)))
    if any(not name for name, _ in given_args):
        by_place = len(given_args)
    return [value for _, value in given_args[:by_place]], dict(given_args[by_place:])


def outputs_of(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else [each for each in result if isinstance(each, Tensor)]


def try_until_claimed(tried: Callable[[], None], claimed: Sequence[int]) -> None:
    """Draw cases until a rule has claimed several units: one that always answers that they are lost says nothing."""
    for _ in range(60):
        tried()
        if max(claimed, default=0) > 1:
            return
    raise AssertionError("the rule never claimed units")


# Functions that move elements: each draws the arguments after the tensor, as pairs of name and value.


def dim_of(draw: Draw, x: Tensor) -> int:
    return draw(integers(-x.dim(), x.dim() - 1))


def dims_of(draw: Draw, x: Tensor, least: int = 1) -> tuple[int, ...]:
    order = draw(st.permutations(range(x.dim())))[: draw(st.sampled_from([least, least, x.dim()]))]
    return tuple(dim - x.dim() if draw(st.booleans()) else dim for dim in order)


def two_dims(draw: Draw, x: Tensor, names: tuple[str, str] = ("dim0", "dim1")) -> list[tuple[str, Any]]:
    return [(names[0], dim_of(draw, x)), (names[1], dim_of(draw, x))]


def unflattened(draw: Draw, x: Tensor) -> list[tuple[str, Any]]:
    dim = dim_of(draw, x)
    return [("dim", dim), ("sizes", tuple(regroup(draw, [x.shape[dim]])) or (1,))]


def flattened(draw: Draw, x: Tensor) -> list[tuple[str, Any]]:
    start = draw(integers(0, x.dim() - 1))
    return [("start_dim", start), ("end_dim", draw(integers(start, x.dim() - 1)) - draw(st.sampled_from([0, x.dim()])))]


def moved(draw: Draw, x: Tensor) -> list[tuple[str, Any]]:
    sources = dims_of(draw, x)
    targets = draw(st.permutations(range(x.dim())))[: len(sources)]
    if len(sources) == 1 and draw(st.booleans()):
        return [("source", sources[0]), ("destination", targets[0])]
    return [("source", sources), ("destination", tuple(targets))]


def expanded(draw: Draw, x: Tensor) -> tuple[int, ...]:
    return (
        *draw(st.sampled_from([(), (2,), (2, 3)])),
        *(draw(st.sampled_from([1, 3])) if size == 1 else size for size in x.shape),
    )


def repeats(draw: Draw, x: Tensor) -> tuple[int, ...]:
    return tuple(draw(st.sampled_from([1, 1, 2])) for _ in range(x.dim() + draw(integers(0, 1))))


def each_repeated(draw: Draw, x: Tensor) -> list[tuple[str, Any]]:
    if draw(integers(0, 3)) == 0:
        return [("repeats", draw(integers(1, 2)))]
    dim = dim_of(draw, x)
    counts = torch.tensor([draw(integers(0, 2)) for _ in range(x.shape[dim])])
    counts[0] += x.shape[dim] - counts.sum() if counts.sum() < x.shape[dim] else 0
    return [("repeats", draw(st.sampled_from([1, 2, counts]))), ("dim", dim)]


def rolled(draw: Draw, x: Tensor) -> list[tuple[str, Any]]:
    if draw(integers(0, 3)) == 0:
        return [("shifts", draw(integers(1, 2)))]
    dims = dims_of(draw, x)
    if len(dims) == 1 and draw(st.booleans()):
        return [("shifts", 1), ("dims", dims[0])]
    return [("shifts", tuple(draw(integers(1, 2)) for _ in dims)), ("dims", dims)]


def rotated(draw: Draw, x: Tensor) -> list[tuple[str, Any]]:
    assume(x.dim() > 2)
    first, second = draw(st.permutations(range(x.dim())))[:2]
    return [("k", draw(integers(0, 3))), ("dims", (first, second - x.dim()))]


def windows(draw: Draw, x: Tensor) -> list[tuple[str, Any]]:
    dim = dim_of(draw, x)
    return [("dimension", dim), ("size", draw(integers(1, x.shape[dim]))), ("step", draw(integers(1, 2)))]


def part_index(draw: Draw, size: int) -> Any:
    start = draw(integers(0, size - 1))
    by_number = [start, start - size, torch.tensor(start)]
    by_slice = [
        slice(None),
        slice(start, None),
        slice(None, start + 1),
        slice(start, None, 2),
        slice(start - size, None),
    ]
    by_data = [[start, 0], torch.tensor([start, 0]), torch.tensor([[0, start]]), torch.arange(size) % 2 == 0]
    return draw(st.sampled_from([*by_number, *by_slice, *by_slice, *by_data]))


def indexed(draw: Draw, x: Tensor) -> list[tuple[str, Any]]:
    parts: list[Any] = []
    dims = draw(integers(0, x.dim()))
    for size in x.shape[:dims]:
        if draw(integers(0, 5)) == 0:
            parts.append(None)
        parts.append(part_index(draw, size))
    if draw(integers(0, 3)) == 0:
        rest = draw(integers(dims, x.dim()))
        parts.append(...)
        parts += [part_index(draw, size) for size in x.shape[rest:]]
    if draw(integers(0, 3)) == 0:
        size = x.shape[: draw(integers(1, x.dim()))]
        return [("", torch.arange(math.prod(size)).reshape(size) % 2 == 0)]
    if len(parts) == 1 and draw(st.booleans()):
        return [("", parts[0])]
    return [("", tuple(parts))]


def sliced(draw: Draw, x: Tensor) -> list[tuple[str, Any]]:
    start, size = draw(integers(0, 2)), draw(integers(1, 3))
    return [("dim", dim_of(draw, x)), ("start", start), ("end", start + size), ("step", draw(integers(1, 2)))]


def indexed_by_list(draw: Draw, x: Tensor) -> list[tuple[str, Any]]:
    """The index of ``aten.index``: a list of tensors, and ``None`` for a whole dimension."""
    parts = [
        draw(st.sampled_from([None, torch.tensor([size - 1, 0]), torch.arange(size) % 2 == 0])) for size in x.shape
    ]
    return [("", parts[: draw(integers(1, x.dim()))])]


def selected(draw: Draw, x: Tensor) -> list[tuple[str, Any]]:
    dim = dim_of(draw, x)
    return [("dim", dim), ("index", draw(integers(-x.shape[dim], x.shape[dim] - 1)))]


def narrowed(draw: Draw, x: Tensor) -> list[tuple[str, Any]]:
    dim = dim_of(draw, x)
    start = draw(integers(0, x.shape[dim] - 1))
    length = draw(integers(1, x.shape[dim] - start))
    return [("dim", dim), ("start", start - draw(st.sampled_from([0, x.shape[dim]]))), ("length", length)]


def split_sizes(draw: Draw, size: int) -> list[int]:
    first = draw(integers(0, size))
    return [first, size - first]


def split(draw: Draw, x: Tensor) -> list[tuple[str, Any]]:
    dim = dim_of(draw, x)
    how = draw(st.sampled_from([1, 2, 3, split_sizes(draw, x.shape[dim])]))
    return [("split_size_or_sections" if draw(st.booleans()) else "", how), ("dim", dim)]


def index_along(draw: Draw, x: Tensor) -> list[tuple[str, Any]]:
    dim = dim_of(draw, x)
    index = [draw(integers(0, x.shape[dim] - 1)) for _ in range(draw(integers(1, 4)))]
    return [("dim", dim), ("index", torch.tensor(index))]


def gathered(draw: Draw, x: Tensor) -> list[tuple[str, Any]]:
    dim = dim_of(draw, x)
    shape = [draw(st.sampled_from([size, size, max(1, size - 1)])) for size in x.shape]
    index = torch.arange(math.prod(shape)).reshape(shape) * 7 % x.shape[dim]
    return [("dim", dim), ("index", index)]


def reduced(draw: Draw, x: Tensor) -> list[tuple[str, Any]]:
    if draw(integers(0, 5)) == 0:
        return []
    dims: Any = dims_of(draw, x)
    dims = dims[0] if len(dims) == 1 and draw(st.booleans()) else dims
    return [("dim", dims), ("keepdim", draw(st.booleans()))]


def reduced_one(draw: Draw, x: Tensor) -> list[tuple[str, Any]]:
    return [("dim", dim_of(draw, x)), ("keepdim", draw(st.booleans()))]


def padded(draw: Draw, x: Tensor) -> list[tuple[str, Any]]:
    amounts = tuple(draw(st.sampled_from([0, 0, 1, 2])) for _ in range(2 * draw(integers(1, x.dim()))))
    if draw(st.booleans()) and x.shape[-1] > 1:
        amounts = (1, -1, *amounts[2:])
    return [("pad", amounts), ("mode", "constant"), ("value", UNWRITTEN)]


def pooled(draw: Draw, x: Tensor, dims: int) -> list[tuple[str, Any]]:
    assume(x.dim() in (dims + 1, dims + 2))
    kernel = draw(integers(1, min(2, *x.shape[-dims:])))
    return [("kernel_size", kernel), ("stride", draw(integers(1, 2)))]


def pooled_to(draw: Draw, x: Tensor, dims: int) -> list[tuple[str, Any]]:
    assume(x.dim() in (dims + 1, dims + 2))
    size = tuple(draw(integers(1, 3)) for _ in range(dims))
    return [("output_size", size)]


def fractional(draw: Draw, x: Tensor, dims: int) -> list[tuple[str, Any]]:
    assume(x.dim() in (dims + 1, dims + 2) and min(x.shape[-dims:]) > 1)
    return [("kernel_size", 1), ("output_size", (1,) * dims)]


def resized_to(draw: Draw, x: Tensor) -> list[tuple[str, Any]]:
    assume(x.dim() >= 3)
    if draw(st.booleans()):
        return [("size", tuple(draw(integers(1, 6)) for _ in x.shape[2:]))]
    return [("size", None), ("scale_factor", draw(st.sampled_from([1.0, 1.3, 2.0])))]


def scaled_up(draw: Draw, x: Tensor) -> list[tuple[str, Any]]:
    assume(x.dim() == 4)
    return [("size", tuple(draw(integers(1, 6)) for _ in x.shape[2:]))]


def resized_by_operator(dims: int, *options: bool) -> Callable[[Draw, Tensor], list[tuple[str, Any]]]:
    """The arguments of an operator of aten that resizes the last dimensions."""

    def arguments(draw: Draw, x: Tensor) -> list[tuple[str, Any]]:
        assume(x.dim() == dims + 2)
        return [("", [draw(integers(1, 5)) for _ in range(dims)]), *(("", option) for option in options)]

    return arguments


def pooled_by_operator(draw: Draw, x: Tensor, dims: int) -> list[tuple[str, Any]]:
    return [("", list(pooled_to(draw, x, dims)[0][1]))]


def at_rank(*ranks: int) -> Callable[[Draw, Tensor], list[tuple[str, Any]]]:
    def arguments(draw: Draw, x: Tensor) -> list[tuple[str, Any]]:
        assume(x.dim() in ranks)
        return []

    return arguments


def just(**values: Any) -> Callable[[Draw, Tensor], list[tuple[str, Any]]]:
    return lambda draw, x: list(values.items())


def along(draw: Draw, x: Tensor) -> list[tuple[str, Any]]:
    return [("dim", dim_of(draw, x))]


def along_or_all(draw: Draw, x: Tensor) -> list[tuple[str, Any]]:
    return draw(st.sampled_from([[], along(draw, x)]))


def largest_few(draw: Draw, x: Tensor) -> list[tuple[str, Any]]:
    dim = draw(st.sampled_from([None, dim_of(draw, x)]))
    size = x.shape[-1 if dim is None else dim]
    k = draw(st.sampled_from([size, size, 1, 1 + size // 2]).filter(lambda count: count <= size))
    return [("k", k)] if dim is None else [("k", k), ("dim", dim)]


def kth_smallest(draw: Draw, x: Tensor) -> list[tuple[str, Any]]:
    return [*largest_few(draw, x)[:1], ("dim", -1), ("keepdim", draw(st.booleans()))]


def as_sizes(
    name: str, sizes_of: Callable[[Draw, Tensor], Sequence[int]]
) -> Callable[[Draw, Tensor], list[tuple[str, Any]]]:
    """Sizes as one tuple, or one by one as methods take them."""

    def arguments(draw: Draw, x: Tensor) -> list[tuple[str, Any]]:
        sizes = tuple(sizes_of(draw, x))
        return draw(st.sampled_from([[(name, sizes)], [("", size) for size in sizes] or [(name, sizes)]]))

    return arguments


def shaped_as(draw: Draw, x: Tensor) -> list[tuple[str, Any]]:
    return [("other", torch.zeros(regroup(draw, x.shape)))]


MOVES: dict[str, Callable[[Draw, Tensor], list[tuple[str, Any]]]] = {
    "view": as_sizes("size", lambda draw, x: regroup(draw, x.shape)),
    "reshape": as_sizes("shape", lambda draw, x: regroup(draw, x.shape)),
    "view_as": shaped_as,
    "reshape_as": shaped_as,
    "flatten": flattened,
    "unflatten": unflattened,
    "squeeze": along_or_all,
    "squeeze_": along_or_all,
    "unsqueeze": along,
    "unsqueeze_": along,
    "ravel": just(),
    **dict.fromkeys(["transpose", "swapdims", "transpose_", "swapdims_"], two_dims),
    **dict.fromkeys(["swapaxes", "swapaxes_"], lambda draw, x: two_dims(draw, x, ("axis0", "axis1"))),
    "permute": as_sizes("dims", lambda draw, x: dims_of(draw, x, x.dim())),
    "t": at_rank(1, 2),
    "t_": at_rank(1, 2),
    "adjoint": at_rank(2, 3, 4),
    "movedim": moved,
    "moveaxis": moved,
    "expand": as_sizes("size", expanded),
    "expand_as": lambda draw, x: [("other", torch.zeros(expanded(draw, x)))],
    "broadcast_to": lambda draw, x: [("size", expanded(draw, x))],
    "repeat": as_sizes("repeats", repeats),
    "tile": as_sizes("dims", repeats),
    "repeat_interleave": each_repeated,
    "flip": as_sizes("dims", dims_of),
    "fliplr": at_rank(2, 3, 4),
    "flipud": at_rank(1, 2, 3, 4),
    "roll": rolled,
    "rot90": rotated,
    "__getitem__": indexed,
    "select": selected,
    "narrow": narrowed,
    "chunk": lambda draw, x: [("chunks", draw(integers(1, 3))), ("dim", dim_of(draw, x))],
    "split": split,
    "split_with_sizes": lambda draw, x: [("split_sizes", split_sizes(draw, x.shape[0])), ("dim", 0)],
    "tensor_split": lambda draw, x: [
        ("sections" if draw(st.booleans()) else "", draw(integers(1, 3))),
        ("dim", dim_of(draw, x)),
    ],
    "vsplit": lambda draw, x: at_rank(2, 3, 4)(draw, x) or [("", [1])],
    "hsplit": lambda draw, x: [("", [1])],
    "unbind": along_or_all,
    "slice": sliced,
    "index": indexed_by_list,
    "_unsafe_view": lambda draw, x: [("", regroup(draw, x.shape))],
    "index_select": index_along,
    "gather": gathered,
    **dict.fromkeys(["amax", "amin", "mean", "nanmean"], reduced),
    **dict.fromkeys(["max", "min", "median", "nanmedian", "mode"], reduced_one),
    "quantile": lambda draw, x: [("q", 0.5), *reduced_one(draw, x)],
    "nanquantile": lambda draw, x: [("q", 0.5), *reduced_one(draw, x)],
    "sort": along_or_all,
    "topk": largest_few,
    "kthvalue": kth_smallest,
    "cummax": along,
    "cummin": along,
    "pad": padded,
    "constant_pad_nd": lambda draw, x: [("", padded(draw, x)[0][1]), ("", UNWRITTEN)],
    "interpolate": resized_to,
    "upsample": resized_to,
    "upsample_nearest": scaled_up,
    "upsample_bilinear": scaled_up,
    **{f"upsample_nearest{dims}d": resized_by_operator(dims) for dims in (1, 2, 3)},
    "upsample_bilinear2d": resized_by_operator(2, False),
    "upsample_bicubic2d": resized_by_operator(2, False),
    **{f"_adaptive_avg_pool{dims}d": lambda draw, x, dims=dims: pooled_by_operator(draw, x, dims) for dims in (2, 3)},
}
for _dims in (1, 2, 3):
    for _kind in ("max_pool", "avg_pool"):
        MOVES[f"{_kind}{_dims}d"] = lambda draw, x, dims=_dims: pooled(draw, x, dims)
        MOVES[f"adaptive_{_kind}{_dims}d"] = lambda draw, x, dims=_dims: pooled_to(draw, x, dims)
    MOVES[f"max_pool{_dims}d_with_indices"] = lambda draw, x, dims=_dims: pooled(draw, x, dims)
    MOVES[f"adaptive_max_pool{_dims}d_with_indices"] = lambda draw, x, dims=_dims: pooled_to(draw, x, dims)
    if _dims > 1:
        for _suffix in ("", "_with_indices"):
            MOVES[f"fractional_max_pool{_dims}d{_suffix}"] = lambda draw, x, dims=_dims: fractional(draw, x, dims)
#: Second outputs that are indices, and no values of units.
INDICES = {"max", "min", "median", "nanmedian", "mode", "sort", "topk", "kthvalue", "cummax", "cummin"}


def functions_of(name: str) -> list[Any]:
    found = sorted(spellings(name), key=repr)
    return [each for each in found if getattr(each, "_overloadname", "") != "dtype"]  # it takes a size of 4 for int64


def run_drawn(draw: Draw, function: Any, x: Tensor, arguments: Sequence[tuple[str, Any]], mode: Following) -> Any:
    """Call a function in a drawn spelling; what torch does not take is no case."""
    args, kwargs = spell(draw, arguments)
    try:
        with mode:
            return function(x, *args, **kwargs)
    except (TypeError, RuntimeError, NotImplementedError, IndexError):
        assume(False)


@pytest.mark.parametrize("name", MOVES)
def test_a_function_that_moves_elements_puts_each_unit_where_its_rule_says(name: str) -> None:
    claimed: list[int] = []
    ranks = (3, 5) if any(word in name for word in ("pool", "interpolate", "upsample")) else (1, 4)
    ranks = (2, 3) if name in ("roll", "rot90", "gather", "t", "t_", "hsplit", "vsplit") else ranks

    @TRIED
    @given(st.data())
    def tried(data: st.DataObject) -> None:
        units, shape = draw_units(data.draw, ranks=ranks)
        mode = Following()
        x = source(mode, units, numbers(units, shape))
        arguments = MOVES[name](data.draw, x)
        result = run_drawn(data.draw, data.draw(st.sampled_from(functions_of(name))), x, arguments, mode)
        for index, output in enumerate(outputs_of(result)):
            origin = mode.flow.origin(output)
            if origin.units is not None:
                expected = numbers(origin.units, output.shape)
                if not (index and (name in INDICES or "pool" in name)):
                    moved = output.double()
                    torch.testing.assert_close(torch.where(moved == UNWRITTEN, expected, moved), expected)
                claimed.append(origin.units.size)

    try_until_claimed(tried, claimed)


ATTRIBUTES = ["T", "mT", "H", "mH", "data", "real"]


@pytest.mark.parametrize("name", ATTRIBUTES)
def test_an_attribute_that_is_a_tensor_puts_each_unit_where_its_rule_says(name: str) -> None:
    claimed = []

    @TRIED
    @given(st.data())
    def tried(data: st.DataObject) -> None:
        units, shape = draw_units(data.draw, ranks=(2, 2))
        mode = Following()
        x = source(mode, units, numbers(units, shape))
        with mode:
            result = getattr(x, name)
        origin = mode.flow.origin(result)
        assert origin.units is not None
        assert numbers(origin.units, result.shape).equal(result)
        claimed.append(origin)

    tried()
    assert claimed


def test_windows_over_positions_keep_the_units() -> None:
    claimed: list[int] = []

    @TRIED
    @given(st.data())
    def tried(data: st.DataObject) -> None:
        units, shape = draw_units(data.draw)
        mode = Following()
        x = source(mode, units, numbers(units, shape))
        result = run_drawn(data.draw, Tensor.unfold, x, windows(data.draw, x), mode)
        origin = mode.flow.origin(result)
        if origin.units is not None:
            assert numbers(origin.units, result.shape).equal(result)
            claimed.append(origin.units.size)

    try_until_claimed(tried, claimed)


def test_tensors_that_are_broadcast_together_keep_their_own_units() -> None:
    mode = Following()
    first = Units((0,), "a", (("a", 0, 3, 1),), 0, place((4, 3), (1,)))
    second = Units((1,), "b", (("b", 0, 3, 1),), 0, place((3,), (0,)))
    tensors = source(mode, first, numbers(first, (4, 3))), source(mode, second, numbers(second, (3,)))
    with mode:
        results = torch.broadcast_tensors(*tensors)
    for result in results:
        units = mode.flow.origin(result).units
        assert units is not None
        assert numbers(units, result.shape).equal(result)


def other_part(draw: Draw, units: Units, shape: list[int], mode: Following) -> Tensor:
    """A tensor to be joined with another one: of the same units, of other ones of the layer, or of another layer."""
    way = draw(st.sampled_from(["same", "shifted", "b", "constant", "weight"]))
    if way in ("constant", "weight"):
        tensor = torch.full(shape, UNWRITTEN, dtype=torch.float64)
        mode.flow.put(tensor, Origin.of(CONSTANT if way == "constant" else WEIGHT))
        return tensor
    if way == "same":
        return source(mode, units, numbers(units, shape))
    if way == "b":
        width = units.width + draw(integers(0, 1))
        units = units._replace(call=(1,), layer="b", runs=(("b", 0, width, 1),))
        return source(mode, units, numbers(units, shape))
    order = draw(st.permutations(range(len(shape))))
    assume([shape[dim] for dim in order] == shape)
    units = units._replace(dims=tuple(units.dims[dim] for dim in order))
    if max(units.numbers()) + 1 < units.width and draw(st.booleans()):
        units = units._replace(first=units.first + 1)
    return source(mode, units, numbers(units, shape))


@pytest.mark.parametrize(
    "name", ["cat", "concat", "concatenate", "stack", "hstack", "column_stack", "vstack", "row_stack"]
)
def test_a_join_puts_each_unit_where_its_rule_says(name: str) -> None:
    claimed: list[int] = []

    @TRIED
    @given(st.data())
    def tried(data: st.DataObject) -> None:
        units, shape = draw_units(data.draw)
        mode = Following()
        parts = [source(mode, units, numbers(units, shape))]
        parts += [other_part(data.draw, units, shape, mode) for _ in range(data.draw(integers(1, 2)))]
        parts = list(data.draw(st.permutations(parts)))
        arguments: list[tuple[str, Any]] = []
        if name in ("cat", "concat", "concatenate", "stack"):
            reach = len(shape) + (name == "stack")
            arguments = [("dim", data.draw(integers(-reach, reach - 1)))]
        function = data.draw(st.sampled_from(functions_of(name)))
        given_parts: Any = parts if data.draw(st.booleans()) else tuple(parts)
        result = run_drawn(data.draw, function, given_parts, arguments, mode)
        origin = mode.flow.origin(result)
        if origin.units is not None:
            expected = numbers_of_rows(mode, origin.units, result.shape)
            assert torch.where(result == UNWRITTEN, expected, result).equal(expected)
            claimed.append(origin.units.width)

    try_until_claimed(tried, claimed)


@pytest.mark.parametrize(
    "name",
    [
        *("scatter", "scatter_add", "scatter_reduce", "index_add", "index_copy", "index_reduce"),
        *("__setitem__", "index_put"),
    ],
)
def test_what_is_written_into_a_tensor_has_the_units_that_its_rule_says(name: str) -> None:
    claimed: list[int] = []

    @TRIED
    @given(st.data())
    def tried(data: st.DataObject) -> None:
        draw = data.draw
        units, shape = draw_units(draw)
        mode = Following()
        target_shape = [*shape]
        dim = draw(integers(0, len(shape) - 1))
        if name not in ("__setitem__", "index_put") and draw(st.booleans()):
            target_shape[dim] += 1
        target = torch.full(target_shape, UNWRITTEN, dtype=torch.float64)
        mode.flow.put(target, Origin.of(CONSTANT))
        if target_shape == shape and draw(st.booleans()):
            target = other_part(draw, units, shape, mode).clone()
            mode.flow.put(target, mode.flow.origin(other_part(draw, units, shape, mode)))
            target, before = _origin_pair(draw, units, shape, mode)
            mode.flow.put(target, before)
        if name in ("__setitem__", "index_put"):
            index = indexed(draw, target)[0][1] if name == "__setitem__" else indices_of(draw, target)
            try:
                value_shape = list(target[index].shape)
            except (IndexError, RuntimeError):
                assume(False)
            assume(math.prod(value_shape))
            dims = reshape(units.dims, value_shape) if math.prod(value_shape) == math.prod(shape) else None
            if dims is None:
                units, value_shape = _part_like(draw, units, value_shape, shape)
            else:
                units = units._replace(dims=dims)
            value = source(mode, units, numbers(units, value_shape))
            with mode:
                if name == "__setitem__":
                    target[index] = value
                else:
                    target = draw(st.sampled_from([torch.index_put, Tensor.index_put_]))(target, index, value)
            result = target
        else:
            value = source(mode, units, numbers(units, shape))
            size = target_shape[dim]
            if name.startswith("index"):
                index = torch.tensor([(3 * place + 1) % size for place in range(shape[dim])])
                assume(len(set(index.tolist())) == len(index))
            else:
                cut = [draw(integers(1, each)) for each in shape]
                index = torch.arange(math.prod(cut)).reshape(cut) * 5 % size
            arguments: list[tuple[str, Any]] = [
                ("dim", dim),
                ("index", index),
                ("source" if name.startswith("index") else "src", value),
            ]
            if "reduce" in name:
                arguments += [("reduce", "amax"), ("include_self", False)]
            if name.endswith("_add"):
                target = torch.zeros_like(target)  # what is added to something else is no number of a unit
                mode.flow.put(target, Origin.of(CONSTANT))
            result = run_drawn(draw, draw(st.sampled_from(functions_of(name))), target, arguments, mode)
            if name.endswith("_add"):
                written = torch.zeros_like(target)
                hit = getattr(torch, name)(written, dim, index, torch.ones_like(value))
                result_numbers = torch.where(hit > 0, result / hit, UNWRITTEN)
                origin = mode.flow.origin(result)
                if origin.units is not None:
                    expected = numbers(origin.units, result.shape)
                    same = hit == 1
                    assert result_numbers[same].equal(expected[same])
                    claimed.append(origin.units.size)
                return
        origin = mode.flow.origin(result)
        if origin.units is not None:
            expected = numbers(origin.units, result.shape)
            assert torch.where(result == UNWRITTEN, expected, result).equal(expected)
            claimed.append(origin.units.size)

    try_until_claimed(tried, claimed)


def indices_of(draw: Draw, x: Tensor) -> tuple[Tensor, ...]:
    """The indices of ``index_put``: a tensor for each of the first dimensions."""
    length = draw(integers(1, 2))
    dims = draw(integers(1, max(1, x.dim() - 1)))
    return tuple(torch.tensor([draw(integers(0, size - 1)) for _ in range(length)]) for size in x.shape[:dims])


def _origin_pair(draw: Draw, units: Units, shape: list[int], mode: Following) -> tuple[Tensor, Origin]:
    tensor = other_part(draw, units, shape, mode)
    return tensor, mode.flow.origin(tensor)


def _part_like(draw: Draw, units: Units, value_shape: list[int], shape: list[int]) -> tuple[Units, list[int]]:
    """Units in a tensor of a shape: on one of its dimensions."""
    assume(value_shape)
    dim = draw(integers(0, len(value_shape) - 1))
    width = value_shape[dim]
    return Units((0,), "a", (("a", 0, width, 1),), 0, place(value_shape, (dim,))), value_shape


# Functions whose values are not those of one element: one unit of the source is changed between two runs.


def generic(shape: Sequence[int], seed: int = 0) -> Tensor:
    """Values in (0.5, 0.9), no two alike: in the domain of every function."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(tuple(shape), generator=generator, dtype=torch.float64) * 0.4 + 0.5


def assert_only_the_claimed_units_change(
    run: Callable[..., Any], tensors: Sequence[Tensor], origins: Sequence[Origin], *, exempt: bool = False
) -> int:
    """Return how many units are claimed, after a try of each."""
    mode = Following()
    ours = [tensor.clone() for tensor in tensors]
    for tensor, origin in zip(ours, origins, strict=True):
        mode.flow.put(tensor, origin)
    torch.manual_seed(0)
    with mode:
        result = run(*ours)
    count = 0
    for place_of, output in enumerate(outputs_of(result)):
        origin = mode.flow.origin(output)
        if origin.units is None:
            continue
        for each in origins:
            assert each.upstream & origin.upstream == each.upstream
        chosen = next(
            number for number, each in enumerate(origins) if each.units and each.units.call == origin.units.call
        )
        units = origins[chosen].units
        assert units is not None
        of_source, of_result = numbers(units, tensors[chosen].shape), numbers(origin.units, output.shape)
        assert set(of_result.unique().tolist()) <= set(of_source.unique().tolist())
        count = max(count, origin.units.size)
        if exempt:
            continue
        every = of_source.unique()
        for unit in every[:: max(1, len(every) // 5)]:
            others = [tensor.clone() for tensor in tensors]
            others[chosen][of_source == unit] = generic(others[chosen].shape, 7)[of_source == unit].to(
                others[chosen].dtype
            )
            torch.manual_seed(0)
            again = outputs_of(run(*others))[place_of]
            changed = (again != output) & ~(again.isnan() & output.isnan())
            assert not changed[of_result != unit].any()
    return count


def origin_of(units: Units) -> Origin:
    return Origin.of(UNITS, upstream_of(units), units=units)


def draw_other(draw: Draw, shape: Sequence[int], call: int) -> tuple[Tensor, Origin]:
    """A tensor that broadcasts with one of a shape, and what it is."""
    other = [size if draw(st.booleans()) else 1 for size in shape][draw(integers(0, len(shape))) :]
    way = draw(st.sampled_from(["a", "b", "raw", "weight", "constant", "lost"]))
    if way in ("raw", "weight", "constant", "lost"):
        state = {"raw": RAW, "weight": WEIGHT, "constant": CONSTANT, "lost": LOST}[way]
        return generic(other, 3), Origin.of(state, 1 if way == "lost" else 0)
    if not other:
        other = [1]
    dim = draw(integers(0, len(other) - 1))
    units = Units((call,), way, ((way, 0, other[dim], 1),), 0, place(other, (dim,)))
    upstream = 1 << call | (draw(st.booleans()) and 1)
    return generic(other, 3), Origin.of(UNITS, upstream, units=units)


def call_elementwise(function: Any, name: str) -> tuple[int, Callable[..., Any]]:
    """How many tensors a function takes, and a call of it; in-place functions overwrite a copy."""
    special: dict[str, tuple[int, Callable[..., Any]]] = {
        "threshold": (1, lambda x: function(x, 0.7, 0.0)),
        "clamp": (1, lambda x: function(x, min=0.7)),
        "clip": (1, lambda x: function(x, max=0.7)),
        "clamp_min": (1, lambda x: function(x, 0.7)),
        "clamp_max": (1, lambda x: function(x, 0.7)),
        "native_dropout": (1, lambda x: function(x, 0.3, True)),
        "fill_diagonal": (1, lambda x: function(x, 0.0)),
        "lerp": (3, lambda x, y, z: function(x, y, z)),
        "addcmul": (3, lambda x, y, z: function(x, y, z)),
        "addcdiv": (3, lambda x, y, z: function(x, y, z)),
        "where": (3, lambda x, y, z: function(x > 0.7, y, z) if function is torch.where else function(y, x > 0.7, z)),
        "masked_fill": (2, lambda x, y: function(x, y > 0.7, 0.0)),
        "masked_scatter": (2, lambda x, y: function(x, y > 0.7, torch.zeros(4**5, dtype=x.dtype))),
        "bernoulli": (1, lambda x: function(x)),
        "prelu": (1, lambda x: function(x, torch.tensor([0.1], dtype=torch.float64))),
        "to": (1, lambda x: function(x, torch.float32)),
        "type": (1, lambda x: function(x, torch.float32)),
        "type_as": (1, lambda x: function(x, torch.zeros(1))),
        "__invert__": (1, function),
        "normalize": (1, lambda x: function(x, dim=0)),
        "renorm": (1, lambda x: function(x, 2, 0, 0.6)),
        "local_response_norm": (1, lambda x: function(x, 2)),
        "max": (2, lambda x, y: function(x, y)),
        "min": (2, lambda x, y: function(x, y)),
    }
    base = name.rstrip("_") if not name.startswith("__") else name
    if "dropout" in base and base != "native_dropout":
        return 1, lambda x: function(x, 0.3, True)
    if base in special:
        return special[base]
    if base.startswith("__i") and base != "__invert__":
        return 2, lambda x, y: function(x, y)
    try:
        alone = function(torch.full((2, 2), 0.7, dtype=torch.float64))
        return (2 if alone is NotImplemented else 1), function
    except TypeError:
        return 2, function
    except RuntimeError:
        return 1, function


ELEMENTWISE = sorted(
    {
        *(elementwise_rules._LINEAR + elementwise_rules._MULTIPLYING + elementwise_rules._NOT_LINEAR).split(),
        "where",
        "masked_fill",
        "masked_scatter",
        "max",
        "min",
    }
    | {"to", "type", "type_as", "normalize", "renorm", "local_response_norm", "alias", "_to_copy", "lift_fresh_copy"}
)
#: Functions that cannot run here, and why.
NOT_RUN = {
    "cuda": "needs a GPU",
    "pin_memory": "needs a GPU",
    "dequantize": "needs a quantized tensor",
}
#: Functions whose value of one unit depends on the others: only which units there are is tried.
MIXING = {"normalize", "renorm", "local_response_norm", "alpha_dropout", "feature_alpha_dropout"}
#: Functions of whole numbers or truth values.
OF_INTEGERS = {
    "bitwise_and",
    "bitwise_or",
    "bitwise_not",
    "bitwise_xor",
    *(f"__{name}__" for name in ["and", "or", "xor", "invert", "iand", "ior", "ixor"]),
}


@pytest.mark.parametrize("name", [name for name in ELEMENTWISE if name not in NOT_RUN])
def test_an_elementwise_function_has_the_units_of_the_source_that_its_rule_chooses(name: str) -> None:
    claimed: list[int] = []

    @settings(TRIED, max_examples=12)
    @given(st.data())
    def tried(data: st.DataObject) -> None:
        units, shape = draw_units(data.draw)
        in_place = not name.endswith("__") and data.draw(st.booleans())
        function = data.draw(st.sampled_from(sorted(spellings(name, in_place=in_place), key=repr)))
        count, call = call_elementwise(function, name)
        tensors, origins = [generic(shape, 1)], [origin_of(units)]
        for call_number in range(1, count):
            tensor, origin = draw_other(data.draw, shape, call_number)
            tensors.append(tensor)
            origins.append(origin)
        order = list(range(count)) if name == "where" else data.draw(st.permutations(range(count)))
        tensors, origins = [tensors[index] for index in order], [origins[index] for index in order]
        if name in OF_INTEGERS:
            tensors = [tensor > 0.7 for tensor in tensors]
        try:
            call(*[tensor.clone() for tensor in tensors])
        except (TypeError, RuntimeError, NotImplementedError, ValueError):
            assume(False)
        run = (lambda *given_tensors: call(*given_tensors)) if not in_place and "__i" not in name else _copying(call)
        claimed.append(assert_only_the_claimed_units_change(run, tensors, origins, exempt=name in MIXING))

    try_until_claimed(tried, claimed)


def _copying(call: Callable[..., Any]) -> Callable[..., Any]:
    """The call on copies, which the flow knows to be copies: the function overwrites them."""
    return lambda first, *rest: call(first.clone(), *rest)


REDUCTIONS: dict[str, Callable[[Draw, Tensor], list[tuple[str, Any]]]] = {
    **dict.fromkeys(["sum", "nansum", "logsumexp", "amax", "mean", "std", "var", "std_mean", "var_mean"], reduced),
    **dict.fromkeys(["prod", "all", "any", "argmax", "argmin"], reduced_one),
    "count_nonzero": along_or_all,
    "norm": lambda draw, x: [("p", draw(st.sampled_from([1, 2]))), *reduced(draw, x)],
    **dict.fromkeys(["softmax", "log_softmax", "softmin", "cumsum", "cumprod", "logcumsumexp"], along),
    **dict.fromkeys(["_softmax", "_log_softmax"], lambda draw, x: [("", dim_of(draw, x)), ("", False)]),
    "gumbel_softmax": lambda draw, x: [("tau", 1), ("hard", False), ("eps", 1e-10), ("dim", dim_of(draw, x))],
    "argsort": along_or_all,
    "diff": lambda draw, x: [("n", 1), ("dim", dim_of(draw, x))],
    "lp_pool1d": lambda draw, x: [("norm_type", 2), *pooled(draw, x, 1)],
    "lp_pool2d": lambda draw, x: [("norm_type", 2), *pooled(draw, x, 2)],
    "lp_pool3d": lambda draw, x: [("norm_type", 2), *pooled(draw, x, 3)],
    "grid_sample": lambda draw, x: [("grid", generic((x.shape[0], 2, 3, 2)))] if x.dim() == 4 else assume(False),
}


def reduce_functions(name: str) -> list[Any]:
    found = functions_of(name)
    return [*found, torch.linalg.vector_norm, torch.linalg.norm] if name == "norm" else found


@pytest.mark.parametrize("name", REDUCTIONS)
def test_a_reduction_changes_only_the_units_that_its_rule_says(name: str) -> None:
    claimed: list[int] = []
    ranks = (2, 5) if "pool" in name else (4, 4) if name == "grid_sample" else (2, 4)

    @settings(TRIED, max_examples=50)
    @given(st.data())
    def tried(data: st.DataObject) -> None:
        units, shape = draw_units(data.draw, ranks=ranks)
        x = generic(shape)
        args, kwargs = spell(data.draw, REDUCTIONS[name](data.draw, x))
        function = data.draw(st.sampled_from(reduce_functions(name)))
        if function in (torch.linalg.vector_norm, torch.linalg.norm) and "p" in kwargs:
            kwargs["ord"] = kwargs.pop("p")
        try:
            function(x, *args, **kwargs)
        except (TypeError, RuntimeError, ValueError, IndexError):
            assume(False)
        run = lambda tensor: function(tensor, *args, **kwargs)  # noqa: E731
        claimed.append(assert_only_the_claimed_units_change(run, [x], [origin_of(units)]))

    try_until_claimed(tried, claimed)


def draw_matrix(draw: Draw, shape: Sequence[int], layer: str, call: int) -> tuple[Tensor, Origin]:
    """A factor of a product, with units on one dimension, or without units."""
    state = draw(st.sampled_from([UNITS, UNITS, UNITS, RAW, CONSTANT]))
    if state != UNITS:
        return generic(shape, call), Origin.of(state)
    dims = draw(st.permutations(range(len(shape))))[: min(len(shape), draw(st.sampled_from([1, 1, 2])))]
    unit_dims = sorted(dims)
    width = math.prod(shape[dim] for dim in unit_dims)
    return generic(shape, call), origin_of(Units((call,), layer, ((layer, 0, width, 1),), 0, place(shape, unit_dims)))


def draw_factor_shapes(draw: Draw) -> tuple[list[int], list[int]]:
    rows, inner, columns = (draw(integers(1, 3)) for _ in range(3))
    batch = [draw(integers(1, 3)) for _ in range(draw(integers(0, 2)))]
    left = [*(1 if draw(integers(0, 3)) == 0 else size for size in batch), rows, inner][draw(integers(0, len(batch))) :]
    right = [*(1 if draw(integers(0, 3)) == 0 else size for size in batch), inner, columns][
        draw(integers(0, len(batch))) :
    ]
    return draw(st.sampled_from([left, [inner]])), draw(st.sampled_from([right, [inner]]))


PRODUCTS = [
    "matmul",
    "mm",
    "bmm",
    "mv",
    "__matmul__",
    "__rmatmul__",
    "addmm",
    "baddbmm",
    "addmv",
    "addbmm",
    "scaled_dot_product_attention",
    "_scaled_dot_product_flash_attention_for_cpu",
    "inner",
    "tensordot",
]


def product_call(name: str, function: Any) -> Callable[[Tensor, Tensor], Any]:
    if "scaled_dot_product" in name:
        return lambda query, value: function(
            query, torch.ones(*value.shape[:-1], query.shape[-1]).double() * 0.3, value
        )
    if name.startswith("add") or name == "baddbmm":
        return lambda left, right: function(torch.zeros((), dtype=torch.float64), left, right)
    if name == "tensordot":
        return lambda left, right: function(left, right, 1)
    if name == "__rmatmul__":
        return lambda left, right: function(right, left)
    return function


@pytest.mark.parametrize("name", PRODUCTS)
def test_a_product_of_data_has_the_units_of_the_factor_that_its_rule_chooses(name: str) -> None:
    claimed: list[int] = []

    @settings(TRIED, max_examples=60)
    @given(st.data())
    def tried(data: st.DataObject) -> None:
        left_shape, right_shape = draw_factor_shapes(data.draw)
        if name in ("bmm", "baddbmm", "addbmm") or name == "scaled_dot_product_attention":
            batch = data.draw(integers(1, 3))
            left_shape, right_shape = [batch, *left_shape[-2:]], [batch, *right_shape[-2:]]
        if name == "inner":  # it sums over the last dimension of both
            right_shape = [*right_shape[:-2], *right_shape[-2:][::-1]]
        if name.startswith("_scaled"):  # heads too, and queries as wide as values
            width = data.draw(integers(1, 3))
            left_shape, right_shape = [2, 3, 4, width], [2, 3, 5, width]
        left, of_left = draw_matrix(data.draw, left_shape, "a", 0)
        right, of_right = draw_matrix(data.draw, right_shape, "b", 1)
        call = product_call(name, data.draw(st.sampled_from(functions_of(name))))
        try:
            call(left, right)
        except (RuntimeError, TypeError, IndexError):
            assume(False)
        claimed.append(assert_only_the_claimed_units_change(call, [left, right], [of_left, of_right]))

    tried()
    assert max(claimed) > 1 or name == "addbmm"


def draw_equation(draw: Draw) -> tuple[str, list[list[int]]]:
    sizes = {letter: draw(integers(1, 3)) for letter in "abcde"}
    terms = ["".join(draw(st.permutations("abcde"))[: draw(integers(1, 3))]) for _ in range(2)]
    if draw(integers(0, 5)) == 0:
        terms[0] += terms[0][0]
    used = sorted(set("".join(terms)))
    output = "".join(draw(st.permutations(used))[: draw(integers(0, len(used)))])
    equation = ",".join(terms) + ("" if draw(integers(0, 5)) == 0 else f"->{output}")
    return equation, [[sizes[letter] for letter in term] for term in terms]


def test_an_einsum_of_data_has_the_units_of_the_factor_that_its_rule_chooses() -> None:
    claimed: list[int] = []

    @settings(TRIED, max_examples=100)
    @given(st.data())
    def tried(data: st.DataObject) -> None:
        equation, shapes = draw_equation(data.draw)
        left, of_left = draw_matrix(data.draw, shapes[0], "a", 0)
        right, of_right = draw_matrix(data.draw, shapes[1], "b", 1)
        try:
            torch.einsum(equation, left, right)
        except RuntimeError:
            assume(False)
        run = lambda x, y: torch.einsum(equation, x, y)  # noqa: E731
        claimed.append(assert_only_the_claimed_units_change(run, [left, right], [of_left, of_right]))

    try_until_claimed(tried, claimed)


# Layers: one output unit of the weight is changed, and exactly the elements of that unit change.


def assert_each_unit_is_its_row(
    run: Callable[[Tensor], Any], weight: Tensor, row: Callable[[int], Any], output: int = 0, subset: bool = False
) -> int:
    """Change each unit's part of a weight, and return how many units are claimed."""
    mode = Following()
    mode.flow.put(weight, Origin.of(WEIGHT, layer="a"))
    with mode:
        result = outputs_of(run(weight))[output]
    origin = mode.flow.origin(result)
    if origin.units is None:
        return 0
    assert origin.units.call == (3,)
    assert origin.layer == "a"
    claims = numbers(origin.units, result.shape)
    for unit in range(origin.units.width):
        changed_weight = weight.clone()
        changed_weight[row(unit)] += 0.25
        again = outputs_of(run(changed_weight))[output]
        changed = again != result
        if subset:
            assert not changed[claims != unit].any()
            assert changed.any()
        else:
            assert changed.equal(claims == unit)
    return origin.units.width


def test_a_linear_layer_has_its_rows_as_units() -> None:
    row = lambda unit: unit  # noqa: E731
    x, weight = generic((2, 5, 4)), generic((3, 4), 1)
    assert assert_each_unit_is_its_row(lambda w: functional.linear(x, w), weight, row) == 3
    assert assert_each_unit_is_its_row(lambda w: functional.linear(input=x[0, 0], weight=w), weight, row) == 3
    run = lambda w: functional.bilinear(generic((2, 3)), generic((2, 4), 2), w)  # noqa: E731
    assert assert_each_unit_is_its_row(run, generic((5, 3, 4), 1), row) == 5


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("groups", [1, 2])
def test_a_convolution_has_its_output_channels_as_units(dims: int, batched: bool, groups: int) -> None:
    x = generic((*((2,) if batched else ()), 4, *(5,) * dims))
    weight = generic((6, 4 // groups, *(3,) * dims), 1)
    functions = [each for each in functions_of(f"conv{dims}d") if "padding" not in repr(each)]  # of aten: as a text
    calls = [partial(function, x, padding=(1,) * dims, groups=groups) for function in functions]
    for call in calls:
        assert assert_each_unit_is_its_row(call, weight, lambda unit: unit) == 6
    weight = generic((4, 6 // groups, *(3,) * dims), 1)
    calls = [partial(function, x, groups=groups) for function in functions_of(f"conv_transpose{dims}d")]

    def row(unit: int) -> Any:
        group, channel = divmod(unit, 6 // groups)
        return slice(group * (4 // groups), (group + 1) * (4 // groups)), channel

    for call in calls:
        assert assert_each_unit_is_its_row(call, weight, row) == 6
    if batched:
        weight, ones, zeros = generic((6, 4 // groups, *(3,) * dims), 1), (1,) * dims, (0,) * dims
        convolve = torch.ops.aten.convolution.default
        run = lambda w: convolve(x, w, None, ones, ones, ones, False, zeros, groups)  # noqa: E731
        assert assert_each_unit_is_its_row(run, weight, lambda unit: unit) == 6


def test_an_embedding_has_its_features_as_units() -> None:
    tokens = torch.tensor([[0, 2], [1, 3]])
    column = lambda u: (slice(None), u)  # noqa: E731
    for run in (
        lambda w: functional.embedding(tokens, w),
        lambda w: torch.embedding(w, tokens),
        lambda w: functional.embedding_bag(tokens, w),
        lambda w: torch.embedding_bag(w, tokens.flatten(), torch.tensor([0, 2]))[0],
    ):
        assert assert_each_unit_is_its_row(run, generic((4, 3), 1), column) == 3


def test_a_normalisation_with_a_weight_has_the_weights_elements_as_units() -> None:
    x = generic((4, 6, 5))
    row = lambda u: u  # noqa: E731
    mean, variance = generic((6,), 4), generic((6,), 5)
    assert assert_each_unit_is_its_row(lambda w: functional.batch_norm(x, mean, variance, w), generic((6,)), row) == 6
    assert assert_each_unit_is_its_row(lambda w: functional.batch_norm(x, w, variance), generic((6,)), row) == 6
    assert (
        assert_each_unit_is_its_row(
            lambda w: torch.batch_norm(x, w, None, mean, variance, False, 0.1, 1e-5, False), generic((6,)), row
        )
        == 6
    )
    assert assert_each_unit_is_its_row(lambda w: functional.instance_norm(x, weight=w), generic((6,)), row) == 6
    assert assert_each_unit_is_its_row(lambda w: functional.group_norm(x, 2, w), generic((6,)), row) == 6
    two = lambda u: (u // 5, u % 5)  # noqa: E731
    operators_of_graphs: dict[Callable[[Tensor], Any], Tensor] = {
        lambda w: torch.ops.aten.batch_norm.default(x, w, None, mean, variance, False, 0.1, 1e-5, False): generic((6,)),
        lambda w: torch.ops.aten.native_batch_norm.default(x, w, None, mean, variance, False, 0.1, 1e-5): generic((6,)),
        lambda w: torch.ops.aten.native_group_norm.default(x, w, None, 4, 6, 5, 2, 1e-5): generic((6,)),
        lambda w: torch.ops.aten.native_layer_norm.default(x, [5], w, None, 1e-5): generic((5,)),
    }
    for run, weight in operators_of_graphs.items():
        assert assert_each_unit_is_its_row(run, weight, row) == len(weight)
    for norm in (functional.layer_norm, functional.rms_norm):
        assert assert_each_unit_is_its_row(partial(norm, x, (5,)), generic((5,)), row) == 5
        assert assert_each_unit_is_its_row(partial(norm, x, (6, 5)), generic((6, 5)), two) == 30


def test_a_normalisation_without_a_weight_passes_units_on() -> None:
    units = Units((0,), "a", (("a", 0, 6, 1),), 0, place((4, 6, 5), (1,)))
    for run in (
        lambda x: functional.batch_norm(x, None, None, training=True),
        functional.instance_norm,
        lambda x: functional.layer_norm(x, (5,)),
    ):
        assert assert_only_the_claimed_units_change(run, [generic((4, 6, 5))], [origin_of(units)]) == 6


def test_a_product_with_a_weight_has_its_rows_or_columns_as_units() -> None:
    claimed: list[int] = []

    @settings(TRIED, max_examples=80)
    @given(st.data())
    def tried(data: st.DataObject) -> None:
        left_shape, right_shape = draw_factor_shapes(data.draw)
        from_right = data.draw(st.booleans())
        weight = generic(right_shape if from_right else left_shape, 1)
        x = generic(left_shape if from_right else right_shape, 2)
        function = data.draw(
            st.sampled_from([torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.mm, torch.bmm, torch.mv])
        )
        run = (lambda w: function(x, w)) if from_right else (lambda w: function(w, x))
        try:
            run(weight)
        except (RuntimeError, IndexError):
            assume(False)
        stack = [size for size in weight.shape[:-2] if size > 1]
        units = weight.shape[-1] if from_right else weight.shape[-2] if weight.dim() > 1 else 1

        def row(unit: int) -> Any:
            if weight.dim() == 1:
                return slice(None)
            matrix: list[Any] = []
            number = unit // units
            for size in reversed(weight.shape[:-2]):
                matrix.insert(0, number % size)
                number //= size
            return (*matrix, slice(None), unit % units) if from_right else (*matrix, unit % units)

        count = assert_each_unit_is_its_row(run, weight, row)
        assert count in (0, math.prod(stack) * (units if weight.dim() > 1 else 1))
        claimed.append(count)

    try_until_claimed(tried, claimed)
    assert min(claimed) > 0


def test_an_einsum_with_a_weight_has_the_letters_of_the_weight_that_are_left_as_units() -> None:
    claimed: list[int] = []

    @settings(TRIED, max_examples=100)
    @given(st.data())
    def tried(data: st.DataObject) -> None:
        equation, shapes = draw_equation(data.draw)
        place_of = data.draw(integers(0, 1))
        weight, x = generic(shapes[place_of], 1), generic(shapes[1 - place_of], 2)
        term = equation.partition("->")[0].split(",")[place_of]
        operands = (lambda w: (w, x)) if place_of == 0 else (lambda w: (x, w))
        run = lambda w: torch.einsum(equation, *operands(w))  # noqa: E731
        try:
            result = run(weight)
        except RuntimeError:
            assume(False)
        inputs, arrow, output = equation.partition("->")
        letters = inputs.replace(",", "")
        kept = [letter for letter in term if (letter in output if arrow else letters.count(letter) == 1)]
        sizes = [weight.shape[term.index(letter)] for letter in kept]

        def row(unit: int) -> Any:
            found: dict[str, int] = {}
            for letter, size in zip(reversed(kept), reversed(sizes), strict=True):
                found[letter] = unit % size
                unit //= size
            return tuple(found.get(letter, slice(None)) for letter in term)

        count = assert_each_unit_is_its_row(run, weight, row)
        assert count in (0, math.prod(sizes))
        claimed.append(count)
        del result

    try_until_claimed(tried, claimed)


def test_patches_of_a_map_have_its_channels_as_units() -> None:
    claimed: list[int] = []

    @TRIED
    @given(st.data())
    def tried(data: st.DataObject) -> None:
        units, shape = draw_units(data.draw, ranks=(3, 4))
        mode = Following()
        x = source(mode, units, numbers(units, shape))
        kernel = tuple(data.draw(integers(1, size)) for size in shape[-2:])
        one = (1, 1)
        functions = [
            lambda x: functional.unfold(x, kernel),
            lambda x: functional.unfold(input=x, kernel_size=kernel),
            lambda x: torch.ops.aten.im2col.default(x, kernel, one, (0, 0), one),
        ]
        result = run_drawn(data.draw, data.draw(st.sampled_from(functions)), x, [], mode)
        origin = mode.flow.origin(result)
        if origin.units is not None:
            assert numbers(origin.units, result.shape).equal(result)
            claimed.append(origin.units.size)

    try_until_claimed(tried, claimed)


def test_a_sum_over_pairs_of_dimensions_with_a_weight_has_its_other_dimensions_as_units() -> None:
    x = generic((3, 4, 5))
    calls: list[tuple[Callable[[Tensor], Tensor], tuple[int, ...], Callable[[int], Any], int]] = [
        (lambda w: torch.tensordot(x, w, 1), (5, 6), lambda u: (slice(None), u), 6),
        (lambda w: torch.tensordot(x, w, dims=([2], [1])), (6, 5), lambda u: u, 6),
        (lambda w: torch.tensordot(x, w, dims=([-1, 1], [0, 1])), (5, 4, 6), lambda u: (..., u), 6),
        (lambda w: torch.tensordot(w, x, dims=([0], [1])), (4, 2, 3), lambda u: (slice(None), u // 3, u % 3), 6),
        (lambda w: torch.ops.aten.tensordot.default(x, w, [2], [1]), (6, 5), lambda u: u, 6),
        (lambda w: torch.inner(x, w), (6, 5), lambda u: u, 6),
        (lambda w: w.inner(x), (6, 5), lambda u: u, 6),
    ]
    for run, shape, row, units in calls:
        assert assert_each_unit_is_its_row(run, generic(shape, 1), row) == units


def test_an_einsum_with_two_weights_has_the_units_of_the_one_whose_letters_are_left() -> None:
    low = generic((4, 2), 3)
    x = generic((3, 4))
    mode = Following()
    weight = generic((2, 5), 1)
    mode.flow.put(low, Origin.of(WEIGHT, layer="low"))
    mode.flow.put(weight, Origin.of(WEIGHT, layer="a"))
    with mode:
        result = torch.einsum("bi,ir,ro->bo", x, low, weight)
    units = mode.flow.origin(result).units
    assert units is not None
    assert (units.layer, units.width, units.dims) == ("a", 5, place((3, 5), (1,)))


def test_recurrent_layers_have_their_hidden_features_as_units() -> None:
    hidden = torch.zeros(1, 2, 3, dtype=torch.float64)
    x = generic((1, 2, 4))  # one step: what a unit was changes all units of the next one
    others = [generic((9, 3), 2), generic((9,), 3), generic((9,), 4)]
    rows = lambda u: [u, u + 3, u + 6]  # noqa: E731
    run = lambda w: torch.gru(x, hidden, [w, *others], True, 1, 0.0, False, False, False)  # noqa: E731
    for output in (0, 1):
        assert assert_each_unit_is_its_row(run, generic((9, 4), 1), rows, output) == 3
    run = lambda w: torch.gru_cell(x[0], hidden[0], w, *others)  # noqa: E731
    assert assert_each_unit_is_its_row(run, generic((9, 4), 1), rows) == 3
    others = [generic((12, 3), 2), generic((12,), 3), generic((12,), 4)]
    rows = lambda u: [u, u + 3, u + 6, u + 9]  # noqa: E731
    run = lambda w: torch.lstm(x, [hidden, hidden], [w, *others], True, 1, 0.0, False, False, False)  # noqa: E731
    for output in (0, 1, 2):
        assert assert_each_unit_is_its_row(run, generic((12, 4), 1), rows, output) == 3
    run = lambda w: torch.lstm_cell(x[0], [hidden[0], hidden[0]], w, *others)  # noqa: E731
    for output in (0, 1):
        assert assert_each_unit_is_its_row(run, generic((12, 4), 1), rows, output) == 3
    others = [generic((3, 3), 2), generic((3,), 3), generic((3,), 4)]
    row = lambda u: u  # noqa: E731
    for layer in (torch.rnn_tanh, torch.rnn_relu):
        run = partial(_run_layer, layer, x, hidden, others)
        assert assert_each_unit_is_its_row(run, generic((3, 4), 1), row) == 3
    for cell in (torch.rnn_tanh_cell, torch.rnn_relu_cell):
        run = partial(_run_cell, cell, x[0], hidden[0], others)
        assert assert_each_unit_is_its_row(run, generic((3, 4), 1), row) == 3


def _run_layer(layer: Any, x: Tensor, hidden: Tensor, others: list[Tensor], weight: Tensor) -> Any:
    return layer(x, hidden, [weight, *others], True, 1, 0.0, False, False, False)


def _run_cell(cell: Any, x: Tensor, hidden: Tensor, others: list[Tensor], weight: Tensor) -> Any:
    return cell(x, hidden, weight, *others)


def test_the_last_states_of_several_recurrent_layers_are_no_units_of_one() -> None:
    mode = Following()
    rnn = nn.GRU(4, 3, num_layers=2, bidirectional=True)
    for parameter in rnn.parameters():
        mode.flow.put(parameter, Origin.of(WEIGHT, layer="rnn"))
    with mode:
        output, last = rnn(torch.rand(5, 2, 4))
    assert mode.flow.origin(output).units is not None
    assert mode.flow.origin(last).units is None


def test_attention_has_the_units_of_its_output_projection() -> None:
    attention = nn.MultiheadAttention(4, 2).double()
    x = generic((3, 2, 4))

    def run(weight: Tensor) -> Any:
        return functional.multi_head_attention_forward(
            x, x, x, 4, 2, attention.in_proj_weight, attention.in_proj_bias, None, None, False, 0.0, weight, None
        )

    assert assert_each_unit_is_its_row(run, generic((4, 4), 1), lambda u: u) == 4
    mode = Following()
    mode.flow.put(attention.out_proj.weight, Origin.of(WEIGHT, layer="a"))
    with mode:
        _, scores = attention(x, x, x)
    assert mode.flow.origin(scores).units is None


def test_a_part_of_a_weight_is_no_other_parts_layer() -> None:
    weight = generic((6, 4))
    stack = generic((3, 6, 4))
    layers = []
    parts: list[Callable[[], Tensor]] = [
        lambda: weight[:3],
        lambda: weight[3:],
        lambda: weight.chunk(3)[2],
        lambda: weight.split([1, 5])[1],
        lambda: weight.narrow(0, 2, 2),
        lambda: weight[:, :2],
        lambda: stack[1],
        lambda: stack[-1],
        lambda: stack[0, 2:4],
        lambda: stack.unbind(0)[0],
        lambda: stack.select(0, 1),
    ]
    for part in parts:
        mode = Following()
        mode.flow.put(weight, Origin.of(WEIGHT, layer="w"))
        mode.flow.put(stack, Origin.of(WEIGHT, layer="s"))
        with mode:
            found = mode.flow.origin(part())
        assert found.state == WEIGHT
        layers.append(found.as_layer().layer)
    assert layers == [
        "w(0:3)",
        "w(3:6)",
        "w(4:6)",
        "w(1:6)",
        "w(2:4)",
        "w(:,0:2)",
        "s.1",
        "s.2",
        "s.0(2:4)",
        "s.0",
        "s.1",
    ]


def test_weights_that_are_joined_are_one_layer_of_both_names() -> None:
    mode = Following()
    first, second = generic((2, 4)), generic((3, 4))
    mode.flow.put(first, Origin.of(WEIGHT, layer="q"))
    mode.flow.put(second, Origin.of(WEIGHT, layer="k"))
    with mode:
        result = functional.linear(generic((5, 4)), torch.cat([first, second]))
    assert mode.flow.origin(result).layer == "q+k"


def test_rows_that_data_picks_from_a_stack_of_weights_are_rows_of_its_layers() -> None:
    mode = Following()
    stack = generic((3, 6, 4))
    mode.flow.put(stack, Origin.of(WEIGHT, layer="s"))
    x, chosen = generic((2, 4, 1)), torch.tensor([0, 2])
    with mode:
        result = torch.bmm(stack[chosen], x)
        turned = result.flip(0)
    units = mode.flow.origin(result).units
    assert units is not None
    assert units.experts is not None
    assert (units.experts.layers, units.size, units.rows) == (("s.0", "s.1", "s.2"), 6, 2)
    assert mode.flow.expert_rows.owners(units).tolist() == [0, 2]
    assert mode.flow.origin(turned).state == "rows"


# The table.


def all_names() -> set[str]:
    return {
        *MOVES,
        *ELEMENTWISE,
        *REDUCTIONS,
        *PRODUCTS,
        *["cat", "concat", "concatenate", "stack", "hstack", "column_stack", "vstack", "row_stack"],
        *["scatter", "scatter_add", "scatter_reduce", "index_add", "index_copy", "index_reduce", "index_put", "im2col"],
        *[
            "linear",
            "bilinear",
            "embedding",
            "embedding_bag",
            "batch_norm",
            "instance_norm",
            "group_norm",
            "layer_norm",
            "rms_norm",
            "convolution",
            "native_layer_norm",
            "native_group_norm",
            "native_batch_norm",
        ],
        *["gru", "lstm", "gru_cell", "lstm_cell", "rnn_tanh", "rnn_relu", "rnn_tanh_cell", "rnn_relu_cell", "einsum"],
        *(f"conv{transposed}{dims}d" for transposed in ("", "_transpose") for dims in (1, 2, 3)),
        "multi_head_attention_forward",
        "unfold",
        "broadcast_tensors",
    }


#: Functions of the table that no case draws, and why.
NOT_DRAWN = {
    **NOT_RUN,
    "grouped_mm": "claims rows of several layers, and never units",
    "_grouped_mm": "the same",
    "_native_multi_head_attention": "the fused form of multi_head_attention_forward, with the same rule",
    **dict.fromkeys(
        [
            "_native_batch_norm_legit",
            "_native_batch_norm_legit_functional",
            "_native_batch_norm_legit_no_training",
            "_batch_norm_with_update",
        ],
        "has the rule of native_batch_norm",
    ),
    "max_unpool1d": "needs the indices of a pooling; the rule is that of the pooling",
    "max_unpool2d": "the same",
    "max_unpool3d": "the same",
    "copy_": "overwrites everything: the result is what was written",
    "fill_": "the same",
    "full_like": "the same",
    "new_full": "the same",
    "new_tensor": "the same",
    "tensor": "the same",
    "as_tensor": "the same",
    "asarray": "the same",
    "meshgrid": "claims no units",
    "masked_select": "the same",
    "expit": "is sigmoid",
    "quantize_per_tensor": "has the rule of `to`",
    "quantize_per_channel": "the same",
    "fake_quantize_per_tensor_affine": "the same",
    "fake_quantize_per_channel_affine": "the same",
}


def listed_names() -> Iterator[str]:
    """Every name in the lists of the table, from its source."""
    found = [f"{unit_rules.__name__}.{each.name}" for each in pkgutil.iter_modules(unit_rules.__path__)]
    for module in (operators, *map(importlib.import_module, found)):
        assert module.__file__ is not None
        for node in ast.walk(ast.parse(Path(module.__file__).read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "table":
                names = node.args[0]
                text = names.value if isinstance(names, ast.Constant) else getattr(module, ast.unparse(names))
                assert isinstance(text, str)
                yield from text.split()


def test_every_name_in_the_lists_is_a_function_of_torch() -> None:
    names = list(listed_names())
    homes = (functional, torch, Tensor, torch.ops.aten)
    assert len(names) > 300
    assert [name for name in names if not any(callable(getattr(home, name, None)) for home in homes)] == []
    assert len(set(names)) == len(names)


def claims_units(rule: Any) -> bool:
    return rule is not end


def test_every_function_of_the_table_is_drawn_or_says_why_not() -> None:
    drawn = {function for name in all_names() for function in spellings(name, in_place=True)}
    drawn |= {torch.linalg.vector_norm, torch.linalg.norm}
    excused = {function for name in NOT_DRAWN for function in spellings(name)}
    excused |= {
        function
        for name in (elementwise_rules._FACTORIES + elementwise_rules._ZEROS).split()
        for function in spellings(name)
    }
    excused |= {torch.special.expit, torch.special.erf}
    left = {function for function, rule in operators.RULES.items() if claims_units(rule)} - drawn - excused
    assert sorted(map(repr, left)) == []


def test_no_reason_is_given_for_a_function_that_is_drawn() -> None:
    assert set(NOT_DRAWN) & (all_names() - set(NOT_RUN)) == set()
