"""Runs of which every collective is noted at its process group, whoever asks for it by whatever function."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.utils._pytree import tree_leaves

import neuronscope as ns
from tests.ranks.parallel import counted
from tests.ranks.recorded import Recorder
from tests.ranks.uneven import POLICY, WIDTH, batch

WINDOW = 3
BRANCHES = {"a": 7, "b": 9}
SITES = {f"{name}.0/relu": (f"{name}.1",) * 2 for name in BRANCHES}


COLLECTIVES = [name for name in dir(ProcessGroup) if re.match("_?(all|barrier|broadcast|gather|reduce|scatter)", name)]


class Noted(ExitStack):
    """The collectives that were made inside, each as its name and how many numbers a rank gave."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[tuple[str, int]] = []

    def __enter__(self) -> Noted:
        for name in COLLECTIVES:
            self.enter_context(mock.patch.object(ProcessGroup, name, self._noting(name, getattr(ProcessGroup, name))))
        return self

    def _noting(self, name: str, collective: Callable[..., Any]) -> Callable[..., Any]:
        def note(*args: Any, **kwargs: Any) -> Any:
            tensors = [[each for each in tree_leaves(arg) if isinstance(each, Tensor)] for arg in args]
            given = next((found for found in reversed(tensors) if found), [])  # outputs come before inputs
            self.made.append((name, sum(each.numel() for each in given)))
            return collective(*args, **kwargs)

        return note


class Branches(nn.Module):
    """Layers of which a forward takes some, in the order given."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        for name, neurons in BRANCHES.items():
            setattr(self, name, nn.Sequential(nn.Linear(WIDTH, neurons), nn.ReLU(), nn.Linear(neurons, 1)))

    def forward(self, x: Tensor, branches: str) -> Tensor:
        return torch.stack([getattr(self, name)(x).sum() for name in branches]).sum()


class Run:
    """A run of one of two ranks; each of its events notes the collectives it made, and slow twins keep its activations.

    Args:
        rank: The rank.
        options: Of the watch.
    """

    def __init__(self, rank: int, **options: Any) -> None:
        self.rank = rank
        self.made: dict[str, list[list[tuple[str, int]]]] = {}
        self.model = Branches()
        self.twins = {phase: Branches() for phase in ("train", "val", "inference")}
        self.recorders = {phase: Recorder(twin, SITES) for phase, twin in self.twins.items()}
        self.scope = ns.watch(self.model, **{"window_steps": WINDOW, "policy": POLICY, **options})

    @contextmanager
    def event(self, name: str) -> Iterator[None]:
        with Noted() as noted:
            yield
        self.made.setdefault(name, []).append(noted.made)

    def forward(self, branches: str, phase: str = "train") -> None:
        x = batch(self.scope.global_step, self.rank, 2)
        self.recorders[phase].step = self.scope.global_step
        for model in (self.model, self.twins[phase]):
            model(x, branches).square().backward()

    def infer(self, branches: str = "ab") -> None:
        """A forward without gradients, in a training step."""
        x = batch(self.scope.global_step, self.rank, 5)
        self.recorders["inference"].step = self.scope.global_step
        with torch.no_grad():
            for model in (self.model, self.twins["inference"]):
                model(x, branches)

    def step(self, branches: str = "ab", event: str = "step") -> None:
        with self.event(event):
            if branches:
                self.forward(branches)
            self.scope.step()

    def window(self, branches: str = "ab") -> None:
        """Its steps, of which the last is noted as one that closes a window."""
        for number in range(WINDOW):
            self.step(branches, event="step" if number < WINDOW - 1 else "window")

    def validate(self, branches: str = "ab", *, join: bool = True) -> None:
        with self.event("val"), self.scope.phase("val", join=join):
            self.forward(branches, "val")

    def finish(self) -> dict[str, Any]:
        with self.event("detach"):
            self.scope.detach()
        return {
            "made": self.made,
            "exchanges": self.scope._ranks.exchanges,
            "counted": {phase: counted(self.scope, phase=phase) for phase in self.recorders},
            "recorded": {phase: recorder.counts() for phase, recorder in self.recorders.items()},
        }


def steady(rank: int) -> dict[str, Any]:
    """Three windows, and a validation after each; the last one is left open for the end."""
    run = Run(rank)
    for _ in range(3):
        run.window()
        run.validate()
    run.step()
    return run.finish()


def apart(rank: int) -> dict[str, Any]:
    """Each rank for itself."""
    run = Run(rank, join_ranks=False)
    run.window()
    run.validate()
    return run.finish()


def unsure_window(rank: int) -> dict[str, Any]:
    """A window that is looked at three times, and never has the examples that the policy asks for."""
    run = Run(rank, policy=ns.Policy(max_rate=0.001))  # some 3,000 examples
    for _ in range(3):
        run.window()
    return run.finish()


def late_site(rank: int) -> dict[str, Any]:
    """In the second window one rank alone meets another site."""
    run = Run(rank)
    for number in range(4):
        run.window("ab" if rank and number else "a")
    return run.finish()


def other_order(rank: int) -> dict[str, Any]:
    """Ranks meet the same sites in another order."""
    run = Run(rank)
    for _ in range(2):
        run.window("ba" if rank else "ab")
    return run.finish()


def mixed_phases(rank: int) -> dict[str, Any]:
    """One rank validates while the other still trains, in the first exchange that knows the sites and ever after."""
    run = Run(rank)
    for number in range(4):
        if (number + rank) % 2:
            run.validate()
        run.window()
        if not (number + rank) % 2:
            run.validate()
    return run.finish()


def one_goes_on(rank: int) -> dict[str, Any]:
    """One rank is done after a window and a validation; the other trains and validates on."""
    run = Run(rank)
    run.window()
    run.validate()
    for _ in range(0 if rank else 2):
        run.window()
        run.validate()
    return run.finish()


def inference_on_one_rank(rank: int) -> dict[str, Any]:
    """Rank 1 alone runs forwards without gradients, from the second window on; rank 0 validates once."""
    run = Run(rank)
    run.window()
    for number in range(3):
        if rank:
            run.infer()
        run.window()
        if not rank and number == 1:
            run.validate()
    if rank:
        run.infer("a")
        run.window()
        run.infer("b")
        run.step()
    return run.finish()


EXCHANGES = (
    steady,
    apart,
    unsure_window,
    late_site,
    other_order,
    mixed_phases,
    one_goes_on,
    inference_on_one_rank,
)
