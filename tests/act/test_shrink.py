"""A shrunk model is smaller, and computes what the original computes on the data; or the original stays alone.

Models and data are float64 here, so that nothing rests on the last bits of float32.
"""

from __future__ import annotations

import copy
import itertools
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.datasets import load_digits
from torch import Tensor, nn

import neuronscope as ns
from neuronscope.act.widths import set_widths
from neuronscope.demo.recipe import VARIANTS, Recipe, build_network
from neuronscope.errors import UsageError
from tests.act.llama import small_llama

Forward = Callable[["Net", Tensor], Tensor]


class Net(nn.Module):
    """Some layers, and a forward that is told."""

    def __init__(self, forward: Forward, **layers: nn.Module) -> None:
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)
        self.path = forward

    def forward(self, x: Tensor) -> Tensor:
        return self.path(self, x)


def kill(layer: nn.Module, *units: int) -> None:
    """Make units negative for all inputs: the activation that follows makes zeros of them."""
    with torch.no_grad():
        for unit in units:
            layer.weight[unit] = 0
            layer.bias[unit] = -50


def vectors(examples: int = 320, width: int = 4) -> Tensor:
    return torch.randn(examples, width, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def pictures(examples: int = 320) -> Tensor:
    return torch.randn(examples, 2, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def shrunk_and_checked(model: nn.Module, x: Tensor) -> ns.Shrunk:
    """Shrink a model, and check by hand all that is claimed."""
    model = model.double().eval()
    before = copy.deepcopy(model)
    random_state = torch.random.get_rng_state()
    shrunk = ns.shrink(model, ns.scan(model, [x]), x.split(100))
    assert torch.equal(random_state, torch.random.get_rng_state())
    for (name, was), (_, now) in zip(before.state_dict().items(), model.state_dict().items(), strict=True):
        assert torch.equal(was, now), name
    with torch.no_grad():
        one, other = model(x), shrunk.model(x)
    torch.testing.assert_close(other, one, rtol=1e-11, atol=1e-11)
    assert shrunk.difference is not None
    assert abs(float((one - other).abs().max()) - shrunk.difference.largest) < 1e-12
    parameters = [sum(each.numel() for each in net.parameters()) for net in (model, shrunk.model)]
    assert tuple(parameters) == shrunk.parameters
    fresh = set_widths(copy.deepcopy(model), shrunk.widths)
    fresh.load_state_dict(shrunk.model.state_dict())
    torch.testing.assert_close(fresh.eval()(x), other, rtol=1e-11, atol=1e-11)
    return shrunk


def test_dead_neurons_of_linear_layers_go() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Dropout(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 2))
    kill(model[0], 1, 5)
    kill(model[3], 0)
    shrunk = shrunk_and_checked(model, vectors())
    assert shrunk.removed == {"0/relu": (1, 5), "3/relu": (0,)}
    assert [tuple(shrunk.model[place].weight.shape) for place in (0, 3, 5)] == [(6, 4), (5, 6), (2, 5)]
    assert (shrunk.folded, dict(shrunk.kept)) == (0, {})
    assert shrunk.widths["3"] == {"in_features": 6, "out_features": 5, "bias": True}
    text = str(shrunk)
    assert "3 neurons taken out of 2 layers: 108 → " in text
    assert str(shrunk.model[0]) == "Linear(in_features=4, out_features=6, bias=True)"


def digits() -> Tensor:
    return torch.tensor(load_digits(return_X_y=True)[0][:320])  # whole numbers from 0 to 16


def network_of_the_demo(living: list[list[int]], x: Tensor) -> nn.Module:
    """The demo's network with weights of −1, 0 and 1; neurons that are not living are dead on purpose."""
    chance = torch.Generator().manual_seed(0)
    model = build_network(VARIANTS[0], Recipe(), seed=0).double()
    linears = [each for each in model.modules() if isinstance(each, nn.Linear)]
    with torch.no_grad():
        for layer, own in zip(linears, [*living, range(10)], strict=True):
            layer.weight.copy_(torch.randint(-1, 2, layer.weight.shape, generator=chance))
            layer.bias.zero_()
            for unit in own:
                while len((x @ layer.weight[unit]).relu().unique()) < 100:  # it must not be idle by chance
                    layer.weight[unit] = torch.randint(-1, 2, (layer.in_features,), generator=chance).double()
            if layer.out_features == 64:
                kill(layer, *set(range(64)).difference(own))
            x = layer(x).relu()
    return model


def test_the_demos_network_without_its_268_dead_neurons_is_what_one_cuts_by_hand_bit_for_bit() -> None:
    # Of 6 layers of 64 live 18 + 20 + 18 + 21 + 20 + 19 = 116, and 268 are dead. Of 65·64 + 5·65·64 + 65·10 = 25,610
    # parameters stay 65·18 + 19·20 + 21·18 + 19·21 + 22·20 + 21·19 + 20·10 = 3,366. All numbers are whole and below
    # 16 · 64⁷ < 2⁵³, so that no sum is rounded, whatever its order.
    chance = torch.Generator().manual_seed(1)
    living = [sorted(torch.randperm(64, generator=chance)[:width].tolist()) for width in (18, 20, 18, 21, 20, 19)]
    x = digits()
    model = network_of_the_demo(living, x)
    report = ns.scan(model, [x])
    assert (report.dead, report.neurons) == (268, 384)
    shrunk = ns.shrink(model, report, [x])
    assert shrunk.parameters == (25_610, 3_366)
    assert shrunk.difference is not None
    assert shrunk.difference.largest == 0.0
    assert "Both models gave the same outputs, bit for bit, on 1 batch." in str(shrunk)
    linears = [each for each in model.modules() if isinstance(each, nn.Linear)]
    for (layer, reader), own in zip(itertools.pairwise(linears), living, strict=True):
        layer.weight = nn.Parameter(layer.weight[own])
        layer.bias = nn.Parameter(layer.bias[own])
        reader.weight = nn.Parameter(reader.weight[:, own])
    assert sum(each.numel() for each in model.parameters()) == 3_366
    for (name, by_hand), ours in zip(model.state_dict().items(), shrunk.model.state_dict().values(), strict=True):
        assert torch.equal(by_hand, ours), name
    assert torch.equal(model(x), shrunk.model(x))


def test_channels_go_with_their_norm_and_flattened_columns() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(6, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4, 3),
    )  # fmt: skip
    kill(model[1], 2, 3)
    kill(model[5], 0)
    shrunk = shrunk_and_checked(model, pictures())
    assert shrunk.removed == {"1/relu": (2, 3), "5/relu": (0,)}
    assert tuple(shrunk.model[0].weight.shape) == (4, 2, 3, 3)
    assert tuple(shrunk.model[4].weight.shape) == (3, 4, 3, 3)
    assert shrunk.model[1].num_features == len(shrunk.model[1].running_var) == 4
    assert shrunk.model[8].in_features == 3


