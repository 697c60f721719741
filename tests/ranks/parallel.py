"""A small gated network, and the ways in which torch spreads it over ranks."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.tensor import Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import neuronscope as ns
from tests.agreement.slow_twin import hook_tables
from tests.ranks.recorded import ARRAYS, NUMBERS, Recorder

DEVICE = os.environ.get("NEURONSCOPE_RANKS_ON", "cpu")  # see tests.ranks.spawning
STEPS, BATCH, WIDTH = 5, 4, 6
HIDDEN = 10  # over 4 ranks: 3, 3, 3 and 1 neurons


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(WIDTH, HIDDEN), nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH)
        self.act, self.product, self.late = nn.ReLU(), nn.Identity(), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.late(self.down(self.product(self.act(self.gate(x)) * self.up(x))))


class Network(nn.Module):
    def __init__(self, checkpointed: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.checkpointed = checkpointed
        self.first, self.early = nn.Linear(WIDTH, WIDTH), nn.ReLU()
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(WIDTH, 3)
        with torch.no_grad():
            self.blocks[0].gate.bias[-1] = -100.0  # a dead neuron, in the last part

    def forward(self, x: Tensor) -> Tensor:
        x = self.early(self.first(x))
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.checkpointed else block(x)
        return self.head(x)


#: By site, the module that gives its output, and the one that is given its pre-activation.
SITES = {
    "first/relu": ("early", "early"),
    **{f"blocks.{n}.gate/relu": (f"blocks.{n}.act", f"blocks.{n}.act") for n in (0, 1)},
    **{f"blocks.{n}.gate/reglu": (f"blocks.{n}.product", f"blocks.{n}.act") for n in (0, 1)},
    **{f"blocks.{n}.down/relu": (f"blocks.{n}.late", f"blocks.{n}.late") for n in (0, 1)},
}
SPLIT = tuple(name for name in SITES if ".gate/" in name)  # by tensor parallelism


@dataclass(frozen=True)
class Case:
    """One way to train.

    Attributes:
        autocast: To bfloat16.
        micro_batches: To an optimizer step.
        checkpointed: Whether the blocks run again in the backward pass.
        local: Whether activations under tensor parallelism are plain tensors.
    """

    autocast: bool = False
    micro_batches: int = 1
    checkpointed: bool = False
    local: bool = True


CASES = [Case(*options) for options in product((False, True), (1, 3), (False, True))]


def as_ddp(model: nn.Module, case: Case) -> nn.Module:
    return DistributedDataParallel(model)


def as_fsdp(model: nn.Module, case: Case, mesh: Any = None) -> nn.Module:
    mesh = mesh or init_device_mesh(DEVICE, (dist.get_world_size(),))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def as_fsdp1(model: nn.Module, case: Case) -> nn.Module:
    """``FullyShardedDataParallel``; where it is not told of a device it wants an accelerator."""
    device = torch.device(DEVICE, 0) if DEVICE == "cuda" else torch.device(DEVICE)
    policy = ModuleWrapPolicy({Block})
    return FullyShardedDataParallel(model, device_id=device, auto_wrap_policy=policy, use_orig_params=True)


def as_tensor_parallel(model: nn.Module, case: Case, mesh: Any = None) -> nn.Module:
    mesh = mesh or init_device_mesh(DEVICE, (dist.get_world_size(),))
    split = {"gate": ColwiseParallel(use_local_output=case.local), "up": ColwiseParallel(use_local_output=case.local)}
    for block in model.blocks:
        parallelize_module(block, mesh, {**split, "down": RowwiseParallel()})
    return model


def as_both(model: nn.Module, case: Case) -> nn.Module:
    """Tensor parallel over pairs of ranks, FSDP2 over the pairs."""
    mesh = init_device_mesh(DEVICE, (2, dist.get_world_size() // 2), mesh_dim_names=("data", "tensor"))
    return as_fsdp(as_tensor_parallel(model, case, mesh["tensor"]), case, mesh["data"])


STRATEGIES = {"ddp": as_ddp, "fsdp": as_fsdp, "fsdp1": as_fsdp1, "tensor": as_tensor_parallel, "both": as_both}


def data(share: int, case: Case) -> list[list[tuple[Tensor, Tensor]]]:
    """The micro-batches of each step that one data-parallel rank gets."""
    generator = torch.Generator().manual_seed(100 + share)
    return [
        [
            (torch.randn(BATCH, 2, WIDTH, generator=generator), torch.randint(3, (BATCH, 2), generator=generator))
            for _ in range(case.micro_batches)
        ]
        for _ in range(STEPS)
    ]


def without_sync(model: nn.Module, last: bool) -> Any:
    """Gradients are exchanged at the last micro-batch of a step only."""
    if hasattr(model, "set_requires_gradient_sync"):
        model.set_requires_gradient_sync(last)
    elif not last and hasattr(model, "no_sync"):
        return model.no_sync()
    return contextlib.nullcontext()


def train(model: nn.Module, case: Case, share: int, step: Any) -> None:
    """Train; ``step`` is called after each optimizer step."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for micro_batches in data(share, case):
        for number, (x, y) in enumerate(micro_batches):
            cast = torch.autocast(DEVICE, torch.bfloat16, enabled=case.autocast)
            with without_sync(model, number == len(micro_batches) - 1):
                with cast:
                    loss = nn.functional.cross_entropy(model(x.to(DEVICE)).flatten(0, 1), y.to(DEVICE).flatten())
                loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        step()


