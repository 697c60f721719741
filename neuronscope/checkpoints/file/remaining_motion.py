r"""Bound how far an optimizer's state can still move a parameter that gets no gradient any more.

Without gradient an optimizer moves a parameter only by what is left of its momentum, and by weight decay. At learning
rates in ``[0, η]``, for each element:

**Adam, AdamW, NAdam.** After ``k`` steps ``m = β1ᵏ m₀`` and ``v = β2ᵏ v₀``; the bias corrections divide ``m`` by at
least ``1 − β1^(t+1)`` and ``v`` by at most 1. So all later steps together move it by at most::

    η / (1 − β1^(t+1)) · Σ β1ᵏ |m₀| / max(β2^(k/2) √v₀, ε)
    ≤ η / (1 − β1^(t+1)) · |m₀| · min(r / (1 − r) / √v₀, β1 / (1 − β1) / ε),    r = β1 / √β2

Decoupled decay multiplies the parameter by a number ``s`` in (0, 1] that all elements of a group share. What is bounded
then is the motion divided by ``s``: with ``q = 1 − ηλ``, β1 becomes ``β1 / q``.

**SGD.** With momentum μ and no decay, at most ``η μ / (1 − μ) |buffer|``. Weight decay λ is part of the gradient here.
A buffer ``ρ w`` stays a multiple of ``w``, with ``ρ ≤ 2λ / (1 − μ)`` if ``8ηλ ≤ (1 − μ)²``; such a pair only shrinks.
The rest of the buffer, ``R``, shrinks by ``θ = μ / (1 − ηh)²`` a step, ``h = 2λ / (1 − μ)``, relative to the weights,
and moves them by at most ``η μ / ((1 − ηh)(1 − θ)) |R|`` relative to ``s``.

**Adagrad, RMSprop without momentum, Adadelta** move nothing without a gradient, if there is no weight decay.

Rounding: a step to ``fl(w − Δ)`` moves at most twice as far as ``Δ``, since ``w`` itself is a number of the type. Decay
rounds each element apart, by one unit roundoff a step, so that elements do not shrink alike. This, and a momentum that
stops at the smallest number of its type, limits the number of steps that are vouched for.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from neuronscope.checkpoints.file.optimizer_rules import (
    OF_SCHEDULERS,
    OptimizerRule,
    finite_settings,
    recognize_optimizer,
    steps_taken,
)
from neuronscope.checkpoints.file.parameter_matching import ParameterState

__all__ = ["RemainingMotion", "remaining_motion"]

#: The most steps that are vouched for: fewer, where decay shrinks weights by more than ``e⁻⁴⁰`` before.
_MOST_STEPS, _MOST_FOLDS = 1_000_000, 40.0
_WITHOUT_MOTION = {"Adagrad", "RMSprop", "Adadelta"}
_OPTIMIZERS = {"Adam", "AdamW", "NAdam", "SGD", *_WITHOUT_MOTION}


@dataclass(frozen=True, eq=False)
class RemainingMotion:
    """How far an optimizer can still move a parameter without gradient."""

    optimizer: str  # name of the optimizer
    reach: Tensor  # the most that each element moves, apart from decay, float64 of the parameter's shape
    group: Mapping[str, Any] | None  # the parameter's group, whose decay its parameters share; ``None`` without decay
    steps: int  # for how many steps this holds
    rate: float  # the highest learning rate for which it holds


def remaining_motion(state: ParameterState | None, weight: Tensor) -> RemainingMotion | str:
    """Bound the motion of a parameter that gets no gradient any more, or say why there is no bound.

    Args:
        state: What the optimizer keeps of the parameter; ``None`` if the checkpoint does not show it.
        weight: The parameter, of any shape.

    >>> group = {"lr": 0.1, "momentum": 0.5, "weight_decay": 0.0, "dampening": 0, "nesterov": False}
    >>> from types import SimpleNamespace
    >>> buffer = SimpleNamespace(shape=(1,), dtype="float32", read=lambda: torch.tensor([0.25]))
    >>> remaining_motion(ParameterState(0, group, {"momentum_buffer": buffer}), torch.ones(1)).reach
    tensor([0.0505], dtype=torch.float64)
    """
    if state is None:
        return "the optimizer's state of its weights is not known"
    group, slots, weight = state.group, state.slots, weight.detach()
    rates = finite_settings(group, "lr", "initial_lr", "max_lr")
    decay = finite_settings(group, "weight_decay")
    if not finite_settings(group, "lr") or not decay or min(rates) < 0 or decay[0] < 0:
        return "the learning rate or the weight decay of its optimizer is not known"
    rate, amount = max(rates), decay[0]
    if "nesterov" in group and not _unknown_settings(group, "SGD") and set(slots) <= {"momentum_buffer"}:
        return _sgd(group, slots, weight, rate, amount)
    rule = recognize_optimizer(group, slots)
    name = rule if isinstance(rule, str) else rule.name
    if isinstance(rule, str) or name not in _OPTIMIZERS:
        return f"how {name} moves weights without a gradient is not known" if isinstance(rule, OptimizerRule) else name
    if unknown := _unknown_settings(group, name):
        return f"its optimizer has settings that {name} of torch does not have: {', '.join(sorted(unknown))}"
    if name in _WITHOUT_MOTION and amount == 0 and "momentum_buffer" not in slots:
        return RemainingMotion(name, torch.zeros_like(weight, dtype=torch.float64), None, _MOST_STEPS, rate)
    if not rule.is_adam:
        return rule.no_clock or f"how {name} moves weights without a gradient is not known"
    return _adam(rule, group, slots, weight, rate)


def _adam(
    rule: OptimizerRule, group: Mapping[str, Any], slots: Mapping[str, Any], weight: Tensor, rate: float
) -> RemainingMotion | str:
    amount, epsilon = rule.decay, finite_settings(group, "eps")
    if amount and rule.is_decoupled is not True:
        return "its weight decay is, or may be, added to the gradient, which Adam turns into steps of full length"
    mean, square = (slots[slot].read().double() for slot in rule.slots)
    if mean.shape != weight.shape or square.shape != weight.shape:
        return "its optimizer's state has another shape"
    keeps, steps = _decay(rate * amount)
    rounding = 4 * torch.finfo(slots["exp_avg"].read().dtype).eps
    first = rule.betas[0] * (1 + rounding) / keeps
    both = first / math.sqrt(rule.betas[1] * (1 - rounding))
    if not epsilon or epsilon[0] < 1e-16 or keeps <= 0.5 or max(first, both) >= 1:
        return "with these betas, this ε or this decay there is no bound"
    taken = steps_taken(slots, group) or 0
    largest = rate / (1 - rule.betas[0] ** (taken + 1))
    slopes = both / (1 - both) / square.sqrt(), torch.full_like(square, first / (1 - first) / epsilon[0])
    folded = torch.where(mean == 0, 0.0, mean.abs() * torch.minimum(*slopes).nan_to_num(posinf=math.inf))
    # Where the mean stops at a denormal, it moves the weight on and on, by next to nothing.
    stuck = steps / keeps**steps * 3 * _smallest(slots["exp_avg"].read().dtype) / (1 - rule.betas[0]) / epsilon[0]
    reach = 2.02 * largest * (folded + stuck) + _uneven(weight, steps, keeps)
    return RemainingMotion(rule.name, reach, group if amount else None, steps, rate)


def _sgd(
    group: Mapping[str, Any], slots: Mapping[str, Any], weight: Tensor, rate: float, amount: float
) -> RemainingMotion | str:
    momentum = max(finite_settings(group, "momentum", "base_momentum", "max_momentum"), default=math.nan)
    dampening = finite_settings(group, "dampening")
    if not (0 <= momentum < 1 and dampening and 0 <= dampening[0] <= 1) or not finite_settings(group, "momentum"):
        return "the momentum of its optimizer is not known"
    stored = slots.get("momentum_buffer")
    buffer = torch.zeros_like(weight) if stored is None or isinstance(stored, (int, float)) else stored.read()
    if buffer.shape != weight.shape or buffer.dtype not in (torch.float32, torch.float64):
        return "its optimizer's state has another shape, or a type of 16 bits"
    if 8 * rate * amount > (1 - momentum) ** 2:
        return "with this momentum, this learning rate and this weight decay there is no bound"
    ratio = 2 * amount / (1 - momentum)
    keeps, steps = _decay(rate * ratio)
    spread = rate * momentum / keeps / (1 - momentum / keeps**2)
    own = amount * (1 - dampening[0]) / (1 - finite_settings(group, "momentum")[0])
    rest = (buffer.double() - own * weight.double()).abs() if momentum else torch.zeros_like(weight).double()
    stuck = steps / keeps**steps * 3 * _smallest(buffer.dtype) / (1 - momentum)
    roundings = (1 + 3 * rate * ratio) * (1 + spread * ratio) + 3 * spread * ratio if amount else 1.0
    reach = 2.02 * (spread * rest + rate * stuck) + roundings * _uneven(weight, steps, keeps)
    return RemainingMotion("SGD", reach, group if amount else None, steps, rate)


def _decay(per_step: float) -> tuple[float, int]:
    """Return the least factor that a step of decay leaves of a weight, and for how many steps to vouch."""
    if per_step == 0:
        return 1.0, _MOST_STEPS
    return 1 - per_step - 2**-22, min(_MOST_STEPS, int(_MOST_FOLDS / per_step))


def _uneven(weight: Tensor, steps: int, keeps: float) -> Tensor:
    """Return by how much more or less than the others' rounding may shrink each element."""
    if keeps == 1.0:
        return torch.zeros_like(weight, dtype=torch.float64)
    own = weight.double().abs()
    return own * math.expm1(steps * torch.finfo(weight.dtype).eps / 2) + steps * _smallest(weight.dtype) / keeps**steps


def _smallest(dtype: torch.dtype) -> float:
    """Return the smallest positive number of a type."""
    kind = torch.finfo(dtype)
    return kind.tiny * kind.eps


def _unknown_settings(group: Mapping[str, Any], name: str) -> set[str]:
    """Return the settings of a group that torch's optimizer of this name does not have; names and the like are fine."""
    known = {*getattr(torch.optim, name)([torch.zeros(1)]).defaults, *OF_SCHEDULERS}
    return {str(key) for key, value in group.items() if key not in known and not isinstance(value, (str, type(None)))}