def test_flattened_maps_and_transposed_convolutions() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 5, 3), nn.ReLU(), nn.ConvTranspose2d(5, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(75, 2)
    )
    kill(model[0], 4)
    with torch.no_grad():
        model[2].weight[:, 1] = 0
        model[2].bias[1] = -9
    shrunk = shrunk_and_checked(model, pictures())
    assert tuple(shrunk.model[2].weight.shape) == (4, 2, 2, 2)
    assert shrunk.model[5].in_features == 50


def test_a_concatenation_reads_with_an_offset() -> None:
    torch.manual_seed(0)
    net = Net(
        lambda n, x: n.out(torch.cat([torch.tanh(n.a(x)), torch.relu(n.b(x))], 1)),
        a=nn.Linear(4, 5), b=nn.Linear(4, 6), out=nn.Linear(11, 3),
    )  # fmt: skip
    kill(net.b, 0, 4)
    shrunk = shrunk_and_checked(net, vectors())
    assert shrunk.removed == {"b/relu": (0, 4)}
    assert torch.equal(shrunk.model.out.weight, net.out.weight[:, [0, 1, 2, 3, 4, 6, 7, 8, 10]])


def gated(net: Net, x: Tensor) -> Tensor:
    return net.down(F.relu(net.gate(x)) * net.up(x))


def halves(net: Net, x: Tensor) -> Tensor:
    gate, up = net.both(x).chunk(2, -1)
    return net.down(F.relu(gate) * up)


