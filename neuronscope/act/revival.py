"""Give neurons fresh incoming weights between two steps of a training: ``neuronscope.revive()``.

Everything is checked and drawn before anything is changed. Fresh weights are drawn on the CPU from a generator of our
own, so the user's random numbers stay as they are, and all ranks draw the same.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from neuronscope.act.rules import Rule, SiteActivity, as_rule
from neuronscope.act.structure import LayerWeights, Part, SiteStructure, Structure
from neuronscope.arrays import FloatArray, IntArray
from neuronscope.attach.dtensor import local_range, local_tensor, reshard
from neuronscope.attach.optimizer_steps import Optimizers, every_optimizer
from neuronscope.errors import DetachedError, UsageError
from neuronscope.judge.distinct import DistinctNeurons
from neuronscope.report.acts import Act
from neuronscope.scope import Scope
from neuronscope.tally.census import Census, Tally

__all__ = ["Revival", "revive", "revive_in"]

#: What optimizers keep for each weight that begins at zero: Adam's family, SGD, RMSprop, Adagrad, Adadelta.
_MOMENTS = frozenset(
    {
        *("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "exp_inf", "momentum_buffer"),
        *("square_avg", "grad_avg", "acc_delta", "sum"),
    }
)
_DISAGREE, _MOST = 0, 2**31


@dataclass(frozen=True)
class Revival:
    """What :func:`revive` did.

    Attributes:
        acts: One :class:`~neuronscope.report.acts.Act` for each site of which neurons were revived.
        left: Why neurons that the rule chose were left as they are, by site.
    """

    acts: tuple[Act, ...]
    left: Mapping[str, str]

    @property
    def neurons(self) -> int:
        """Number of neurons that were revived."""
        return sum(len(act.neurons) for act in self.acts)

    def __str__(self) -> str:
        done = ", ".join(f"{act.site} {len(act.neurons)}" for act in self.acts)
        one = self.neurons == 1
        lines = [f"{self.neurons} {'neuron was' if one else 'neurons were'} revived{f': {done}' if done else ''}."]
        return "\n".join([*lines, *(f"Left as they are: {site}: {reason}." for site, reason in self.left.items())])


#: The optimizer and the settings of each weight.
_Held = Mapping[Tensor, tuple[Optimizer, Mapping[str, Any]]]


class _Intended(NamedTuple):
    """What is to be done at one site."""

    name: str
    neurons: list[int]
    structure: SiteStructure


def revive(scope: Scope, optimizer: Optimizers, rule: Rule | str = "dead", *, seed: int = 0) -> Revival:
    """Give dead neurons fresh incoming weights and outgoing weights of zero. Call it between two optimizer steps.

    The open window of training is closed if it has enough examples for the policy; the rule judges the newest closed
    window. The incoming weights, biases and normalisation of each neuron that the rule chooses are drawn anew by their
    layer's own initialiser; the weights that read it become zero; so do the optimizer's moments and the gradients of
    both. A neuron that is zero at every position of a window, as ``dead`` asks for, then adds as little to the
    network's output there as before: the function on that window does not change by a bit. It learns again: its
    outgoing weights get gradients at once, its incoming ones from the next step on.

    The next window is one of the new neurons alone; sums over all windows also have what the old ones did. Each act is
    in :attr:`Scope.acts`, in reports and in the saved state.

    Neurons are left as they are, with the reason, where the weights that lead into them or read them are not known
    exactly (a residual sum, shared weights, layers of other classes), or where these are frozen or the optimizer does
    not hold them.

    Args:
        scope: The scope that watches the model in training.
        optimizer: The optimizer of its weights, or several.
        rule: ``dead``; ``dormant``, which is :class:`~neuronscope.act.rules.ReDo` at the policy's τ; or a rule of
            :mod:`neuronscope.act.rules`.
        seed: Seed of the fresh weights. The user's random numbers are not touched. In a distributed run, where every
            rank must call this with the same arguments, all ranks draw the same.

    Returns:
        What was done, and what was not.

    Raises:
        DetachedError: The scope was detached.
        UsageError: An argument is not what is expected, or the optimizer holds none of the model's weights.

    >>> import neuronscope as ns
    >>> model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    >>> _ = model[0].bias.data.copy_(torch.tensor([-100.0, 9.0, 9.0]))
    >>> optimizer, x = torch.optim.Adam(model.parameters()), torch.randn(500, 4)
    >>> scope = ns.watch(model)
    >>> before = model(x)
    >>> _ = scope.step()
    >>> print(revive(scope, optimizer))
    1 neuron was revived: 0/relu 1.
    >>> torch.equal(model(x), before), bool(model[0].bias[0] > -1)
    (True, True)
    >>> scope.detach()
    """
    if not isinstance(scope, Scope):
        raise UsageError(f"Expected argument `scope` to be a neuronscope.Scope, but got {type(scope).__name__}.")
    rule = as_rule(rule, scope.policy)
    every_optimizer(optimizer)  # raises before the window is closed
    return revive_in(scope, scope.close_window(acting=True), optimizer, rule, seed=seed)


def revive_in(scope: Scope, window: Census, optimizer: Optimizers, rule: Rule, *, seed: int = 0) -> Revival:
    """Do what :func:`revive` does, by a window that is closed. Every rank must call this, or none.

    Args:
        scope: The scope.
        window: The newest closed window of training.
        optimizer: The optimizer of the model's weights, or several.
        rule: The rule.
        seed: See :func:`revive`.
    """
    try:
        plans, left, held = _plans(scope, window, every_optimizer(optimizer), rule)
        fresh = _fresh_weights(plans, rule, seed=zlib.crc32(f"{seed} {scope.global_step}".encode()))
    except BaseException:
        scope.agrees(_DISAGREE)  # other ranks wait for the answer
        raise
    planned = repr([[(plan.name, plan.neurons) for plan in plans], _checksums(plans, fresh)])
    if not scope.agrees(1 + zlib.crc32(planned.encode()) % (_MOST - 1)):
        reason = "not every rank of this run would revive the same neurons now, by counts of all ranks"
        return Revival((), {**left, **{plan.name: reason for plan in plans}})
    _apply(plans, fresh, held)
    acts = tuple(
        Act(scope.global_step, plan.name, tuple(plan.neurons), repr(rule), window.first_step, window.last_step)
        for plan in plans
    )
    for act in acts:
        scope.note_act(act)
    return Revival(acts, left)


def _plans(
    scope: Scope, window: Census, optimizers: Sequence[Optimizer], rule: Rule
) -> tuple[list[_Intended], dict[str, str], _Held]:
    """Return what to do at each site, why not at others, and the optimizer of each weight."""
    model = scope.model
    if scope.detached or model is None:
        raise DetachedError("Expected a scope that is attached to a model for `revive()`, but this one was detached.")
    reshard(model)  # the optimizer holds the shards
    held = {
        weight: (optimizer, group)
        for optimizer in optimizers
        for group in optimizer.param_groups
        for weight in group["params"]
    }
    if not any(weight in held for weight in model.parameters()):
        raise UsageError(
            f"Expected an optimizer of the weights of {type(model).__name__}, but the given one holds none of them."
        )
    plans: list[_Intended] = []
    left: dict[str, str] = {}
    if window.last_step <= scope.act_record.last_window:
        return plans, left, held  # nothing was seen since the last act
    structure, closed = Structure(model), scope.closed_windows
    unknown = {optimizer: _unknown_state(optimizer) for optimizer in optimizers}
    homes = DistinctNeurons(list(window.values())).homes()  # a gate and its product are one neuron, judged there
    for (name, tally), home in zip(window.items(), homes, strict=True):
        if not tally.in_headlines or not tally.positions:
            continue
        found, before = structure.of(name, tally), scope.act_record.before(name, tally.neurons)
        activity = SiteActivity(
            name=name,
            window=tally,
            zero_outputs=closed[name].zero_outputs - tally.zero_outputs - before.zero_outputs,
            positions=closed[name].positions - tally.positions - before.positions,
            silent=_silent(
                window, tally, closed[name].last_active_step.clip(np.maximum(before.step, closed.first_step) - 1)
            ),
            age=scope.global_step - before.step,
            steps=scope.global_step,
            revived=scope.act_record.revived(name),
            structure=found,
            policy=scope.policy,
        )
        neurons = [int(neuron) for neuron in np.flatnonzero(rule.choose(activity) & home)]
        reason = neurons and (
            _unclear(activity)
            or next(filter(None, (_unheld(layer, held, unknown) for layer in found.layers.values())), "")
        )
        infinite = set(neurons) if reason else _infinite(found) if neurons else set()
        finite = [neuron for neuron in neurons if neuron not in infinite]
        if finite:
            plans.append(_Intended(name, finite, found))
        if reason or finite != neurons:
            left[name] = reason or "weights that read some of its neurons are not finite"
    return plans, left, held


def _silent(window: Census, tally: Tally, last: IntArray) -> FloatArray:
    """Return for how many examples each neuron of a site is silent since its ``last`` step, float64 ``(N,)``."""
    each_step = (tally.examples or tally.positions) / (window.last_step - window.first_step + 1)
    return (window.last_step - last).astype(np.float64) * each_step


def _infinite(found: SiteStructure) -> set[int]:
    """Return which neurons of a site are read by weights that are not finite, of those that this rank holds."""
    columns = {}
    for path in {each.layer for each in found.readers}:
        for part in found.layers[path].columns:
            finite = local_tensor(part.tensor).isfinite().movedim(part.dim, 0).flatten(1).all(1)
            first = local_range(part.tensor, part.dim).start
            columns[path] = {first + int(place) for place in (~finite).nonzero()}
    if not any(columns.values()):
        return set()
    return {
        neuron
        for neuron in range(found.neurons)
        if any(columns[layer.path].intersection(own) for layer, own in found.columns(neuron) if layer.columns)
    }


def _unclear(site: SiteActivity) -> str:
    """Return why nothing can be done to the neurons of a site; ``""`` if something can."""
    found, needed = site.structure, site.policy.min_examples
    if found.unknown:
        return found.unknown
    if 0 < site.window.examples < needed:
        return f"the window has {site.window.examples} examples, and the policy asks for {needed}"
    one_by_one = (each.layer for each in found.readers if found.layers[each.layer].one_by_one)
    return next((f"`{path}` reads it channel by channel" for path in one_by_one), "")


def _unheld(layer: LayerWeights, held: _Held, unknown: Mapping[Optimizer, str]) -> str:
    """Return why the optimizer's state of a layer's weights cannot be reset; ``""`` if it can."""
    for part in (*layer.rows, *layer.columns):
        if not isinstance(part.tensor, nn.Parameter):
            continue
        if not part.tensor.requires_grad:
            return f"`{layer.path}.{part.name}` is frozen"
        if part.tensor not in held:
            return f"the optimizer does not hold `{layer.path}.{part.name}`"
        if reason := unknown[held[part.tensor][0]]:
            return reason
    return ""


def _unknown_state(optimizer: Optimizer) -> str:
    """Return why it is not known with what the state of a fresh weight begins; ``""`` if it is."""
    kind = type(optimizer).__name__
    if any(isinstance(each, Optimizer) for each in vars(optimizer).values()):
        return f"{kind} wraps another optimizer"
    for weight, state in optimizer.state.items():
        for key, value in state.items():
            known = key in _MOMENTS and (value is None or value.shape == weight.shape)
            if isinstance(value, Tensor) and value.dim() and not known:
                return f"{kind} keeps `{key}`, of which it is not known with what a fresh weight begins"
    return ""


def _fresh_weights(plans: Sequence[_Intended], rule: Rule, *, seed: int) -> dict[str, dict[str, Tensor]]:
    """Return fresh tensors of each layer that leads into the neurons, by the layer's path and by name, on the CPU."""
    layers = _rows_of(plans)
    own = torch.Generator().manual_seed(seed)
    users = torch.default_generator.get_state()
    try:  # initialisers draw from the default generator and take no other
        torch.default_generator.set_state(own.get_state())
        fresh = {layer.path: _initialised(layer, rule) for layer, _ in layers}
        for layer, rows in layers:
            rule.refine(layer, fresh[layer.path], rows)
    finally:
        torch.default_generator.set_state(users)
    return fresh


