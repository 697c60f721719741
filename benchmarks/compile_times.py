"""What watching adds to the time that ``torch.compile`` takes for a forward and a backward pass.

The network is compiled anew at each turn, unwatched and watched in turn, without the compiler's caches. The time is
that of the processor, of the C++ compiler too.
"""

from __future__ import annotations

import contextlib
import os
import statistics
import time
import warnings
from collections.abc import Callable, Iterator

import torch
import torch._dynamo
import torch._inductor.config
import torch.nn.functional as F
from torch import Tensor, nn

import neuronscope as ns
from benchmarks.nets import NETS
from benchmarks.tables import Table, milliseconds, ratio
from benchmarks.turns import Times

__all__ = ["tables"]

Build = Callable[[], tuple[nn.Module, Tensor, Tensor]]
ROUNDS = {"aot_eager": 5, "inductor": 3}


class _Gated(nn.Module):
    """A feed-forward layer with SwiGLU, of which gate and partner are halves of one projection."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        gate, partner = self.up(self.norm(x)).chunk(2, -1)
        return x + self.down(F.silu(gate) * partner)


def gated() -> tuple[nn.Module, Tensor, Tensor]:
    """Four layers of width 64 with SwiGLU, 128 tokens."""
    net = nn.Sequential(nn.Embedding(256, 64), *(_Gated(64) for _ in range(4)), nn.Flatten(0, 1), nn.Linear(64, 256))
    return net, torch.randint(256, (4, 128)), torch.randint(256, (4 * 128,))


def compile_once(build: Build, backend: str, *, watched: bool, by_blocks: bool = False) -> float:
    """Return the processor's seconds for the first training step of a network, without the optimizer.

    Args:
        build: Makes the network, its input and the target.
        backend: What compiles the graphs.
        watched: Whether it is watched.
        by_blocks: Whether each part of the network that is no module of torch's own is compiled by itself.
    """
    torch._dynamo.reset()
    torch.manual_seed(0)
    model, x, y = build()
    with ns.watch(model) if watched else contextlib.nullcontext():
        for part in model.children() if by_blocks else ():
            if not type(part).__module__.startswith("torch."):
                part.compile(backend=backend)
        run = model if by_blocks else torch.compile(model, backend=backend)
        began = _seconds()
        F.cross_entropy(run(x), y).backward()
        return _seconds() - began


def _seconds() -> float:
    """This thread's time, and that of the processes that have ended, such as the C++ compiler's."""
    return time.thread_time() + os.times().children_user + os.times().children_system


def compare(build: Build, backend: str, rounds: int, *, by_blocks: bool = False) -> tuple[Times, Times]:
    """Return the times unwatched and watched, in turn."""
    times: tuple[list[float], list[float]] = ([], [])
    for turn in range(-1, rounds):
        for watched in (False, True):
            took = compile_once(build, backend, watched=watched, by_blocks=by_blocks)
            if turn >= 0:
                times[watched].append(took)
    return Times(times[0]), Times(times[1])


def tables(*, quick: bool = False) -> Iterator[Table]:
    """One table, a row a network and back end."""
    table = Table(
        "Compiling a watched network",
        ("net", "back end", "unwatched", "watched", "watched costs a site"),
        note="Seconds of the processor for the first training step. *Watched* is the ratio to unwatched: of medians, "
        "of minima in brackets. *By blocks*: each block is compiled by itself, `block.compile()`.",
    )
    nets: dict[str, Build] = {**NETS, "SwiGLU": gated}
    sites = {"small MLP": 6, "MLP": 4, "CNN": 9, "transformer": 4, "SwiGLU": 8}
    cases = [(name, backend, False) for backend in ROUNDS for name in nets]
    cases += [(name, "aot_eager", True) for name in ("CNN", "transformer")]
    with torch._inductor.config.patch(force_disable_caches=True, compile_threads=1), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the compiler's own
        for name, backend, by_blocks in [("small MLP", "aot_eager", False)] if quick else cases:
            plain, watched = compare(nets[name], backend, 1 if quick else ROUNDS[backend], by_blocks=by_blocks)
            more = statistics.median(watched.seconds) - statistics.median(plain.seconds)
            table.rows.append(
                (
                    f"{name}, by blocks" if by_blocks else name,
                    backend,
                    milliseconds(plain.median),
                    ratio(watched.over(plain)),
                    milliseconds(max(more, 0.0) / sites[name]),
                )
            )
    yield table
