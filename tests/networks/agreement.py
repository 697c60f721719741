"""Two training steps of one network, watched and counted slowly; and all that the two must agree on."""

from __future__ import annotations

import contextlib
import fnmatch
import logging
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import neuronscope as ns
from tests.agreement.slow_twin import Nobody, Watched, assert_bits, assert_same, state_of
from tests.networks.flow_ends import ending_operators
from tests.networks.language import TRANSFORMERS
from tests.networks.twin import NetworkTwin
from tests.networks.vision import TIMM, TORCHVISION
from tests.networks.zoo import Network

NETWORKS = (*TORCHVISION, *TIMM, *TRANSFORMERS)
STEPS = 2


@dataclass(frozen=True)
class Agreement:
    """What came of one network.

    Attributes:
        census: Of the watched run.
        truth: The twin's tallies, by site name.
        products: Names of the gated products among them.
        not_measured: Site name → reason, of the watched run.
        behind_functions: Layers that others read behind functions that are not linear, as autograd says.
        ended_by: Place of each activation whose flow of units ended before it → the operator that ended it.
        states: Weights, buffers and gradients of the watched run and of the twin's.
    """

    census: ns.Census
    truth: dict[str, dict[str, Any]]
    products: frozenset[str]
    not_measured: dict[str, str]
    behind_functions: dict[str, set[str]]
    ended_by: dict[str, str]
    states: tuple[dict[str, Tensor], dict[str, Tensor]]


def run(network: Network, **options: Any) -> Agreement:
    """Build the network twice from the same seed; train one watched, with these options, and one counted slowly."""
    declared = options.get("axes", {})
    unseen = [pattern for pattern in network.unseen if pattern not in declared]
    watched, twin = Watched(**options), NetworkTwin(network.axes, unseen, declared, {} if declared else network.experts)
    states = []
    with _threads(1), _quiet(bool(network.unseen)), ending_operators() as ended_by:
        for watcher in (watched, twin):
            torch.manual_seed(0)
            model = network.build().train()
            with watcher.attach(model):
                train(model, watcher, network)
                states.append(state_of(model))
    report = watched.scope.report("train")
    not_measured = {item.name: item.reason for item in report.not_measured}
    return Agreement(
        watched.scope.census("train"),
        twin.tallies(),
        frozenset(twin.gates),
        not_measured,
        twin.behind_functions,
        ended_by,
        (states[0], states[1]),
    )


def assert_agreement(network: Network, result: Agreement) -> None:
    """Every integer, axis and name is the twin's, no axis is a guess, and watching left every bit of the weights."""
    assert_same(result.census, result.truth)
    for pattern, reason in network.unseen.items():
        found = [name for name in result.not_measured if fnmatch.fnmatchcase(name, pattern)]
        assert found, f"nothing says that {pattern} is not measured"
        assert all(result.not_measured[name].startswith(reason) for name in found)
    for name, tally in result.census.items():
        assert tally.axis_source == f"layer ({tally.layer})", f"{name}: {tally.axis_source}"
    accounted = {layer for tally in result.census.values() for layer in tally.layer.split("+")} | {*result.not_measured}
    if network.experts:  # the stack that an expert's layer is of
        accounted |= {layer.rpartition(".")[0] for layer in accounted if layer.rpartition(".")[2].isdigit()}
    if not network.unseen:  # of those, the place of the activation is listed
        assert {layer: names for layer, names in result.behind_functions.items() if layer not in accounted} == {}
    assert len(result.products) == network.gated
    assert_bits(*result.states)


def train(model: nn.Module, watcher: Nobody, network: Network) -> None:
    """Two steps, on other inputs each."""
    generator = torch.Generator().manual_seed(1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for _ in range(STEPS):
        watcher.backward(loss_of(model(**network.inputs(generator))))
        optimizer.step()
        optimizer.zero_grad()
        watcher.step()


def loss_of(output: Any) -> Tensor:
    """The network's own loss, or a sum of its outputs in which no two weigh the same."""
    own = getattr(output, "loss", None)
    if own is not None:
        return own
    loss = torch.zeros(())
    for tensor in _tensors(output):
        loss = loss + (tensor * torch.linspace(-1, 1, tensor.numel()).view(tensor.shape)).mean()
    return loss


def _tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        if output.requires_grad:
            yield output
    elif isinstance(output, dict):
        yield from _tensors(tuple(output.values()))
    elif isinstance(output, (tuple, list)):
        for part in output:
            yield from _tensors(part)


@contextlib.contextmanager
def _threads(count: int) -> Iterator[None]:
    """One thread: the order of sums, and with it whether two runs have the same bits, is then the same everywhere."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def _quiet(unseen: bool) -> Iterator[None]:
    """Without what the networks' packages say of themselves: deprecations in their code, kernels that are missing.

    Args:
        unseen: Neuronscope may say that it sees nothing.
    """
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            for package in ("torchvision", "timm", "transformers"):
                warnings.filterwarnings("ignore", module=rf"{package}\.")
            warnings.filterwarnings("ignore", ".torch.jit.script. is deprecated", DeprecationWarning)
            if unseen:
                warnings.filterwarnings("ignore", "No activation of .* was seen", ns.NeuronscopeWarning)
            yield
    finally:
        logger.setLevel(level)