def test_gate_and_up_projection_go_together() -> None:
    torch.manual_seed(0)
    net = Net(gated, gate=nn.Linear(4, 6), up=nn.Linear(4, 6, bias=False), down=nn.Linear(6, 3))
    kill(net.gate, 2)
    shrunk = shrunk_and_checked(net, vectors())
    assert {name: tuple(each.shape) for name, each in shrunk.model.named_parameters()} == {
        "gate.weight": (5, 4), "gate.bias": (5,), "up.weight": (5, 4), "down.weight": (3, 5), "down.bias": (3,),
    }  # fmt: skip


def test_a_factor_that_is_zero_takes_the_other_one_along() -> None:
    torch.manual_seed(0)
    net = Net(gated, gate=nn.Linear(4, 6), up=nn.Linear(4, 6), down=nn.Linear(6, 3))
    with torch.no_grad():
        net.up.weight[3], net.up.bias[3] = 0, 0
    assert shrunk_and_checked(net, vectors()).removed["gate/reglu"] == (3,)


def test_gate_and_up_in_one_weight_leave_two_rows_each() -> None:
    torch.manual_seed(0)
    net = Net(halves, both=nn.Linear(4, 12), down=nn.Linear(6, 3))
    kill(net.both, 1)
    shrunk = shrunk_and_checked(net, vectors())
    assert torch.equal(shrunk.model.both.weight, net.both.weight[[0, 2, 3, 4, 5, 6, 8, 9, 10, 11]])
    glu = Net(lambda n, x: n.down(F.glu(n.both(x))), both=nn.Linear(4, 12), down=nn.Linear(6, 3))
    with torch.no_grad():
        glu.both.weight[1], glu.both.bias[1] = 0, 0
    assert shrunk_and_checked(glu, vectors()).model.both.out_features == 10


def mobile(net: Net, x: Tensor) -> Tensor:
    h = F.relu6(net.bn1(net.expand(x)))
    h = F.relu6(net.bn2(net.depth(h)))
    return net.bn3(net.project(h)).mean((2, 3))


def mobile_net() -> Net:
    torch.manual_seed(0)
    return Net(
        mobile,
        expand=nn.Conv2d(2, 6, 1, bias=False), bn1=nn.BatchNorm2d(6),
        depth=nn.Conv2d(6, 6, 3, padding=1, groups=6, bias=False), bn2=nn.BatchNorm2d(6),
        project=nn.Conv2d(6, 3, 1, bias=False), bn3=nn.BatchNorm2d(3),
    )  # fmt: skip


def test_a_depthwise_convolution_goes_with_its_channel_and_its_constant_is_folded() -> None:
    net = mobile_net()
    kill(net.bn1, 1)  # behind the depthwise convolution there is relu6(bias of bn2)
    nn.init.constant_(net.bn2.bias, 0.5)
    kill(net.bn2, 4)  # the expanded channel is read by nobody else
    shrunk = shrunk_and_checked(net, pictures())
    assert shrunk.removed == {"bn1/relu6": (1, 4), "bn2/relu6": (1, 4)}
    assert shrunk.folded == 1
    assert shrunk.model.depth.groups == shrunk.model.expand.out_channels == shrunk.model.project.in_channels == 4
    assert shrunk.model.project.bias is not None
    assert "1 of them had a constant effect" in str(shrunk)


def test_a_constant_behind_padding_stays() -> None:
    torch.manual_seed(0)

    def path(net: Net, x: Tensor) -> Tensor:
        return net.out(net.norm(F.relu(net.conv(x)))).mean((2, 3))

    for out, goes in (
        (nn.Conv2d(5, 3, 3, padding=1), False),
        (nn.Conv2d(5, 3, 3, padding="same"), False),
        (nn.ConvTranspose2d(5, 3, 3), False),
        (nn.Conv2d(5, 3, 3), True),
        (nn.Conv2d(5, 3, 3, padding=1, padding_mode="reflect"), True),
    ):
        net = Net(path, conv=nn.Conv2d(2, 5, 3), norm=nn.BatchNorm2d(5), out=out)
        nn.init.uniform_(net.norm.bias)
        kill(net.conv, 3)
        if goes:
            assert shrunk_and_checked(net, pictures()).folded == 1
        else:
            with pytest.raises(UsageError, match="must stay: `out` reads a constant other than zero"):
                shrunk_and_checked(net, pictures())


