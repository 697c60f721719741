"""Search a box of inputs for those that wake the dead neurons of a post-mortem, and note them in the verdicts.

A neuron that is silent on the data may be dead for every input of a box, or only for the inputs that were seen. A bound
can prove the first; an input that makes the neuron fire proves the second. Each input that is found is given to the
network once more, alone, and counts only if the neuron's output is not zero then. The search is signed-gradient ascent
on the neuron's pre-activation.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from neuronscope.arrays import BoolArray, IntArray
from neuronscope.checkpoints.model.bounds.propagate import Box, box_ends
from neuronscope.checkpoints.model.examine_model import Examination
from neuronscope.checkpoints.model.example_inputs import Example, batch_example
from neuronscope.checkpoints.model.observed_network import ObservedNetwork, SiteCall, tensors_of
from neuronscope.checkpoints.verdict.evidence import Abstention, Evidence
from neuronscope.checkpoints.verdict.layer_verdicts import LayerReport
from neuronscope.checkpoints.verdict.waking_inputs import Places, WakingInput, neurons_to_wake, note_woken
from neuronscope.errors import UsageError
from neuronscope.running import model_state_restored
from neuronscope.writers.formatting import plural

__all__ = ["WakeOptions", "WakeSearch", "Woken", "search_waking_inputs", "wake_dead_neurons"]

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
_SOURCE = "wake search"
#: How long to search unless the user says otherwise.
_SECONDS = 10.0


@dataclass
class WakeSearch:
    """What a search found."""

    #: By site, index into ``inputs`` of an input that makes each neuron fire, int64 ``(N,)``; −1 = none was found.
    found: dict[str, IntArray]
    #: The inputs: tensors by the name of the argument; ``0`` is the first positional argument, and ``mask.1`` the
    #: second tensor of the argument ``mask``.
    inputs: list[dict[str, Tensor]] = field(default_factory=list)
    complete: bool = True  # whether every neuron was woken or had all its starts; otherwise the time was up
    refused: str = ""  # why no search was possible; ``""`` if it was


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
        inputs = _BoxInputs(network, box, seed)
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
    _inputs: _BoxInputs
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


class _BoxInputs:
    """Makes inputs of a network that lie in a box: random ones, those of the data, and steps along a gradient."""

    def __init__(self, network: ObservedNetwork, box: Box, seed: int) -> None:
        self._network = network
        self._random = torch.Generator().manual_seed(seed)
        self.refused = ""  # why no input can be made
        self.low: list[
            Tensor | None
        ] = []  # bounds of each tensor of one input, in its own dtype; ``None`` for integers
        self.high: list[Tensor | None] = []
        self._fixed = list(network.example.values())
        for tensor in self._fixed:
            low, high = self._ends(tensor, box) if tensor.is_floating_point() else (None, None)
            self.low.append(low)
            self.high.append(high)
        if all(low is None for low in self.low):
            self.refused = "the network has no floating-point input, so no input is in the box"

    def _ends(self, tensor: Tensor, box: Box) -> tuple[Tensor, Tensor]:
        """Return the least and the greatest number of the tensor's dtype in the box, for each element."""
        low, high = box_ends(box, tuple(tensor.shape))
        if not bool((low.isfinite() & high.isfinite()).all()):
            self.refused = "the box is not finite"
        least, greatest = low.to(tensor.dtype), high.to(tensor.dtype)
        kind = torch.finfo(tensor.dtype)
        # An end that was rounded out of the box is moved into it, by at least the distance to the next number.
        least = torch.where(least.double() < low, least + least.abs() * kind.eps + kind.tiny, least)
        greatest = torch.where(greatest.double() > high, greatest - greatest.abs() * kind.eps - kind.tiny, greatest)
        if not bool((least <= greatest).all()):
            self.refused = f"the box holds no number of the input's type {tensor.dtype}"
        return least, greatest

    @property
    def numbers(self) -> int:
        """How many numbers one input has."""
        return sum(tensor.numel() for tensor in self._fixed)

    def draw(self, rows: int) -> list[Tensor]:
        """Return random inputs: two of three anywhere in the box, the others at its corners."""
        drawn = []
        for low, high, fixed in zip(self.low, self.high, self._fixed, strict=True):
            shape = (rows, *fixed.shape)
            if low is None or high is None:
                drawn.append(fixed.expand(shape).clone())
                continue
            share = torch.rand(shape, generator=self._random, dtype=torch.float64)
            corner = torch.rand((rows, *[1] * fixed.dim()), generator=self._random) < 1 / 3
            share = torch.where(corner, share.round(), share)
            drawn.append((low.double() * (1 - share) + high.double() * share).to(low.dtype).clamp(low, high))
        return drawn

    def moved(self, tensors: Sequence[Tensor], gradients: Sequence[Tensor | None], length: float) -> list[Tensor]:
        """Return inputs after one step along the sign of a gradient, of a length that is given as a share of the box.

        An input without gradient is drawn anew.
        """
        rows = len(tensors[0])
        lost = torch.ones(rows, dtype=torch.bool)
        moved = []
        for tensor, gradient, low, high in zip(tensors, gradients, self.low, self.high, strict=True):
            if gradient is None or low is None or high is None:
                moved.append(tensor.detach())
                continue
            sign = gradient.nan_to_num(0.0).sign()
            lost &= (sign == 0).reshape(rows, -1).all(1)
            half = high / 2 - low / 2
            moved.append((tensor.detach() + sign * half * (2 * length)).clamp(low, high))
        if bool(lost.any()):
            for tensor, new in zip(moved, self.draw(int(lost.sum())), strict=True):
                tensor[lost] = new
        return moved

    def of_data(self, data: Example | None, most: int, rows: int) -> list[list[Tensor]]:
        """Return inputs of the data, moved into the box, in parts of so many rows; none if not like the example."""
        found = {} if data is None else tensors_of(data)
        batched = self._network.batched
        if found.keys() != self._network.example.keys():
            return []
        if batched and (len(sizes := {tensor.shape[:1] for tensor in found.values()}) != 1 or () in sizes):
            return []
        tensors = []
        for (name, own), low, high in zip(self._network.example.items(), self.low, self.high, strict=True):
            given = found[name][:most, None] if batched else found[name][None]
            if given.shape[1:] != own.shape or given.is_floating_point() != own.is_floating_point():
                return []
            given = given.to(own.dtype)
            tensors.append(given if low is None else given.nan_to_num(0.0).clamp(low, high))
        return [list(part) for part in zip(*(tensor.split(rows) for tensor in tensors), strict=True)]


