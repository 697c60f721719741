"""Measure what a layer reads in each column: the smallest and the largest value over data."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from neuronscope.act.structure import LayerWeights
from neuronscope.attach.compiling import unwatched

__all__ = ["ColumnRanges"]


class ColumnRanges:
    """Smallest and largest values of the columns of layers, which hooks measure while a model runs."""

    def __init__(self, layers: Iterable[LayerWeights]) -> None:
        self._layers = [layer for layer in layers if layer.columns]
        self._ranges: dict[str, tuple[Tensor, Tensor]] = {}

    @contextlib.contextmanager
    def measured(self) -> Iterator[None]:
        """Measure whatever runs inside."""
        handles = []
        for layer in self._layers:

            def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], path: str = layer.path) -> None:
                with unwatched(), torch.no_grad():  # what is measured is no part of the forward
                    self._add(path, module, (*args, *kwargs.values()))

            handles.append(layer.module.register_forward_pre_hook(hook, with_kwargs=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _add(self, path: str, module: nn.Module, args: tuple[Any, ...]) -> None:
        x = args[0] if args and isinstance(args[0], Tensor) else None
        if x is None or x.numel() == 0:
            return
        size = getattr(module, "kernel_size", ())
        dim = x.dim() - 1 - len(size if isinstance(size, tuple) else ())
        others = [each for each in range(x.dim()) if each != dim]
        low, high = (x.amin(others), x.amax(others)) if others else (x, x)
        known = self._ranges.get(path)
        if known is not None:  # NaN stays: `minimum` and `amin` pass it on
            low, high = torch.minimum(known[0], low), torch.maximum(known[1], high)
        self._ranges[path] = low, high

    def measured_at(self, path: str) -> bool:
        """Whether a layer was seen to read anything; one whose weight a function was given was not."""
        return path in self._ranges

    def constants(self, path: str, columns: list[int]) -> list[float] | None:
        """Return the value that each column had throughout; ``None`` if one varied or was never seen.

        Args:
            path: Path of the layer.
            columns: The columns.
        """
        known = self._ranges.get(path)
        if known is None:
            return None
        low, high = (each[columns] for each in known)
        return low.tolist() if bool(((low == high) & low.isfinite()).all()) else None