def _rows_of(plans: Sequence[_Intended]) -> list[tuple[LayerWeights, list[int]]]:
    """Return each layer that leads into neurons to be revived, by name, with their rows."""
    found = [each for plan in plans for neuron in plan.neurons for each in plan.structure.rows(neuron)]
    return sorted(_by_layer([(layer, [row]) for layer, row in found]), key=lambda each: each[0].path)


def _checksums(plans: Sequence[_Intended], fresh: Mapping[str, Mapping[str, Tensor]]) -> list[int]:
    """Return a checksum of the bits of each fresh tensor's rows that will be used."""
    found = []
    for layer, rows in _rows_of(plans):
        for part in layer.rows:
            used = fresh[layer.path][part.name].index_select(part.dim, torch.tensor(rows)).contiguous()
            found.append(zlib.crc32(used.flatten().view(torch.uint8).numpy().tobytes()))
    return found


def _initialised(layer: LayerWeights, rule: Rule) -> dict[str, Tensor]:
    """Return the tensors of a copy of a layer on the CPU that its initialiser has filled."""
    module: Any = layer.module
    copy: Any = object.__new__(type(module))  # no hook of the layer's, and none of its numbers
    parameters = {
        name: each if each is None else nn.Parameter(torch.zeros(each.shape, dtype=each.dtype))
        for name, each in module._parameters.items()
    }
    buffers = {
        name: each if each is None else torch.zeros(each.shape, dtype=each.dtype)
        for name, each in module._buffers.items()
    }
    copy.__dict__.update({**vars(module), "_parameters": parameters, "_buffers": buffers})
    with torch.no_grad():
        if rule.init is not None:
            rule.init(copy)
        elif hasattr(copy, "reset_parameters"):
            copy.reset_parameters()
        elif type(module).__name__ == "Conv1D":  # of transformers, which does this in its constructor
            nn.init.normal_(copy.weight, std=0.02)
        else:
            raise UsageError(
                f"Expected layer `{layer.path}` to have `reset_parameters()`, but {type(module).__name__} has none: "
                "give the rule a function, `Dead(init=model._init_weights)`."
            )
    return {part.name: getattr(copy, part.name).detach() for part in layer.rows}


