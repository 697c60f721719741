"""Find out why a whole layer gets no gradient: it collapsed, or it was only cut off by a later layer, or frozen.

A layer has collapsed if all its neurons output zero. The optimizer's state shows this at the next layer, which reads
the output. If the next layer's weights get no gradient while its bias does, the loss still reaches the next layer, and
its input must be zero: the layer before it has collapsed. A frozen layer still outputs numbers, so the weights of the
next layer get gradients.

Layers are taken in the order of the file, which is the order in which the network's modules were created.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest

import torch
from torch import Tensor

from neuronscope.checkpoints.file.adam_clock import ClockReading
from neuronscope.checkpoints.file.layer_clocks import LayerClock
from neuronscope.checkpoints.file.layers import NEURON_KINDS, Layer

__all__ = ["NoGradientCause", "find_no_gradient_causes"]


@dataclass(frozen=True)
class NoGradientCause:
    """Why a whole layer gets no gradient."""

    kind: str  # ``collapsed``; ``unsure`` = collapsed or frozen; ``cut off`` = by a layer that has collapsed
    text: str  # how this is known, as a clause for the reader


@dataclass(frozen=True, eq=False)
class _LayerState:
    """What the clocks show about a layer, together with the norm after it if the norm replaces its bias."""

    layer: Layer
    has_bias: bool  # whether it adds a term that does not depend on its input
    no_gradient: bool  # whether none of its parameters gets a gradient
    is_open: bool  # whether its clock shows neither that nor a gradient
    input_is_zero: bool  # whether its bias still got gradients when the parameters that multiply its input got none
    still_updated: bool  # whether its optimizer continued to update it, as far as the file shows

    @property
    def may_have_collapsed(self) -> bool:
        """Whether it shows no gradient, and its rows are neurons."""
        return (self.no_gradient or self.is_open) and self.layer.kind in NEURON_KINDS


def find_no_gradient_causes(layers: Sequence[Layer], readings: Sequence[LayerClock]) -> dict[str, NoGradientCause]:
    """Return by path why whole layers get no gradient, as far as the clocks of the layers around them show it.

    A layer that is missing was frozen or cut off, as far as is known.

    Args:
        layers: The checkpoint's layers, in the order of the file.
        readings: The clocks of the layers that have one.
    """
    states = list(_layer_states(layers, {read.layer.path: read for read in readings}))
    causes: dict[str, NoGradientCause] = {}
    for index, state in enumerate(states):
        source = _input_layer(states, index) if state.input_is_zero else None
        if source is None:
            continue
        text = f"its input is zero since the collapse of {source.path}, and only its bias got gradients"
        causes.setdefault(state.layer.path, NoGradientCause("cut off", text))
        text = (
            f"the weights of {state.layer.path}, which reads it, got none either while its bias still did: the input "
            "there is zero. The layer has collapsed"
        )
        causes[source.path] = NoGradientCause("collapsed", text)
    for layer, text in _unsure(states):
        causes.setdefault(layer.path, NoGradientCause("unsure", text))
    for index, state in enumerate(states):
        if state.layer.path in causes and causes[state.layer.path].kind == "collapsed":
            for before in reversed(states[:index]):
                if not before.no_gradient:
                    break
                if before.may_have_collapsed:
                    text = f"it is cut off by the collapse of {state.layer.path}"
                    causes.setdefault(before.layer.path, NoGradientCause("cut off", text))
    return causes


def _layer_states(layers: Sequence[Layer], clocks: Mapping[str, LayerClock]) -> Iterator[_LayerState]:
    left = iter(zip_longest(layers, layers[1:]))
    for layer, norm in left:
        if layer.path not in clocks:
            continue
        parts, has_bias = [clocks[layer.path]], layer.bias is not None
        if not has_bias and norm and norm.kind == "norm" and norm.width == layer.width and norm.path in clocks:
            parts.append(clocks[norm.path])
            has_bias = norm.bias is not None
            next(left)  # the norm is a part of this layer
        input_is_zero = _input_is_zero(parts)
        silent = [_without_gradient(part, part.reading) for part in parts]
        no_gradient = not input_is_zero and all(bool(rows.all()) for rows in silent)
        shown = [part.reading.readable & ~rows for part, rows in zip(parts, silent, strict=True)]
        is_open = not no_gradient and not input_is_zero and not any(bool(rows.any()) for rows in shown)
        still_updated = all(part.lag == 0 and (part.taken is not None or part.rule.is_momentum) for part in parts)
        yield _LayerState(layer, has_bias, no_gradient, is_open, input_is_zero, still_updated)


def _input_is_zero(parts: Sequence[LayerClock]) -> bool:
    """Whether the weights had no gradient for long when the bias got its last one; the bias may have stopped since."""
    last = min(float(torch.where(part.reading.readable, part.reading.steps, torch.inf).min()) for part in parts)
    return math.isfinite(last) and all(bool(_without_gradient(part, part.weights, last).all()) for part in parts)


def _without_gradient(read: LayerClock, reading: ClockReading, steps_ago: float = 0.0) -> Tensor:
    """Whether each row, some steps ago, had got no gradient for longer than a pause, or never any; bool ``(N,)``."""
    limit = read.clock.silent_steps
    stopped = reading.never
    if read.taken is None or read.taken - 1 > limit:
        stopped = stopped | (reading.steps - steps_ago > limit)
    return stopped & reading.readable


def _input_layer(states: Sequence[_LayerState], index: int) -> Layer | None:
    """Return the layer that another one reads: the nearest before it that shows no gradient and has a fitting width."""
    reader = states[index].layer
    for state in reversed(states[:index]):
        width = state.layer.width
        fits = width == reader.width if reader.kind == "norm" else not (reader.inputs % width and width % reader.inputs)
        if fits and state.may_have_collapsed:
            return state.layer
    return None


def _unsure(states: Sequence[_LayerState]) -> Iterator[tuple[Layer, str]]:
    """Yield layers that have collapsed or were frozen: nothing gets a gradient, or no bias tells which of the two."""
    begin = 0
    while begin < len(states):
        end = begin
        while end < len(states) and states[end].no_gradient and states[end].still_updated:
            end += 1
        candidates = [state for state in states[begin:end] if state.may_have_collapsed]
        whole_network = (begin, end) == (0, len(states))
        no_bias_at_end = len(candidates) > 1 and not candidates[-1].has_bias and not states[end - 1].input_is_zero
        if candidates and whole_network:
            text = (
                "nothing in the network gets a gradient although the optimizer continues: this layer or one near it "
                "has collapsed, or the loss gives no gradient any more"
            )
            yield candidates[-2 if no_bias_at_end else -1].layer, text
        elif no_bias_at_end and begin > 0 and not (end < len(states) and states[end].input_is_zero):
            text = (
                f"neither does {candidates[-1].layer.path}, which reads it, although the optimizer continues: the "
                "layer has collapsed, or both were frozen in a way that leaves gradients of zero"
            )
            yield candidates[-2].layer, text
        begin = end + 1