def whole(model: nn.Module) -> dict[str, Tensor]:
    """The weights, whole."""
    weights = {}
    for name, weight in model.state_dict().items():
        full = weight.full_tensor() if hasattr(weight, "full_tensor") else weight
        weights[name.removeprefix("module.")] = full.cpu()
    return weights


def counted(scope: ns.Scope, window: str = "all", phase: str = "train") -> dict[str, dict[str, Any]]:
    census = scope.census(phase, window)
    return {name: {key: getattr(tally, key) for key in (*ARRAYS, *NUMBERS)} for name, tally in census.items()}


def run(strategy: str, case: Case, share: int) -> dict[str, Any]:
    """Recorded and not watched, then watched and not recorded."""
    spread = STRATEGIES[strategy]
    model = spread(Network(case.checkpointed).to(DEVICE), case)
    recorder = Recorder(model.module if strategy == "ddp" else model, SITES)
    train(model, case, share, recorder.next_step)
    watched = spread(Network(case.checkpointed).to(DEVICE), case)
    before = hook_tables(watched)
    with ns.watch(watched, window_steps=2) as scope:
        train(watched, case, share, scope.step)
    return outcome(recorder, scope, (whole(model), whole(watched)), same_hooks=hook_tables(watched) == before)


def outcome(
    recorder: Recorder,
    scope: ns.Scope,
    weights: tuple[dict[str, Tensor], dict[str, Tensor]],
    *,
    same_hooks: bool,
    phases: tuple[str, ...] = ("train",),
    within: str = "",
) -> dict[str, Any]:
    """What one rank gives of two runs, of which the first was recorded and the second watched.

    Args:
        recorder: Of the first.
        scope: Of the second.
        weights: Where each ended.
        same_hooks: Whether watching left the hook tables as they were.
        phases: That are compared.
        within: The path of the recorded network in the watched one, with its dot.
    """
    plain, watched = weights
    report = scope.report()
    census = {phase: counted(scope, phase=phase) for phase in phases}
    return {
        "recorded": {phase: recorder.counts(phase) for phase in phases},
        "units": {tally.layer.removeprefix(within): tally.units for tally in scope.census().values()},
        "counted": {
            phase: {name.removeprefix(within): found for name, found in sites.items()}
            for phase, sites in census.items()
        },
        "weights": plain,
        "same_weights": plain.keys() == watched.keys() and all(plain[name].equal(watched[name]) for name in plain),
        "same_hooks": same_hooks,
        "unseen": {item.name: item.reason for item in report.not_measured},
        "notes": report.notes,
        "model": report.model,
        "warned": scope._hooks.failure,
    }


def sums(rank: int) -> dict[str, Any]:
    """Of each neuron, the sum of the magnitudes that all ranks saw together, and of those that this one did."""
    model = as_ddp(Network(), Case())
    with ns.watch(model, window_steps=2) as joined, ns.watch(model, window_steps=2, join_ranks=False) as own:

        def step() -> None:
            joined.step()
            own.step()

        train(model, Case(), rank, step)
    return {
        name: {site: tally.abs_sum for site, tally in scope.census().items()}
        for name, scope in (("joined", joined), ("own", own))
    }


def tried(build: Callable[[], Any]) -> str:
    """The class of what comes of it, or the error."""
    try:
        return type(build()).__name__
    except Exception as error:  # noqa: BLE001  # whatever a library says
        return f"{type(error).__name__}: {error}"


def sequence_parallel(rank: int) -> dict[str, Any]:
    """The second activation is a plain tensor, cut along its positions: each rank has all neurons, at its own half."""
    given: dict[str, Any] = {}
    for watched in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(WIDTH, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, WIDTH), nn.ReLU())
        plan = {"0": ColwiseParallel(), "2": RowwiseParallel(output_layouts=Shard(1))}
        parallelize_module(model, init_device_mesh(DEVICE, (dist.get_world_size(),)), plan)
        recorder = Recorder(model, {"0/relu": ("1", "1"), "2/relu": ("3", "3")})
        scope = ns.watch(model) if watched else None
        model(data(0, Case())[0][0][0]).sum().backward()
        if scope is None:
            given["recorded"] = recorder.counts()
        else:
            scope.step()
            scope.detach()
            given["counted"] = counted(scope)
    return given


def tensor_compiled(rank: int) -> Any:
    """Sites that were counted, and those that were not, of a compiled model whose layers the ranks share."""
    model = Block()
    mesh = init_device_mesh(DEVICE, (dist.get_world_size(),))
    parallelize_module(model, mesh, {"gate": ColwiseParallel(), "up": ColwiseParallel(), "down": RowwiseParallel()})
    compiled = torch.compile(model, backend="aot_eager")
    with ns.watch(compiled) as scope:
        compiled(torch.ones(2, WIDTH)).sum().backward()
        scope.step()
    return list(scope.census()), {item.name: item.reason for item in scope.report().not_measured}
