"""A call that repeats the last forward's is compared, and not followed anew: what is counted must be the same.

Each network here runs equal steps, and then does something else. It is run twice, with the comparison and without.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import neuronscope as ns
from neuronscope.attach.neuron_flow import NeuronFlow

#: Equal steps before the change, and steps in all.
EQUAL, STEPS = 4, 8


class Net(nn.Module):
    """Layers of one width, run as a function of the network, the input and the step says.

    Args:
        run: The forward.
    """

    def __init__(self, run: Callable[[Net, Tensor, bool], Tensor]) -> None:
        super().__init__()
        self.one, self.two, self.three = (nn.Linear(6, 6) for _ in range(3))
        self.norm, self.act, self.gelu = nn.LayerNorm(6), nn.ReLU(), nn.GELU()
        self.register_buffer("kept", torch.linspace(-1, 1, 6))
        self._run, self.changed = run, False

    def forward(self, x: Tensor) -> Tensor:
        return self._run(self, x, self.changed)


def swapped(net: Net, x: Tensor, changed: bool) -> Tensor:
    first, second = (net.two, net.one) if changed else (net.one, net.two)
    return net.act(second(net.act(first(x))))


def dropped(net: Net, x: Tensor, changed: bool) -> Tensor:
    h = net.act(net.one(x))
    if not changed:
        h = h + net.act(net.two(h))
    return h + net.act(net.three(h))


def left_early(net: Net, x: Tensor, changed: bool) -> Tensor:
    h = net.act(net.one(x))
    return h if changed else net.act(net.two(h))


def another_function(net: Net, x: Tensor, changed: bool) -> Tensor:
    h = net.one(x)
    h = h.transpose(0, 1).contiguous().transpose(0, 1) if changed else h.transpose(0, 1).transpose(0, 1)
    return F.relu(net.two(torch.tanh(h) if changed else F.relu(h)))


def another_dimension(net: Net, x: Tensor, changed: bool) -> Tensor:
    """The same shapes, but rows and units change places."""
    h = net.one(x[:6]).unsqueeze(0)
    h = h.permute(0, 2, 1) if changed else h.permute(0, 1, 2)
    return F.relu(h.reshape(6, 6)).sum(1, keepdim=changed)


def another_operand(net: Net, x: Tensor, changed: bool) -> Tensor:
    a, b = net.one(x), net.two(x)
    return F.relu((b if changed else a).mul(2.0) + 0 * b.detach())


def another_order(net: Net, x: Tensor, changed: bool) -> Tensor:
    if changed:
        b = F.relu(net.two(x))
        a = F.relu(net.one(x))
    else:
        a, b = F.relu(net.one(x)), F.relu(net.two(x))
    return net.three(torch.cat([a, b])).relu()


def in_place(net: Net, x: Tensor, changed: bool) -> Tensor:
    h = net.one(x)
    h = h.add_(1) if changed else h.add(1)
    return (F.relu_(h) if changed else F.relu(h)) + 0 * net.two(x)


def a_gate(net: Net, x: Tensor, changed: bool) -> Tensor:
    gate, up = F.silu(net.one(x)), net.two(x)
    return net.three(gate * (gate.detach() if changed else up))


def other_settings(net: Net, x: Tensor, changed: bool) -> Tensor:
    """Sizes so large that their integers are new objects in each forward."""
    rows = 50 * x.shape[0]
    h = net.one(x.repeat(50, 1))
    return F.relu(h.view(rows // 2, 2, 6) if changed else h.view(rows, 6))


def by_name(net: Net, x: Tensor, changed: bool) -> Tensor:
    h = F.layer_norm(net.one(x), (6,), weight=net.norm.weight, bias=None if changed else net.norm.bias)
    return F.relu(torch.unsqueeze(input=h, dim=1 if changed else 0))


def other_types(net: Net, x: Tensor, changed: bool) -> Tensor:
    h = net.one(x)
    return F.relu(h.double() if changed else h).float() + net.two(x).relu()


def an_overwritten_buffer(net: Net, x: Tensor, changed: bool) -> Tensor:
    h = net.one(x)
    if changed:
        net.kept.copy_(h.detach()[0])
    return F.relu(F.linear(h, net.two.weight, net.kept))


def recomputed(net: Net, x: Tensor, changed: bool) -> Tensor:
    def part(x: Tensor) -> Tensor:
        return net.act(net.two(net.act(net.one(x))))

    return checkpoint(part, x, use_reentrant=False) if changed else part(x)


def recomputed_reentrant(net: Net, x: Tensor, changed: bool) -> Tensor:
    def part(x: Tensor) -> Tensor:
        return net.act(net.two(net.act(net.one(x))))

    x = x.clone().requires_grad_()
    return checkpoint(part, x, use_reentrant=True) if changed else part(x)


def without_gradients(net: Net, x: Tensor, changed: bool) -> Tensor:
    with torch.set_grad_enabled(not changed):
        h = net.act(net.one(x))
    return net.act(net.two(h))


def exchanged_weights(net: Net, x: Tensor, changed: bool) -> Tensor:
    weights = {"weight": net.three.weight if changed else net.one.weight, "bias": net.one.bias}
    return net.act(torch.func.functional_call(net.two, weights, (x,)))


def mapped(net: Net, x: Tensor, changed: bool) -> Tensor:
    h = net.one(x)
    return net.two(torch.vmap(F.relu)(h) if changed else F.relu(h)).relu()


def through_a_subclass(net: Net, x: Tensor, changed: bool) -> Tensor:
    class Marked(Tensor):
        pass

    h = net.one(x)
    return net.act(h.as_subclass(Marked) if changed else h).as_subclass(Tensor) + net.two(x).relu()


def another_constant(net: Net, x: Tensor, changed: bool) -> Tensor:
    """It is added to all units alike, or to each its own."""
    h = net.act(net.one(x)) + torch.ones(6 if changed else 1)
    return net.act(net.two(h))


def a_buffer_that_nothing_else_shows(net: Net, x: Tensor, changed: bool) -> Tensor:
    """The calls are the same, but for the one that writes into the bias of the last."""
    seen = F.relu(net.one(x)).detach()[0]
    if changed:
        net.kept[:] = seen
    return F.relu(F.linear(x, net.two.weight, net.kept))


def an_earlier_call(net: Net, x: Tensor, changed: bool) -> Tensor:
    before = F.relu(net.three(x)) if changed else 0
    return before + F.relu(net.one(-x))


def a_gate_in_place(net: Net, x: Tensor, changed: bool) -> Tensor:
    gate = F.silu(net.one(x))
    return net.three(gate.mul_(net.two(-x if changed else x)))


def other_names(net: Net, x: Tensor, changed: bool) -> Tensor:
    h = net.one(x[:6].repeat(6, 1)).view(6, 6, 6)
    h = torch.movedim(h, destination=0, source=2) if changed else torch.movedim(h, source=0, destination=2)
    return F.relu(h)


def chosen_rows(net: Net, x: Tensor, changed: bool) -> Tensor:
    h = net.one(x)
    return F.relu(h[(x[:, 0] < (2 if changed else 0))].reshape(1, -1, 6))


def another_loop(net: Net, x: Tensor, changed: bool) -> Tensor:
    h = x
    for _ in range(3 if changed else 2):
        h = net.act(net.one(h))
    return h


FORWARDS = [
    *(swapped, dropped, left_early, another_function, another_dimension, another_operand, another_order, in_place),
    *(a_gate, other_settings, by_name, other_types, an_overwritten_buffer, recomputed, recomputed_reentrant),
    *(without_gradients, exchanged_weights, mapped, through_a_subclass, another_loop, another_constant),
    *(a_buffer_that_nothing_else_shows, an_earlier_call, a_gate_in_place, other_names, chosen_rows),
]


def plainly(net: Net) -> Tensor:
    return net(torch.linspace(-30, 30, 72).view(12, 6).sin())


def hooked(net: Net) -> Tensor:
    """A hook of the user's changes what a layer gives."""
    if net.changed and not net.one._forward_hooks:
        net.one.register_forward_hook(lambda module, args, output: output.flip(0) - 0.5)
    return plainly(net)


