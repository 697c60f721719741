"""The figures that need a GPU: ``python -m benchmarks.gpu``.

How fast tensors are counted, against a copy of them on the device; what a training step of networks like ResNet-50 and
GPT-2 costs watched, in bfloat16, eager, compiled, and compiled with CUDA graphs; that an observed step never waits for
the device (``torch.cuda.set_sync_debug_mode("error")`` raises where one does), and that every step was counted; and
what the report says of a step that was captured by hand. ``--device cpu`` runs all of it in tiny sizes, but for the
waits and the capture, which only CUDA has, to see that the script works: its figures say nothing.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch._dynamo
import torch.nn.functional as F
from torch import Tensor, nn

import neuronscope as ns
from benchmarks.captured import replayed
from benchmarks.large import gpt, resnet
from benchmarks.steps import NEVER, by_default
from benchmarks.tables import Table, milliseconds, ratio, size
from benchmarks.turns import take_turns
from neuronscope.callbacks.monitor import DEFAULT_EVERY_N_STEPS
from neuronscope.count.counting import ScratchBuffers, count_outputs, count_zeros

__all__ = ["MODES", "main", "tables"]

#: Neurons along axis 1 of images, else along the last axis.
SHAPES = ((4096, 4096), (16, 1024, 3072), (64, 256, 56, 56), (64, 2048, 7, 7))
TINY_SHAPES = ((8, 16), (2, 4, 3, 3))
#: Options of ``torch.compile``, by the name in the table; ``None`` is eager.
MODES: Mapping[str, dict[str, Any] | None] = {
    "eager": None,
    "compiled": {},
    "CUDA graphs": {"mode": "reduce-overhead"},
}


def tables(device: str, *, quick: bool, modes: Mapping[str, dict[str, Any] | None] = MODES) -> Iterator[Table]:
    """Bandwidth, steps, a captured step.

    Args:
        device: Where.
        quick: Tiny sizes and one round.
        modes: As :data:`MODES`.
    """
    yield _bandwidth(device, quick=quick)
    table = Table(
        "A training step in bfloat16",
        ("net", "mode", "unwatched", "observed", "default", "idle", "waits", "counted", "graphs left out"),
        note="Ratios to the unwatched step: of medians, of minima in brackets. *Default* is every "
        f"{DEFAULT_EVERY_N_STEPS}th step observed. *Waits* are those of an observed step for the device. *Counted* is "
        "of the observed run. *Graphs left out* is how often torch made no CUDA graph, unwatched and observed.",
    )
    small = {"batch": 2, "width": 8}
    nets: dict[str, Callable[[], tuple[nn.Module, Tensor, Tensor]]] = {
        "ResNet-50-like": lambda: resnet(blocks=(1, 1), side=16, **small) if quick else resnet(),
        "GPT-2-like": lambda: gpt(layers=1, heads=2, time=4, words=16, **small) if quick else gpt(),
    }
    for name, build in nets.items():
        for mode, options in modes.items():
            table.rows.append((name, mode, *_steps(build, device, options, rounds=1 if quick else 30)))
    yield table
    yield _captured(device)


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
    other, scratch = torch.empty_like(y), ScratchBuffers()
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
    build: Callable[[], tuple[nn.Module, Tensor, Tensor]],
    device: str,
    options: dict[str, Any] | None,
    rounds: int,
) -> tuple[str, ...]:
    """One row, after the names of net and mode."""
    torch.compiler.reset()  # the compiler gives up on code that it has compiled for many models
    torch.manual_seed(0)
    model, x, y = (part.to(device) for part in build())
    plain, every, idle = (copy.deepcopy(model) for _ in range(3))
    with ns.watch(every, window_steps=NEVER) as observed, ns.watch(idle, every_n_steps=NEVER) as unobserved:
        steps = {
            "unwatched": _training(plain, x, y, options, lambda: None),
            "observed": _training(every, x, y, options, observed.step),
            "idle": _training(idle, x, y, options, unobserved.step),
        }
        left_out = {name: _graphs_left_out(step) for name, step in steps.items()}
        runs = {name: _finished(x, step) for name, step in steps.items()}
        times = take_turns(runs, rounds=rounds, warm=5 if rounds > 1 else 1)
        counted = _counted_steps(observed, len(x))
        waits = _waits(steps, device)
    base = times["unwatched"]
    more, quiet = times["observed"].over(base), times["idle"].over(base)
    asked = options is not None and options.get("mode") == "reduce-overhead" and device != "cpu"
    graphs = f"{left_out['unwatched']}, {left_out['observed']}" if asked else "not asked"
    return (
        milliseconds(base.median),
        *(ratio(pair) for pair in (more, by_default(more, quiet), quiet)),
        *(waits, counted, graphs),
    )


def _training(
    model: nn.Module, x: Tensor, y: Tensor, options: dict[str, Any] | None, after: Callable[[], object]
) -> Callable[[], None]:
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4, foreach=True)
    alone = {"fullgraph": True, "isolate_recompiles": True}  # equal models would be given each other's graphs
    forward = model if options is None else torch.compile(model, **alone, **options)

    def step() -> None:
        if options is not None:
            torch.compiler.cudagraph_mark_step_begin()
        with torch.autocast(x.device.type, torch.bfloat16):
            loss = F.cross_entropy(forward(x), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        after()

    return step


def _graphs_left_out(step: Callable[[], None]) -> int:
    """How often torch's compiler made no CUDA graph of what it was to make one of, in the first steps of a run."""
    known = torch._dynamo.utils.counters["inductor"]
    before = known["cudagraph_skips"]
    for _ in range(3):  # compiled, warmed up, recorded
        step()
    return known["cudagraph_skips"] - before


def _waits(steps: Mapping[str, Callable[[], None]], device: str) -> str:
    """Whether an observed step waits for the device anywhere, where an unwatched one does not."""
    if not device.startswith("cuda"):
        return "not asked"
    for name in ("unwatched", "observed"):
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(3):
                steps[name]()
        except RuntimeError as error:
            return f"{name}: {str(error).splitlines()[0]}"
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return "none"


def _counted_steps(scope: ns.Scope, batch: int) -> str:
    """Whether every site has all examples of all steps, and a gradient for each output."""
    census, missing = scope.census(), scope.report().not_measured
    whole = [
        name
        for name, tally in census.items()
        if tally.examples == scope.global_step * batch and tally.gradient_positions == tally.positions
    ]
    said = f"{len(whole)} of {len(census)} sites at each of {scope.global_step} steps"
    return f"{said}; not measured: {len(missing)}" if missing else said


def _captured(device: str) -> Table:
    """What the report says of a step that was captured by hand."""
    table = Table(
        "A step captured with torch.cuda.graph and replayed",
        ("examples counted before the capture", "sites not measured", "why"),
        note="Replays run no Python and are not counted: the report must say so of every site.",
    )
    if not device.startswith("cuda"):
        table.rows.append(("not asked", "not asked", "only CUDA has such graphs"))
        return table
    batch = 4
    layers = (nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 32), nn.GELU(), nn.Linear(32, 4))
    model = nn.Sequential(*layers).to(device)
    x, y = torch.randn(batch, 16, device=device), torch.randint(4, (batch,), device=device)
    scope = replayed(model, x, y)
    missing = scope.report().not_measured
    examples = sorted({tally.examples for tally in scope.census().values()})
    reasons = sorted({item.reason for item in missing})
    said = "; ".join(reasons) or "THE REPORT SAYS NOTHING"
    table.rows.append((", ".join(map(str, examples)), f"{len(missing)} of {len(scope.census())}", said))
    return table


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
