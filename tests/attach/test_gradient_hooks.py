"""A hook on a pre-activation is put there by hand, to save a handle: it must be as one that torch registered."""

from __future__ import annotations

import gc
import pickle
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import neuronscope as ns
from neuronscope.attach.gradient_hooks import GradientHook, register


class Noting(GradientHook):
    """Keeps what comes."""

    def __init__(self) -> None:
        super().__init__(None, ("relu", ""), None)  # type: ignore[arg-type]
        self.seen: list[Tensor | None] = []

    def __call__(self, gradient: Tensor | None) -> None:
        self.seen.append(None if gradient is None else gradient.clone())


def leaf() -> Tensor:
    return torch.tensor([[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]], requires_grad=True)


INPUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "of an operation": lambda w: w * 2,
    "a view": lambda w: (w * 2).t(),
    "a leaf": lambda w: w,
    "the first of two outputs": lambda w: (w * 2).sort(dim=1)[0],
    "the second of two outputs": lambda w: torch.var_mean(w * 2, dim=1)[1],
    "changed in place": lambda w: (w * 2).mul_(3),
}
USES: dict[str, Callable[[Tensor], Tensor]] = {
    "once": lambda x: (x * x).sum(),
    "twice": lambda x: (x * x).sum() + x.exp().sum(),
    "in place": lambda x: (x if not x.is_leaf else x * 1).relu_().square().sum(),
    "not at all": lambda x: torch.zeros((), requires_grad=True) * 1,
}


@pytest.mark.parametrize("use", USES.values(), ids=USES)
@pytest.mark.parametrize("make", INPUTS.values(), ids=INPUTS)
def test_our_gradient_hook_receives_what_a_registered_hook_receives(
    make: Callable[[Tensor], Tensor], use: Callable[[Tensor], Tensor]
):
    told = []
    for put in (lambda x, hook: x.register_hook(hook), register):
        w, hook = leaf(), Noting()
        x = make(w)
        put(x, hook)
        use(x).backward()
        told.append((hook.seen, w.grad))
    (expected, grad), (seen, same) = told
    assert len(seen) == len(expected)
    assert all(torch.equal(one, two) for one, two in zip(seen, expected, strict=True))
    assert (grad is None and same is None) or torch.equal(grad, same)


class Net(nn.Module):
    """A view whose base is changed in place before it is activated."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.act = nn.Linear(4, 8), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.fc(x)
        view = hidden[:, :4]
        hidden.mul_(2)
        return self.act(view)


def test_gradients_of_a_view_whose_base_was_changed_in_place_are_counted():
    """Torch 2.13's own ``register_hook`` ends the process here."""
    model, x = Net(), torch.randn(3, 4)
    with ns.watch(model) as scope:
        model(x).sum().backward()
        scope.step()
    tally = scope.census()["fc(0:4)/relu"]
    zero = model.fc(x)[:, :4] * 2 <= 0
    assert tally.zero_gradients.tolist() == tally.zero_outputs.tolist() == zero.sum(0).tolist()
    assert tally.gradient_positions == 3


@pytest.mark.parametrize("put", [lambda x, hook: x.register_hook(hook), register], ids=["torch's", "ours"])
def test_our_gradient_hook_receives_second_and_partial_derivatives(put):
    w, hook = leaf(), Noting()
    x = w * 2
    put(x, hook)
    (first,) = torch.autograd.grad(x.pow(3).sum(), w, create_graph=True)  # 3 x^2 at x; 24 w^2 at w
    first.sum().backward()  # through x again: 6 x * 2
    assert [torch.equal(a, b) for a, b in zip(hook.seen, (3 * x**2, 12 * x), strict=True)] == [True, True]
    assert torch.equal(w.grad, 48 * w)


def test_other_hooks_on_the_tensor_run_and_their_handles_do_not_remove_ours():
    order: list[str] = []

    class Ordered(Noting):
        def __call__(self, gradient: Tensor | None) -> None:
            order.append("ours")

    x = leaf() * 2
    register(x, Ordered())
    gone = x.register_hook(lambda _: order.append("gone"))
    x.register_hook(lambda _: order.append("after"))
    gone.remove()
    x.sum().backward()
    assert order == ["ours", "after"]
    order.clear()
    x = leaf() * 2
    first = x.register_hook(lambda _: order.append("first"))
    register(x, Ordered())
    x.sum().backward(retain_graph=True)
    first.remove()
    x.sum().backward()
    assert order == ["first", "ours", "ours"]


def test_two_of_our_gradient_hooks_on_one_tensor_both_run():
    x, one, two = leaf() * 2, Noting(), Noting()
    register(x, one)
    register(x, two)
    x.sum().backward()
    assert len(one.seen) == len(two.seen) == 1


def test_other_hooks_may_keep_and_change_the_gradient():
    x, hook = leaf() * 2, Noting()
    register(x, hook)
    x.retain_grad()
    x.register_hook(lambda gradient: gradient * 10)
    (x * 3).sum().backward()
    assert torch.equal(hook.seen[0], torch.full((2, 3), 3.0))
    assert torch.equal(x.grad, torch.full((2, 3), 30.0))


def test_a_hook_on_a_leaf_is_removed_by_its_handle():
    w, hook = leaf(), Noting()
    handle = register(w, hook)
    assert handle is not None
    handle.remove()
    w.sum().backward()
    assert not hook.seen
    assert register(leaf() * 2, hook) is None


def test_a_tensor_with_our_hook_is_pickled_without_the_hook_and_without_a_warning():
    x = leaf() * 2
    register(x, Noting())
    restored = pickle.loads(pickle.dumps(x))
    assert torch.equal(restored, x)
    torch.utils.hooks.warn_if_has_hooks(x)  # warnings are errors here


def test_our_gradient_hook_is_freed_with_its_tensor():
    x, hook = leaf() * 2, Noting()
    dead = weakref.ref(hook)
    register(x, hook)
    del x, hook
    gc.collect()
    assert dead() is None