def test_neurons_that_never_change_are_folded_from_299_examples_on() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6), nn.Hardtanh(), nn.Linear(6, 2))
    with torch.no_grad():
        net[0].weight[2], net[0].bias[2] = 0, 50  # always 1
    assert shrunk_and_checked(net, vectors(299)).removed == {"0/hardtanh": (2,)}
    assert shrunk_and_checked(net, vectors(298)).removed == {}


def test_one_neuron_of_a_dead_layer_stays() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    kill(net[0], 0, 1, 2)
    shrunk = shrunk_and_checked(net, vectors())
    assert shrunk.model[0].out_features == 1
    assert dict(shrunk.kept) == {"one neuron of a layer must stay": 1}


def test_what_is_dead_elsewhere_and_not_on_the_data_stays() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)).double()
    kill(net[0], 0)
    report = ns.scan(net, [vectors() * 0])  # zeros: whatever has a negative bias is dead
    assert report.dead > 1
    shrunk = ns.shrink(net, report, [vectors()])
    assert shrunk.removed == {"0/relu": (0,)}
    assert dict(shrunk.kept) == {"what `2` reads of them changes on the data": report.dead - 1}


def residual_blocks() -> Net:
    torch.manual_seed(0)

    def path(net: Net, x: Tensor) -> Tensor:
        h = torch.relu(net.bn0(net.conv0(x)))
        for block in (net.first, net.second):
            h = torch.relu(block(h) + h)
        return net.out(h.mean((2, 3)))

    def block() -> nn.Module:
        inner = [nn.Conv2d(6, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU()]
        return nn.Sequential(*inner, nn.Conv2d(4, 6, 3, padding=1), nn.BatchNorm2d(6))

    net = Net(path, conv0=nn.Conv2d(2, 6, 3), bn0=nn.BatchNorm2d(6), first=block(), second=block(), out=nn.Linear(6, 3))
    for layer in (net.bn0, net.first[4], net.second[4]):
        kill(layer, 2)
    kill(net.bn0, 3)  # in the first block alone
    return net


def test_channels_that_residual_sums_tie_go_together() -> None:
    pytest.importorskip("torch_pruning")
    shrunk = shrunk_and_checked(residual_blocks(), pictures())
    assert {site: neurons for site, neurons in shrunk.removed.items() if 2 in neurons} == {
        "bn0/relu": (2,), "first.4/relu": (2,), "second.4/relu": (2,)
    }  # fmt: skip
    assert shrunk.model.conv0.out_channels == shrunk.model.first[0].in_channels == shrunk.model.out.in_features == 5
    assert list(shrunk.kept.values()) == [1]


@pytest.mark.parametrize(
    "path",
    [
        lambda n, h, g: n.out(h + g * n.scale),  # a parameter that no layer of its own holds
        lambda n, h, g: n.out(h + g) + (h + g).mean(1, keepdim=True),
    ],
)
def test_where_more_reads_a_sum_than_is_known_what_it_ties_stays(path: Callable[[Net, Tensor, Tensor], Tensor]) -> None:
    def forward(net: Net, x: Tensor) -> Tensor:
        h = torch.relu(net.first(x))
        h = torch.relu(net.a(h))
        return path(net, h, torch.relu(net.b(h)))

    layers = {"first": nn.Linear(4, 5), "a": nn.Linear(5, 6), "b": nn.Linear(6, 6), "out": nn.Linear(6, 2)}
    net = Net(forward, **layers)
    net.scale = nn.Parameter(torch.ones(6))
    kill(net.first, 3)
    kill(net.a, 1)
    kill(net.b, 1)
    shrunk = shrunk_and_checked(net, vectors())
    assert dict(shrunk.removed) == {"first/relu": (3,)}
    assert any("added in" in reason for reason in shrunk.kept)


def test_without_torch_pruning_they_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch_pruning", None)
    with pytest.raises(UsageError, match="added in"):
        shrunk_and_checked(residual_blocks(), pictures())


REFUSED: dict[str, tuple[Callable[[], tuple[nn.Module, nn.Module]], str]] = {}


def refused(reason: str) -> Callable[[Callable[[], tuple[nn.Module, nn.Module]]], None]:
    def note(make: Callable[[], tuple[nn.Module, nn.Module]]) -> None:
        REFUSED[make.__name__] = make, reason

    return note


@refused("must stay: ")  # "added in", or with torch-pruning what reads the sum
def residual() -> tuple[nn.Module, nn.Module]:
    net = Net(lambda n, x: n.out(torch.relu(n.a(x)) + x), a=nn.Linear(4, 4), out=nn.Linear(4, 2))
    return net, net.a


@refused("`a` is called more than once in a forward")
def called_twice() -> tuple[nn.Module, nn.Module]:
    net = Net(lambda n, x: n.out(torch.relu(n.a(torch.relu(n.a(x))))), a=nn.Linear(4, 4), out=nn.Linear(4, 2))
    return net, net.a


@refused("`a` shares a weight with another layer")
def shared() -> tuple[nn.Module, nn.Module]:
    net = Net(lambda n, x: n.out(torch.relu(n.a(x))), a=nn.Linear(4, 4), out=nn.Linear(4, 4))
    net.out.weight = net.a.weight
    return net, net.a


@refused("its code seems to fix a width")
def fixed_view() -> tuple[nn.Module, nn.Module]:
    net = Net(lambda n, x: n.out(torch.relu(n.a(x)).view(-1, 6)), a=nn.Linear(4, 6), out=nn.Linear(6, 2))
    return net, net.a


@refused("combined with `scale` by `mul`")
def own_scale() -> tuple[nn.Module, nn.Module]:
    net = Net(lambda n, x: n.out(torch.relu(n.a(x)) * n.scale), a=nn.Linear(4, 6), out=nn.Linear(6, 2))
    net.scale = nn.Parameter(torch.rand(6))
    return net, net.a


@refused("`a`: mixed by a norm")
def layer_norm() -> tuple[nn.Module, nn.Module]:
    net = Net(
        lambda n, x: n.out(torch.relu(n.norm(n.a(x)))), a=nn.Linear(4, 6), norm=nn.LayerNorm(6), out=nn.Linear(6, 2)
    )
    return net, net.norm


@refused("`out` is a convolution in groups")
def groups() -> tuple[nn.Module, nn.Module]:
    net = Net(lambda n, x: n.out(torch.relu(n.a(x)).unsqueeze(-1)), a=nn.Linear(4, 6), out=nn.Conv1d(6, 4, 1, groups=2))
    return net, net.a


@refused("`w` is a parameter that no layer of its own holds")
def bare() -> tuple[nn.Module, nn.Module]:
    net = Net(lambda n, x: torch.relu(n.a(x)) @ n.w, a=nn.Linear(4, 6))
    net.w = nn.Parameter(torch.rand(6, 2))
    return net, net.a


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_followed_is_refused_in_one_sentence(case: str) -> None:
    torch.manual_seed(0)
    make, reason = REFUSED[case]
    net, layer = make()
    kill(layer, 1)
    with pytest.raises(UsageError) as caught:
        shrunk_and_checked(net, vectors())
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_result_that_differs_is_not_returned() -> None:
    torch.manual_seed(0)

    def path(net: Net, x: Tensor) -> Tensor:  # counts its neurons, so fewer give something else
        h = torch.relu(net.a(x))
        return net.out(h) * net.a.out_features

    net = Net(path, a=nn.Linear(4, 6), out=nn.Linear(6, 2))
    kill(net.a, 1)
    with pytest.raises(UsageError, match="its outputs differ by"):
        shrunk_and_checked(net, vectors())


def masked(logits: Tensor) -> Tensor:  # most of them, as for tokens that may not come
    return logits.masked_fill(torch.arange(logits.shape[1]) > 1, -1e9)


def added_mask(logits: Tensor) -> Tensor:
    return logits + torch.where(torch.arange(logits.shape[1]) > 1, -1e9, 0.0)


def lowest(logits: Tensor) -> Tensor:
    return logits.masked_fill(torch.arange(logits.shape[1]) > 5, torch.finfo(logits.dtype).min)


@pytest.mark.parametrize("mask", [masked, added_mask, lowest])
@pytest.mark.parametrize("error", [0.0, 1e-3])
def test_fill_values_do_not_hide_a_difference_of_the_other_outputs(
    mask: Callable[[Tensor], Tensor], error: float
) -> None:
    torch.manual_seed(0)

    def path(net: Net, x: Tensor) -> Tensor:
        return mask(net.out(torch.relu(net.a(x))) * (1 + error * net.a.out_features))

    net, x = Net(path, a=nn.Linear(4, 6), out=nn.Linear(6, 9)), vectors().float()
    kill(net.a, 1)
    report = ns.scan(net, [x])
    if error:
        with pytest.raises(UsageError, match=r"its outputs differ by .*, where the largest output is \d\.\d+:"):
            ns.shrink(net, report, [x])
    else:
        difference = ns.shrink(net, report, [x]).difference
        assert difference is not None
        with torch.no_grad():
            values = net(x).abs()
        assert difference.scale == float(values[values < 1e6].max())


def test_each_output_is_measured_by_its_own_size() -> None:
    torch.manual_seed(0)

    def path(net: Net, x: Tensor) -> Any:
        h = net.out(torch.relu(net.a(x)))
        return 1e9 * h, h * (1 + 1e-3 * net.a.out_features)

    net, x = Net(path, a=nn.Linear(4, 6), out=nn.Linear(6, 9)), vectors().float()
    kill(net.a, 1)
    with pytest.raises(UsageError, match="its outputs differ by"):
        ns.shrink(net, ns.scan(net, [x]), [x])


def test_a_report_on_a_model_of_other_widths_is_refused() -> None:
    net, x = Net(lambda n, x: n.out(torch.relu(n.a(x))), a=nn.Linear(4, 6), out=nn.Linear(6, 2)), vectors()
    kill(net.double().a, 1, 2)
    report = ns.scan(net, [x])
    small = ns.shrink(net, report, [x]).model
    for data in ([x], None):
        with pytest.raises(UsageError, match="Expected a report on this model"):
            ns.shrink(small, report, data)


def test_a_layer_may_be_called_by_keyword_and_one_that_is_not_called_is_said_to_be_unseen() -> None:
    net, x = Net(lambda n, x: n.out(input=torch.relu(n.a(x))), a=nn.Linear(4, 6), out=nn.Linear(6, 2)), vectors()
    kill(net.a, 1)
    assert shrunk_and_checked(net, x).removed == {"a/relu": (1,)}
    net = Net(lambda n, x: F.linear(torch.relu(n.a(x)), n.out.weight), a=nn.Linear(4, 6), out=nn.Linear(6, 2))
    kill(net.a, 1)
    with pytest.raises(UsageError, match="what `out` reads was not seen"):
        shrunk_and_checked(net, x)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_compiled_scripted_and_quantised_models_are_refused() -> None:
    net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    kill(net[0], 1)
    x = vectors().float()
    report = ns.scan(net, [x])
    for other in (torch.compile(net, backend="eager"), torch.jit.trace(net, x[:2])):
        with pytest.raises(UsageError, match="compiled or scripted"):
            ns.shrink(other, report, [x])
    quantised = torch.ao.quantization.quantize_dynamic(net, {nn.Linear})
    with pytest.raises(UsageError, match="must stay"):
        ns.shrink(quantised, report, [x])
    with pytest.raises(UsageError, match="at least one batch"):
        ns.shrink(net, report, [])


def test_without_data_what_a_report_knows_is_taken_out() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)).double()
    kill(net[0], 1)
    shrunk = ns.shrink(net, ns.scan(net, [vectors()]))
    torch.testing.assert_close(shrunk.model(vectors()), net(vectors()), rtol=1e-12, atol=1e-12)
    assert (shrunk.removed, shrunk.difference) == ({"0/relu": (1,)}, None)
    assert "Not checked: no data was given" in str(shrunk)
    mobile = mobile_net().double().eval()
    kill(mobile.bn1, 1)
    with pytest.raises(UsageError, match="`depth` passes them on"):
        ns.shrink(mobile, ns.scan(mobile, [pictures()]))


