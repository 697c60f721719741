"""Search a box of inputs for one that makes a neuron fire: signed-gradient ascent on its pre-activation.

A neuron that is silent on the data may be dead for every input of a box, or only for the inputs that were seen. A bound
can prove the first; an input that makes the neuron fire proves the second. Each input that is found is given to the
network once more, alone, and counts only if the neuron's output is not zero then.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice

import numpy as np
import torch
from torch import Tensor, nn

from neuronscope.arrays import BoolArray, IntArray
from neuronscope.checkpoints.model.bounds.propagate import Box
from neuronscope.checkpoints.model.box_inputs import BoxInputs
from neuronscope.checkpoints.model.example_inputs import Example
from neuronscope.checkpoints.model.observed_network import ObservedNetwork, SiteCall
from neuronscope.errors import UsageError
from neuronscope.running import model_state_restored

__all__ = ["WakeSearch", "search_waking_inputs"]

#: A neuron, as site and index.
Pair = tuple[str, int]
#: ``progress(done, total)``
Progress = Callable[[int, int], None]

#: Steps of one ascent, and its first and last step length as a share of the box.
_STEPS, _FIRST, _LAST = 60, 0.25, 0.004
#: Starts per neuron: the first ones are the inputs of a sample with the highest pre-activation, the others are random.
_STARTS, _BEST = 480, 8
#: Most starts of one neuron in a forward, unless the sites of the forward are given fewer numbers than this.
_TOGETHER, _SMALL = 8, 2**19
#: Most inputs of the sample, and of the data in it.
_SAMPLE, _REAL = 2048, 256
#: Most inputs in one forward, and most numbers that the sites of one forward are given.
_ROWS, _NUMBERS = 1024, 2**25


@dataclass
class WakeSearch:
    """What a search found.

    Attributes:
        found: For each site that was searched, index into ``inputs`` of an input that makes each neuron fire, int64
            ``(N,)``; −1 = none was found.
        inputs: The inputs: tensors by the name of the argument; ``0`` is the first positional argument, and
            ``mask.1`` the second tensor of the argument ``mask``.
        complete: Whether every neuron was woken or had all its starts; otherwise the time was up.
        refused: Why no search was possible; ``""`` if it was.
    """

    found: dict[str, IntArray] = field(default_factory=dict)
    inputs: list[dict[str, Tensor]] = field(default_factory=list)
    complete: bool = True
    refused: str = ""


def search_waking_inputs(
    model: nn.Module,
    example: Example,
    box: Box,
    targets: Mapping[str, BoolArray],
    *,
    seconds: float,
    seed: int = 0,
    watched: Mapping[str, BoolArray] | None = None,
    data: Example | None = None,
    progress: Progress | None = None,
) -> WakeSearch:
    """Search for inputs of a box that make neurons fire; return what was found, or why no search is possible.

    The network runs in evaluation mode and is left as it was; no global random state changes.

    Args:
        model: The network, on the CPU.
        example: An input that it runs on. Tensors that are not floating-point stay as they are.
        box: Lower and upper bound of every element of the floating-point inputs.
        targets: The neurons to wake, bool ``(N,)`` by site.
        seconds: How long to search. If the search is not stopped by this, its result follows from the seed.
        seed: Seed of the random inputs.
        watched: More neurons, bool ``(N,)`` by site, that are not searched for, but noted if an input wakes them.
        data: A batch of inputs to start from, moved into the box.
        progress: ``progress(done, total)``, called with the number of neurons that were woken.

    Raises:
        UsageError: The network fails on an input.

    >>> net = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    >>> _ = net[0].weight.data.fill_(1), net[0].bias.data.copy_(torch.tensor([-1.9, -2.1]))
    >>> all_of_them = {"0/relu": np.array([True, True])}
    >>> example = Example((torch.zeros(1, 2),), {}, "")
    >>> search_waking_inputs(net, example, (0.0, 1.0), all_of_them, seconds=10).found
    {'0/relu': array([ 0, -1])}
    """
    deadline = time.monotonic() + seconds
    every = {name: mask | (watched or {}).get(name, False) for name, mask in targets.items()}
    every |= {name: mask for name, mask in (watched or {}).items() if name not in targets}
    result = WakeSearch({name: np.full(mask.size, -1, dtype=np.int64) for name, mask in every.items()})
    if not targets:
        return result
    with torch.random.fork_rng(devices=[]), model_state_restored(model), torch.inference_mode(False):
        model.eval()
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        network = ObservedNetwork(model, example)
        inputs = BoxInputs(network, box, seed)
        try:
            result.refused = inputs.refused or network.unreliable()
            if not result.refused:
                search = _NeuronWaker(network, inputs, every, result, deadline)
                result.complete = search.run(targets, data, progress or (lambda *_: None))
        except UsageError as error:
            result.refused, result.complete = str(error), False
        finally:
            network.close()
    return result


class _TimeUp(Exception):  # noqa: N818
    """The time for the search is over."""


@dataclass
class _NeuronWaker:
    """Notes in the result which inputs wake the neurons that are left, bool ``(N,)`` by site."""

    _network: ObservedNetwork
    _inputs: BoxInputs
    _left: dict[str, BoolArray]
    _result: WakeSearch
    _deadline: float

    def __post_init__(self) -> None:
        self._sizes = {name: mask.size for name, mask in self._left.items()}
        calls = self._network.run([tensor[None] for tensor in self._network.example.values()])
        self._numbers = sum(call.before.numel() for call in calls) + self._inputs.numbers
        self._most_rows = max(1, min(_ROWS, _NUMBERS // self._numbers)) if self._network.batched else 1

    def run(self, targets: Mapping[str, BoolArray], data: Example | None, progress: Progress) -> bool:
        """Search until every target was woken or had all its starts; return whether that came before the deadline."""
        pairs = [(name, neuron) for name, mask in targets.items() for neuron in np.flatnonzero(mask).tolist()]
        try:
            sample, best = self._sample(pairs, data)
            waiting = (
                (place, start) for start in range(_STARTS) for place, pair in enumerate(pairs) if self._is_left(pair)
            )
            while batch := list(islice(waiting, self._batch_size(self._count_left(pairs)))):
                progress(len(pairs) - self._count_left(pairs), len(pairs))
                tensors = self._inputs.draw(len(batch))
                for row, (place, start) in enumerate(batch):
                    if start < len(best):
                        for tensor, one in zip(tensors, sample[best[start, place]], strict=True):
                            tensor[row] = one
                self._climb([pairs[place] for place, _ in batch], tensors, [start for _, start in batch])
        except _TimeUp:
            return False
        finally:
            progress(len(pairs) - self._count_left(pairs), len(pairs))
        return True

    def _batch_size(self, left: int) -> int:
        """Return how many starts to run together for so many neurons: few of each, unless the network is small."""
        return min(self._most_rows, max(_TOGETHER * left, _SMALL // self._numbers)) if left else 0

    def _count_left(self, pairs: Sequence[Pair]) -> int:
        return sum(map(self._is_left, pairs))

    def _is_left(self, pair: Pair) -> bool:
        return bool(self._left[pair[0]][pair[1]])

    def _run(self, tensors: Sequence[Tensor]) -> list[SiteCall]:
        """Run the network, and return the calls of the sites that are searched."""
        if time.monotonic() > self._deadline:
            raise _TimeUp
        calls = self._network.run(tensors)
        return [call for call in calls if call.after.shape[2] == self._sizes.get(call.name)]

    @torch.no_grad()
    def _sample(self, pairs: Sequence[Pair], data: Example | None) -> tuple[list[list[Tensor]], IntArray]:
        """Run the network on inputs of the data and on random ones.

        Return the inputs, and the places of the best for each neuron, int64 ``(starts, neurons)``, best first.
        """
        rows = min(_SAMPLE, _NUMBERS // (len(pairs) + self._inputs.numbers) + 1)
        chunks = self._inputs.of_data(data, min(_REAL, rows), self._most_rows)
        chunks += [self._inputs.draw(min(self._most_rows, rows - start)) for start in range(0, rows, self._most_rows)]
        sample: list[list[Tensor]] = []
        scores = []
        for chunk in chunks:
            calls = self._run(chunk)
            self._look(calls, chunk)
            score = torch.full((len(chunk[0]), len(pairs)), -torch.inf)
            for name in dict.fromkeys(name for name, _ in pairs):
                places = [place for place, pair in enumerate(pairs) if pair[0] == name]
                neurons = torch.tensor([pairs[place][1] for place in places])
                for call in calls:
                    if call.name == name:
                        highest = call.before[:, :, neurons].amax(1).nan_to_num(-torch.inf).float()
                        score[:, places] = torch.maximum(score[:, places], highest)
            scores.append(score)
            sample += [_row(chunk, row) for row in range(len(chunk[0]))]
        every = torch.cat(scores)
        return sample, every.topk(min(_BEST, len(every)), dim=0).indices.numpy()

    def _climb(self, pairs: list[Pair], tensors: list[Tensor], starts: list[int]) -> None:
        """Raise the pre-activation of one neuron, ``pairs[i]``, by the ``i``-th of several inputs, step by step."""
        for step in range(_STEPS + 1):
            with torch.enable_grad():
                tensors = [tensor.detach().requires_grad_(tensor.is_floating_point()) for tensor in tensors]
                calls = self._run(tensors)
                with torch.no_grad():
                    self._look(calls, tensors)
                going = [row for row, pair in enumerate(pairs) if self._is_left(pair)]
                if not going or step == _STEPS:
                    return
                every = (self._goal(call, pairs, starts, going) for call in calls)
                goals = [goal for goal in every if goal is not None and goal.requires_grad]
                floating = [tensor for tensor in tensors if tensor.requires_grad]
                if not goals:
                    return
                slopes = iter(torch.autograd.grad(goals, floating, allow_unused=True))
            gradients = [next(slopes) if tensor.requires_grad else None for tensor in tensors]
            length = _FIRST * (_LAST / _FIRST) ** (step / (_STEPS - 1))
            tensors = self._inputs.moved(tensors, gradients, length)
            if 2 * len(going) < len(pairs):
                tensors = [tensor[going] for tensor in tensors]
                pairs, starts = [pairs[row] for row in going], [starts[row] for row in going]

    def _goal(self, call: SiteCall, pairs: Sequence[Pair], starts: Sequence[int], rows: Sequence[int]) -> Tensor | None:
        """Return the sum of the highest pre-activations of the inputs' own neurons at one call of a site.

        Where a low pre-activation may wake a neuron too, every fourth start lowers it.
        """
        mine = [row for row in rows if pairs[row][0] == call.name]
        if not mine:
            return None
        signs = torch.tensor([-1.0 if not call.rises and starts[row] % 4 == 3 else 1.0 for row in mine])
        given = call.before[torch.tensor(mine), :, torch.tensor([pairs[row][1] for row in mine])]
        return (given * signs[:, None].to(given.dtype)).amax(1).sum()

    def _look(self, calls: Sequence[SiteCall], tensors: Sequence[Tensor]) -> None:
        """Note the neurons that fired and were left: by few of the inputs, each of which is run again alone."""
        fired = [
            _fires(call.after[:, :, torch.from_numpy(left)]).numpy()
            for call in calls
            if (left := self._left[call.name]).any()
        ]
        if not fired:
            return
        by_input = np.concatenate(fired, axis=1)  # (inputs, neurons)
        while by_input.any():
            row = int(by_input.sum(axis=1).argmax())
            self._replay(_row(tensors, row))
            by_input = by_input[:, ~by_input[row]]

    def _replay(self, one: list[Tensor]) -> None:
        """Run the network on one input alone, and note the neurons that fire."""
        index = len(self._result.inputs)
        woken = False
        for call in self._run([tensor[None] for tensor in one]):
            fires = _fires(call.after)[0].numpy() & self._left[call.name]
            self._result.found[call.name][fires] = index
            self._left[call.name] &= ~fires
            woken |= bool(fires.any())
        if woken:
            self._result.inputs.append(dict(zip(self._network.example, one, strict=True)))


def _row(tensors: Sequence[Tensor], row: int) -> list[Tensor]:
    """Return one of several inputs."""
    return [tensor[row].detach().clone() for tensor in tensors]


def _fires(after: Tensor) -> Tensor:
    """Return whether each neuron fires for each input, bool ``(R, N)``, from outputs ``(R, P, N)``."""
    return ((after != 0) & after.isfinite()).any(1)
