"""Against peers, on the same networks: fastai's ActivationStats, ``wandb.watch``, torch-module-monitor, ormas-monitor.

None of them measures what Neuronscope does (per neuron, exact, gradients at the pre-activation); each does here what it
offers that is nearest, with its own code:

- fastai: the hooks and the hook function of ``ActivationStats`` on the activation modules (mean, standard deviation and
  share near zero of a whole tensor, on the CPU), its list appended to at every step as the callback does; once for
  outputs, once for gradients as well (``is_forward=False``). Its default is every step.
- wandb: ``wandb.watch`` with its default ``log="gradients"``, histograms of the weights' gradients; it looks at no
  activation. The run behind it is a stub that keeps what it is given: nothing is sent or written, which flatters it.
- torch-module-monitor: share of zero outputs by neuron of the activation modules, and the norm of each weight's
  gradient, its storage aggregated at every step that it monitors.
- ormas-monitor: per layer the norm of the weights' gradient, per channel the largest pre-activation, and the zeros of
  its weights; a line a check in a file.

``make bench-peers`` installs them into a folder of their own and runs this, and :mod:`benchmarks.planted`.
"""

from __future__ import annotations

import copy
import importlib
import importlib.util
import itertools
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import neuronscope as ns
from benchmarks.nets import NETS
from benchmarks.steps import NEVER, spread_over, training
from benchmarks.tables import Table, milliseconds, ratio
from benchmarks.turns import take_turns
from neuronscope.callbacks.monitor import DEFAULT_EVERY_N_STEPS

__all__ = ["PEERS", "missing", "reach", "tables"]

Step = Callable[[], Any]
ROUNDS = {"small MLP": 200, "MLP": 30, "CNN": 7, "transformer": 7}
_ACTIVATIONS = (nn.ReLU, nn.GELU)


def _activations(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, _ACTIVATIONS)]


def _fastai(model: nn.Module, x: Tensor, y: Tensor, every: int, *, gradients: bool) -> Step:
    assert every == 1, "by default, and here, its hooks stay"
    hook = importlib.import_module("fastai.callback.hook")
    stats = hook.ActivationStats(modules=_activations(model))
    forward = hook.Hooks(stats.modules, stats.hook, True, stats.detach, stats.cpu)
    backward = hook.Hooks(stats.modules, stats.hook, False, stats.detach, stats.cpu) if gradients else None
    kept: list[Any] = []

    def after() -> None:
        kept.append(forward.stored)
        if backward is not None:
            kept.append(backward.stored)

    return training(model, x, y, after)


class _Run:
    """What ``wandb.watch`` needs of a run."""

    def __init__(self, history: Any) -> None:
        self._torch = history
        self.logged: dict[str, Any] = {}

    def _log(self, values: dict[str, Any], commit: bool) -> None:  # noqa: ARG002  # as wandb calls it
        self.logged.update(values)

    def _telemetry_callback(self, record: Any) -> None:
        pass


def _wandb(model: nn.Module, x: Tensor, y: Tensor, every: int) -> Step:
    wandb = importlib.import_module("wandb")
    torch_side = importlib.import_module("wandb.integration.torch.wandb_torch")
    watch = importlib.import_module("wandb.sdk.wandb_watch")
    wandb.run = run = _Run(torch_side.TorchHistory())
    watch._watch(run, model, log_freq=every)
    step = training(model, x, y)

    def checked() -> None:
        step()
        if every == 1 and not run.logged:
            raise RuntimeError("its hooks logged nothing")

    return checked


def _zero_share(out: Tensor) -> Tensor:
    """Share of zeros by neuron: channels of images, else the last axis."""
    axis = 1 if out.dim() == 4 else out.dim() - 1
    return (out == 0).float().mean([dimension for dimension in range(out.dim()) if dimension != axis])


def _module_monitor(model: nn.Module, x: Tensor, y: Tensor, every: int) -> Step:
    monitor = importlib.import_module("torch_module_monitor").ModuleMonitor(lambda step: step % every == 0)
    names = [name for name, module in model.named_modules() if isinstance(module, _ACTIVATIONS)]
    pattern = "|".join(f"{name.replace('.', '[.]')}$" for name in names)
    monitor.add_activation_metric("zeros", _zero_share, metric_regex=pattern)
    monitor.add_gradient_metric("norm", lambda gradient: gradient.norm())
    monitor.set_module(model)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    steps = itertools.count()

    def step() -> None:
        monitor.begin_step(next(steps))
        torch.nn.functional.cross_entropy(model(x), y).backward()
        monitor.monitor_gradients()
        monitor.end_step()
        optimizer.step()
        optimizer.zero_grad()

    return step