def test_a_report_on_training_will_do() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)).double()
    kill(net[0], 1, 2)
    optimizer = torch.optim.SGD(net.parameters(), 0.01)
    with ns.watch(net) as scope:
        for _ in range(3):
            net(vectors()).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            scope.step()
    assert ns.shrink(net, scope.report(), iter([vectors()])).removed == {"0/relu": (1, 2)}


def test_a_healthy_model_is_only_copied() -> None:
    net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2))
    shrunk = shrunk_and_checked(net, vectors())
    assert (shrunk.removed, shrunk.model is net) == ({}, False)
    assert "bit for bit" in str(shrunk)


def test_float32_is_checked_in_float64() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 300), nn.ReLU(), nn.Linear(300, 10))
    kill(net[0], *range(0, 300, 3))
    x = torch.randn(320, 64)
    shrunk = ns.shrink(net, ns.scan(net, [x]), [x])
    assert shrunk.difference is not None
    assert shrunk.difference.largest <= 1e-5 * shrunk.difference.scale
    if shrunk.difference.largest:
        assert shrunk.in_float64 is not None
        assert shrunk.in_float64.largest <= 1e-12 * shrunk.in_float64.scale
        assert "rounding, since in float64 they differ by" in str(shrunk)


def test_a_llama_loses_neurons_of_its_feed_forward() -> None:
    model = small_llama()
    with torch.no_grad():
        model.model.layers[0].mlp.gate_proj.weight[5] = 0  # relu(0) is 0 for every input
        model.model.layers[1].mlp.gate_proj.weight[[7, 8]] = 0
    data = [{"input_ids": torch.randint(0, 50, (300, 3))}]
    shrunk = ns.shrink(model, ns.scan(model, data), data)
    assert shrunk.removed["model.layers.0.mlp.gate_proj/reglu"] == (5,)
    widths = [layer.mlp.down_proj.in_features for layer in shrunk.model.model.layers]
    assert widths == [layer.mlp.up_proj.out_features for layer in shrunk.model.model.layers] == [23, 22]


