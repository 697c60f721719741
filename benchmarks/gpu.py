"""The figures that need a GPU: ``python -m benchmarks.gpu``.

Three things: how fast tensors are counted, against a copy of them on the device; what a training step of networks like
ResNet-50 and GPT-2 costs watched, in bfloat16, eager and compiled; and that an observed step never waits for the device
(``torch.cuda.set_sync_debug_mode("error")`` raises where one does). ``--device cpu`` runs all of it in tiny sizes, to
see that the script works: its figures say nothing.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import neuronscope as ns
from benchmarks.large import gpt, resnet
from benchmarks.steps import NEVER
from benchmarks.tables import Table, milliseconds, ratio, size
from benchmarks.turns import Times, take_turns
from neuronscope.counting import Scratch, count_outputs, count_zeros

__all__ = ["main", "tables"]

#: Neurons along axis 1 of images, else along the last axis.
SHAPES = ((4096, 4096), (16, 1024, 3072), (64, 256, 56, 56), (64, 2048, 7, 7))
TINY_SHAPES = ((8, 16), (2, 4, 3, 3))


def tables(device: str, *, quick: bool, compiled: bool = True) -> Iterator[Table]:
    """Bandwidth, steps, waits.

    Args:
        device: Where.
        quick: Tiny sizes and one round.
        compiled: Whether to try ``torch.compile`` too.
    """
    yield _bandwidth(device, quick=quick)
    table = Table(
        "A training step in bfloat16",
        ("net", "mode", "unwatched", "observed", "idle", "waits of an observed step"),
        note="Ratios to the unwatched step: of medians, of minima in brackets.",
    )
    small = {"batch": 2, "width": 8}
    nets: dict[str, Callable[[], tuple[nn.Module, Tensor, Tensor]]] = {
        "ResNet-50-like": lambda: resnet(blocks=(1, 1), side=16, **small) if quick else resnet(),
        "GPT-2-like": lambda: gpt(layers=1, heads=2, time=4, words=16, **small) if quick else gpt(),
    }
    for name, build in nets.items():
        for mode in ("eager", "compiled") if compiled else ("eager",):
            times, waits = _steps(build, device, compiled=mode == "compiled", rounds=1 if quick else 30)
            base = times["unwatched"]
            ratios = (ratio(times[run].over(base)) for run in ("observed", "idle"))
            table.rows.append((name, mode, milliseconds(base.median), *ratios, waits))
    yield table


def _bandwidth(device: str, *, quick: bool) -> Table:
    table = Table(
        "Counting against a copy on the device",
        ("shape", "type", "size", "copy", "outputs", "gradients", "outputs ÷ copy"),
        note="GB/s read; a copy writes as much as it reads.",
    )
    for shape in TINY_SHAPES if quick else SHAPES:
        for dtype in (torch.float32, torch.bfloat16):
            y = torch.randn(shape, device=device).relu_().to(dtype)
            table.rows.append(_counted(y, 1 if len(shape) == 4 else len(shape) - 1, rounds=1 if quick else 50))
    return table


def _counted(y: Tensor, axis: int, rounds: int) -> tuple[str, ...]:
    other, scratch = torch.empty_like(y), Scratch()
    times = take_turns(
        {
            "copy": _finished(y, lambda: other.copy_(y)),
            "outputs": _finished(y, lambda: count_outputs(y, axis, scratch)),
            "gradients": _finished(y, lambda: count_zeros(y, axis, scratch)),
        },
        rounds=rounds,
    )
    rates = (f"{y.nbytes / each.median / 1e9:.0f} GB/s" for each in times.values())
    shape = " × ".join(map(str, y.shape))
    kind = str(y.dtype).removeprefix("torch.")
    return (shape, kind, size(y.nbytes), *rates, ratio(times["outputs"].over(times["copy"])))


def _finished(y: Tensor, run: Callable[[], object]) -> Callable[[], None]:
    """Run, and wait until the device has done it."""

    def whole() -> None:
        run()
        if y.is_cuda:
            torch.cuda.synchronize(y.device)

    return whole


def _steps(
    build: Callable[[], tuple[nn.Module, Tensor, Tensor]], device: str, *, compiled: bool, rounds: int
) -> tuple[dict[str, Times], str]:
    torch.manual_seed(0)
    model, x, y = (part.to(device) for part in build())
    plain, every, idle = (copy.deepcopy(model) for _ in range(3))
    with ns.watch(every, window_steps=NEVER) as observed, ns.watch(idle, every_n_steps=NEVER) as unobserved:
        idle_step = _training(idle, x, y, compiled=compiled, after=unobserved.step)
        watched = _training(every, x, y, compiled=compiled, after=observed.step)
        times = take_turns(
            {
                "unwatched": _finished(x, _training(plain, x, y, compiled=compiled, after=lambda: None)),
                "observed": _finished(x, watched),
                "idle": _finished(x, idle_step),
            },
            rounds=rounds,
            warm=5 if rounds > 1 else 1,
        )
        return times, _waits(watched, device)


def _training(
    model: nn.Module, x: Tensor, y: Tensor, *, compiled: bool, after: Callable[[], object]
) -> Callable[[], None]:
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4, foreach=True)
    forward = torch.compile(model) if compiled else model

    def step() -> None:
        with torch.autocast(x.device.type, torch.bfloat16):
            loss = F.cross_entropy(forward(x), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        after()

    return step


def _waits(step: Callable[[], None], device: str) -> str:
    """Whether a step waits for the device anywhere."""
    if not device.startswith("cuda"):
        return "not asked"
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            step()
    except RuntimeError as error:
        return f"yes: {str(error).splitlines()[0]}"
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return "none"


def main() -> None:
    """Print the tables, or say that there is no GPU."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    device = parser.parse_args().device
    if device == "cuda" and not torch.cuda.is_available():
        sys.exit("These figures need a GPU, and torch sees none here; --device cpu tries the script in tiny sizes.")
    where = torch.cuda.get_device_name() if device == "cuda" else "CPU, tiny sizes: no figures to quote"
    print(f"{where}, torch {torch.__version__}\n")
    for table in tables(device, quick=device == "cpu"):
        print(table.markdown(), flush=True)


if __name__ == "__main__":
    main()
