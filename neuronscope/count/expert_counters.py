"""Count the units of experts: data says which expert each row of a tensor is of, and no count waits for that data.

The counters of all experts of a layer lie in one tensor, so that one call adds to them all. The sites of the experts
have views of it: each has its own counts and its own positions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from neuronscope.count.counter_tensors import NEVER, CounterTensors
from neuronscope.count.counters import SiteCounters
from neuronscope.count.neuron_layout import Dims, rows_first

__all__ = ["ExpertCounters", "JoinedCounters", "add_expert_gradients", "add_expert_outputs"]

#: Most elements that are looked at together in eager mode, so that what is made for them stays small.
_PIECE = 1 << 20


class JoinedCounters:
    """The counters of the layers whose rows were joined before one activation; the host knows how many rows each has.

    Args:
        members: The counters of each layer's site; ``None`` for sites that are not wanted.
        neurons: Number of neurons of each, ``N``.

    Attributes:
        sharded_dims: As of :class:`~neuronscope.count.counters.SiteCounters`.
    """

    def __init__(self, members: Sequence[SiteCounters | None], neurons: int) -> None:
        self.neurons = neurons
        self.members = tuple(members)
        self.sharded_dims: tuple[int | None, ...] = ()

    @property
    def wanted(self) -> list[SiteCounters]:
        """The counters of the sites that are wanted."""
        return [member for member in self.members if member is not None]

    @property
    def open(self) -> bool:
        """Whether gradients are still counted."""
        return any(member.open for member in self.wanted)

    @property
    def unreadable(self) -> bool:
        """Whether an output was seen that cannot be counted."""
        return any(member.unreadable for member in self.wanted)

    @unreadable.setter
    def unreadable(self, value: bool) -> None:
        for member in self.wanted:
            member.unreadable = value

    def gate_by(self, gates: JoinedCounters) -> None:
        """Take gradients from the gates of these products.

        Args:
            gates: The counters of the gates.
        """
        for member, gate in zip(self.members, gates.members, strict=True):
            if member is not None:
                member.gate = gate


class ExpertCounters(JoinedCounters):
    """Count the outputs and gradients of one activation behind a layer of experts, in one phase.

    Each tensor has a row more than there are experts, for the rows of activations that are of no expert.

    Args:
        members: The counters of each expert's site; ``None`` for sites that are not wanted. What they counted so far
            stays.
        neurons: Number of neurons of an expert, ``N``.
        device: Device of the activation.

    Attributes:
        tensors: The counts of all experts: ``(E + 1, …)``, and ``…`` as in
            :class:`~neuronscope.count.counters.CounterTensors`.

    >>> sites = [SiteCounters(2, torch.device("cpu")) for _ in range(3)]
    >>> counters = ExpertCounters(sites, 2, torch.device("cpu"))
    >>> y = torch.tensor([[0.0, 1.0], [0.0, 0.0], [2.0, 0.0]])
    >>> owners = torch.tensor([2, 0, 2])
    >>> add_expert_outputs(counters, y, (((3, -1),), ((2, 1),)), owners, examples=1, forward=1, step=0, tolerance=0.0)
    >>> [site.tensors.zero_outputs.tolist() for site in sites], [site.totals()[0] for site in sites]
    ([[1, 1], [0, 0], [1, 1]], [1, 0, 2])
    """

    def __init__(self, members: Sequence[SiteCounters | None], neurons: int, device: torch.device) -> None:
        super().__init__(members, neurons)
        count = len(self.members) + 1
        with torch.inference_mode(False):
            single = SiteCounters(neurons, device).tensors
            self.tensors = CounterTensors(*[each.expand(count, *each.shape).clone() for each in single])
            #: Number of the last forward that each expert ran in, and its positions and examples in it so far.
            self.forwards = torch.full((count,), -1, dtype=torch.int64, device=device)
            self.forward_positions = torch.zeros(count, dtype=torch.int64, device=device)
            self.forward_examples = torch.zeros(count, dtype=torch.int64, device=device)
            for number, member in enumerate(self.members):
                if member is not None:
                    member.share(CounterTensors(*[each[number] for each in self.tensors]))


def add_expert_outputs(
    counters: ExpertCounters,
    y: Tensor,
    dims: Dims,
    owners: Tensor,
    examples: int,
    forward: int,
    step: int,
    tolerance: float,
) -> None:
    """Count one output tensor whose rows are of several experts. It waits for no device.

    Args:
        counters: The counters of the experts.
        y: Output of any shape, detached.
        dims: Where its rows and its units lie, as in :class:`~neuronscope.count.neuron_layout.NeuronLayout`.
        owners: The number of each row's expert, int64 ``(R,)``.
        examples: Number of independent examples that the forward was given.
        forward: Number of the forward.
        step: Optimizer step of the output.
        tolerance: See :class:`neuronscope.judge.verdicts.Policy`.
    """
    tensors = counters.tensors
    rows = rows_first(y, dims)
    zeros, bad = torch.zeros_like(tensors.zero_outputs), torch.zeros_like(tensors.not_finite)
    real = tensors.abs_sum.dtype
    wide = torch.float64 if y.device.type == "cpu" else torch.float32
    for part, own in _pieces(rows, owners):
        finite = torch.isfinite(part)
        magnitude = torch.where(finite, part.abs(), 0)
        zeros.index_add_(0, own, (part == 0 if tolerance == 0 else part.abs() <= tolerance).sum(1))
        bad.index_add_(0, own, (~finite).sum(1))
        tensors.abs_sum.index_add_(0, own, magnitude.sum(1, dtype=wide).to(real))
    positions = _positions(rows, owners, len(zeros))
    tensors.zero_outputs.add_(zeros)
    tensors.not_finite.add_(bad)
    fired = zeros + bad < positions[:, None]
    tensors.last_active.copy_(torch.where(fired, step, tensors.last_active))
    tensors.first_active.copy_(torch.where(fired & (tensors.first_active == NEVER), step, tensors.first_active))
    tensors.traced[:, 0].add_(positions)
    tensors.traced[:, 1].add_(_new_examples(counters, positions, examples, forward))


def _new_examples(counters: ExpertCounters, positions: Tensor, examples: int, forward: int) -> Tensor:
    """Return by how much the examples of each expert grow: they count once a forward, and are at most its positions."""
    same = counters.forwards == forward
    before = torch.where(same, counters.forward_examples, 0)
    counters.forward_positions.mul_(same).add_(positions)
    counters.forward_examples.copy_(counters.forward_positions.clamp(max=examples))
    counters.forwards.fill_(forward)
    return counters.forward_examples - before


def add_expert_gradients(counters: ExpertCounters, gradient: Tensor, dims: Dims, owners: Tensor) -> None:
    """Count one gradient at a pre-activation whose rows are of several experts. It waits for no device.

    Args:
        counters: The counters of the experts.
        gradient: Gradient of any shape, detached.
        dims: As in :func:`add_expert_outputs`.
        owners: The number of each row's expert, int64 ``(R,)``.
    """
    tensors = counters.tensors
    rows = rows_first(gradient, dims)
    for part, own in _pieces(rows, owners):
        tensors.zero_gradients.index_add_(0, own, (part == 0).sum(1))
    tensors.traced_gradients[:, 0].add_(_positions(rows, owners, len(tensors.traced_gradients)))


def _positions(rows: Tensor, owners: Tensor, count: int) -> Tensor:
    """Return the number of positions of each expert, int64 ``(count,)``."""
    each = torch.full_like(owners, rows.shape[1])
    return torch.zeros(count, dtype=torch.int64, device=owners.device).index_add_(0, owners, each)


def _pieces(rows: Tensor, owners: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield small parts of a tensor ``(R, P, N)``, each with the owners of its rows."""
    most = max(1, _PIECE // max(rows.shape[2], 1))  # positions of a part
    size = max(1, most // max(rows.shape[1], 1))
    for own, part in zip(owners.split(size), rows.split(size), strict=True):
        for piece in part.split(most, 1):
            yield piece, own
