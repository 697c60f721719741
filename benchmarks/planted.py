"""What ormas-monitor says of networks whose dead neurons were made by hand: the cases of README's "How it compares".

The networks are those of the tests (:mod:`tests.agreement.test_peers_table`), where Neuronscope is held to the truth.
The monitor looks at every step, with its other settings as they are by default, and what it says is its last record:
per layer, the channels that it calls dead, constant, silent or decayed. A layer that it does not watch is a dash.
"""

from __future__ import annotations

import copy
import importlib
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.peers import reach
from benchmarks.tables import Table
from tests.agreement import test_peers_table as cases

__all__ = ["tables"]

STEPS = 12  # it calls a channel silent after four looks
Batches = Callable[[], Tensor]


class Monitored:
    """A training under ormas-monitor, and its last record of stuck channels by layer."""

    def __init__(self, model: nn.Module, folder: str) -> None:
        monitor = importlib.import_module("ormas_monitor").Monitor
        self.model = model
        self.optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        self.stuck: dict[str, int] = {}
        self.checks = 0
        self.monitor = monitor(
            model, self.optimizer, out=Path(folder) / "run", check_every=1, verbose=False, sinks=[self._note]
        )

    def _note(self, kind: str, record: dict[str, Any]) -> None:
        if kind == "metrics":
            self.checks += 1
            self.stuck = {layer: sum(counts) for layer, counts in record["stuck"].items()}

    def step(self, *batches: Tensor) -> None:
        """One step of the optimizer, over one or more micro-batches."""
        for x in batches:
            loss = self.model(x).square().mean()
            loss.backward()
        self.monitor.step(loss.detach())
        self.optimizer.step()
        self.optimizer.zero_grad()

    def says(self, *layers: str) -> str:
        """The counts of these layers, in words."""
        return ", ".join(str(self.stuck.get(layer, "–")) for layer in layers)


def _trained(model: nn.Module, folder: str, *shape: int) -> Monitored:
    run = Monitored(model, folder)
    for _ in range(STEPS):
        run.step(torch.randn(*shape))
    return run


def _three_of_64(folder: str) -> str:
    model = nn.Sequential(nn.Linear(10, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 1))
    cases.bury(model[0], cases.BURIED)
    cases.bury(model[2], list(range(64)), bias=1.0)
    return _trained(model, folder, 256, 10).says("0", "2")


def _reused(folder: str) -> str:
    model = nn.Sequential(cases.Block())
    cases.bury(model[0].conv1, [2, 11])
    cases.bury(model[0].conv2, list(range(16)), bias=3.0)
    return _trained(model, folder, 4, 3, 8, 8).says("0.conv1", "0.conv2")


def _functional(folder: str) -> str:
    model = cases.Functional()
    cases.bury(model.fc1, cases.BURIED)
    return _trained(model, folder, 256, 10).says("fc1")


def _tokens(folder: str) -> str:
    model = nn.Sequential(nn.Linear(10, 64), nn.ReLU(), nn.Linear(64, 1))
    cases.bury(model[0], cases.BURIED)
    return _trained(model, folder, 8, 12, 10).says("0")


def _swiglu(folder: str) -> str:
    model = cases.SwiGLU()
    cases.bury(model.gate, [1, 2, 3], bias=-1000.0)
    with torch.no_grad():
        model.up.weight[[7, 8]] = 0
        model.up.bias[[7, 8]] = 0
    return _trained(model, folder, 64, 4, 10).says("gate", "up")


def _accumulation(folder: str) -> str:
    """Units 0, 1, 2 never fire in training; 2 fires in evaluation; 3 fires in one of four micro-batches."""
    model = nn.Sequential(cases.Gates(), nn.Linear(8, 1))
    model[0].requires_grad_(True)
    run = Monitored(model, folder)
    for _ in range(STEPS):
        batches = []
        for micro in range(4):
            x = torch.ones(4, 8)
            x[:, :3] = -1
            x[:, 3] = 1.0 if micro == 1 else -1.0
            batches.append(x)
        run.step(*batches)
        model.eval()
        with torch.no_grad():
            y = -torch.ones(4, 8)
            y[:, 2] = 1
            model(y)
        model.train()
    return run.says("0.fc")


