"""Against peers, on the same networks at every step: fastai's ActivationStats, ``wandb.watch``, torch-module-monitor.

None of them measures what Neuronscope does (per neuron, exact, gradients at the pre-activation); each does here what it
offers that is nearest, with its own code:

- fastai: the hooks and the hook function of ``ActivationStats`` on the activation modules (mean, standard deviation and
  share near zero of a whole tensor, on the CPU), its list appended to at every step as the callback does; once for
  outputs, once for gradients as well (``is_forward=False``).
- wandb: ``wandb.watch(log="all", log_freq=1)``, histograms of weights and of their gradients; it looks at no
  activation. The run behind it is a stub that keeps what it is given: nothing is sent or written, which flatters it.
- torch-module-monitor: share of zero outputs by neuron of the activation modules, and the norm of each weight's
  gradient, its storage aggregated at every step.

``make bench-peers`` installs them into a folder of their own and runs this.
"""

from __future__ import annotations

import copy
import importlib
import importlib.util
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import neuronscope as ns
from benchmarks.nets import NETS
from benchmarks.steps import training
from benchmarks.tables import Table, milliseconds, ratio
from benchmarks.turns import take_turns

__all__ = ["PEERS", "missing", "tables"]

Step = Callable[[], Any]
ROUNDS = {"small MLP": 200, "MLP": 30, "CNN": 7, "transformer": 7}
_ACTIVATIONS = (nn.ReLU, nn.GELU)


def _activations(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, _ACTIVATIONS)]


def _fastai(model: nn.Module, x: Tensor, y: Tensor, *, gradients: bool) -> Step:
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


def _wandb(model: nn.Module, x: Tensor, y: Tensor) -> Step:
    wandb = importlib.import_module("wandb")
    torch_side = importlib.import_module("wandb.integration.torch.wandb_torch")
    watch = importlib.import_module("wandb.sdk.wandb_watch")
    wandb.run = run = _Run(torch_side.TorchHistory())
    watch._watch(run, model, log="all", log_freq=1)
    step = training(model, x, y)

    def checked() -> None:
        step()
        if not run.logged:
            raise RuntimeError("its hooks logged nothing")

    return checked


def _zero_share(out: Tensor) -> Tensor:
    """Share of zeros by neuron: channels of images, else the last axis."""
    axis = 1 if out.dim() == 4 else out.dim() - 1
    return (out == 0).float().mean([dimension for dimension in range(out.dim()) if dimension != axis])


def _module_monitor(model: nn.Module, x: Tensor, y: Tensor) -> Step:
    monitor = importlib.import_module("torch_module_monitor").ModuleMonitor(monitor_step_fn=lambda _: True)
    names = [name for name, module in model.named_modules() if isinstance(module, _ACTIVATIONS)]
    pattern = "|".join(f"{name.replace('.', '[.]')}$" for name in names)
    monitor.add_activation_metric("zeros", _zero_share, metric_regex=pattern)
    monitor.add_gradient_metric("norm", lambda gradient: gradient.norm())
    monitor.set_module(model)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    steps = iter(range(10**9))

    def step() -> None:
        monitor.begin_step(next(steps))
        torch.nn.functional.cross_entropy(model(x), y).backward()
        monitor.monitor_gradients()
        monitor.end_step()
        optimizer.step()
        optimizer.zero_grad()

    return step


def _ours(model: nn.Module, x: Tensor, y: Tensor) -> Step:
    return training(model, x, y, ns.watch(model, every_n_steps=1).step)


#: How each is called, the package it needs, and what makes its training step.
PEERS: dict[str, tuple[str, Callable[[nn.Module, Tensor, Tensor], Step]]] = {
    "fastai, outputs": ("fastai", lambda *of: _fastai(*of, gradients=False)),
    "fastai, outputs and gradients": ("fastai", lambda *of: _fastai(*of, gradients=True)),
    "wandb.watch, weights": ("wandb", _wandb),
    "torch-module-monitor": ("torch_module_monitor", _module_monitor),
}


def _reach() -> None:
    """Make importable what ``make bench-peers`` has installed."""
    folder = str(Path(sys.prefix) / "peers")
    if folder not in sys.path:
        sys.path.append(folder)


def missing() -> list[str]:
    """Peers whose package is not installed."""
    _reach()
    return [name for name, (package, _) in PEERS.items() if importlib.util.find_spec(package) is None]


def tables(*, quick: bool = False) -> Iterator[Table]:
    """One table, a row a tool and a column a network."""
    absent = missing()
    names = list(NETS)[: 1 if quick else None]
    columns = {name: _column(name, absent, 1 if quick else ROUNDS[name]) for name in names}
    table = Table(
        "A training step watched by others, at every step",
        ("watched by", *names),
        note="Ratios to the unwatched step: of medians, of minima in brackets. The tools take turns.",
    )
    table.rows += [(row, *(columns[name][row] for name in names)) for row in columns[names[0]]]
    yield table


def _column(name: str, absent: list[str], rounds: int) -> dict[str, str]:
    torch.manual_seed(0)
    model, x, y = NETS[name]()
    runs: dict[str, Step] = {
        "nobody": training(copy.deepcopy(model), x, y),
        "Neuronscope": _ours(copy.deepcopy(model), x, y),
    }
    cells = dict.fromkeys(absent, "not installed")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for peer, (_, prepare) in PEERS.items():
            if peer in absent:
                continue
            try:
                step = prepare(copy.deepcopy(model), x, y)
                step()
            except Exception as error:  # noqa: BLE001  # what it raises is what its user would see
                cells[peer] = f"fails: {type(error).__name__}"
            else:
                runs[peer] = step
        times = take_turns(runs, rounds=rounds)
    base = times["nobody"]
    cells |= {run: ratio(each.over(base)) for run, each in times.items()}
    cells["nobody"] = milliseconds(base.median)
    return {row: cells[row] for row in ("nobody", "Neuronscope", *PEERS)}
