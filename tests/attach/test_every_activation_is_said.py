"""Whatever an activation is applied to behind a layer: it is counted, or its place is said, with a reason. A law.

Each program calls one activation function, at one place, on something that was computed with weights. Then exactly one
of these holds: a site counts it; :meth:`neuronscope.scope.Scope.not_neurons` says why it has no neurons; the report
lists it, or the layer before it, as not measured. So "no dead neuron" is never said of neurons that nobody saw.
"""

from __future__ import annotations

from collections.abc import Callable

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, event, given, settings
from torch import Tensor, nn

import neuronscope as ns
from neuronscope.attach import neuron_flow, unmeasured

#: Where no activation is counted, a warning says that too.
pytestmark = [
    pytest.mark.filterwarnings("ignore:No activation of"),
    pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor"),  # torch deprecates it
]

BATCH, WIDTH = 6, 8
COUNTED, NO_NEURON, LISTED = "counted", "no neuron", "listed"


class Net(nn.Module):
    """Layers for a program: plain ones, one that makes weights, tables whose rows data picks, and a head."""

    def __init__(self, program: Callable[[Net, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.program = program
        self.first, self.route = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 32)
        self.maker = nn.Linear(WIDTH, 2 * WIDTH * WIDTH)
        self.kernels = nn.Linear(WIDTH, 4 * 3 * 3)
        self.down, self.up = nn.Embedding(32, WIDTH), nn.Embedding(32, WIDTH)
        self.rows_down, self.rows_up = (nn.Parameter(torch.randn(32, WIDTH)) for _ in range(2))
        self.head = nn.LazyLinear(3)
        self.head_reads = True
        self.loss: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        y = self.program(self, x)
        return self.head(y.flatten(1)) if self.head_reads else y

    def made(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return two matrices for each example."""
        return self.maker(x).view(-1, 2, WIDTH, WIDTH).unbind(1)

    def hidden_maps(self, x: Tensor) -> Tensor:
        """Return what kernels that were made for each example give for its image."""
        image = x[:, None, None].expand(-1, 1, 5, WIDTH)
        return F.conv2d(image.reshape(1, len(x), 5, WIDTH), self.kernels(x).view(-1, 1, 3, 3), groups=len(x))

    def queries(self, x: Tensor) -> Tensor:
        """Return the units of a layer at four positions."""
        return self.first(x[:, None] * torch.arange(1.0, 5.0)[:, None])


def picked(net: Net, x: Tensor) -> Tensor:
    return net.route(x).topk(4, -1).indices


def returned(net: Net, y: Tensor) -> Tensor:
    """Return what no layer reads."""
    net.head_reads = False
    return y


def with_loss(net: Net, h: Tensor, loss: Tensor) -> Tensor:
    net.loss = loss
    return h


def hyper_network(net: Net, x: Tensor) -> Tensor:
    one, two = net.made(x)
    return returned(net, torch.bmm(F.relu(torch.bmm(x[:, None], one)), two)[:, 0])


def second_in_sums(net: Net, x: Tensor) -> Tensor:
    one, two = net.made(x)
    h = F.relu(torch.bmm(x[:, None], one))
    return returned(net, (h * two.mT).sum(-1))


def scaled(net: Net, x: Tensor) -> Tensor:
    """Return a matrix for each example, of which a layer scales the rows."""
    return net.first(x)[:, :, None] * net.rows_up[:WIDTH]


def winner(net: Net, x: Tensor) -> Tensor:
    h = net.first(x)
    largest, index = h.max(-1, keepdim=True)
    return torch.zeros_like(h).scatter(-1, index, F.relu(largest))


def selected(net: Net, x: Tensor) -> Tensor:
    h, mask = net.first(x), x > 0
    return torch.zeros_like(h).masked_scatter(mask, F.relu(h.masked_select(mask)))


def single_numbers(net: Net, x: Tensor) -> Tensor:
    return torch.stack([torch.stack([F.relu(each) for each in row]) for row in net.first(x)])


def gated_by_a_score(net: Net, x: Tensor) -> Tensor:
    h = net.first(x)
    return h * F.relu((h * h).sum(-1, keepdim=True))


def threshold(net: Net, x: Tensor) -> Tensor:
    h = net.first(x)
    return h - F.relu(h.mean(-1, keepdim=True))


def attention(net: Net, x: Tensor, values: Callable[[Tensor], Tensor] = lambda v: v) -> Tensor:
    q = net.queries(x)
    return F.relu(q @ q.mT) @ values(q)


def attention_in_sums(net: Net, x: Tensor) -> Tensor:
    q = net.queries(x)
    return (F.relu(q @ q.mT)[..., None] * q[:, None]).sum(2)


def graph_attention(net: Net, x: Tensor) -> Tensor:
    h = net.first(x)
    return F.relu(h.sum(-1)[:, None] + h.sum(-1)).softmax(-1) @ h


def hinge(net: Net, x: Tensor) -> Tensor:
    h = net.first(x)
    return with_loss(net, h, F.relu(1 - (h * h).sum(-1)).mean())


def with_values_of(h: Tensor) -> Tensor:
    other = torch.empty(h.shape, requires_grad=True)
    other.data = h
    return other


def beside(net: Net, x: Tensor) -> Tensor:
    h = net.first(x)
    return h + F.relu(torch.tensor(h.detach().numpy()))


def experts(down: Callable[[Net, Tensor], Tensor], up: Callable[[Net, Tensor], Tensor]) -> Callable[..., Tensor]:
    def program(net: Net, x: Tensor) -> Tensor:
        index = picked(net, x)
        return torch.einsum("bk,bkd->bd", F.relu(torch.einsum("bd,bkd->bk", x, down(net, index))), up(net, index))

    return program


def experts_in_sums(net: Net, x: Tensor) -> Tensor:
    index = picked(net, x)
    return (F.relu((x[:, None] * net.down(index)).sum(-1, keepdim=True)) * net.up(index)).sum(1)


def experts_by_index_select(net: Net, x: Tensor) -> Tensor:
    index = picked(net, x)
    rows = net.rows_down.index_select(0, index.flatten()).view(*index.shape, -1)
    return (F.relu((x[:, None] * rows).sum(-1, keepdim=True)) * net.up(index)).sum(1)


PROGRAMS: dict[str, tuple[str, Callable[[Net, Tensor], Tensor]]] = {
    "a layer": (COUNTED, lambda net, x: F.relu(net.first(x))),
    "an argument by name": (COUNTED, lambda net, x: torch.clamp(min=0, input=net.first(x))),
    "a matrix of each example": (LISTED, lambda net, x: F.relu(net.made(x)[0] @ x[:, :, None])),
    "a matrix of each example, einsum": (LISTED, lambda net, x: F.relu(torch.einsum("boi,bi->bo", net.made(x)[0], x))),
    "a matrix of each example, summed": (LISTED, lambda net, x: F.relu((net.made(x)[0] * x[:, None]).sum(-1))),
    "a matrix of all examples": (LISTED, lambda net, x: F.relu(F.linear(x, net.made(x)[0][0]))),
    "kernels of each example": (LISTED, lambda net, x: F.relu(net.hidden_maps(x)).view(len(x), -1)),
    "kernels of each example, a view": (LISTED, lambda net, x: F.relu(net.hidden_maps(x).view(len(x), 4, -1, 6))),
    "all weights made": (LISTED, hyper_network),
    "all weights made, the second layer in sums": (LISTED, second_in_sums),
    "rows of a weight that data scales, einsum": (
        LISTED,
        lambda net, x: F.relu(torch.einsum("bi,boi->bo", x, scaled(net, x))),
    ),
    "rows of a weight that data scales, kept apart": (
        LISTED,
        lambda net, x: F.relu(torch.einsum("bi,boji->boj", x, scaled(net, x).view(-1, WIDTH, 2, 4).repeat(1, 1, 1, 2))),
    ),
    "rows of a weight that data scales, matmul": (LISTED, lambda net, x: F.relu(scaled(net, x) @ x[:, :, None])),
    "rows of a weight that data scales, by the right": (
        LISTED,
        lambda net, x: F.relu(x[:, None] @ scaled(net, x).mT),
    ),
    "rows of a weight that data scales, in sums": (
        LISTED,
        lambda net, x: F.relu((x[:, None] * scaled(net, x)).sum(-1)),
    ),
    "features of each unit, summed": (COUNTED, lambda net, x: F.relu(scaled(net, x).sum(-1))),
    "picked rows of embeddings": (LISTED, experts(lambda net, i: net.down(i), lambda net, i: net.up(i))),
    "picked rows of parameters": (LISTED, experts(lambda net, i: net.rows_down[i], lambda net, i: net.rows_up[i])),
    "picked rows, summed": (LISTED, experts_in_sums),
    "picked rows, index_select": (LISTED, experts_by_index_select),
    "rows of a table by the input": (
        LISTED,
        lambda net, x: F.relu(net.rows_down[x[:, :4].abs().long()] @ net.first.weight),
    ),
    "an embedding": (COUNTED, lambda net, x: F.relu(net.down(x[:, :4].abs().long()))),
    "a layer of the input, summed": (LISTED, lambda net, x: F.relu((x[:, None] * net.first.weight).sum(-1))),
    "distances from the input": (LISTED, lambda net, x: F.relu(9 - (x[:, None] - net.rows_down).abs().sum(-1))),
    "a layer of units, summed": (LISTED, lambda net, x: F.relu((net.first(x)[:, None] * net.rows_down).sum(-1))),
    "distances": (LISTED, lambda net, x: F.relu(9 - torch.cdist(x, net.rows_down))),
    "masked_scatter": (
        LISTED,
        lambda net, x: F.relu(torch.zeros_like(x).masked_scatter(x > 0, net.first(x))),
    ),
    "masked_scatter, of two layers": (
        LISTED,
        lambda net, x: F.relu(net.first(x).masked_scatter(x > 0, F.linear(x, net.rows_up[:WIDTH]))),
    ),
    "masked_scatter, of numbers": (
        COUNTED,
        lambda net, x: F.relu(net.first(x).masked_scatter(x > 0, torch.ones(x.shape))),
    ),
    "masked_scatter, an activation that is written out": (
        LISTED,
        lambda net, x: (h := net.first(x)).masked_scatter(h < 0, torch.zeros(h.shape)),
    ),
    "masked_select": (LISTED, selected),
    "the largest, put back": (LISTED, winner),
    "the largest of groups": (LISTED, lambda net, x: F.relu(net.first(x).view(-1, 4, 2).amax(-1))),
    "sorted": (LISTED, lambda net, x: F.relu(net.first(x).sort(-1).values)),
    "gathered": (LISTED, lambda net, x: F.relu(net.first(x).gather(-1, x.argsort(-1)))),
    "cumulative sums": (LISTED, lambda net, x: F.relu(net.first(x).cumsum(-1))),
    "frequencies": (LISTED, lambda net, x: F.relu(torch.fft.rfft(net.first(x)).real)),
    "frequencies and back": (LISTED, lambda net, x: F.relu(torch.fft.irfft(torch.fft.rfft(net.first(x)) * 2))),
    "scores of a memory": (NO_NEURON, lambda net, x: F.relu(net.first(x).softmax(-1) - 0.1)),
    "normalised": (LISTED, lambda net, x: F.relu((h := net.first(x).cumsum(-1)) / h.norm(dim=-1, keepdim=True))),
    "the values of another tensor": (COUNTED, lambda net, x: F.relu(with_values_of(net.first(x)))),
    "numbers of numpy": (LISTED, lambda net, x: F.relu(torch.tensor(net.first(x).detach().numpy()))),
    "numbers of a list": (LISTED, lambda net, x: F.relu(torch.tensor(net.first(x).tolist()))),
    "numbers of numpy, beside the layer": (LISTED, beside),
    "a sparse tensor": (LISTED, lambda net, x: torch.relu(net.first(x).to_sparse()).to_dense()),
    "a complex tensor": (LISTED, lambda net, x: torch.tanh(torch.complex(net.first(x), x)).real),
    "quantised": (
        LISTED,
        lambda net, x: torch.relu(torch.quantize_per_tensor(net.first(x), 0.1, 0, torch.qint8)).dequantize(),
    ),
    "integers": (LISTED, lambda net, x: F.relu((net.first(x) * 9).int()).float()),
    "single numbers of units": (LISTED, single_numbers),
    "in a transform": (LISTED, lambda net, x: torch.vmap(F.relu)(net.first(x))),
    "single numbers in a transform": (
        LISTED,
        lambda net, x: torch.vmap(lambda row: F.relu(row.sum()))(net.first(x))[:, None] * x,
    ),
    "a view, in place": (COUNTED, lambda net, x: F.relu_(net.first(x).clone().t()).t()),
    "half of the units, in place": (COUNTED, lambda net, x: net.first(x).clone()[:, :4].relu_()),
    "a mean over units": (NO_NEURON, threshold),
    "a score that gates": (NO_NEURON, gated_by_a_score),
    "a score that gates, and a sum": (NO_NEURON, lambda net, x: gated_by_a_score(net, x).sum(-1, keepdim=True)),
    "attention scores": (NO_NEURON, attention),
    "attention scores, in sums": (NO_NEURON, attention_in_sums),
    "attention scores, of unknown values": (NO_NEURON, lambda net, x: attention(net, x, lambda v: v.roll(1, -1))),
    "attention of a graph": (NO_NEURON, graph_attention),
    "a loss": (NO_NEURON, hinge),
    "one number": (NO_NEURON, lambda net, x: net.first(x) * F.relu(net.first(x).mean())),
    "a parameter": (NO_NEURON, lambda net, x: net.first(x) * F.relu(net.rows_up[0])),
    "one number of a parameter": (NO_NEURON, lambda net, x: net.first(x) * F.relu(net.rows_up[0, 0])),
    "the input": (NO_NEURON, lambda net, x: net.first(F.relu(x))),
    "a learned change of the input": (NO_NEURON, lambda net, x: net.first(torch.clamp(x + net.rows_up[:BATCH], 0, 1))),
    "units that are lost, of an output": (NO_NEURON, lambda net, x: returned(net, F.relu(net.first(x).roll(1, -1)))),
    "several units of an output": (NO_NEURON, lambda net, x: returned(net, F.relu(net.first(x).cumsum(-1)))),
}


def said(program: Callable[[Net, Tensor], Tensor]) -> list[str]:
    """Return all that is said of the one activation of a program."""
    net = Net(program)
    net(torch.randn(BATCH, WIDTH))  # gives the head its shape
    with ns.watch(net, every_n_steps=1) as scope:
        for _ in range(2):
            y = net(torch.randn(BATCH, WIDTH))
            loss = y.pow(2).mean() if net.loss is None else y.pow(2).mean() + net.loss
            if loss.requires_grad:
                loss.backward()
            scope.step()
    report, no_neurons = scope.report(), scope.not_neurons()
    assert all(reason for reason in no_neurons.values())
    assert not any(item.name in no_neurons for item in report.not_measured)
    found = [COUNTED] if list(scope.census()) else []
    return found + [NO_NEURON] * bool(no_neurons) + [LISTED] * bool(report.not_measured)


@pytest.mark.parametrize(("expected", "program"), PROGRAMS.values(), ids=PROGRAMS)
def test_an_activation_is_counted_or_has_no_neurons_or_is_listed(
    expected: str, program: Callable[[Net, Tensor], Tensor]
) -> None:
    assert said(program) == [expected]


@pytest.mark.parametrize("axis", [None, 1])
def test_what_may_be_neurons_is_listed_until_its_axis_is_declared(axis: int | None) -> None:
    net = Net(lambda net, x: F.relu(torch.einsum("boi,bi->bo", net.made(x)[0], x)))
    net(torch.randn(BATCH, WIDTH))
    with ns.watch(net, every_n_steps=1, axes=None if axis is None else {"relu()": axis}) as scope:
        net(torch.randn(BATCH, WIDTH)).sum().backward()
        scope.step()
    listed = {item.name: item.reason for item in scope.report().not_measured}
    if axis is None:
        assert "axes={'relu()': 1}" in listed["relu()"]
    else:
        assert not listed
        assert scope.census()["relu()"].neurons == WIDTH
    assert not scope.not_neurons()


class Sums(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.cumsum(-1)


def test_a_module_on_what_may_be_neurons_is_listed() -> None:
    net = nn.Sequential(nn.Linear(4, 4), Sums(), nn.ReLU(), nn.Linear(4, 4), Sums(), nn.ReLU())
    with ns.watch(net, every_n_steps=1) as scope:
        net(torch.randn(3, 4)).sum().backward()
        scope.step()
    assert {item.name for item in scope.report().not_measured} == {"2"}
    assert set(scope.not_neurons()) == {"5"}  # no layer reads it


COMPILED = [
    "a matrix of each example",
    "the largest of groups",
    "attention scores",
    "a loss",
    "single numbers of units",
]


def test_rows_of_two_layers_that_a_mask_mixed_are_said_to_be_of_several_layers() -> None:
    _, program = PROGRAMS["masked_scatter, of two layers"]
    net = Net(program)
    net(torch.randn(BATCH, WIDTH))
    with ns.watch(net) as scope:
        net(torch.randn(BATCH, WIDTH)).sum().backward()
        scope.step()
    (found,) = scope.report().not_measured
    assert found.name == "relu()"
    assert "units of several layers" in found.reason


def test_in_a_compiled_network_the_same_is_said() -> None:
    for name in COMPILED:
        expected, program = PROGRAMS[name]
        net = Net(program)
        net(torch.randn(BATCH, WIDTH))
        with ns.watch(net, every_n_steps=1) as scope:
            torch.compile(net, backend="eager")(torch.randn(BATCH, WIDTH)).sum().backward()
            scope.step()
        places = (scope.not_neurons(), {item.name for item in scope.report().not_measured})
        assert ["relu()" in place for place in places] == [expected == NO_NEURON, expected == LISTED], name


#: Each turns a tensor (B, N) into another one of the same shape, in a way that may cost it its units.
STEPS: dict[str, Callable[[Net, Tensor, Tensor], Tensor]] = {
    "roll": lambda net, x, h: h.roll(1, -1),
    "flip": lambda net, x, h: h.flip(-1),
    "sort": lambda net, x, h: h.sort(-1).values,
    "cumsum": lambda net, x, h: h.cumsum(-1),
    "fft": lambda net, x, h: torch.fft.fft(h).real,
    "softmax": lambda net, x, h: h.softmax(-1),
    "gather": lambda net, x, h: h.gather(-1, x.argsort(-1)),
    "rows": lambda net, x, h: h[x[:, 0].argsort()],
    "made": lambda net, x, h: torch.bmm(net.made(x)[0], h[:, :, None])[..., 0],
    "made, linear": lambda net, x, h: F.linear(h, net.made(x)[1][0]),
    "layer": lambda net, x, h: net.first(h),
    "residual": lambda net, x, h: h + net.first(x),
    "gate": lambda net, x, h: h * net.first(x),
    "scatter": lambda net, x, h: torch.zeros_like(h).scatter(-1, x.argsort(-1), h),
    "masked_scatter": lambda net, x, h: torch.zeros_like(h).masked_scatter(x > 0, h),
    "largest": lambda net, x, h: h.amax(-1, keepdim=True).expand_as(h),
    "mean": lambda net, x, h: h - h.mean(-1, keepdim=True),
    "view": lambda net, x, h: h.view(-1, 4, 2).mT.reshape(h.shape),
    "where": lambda net, x, h: torch.where(x > 0, h, x),
    "double": lambda net, x, h: h.double().float(),
    "numpy": lambda net, x, h: torch.tensor(h.detach().numpy()),
    "attend": lambda net, x, h: (h @ h.mT) @ h,
    "cat": lambda net, x, h: torch.cat([h[:, :4], x[:, :4]], -1),
    "table": lambda net, x, h: net.down(h.argmax(-1)) * h,
}


@given(
    before=st.lists(st.sampled_from(sorted(STEPS)), max_size=3),
    after=st.lists(st.sampled_from(sorted(STEPS)), max_size=2),
)
@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
def test_of_any_program_something_is_said_of_its_activation(before: list[str], after: list[str]) -> None:
    def program(net: Net, x: Tensor) -> Tensor:
        h = net.first(x)
        for name in before:
            h = STEPS[name](net, x, h)
        h = F.relu(h)
        for name in after:
            h = STEPS[name](net, x, h)
        return h

    found = said(program)
    event(" and ".join(found))
    assert found
    if not after and "softmax" not in before:  # the head reads what the activation gives
        assert found in ([COUNTED], [LISTED])


def test_what_is_kept_of_a_network_that_goes_another_way_each_time_has_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    most = 20
    monkeypatch.setattr(neuron_flow, "_MOST_OUTCOMES", most)
    monkeypatch.setattr(unmeasured, "_MOST_KEYS", most)
    makers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(6))

    def program(net: Net, x: Tensor) -> Tensor:
        made = [maker(x)[:, :, None] for maker in makers]
        picked = [weights for place, weights in enumerate(made) if way >> place & 1]
        return F.relu(torch.stack([x[:, None] @ weights for weights in picked]).sum(0))

    net = Net(program)
    net.makers = makers
    with ns.watch(net) as scope:
        for way in range(1, 64):  # noqa: B007  # the program reads it
            net(torch.randn(BATCH, WIDTH)).sum().backward()
            scope.step()
    flow = scope._hooks.recorder.forward.flow
    assert 1 < len(flow.acted) <= most
    assert {each.name for each in scope.report().not_measured} >= {"relu()"}
