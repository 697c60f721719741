"""Count the units of experts: data says which expert each row of a tensor is of, and no count waits for that data.

The counters of all experts of a layer lie in one tensor, so that one call adds to them all. The sites of the experts
have views of it: each has its own counts and its own positions.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from neuronscope.count.compiled_graphs import aliases, gate_half, one_call_in_graph, runs_again, save_unchecked
from neuronscope.count.counter_tensors import NEVER, CounterTensors
from neuronscope.count.counters import SiteCounters
from neuronscope.count.neuron_layout import Dims, rows_kept

__all__ = [
    "ExpertCounters",
    "JoinedCounters",
    "add_expert_gradients",
    "add_expert_outputs",
    "add_expert_outputs_in_graph",
    "leave_out_rows",
    "register_expert_gradient_hook",
]

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

    def leave_out_call(self) -> None:
        """Note that a call is not counted, so that nothing can be said of any of the sites."""
        for member in self.wanted:
            member.incomplete = True

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
        pace: The number of the last forward that each expert ran in, and its positions and examples in it so far: int64
            ``(E + 1,)`` each.
        clock: As of :class:`~neuronscope.count.counters.SiteCounters`.

    >>> sites = [SiteCounters(2, torch.device("cpu")) for _ in range(3)]
    >>> counters = ExpertCounters(sites, 2, torch.device("cpu"))
    >>> y = torch.tensor([[0.0, 1.0], [0.0, 0.0], [2.0, 0.0]])
    >>> owners = torch.tensor([2, 0, 2])
    >>> add_expert_outputs(counters, y[:, None], owners, examples=1, forward=1, step=0, tolerance=0.0)
    >>> [site.tensors.zero_outputs.tolist() for site in sites], [site.totals()[0] for site in sites]
    ([[1, 1], [0, 0], [1, 1]], [1, 0, 2])
    """

    def __init__(self, members: Sequence[SiteCounters | None], neurons: int, device: torch.device) -> None:
        super().__init__(members, neurons)
        self.clock: Tensor
        count = len(self.members) + 1
        with torch.inference_mode(False):
            single = SiteCounters(neurons, device).tensors
            self.tensors = CounterTensors(*[each.expand(count, *each.shape).clone() for each in single])
            none = torch.zeros(count, dtype=torch.int64, device=device)
            self.pace = (none - 1, none, none.clone())
            for number, member in enumerate(self.members):
                if member is not None:
                    member.share(CounterTensors(*[each[number] for each in self.tensors]))

    @property
    def in_graph(self) -> bool:
        """Whether a compiled graph holds the tensors."""
        return any(member.in_graph for member in self.wanted)

    @property
    def of_outputs(self) -> tuple[Tensor, ...]:
        """The tensors that a graph changes which counts an output."""
        return (*self.tensors.of_outputs, *self.pace)

    def enter_graph(self) -> None:
        """Note that a graph holds the tensors from now on."""
        for member in self.wanted:
            member.enter_graph()

    def is_first_call(self, forward: int, attempt: tuple[Any, int]) -> bool:
        """Return whether this is the first call in a forward; see :class:`~neuronscope.count.counters.SiteCounters`.

        Args:
            forward: Number of the forward.
            attempt: Which compilation it is, and which attempt.
        """
        return self.wanted[0].is_first_call(forward, attempt)


def add_expert_outputs(
    counters: ExpertCounters,
    rows: Tensor,
    owners: Tensor,
    examples: int,
    forward: int,
    step: int,
    tolerance: float,
) -> None:
    """Count one output tensor whose rows are of several experts. It waits for no device.

    Args:
        counters: The counters of the experts.
        rows: Output ``(R, P, N)``, detached.
        owners: The number of each row's expert, int64 ``(R,)``.
        examples: Number of independent examples that the forward was given.
        forward: Number of the forward.
        step: Optimizer step of the output.
        tolerance: See :class:`neuronscope.judge.verdicts.Policy`.
    """
    _add_outputs(
        rows, _pieces(rows, owners), owners, examples, forward, step, tolerance, counters.tensors, counters.pace
    )


@one_call_in_graph
def add_expert_outputs_in_graph(
    y: Tensor,
    dims: Dims,
    owners: Tensor,
    mask: Tensor | None,
    examples: int,
    forward: Tensor | None,
    first: bool,
    step: Tensor,
    tolerance: float,
    *tensors: Tensor,
) -> None:
    """Do what :func:`add_expert_outputs` does in a graph that ``torch.compile`` traces.

    Args:
        y: Output of any shape.
        dims: Where its rows and its units lie, as in :class:`~neuronscope.count.neuron_layout.NeuronLayout`.
        owners: As there.
        mask: Which indices of the first dimensions are counted, bool ``(R, 1)``; ``None`` = all.
        examples: As there.
        forward: Number of the forward, int64 without dimensions; ``None`` if each run of the graph is one forward.
        first: In that case, whether this is the first call in it.
        step: Optimizer step of the output, int64 without dimensions.
        tolerance: As there.
        tensors: Those of :attr:`ExpertCounters.tensors`, and then those of :attr:`ExpertCounters.pace`.
    """
    if runs_again(y):
        return
    tensors = aliases(tensors)
    counts, pace = CounterTensors(*tensors[: len(CounterTensors._fields)]), tensors[len(CounterTensors._fields) :]
    same = not first if forward is None else forward
    rows, owners = _kept_rows(y.detach(), dims, owners, mask, len(counts.traced) - 1)
    _add_outputs(rows, ((rows, owners),), owners, examples, same, step, tolerance, counts, pace)