def evaluated(net: Net) -> Tensor:
    net.train(not net.changed)
    return plainly(net)


def cast(net: Net) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16, enabled=net.changed):
        return plainly(net).float()


def replaced(net: Net) -> Tensor:
    """A layer's weight is another parameter from now on, and the old one is gone."""
    if net.changed:
        net.one.weight = nn.Parameter(net.one.weight.detach().flip(0))
    return plainly(net)


def failed(net: Net) -> Tensor:
    """A forward fails half-way, and the next one runs as before."""
    if net.changed:
        handle = net.two.register_forward_pre_hook(lambda module, args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            plainly(net)
        handle.remove()
    return plainly(net)


def interrupted(net: Net) -> Tensor:
    """Python is interrupted half-way, and what it was given is used outside of the model."""
    kept: list[Tensor] = []

    def stop(module: nn.Module, args: tuple[Any, ...]) -> None:
        kept.append(args[0])
        raise KeyboardInterrupt

    if net.changed:
        handle = net.two.register_forward_pre_hook(stop)
        with pytest.raises(KeyboardInterrupt):
            plainly(net)
        handle.remove()
        F.relu(F.linear(kept[0], net.two.weight, net.two.bias))
    return plainly(net)


def beside_another_thread(net: Net) -> Tensor:
    if net.changed:
        thread = threading.Thread(target=lambda: plainly(net))
        thread.start()
        thread.join()
    return plainly(net)


def larger(net: Net) -> Tensor:
    return net(torch.ones(24 if net.changed else 12, 6))


CALLS = [hooked, evaluated, cast, replaced, failed, interrupted, beside_another_thread, larger]


def found(net: Net, call: Callable[[Net], Tensor]) -> dict[str, Any]:
    """What a watch of some steps finds out, and the gradients of the last one."""
    facts: dict[str, Any] = {}
    with ns.watch(net) as scope:
        for step in range(STEPS):
            net.changed = step in (EQUAL, EQUAL + 2)
            net.zero_grad()
            call(net).sum().backward()
            scope.step()
    for phase in ("train", "inference"):
        for name, tally in scope.census(phase).items():
            integers = tally.zero_outputs, tally.zero_gradients, tally.last_active_step
            about = tally.info, tally.not_finite
            numbers = tally.positions, tally.gradient_positions, tally.examples
            facts[f"{phase} {name}"] = [each.tolist() for each in integers], about, numbers
    report = scope.report()
    facts["not measured"] = [(each.name, each.reason) for each in report.not_measured]
    facts["gradients"] = {name: each.grad.tolist() for name, each in net.named_parameters() if each.grad is not None}
    return facts


def compare(net: Net, call: Callable[[Net], Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    again = copy.deepcopy(net)
    repeats, of_all = NeuronFlow.repeats, []

    def noted(flow: NeuronFlow, *given: Any) -> bool:
        of_all.append(repeats(flow, *given))
        return of_all[-1]

    with monkeypatch.context() as patch:
        patch.setattr(NeuronFlow, "repeats", noted)
        with_it = found(net, call)
    with monkeypatch.context() as patch:
        patch.setattr(NeuronFlow, "repeats", lambda *_: False)
        without = found(again, call)
    assert any(of_all)
    assert not all(of_all)
    assert any(name.startswith("train") for name in without)
    assert with_it == without


@pytest.mark.parametrize("run", FORWARDS, ids=lambda run: run.__name__)
def test_a_forward_that_changes_after_equal_ones(run: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch):
    torch.manual_seed(0)
    compare(Net(run), plainly, monkeypatch)


@pytest.mark.parametrize("call", CALLS, ids=lambda call: call.__name__)
def test_a_forward_around_which_something_changes(call: Callable[[Net], Tensor], monkeypatch: pytest.MonkeyPatch):
    torch.manual_seed(0)

    def run(net: Net, x: Tensor, changed: bool) -> Tensor:
        return net.norm(net.act(net.two(net.act(net.one(x))) + x)) + F.gelu(net.three(x))

    compare(Net(run), call, monkeypatch)


class Layer(nn.Module):
    """A transformer's layer."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2, self.act = nn.LayerNorm(8), nn.LayerNorm(8), nn.GELU()
        self.qkv, self.out, self.up, self.down = nn.Linear(8, 24), nn.Linear(8, 8), nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).view(2, 5, 3, 2, 4).permute(2, 0, 3, 1, 4).unbind()
        h = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(2, 5, 8)
        x = x + self.out(h)
        return x + self.down(self.act(self.up(self.norm2(x))))


class Residual(nn.Module):
    """A block of a residual network."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.act = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.norm(self.conv(x)) + x)


#: Networks, their input, and how many calls of a forward are followed still: those of several outputs.
STEADY: Mapping[str, tuple[Callable[[], nn.Module], tuple[int, ...], int]] = {
    "MLP": (lambda: nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)), (3, 8), 0),
    "residual network": (lambda: nn.Sequential(Residual(), Residual()), (2, 3, 4, 4), 0),
    "transformer": (lambda: nn.Sequential(Layer(), Layer()), (2, 5, 8), 2),
}


@pytest.mark.parametrize(("build", "shape", "followed"), STEADY.values(), ids=STEADY)
def test_no_call_of_a_forward_that_repeats_is_looked_up(
    build: Callable[[], nn.Module], shape: tuple[int, ...], followed: int, monkeypatch: pytest.MonkeyPatch
):
    net, x, calls = build(), torch.randn(shape), []
    follow = NeuronFlow.follow

    def noted(flow: NeuronFlow, function: Any, *given: Any) -> None:
        calls.append(function)
        follow(flow, function, *given)

    monkeypatch.setattr(NeuronFlow, "follow", noted)
    with ns.watch(net) as scope:
        for _ in range(4):
            calls.clear()
            net(x).sum().backward()
            scope.step()
    assert len(calls) == followed, calls
