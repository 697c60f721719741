"""Prove which neurons training on the same fixed data cannot revive.

A neuron of a first layer whose pre-activation is below zero for every example gets no gradient. What is left of the
optimizer's momentum may still move its weights, and decay shrinks them. If the pre-activation stays below zero through
all of that, for every example, it never gets a gradient again: it is *permanent* on this data.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from neuronscope.checkpoints.checkpoint import Checkpoint
from neuronscope.checkpoints.data.user_arguments import check_batches
from neuronscope.checkpoints.file.parameter_matching import match_parameters
from neuronscope.checkpoints.file.remaining_motion import RemainingMotion, remaining_motion
from neuronscope.checkpoints.model.bounds.interval import gamma
from neuronscope.checkpoints.model.example_inputs import batch_example
from neuronscope.checkpoints.model.first_layers import FirstLayer, find_first_layers
from neuronscope.checkpoints.model.load_model import stored_names
from neuronscope.checkpoints.model.observed_network import tensors_of
from neuronscope.checkpoints.user_code import user_code
from neuronscope.checkpoints.verdict.evidence import PERMANENT, Abstention, Evidence, evidence_where
from neuronscope.errors import UsageError
from neuronscope.running import model_state_restored

__all__ = ["FixedData"]

#: Added to the rounding of each term, relative to it: products of TF32 or bfloat16 (autocast) round as coarsely.
_COARSE = 2**-7
_OTHER_EXAMPLES = (
    "when the data was read again, it gave other examples; it is augmented or sampled, or a part of it is dropped"
)


class FixedData:
    """The whole training set of a checkpoint, and the neurons that training on it cannot revive.

    The data is read once here, in training mode and up to the first layers. When it is read again, :meth:`add` takes
    the batches, so that :meth:`evidence` can see whether they hold the same examples.

    Args:
        model: The network, with the checkpoint's weights.
        batches: The training set.
        first: Its first batch.
        checkpoint: The checkpoint.
        parameter_names: The names of the model's parameters in the checkpoint, in the model's order.

    Raises:
        UsageError: The data can be read only once, or the network fails on it.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Iterable[Any],
        first: Any,
        checkpoint: Checkpoint,
        parameter_names: Sequence[str] | None,
    ) -> None:
        if iter(batches) is batches:
            raise UsageError(
                "Expected argument `data` to be batches that can be read twice, such as a list or a DataLoader, since "
                "`fixed_data` (--fixed-data) reads them twice; but got an iterator, which can be read once only."
            )
        self._seen, self._again = _ExampleSum(), _ExampleSum()
        self._bounds: list[_RowBounds] = []
        self._refused: list[Abstention] = []
        if checkpoint.is_averaged:
            self._refuse("", "the file's weights are averages of those that the optimizer trained")
            return
        layers = find_first_layers(model, batch_example(first))
        if isinstance(layers, str):
            self._refuse("", layers)
            return
        states = match_parameters(checkpoint, parameter_names)[0]
        names = stored_names(model, checkpoint)
        for layer in layers:
            tensors = {layer.weight_name: layer.weight, layer.bias_name: layer.bias}
            motions = [
                remaining_motion(states.get(names.get(name, name)), tensor)
                for name, tensor in tensors.items()
                if tensor is not None
            ]
            known = [motion for motion in motions if isinstance(motion, RemainingMotion)]
            if len(known) == len(motions):
                self._bounds.append(_RowBounds(layer, known))
            else:
                self._refuse(layer.path, next(motion for motion in motions if isinstance(motion, str)))
        with model_state_restored(model), torch.no_grad():
            model.train()
            for batch in check_batches(batches) if self._bounds else ():
                self._seen.add(batch)
                _run(model, batch, self._bounds)

    def _refuse(self, layer: str, reason: str) -> None:
        self._refused.append(Abstention(PERMANENT, layer, f"No neuron is proved permanent: {reason}."))

    def add(self, batch: Any) -> None:
        """Take a batch of the data when it is read again."""
        if self._bounds:
            self._again.add(batch)

    def evidence(self) -> Iterator[Evidence | Abstention]:
        """Yield evidence on the rows of first layers, and why others were not examined."""
        if self._seen != self._again:
            self._refuse("", _OTHER_EXAMPLES)
        else:
            for bounds in self._bounds:
                yield from bounds.evidence(self._seen.examples)
        yield from self._refused