def _add_outputs(
    rows: Tensor,
    pieces: Iterable[tuple[Tensor, Tensor]],
    owners: Tensor,
    examples: int,
    forward: int | Tensor,
    step: int | Tensor,
    tolerance: float,
    tensors: CounterTensors,
    pace: Sequence[Tensor],
) -> None:
    """Count one output; see :func:`add_expert_outputs`. The pieces of it are looked at one by one.

    ``forward`` is its number; or ``True`` if it is that of the last call, and ``False`` if another one begins.
    """
    zeros, bad = torch.zeros_like(tensors.zero_outputs), torch.zeros_like(tensors.not_finite)
    real = tensors.abs_sum.dtype
    wide = torch.float64 if rows.device.type == "cpu" else torch.float32
    for part, own in pieces:
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
    tensors.traced[:, 1].add_(_new_examples(positions, examples, forward, *pace))


def _new_examples(
    positions: Tensor,
    examples: int,
    forward: int | Tensor,
    forwards: Tensor,
    forward_positions: Tensor,
    forward_examples: Tensor,
) -> Tensor:
    """Return by how much the examples of each expert grow: they count once a forward, and are at most its positions."""
    same = torch.full_like(forwards, forward) if isinstance(forward, bool) else forwards == forward
    before = forward_examples * same
    forward_positions.mul_(same).add_(positions)
    forward_examples.copy_(torch.maximum(before, forward_positions.clamp(max=examples)))
    if not isinstance(forward, bool):
        forwards.copy_(torch.zeros_like(forwards) + forward)
    return forward_examples - before


def add_expert_gradients(counters: ExpertCounters, rows: Tensor, owners: Tensor) -> None:
    """Count one gradient at a pre-activation whose rows are of several experts. It waits for no device.

    Args:
        counters: The counters of the experts.
        rows: Gradient ``(R, P, N)``, detached.
        owners: The number of each row's expert, int64 ``(R,)``.
    """
    tensors = counters.tensors
    _add_gradients(rows, _pieces(rows, owners), owners, tensors.zero_gradients, tensors.traced_gradients)


@one_call_in_graph
def register_expert_gradient_hook(
    x: Tensor,
    dims: Dims,
    glu_dim: int | None,
    owners: Tensor,
    mask: Tensor | None,
    zero_gradients: Tensor,
    positions: Tensor,
) -> None:
    """Register a hook that counts the gradient of ``x``, in a graph that ``torch.compile`` traces.

    Args:
        x: The pre-activation, whose rows are of several experts.
        dims: As in :func:`add_expert_outputs_in_graph`.
        glu_dim: The dimension whose second half is the gate (GLU), otherwise ``None``.
        owners: The number of each row's expert, int64 ``(R,)``.
        mask: As in :func:`add_expert_outputs_in_graph`.
        zero_gradients: That of :attr:`ExpertCounters.tensors`.
        positions: Its ``traced_gradients``.
    """
    if runs_again(x):
        return
    save_unchecked(zero_gradients, positions)
    zero_gradients, positions = aliases((zero_gradients, positions))

    def count(gradient: Tensor) -> None:
        half = gate_half(gradient, glu_dim).detach()
        rows, own = _kept_rows(half, dims, owners, mask, len(positions) - 1)
        _add_gradients(rows, ((rows, own),), own, zero_gradients, positions)

    x.register_hook(count)


def _add_gradients(
    rows: Tensor, pieces: Iterable[tuple[Tensor, Tensor]], owners: Tensor, zero_gradients: Tensor, positions: Tensor
) -> None:
    for part, own in pieces:
        zero_gradients.index_add_(0, own, (part == 0).sum(1))
    positions[:, 0].add_(_positions(rows, owners, len(positions)))


def _kept_rows(tensor: Tensor, dims: Dims, owners: Tensor, mask: Tensor | None, experts: int) -> tuple[Tensor, Tensor]:
    rows, kept = rows_kept(tensor, dims, mask)
    return leave_out_rows(rows, owners, kept, experts)


def leave_out_rows(rows: Tensor, owners: Tensor, kept: Tensor | None, experts: int) -> tuple[Tensor, Tensor]:
    """Return rows of which each has one position, and which expert each is of: none, if it is left out.

    Args:
        rows: An output or a gradient, ``(R, P, N)``.
        owners: The number of each row's expert, int64 ``(R,)``.
        kept: Which positions are kept, bool ``(R, P)``; ``None`` = all, and nothing is done.
        experts: Number of experts, which stands for none.

    >>> leave_out_rows(torch.ones(2, 1, 3), torch.tensor([1, 0]), torch.tensor([[True], [False]]), 2)[1].tolist()
    [1, 2]
    """
    if kept is None:
        return rows, owners
    each = owners[:, None].expand(kept.shape)
    return rows.reshape(-1, 1, rows.shape[-1]), torch.where(kept, each, experts).reshape(-1)


def _positions(rows: Tensor, owners: Tensor, count: int) -> Tensor:
    """Return the number of positions of each expert, int64 ``(count,)``.

    It is counted in the tensor itself: what depends on no gradient, AOTAutograd adds in the forward graph. If that runs
    twice before the backward graphs, these would both begin with the same sum.
    """
    first = rows[:, :, 0]
    each = (first == 0).sum(1) + (first != 0).sum(1)
    return torch.zeros(count, dtype=torch.int64, device=owners.device).index_add_(0, owners, each)


def _pieces(rows: Tensor, owners: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield small parts of a tensor ``(R, P, N)``, each with the owners of its rows."""
    most = max(1, _PIECE // max(rows.shape[2], 1))  # positions of a part
    size = max(1, most // max(rows.shape[1], 1))
    for own, part in zip(owners.split(size), rows.split(size), strict=True):
        for piece in part.split(most, 1):
            yield piece, own
