"""Compute the weights that several tensors of a checkpoint give together: masks, adapters, weight and spectral norm.

Pruning stores ``weight_orig`` and ``weight_mask``; LoRA, as PEFT stores it, the weight of a ``base_layer`` and two
small matrices; weight norm a direction and a magnitude; spectral norm a weight and two vectors. A layer computes with
what they give. PEFT need not be installed: the scale of an adapter is in its ``adapter_config.json``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from neuronscope.checkpoints.checkpoint import Checkpoint, ComputedTensor, StoredTensor
from neuronscope.checkpoints.formats.byte_range import quoted_list
from neuronscope.errors import CheckpointError

__all__ = ["MergedWeight", "holds_only_adapters", "merged_weights", "plain_tensors"]

_LORA = re.compile(r"(?P<path>.+)\.lora_A(?P<adapter>\.[^.]+)?\.weight")
_ADAPTER = re.compile(r"(^|\.)lora_")
_SAVED = re.compile(r"(?P<path>.+)\.modules_to_save\.[^.]+\.(?P<leaf>[^.]+)")


class MergedWeight(NamedTuple):
    """A weight that is computed from several stored tensors when it is read."""

    name: str  # the name that it has in a network without masks, adapters or norms of weights
    stored: str  # name of the stored tensor whose place it takes; ``""`` if the checkpoint holds an adapter only
    parts: tuple[str, ...]  # names of all stored tensors that it is computed from
    tensor: ComputedTensor  # the weight


def holds_only_adapters(checkpoint: Checkpoint) -> bool:
    """Whether a checkpoint holds adapters of LoRA, and not the weights that they change."""
    found = [match["path"] for match in map(_LORA.fullmatch, checkpoint.tensors) if match is not None]
    stored = (f"{path}{base}.weight" for path in found for base in ("", ".base_layer"))
    return bool(found) and not any(name in checkpoint.tensors for name in stored)


def merged_weights(checkpoint: Checkpoint, base: Mapping[str, Tensor] | None = None) -> Iterator[MergedWeight]:
    """Yield the weights of a checkpoint that several tensors give together.

    Args:
        checkpoint: The opened checkpoint.
        base: The tensors of a network by name, to which the adapters belong if the file holds nothing else.

    Raises:
        CheckpointError: Adapters cannot be merged.
    """
    tensors = checkpoint.tensors
    for name in tensors:
        for ending, others, compute in _MERGED:
            if not name.endswith(ending):
                continue
            path = name.removesuffix(ending)
            parts = (name, *(path + other for other in others))
            if not all(part in tensors for part in parts):
                continue
            if compute is _scaled and math.prod(tensors[parts[1]].shape) not in tensors[name].shape:
                continue  # not one magnitude for each row
            bare = re.sub(r"(^|\.)parametrizations\.", r"\1", path)
            stored = [tensors[part] for part in parts]
            like = stored[0]
            merged = ComputedTensor(like.shape, like.torch_dtype, partial(compute, *stored))
            yield MergedWeight(bare, name, parts, merged)
    yield from _adapted(checkpoint, base or {})


def plain_tensors(checkpoint: Checkpoint, base: Mapping[str, Tensor] | None = None) -> dict[str, StoredTensor]:
    """Return a checkpoint's tensors by the names that they have in a network without masks, adapters or such norms.

    Args:
        checkpoint: The opened checkpoint.
        base: See :func:`merged_weights`.
    """
    merged = list(merged_weights(checkpoint, base))
    parts = {part for one in merged for part in one.parts}
    at = {one.stored: one for one in merged}
    plain: dict[str, StoredTensor] = {}
    for name, tensor in checkpoint.tensors.items():
        if name in at:
            plain[_bare(at[name].name)] = at[name].tensor
        elif name not in parts and ".original_module." not in name:
            saved = _SAVED.fullmatch(name)
            plain[f"{saved['path']}.{saved['leaf']}" if saved else _bare(name)] = tensor
    return plain | {one.name: one.tensor for one in merged if not one.stored}


def _bare(name: str) -> str:
    return name.replace(".base_layer.", ".")


def _masked(weight: StoredTensor, mask: StoredTensor) -> Tensor:
    """Return what pruning leaves of a weight."""
    read = weight.read()
    return read * mask.read().to(read.dtype)


def _scaled(direction: StoredTensor, magnitude: StoredTensor) -> Tensor:
    """Return what weight norm gives: a direction for each row, times the row's magnitude."""
    read, size = direction.read(), magnitude.read()
    dims = [dim for dim, length in enumerate(size.shape) if length == 1]
    scaled: Tensor = read * (size / torch.linalg.vector_norm(read, dim=dims, keepdim=True))
    return scaled