@dataclass
class _ExampleSum:
    """A number that follows from the set of examples in batches, whatever their order and the batches' sizes.

    >>> one, other = _ExampleSum(), _ExampleSum()
    >>> one.add(torch.tensor([[1.0], [2.0]])), other.add(torch.tensor([[2.0]])), other.add(torch.tensor([[1.0]]))
    (None, None, None)
    >>> one == other
    True
    """

    examples: int = 0
    total: int = 0

    def add(self, batch: Any) -> None:
        """Add the examples of a batch, along the first dimension of the model's inputs."""
        tensors = [tensor for tensor in tensors_of(batch_example(batch)).values() if tensor.dim()]
        rows = min((len(tensor) for tensor in tensors), default=0)
        parts = [tensor.unsqueeze(1).flatten(1).contiguous().view(torch.uint8).numpy() for tensor in tensors]
        for row in range(rows):
            self.total = (self.total + hash(b"".join(part[row].tobytes() for part in parts))) % 2**64
        self.examples += rows


def _run(model: nn.Module, batch: Any, bounds: Sequence[_RowBounds]) -> None:
    """Run the network on a batch until every first layer was called."""
    example = batch_example(batch)
    mode = _LayerInputs(bounds)
    with user_code("Expected the model to run over the data in training mode"):
        try:
            # The data draws its random numbers outside, so that augmentation shows when it is read again.
            with torch.random.fork_rng(devices=[]), mode:
                model(*example.args, **example.kwargs)
        except _AllSeen:
            return
    for one in mode.left.values():
        one.missed = True


class _AllSeen(BaseException):
    """Every first layer was called; the rest of the forward is not needed."""


class _LayerInputs(TorchFunctionMode):
    """Passes the inputs of first layers to their bounds, and ends the forward after the last one."""

    def __init__(self, bounds: Sequence[_RowBounds]) -> None:
        super().__init__()
        self.left = {id(one.layer.weight): one for one in bounds}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        weight = args[1] if len(args) > 1 else kwargs.get("weight")
        one = self.left.get(id(weight))
        if one is not None and func is one.layer.function:
            del self.left[id(weight)]
            given = args[0] if args else kwargs["input"]
            settings = {name: value for name, value in kwargs.items() if name not in ("input", "weight", "bias")}
            one.add(given.detach().double(), args[3:], settings)
            if not self.left:
                raise _AllSeen
        return func(*args, **kwargs)


class _RowBounds:
    """The highest pre-activation that each row of a first layer can have on any example, at any later step."""

    def __init__(self, layer: FirstLayer, motions: Sequence[RemainingMotion]) -> None:
        self.layer = layer
        self.missed = False
        self._motions = motions
        self._weight = layer.weight.detach().double()
        rounding = gamma(self._weight[0].numel(), layer.weight.dtype) + _COARSE
        self._slack = [
            motion.reach + rounding * (tensor.detach().double().abs() + motion.reach)
            for motion, tensor in zip(motions, (layer.weight, layer.bias), strict=False)
            if tensor is not None
        ]
        self._highest = torch.full((len(self._weight),), -torch.inf, dtype=torch.float64)

    def add(self, x: Tensor, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Take the input of one call, ``(B, …)``, and the arguments that follow the bias."""
        apply = self.layer.function
        product = apply(x, self._weight, None, *args, **kwargs) + apply(x.abs(), self._slack[0], None, *args, **kwargs)
        rows = product.movedim(-1 if apply is torch.nn.functional.linear else 1, -1).flatten(0, -2)
        if len(rows):
            self._highest = torch.maximum(self._highest, rows.nan_to_num(nan=torch.inf, neginf=torch.inf).amax(0))

    def evidence(self, examples: int) -> Iterator[Evidence]:
        """Yield evidence on the rows that stay below zero."""
        layer, highest = self.layer, self._highest
        if layer.bias is not None:
            bias = layer.bias.detach().double() + self._slack[1]
            groups = [motion.group for motion in self._motions]
            parts = [highest + bias]
            if groups[0] is not groups[1]:  # decay may take one of them away and leave the other
                parts += [part for part, group in zip((bias, highest), groups, strict=True) if group is not None]
            highest = torch.stack(torch.broadcast_tensors(*parts)).amax(0)
        rate = max(motion.rate for motion in self._motions)
        optimizer = self._motions[0].optimizer
        shrinks = any(motion.group is not None for motion in self._motions)
        return evidence_where(
            layer.path,
            (highest < 0) & (not self.missed),
            highest,
            source=PERMANENT,
            claim="no gradient",
            basis="proved",
            measure="pre-activation on this data, at most, with all that momentum can still add",
            text=(
                f"Permanent on this data: its pre-activation is below zero on each of the {examples:,} examples, and "
                f"stays so, so that it gets no gradient. What {optimizer} keeps of past gradients is too small to "
                f"change that{', and decay only shrinks it' if shrinks else ''}. This is proved for the next "
                f"{min(motion.steps for motion in self._motions):,} steps of training on these examples as they are, "
                f"in any order and any batches, with this optimizer and its state, at learning rates up to {rate:g}, "
                "if all gradients are finite and the loss depends on the weights through the network's output only."
            ),
        )
