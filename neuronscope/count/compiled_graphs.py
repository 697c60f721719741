"""Count in graphs that ``torch.compile`` traces, by the plain formula, which the back end fuses with the model.

These are functions because the compiler does not trace methods of an object that is a constant of the graph.
"""

from __future__ import annotations

import contextlib
import functools
import math
import operator
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any, ParamSpec, TypeVar

import torch
import torch.fx.experimental.proxy_tensor
from torch import Tensor
from torch._dynamo.trace_rules import get_torch_obj_rule_map, manual_torch_name_rule_map
from torch._dynamo.variables import TorchInGraphFunctionVariable
from torch._functorch import partitioners
from torch._prims.rng_prims import run_and_save_rng_state
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor

from neuronscope.count.counters import SiteCounters
from neuronscope.count.neuron_layout import Dims, neurons_first
from neuronscope.count.positions import blank_positions

__all__ = [
    "KeptCounts",
    "add_outputs_in_graph",
    "alias_in_graph",
    "aliases",
    "gate_half",
    "graph_thread",
    "handled_as",
    "leave_out",
    "once_a_forward",
    "one_call_in_graph",
    "random_states_unchecked",
    "register_gradient_hook",
    "runs_again",
    "save_unchecked",
]

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")


def add_outputs_in_graph(
    counters: SiteCounters, y: Tensor, axis: int, examples: int | Tensor, tolerance: float
) -> None:
    """Count one output tensor.

    Args:
        counters: The counters of the site.
        y: Output ``(…, N, …)``; no gradient goes through what is counted of it.
        axis: Dimension of the neurons.
        examples: Number of independent examples in the output.
        tolerance: See :class:`neuronscope.judge.verdicts.Policy`.
    """
    _add_outputs_in_graph(y, axis, examples, counters.clock, tolerance, *counters.tensors)


def leave_out(counters: SiteCounters, positions: Tensor) -> None:
    """Take off positions of an output that were counted with zeros in place of their numbers.

    Args:
        counters: The counters of the site, which counted a tensor of
            :func:`neuronscope.count.positions.blank_positions`.
        positions: How many positions of each neuron were zeros in place of numbers, int64 without dimensions.
    """
    _leave_out_in_graph(counters.tensors.zero_outputs, counters.tensors.traced, positions)


def register_gradient_hook(
    x: Tensor, axis: int, dims: Dims | None, glu_dim: int | None, counters: SiteCounters, mask: Tensor | None
) -> None:
    """Register a hook that counts the gradient of ``x``, in a graph that ``torch.compile`` traces.

    Args:
        x: The pre-activation ``(…, N, …)``.
        axis: Dimension of the neurons.
        dims: As in :class:`~neuronscope.count.neuron_layout.NeuronLayout`.
        glu_dim: The dimension whose second half is the gate (GLU), otherwise ``None``.
        counters: The counters of the site.
        mask: Which positions are counted, bool ``(B, T)``; ``None`` = all.
    """
    zero_gradients, positions = counters.tensors.zero_gradients, counters.tensors.traced_gradients
    _register_gradient_hook_in_graph(x, axis, dims, glu_dim, zero_gradients, positions, mask)


def gate_half(gradient: Tensor, glu_dim: int | None) -> Tensor:
    """Return the part of a gradient that belongs to the gate of a GLU.

    Args:
        gradient: Gradient of any shape.
        glu_dim: The dimension along which the second half is the gate; ``None`` if the site is no GLU.

    Returns:
        The second half along ``glu_dim``, or the whole gradient.
    """
    if glu_dim is None:
        return gradient
    half = gradient.shape[glu_dim] // 2
    return gradient.narrow(glu_dim, half, half)