class WakeOptions(NamedTuple):
    """How to search."""

    box: Box  # bounds of every element of the input
    seconds: float  # how long to search at most
    seed: int  # seed of the random inputs

    @classmethod
    def of(cls, box: Box | None, seconds: float | None, seed: int) -> WakeOptions | None:
        """Return the options, or ``None`` if there is nothing to search; raise a UsageError if one is wrong.

        Args:
            box: The box.
            seconds: How long; ``None`` for the default.
            seed: The seed.
        """
        number = isinstance(seconds, (int, float)) and not isinstance(seconds, bool)
        if seconds is not None and not (number and 0 <= seconds < math.inf):
            raise UsageError(f"Expected argument `wake_seconds` to be a number of seconds ≥ 0, but got {seconds!r}.")
        if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed < 2**63:
            raise UsageError(f"Expected argument `seed` to be an integer from 0 to 2⁶³ − 1, but got {seed!r}.")
        if box is None or seconds == 0:
            return None
        return cls(box, _SECONDS if seconds is None else seconds, seed)


class Woken(NamedTuple):
    """What a search found."""

    layers: tuple[LayerReport, ...]  # the verdicts, with the input that wakes each neuron
    inputs: tuple[WakingInput, ...] = ()  # the inputs
    abstentions: tuple[Abstention, ...] = ()  # what was not searched, and why
    notes: tuple[str, ...] = ()  # proofs that an input refutes: a fault of Neuronscope


def wake_dead_neurons(
    model: nn.Module,
    examination: Examination,
    layers: Sequence[LayerReport],
    places: Places,
    options: WakeOptions,
    *,
    batch: Any = None,
    progress: Callable[[str, int, int | None], None] | None = None,
) -> Woken:
    """Search for inputs of the box that make dead and silent neurons fire.

    Args:
        model: The network, with the checkpoint's weights.
        examination: What is known of it.
        layers: The verdicts.
        places: Which units of the layers the neurons of its sites are.
        options: How to search.
        batch: A batch of the user's data, to start from.
        progress: ``progress(what, done, total)``.
    """
    if examination.example is None:
        return Woken(tuple(layers))
    widths = {site.name: site.neurons for site in examination.sites}
    targets = neurons_to_wake(layers, places, widths)
    proved = _proved_dead(examination.evidence)
    result = search_waking_inputs(
        model,
        examination.example,
        options.box,
        targets,
        seconds=options.seconds,
        seed=options.seed,
        watched=proved,
        data=None if batch is None else batch_example(batch),
        progress=None if progress is None else lambda done, total: progress("searching", done, total),
    )
    abstentions = []
    if result.refused:
        how_far = " to the end" if result.inputs else ""
        abstentions.append(Abstention(_SOURCE, "", f"The box was not searched{how_far}: {result.refused}."))
        if not result.inputs:
            return Woken(tuple(layers), abstentions=tuple(abstentions))
    elif not result.complete:
        left = sum(int((mask & (result.found[name] < 0)).sum()) for name, mask in targets.items())
        reason = (
            f"The time of {options.seconds:g} s was up when inputs were still being tried for "
            f"{plural(left, 'neuron')}: `wake_seconds` (--wake) gives more."
        )
        abstentions.append(Abstention(_SOURCE, "", reason))
    return Woken(
        note_woken(layers, places, result.found),
        tuple(
            {
                name: (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()  # numpy has no bfloat16
                for name, tensor in one.items()
            }
            for one in result.inputs
        ),
        tuple(abstentions),
        tuple(_refuted(examination.evidence, result.found)),
    )


def _proved_dead(evidence: Sequence[Evidence]) -> dict[str, BoolArray]:
    """Return the neurons that are proved dead, bool ``(N,)`` by site."""
    proved: dict[str, BoolArray] = {}
    for one in evidence:
        if one.basis == "proved" and one.claim == "dead":
            proved.setdefault(one.site, np.zeros(one.width, dtype=np.bool_))[one.neurons] = True
    return proved


def _refuted(evidence: Sequence[Evidence], found: Mapping[str, IntArray]) -> list[str]:
    """Report proofs of death that an input of the box refutes."""
    faults = []
    for one in evidence:
        if one.basis == "proved" and one.claim == "dead" and one.site in found:
            wrong = one.neurons[found[one.site][one.neurons] >= 0]
            if wrong.size:
                faults.append(
                    f"FAULT OF NEURONSCOPE: {one.source} called {plural(wrong.size, 'neuron')} of {one.site} proved "
                    f"dead that an input of the box makes fire (first {wrong[0]}, by waking input "
                    f"{found[one.site][wrong[0]]}). The proof is wrong: please report it with this network."
                )
    return faults
