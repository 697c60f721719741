"""The figures that need a GPU: ``python -m benchmarks.gpu``, less than eight minutes on one.

It prints tables, and in each row what was aimed at and whether it holds. How fast tensors are counted, beside
``y.sum()`` and a copy on the device; the memory and the kernels that it takes, and the host's time; that the sums of
magnitudes have the same bits in two runs and on two streams; what a training step of networks like ResNet-50 and GPT-2
costs watched, in bfloat16; that an observed step never waits for the device
(``torch.cuda.set_sync_debug_mode("error")`` raises where one does), and that every step was counted, also compiled,
compiled with CUDA graphs, and captured by hand. ``--device cpu`` runs all of it in tiny sizes, but for what only CUDA
has, to see that the script works: its figures say nothing.
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch._dynamo
import torch.nn.functional as F
from torch import Tensor, nn

import neuronscope as ns
from benchmarks.captured import REPLAYS, WARM, replayed
from benchmarks.large import gpt, resnet
from benchmarks.steps import NEVER, by_default
from benchmarks.tables import Table, microseconds, milliseconds, ratio, size
from benchmarks.turns import take_turns
from neuronscope.callbacks.monitor import DEFAULT_EVERY_N_STEPS
from neuronscope.count.backends import Backend, backend_for
from neuronscope.count.counter_tensors import CounterTensors
from neuronscope.count.counters import SiteCounters
from neuronscope.count.neuron_layout import NeuronLayout
from neuronscope.count.pieces import Pieces, TensorToCount

__all__ = ["MODES", "main", "tables"]

#: Shape, axis of the neurons, order in memory, and the least share of the sum's speed.
SHAPES = {
    "rows": ((32768, 4096), 1, torch.contiguous_format, 0.8),
    "rows, 32 MB": ((4096, 4096), 1, torch.contiguous_format, 0.8),
    "images": ((256, 256, 56, 56), 1, torch.contiguous_format, 0.8),
    "images, channels last": ((256, 256, 56, 56), 1, torch.channels_last, 0.8),
    "maps of 7 × 7": ((1024, 2048, 7, 7), 1, torch.contiguous_format, 0.6),
}
TINY_SHAPES = {
    "rows": ((8, 16), 1, torch.contiguous_format, 0.8),
    "images": ((2, 4, 3, 3), 1, torch.contiguous_format, 0.8),
}
#: Options of ``torch.compile``, by the name in the table; ``None`` is eager.
MODES: Mapping[str, dict[str, Any] | None] = {
    "eager": None,
    "compiled": {},
    "CUDA graphs": {"mode": "reduce-overhead"},
}
#: Seconds after which no other network is begun.
ENOUGH = 360.0

Built = tuple[nn.Module, Tensor, Tensor]


def tables(device: str, *, quick: bool, modes: Mapping[str, dict[str, Any] | None] = MODES) -> Iterator[Table]:
    """Speed, memory and kernels, bits, training steps, a captured step.

    Args:
        device: Where.
        quick: Tiny sizes and one round.
        modes: As :data:`MODES`.
    """
    began = time.monotonic()
    yield _bandwidth(device, quick=quick)
    yield _means(device, quick=quick)
    yield _bits(device, quick=quick)
    yield _captured(device)
    table = Table(
        "A training step in bfloat16",
        (
            *("net", "mode", "unwatched", "observed", "aim", "default", "aim by default", "idle"),
            *("waits", "counted", "graphs left out"),
        ),
        note="Ratios to the unwatched step: of medians, of minima in brackets. *Default* is every "
        f"{DEFAULT_EVERY_N_STEPS}th step observed. *Waits* are those of an observed step for the device. *Counted* is "
        "of the observed run. *Graphs left out* is how often torch made no CUDA graph, unwatched and observed.",
    )
    small = {"batch": 2, "width": 8}
    nets: list[tuple[str, str, float, Callable[[], Built]]] = []
    for mode in modes:  # what is quick to make comes first
        vision = {name: batch for name, batch in (("256", 256), ("64", 64)) if mode == "eager" or batch == 64}
        for name, batch in vision.items() if not quick else [("2", 2)]:
            tiny = {"blocks": (1, 1), "side": 16, **small}
            build = (lambda tiny=tiny: resnet(**tiny)) if quick else (lambda batch=batch: resnet(batch=batch))
            nets.append((f"ResNet-50-like, batch {name}", mode, 1.06 if batch == 256 else 1.08, build))
        tiny = {"layers": 1, "heads": 2, "time": 4, "words": 16, **small}
        nets.append(("GPT-2-like", mode, 1.04, (lambda tiny=tiny: gpt(**tiny)) if quick else gpt))
    for name, mode, aim, build in nets:
        if time.monotonic() - began > ENOUGH:
            table.rows.append((name, mode, *("not begun: no time left",) * 9))
            continue
        cells = _steps(build, device, modes[mode], aim, rounds=1 if quick else 20)
        table.rows.append((name, mode, *cells))
        print(f"({time.monotonic() - began:.0f} s so far) {name}, {mode}: {cells}", file=sys.stderr, flush=True)
    yield table


def _holds(value: float, most: float) -> str:
    return f"≤ {most:g}: {'holds' if value <= most else 'MISSED'}"


def _bandwidth(device: str, *, quick: bool) -> Table:
    table = Table(
        "Counting beside a sum on the device",
        ("layout", "type", "size", "y.sum()", "copy", "outputs", "gradients", "outputs ÷ sum", "aim"),
        note="GB/s read, from the device's own clock, the host's time left out; a copy writes as much as it reads. "
        f"Counted by {_name(device)}.",
    )
    for name, (shape, axis, order, least) in (TINY_SHAPES if quick else SHAPES).items():
        for dtype in (torch.float32, torch.bfloat16):
            y = torch.randn(shape, device=device).relu_().to(dtype).contiguous(memory_format=order)
            table.rows.append((name, str(dtype).removeprefix("torch."), size(y.nbytes), *_speeds(y, axis, least)))
    return table


def _speeds(y: Tensor, axis: int, least: float) -> tuple[str, ...]:
    other = torch.empty_like(y)
    runs = (y.sum, lambda: other.copy_(y), *_counting(backend_for(y.device.type), y, axis)[1:])
    seconds = [_device_seconds(run, y.device) for run in runs]
    share = seconds[0] / seconds[2]
    speeds = (f"{y.nbytes / each / 1e9:.0f} GB/s" for each in seconds)
    return (*speeds, f"{share:.2f}", f"≥ {least:g}: {'holds' if share >= least else 'MISSED'}")


def _name(device: str) -> str:
    backend = backend_for(device)
    plain = f"the plain formula in pieces ({backend.reason or device})"
    return plain if backend.kernels is None else "Triton kernels"


def _counting(
    backend: Backend | Pieces, y: Tensor, axis: int
) -> tuple[CounterTensors, Callable[[], None], Callable[[], None]]:
    """Return new counters, what counts an output in them, and what counts a gradient."""
    counters, layout = SiteCounters(y.shape[axis], y.device).tensors, NeuronLayout(axis)
    return (
        counters,
        lambda: backend.count(counters, TensorToCount(y, layout, 1, 0.0)),
        lambda: backend.count(counters, TensorToCount(y, layout)),
    )


def _device_seconds(run: Callable[[], object], device: torch.device, count: int = 20) -> float:
    """Return how long the device takes: it is kept busy until the host has launched everything."""
    for _ in range(3):
        run()
    if device.type != "cuda":
        began = time.perf_counter()
        for _ in range(count):
            run()
        return (time.perf_counter() - began) / count
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    torch.cuda._sleep(50_000_000)
    begin.record()
    for _ in range(count):
        run()
    end.record()
    torch.cuda.synchronize(device)
    return begin.elapsed_time(end) / 1e3 / count


def _means(device: str, *, quick: bool) -> Table:
    """Memory, kernels and the host's time of one site."""
    table = Table("What an output and a gradient of one site take", ("what", "of", "measured", "aim"))
    layers = 2 if quick else 40
    net = nn.Sequential(*(layer for _ in range(layers) for layer in (nn.Linear(64, 64), nn.ReLU()))).to(device)
    x = torch.randn(64, 64, device=device)

    def step() -> None:
        net(x).sum().backward()

    plain = take_turns({"plain": step}, rounds=2 if quick else 50)["plain"]
    with ns.watch(net) as scope:

        def observed() -> None:
            step()
            scope.step()

        watched = take_turns({"watched": observed}, rounds=2 if quick else 50)["watched"]
    host = (watched.median - plain.median) / layers
    table.rows.append(("host's time", f"a site of {layers}", microseconds(host), _holds(1e6 * host, 60)))
    if device != "cuda":
        table.rows.append(("memory and kernels", "—", "not asked", "only CUDA says"))
        return table
    for name, (shape, axis, order, _) in SHAPES.items():
        y = torch.zeros(shape, device=device, dtype=torch.bfloat16).contiguous(memory_format=order)
        for way, backend, most in (("kernels", backend_for(device), 4 << 20), ("in pieces", Pieces(), 32 << 20)):
            _, *runs = _counting(backend, y, axis)
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
                for run in runs:
                    run()
                torch.cuda.synchronize()
            added, bound = torch.cuda.max_memory_allocated() - before, most + 100 * shape[axis]
            launched = sum(each.count for each in profile.key_averages() if each.device_time_total > 0)
            table.rows.append(("added peak memory", f"{name}, {way}", size(added), _holds(added, bound)))
            aim = _holds(launched, 4) if way == "kernels" else "—"
            table.rows.append(("kernels", f"{name}, {way}", str(launched), aim))
    return table


