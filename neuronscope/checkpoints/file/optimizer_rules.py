"""Recognise the optimizer of a parameter from its saved state and group, and collect what the clock needs.

Several optimizers use the same names in their state. Only optimizers that are known to keep the running means that the
clock assumes are read. Of some others, exact zeros show that a row never got a gradient. For all others the reason is
reported.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from neuronscope.checkpoints.checkpoint import StoredTensor
from neuronscope.checkpoints.file.optimizer_clocks import FASTEST_FADING

__all__ = ["OF_SCHEDULERS", "OptimizerRule", "finite_settings", "recognize_optimizer", "steps_taken"]

_MEANS = ("exp_avg", "exp_avg_sq")
_MEANS_OF_BITSANDBYTES = ("state1", "state2")
_EXACT_TYPES = frozenset({"float32", "float64"})
_WIDE_TYPES = _EXACT_TYPES | {"bfloat16"}  # the square of an ordinary gradient does not underflow
_NEVER_UPDATED = "it was never updated: it was frozen, or no gradient ever reached it"


@dataclass(frozen=True)
class OptimizerRule:
    """The optimizer of one parameter."""

    name: str  # ``Adam``, ``AdamW``, ``NAdam``, ``RAdam``, ``SGD``, ``Muon``, ``Adagrad`` …
    slots: tuple[str, ...]  # the tensors of its state that are read; each has the parameter's shape
    #: Decays of the running means: two for Adam and its variants, the momentum for SGD and Muon; none if it has no
    #: clock. Of a decay that a schedule cycles, the largest.
    betas: tuple[float, ...]
    least_beta: float  # the least decay of the first running mean; it differs from ``betas[0]`` if a schedule cycles it
    decay: float  # weight decay, λ
    #: True if it acts on the weights only (AdamW); ``False`` = it is added to the gradient (L2), so that the optimizer
    #: never sees a gradient of zero; ``None`` = the file does not say.
    is_decoupled: bool | None
    dampening: float  # the fraction of a gradient that SGD does not add to its momentum buffer
    rate: float  # the learning rate at the time of saving; NaN if the file has none
    #: Why the time of the last gradient cannot be read: only rows that never got one can be told; ``""`` if it can.
    no_clock: str = ""

    @property
    def is_adam(self) -> bool:
        """Whether it keeps the two means of Adam, and its clock can be read."""
        return len(self.betas) == 2

    @property
    def is_momentum(self) -> bool:
        """Whether it keeps one mean, a momentum buffer, and its clock can be read."""
        return len(self.betas) == 1

    @property
    def hides_zero_gradients(self) -> bool | None:
        """Whether decay makes rows without gradient look as if they had one; ``None`` = not known."""
        if self.decay == 0:
            return False
        return None if self.is_decoupled is None else not self.is_decoupled

    @property
    def source(self) -> str:
        """The source that evidence from this state names."""
        return "adam state" if self.is_adam else "sgd state" if self.name == "SGD" else f"{self.name} state"


#: Optimizers without a clock that add each gradient, or its square, to a sum or a mean that does not reach zero again:
#: the tensor of their state that is zero only if there never was a gradient, those that may lie beside it, and its
#: decay: the name of a hyperparameter, with the place in it; none for a sum. The first row that fits counts.
_ONLY_ZEROS: tuple[tuple[str, str, set[str], tuple[str, int] | None], ...] = (
    ("Adagrad", "sum", set(), None),
    ("RMSprop", "square_avg", {"momentum_buffer", "grad_avg"}, ("alpha", 0)),
    ("Adadelta", "square_avg", {"acc_delta"}, ("rho", 0)),
    ("Lion", "exp_avg", set(), ("betas", 1)),
    ("Adamax", "exp_avg", {"exp_inf"}, ("betas", 0)),
)
#: Optimizers of which nothing can be read, by tensors of their state.
_UNREADABLE = (
    ("Adafactor", ("row_var", "col_var", "variance", "exp_avg_sq_row", "exp_avg_sq_col")),
    ("an 8-bit optimizer", ("qmap1", "absmax1")),
    ("an optimizer of bitsandbytes that keeps one mean", ("state1",)),
    ("fastai's optimizers", ("grad_avg", "sqr_avg")),
    ("Rprop", ("step_size",)),
)
#: Further tensors that an optimizer may keep beside Adam's means without changing them: those of amsgrad, and copies.
_BESIDE_MEANS = frozenset({"max_exp_avg_sq", "master_param"})
#: Settings of the AdamW of transformers before 5. Others begin with it and keep means of
#: gradients in other coordinates (SOAP, GaLore), in which a row is no neuron.
_OF_TRANSFORMERS = frozenset({"lr", "betas", "eps", "weight_decay", "correct_bias"})
#: What torch and its schedulers add to the settings of a group, whatever its optimizer is.
OF_SCHEDULERS = frozenset(
    {"params", "param_names", "initial_lr", "max_lr", "min_lr", "base_momentum", "max_momentum", "step"}
)
_NO_SLOTS = ("step", "ax", "eta", "mu", "mu_product")  # numbers that are kept beside the means


def recognize_optimizer(group: Mapping[str, Any], slots: Mapping[str, Any]) -> OptimizerRule | str:
    """Return the optimizer of a parameter, or the reason why its state shows nothing.

    Args:
        group: The hyperparameters of the parameter's group.
        slots: The saved state of the parameter.
    """
    kept = frozenset(map(str, slots)).difference(_NO_SLOTS)
    if kept.issuperset(_MEANS) and kept <= _BESIDE_MEANS.union(_MEANS):
        return _adam(group, slots, _MEANS)
    if kept == set(_MEANS_OF_BITSANDBYTES):
        return _adam(group, slots, _MEANS_OF_BITSANDBYTES)
    if not {"ns_steps", "ns_coefficients", "use_muon"}.isdisjoint(group) and kept == {"momentum_buffer"}:
        return _momentum("Muon", group, slots)
    if "nesterov" in group and kept <= {"momentum_buffer"}:
        return _momentum("SGD", group, slots)
    for name, zero, beside, decay in _ONLY_ZEROS:
        if zero in kept and kept <= {zero} | beside:
            return _only_zeros(name, group, slots, (zero,), decay, f"no clock for {name}")
    for name, marks in _UNREADABLE:
        if not kept.isdisjoint(marks):
            return f"no clock for {name}, which keeps {_listed(slots)}"
    if not slots:
        return _NEVER_UPDATED
    return f"no clock for its optimizer, which keeps {_listed(slots)}"


def _listed(slots: Mapping[str, Any]) -> str:
    return ", ".join(map(str, list(slots)[:8])) or "nothing"


def _adam(group: Mapping[str, Any], slots: Mapping[str, Any], means: tuple[str, str]) -> OptimizerRule | str:
    numbers = {key for key, value in group.items() if not isinstance(value, str)}
    of_transformers = "correct_bias" in group and numbers <= _OF_TRANSFORMERS | OF_SCHEDULERS
    always_decoupled = of_transformers or "use_muon" in group or means != _MEANS
    if "momentum_decay" in group:
        name = "NAdam"
    elif "amsgrad" in group:
        name = "AdamW" if group.get("decoupled_weight_decay") is True else "Adam"
    elif always_decoupled:
        # That of transformers before 5; what the Muon of Jordan et al. uses for other parameters; all of bitsandbytes'.
        name = "AdamW"
    elif "decoupled_weight_decay" in group:
        name = "RAdam"
    else:
        return (
            "no clock for its optimizer, which keeps exp_avg and exp_avg_sq, but its groups are not those of Adam, "
            f"AdamW, NAdam or RAdam: they hold {', '.join(map(str, sorted(map(str, group)))) or 'nothing'}"
        )
    if not (types := _dtypes(slots, means)) <= _EXACT_TYPES:
        return _only_zeros(name, group, slots, means, ("betas", 1), _inexact(name, types))
    betas, amount = _numbers(group.get("betas")), _number(group.get("weight_decay"))
    if betas is None or len(betas) != 2 or amount is None:
        return f"its group's betas are {group.get('betas')!r} and its weight decay {group.get('weight_decay')!r}"
    least, largest = _cycled(group, betas[0])
    if not (least > 0 and largest**2 < betas[1] < 1):
        beta1 = f"{betas[0]:g}" if least == largest else f"{least:g} to {largest:g}"
        return f"with betas of {beta1} and {betas[1]:g} its clock cannot be read: 0 < β1 < √β2 < 1 is needed"
    says = always_decoupled or group.get("decoupled_weight_decay")
    decoupled = says if isinstance(says, bool) else None
    return OptimizerRule(name, means, (largest, betas[1]), least, amount, decoupled, 0.0, _rate(group))


def _momentum(name: str, group: Mapping[str, Any], slots: Mapping[str, Any]) -> OptimizerRule | str:
    """Return the rule of SGD, or of Muon, which keeps the same buffer and whose decay acts on the weights only."""
    momentum, amount = _number(group.get("momentum")), _number(group.get("weight_decay"))
    dampening = _number(group.get("dampening", 0.0))
    if momentum is None or amount is None or dampening is None or not 0 <= momentum < 1:
        return f"its group's momentum is {group.get('momentum')!r} and its weight decay {group.get('weight_decay')!r}"
    least, largest = _cycled(group, momentum)
    if largest == 0:
        return f"{name} without momentum keeps nothing of past gradients"
    if not slots:
        return _NEVER_UPDATED
    if not (least > 0 and largest < 1):
        return f"with a momentum of {least:g} to {largest:g} its clock cannot be read"
    if not dampening < 1:
        return f"with a dampening of {dampening:g}, its momentum buffer does not add up gradients"
    buffer = ("momentum_buffer",)
    if not (types := _dtypes(slots, buffer)) <= _EXACT_TYPES:
        return _only_zeros(name, group, slots, buffer, ("momentum", 0), _inexact(name, types))
    return OptimizerRule(name, buffer, (largest,), least, amount, name == "Muon", dampening, _rate(group))


def _only_zeros(
    name: str,
    group: Mapping[str, Any],
    slots: Mapping[str, Any],
    zeros: tuple[str, ...],
    decay_of: tuple[str, int] | None,
    no_clock: str,
) -> OptimizerRule | str:
    """Return the rule of an optimizer of whose state only exact zeros can be read, or why not even these can be."""
    initial = _number(group.get("initial_accumulator_value", 0.0))
    if initial != 0.0:
        return f"{no_clock}: its sums begin at {group.get('initial_accumulator_value')!r}, so that none is ever zero"
    if not _dtypes(slots, zeros) <= _WIDE_TYPES:
        return no_clock
    if decay_of is not None and not _least_decay(group, *decay_of) > FASTEST_FADING:
        return f"{no_clock}: its means decay so fast that they reach exact zeros"
    decay = _number(group.get("weight_decay")) or 0.0
    return OptimizerRule(name, zeros, (), math.nan, decay, None, 0.0, _rate(group), no_clock)


def _least_decay(group: Mapping[str, Any], name: str, place: int) -> float:
    """Return the decay of a running mean, the least one if a schedule cycles it; NaN if the group has none.

    It is the hyperparameter ``name``, or the number at ``place`` in it. Schedules cycle the momentum or β1.
    """
    values = _numbers(group.get(name)) or (_number(group.get(name)),)
    value = values[place] if place < len(values) else None
    if value is None:
        return math.nan
    return _cycled(group, value)[0] if (name, place) in (("momentum", 0), ("betas", 0)) else value


def _cycled(group: Mapping[str, Any], value: float) -> tuple[float, float]:
    """Return the least and the largest momentum or β1: a group keeps the ends between which a schedule cycles it."""
    ends = [_number(group.get(name)) for name in ("base_momentum", "max_momentum")]
    values = [value, *(end for end in ends if end is not None and 0 <= end < 1)]
    return min(values), max(values)


def _rate(group: Mapping[str, Any]) -> float:
    rate = _number(group.get("lr"))
    return math.nan if rate is None else rate


def _dtypes(slots: Mapping[str, Any], names: tuple[str, ...]) -> set[str]:
    return {getattr(slots[name], "dtype", "no tensor") for name in names}


def _inexact(name: str, types: set[str]) -> str:
    return (
        f"no clock for {name} whose state is kept in {' and '.join(sorted(types))}, where small numbers stop decaying: "
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


def finite_settings(group: Mapping[str, Any], *names: str) -> list[float]:
    """Return the hyperparameters of these names that are finite numbers, or tensors of one.

    Args:
        group: The hyperparameters of a parameter group.
        *names: Their names.
    """
    values = (group.get(name) for name in names)
    numbers = (value.item() if isinstance(value, Tensor) and value.numel() == 1 else value for value in values)
    # A damaged file may hold an integer that no float can hold; NaN is not below anything.
    return [float(one) for one in numbers if isinstance(one, (int, float)) and abs(one) <= sys.float_info.max]