@torch.no_grad()
def _apply(plans: Sequence[_Intended], fresh: Mapping[str, Mapping[str, Tensor]], held: _Held) -> None:
    found = [(plan.structure, neuron) for plan in plans for neuron in plan.neurons]
    columns = [each for structure, neuron in found for each in structure.columns(neuron)]
    for layer, own in _rows_of(plans):
        for part in layer.rows:
            local, index = local_tensor(part.tensor), _places(part.tensor, part.dim, own)
            here = [local_range(part.tensor, dim) for dim in range(part.tensor.dim())]
            new = fresh[layer.path][part.name][tuple(slice(each.start, each.stop) for each in here)].to(local.device)
            local.index_copy_(part.dim, index, new.index_select(part.dim, index))
            _forget(part, own, held)
    for layer, own in _by_layer(columns):  # after all rows: of two layers in a row, a weight is in both
        for part in layer.columns:
            _fill(part.tensor, part.dim, own, 0.0)
            _forget(part, own, held)


def _by_layer(found: Sequence[tuple[LayerWeights, list[int]]]) -> list[tuple[LayerWeights, list[int]]]:
    """Return each layer once, with all of its rows or columns."""
    layers = {layer.path: layer for layer, _ in found}
    return [
        (layer, sorted({index for other, own in found if other.path == path for index in own}))
        for path, layer in layers.items()
    ]


def _places(tensor: Tensor, dim: int, index: Sequence[int]) -> Tensor:
    """Return where indices of a dimension lie in the part of a tensor that this rank holds; others are left out."""
    here = local_range(tensor, dim)
    places = [each - here.start for each in index if each in here]
    return torch.tensor(places, dtype=torch.int64, device=tensor.device)


def _fill(tensor: Tensor, dim: int, index: Sequence[int], value: float) -> None:
    """Set rows or columns to a value, in the part of a tensor that this rank holds."""
    local_tensor(tensor).index_fill_(dim, _places(tensor, dim, index), value)


def _forget(part: Part, index: Sequence[int], held: _Held) -> None:
    """Set the optimizer's moments and the gradient of rows or columns to those of fresh weights."""
    if part.tensor not in held:
        return
    optimizer, settings = held[part.tensor]
    for key, value in optimizer.state.get(part.tensor, {}).items():
        if key in _MOMENTS and value is not None:
            start = settings.get("initial_accumulator_value", 0.0) if key == "sum" else 0.0
            _fill(value, part.dim, index, start)
    if part.tensor.grad is not None:
        _fill(part.tensor.grad, part.dim, index, 0.0)
