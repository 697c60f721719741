"""A whole training step that is captured as a CUDA graph by hand, and replayed, watched.

A replay runs the device's work and no line of Python. It counts, because the capture has recorded the counting too.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import neuronscope as ns

__all__ = ["REPLAYS", "WARM", "replayed"]

WARM, REPLAYS = 3, 5


def replayed(model: nn.Module, x: Tensor, y: Tensor) -> ns.Scope:
    """Warm up, capture one training step and replay it, as torch's documentation of CUDA graphs says, while watched.

    Args:
        model: On a CUDA device.
        x: Its input, there too.
        y: The target.

    Returns:
        The scope of the watch, which is over.
    """
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        F.cross_entropy(model(x), y).backward()
        optimizer.step()

    with ns.watch(model) as scope:
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(WARM):
                step()
                scope.step()
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        scope.step()
        for _ in range(REPLAYS):
            graph.replay()
            scope.step()
    return scope