def _divided(weight: StoredTensor, left: StoredTensor, right: StoredTensor) -> Tensor:
    """Return what spectral norm gives in evaluation: the weight divided by its largest singular value."""
    read, u, v = weight.read(), left.read(), right.read()
    axis = next(dim for dim in range(read.dim()) if read.shape[dim] == len(u))
    return read / torch.dot(u, read.movedim(axis, 0).flatten(1) @ v)


#: How the name of a stored weight ends, how those of the tensors that belong to it end, and what they give together.
_MERGED: tuple[tuple[str, tuple[str, ...], Callable[..., Tensor]], ...] = (
    ("_orig", ("_mask",), _masked),
    ("_v", ("_g",), _scaled),
    (".original1", (".original0",), _scaled),
    (".original", (".0._u", ".0._v"), _divided),
    ("_orig", ("_u", "_v"), _divided),
)


def _adapted(checkpoint: Checkpoint, base: Mapping[str, Tensor]) -> Iterator[MergedWeight]:
    """Yield the weights that LoRA changes."""
    tensors = checkpoint.tensors
    found = [match for match in map(_LORA.fullmatch, tensors) if match is not None]
    known = {match[0] for match in found} | {match[0].replace(".lora_A", ".lora_B") for match in found}
    others = [name for name in tensors if _ADAPTER.search(name) and name not in known]
    if others:
        raise CheckpointError(
            f"The adapters of {checkpoint.path} cannot be merged into the weights: only the two matrices of LoRA for "
            f"linear layers and convolutions are understood, but there are {quoted_list(others)}."
        )
    if len({match["adapter"] for match in found}) > 1:
        names = quoted_list(sorted({match["adapter"] or "" for match in found}))
        raise CheckpointError(f"Expected one adapter in {checkpoint.path}, but it holds several: {names}.")
    for match in found:
        first, second = match[0], match[0].replace(".lora_A", ".lora_B")
        path = match["path"]
        stored = next((name for name in (f"{path}.base_layer.weight", f"{path}.weight") if name in tensors), "")
        under = [name for name in base if name == f"{path}.weight" or name.endswith(f".{path}.weight")]
        if second not in tensors or (not stored and len(under) != 1):
            raise CheckpointError(
                f"{checkpoint.path} holds an adapter, but neither it nor the network has the weight `{path}.weight` "
                "that it changes."
            )
        weight = tensors[stored] if stored else ComputedTensor.of(base[under[0]].clone())
        compute = partial(
            _add_adapter,
            weight,
            tensors[first],
            tensors[second],
            _scale(checkpoint.adapter, path, tensors[first].shape[0]),
            is_transposed=bool(checkpoint.adapter.get("fan_in_fan_out")),
        )
        parts = (first, second, *([stored] if stored else []))
        merged = ComputedTensor(weight.shape, weight.torch_dtype, compute)
        yield MergedWeight(_bare(stored or under[0]), stored, parts, merged)


def _add_adapter(
    weight: StoredTensor, first: StoredTensor, second: StoredTensor, scale: float, *, is_transposed: bool
) -> Tensor:
    """Return a weight plus the scaled product of an adapter's two matrices, in the weight's shape and dtype."""
    read = weight.read()
    change = second.read().flatten(1).float() @ first.read().flatten(1).float() * scale
    if is_transposed:
        change = change.T
    return (read.float() + change.view(read.shape)).to(read.dtype)


def _scale(config: Mapping[str, Any], path: str, rank: int) -> float:
    """Return the factor of a LoRA adapter: α / r, or 1 without its configuration."""
    alpha = config.get("lora_alpha")
    for pattern, value in dict(config.get("alpha_pattern") or {}).items():
        if re.fullmatch(rf"(.*\.)?{pattern}", path):
            alpha = value
    if not isinstance(alpha, (int, float)):
        return 1.0
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
