"""Tighten the intervals of pre-activations by linear bounds that are passed backwards through the network.

Intervals forget that two numbers come from the same input. Here, what a pre-activation is at most is written as a
linear function of earlier tensors, from the last to the first (CROWN: Zhang et al. 2018, arXiv 1811.00866). Linear
layers, convolutions (by their transpose), batch norm in evaluation, sums, views, means and average pooling are passed
exactly. A ReLU whose input lies in ``[l, u]`` with ``l < 0 < u`` is at most ``u (x − l) / (u − l)``, and at least 0 or
``x``. Any other function, and any that may mix examples, ends the way: its interval takes its place.

Rounding: a step gives ``f(x) + e`` for the ``x`` that was computed before it, with ``|e| ≤ γ |f|(|x|)``, where ``|f|``
has the absolute values of the weights (see :mod:`.interval`). The coefficient of the step's output times this error is
added. :func:`~neuronscope.checkpoints.model.bounds.interval.gamma` has room for the rounding of our own float64.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from neuronscope.attach.torch_functions import spellings
from neuronscope.checkpoints.model.bounds.interval import Interval, gamma, product
from neuronscope.checkpoints.model.example_inputs import EXAMPLES, keeps_examples
from neuronscope.checkpoints.model.function_rules import DROPOUT, OPERATORS
from neuronscope.checkpoints.model.needed_inputs import by_move, by_reduction, by_same
from neuronscope.checkpoints.model.traced_graph import Graph, Step, TensorRef, substitute

__all__ = ["RELU", "tightened"]

RELU = spellings("relu", in_place=True)
_BATCH_NORM = inspect.signature(F.batch_norm)
_LAYERS = spellings(
    *("linear", "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d"),
    *("matmul", "mm", "__matmul__"),
)
_SUMS = spellings("add", "__add__", "__radd__", "__iadd__", "neg", "negative", in_place=True)
_DIFFERENCES = spellings("sub", "subtract", "__sub__", "__isub__", in_place=True)
_PRODUCTS = spellings("mul", "multiply", "__mul__", "__rmul__", "__imul__", in_place=True)
_QUOTIENTS = spellings("div", "divide", "true_divide", "__truediv__", "__itruediv__", in_place=True)
_MEANS = spellings("mean", "sum", "avg_pool1d", "avg_pool2d", "avg_pool3d") | spellings(
    "adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d"
)
#: Most numbers in the coefficients of a part of the neurons, and of all of them: larger networks keep intervals.
_PART, _MOST = 2**22, 2**27


@torch.no_grad()
def tightened(graph: Graph, intervals: list[Interval | None], number: int) -> Interval | None:
    """Return a tighter interval of a tensor, where a linear bound says more of the elements that may have both signs.

    Args:
        graph: A traced forward on :data:`~neuronscope.checkpoints.model.example_inputs.EXAMPLES` examples.
        intervals: The intervals of all tensors before it, and its own.
        number: The tensor, ``(B, …)``.
    """
    known, shape = intervals[number], graph.values[number].shape
    steps = graph.steps[: graph.steps_until(number)]
    if known is None or not steps or shape[:1] != (EXAMPLES,) or known.low.shape[0] != 1:
        return known
    low, high = (end[:1].expand(1, *shape[1:]).clone() for end in (known.low, known.high))
    unsure = torch.nonzero((low < 0) & (high > 0).logical_and(high < torch.inf))
    sizes = [math.prod(graph.values[output].shape) for step in steps for output in step.outputs]
    if not len(unsure) or 2 * len(unsure) * sum(sizes) > _MOST:
        return known
    for part in unsure.split(max(1, _PART // (2 * max(sizes)))):
        places = tuple(part.T)
        coefficients = torch.zeros((2, len(part), *shape), dtype=torch.float64)
        for sign, side in zip((1.0, -1.0), coefficients, strict=True):
            side[(torch.arange(len(part)), *places)] = sign
        above, below = _Backward(graph, intervals).most(number, coefficients.flatten(0, 1), steps).chunk(2)
        high[places] = torch.minimum(high[places], above)
        low[places] = torch.maximum(low[places], -below)
    return Interval(low, high, known.shape, known.source, known.normed).cleaned()


class _Backward:
    """Bounds linear functions of a tensor by linear functions of earlier ones."""

    def __init__(self, graph: Graph, intervals: list[Interval | None]) -> None:
        self._graph = graph
        self._intervals = intervals

    def most(self, number: int, coefficients: Tensor, steps: list[Step]) -> Tensor:
        """Return what the functions ``coefficients``, ``(K, *shape)``, of a tensor are at most, ``(K,)``."""
        total = torch.zeros(len(coefficients), dtype=torch.float64)
        left = {number: coefficients}
        for step in reversed(steps):
            found = [output for output in step.outputs if output in left]
            for output in found:
                own = left.pop(output)
                passed = self._passed(step, own) if len(step.outputs) == 1 else None
                if passed is None:
                    total += self._ended(output, own)
                    continue
                constant, inputs = passed
                total += constant
                for before, more in inputs.items():
                    left[before] = left[before] + more if before in left else more
        for output, own in left.items():
            total += self._ended(output, own)
        return total.nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=torch.inf)

    def _ended(self, number: int, coefficients: Tensor) -> Tensor:
        """Return what linear functions of a tensor are at most by its interval alone."""
        interval = self._intervals[number] or Interval.unknown(self._graph.values[number].shape)
        up = product(coefficients.clamp_min(0), interval.full_high) + product(
            coefficients.clamp_max(0), interval.full_low
        )
        size = product(coefficients.abs(), self._size(number))
        return up.flatten(1).sum(1) + gamma(math.prod(interval.shape), torch.float64) * size.flatten(1).sum(1)

    def _size(self, number: int) -> Tensor:
        """Return the largest absolute value of each element of a tensor, float64 of its shape."""
        interval = self._intervals[number] or Interval.unknown(self._graph.values[number].shape)
        return torch.maximum(interval.full_low.abs(), interval.full_high.abs())

    def _passed(self, step: Step, coefficients: Tensor) -> tuple[Tensor, dict[int, Tensor]] | None:
        """Return a constant and linear functions of a step's inputs that bound functions of its output, if known."""
        try:
            if step.function in RELU:
                return self._through_relu(step.reads[0], coefficients)
            error = self._rounding(step)
            return None if error is None else self._through_affine(step, coefficients, error)
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError):
            return None  # called in a way that is not known

    def _through_relu(self, number: int, coefficients: Tensor) -> tuple[Tensor, dict[int, Tensor]] | None:
        interval = self._intervals[number]
        if interval is None:
            return None
        low, high = interval.full_low, interval.full_high
        unsure = (low < 0) & (high > 0)
        if not bool((low.isfinite() & high.isfinite()).all()):
            return None
        chord = torch.where(unsure, high / (high - low), (low >= 0).double())
        floor = torch.where(unsure, (high > -low).double(), (low >= 0).double())
        up, down = coefficients.clamp_min(0), coefficients.clamp_max(0)
        constant = up * torch.where(unsure, -low * chord, 0.0)
        slack = 8 * gamma(0, torch.float64) * (coefficients.abs() * self._size(number))
        return (constant + slack).flatten(1).sum(1), {number: up * chord + down * floor}

    def _through_affine(self, step: Step, coefficients: Tensor, error: Tensor) -> tuple[Tensor, dict[int, Tensor]]:
        with torch.enable_grad():
            zeros = {
                number: torch.zeros(self._graph.values[number].shape, dtype=torch.float64, requires_grad=True)
                for number in self._graph.variable_inputs(step)
            }
            # Cloned, since the function may change its input in place.
            origin = self._applied(step, lambda number: zeros[number].clone())
            slopes = torch.autograd.grad(
                origin, list(zeros.values()), coefficients, is_grads_batched=True, allow_unused=True
            )
        constant = coefficients * origin.detach() + product(coefficients.abs(), error)
        found = {number: slope for number, slope in zip(zeros, slopes, strict=True) if slope is not None}
        return constant.flatten(1).sum(1), found

    def _applied(
        self, step: Step, given: Callable[[int], Tensor], constant: Callable[[Tensor], Tensor] = Tensor.double
    ) -> Tensor:
        """Call a step's function in float64, on ``given`` in place of tensors that depend on the input."""

        def changed(number: int) -> Tensor:
            kept = self._graph.values[number].constant
            if kept is None:
                return given(number)
            return constant(kept.detach().cpu()) if kept.is_floating_point() else kept

        if _is(step, by_same):
            step = Step(torch.Tensor.clone, step.args[:1], {}, step.outputs, step.reads)  # such as a cast
        args, kwargs = step.arguments(changed)
        output: Tensor = step.function(*args, **kwargs)
        return output

    def _rounding(self, step: Step) -> Tensor | None:
        """Return a bound on the rounding error of each element of a step's output; ``None`` if it is not passed."""
        values = self._graph.values
        made = values[step.outputs[0]]
        inputs = [number for number in step.reads if values[number].constant is None]  # x · x has two
        ranks = {len(values[number].shape) for number in inputs}
        separate = all(values[number].shape[:1] == (EXAMPLES,) for number in (*inputs, step.outputs[0]))
        if not separate or not all(values[number].dtype.is_floating_point for number in (*inputs, *step.outputs)):
            return None
        if _is(step, by_move):
            return torch.zeros(made.shape).double() if keeps_examples(self._graph, step) else None
        one, terms, function = len(inputs) == 1, 4, step.function
        constants = [values[number].constant for number in step.reads if values[number].constant is not None]
        by_place = any(one.dim() >= len(made.shape) and one.shape[0] != 1 for one in constants if one is not None)
        if function in _LAYERS or function is torch.addmm:
            weights = [one for one in constants if one is not None and one.dim() > 1]
            first = step.args[1] if function is torch.addmm else step.args[0]
            transposed = "transpose" in getattr(function, "__name__", "")
            if not one or len(weights) != 1 or first != TensorRef(inputs[0]) or ranks == {1}:
                return None
            if weights[0].dim() > 2 and ranks != {weights[0].dim()}:
                return None
            terms = weights[0][:, 0].numel() if transposed else weights[0].numel() // min(weights[0].shape[:2])
        elif function is F.batch_norm:
            if not one or step.args[0] != TensorRef(inputs[0]) or step.argument(5, "training", False):
                return None
            return self._batch_norm_error(step, made.dtype)
        elif function in _MEANS:
            shape = values[inputs[0]].shape
            pooled = not _is(step, by_reduction) and len(shape) == int(function.__name__.rstrip("d")[-1]) + 2
            if not one or not (pooled or _reduces_other_dimensions(step, len(shape))):
                return None
            terms = math.prod(shape)
        elif function in _PRODUCTS | _QUOTIENTS:
            if not one or by_place or (function in _QUOTIENTS and step.args[0] != TensorRef(inputs[0])):
                return None
        elif function in _SUMS | _DIFFERENCES:
            if by_place or ranks != {len(made.shape)}:
                return None
        elif not _is(step, by_same) or not one or _may_drop(step):
            return None
        size = self._applied(_with_plus_signs(step), self._size, lambda kept: kept.double().abs())
        return _error(size, terms, made.dtype)

    def _batch_norm_error(self, step: Step, dtype: torch.dtype) -> Tensor:
        """Return the error of a batch norm: it subtracts its running mean, so the size is that of the negative mean."""

        def size_or_constant(number: int) -> Tensor:
            kept = self._graph.values[number].constant
            return self._size(number) if kept is None else kept.detach().cpu().double()

        args, kwargs = step.arguments(size_or_constant)
        given = _BATCH_NORM.bind(*args, **kwargs).arguments
        given["running_mean"] = -given["running_mean"].abs()
        for name in ("weight", "bias"):
            if given.get(name) is not None:
                given[name] = given[name].abs()
        return _error(F.batch_norm(**given), 8, dtype)