def _ormas(model: nn.Module, x: Tensor, y: Tensor, every: int) -> Step:
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    folder = tempfile.TemporaryDirectory()
    monitor = importlib.import_module("ormas_monitor").Monitor(
        model, optimizer, out=folder.name, check_every=every, verbose=False, overwrite=True
    )
    monitor.folder = folder  # removed with the monitor

    def step() -> None:
        loss = torch.nn.functional.cross_entropy(model(x), y)
        loss.backward()
        monitor.step(loss)
        optimizer.step()
        optimizer.zero_grad()

    return step


def _ours(model: nn.Module, x: Tensor, y: Tensor, every: int) -> Step:
    return training(model, x, y, ns.watch(model, every_n_steps=every).step)


class Peer(NamedTuple):
    """A tool: the package that it needs, how often it looks by default, and what makes a training step of it."""

    package: str
    every: int
    prepare: Callable[[nn.Module, Tensor, Tensor, int], Step]


PEERS = {
    "fastai, outputs": Peer("fastai", 1, lambda *of: _fastai(*of, gradients=False)),
    "fastai, outputs and gradients": Peer("fastai", 1, lambda *of: _fastai(*of, gradients=True)),
    "wandb.watch, gradients of weights": Peer("wandb", 1000, _wandb),
    "torch-module-monitor": Peer("torch_module_monitor", 20, _module_monitor),
    "ormas-monitor": Peer("ormas_monitor", 50, _ormas),
}
TOOLS = {"Neuronscope": Peer("neuronscope", DEFAULT_EVERY_N_STEPS, _ours), **PEERS}


def reach() -> None:
    """Make importable what ``make bench-peers`` has installed."""
    folder = str(Path(sys.prefix) / "peers")
    if folder not in sys.path:
        sys.path.append(folder)


def missing() -> list[str]:
    """Return the peers whose package is not installed."""
    reach()
    return [name for name, peer in PEERS.items() if importlib.util.find_spec(peer.package) is None]


def tables(*, quick: bool = False) -> Iterator[Table]:
    """Two tables for each number of torch's threads, a row a tool and a column a network."""
    before = torch.get_num_threads()
    absent = missing()
    names = list(NETS)[: 1 if quick else None]
    try:
        for threads in (1,) if quick else (1, 2):
            torch.set_num_threads(threads)
            columns = {name: _column(name, absent, 1 if quick else ROUNDS[name]) for name in names}
            of = f"{threads} thread{'s' * (threads > 1)}"
            note = f"With {of}. Ratios to the unwatched step: of medians, of minima in brackets. The tools take turns."
            for title in ("at every step", "as each does by default"):
                table = Table(f"A training step watched by others, {title}, {of}", ("watched by", *names), note=note)
                table.rows += [(row, *(columns[name][title][row] for name in names)) for row in ("nobody", *TOOLS)]
                yield table
    finally:
        torch.set_num_threads(before)


def _column(name: str, absent: list[str], rounds: int) -> dict[str, dict[str, str]]:
    """Measure all tools on one network; the cells of both tables, by tool."""
    torch.manual_seed(0)
    model, x, y = NETS[name]()
    runs: dict[str, Step] = {"nobody": training(copy.deepcopy(model), x, y)}
    cells = dict.fromkeys(absent, "not installed")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for tool, peer in TOOLS.items():
            if tool in absent:
                continue
            try:
                for kind, every in (("looks", 1), ("idle", NEVER))[: 1 if peer.every == 1 else 2]:
                    step = peer.prepare(copy.deepcopy(model), x, y, every)
                    step()
                    runs[f"{tool}, {kind}"] = step
            except Exception as error:  # noqa: BLE001  # what it raises is what its user would see
                cells[tool] = f"fails: {type(error).__name__}"
        times = take_turns(runs, rounds=rounds)
    base = times["nobody"]
    every_step, by_default = dict(cells), dict(cells)
    every_step["nobody"] = by_default["nobody"] = milliseconds(base.median)
    for tool, peer in TOOLS.items():
        if tool in cells:
            continue
        looks = times[f"{tool}, looks"].over(base)
        idle = looks if peer.every == 1 else times[f"{tool}, idle"].over(base)
        every_step[tool] = ratio(looks)
        by_default[tool] = ratio(spread_over(peer.every, looks, idle))
    return {"at every step": every_step, "as each does by default": by_default}