def _bits(device: str, *, quick: bool) -> Table:
    table = Table("Sums of magnitudes, bit for bit", ("layout", "two runs", "two streams"))
    for name, (shape, axis, order, _) in (TINY_SHAPES if quick else SHAPES).items():
        y = torch.randn(shape, device=device, dtype=torch.bfloat16).contiguous(memory_format=order)
        sums = []
        for _ in range(2):
            counters, count, _ = _counting(backend_for(device), y, axis)
            count()
            sums.append(counters.abs_sum)
        aside = "not asked"
        if device == "cuda":
            counters, count, _ = _counting(backend_for(device), y, axis)
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                count()
            torch.cuda.synchronize()
            aside = "equal" if torch.equal(sums[0], counters.abs_sum) else "DIFFERENT"
        table.rows.append((name, "equal" if torch.equal(*sums) else "DIFFERENT", aside))
    return table


def _finished(y: Tensor, run: Callable[[], object]) -> Callable[[], None]:
    """Run, and wait until the device has done it."""

    def whole() -> None:
        run()
        if y.is_cuda:
            torch.cuda.synchronize(y.device)

    return whole


def _steps(
    build: Callable[[], Built], device: str, options: dict[str, Any] | None, aim: float, rounds: int
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
    default = by_default(more, quiet)
    asked = options is not None and options.get("mode") == "reduce-overhead" and device != "cpu"
    graphs = f"{left_out['unwatched']}, {left_out['observed']}" if asked else "not asked"
    return (
        *(milliseconds(base.median), ratio(more), _holds(more[0], aim)),
        *(ratio(default), _holds(default[0], 1.005), ratio(quiet)),
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
    """Whether the replays of a step that was captured by hand are counted."""
    table = Table(
        "A step captured with torch.cuda.graph and replayed",
        ("steps that ran", "counted at each site", "last step at which a neuron fired", "not measured"),
        note="Replays run no Python. A replay counts by itself, and reads the step from the device.",
    )
    if not device.startswith("cuda"):
        table.rows.append(("not asked", "not asked", "not asked", "only CUDA has such graphs"))
        return table
    batch = 4
    layers = (nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 32), nn.GELU(), nn.Linear(32, 4))
    model = nn.Sequential(*layers).to(device)
    x, y = torch.randn(batch, 16, device=device), torch.randint(4, (batch,), device=device)
    scope = replayed(model, x, y)
    tallies = scope.census().values()
    counted = ", ".join(sorted({str(tally.examples / batch) for tally in tallies}))
    last = ", ".join(sorted({str(tally.last_active_step.max()) for tally in tallies}))
    reasons = "; ".join(sorted({item.reason for item in scope.report().not_measured})) or "nothing"
    table.rows.append((str(WARM + REPLAYS), counted, f"{last} (right: {WARM + REPLAYS})", reasons))
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