def _error(size: Tensor, terms: int, dtype: torch.dtype) -> Tensor:
    """Return a bound on the rounding error of sums of so many terms, from the sum of the terms' absolute values."""
    kind = torch.finfo(dtype)
    return gamma(terms, dtype) * size + terms * kind.tiny * kind.eps


def _is(step: Step, rule: Any) -> bool:
    known = OPERATORS.get(step.function)
    return known is not None and known.needed_inputs is rule


def _may_drop(step: Step) -> bool:
    """Whether a step is dropout that may be active: only the call that ``nn.Dropout`` makes is told to be idle."""
    return step.function in DROPOUT and (step.function is not F.dropout or step.argument(2, "training", True))


def _reduces_other_dimensions(step: Step, rank: int) -> bool:
    """Whether a sum or mean is over named dimensions that do not include the first."""
    dims = step.argument(1, "dim", None)
    listed = [dims] if isinstance(dims, int) else list(dims or ())
    return bool(listed) and all(isinstance(dim, int) and dim % rank != 0 for dim in listed)


def _with_plus_signs(step: Step) -> Step:
    """Return a step that adds where it subtracts, with the absolute values of the numbers among its operands."""
    function = torch.add if step.function in _DIFFERENCES else step.function
    if step.function not in _SUMS | _DIFFERENCES | _PRODUCTS | _QUOTIENTS:
        return step
    if step.function in spellings("neg", "negative", in_place=True):
        function = torch.abs

    def positive(leaf: Any) -> Any:
        return abs(leaf) if isinstance(leaf, (int, float)) and not isinstance(leaf, bool) else leaf

    args, kwargs = substitute((step.args, dict(step.kwargs)), positive)
    return Step(function, args, kwargs, step.outputs, step.reads)
