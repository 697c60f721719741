"""Recognise the optimizer of a parameter from its saved state and group, and collect what the clock needs.

Several optimizers use the same names in their state. Only optimizers that are known to keep the running means that the
clock assumes are read; for all others the reason is reported.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from neuronscope.checkpoints.checkpoint import StoredTensor

__all__ = ["OptimizerRule", "WeightDecay", "recognize_optimizer", "steps_taken"]

_EXACT_TYPES = ("float32", "float64")
_NEVER_UPDATED = "it was never updated: it was frozen, or no gradient ever reached it"


@dataclass(frozen=True)
class WeightDecay:
    """The weight decay of a parameter group.

    Attributes:
        amount: λ.
        decoupled: True if it acts on the weights only (AdamW); ``False`` = it is added to the gradient (L2), so that
            the optimizer never sees a gradient of zero; ``None`` = the file does not say.
    """

    amount: float
    decoupled: bool | None

    @property
    def hides_zero_gradients(self) -> bool | None:
        """Whether it makes rows without gradient look as if they had one; ``None`` = not known."""
        if self.amount == 0:
            return False
        return None if self.decoupled is None else not self.decoupled


@dataclass(frozen=True)
class OptimizerRule:
    """The optimizer of one parameter.

    Attributes:
        name: ``Adam``, ``AdamW``, ``NAdam``, ``RAdam``, ``SGD`` …
        betas: Decays of the running means: two for Adam and its variants, the momentum for SGD.
        decay: The weight decay.
        rate: The learning rate at the time of saving; NaN if the file has none.
    """

    name: str
    betas: tuple[float, ...]
    decay: WeightDecay
    rate: float

    @property
    def source(self) -> str:
        """The source that evidence from this state names."""
        return "sgd state" if self.name == "SGD" else "adam state"


def recognize_optimizer(group: Mapping[str, Any], slots: Mapping[str, Any]) -> OptimizerRule | str:
    """Return the optimizer of a parameter, or the reason why its state shows nothing.

    Args:
        group: The hyperparameters of the parameter's group.
        slots: The saved state of the parameter.
    """
    if "exp_avg" in slots and "exp_avg_sq" in slots:
        return _adam(group, slots)
    if "nesterov" in group and set(slots) <= {"momentum_buffer"}:
        return _sgd(group, slots)
    if not slots:
        return _NEVER_UPDATED
    kept = ", ".join(map(str, list(slots)[:8])) or "nothing"
    return f"its optimizer keeps {kept}: the clock of such an optimizer is not known"


def _adam(group: Mapping[str, Any], slots: Mapping[str, Any]) -> OptimizerRule | str:
    if "momentum_decay" in group:
        name = "NAdam"
    elif "amsgrad" in group:
        name = "AdamW" if group.get("decoupled_weight_decay") is True else "Adam"
    elif "correct_bias" in group:
        name = "AdamW"  # transformers before 5; always decoupled
    elif "decoupled_weight_decay" in group:
        name = "RAdam"
    else:
        return (
            "its optimizer keeps exp_avg and exp_avg_sq, but its groups are not those of Adam, AdamW, NAdam or RAdam: "
            f"they hold {', '.join(map(str, sorted(map(str, group)))) or 'nothing'}"
        )
    reason = _unsupported_dtype(slots, "exp_avg", "exp_avg_sq")
    if reason:
        return reason
    betas, amount = _numbers(group.get("betas")), _number(group.get("weight_decay"))
    if betas is None or len(betas) != 2 or amount is None:
        return f"its group's betas are {group.get('betas')!r} and its weight decay {group.get('weight_decay')!r}"
    if not (betas[0] > 0 and betas[0] ** 2 < betas[1] < 1):
        return f"with betas of {betas[0]:g} and {betas[1]:g} its clock cannot be read: 0 < β1 < √β2 < 1 is needed"
    decoupled = True if "correct_bias" in group else group.get("decoupled_weight_decay")
    rate = _number(group.get("lr"))
    return OptimizerRule(
        name,
        betas,
        WeightDecay(amount, decoupled if isinstance(decoupled, bool) else None),
        math.nan if rate is None else rate,
    )


def _sgd(group: Mapping[str, Any], slots: Mapping[str, Any]) -> OptimizerRule | str:
    momentum, amount = _number(group.get("momentum")), _number(group.get("weight_decay"))
    if momentum is None or amount is None or not 0 <= momentum < 1:
        return f"its group's momentum is {group.get('momentum')!r} and its weight decay {group.get('weight_decay')!r}"
    if momentum == 0:
        return "SGD without momentum keeps nothing of past gradients"
    if not slots:
        return _NEVER_UPDATED
    reason = _unsupported_dtype(slots, "momentum_buffer")
    if reason:
        return reason
    rate = _number(group.get("lr"))
    return OptimizerRule("SGD", (momentum,), WeightDecay(amount, False), math.nan if rate is None else rate)


def _unsupported_dtype(slots: Mapping[str, Any], *names: str) -> str | None:
    types = {getattr(slots[name], "dtype", "no tensor") for name in names}
    if len(types) == 1 and types <= set(_EXACT_TYPES):
        return None
    return (
        f"its optimizer's state is kept in {' and '.join(sorted(types))}, where small numbers stop decaying: "
        "its clock can be read in float32 and float64 only"
    )


def steps_taken(slots: Mapping[str, StoredTensor | float], group: Mapping[str, Any]) -> int | None:
    """Return the number of steps in which a parameter was updated; ``None`` if its optimizer does not count them.

    Args:
        slots: The saved state of the parameter.
        group: The hyperparameters of its group.
    """
    step: Any = slots.get("step", group.get("step"))
    if step is not None and hasattr(step, "read"):
        step = step.read().double().max().item() if math.prod(step.shape) == 1 else None
    number = _number(step)
    return int(number) if number is not None and number >= 1 else None


def _number(value: Any) -> float | None:
    if hasattr(value, "read") and math.prod(value.shape) == 1:
        value = value.read()
    try:
        number = float(value)
    except (OverflowError, TypeError, ValueError, RuntimeError):
        return None
    return number if math.isfinite(number) else None


def _numbers(values: Any) -> tuple[float, ...] | None:
    if not isinstance(values, (tuple, list)):
        return None
    numbers = tuple(_number(value) for value in values)
    return None if any(number is None for number in numbers) else tuple(n for n in numbers if n is not None)