def _checkpointed(folder: str) -> str:
    said = []
    for reentrant in (False, True):
        model = cases.Checkpointed(reentrant)
        cases.bury(model.block[0], cases.BURIED)
        run = Monitored(model, f"{folder}/{reentrant}")
        for _ in range(STEPS):
            run.step(torch.randn(16, 10).requires_grad_())
        said.append(run.says("block.0"))
    return " and ".join(said)


def _healthy(folder: str) -> str:
    said = []
    for batch in (1, 4, 8, 32):
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(10, 64), nn.ReLU(), nn.Linear(64, 1))
        run = Monitored(model, f"{folder}/{batch}")
        most = 0
        for part in torch.randn(512, 10).split(batch):
            run.step(part)
            most = max(most, run.stuck["0"])
        said.append(f"{most / 64:.1%}")
    return ", ".join(said)


def _diverged(folder: str) -> str:
    model = nn.Sequential(nn.Linear(10, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU())
    with torch.no_grad():
        model[0].weight[0, 0] = float("nan")
    run = _trained(model, folder, 32, 10)
    broken = run.monitor.counts["nonfinite"] > 0
    return f"{'broken' if broken else 'not broken'}; {run.says('0', '2')} stuck"


def _copied(folder: str) -> str:
    model = nn.Sequential(nn.Linear(10, 64), nn.ReLU(), nn.Linear(64, 1))
    cases.bury(model[0], cases.BURIED)
    run = Monitored(model, folder)
    said = []
    try:
        average = copy.deepcopy(model)
    except Exception as error:  # noqa: BLE001  # what it raises is what its user would see
        said.append(f"a copy raises {type(error).__name__}")
        average = None
    for _ in range(STEPS):
        if average is not None:  # a copy in which all fire: if its calls were taken for the model's, none would be dead
            average.train()(torch.randn(32, 10) + 200.0)
        run.step(torch.randn(32, 10))
    said.append(f"{run.says('0')} of 3")
    try:
        torch.save(model, Path(folder) / "model.pt")
        said.append("torch.save works")
    except Exception as error:  # noqa: BLE001
        said.append(f"torch.save raises {type(error).__name__}")
    return "; ".join(said)


#: Each case, the truth (which Neuronscope's test holds it to), and the run.
CASES: dict[str, tuple[str, Callable[[str], str]]] = {
    "two layers of 64": ("3, 0", _three_of_64),
    "one in-place ReLU module used twice in a block": ("2, 0", _reused),
    "`F.relu`": ("3", _functional),
    "ReLU on (B, T, D)": ("3", _tokens),
    "SwiGLU: killed by the gate, by what it gates": ("3, 2", _swiglu),
    "accumulation, with evaluation in between": ("3", _accumulation),
    "activation checkpointing, of both kinds": ("3 and 3", _checkpointed),
    "healthy nets at batch size 1, 4, 8, 32": ("0, 0, 0, 0 %", _healthy),
    "a net that diverged to NaN": ("broken", _diverged),
    "a deep copy (EMA) runs too; `torch.save(model)`": ("3 of 3; works", _copied),
}


def tables(*, quick: bool = False) -> Iterator[Table]:  # noqa: ARG001  # all of it takes seconds
    """One table, a row a case."""
    reach()
    table = Table("Dead neurons that were made by hand", ("case", "truth", "ormas-monitor"))
    for name, (truth, run) in CASES.items():
        torch.manual_seed(0)
        with tempfile.TemporaryDirectory() as folder:
            try:
                said = run(folder)
            except Exception as error:  # noqa: BLE001  # what it raises is what its user would see
                said = f"raises {type(error).__name__}: {error}"
        table.rows.append((name, truth, said))
    yield table
