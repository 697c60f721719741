"""Function transforms and gradients in batches: such calls are not measured, said so, and all else goes on."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, linearize, stack_module_state, vjp, vmap
from torch.utils.checkpoint import checkpoint

import neuronscope as ns
from tests.agreement.slow_twin import assert_bits, state_of


class Net(nn.Module):
    """An activation module, a functional activation, and a gated product."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.act = nn.Linear(4, 6), nn.ReLU()
        self.gate, self.up, self.out = nn.Linear(6, 5), nn.Linear(6, 5), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.first(x))
        return self.out(F.silu(self.gate(x)) * self.up(x))


def per_sample_gradients(net: Net, x: Tensor) -> Tensor:
    def loss(parameters: dict[str, Tensor], row: Tensor) -> Tensor:
        return functional_call(net, parameters, (row[None],)).sum()

    return vmap(grad(loss), (None, 0))(dict(net.named_parameters()), x)["first.weight"]


def ensemble(net: Net, x: Tensor) -> Tensor:
    parameters, buffers = stack_module_state([net, copy.deepcopy(net)])
    return vmap(lambda p, b: functional_call(net, (p, b), (x,)))(parameters, buffers)


def batched_gradients(net: Net, x: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    return torch.autograd.grad(net(x).sum(0), x, torch.eye(2), is_grads_batched=True)[0]


def batched_through_a_checkpoint(net: Net, x: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    output = checkpoint(net, x, use_reentrant=False).sum(0)
    return torch.autograd.grad(output, x, torch.eye(2), is_grads_batched=True)[0]


def vmapped_gradients(net: Net, x: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    output = net(x).sum(0)
    return vmap(lambda v: torch.autograd.grad(output, x, v, retain_graph=True)[0])(torch.eye(2))


TRANSFORMED: dict[str, Callable[[Net, Tensor], Tensor]] = {
    "per-sample gradients": per_sample_gradients,
    "ensemble": ensemble,
    "grad": lambda net, x: grad(lambda y: net(y).sum())(x),
    "vjp": lambda net, x: vjp(net, x)[1](torch.ones(3, 2))[0],
    "jvp": lambda net, x: jvp(net, (x,), (x,))[1],
    "jacrev": lambda net, x: jacrev(net)(x),
    "jacfwd": lambda net, x: jacfwd(net)(x),
    "hessian": lambda net, x: hessian(lambda y: net(y).sum())(x),
}
BATCHED: dict[str, Callable[[Net, Tensor], Tensor]] = {
    "is_grads_batched": batched_gradients,
    "is_grads_batched, checkpoint": batched_through_a_checkpoint,
    "vmap of a backward pass": vmapped_gradients,
    "jacobian": lambda net, x: torch.autograd.functional.jacobian(net, x, vectorize=True),
}
SITES = {"first/relu", "gate/silu", "gate/swiglu"}


def run(measure: Callable[[Net, Tensor], Tensor], watched: bool) -> tuple[Net, list[Tensor], ns.Scope | None]:
    """Five training steps, each of them with the transform besides; the scope is left."""
    torch.manual_seed(0)
    net = Net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    scope = ns.watch(net) if watched else None
    given = []
    for _ in range(5):
        x = torch.randn(3, 4)
        net(x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        given.append(measure(net, x).detach())
        if scope is not None:
            assert torch.overrides._len_torch_function_stack() == 0
            scope.step()
    if scope is not None:
        assert not scope.detached
        scope.detach()
    return net, given, scope


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # torch's own, in its forward derivatives
@pytest.mark.parametrize("name", [*TRANSFORMED, *BATCHED])
def test_a_function_transform_gives_the_same_result_and_counting_goes_on(name: str) -> None:
    measure = {**TRANSFORMED, **BATCHED}[name]
    plain, expected, _ = run(measure, watched=False)
    net, given, scope = run(measure, watched=True)
    assert scope is not None
    assert_bits(state_of(plain), state_of(net))
    assert all(torch.equal(*pair) for pair in zip(given, expected, strict=True))
    census, missing = scope.census(), {item.name: item.reason for item in scope.report().not_measured}
    assert set(census) == SITES
    # 5 steps of 3 rows; where gradients are batched, the outputs that they are of are ordinary ones.
    outputs = 30 if name in BATCHED else 15
    assert {(tally.positions, tally.gradient_positions) for tally in census.values()} == {(outputs, 15)}
    # A layer's units are not followed through a transform, so that what ran there bears the name of its place.
    assert set(missing) == ({"first/relu", "gate/silu"} if name in BATCHED else {"act", "silu()"})
    words = "its gradients came in batches" if name in BATCHED else "it ran inside a function transform"
    assert all(reason.startswith(words) for reason in missing.values())


class Critics(nn.Module):
    """A plain layer, then some work of ``inside`` under ``vmap``, then a plain activation and another layer."""

    def __init__(self, inside: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.body, self.inside = nn.Sequential(nn.Linear(4, 6), nn.SiLU()), inside
        self.weights, self.head = nn.Parameter(torch.randn(3, 6, 6)), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        each = torch.vmap(self.inside, (0, None))(self.weights, self.body(x))
        return torch.tanh(self.head(torch.tanh(each.sum(0))))


@pytest.mark.parametrize(
    ("inside", "missing"),
    [
        (lambda w, h: F.relu(h @ w), {"relu()"}),
        (lambda w, h: F.relu(F.relu(h @ w) @ w), {"relu()"}),
        (lambda w, h: h * (h @ w), {"body.0/swiglu"}),
        (lambda w, h: grad(lambda g: F.gelu(g @ w).sum())(h), {"gelu()"}),
    ],
    ids=["one call", "two calls", "gated product", "gradient within"],
)
def test_vmap_inside_a_forward_is_not_counted_and_does_no_harm(
    inside: Callable[[Tensor, Tensor], Tensor], missing: set[str]
) -> None:
    net = Critics(inside)
    with ns.watch(net) as scope:
        for _ in range(40):
            net(torch.randn(7, 4)).sum().backward()
            scope.step()
        assert not scope.detached
    assert {name: tally.positions for name, tally in scope.census().items()} == {"body.0/silu": 280, "head/tanh": 280}
    # Which units the first `tanh` is given is not known either: they come out of the transform.
    assert {item.name for item in scope.report().not_measured} == {*missing, "tanh()"}


@pytest.mark.parametrize(
    "inside",
    [
        lambda weights, h: torch.vmap(lambda w: torch.tanh(h @ w))(weights),
        lambda weights, h: torch.vmap(lambda row: F.relu(row @ weights[0]))(h),
        lambda weights, h: torch.vmap(lambda row: row @ weights[0])(h),
        lambda weights, h: torch.func.jacrev(lambda g: torch.tanh(g @ weights[0]).sum(0))(h),
    ],
    ids=["each matrix", "each row", "each row, no activation", "jacobian"],
)
def test_a_layer_whose_units_go_into_a_transform_alone_does_not_give_outputs(
    inside: Callable[[Tensor, Tensor], Tensor],
) -> None:
    """What is an output of the network is left out of totals; a hidden layer is not."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.weights = nn.Linear(4, 6), nn.Parameter(torch.randn(3, 6, 6))

        def forward(self, x: Tensor) -> Tensor:
            return inside(self.weights, F.relu(self.body(x)))

    net = Net()
    with ns.watch(net) as scope:
        for _ in range(3):
            net(torch.randn(7, 4)).sum().backward()
            scope.step()
    report = scope.report()
    assert (report.neurons, scope.census()["body/relu"].positions) == (6, 21)
    assert {item.name for item in report.not_measured} <= {"relu()", "tanh()"}


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [False, True])
def test_vmap_inside_a_compiled_forward_does_no_harm(dynamic: bool) -> None:
    torch._dynamo.reset()
    outputs = []
    for watched in (False, True):
        torch.manual_seed(0)
        net = Critics(lambda w, h: F.relu(h @ w))
        run = torch.compile(net, backend="aot_eager", fullgraph=True, dynamic=dynamic)
        scope = ns.watch(net) if watched else None
        for _ in range(3):
            outputs.append(run(torch.randn(7, 4)))
            outputs[-1].sum().backward()
            if scope is not None:
                scope.step()
    assert all(torch.equal(*pair) for pair in zip(outputs[:3], outputs[3:], strict=True))
    assert scope is not None
    assert {name: tally.positions for name, tally in scope.census().items()} == {"body.0/silu": 21, "head/tanh": 21}
    assert {item.name for item in scope.report().not_measured} == {"relu()", "tanh()"}
    scope.detach()


def test_a_call_after_a_call_in_a_transform_is_counted_under_its_plain_name() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.act = nn.Linear(4, 4), nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            return self.act(self.fc(vmap(self.act)(self.fc(x))))

    net = Net()
    with ns.watch(net) as scope:
        net(torch.ones(2, 4))
        scope.step()
    assert list(scope.census()) == ["fc/relu"]
    assert scope.census()["fc/relu"].positions == 2
    assert [item.name for item in scope.report().not_measured] == ["act"]


def test_a_model_that_runs_in_transforms_alone_is_not_said_never_to_have_run() -> None:
    net = Net()
    with ns.watch(net) as scope, pytest.warns(ns.NeuronscopeWarning, match="nothing is measured so far"):
        ensemble(net, torch.ones(3, 4))
        scope.step()
    report = scope.report()
    assert [item.name for item in report.not_measured] == ["act", "silu()"]
    assert all("function transform" in item.reason for item in report.not_measured)
    assert report.notes[0] == "Nothing was observed: no activation was measured in this phase."


class Linearised(Net):
    """A network that records the graph of a part of itself in each forward."""

    def forward(self, x: Tensor) -> Tensor:
        slope = linearize(lambda y: F.gelu(self.gate(y)), self.first(x))[1](torch.ones(len(x), 6))
        return super().forward(x) + slope.mean()


@pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr Node:UserWarning")  # torch's own
def test_a_graph_that_is_recorded_inside_a_forward_ends_no_watch() -> None:
    torch.manual_seed(0)
    model = Linearised()
    with ns.watch(model) as scope:
        for _ in range(100):
            model(torch.randn(4, 4)).sum().backward()
            scope.step()
        assert not scope.detached
    assert scope.census()["first/relu"].positions == 400
    assert "function transform" in next(each.reason for each in scope.report().not_measured if each.name == "gelu()")


@pytest.mark.parametrize("kind", ["vmap", "fake"])
def test_tokens_without_numbers_end_no_watch(kind: str) -> None:
    """Whether a text goes on with the last one is asked of tokens that can be read."""
    model = nn.Sequential(nn.Embedding(9, 4), nn.Flatten(), nn.Linear(12, 5), nn.ReLU())
    tokens = torch.randint(9, (2, 4, 3))
    with ns.watch(model) as scope, scope.phase("val"), torch.no_grad():
        for _ in range(3):
            if kind == "vmap":
                vmap(model)(tokens)
            else:
                with FakeTensorMode(allow_non_fake_inputs=True) as mode:
                    model(mode.from_tensor(tokens[0]))
        model(tokens[0])
    assert scope.report("val").fault == ""
    assert scope.census("val")["2/relu"].positions == 4
