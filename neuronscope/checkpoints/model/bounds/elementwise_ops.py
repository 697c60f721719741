"""How intervals pass through elementwise functions: activations, sums, products, choices.

Rules as in :mod:`neuronscope.checkpoints.model.bounds.weighted_ops`. A function that never falls gives its bounds at
the ends. GELU, SiLU, Mish and Hardswish fall to one least value and rise from there: their upper bound lies at an end,
their lower bound is known.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from neuronscope.checkpoints.model.bounds.interval import Interval, gamma, nearly, product, widened
from neuronscope.checkpoints.model.traced_graph import substitute

__all__ = ["ELEMENTWISE_RULES"]

Rule = Callable[..., "Interval | None"]


def _plain(values: tuple[Any, ...]) -> bool:
    """Whether what is given besides the input is plain numbers and constant tensors."""
    return not any(isinstance(value, Interval) for value in values)


def _as_rounded(dtype: torch.dtype, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Iterator[tuple[Any, Any]]:
    """Arguments as they are written, and as a kernel may hold them: a number that is no float32 becomes one."""
    yield args, kwargs
    for rounded in {torch.float32, dtype}:

        def held(leaf: Any, to: torch.dtype = rounded) -> Any:
            return torch.tensor(leaf, dtype=to).item() if isinstance(leaf, float) else leaf

        yield substitute((args, dict(kwargs)), held)


def _rising(function: Callable[..., Tensor], *, rounds: bool = True, floor: float = -math.inf) -> Rule:
    """A function that never falls; ``floor``: a value below which it never comes, however it is rounded."""

    def rule(dtype: torch.dtype, input: Any, *args: Any, **kwargs: Any) -> Interval | None:
        if not isinstance(input, Interval) or not _plain((*args, *kwargs.values())):
            return None
        kwargs.pop("inplace", None)
        made = [
            (function(input.low, *given, **named), function(input.high, *given, **named))
            for given, named in _as_rounded(dtype, args, kwargs)
        ]
        low, high = torch.stack([ends[0] for ends in made]).amin(0), torch.stack([ends[1] for ends in made]).amax(0)
        if rounds:
            tiny = 2 * torch.finfo(dtype).tiny
            found = nearly(Interval(low, high, input.shape), dtype)
            low = torch.where(low == 0, low, found.low - tiny).clamp_min(floor)
            high = torch.where(high == 0, high, found.high + tiny)
        return Interval(low, high, input.shape)

    return rule


def _scaled(rule: Rule) -> Rule:
    """A function that never falls as long as its scales are positive."""

    def checked(dtype: torch.dtype, input: Any, *args: Any, **kwargs: Any) -> Interval | None:
        scales = [number for number in (*args, *kwargs.values()) if not isinstance(number, bool)]
        return rule(dtype, input, *args, **kwargs) if all(scale > 0 for scale in scales) else None

    return checked


def _valley(function: Callable[..., Tensor], least: float, zero_below: float, *, only_short: bool = True) -> Rule:
    """A function that falls from 0 to its least value and rises from there.

    Args:
        function: The function.
        least: A number below its least value.
        zero_below: At and below this it is exactly zero, however it is computed.
        only_short: That holds in 16 and 32 bits only.
    """

    def rule(dtype: torch.dtype, input: Any, *args: Any, **kwargs: Any) -> Interval | None:
        if not isinstance(input, Interval) or not _plain((*args, *kwargs.values())):
            return None
        kwargs.pop("inplace", None)
        low, high = (
            torch.where(torch.isinf(end), end.clamp_min(0), function(end, *args, **kwargs))
            for end in (input.low, input.high)
        )
        found = nearly(Interval(low, torch.maximum(low, high), input.shape), dtype)
        tiny = 2 * torch.finfo(dtype).tiny
        low = torch.where(input.low >= 0, found.low - tiny, least)
        high = found.high + tiny
        if dtype != torch.float64 or not only_short:
            silent = input.high <= zero_below
            low, high = torch.where(silent, 0.0, low), torch.where(silent, 0.0, high)
        return Interval(low, high, input.shape)

    return rule


def _leaky(dtype: torch.dtype, input: Any, slope: Any = 0.01, inplace: bool = False, **named: Any) -> Interval | None:
    """LeakyReLU with one slope, PReLU with one a channel."""
    slope = named.get("negative_slope", named.get("weight", slope))
    if not isinstance(input, Interval) or isinstance(slope, Interval):
        return None
    if isinstance(slope, Tensor):
        slope = slope.detach().double()
        if slope.numel() > 1 and len(input.shape) > 1:
            slope = slope.view(1, -1, *(1 for _ in input.shape[2:]))
    else:
        slope = torch.tensor(float(slope), dtype=torch.float64)
    # Whatever the sign of the slope: the ends, and 0 where it lies between them.
    low, high = (torch.where(end >= 0, end, product(end, slope)) for end in (input.low, input.high))
    inside = torch.where((input.low < 0) & (input.high > 0), 0.0, high)
    ends = torch.broadcast_tensors(low, high, inside)
    found = Interval(torch.stack(ends).amin(0), torch.stack(ends).amax(0), input.shape)
    return nearly(found, dtype)


def _ends(dtype: torch.dtype, value: Any, rank: int) -> tuple[Tensor, Tensor] | None:
    """Bounds of an operand as the network holds it, in at least ``rank`` dimensions."""
    if isinstance(value, Interval):
        low, high = value.low, value.high
    elif isinstance(value, Tensor):
        low = high = value.detach().double()
    elif isinstance(value, (int, float)):
        low = high = torch.tensor(float(value), dtype=torch.float64)
    else:
        return None
    if not isinstance(value, Interval) and not torch.equal(low.to(dtype).double(), low):
        low, high = widened(low, high, gamma(0, dtype))  # it is rounded before it is used
    missing = (1,) * (rank - low.dim())
    return low.reshape((*missing, *low.shape)), high.reshape((*missing, *high.shape))


def _pair(dtype: torch.dtype, left: Any, right: Any, combine: Callable[..., tuple[Tensor, Tensor]]) -> Interval | None:
    rank = max((len(value.shape) for value in (left, right) if isinstance(value, (Interval, Tensor))), default=0)
    ends = _ends(dtype, left, rank), _ends(dtype, right, rank)
    if ends[0] is None or ends[1] is None:
        return None
    low, high = combine(*ends[0], *ends[1])
    shapes = [tuple(value.shape) for value in (left, right) if isinstance(value, (Interval, Tensor))]
    return nearly(Interval(low, high, tuple(torch.broadcast_shapes(*shapes))), dtype)


def _add(dtype: torch.dtype, left: Any, right: Any, *, alpha: float = 1) -> Interval | None:
    return _pair(dtype, left, right, lambda a, b, c, d: (a + c, b + d)) if alpha == 1 else None


def _subtract(dtype: torch.dtype, left: Any, right: Any, *, alpha: float = 1) -> Interval | None:
    return _pair(dtype, left, right, lambda a, b, c, d: (a - d, b - c)) if alpha == 1 else None


def _products(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
    ends = torch.stack(torch.broadcast_tensors(product(a, c), product(a, d), product(b, c), product(b, d)))
    return ends.amin(0), ends.amax(0)


def _multiply(dtype: torch.dtype, left: Any, right: Any) -> Interval | None:
    if left is right and isinstance(left, Interval):
        return _square(dtype, left)
    return _pair(dtype, left, right, _products)


def _divide(dtype: torch.dtype, left: Any, right: Any, *, rounding_mode: str | None = None) -> Interval | None:
    ends = _ends(dtype, right, 0)
    if rounding_mode is not None or ends is None or not bool(((ends[0] > 0) | (ends[1] < 0)).all()):
        return None  # the divisor may be zero

    def combine(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
        return _products(a, b, 1 / d, 1 / c)

    return _pair(dtype, left, right, combine)


def _power(dtype: torch.dtype, left: Any, exponent: Any) -> Interval | None:
    return _square(dtype, left) if isinstance(left, Interval) and exponent == 2 else None


def _square(dtype: torch.dtype, x: Any) -> Interval | None:
    if not isinstance(x, Interval):
        return None
    low, high = x.low.abs(), x.high.abs()
    least = torch.where((x.low <= 0) & (x.high >= 0), 0.0, torch.minimum(low, high))
    return nearly(Interval(least * least, torch.maximum(low, high) ** 2, x.shape), dtype)


def _absolute(dtype: torch.dtype, x: Any) -> Interval | None:
    if not isinstance(x, Interval):
        return None
    low, high = x.low.abs(), x.high.abs()
    least = torch.where((x.low <= 0) & (x.high >= 0), 0.0, torch.minimum(low, high))
    return Interval(least, torch.maximum(low, high), x.shape)


def _negative(dtype: torch.dtype, x: Any) -> Interval | None:
    return Interval(-x.high, -x.low, x.shape) if isinstance(x, Interval) else None


def _within(low: float, high: float) -> Rule:
    """A function whose values always lie between two numbers."""

    def rule(dtype: torch.dtype, input: Any, *args: Any, **kwargs: Any) -> Interval | None:
        if not isinstance(input, Interval):
            return None
        return nearly(Interval.between(low, high, input.shape), dtype)

    return rule


def _either(dtype: torch.dtype, condition: Any, left: Any, right: Any) -> Interval | None:
    """One or the other."""

    def combine(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
        return torch.minimum(a, c), torch.maximum(b, d)

    found = _pair(dtype, left, right, combine)
    rank = len(condition.shape) if isinstance(condition, (Interval, Tensor)) else 0
    if found is None or rank <= len(found.shape):
        return found
    lead = (1,) * (rank - len(found.shape))
    low, high = found.low.reshape(*lead, *found.low.shape), found.high.reshape(*lead, *found.high.shape)
    return Interval(low, high, (*lead, *found.shape))


def _masked(dtype: torch.dtype, x: Any, mask: Any, value: Any) -> Interval | None:
    return _either(dtype, mask, x, value)


def _threshold(
    dtype: torch.dtype, input: Any, threshold: float, value: float, inplace: bool = False
) -> Interval | None:
    if not isinstance(input, Interval):
        return None
    found = [_cut(input, *numbers) for numbers, _ in _as_rounded(dtype, (threshold, value), {})]
    low, high = torch.stack([ends[0] for ends in found]).amin(0), torch.stack([ends[1] for ends in found]).amax(0)
    return Interval(low, high, input.shape)


def _cut(input: Interval, threshold: float, value: float) -> tuple[Tensor, Tensor]:
    """``x`` where it is above the threshold, else the value."""
    kept_low, kept_high = input.low.clamp_min(threshold), input.high
    some_off, some_on = input.low <= threshold, input.high > threshold
    low = torch.where(some_off, torch.where(some_on, torch.minimum(kept_low, kept_low * 0 + value), value), kept_low)
    high = torch.where(some_on, torch.where(some_off, kept_high.clamp_min(value), kept_high), value)
    return low, high


# Where GELU is exactly zero in float32, however it is computed: x·Φ(x) at −15 is −6e-50, and half the least denormal is
# 7e-46. x·eˣ, which SiLU and Mish come to, is −2e-46 at −110.
_GELU_ZERO, _SILU_ZERO = -15.0, -110.0

_RULES: dict[str, Rule] = {
    **{
        name: _rising(getattr(F, name, None) or getattr(torch, name), rounds=False)
        for name in (
            "relu",
            "relu6",
            "hardtanh",
            "clamp",
            "clip",
            "clamp_min",
            "clamp_max",
            "hardshrink",
        )
    },
    **{
        name: _rising(getattr(F, name, None) or getattr(torch, name), floor=0.0)
        for name in ("sigmoid", "hardsigmoid", "exp")
    },
    **{
        name: _rising(getattr(F, name, None) or getattr(torch, name))
        for name in ("tanh", "selu", "logsigmoid", "softshrink", "expm1", "atan", "erf")
    },
    "softplus": _scaled(_rising(F.softplus, floor=0.0)),
    "elu": _scaled(_rising(F.elu)),
    "celu": _scaled(_rising(F.celu)),
    "gelu": _valley(F.gelu, -0.1701, _GELU_ZERO),
    "silu": _valley(F.silu, -0.2785, _SILU_ZERO),
    "mish": _valley(F.mish, -0.3089, _SILU_ZERO),
    "hardswish": _valley(F.hardswish, -0.3751, -3.0, only_short=False),
    "threshold": _threshold,
    "leaky_relu": _leaky,
    "prelu": _leaky,
    **dict.fromkeys(("add", "__add__", "__radd__", "__iadd__"), _add),
    **dict.fromkeys(("sub", "subtract", "__sub__", "__isub__"), _subtract),
    **dict.fromkeys(("rsub", "__rsub__"), lambda dtype, left, right: _subtract(dtype, right, left)),
    **dict.fromkeys(("mul", "multiply", "__mul__", "__rmul__", "__imul__"), _multiply),
    **dict.fromkeys(("div", "divide", "true_divide", "__truediv__", "__itruediv__"), _divide),
    **dict.fromkeys(("__rtruediv__", "__rdiv__"), lambda dtype, left, right: _divide(dtype, right, left)),
    **dict.fromkeys(("pow", "__pow__"), _power),
    "square": _square,
    **dict.fromkeys(("abs", "absolute"), _absolute),
    **dict.fromkeys(("neg", "negative"), _negative),
    **dict.fromkeys(("sin", "cos"), _within(-1.0, 1.0)),
    "softmax": _within(0.0, 1.0),
    "normalize": _within(-1.0, 1.0),
    "where": _either,
    "masked_fill": _masked,
}


def _spellings(name: str) -> list[Callable[..., Any]]:
    """A function in all its homes, in place too."""
    names = (name, f"{name}_")
    return [
        getattr(home, spelling)
        for home in (F, torch, Tensor)
        for spelling in names
        if callable(getattr(home, spelling, None)) and not (home is Tensor and name == "where")
    ]


#: Torch function → the rule that stands for it.
ELEMENTWISE_RULES: dict[Callable[..., Any], Rule] = {
    function: rule for name, rule in _RULES.items() for function in _spellings(name)
}
ELEMENTWISE_RULES[torch.special.expit] = _RULES["sigmoid"]
