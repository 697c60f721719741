"""Optimizers in a checkpoint: recognised by what their states hold, wherever a training loop has put them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from neuronscope.checkpoints.checkpoint import OptimizerState
from neuronscope.checkpoints.formats.byte_range import quoted, quoted_list
from neuronscope.checkpoints.formats.lazy_tensor import LazyTensor
from neuronscope.checkpoints.formats.parameter_names import escape_surrogates
from neuronscope.checkpoints.formats.safe_globals import SkippedTensor

__all__ = ["find_optimizers", "is_optimizer_state", "steps_taken"]


_KEYS = ("params", "param_names")  # lists of a group that speak of parameters
_LONGEST_SETTING = 16


def is_optimizer_state(value: Any) -> bool:
    """Whether it is what ``Optimizer.state_dict()`` gives.

    >>> is_optimizer_state({"state": {}, "param_groups": [{"lr": 0.1, "params": [0]}]})
    True
    """
    if not isinstance(value, Mapping) or not isinstance(value.get("state"), Mapping):
        return False
    groups = value.get("param_groups")
    return isinstance(groups, list | tuple) and all(
        isinstance(group, Mapping) and isinstance(group.get("params"), list | tuple) for group in groups
    )


def find_optimizers(
    content: Any, strip: Callable[[str], str] = escape_surrogates, notes: list[str] | None = None
) -> tuple[OptimizerState, ...]:
    """The optimizers in a checkpoint: the whole of it, under a key, or in a list or dictionary under a key.

    Args:
        content: What lies in the checkpoint.
        strip: What takes wrappers' parts off the names of parameters.
        notes: Gets a sentence for each kind of tensor that is not read.
    """
    optimizers = tuple(_candidates(content, 2, set()))
    skipped: dict[str, list[str]] = {}
    for found in optimizers:
        for key, kept in found["state"].items():
            for name, value in kept.items() if isinstance(kept, Mapping) else ():
                if isinstance(value, SkippedTensor):
                    skipped.setdefault(value.reason, []).append(f"{escape_surrogates(key)}.{escape_surrogates(name)}")
    if notes is not None:
        for reason, names in skipped.items():
            notes.append(f"Tensors of an optimizer's state that are {reason} are not read: {quoted_list(names)}.")
    return tuple(_optimizer(found, strip) for found in optimizers)


def _candidates(value: Any, deeper: int, seen: set[int]) -> Iterator[Mapping[str, Any]]:
    """What looks like an optimizer. What is referred to again and again is looked into once."""
    if id(value) in seen:
        return
    seen.add(id(value))
    if is_optimizer_state(value):
        yield value
    elif deeper:
        inner = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
        for item in inner:
            yield from _candidates(item, deeper - 1, seen)


def _optimizer(found: Mapping[str, Any], strip: Callable[[str], str]) -> OptimizerState:
    numbered = {str(key): key for group in found["param_groups"] for key in group["params"] if type(key) is int}

    def key_of(key: Any) -> int | str:
        """A key as groups have it: folders of shards keep numbers as text."""
        if isinstance(key, str):
            return numbered.get(key, strip(key))
        return key if type(key) is int else quoted(key)

    groups = tuple(
        {escape_surrogates(name): _plain(value) for name, value in group.items() if _is_setting(value)}
        | {name: [key_of(key) for key in group[name]] for name in _KEYS if isinstance(group.get(name), list | tuple)}
        for group in found["param_groups"]
    )
    slots = {
        key_of(key): {escape_surrogates(name): _plain(value) for name, value in kept.items() if _is_kept(value)}
        for key, kept in found["state"].items()
        if isinstance(kept, Mapping)
    }
    return OptimizerState(groups, slots)


def _is_setting(value: Any) -> bool:
    """Whether it is a hyperparameter: a number, a word, nothing, or a few of them."""
    if isinstance(value, list | tuple):
        return len(value) <= _LONGEST_SETTING and all(isinstance(inner, int | float | str | None) for inner in value)
    return isinstance(value, int | float | str | None) or (isinstance(value, LazyTensor) and value.shape == ())


def _is_kept(value: Any) -> bool:
    return isinstance(value, LazyTensor | int | float)


def _plain(value: Any) -> Any:
    """A tensor of no dimensions as the number that it is; all else as it came."""
    if isinstance(value, LazyTensor) and value.shape == ():
        return value.read().item()
    return value


def steps_taken(optimizers: tuple[OptimizerState, ...]) -> int | None:
    """The most steps that any parameter of the optimizers took, where they count them (as Adam does).

    >>> steps_taken((OptimizerState((), {0: {"step": 3.0}, 1: {"step": 5}}),))
    5
    """
    steps = [slot.get("step") for optimizer in optimizers for slot in optimizer.slots.values()]
    counted = [int(step) for step in steps if isinstance(step, int | float) and 0 <= step < 2**63]
    return max(counted, default=None)
