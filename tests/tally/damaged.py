"""Damages to saved states: each changes one part of a state, at a random place."""

from __future__ import annotations

import copy
import math
import random
from typing import Any

import torch
from torch import Tensor

ANYTHING: tuple[Any, ...] = (
    *(None, True, -1, 0, 3, 10**6, 2**62, 2**64, -(2**63), 1.5, math.nan, math.inf),
    *("", "word", b"bytes", [], [1], ["a"], [None], {}, {"a": 1}, (), {1: 2}, {3}),
    *(torch.tensor(3), torch.tensor([-1]), torch.tensor([0.5]), torch.zeros(2, 2), torch.zeros(0)),
)


def places(state: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return the paths to all parts of a state."""
    items = state.items() if isinstance(state, dict) else enumerate(state) if isinstance(state, list) else ()
    found = [path] if path else []
    for key, value in items:
        found += places(value, (*path, key))
    return found


def damaged(state: dict[str, Any], draw: random.Random) -> tuple[dict[str, Any], str]:
    """Return a copy of a state with one change, and what was changed."""
    state = copy.deepcopy(state)
    *path, key = draw.choice(places(state))
    holder: Any = state
    for part in path:
        holder = holder[part]
    ways = [_remove, _replace, _add, _change, _change, _change]
    way = draw.choice(ways)
    what = way(holder, key, draw)
    return state, f"{'.'.join(map(str, (*path, key)))}: {what}"


def _remove(holder: Any, key: Any, draw: random.Random) -> str:
    del holder[key]
    return "removed"


def _replace(holder: Any, key: Any, draw: random.Random) -> str:
    holder[key] = draw.choice(ANYTHING)
    return f"now {holder[key]!r}"


def _add(holder: Any, key: Any, draw: random.Random) -> str:
    value = draw.choice([holder[key], *ANYTHING])
    if isinstance(holder, list):
        holder.insert(key, value)
    else:
        holder[draw.choice(["another", "0/tanh", 7])] = value
    return f"another beside it: {value!r}"


def _change(holder: Any, key: Any, draw: random.Random) -> str:
    value = holder[key]
    if isinstance(value, bool):
        holder[key] = not value
    elif isinstance(value, int):
        holder[key] = draw.choice([-value, value - 1, value + 1, -1, 0, value + 10**6, 2**62, 2**63, float(value)])
    elif isinstance(value, str):
        holder[key] = draw.choice(["", value + "x", value.upper(), "leaky", "gated", "\udcff", "<b>"])
    elif isinstance(value, Tensor):
        holder[key] = _changed(value, draw)
    elif isinstance(value, list):
        draw.shuffle(value)
    elif isinstance(value, dict) and value:
        first, other = draw.choice(list(value)), draw.choice(list(value))
        value[first], value[other] = value[other], value[first]
    return f"now {holder[key]!r}"


def _changed(tensor: Tensor, draw: random.Random) -> Tensor:
    ways = ("entry", "entry", "entry", "entry", "dtype", "shape", "kind")
    way = draw.choice(ways)
    if way == "entry" and tensor.numel():
        entry: Any = draw.choice([-1, 0, 1, 255, 10**6, 2**62, 2**63 - 1, -(2**63)])
        if tensor.is_floating_point():
            entry = draw.choice([math.nan, math.inf, -math.inf, -1.0, 1e300])
        elif tensor.dtype in (torch.uint8, torch.bool):
            entry = draw.randrange(2 if tensor.dtype == torch.bool else 256)
        tensor.view(-1)[draw.randrange(tensor.numel())] = entry
        return tensor
    if way == "dtype":
        return tensor.to(
            draw.choice([torch.float32, torch.float64, torch.int32, torch.uint8, torch.bfloat16, torch.bool])
        )
    if way == "shape":
        flat = tensor.reshape(-1)
        return draw.choice([torch.cat([flat, flat]), flat[:-1], flat[:0], tensor[None], flat.sum()])
    return draw.choice([tensor.to("meta"), tensor.to(torch.float64).requires_grad_(), tensor.to_sparse()])