def one_call_in_graph(function: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
    """Tell ``torch.compile`` to write a function as one call into a graph; its back end fuses the body with the rest.

    ``torch.compiler.allow_in_graph`` does so too, and marks the graph: where the back end cannot compile a marked graph
    because a value in it depends on data, the compiler raises, where it runs the code of an unmarked one eagerly.
    """
    return handled_as(TorchInGraphFunctionVariable, function)


def handled_as(variable: Any, function: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
    """Tell ``torch.compile`` how to handle calls of a function, and return the function.

    Args:
        variable: The class of the compiler's variables that stand for the function.
        function: The function.
    """
    # By name too: the compiler makes the second table anew from the first, for example when DDP is set up.
    manual_torch_name_rule_map[f"{function.__module__}.{function.__qualname__}"] = variable
    get_torch_obj_rule_map()[function] = variable
    return function


@one_call_in_graph
def _add_outputs_in_graph(
    y: Tensor,
    axis: int,
    examples: int | Tensor,
    step: Tensor,
    tolerance: float,
    *tensors: Tensor,
) -> None:
    if runs_again(y):
        return
    zero_outputs, _, not_finite, abs_sum, last_active, first_active, traced, _ = aliases(tensors)
    # A compiler takes long for each operator, so that there are as few as possible.
    zeros, bad, magnitudes = _plain_outputs(y.detach(), axis, tolerance)
    positions = y.numel() // y.shape[axis]
    zero_outputs.add_(zeros)
    not_finite.add_(bad)
    abs_sum.add_(magnitudes)
    fired = zeros + bad < positions
    last_active.masked_fill_(fired, step)
    torch.where(fired, torch.minimum(first_active, step), first_active, out=first_active)
    if isinstance(positions, int) and isinstance(examples, int) and positions == examples:
        traced.add_(positions)
    else:  # positions, examples
        traced.add_(torch.arange(2, device=traced.device) * (examples - positions) + positions)


@one_call_in_graph
def once_a_forward(examples: int, forward: Tensor, last: Tensor) -> Tensor:
    """Return the number of examples of a call in a graph, 0 if a call of the same forward was counted.

    Args:
        examples: Number of examples that the forward was given.
        forward: Number of the forward, int64 without dimensions.
        last: Number of the last forward that was counted; is changed to this one.

    Returns:
        int64 without dimensions.
    """
    if runs_again(last):
        return last  # nobody adds it
    (last,) = aliases((last,))
    fresh = last != forward
    last.copy_(torch.where(fresh, forward, last))
    return fresh * examples


@one_call_in_graph
def _leave_out_in_graph(zeros: Tensor, counted: Tensor, positions: Tensor) -> None:
    if runs_again(zeros):
        return
    zeros, counted = aliases((zeros, counted))
    zeros.sub_(positions)
    counted[0].sub_(positions)


@one_call_in_graph
def _register_gradient_hook_in_graph(
    x: Tensor,
    axis: int,
    dims: Dims | None,
    glu_dim: int | None,
    zero_gradients: Tensor,
    positions: Tensor,
    mask: Tensor | None,
) -> None:
    if runs_again(x):
        return
    save_unchecked(zero_gradients, positions)
    zero_gradients, positions = aliases((zero_gradients, positions))

    def count(gradient: Tensor) -> None:
        part, neurons = neurons_first(gate_half(gradient, glu_dim).detach(), axis, dims)
        left_out = None
        if dims is None:
            part, left_out = blank_positions(part, neurons, mask)
        zero_gradients.add_(_plain_zeros(part, neurons, 0.0))
        positions.add_(part.numel() // part.shape[neurons])
        if left_out is not None:
            _leave_out_in_graph(zero_gradients, positions, left_out)

    x.register_hook(count)


class _Thread(threading.local):
    """What a thread runs.

    Attributes:
        in_graph: Whether a graph that counts.
    """

    in_graph = False


graph_thread = _Thread()


def runs_again(tensor: Tensor) -> bool:
    """Whether activation checkpointing runs a part of a graph once more, for what its backward pass needs.

    A back end that runs the graph as it was traced runs a checkpoint in it by torch's own function: in the graph, and
    in the backward pass, when the graph has ended. One that compiles the graph has made one function of both.

    Args:
        tensor: A tensor of the graph.
    """
    in_backward = torch._C._current_graph_task_id() != -1
    return in_backward and not (graph_thread.in_graph or _is_compiled(tensor))


def _is_compiled(tensor: Tensor) -> bool:
    """Whether a back end compiles a function that is given a tensor, and does not run it."""
    return isinstance(tensor, (FakeTensor, FunctionalTensor))


def aliases(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Return tensors of ours, or aliases of them if the function that is given them runs as it was traced.

    Torch does not see that the tensors change when their aliases do. It would refuse a backward pass for which a back
    end has saved them.

    Args:
        tensors: The tensors.
    """
    return tensors if _is_compiled(tensors[0]) else tuple([tensor.data for tensor in tensors])


@one_call_in_graph
def alias_in_graph(tensor: Tensor) -> Tensor:
    """Return what :func:`aliases` does for one tensor, as one call in a graph.

    Args:
        tensor: The tensor.
    """
    return aliases((tensor,))[0]


def save_unchecked(*counters: Tensor) -> None:
    """Let a backward graph keep counters although another graph may change them before it runs.

    If the forward runs twice before the first backward pass, both backward graphs add to the same counters. Torch
    refuses that for tensors that an ``autograd.Function`` saves, and allows it for those that it keeps otherwise.
    """
    for counter in counters:
        for proxy in _proxies_of(counter):
            proxy.node.meta[_UNCHECKED] = True


@contextlib.contextmanager
def random_states_unchecked() -> Iterator[None]:
    """While a back end compiles a graph that counts: let its backward graph keep random states in the same way.

    Torch keeps the state of each random operator in a checkpoint, behind the tensors of :func:`save_unchecked`, and
    takes the last ones of all for these (torch 2.13). So it would check some of ours, and raise.
    """
    original = getattr(partitioners, "functionalize_rng_ops", None)
    if original is None:
        yield
        return

    @functools.wraps(original)
    def functionalize(*args: Any, **kwargs: Any) -> Any:
        forward, backward = original(*args, **kwargs)
        for node in forward.graph.output_node().args[0]:
            if getattr(node, "target", None) is operator.getitem and node.args[0].target is run_and_save_rng_state:
                node.meta[_UNCHECKED] = True
        return forward, backward

    partitioners.functionalize_rng_ops = functionalize
    try:
        yield
    finally:
        partitioners.functionalize_rng_ops = original


#: In the metadata of a node: torch does not check whether its tensor has changed when the backward graph runs.
_UNCHECKED = "saved_tensor_with_no_vc_check"
#: Returns the nodes of a tensor in the graph that AOTAutograd traces. Torch 2.13 has this function. Without it, graphs
#: of the back end ``aot_eager`` fail where the forward runs twice; those of Inductor tell nobody what they change.
_proxies_of = getattr(torch.fx.experimental.proxy_tensor, "_get_proxies", lambda _: ())


class KeptCounts:
    """Keeps counts while a graph runs again that was counted before, and puts them back.

    Args:
        counters: The tensors of the counts that the graph changes.

    >>> count = torch.tensor([1, 2])
    >>> counts = KeptCounts([count])
    >>> kept = counts.keep()
    >>> _ = count.add_(5)
    >>> counts.put_back(kept)
    >>> count.tolist()
    [1, 2]
    """

    def __init__(self, counters: Iterable[Tensor]) -> None:
        groups: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}  # what one call copies
        for counter in counters:
            groups.setdefault((counter.device, counter.dtype), []).append(counter)
        self._counters = [*groups.values()]

    def keep(self) -> list[list[Tensor]]:
        """Return copies of the counts, for :meth:`put_back`."""
        with torch.inference_mode(False):
            kept = [[torch.empty_like(each) for each in group] for group in self._counters]
        for copies, group in zip(kept, self._counters, strict=True):
            torch._foreach_copy_(copies, group)
        return kept

    def put_back(self, kept: list[list[Tensor]]) -> None:
        """Set the counts to what they were when they were kept.

        Args:
            kept: What :meth:`keep` returned.
        """
        for copies, group in zip(kept, self._counters, strict=True):
            torch._foreach_copy_(group, copies)


def _others(tensor: Tensor, axis: int) -> list[int]:
    return [dimension for dimension in range(tensor.dim()) if dimension != axis]


def _plain_zeros(tensor: Tensor, axis: int, tolerance: float) -> Tensor:
    """Return the zeros of each neuron, int64 ``(N,)``."""
    zero = tensor == 0 if tolerance == 0 else tensor.abs() <= tolerance
    others = _others(tensor, axis)
    return zero.sum(others) if others else zero.long()


def _plain_outputs(tensor: Tensor, axis: int, tolerance: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return zeros (int64), values that are not finite (int64) and summed magnitudes of each neuron, ``(N,)`` each.

    Magnitudes are float64 on the CPU and of float64 tensors, elsewhere float32: some devices have no float64.
    """
    others = _others(tensor, axis)
    magnitude = tensor.abs()
    bad = ~(magnitude < math.inf)  # one comparison fewer than `isfinite`: a compiler takes long for each operator
    magnitude = magnitude.masked_fill(bad, 0)
    wide = torch.float64 if tensor.dtype is torch.float64 or tensor.device.type == "cpu" else torch.float32
    if not others:
        return _plain_zeros(tensor, axis, tolerance), bad.long(), magnitude.to(wide)
    return _plain_zeros(tensor, axis, tolerance), bad.sum(others), magnitude.sum(others, dtype=wide)