@st.composite
def programs(draw: st.DrawFn) -> nn.Sequential:
    """A network of convolutions, linear layers, norms, pooling and activations, some of whose neurons are dead."""
    torch.manual_seed(draw(st.integers(0, 99)))
    layers: list[nn.Module] = []
    width, size = 2, 6
    producers: list[nn.Module] = []

    def activate(producer: nn.Module, norm: nn.Module | None) -> None:
        layers.extend(filter(None, (producer, norm, draw(st.sampled_from((nn.ReLU, nn.ReLU6, nn.Hardtanh)))())))
        producers.append(norm or producer)

    for _ in range(draw(st.integers(0, 3))):
        wide, kernel, depthwise = draw(st.integers(2, 6)), draw(st.sampled_from((1, 3))), draw(st.booleans())
        pad = draw(st.integers(0, 1)) if size > 2 else 1
        if depthwise:
            wide = width
        conv = nn.Conv2d(width, wide, kernel, padding=pad, groups=width if depthwise else 1, bias=True)
        norm = nn.BatchNorm2d(wide) if draw(st.booleans()) else None
        if norm is not None:
            nn.init.uniform_(norm.bias)
        activate(conv, norm)
        width, size = wide, size + 2 * pad - kernel + 1
    layers.append(nn.Flatten())
    width *= size * size
    for _ in range(draw(st.integers(1, 2))):
        wide = draw(st.integers(2, 6))
        activate(nn.Linear(width, wide), nn.BatchNorm1d(wide) if draw(st.booleans()) else None)
        width = wide
        if draw(st.booleans()):
            layers.append(nn.BatchNorm1d(width))
    for producer in producers:
        kill(producer, *(unit for unit in range(len(producer.bias)) if draw(st.integers(0, 3)) == 0))
    return nn.Sequential(*layers, nn.Linear(width, 3))


@settings(max_examples=25, deadline=None)
@given(programs())
def test_random_programs_compute_the_same(model: nn.Sequential) -> None:
    try:
        shrunk = shrunk_and_checked(model, pictures(300))
    except UsageError as error:
        if "must stay" not in str(error):
            raise
        return
    assert shrunk.parameters[1] <= shrunk.parameters[0]
