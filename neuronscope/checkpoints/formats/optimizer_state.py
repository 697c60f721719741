"""Find optimizers in a checkpoint by what their states hold, wherever a training loop has put them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from neuronscope.checkpoints.checkpoint import OptimizerState, StoredTensor
from neuronscope.checkpoints.formats.byte_range import quoted, quoted_list
from neuronscope.checkpoints.formats.parameter_names import escape_surrogates
from neuronscope.checkpoints.formats.safe_globals import SkippedTensor

__all__ = ["find_optimizers", "is_optimizer_state", "steps_taken"]


_KEYS = ("params", "param_names")  # lists of a group that name its parameters
_LONGEST_SETTING = 16
_DEEPEST = 16  # levels of dictionaries and lists
# bitsandbytes keeps its tensors in a dictionary of their own, beside the step.
_INNER_SLOTS = "__bnb_optimizer_quant_state__"


def is_optimizer_state(value: Any) -> bool:
    """Whether a value has the form of ``Optimizer.state_dict()``.

    >>> is_optimizer_state({"state": {}, "param_groups": [{"lr": 0.1, "params": [0]}]})
    True
    """
    if not isinstance(value, Mapping) or not isinstance(value.get("state"), Mapping):
        return False
    groups = value.get("param_groups")
    return isinstance(groups, list | tuple) and all(
        isinstance(group, Mapping) and isinstance(group.get("params"), list | tuple) for group in groups
    )


def _is_fastai_state(value: Any) -> bool:
    """Whether a value has the form of fastai's ``Optimizer.state_dict()``: a list of states, and hyperparameters."""
    if not isinstance(value, Mapping) or set(value) != {"state", "hypers"}:
        return False
    return all(
        isinstance(part, list | tuple) and part and all(isinstance(inner, Mapping) for inner in part)
        for part in value.values()
    )


def find_optimizers(
    content: Any, strip: Callable[[str], str] = escape_surrogates, notes: list[str] | None = None
) -> tuple[OptimizerState, ...]:
    """Return the optimizers in a checkpoint: the whole of it, or in the dictionaries and lists inside it.

    Args:
        content: The content of the checkpoint.
        strip: Removes what wrappers add to the names of parameters.
        notes: A list to which a sentence is added for each kind of tensor that is not read.
    """
    optimizers = tuple(_candidates(content, _DEEPEST, set()))
    skipped: dict[str, list[str]] = {}
    for optimizer in optimizers:
        for key, slots in optimizer["state"].items():
            for name, value in _all_slots(slots) if isinstance(slots, Mapping) else ():
                if isinstance(value, SkippedTensor):
                    skipped.setdefault(value.reason, []).append(f"{escape_surrogates(key)}.{escape_surrogates(name)}")
    if notes is not None:
        for reason, names in skipped.items():
            notes.append(f"Tensors of an optimizer's state that are {reason} are not read: {quoted_list(names)}.")
    return tuple(_optimizer(optimizer, strip) for optimizer in optimizers)


def _candidates(value: Any, depth: int, seen: set[int]) -> Iterator[Mapping[str, Any]]:
    """Yield what has the form of an optimizer's state. An object that is referred to many times is searched once."""
    if id(value) in seen:
        return
    seen.add(id(value))
    if is_optimizer_state(value):
        yield value
    elif _is_fastai_state(value):
        params = list(range(len(value["state"])))
        yield {"state": dict(enumerate(value["state"])), "param_groups": [{**value["hypers"][0], "params": params}]}
    elif depth:
        inner = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
        for item in inner:
            yield from _candidates(item, depth - 1, seen)


def _optimizer(found: Mapping[str, Any], strip: Callable[[str], str]) -> OptimizerState:
    numbered = {str(key): key for group in found["param_groups"] for key in group["params"] if type(key) is int}

    def key_of(key: Any) -> int | str:
        """Return a key as the groups have it: distributed checkpoints store numbers as text."""
        if isinstance(key, str):
            return numbered.get(key, strip(key))
        return key if type(key) is int else quoted(key)

    groups = tuple(
        {escape_surrogates(name): _plain(value) for name, value in group.items() if _is_setting(value)}
        | {name: [key_of(key) for key in group[name]] for name in _KEYS if isinstance(group.get(name), list | tuple)}
        for group in found["param_groups"]
    )
    slots = {
        key_of(key): {
            escape_surrogates(name): _plain(value)
            for name, value in _all_slots(values)
            if isinstance(value, StoredTensor | int | float)
        }
        for key, values in found["state"].items()
        if isinstance(values, Mapping)
    }
    return OptimizerState(groups, slots)


def _is_setting(value: Any) -> bool:
    """Whether a value is a hyperparameter: a number, also in a tensor, a string, ``None``, or a short list of them."""
    values = value if isinstance(value, list | tuple) else (value,)
    return len(values) <= _LONGEST_SETTING and all(
        isinstance(inner, int | float | str | None) or (isinstance(inner, StoredTensor) and inner.shape == ())
        for inner in values
    )


def _all_slots(values: Mapping[Any, Any]) -> Iterator[tuple[Any, Any]]:
    """Yield the names and values of what is kept of a parameter."""
    inner = values.get(_INNER_SLOTS)
    yield from values.items()
    yield from inner.items() if isinstance(inner, Mapping) else ()


def _plain(value: Any) -> Any:
    """Return a tensor without dimensions as a number, also in a list, and any other value unchanged."""
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value] if isinstance(value, list) else tuple(map(_plain, value))
    if isinstance(value, StoredTensor) and value.shape == ():
        return value.read().item()
    return value


def steps_taken(optimizers: tuple[OptimizerState, ...]) -> int | None:
    """Return the largest step count of any parameter, or ``None`` if the optimizers do not count steps (Adam does).

    >>> steps_taken((OptimizerState((), {0: {"step": 3.0}, 1: {"step": 5}}),))
    5
    """
    steps = [slot.get("step") for optimizer in optimizers for slot in optimizer.slots.values()]
    counted = [int(step) for step in steps if isinstance(step, int | float) and 0 <= step < 2**63]
    return max(counted, default=None)
