"""Layers that act as one linear map: which ones are found, and that the map does their work.

The twin knows a random stack of modules by construction: layers between two modules that are not linear are one map.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

import neuronscope as ns
from neuronscope.errors import UsageError
from neuronscope.linear.check import LinearLayersOfForward


def layers(model: nn.Module, data: Any) -> list[tuple[str, ...]]:
    return [each.layers for each in ns.check_linear(model, data).stretches if not each.only_folds]


def test_two_linear_layers_are_one_map_of_the_smaller_width() -> None:
    net = nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 2))
    (found,) = ns.check_linear(net, torch.randn(32, 8)).stretches
    assert found.layers == ("0", "1")
    assert (found.inputs, found.outputs, found.rank, found.basis) == (8, 16, 4, "proved")
    assert (found.parameters, found.parameters_of_one) == (8 * 4 + 4 + 4 * 16 + 16, 8 * 16 + 16)
    assert found.source == "the input"


def test_the_map_gives_what_the_layers_give() -> None:
    net = nn.Sequential(nn.Linear(8, 6), nn.Dropout(), nn.Linear(6, 7), nn.Linear(7, 5)).eval()
    (found,) = ns.check_linear(net, torch.randn(4, 8)).stretches
    x = torch.randn(100, 8, dtype=torch.float64)
    expected = net.double()(x).detach().numpy()
    assert found.matrix is not None
    assert found.offset is not None
    np.testing.assert_allclose(x.numpy() @ found.matrix.T + found.offset, expected, rtol=1e-12, atol=1e-12)
    assert found.difference is not None
    assert found.difference < 1e-12


def test_convolutions_are_one_convolution_whose_kernel_covers_both() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 5, 5, stride=2), nn.ReLU()).eval()
    x = torch.randn(2, 3, 20, 20)
    (found,) = ns.check_linear(net, x).stretches
    assert found.layers == ("0", "1", "2")
    assert found.kernel == (7, 7)
    assert found.parameters_of_one == 5 * 3 * 49 + 5
    assert found.matrix is not None
    weight = torch.from_numpy(found.matrix).reshape(5, 3, 7, 7)
    assert found.offset is not None
    bias = torch.from_numpy(found.offset)
    exact = net[:3].double()(x.double())
    torch.testing.assert_close(functional.conv2d(x.double(), weight, bias, stride=2), exact, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("padding", "inner", "stride", "expected"),
    [
        (0, 0, 1, 0.0),
        (2, 0, 2, 0.0),  # padding before the first layer is padding of the one convolution
        (1, 1, 1, 1 - 10 * 10 / 12**2),  # 12 × 12 outputs; at the outermost ones the second kernel reads padding
        (1, 1, 2, 1 - 5 * 5 / 6**2),  # 12 → 6: at the first row and column only, as 2 · 5 + 1 is inside
    ],
)
def test_a_convolution_says_where_padding_between_the_layers_makes_it_another(
    padding: int, inner: int, stride: int, expected: float
) -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3, padding=padding), nn.Conv2d(4, 5, 3, stride, padding=inner), nn.ReLU())
    report = ns.check_linear(net, torch.randn(2, 3, 12, 12))
    assert report.stretches[0].border_share == pytest.approx(expected)
    assert ("near the borders" in str(report)) == (expected > 0)


@pytest.mark.parametrize(
    ("first", "size"),
    [
        (nn.ConvTranspose2d(3, 4, 2, stride=2), 4),  # its kernel differs from one position to the next
        (nn.Conv2d(3, 4, 3, padding=1), 4),  # the kernel of 5 × 5 is wider than the map
    ],
)
def test_a_map_without_a_kernel_is_one_of_all_elements(first: nn.Module, size: int) -> None:
    net = nn.Sequential(first, nn.Conv2d(4, 5, 3, padding=1), nn.ReLU())
    x = torch.randn(2, 3, size, size, dtype=torch.float64)
    (found,) = ns.check_linear(net.double(), x).stretches
    assert found.kernel == ()
    assert found.matrix is not None
    assert found.offset is not None
    expected = net[:2](x).flatten(1).detach().numpy()
    np.testing.assert_allclose(x.flatten(1).numpy() @ found.matrix.T + found.offset, expected, rtol=1e-9, atol=1e-9)


class Residual(nn.Module):
    """``head(x + f2(act(f1(x))))``."""

    def __init__(self, act: nn.Module) -> None:
        super().__init__()
        self.f1, self.act, self.f2, self.head = nn.Linear(8, 32), act, nn.Linear(32, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x + self.f2(self.act(self.f1(x))))


@pytest.mark.parametrize(
    "act", [nn.ReLU, nn.LeakyReLU, nn.PReLU, nn.Hardswish, functools.partial(nn.ReLU, inplace=True)]
)
@pytest.mark.parametrize("shift", [100.0, -100.0])
def test_an_activation_that_is_always_on_or_always_off_is_linear_on_the_data(
    act: Callable[[], nn.Module], shift: float
) -> None:
    net = Residual(act())
    net.f1.bias.data += shift
    data = torch.randn(64, 8)
    found = ns.check_linear(net, data)
    (stretch,) = found.stretches
    assert stretch.layers == ("f1", "f2", "head")
    assert stretch.basis == "measured"
    assert math.isclose(found.rate_bound, 1 - 0.05 ** (1 / 64))
    exact = net.double().eval()(data.double()).detach().numpy()
    assert stretch.matrix is not None
    assert stretch.offset is not None
    np.testing.assert_allclose(data.double().numpy() @ stretch.matrix.T + stretch.offset, exact, rtol=1e-9, atol=1e-9)


def test_neurons_of_both_kinds_are_linear_together_and_one_that_changes_is_not() -> None:
    net = Residual(nn.ReLU())
    with torch.no_grad():
        net.f1.bias[:16] = 100
        net.f1.bias[16:] = -100
    data = torch.randn(64, 8)
    assert ns.check_linear(net, data).acting_linear == {"f1/relu": (32, 16)}
    with torch.no_grad():
        net.f1.bias[3] = 0
    assert ns.check_linear(net, data).acting_linear == {}
    assert layers(net, data) == []


def test_a_batch_in_which_the_activation_changes_is_enough() -> None:
    net = Residual(nn.ReLU())
    net.f1.bias.data += 100
    assert layers(net, [torch.randn(8, 8), torch.randn(8, 8)]) == [("f1", "f2", "head")]
    assert layers(net, [torch.randn(8, 8), torch.randn(8, 8) * 1000]) == []


def test_one_position_does_not_show_that_an_activation_acts_linear() -> None:
    net = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))
    assert layers(net, torch.randn(1, 8)) == []


class Attention(nn.Module):
    """Attention by torch's function, by hand, or by its module, behind a layer norm."""

    def __init__(self, how: str, width: int = 16, heads: int = 4) -> None:
        super().__init__()
        self.how, self.heads, self.norm = how, heads, nn.LayerNorm(width)
        if how == "module":
            self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        else:
            self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))
            self.q.weight.data.zero_()  # so that a map of the queries is no map of the values

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        if self.how == "module":
            return x + self.attention(h, h, h)[0]
        batch, time, width = h.shape
        q, k, v = (layer(h).view(batch, time, self.heads, -1).transpose(1, 2) for layer in (self.q, self.k, self.v))
        if self.how == "function":
            mixed = functional.scaled_dot_product_attention(q, k, v)
        elif self.how == "function, by names":
            mixed = functional.scaled_dot_product_attention(value=v, key=k, query=q)
        else:
            mixed = (q @ k.transpose(-1, -2)).softmax(-1) @ v
        return x + self.o(mixed.transpose(1, 2).reshape(batch, time, width))


@pytest.mark.parametrize("how", ["function", "function, by names", "by hand", "module"])
def test_value_and_output_projection_are_one_map_for_each_head(how: str) -> None:
    (found,) = ns.check_linear(Attention(how), torch.randn(4, 5, 16)).stretches
    names = ("attention(32:48)", "attention.out_proj") if how == "module" else ("v", "o")
    assert found.layers == names
    assert found.through_attention
    assert (found.heads, found.inputs, found.outputs, found.rank) == (4, 16, 16, 4)


def test_code_that_reads_numbers_out_of_its_tensors_proves_nothing() -> None:
    class Looks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            h = self.a(x)
            return self.b(h) if h.sum() > -1e9 else h

    found = ns.check_linear(Looks(), torch.randn(5, 3))
    assert found.reads_out
    assert [each.basis for each in found.stretches] == ["measured"]


class Between(nn.Module):
    """Two layers with something between them."""

    def __init__(self, what: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.what = nn.Linear(6, 6), nn.Linear(6, 6), what

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.what(self.a(x)))


LINEAR: dict[str, Callable[[Tensor], Tensor]] = {
    "nothing": lambda h: h,
    "scale": lambda h: 2 * h / 3 - 1,
    "flip": lambda h: h.flip(-1),
    "cast": lambda h: h.double().to(h.dtype),
    "dropout in evaluation": lambda h: functional.dropout(h, training=False),
    "two halves added": lambda h: torch.cat([sum(h.chunk(2, -1)), h[..., :3]], -1),
    "a sum of two uses": lambda h: h + 2 * h,
    "mean and back": lambda h: h.mean(-1, keepdim=True).expand(-1, 6),
    "pooling": lambda h: functional.avg_pool1d(h[:, None], 3, 1, 1)[:, 0],
}
NOT_LINEAR: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": functional.relu,
    "written out": lambda h: torch.where(h > 0, h, 0 * h),
    "product": lambda h: h * h,
    "divisor": lambda h: 1 / (h + 10),
    "max pooling": lambda h: functional.max_pool1d(h[:, None], 3, 1, 1)[:, 0],
    "largest": lambda h: h.amax(-1, keepdim=True).expand(-1, 6),
    "norm": lambda h: functional.layer_norm(h, (6,)),
    "softmax": lambda h: h.softmax(-1),
    "sorted": lambda h: h.sort(-1).values,
    "integers": lambda h: h.to(torch.int64).to(h.dtype),
    "dropout in training": lambda h: functional.dropout(h, training=True),
    "a custom function": lambda h: Squared.apply(h),
    "a unit of length 1": lambda h: functional.normalize(h),
    "clamp": lambda h: h.clamp(-1, 1),
    "rounding": torch.round,
    "a quotient that is rounded": lambda h: torch.div(h, 0.5, rounding_mode="floor"),
    "integers by the name of a type": lambda h: h.type("torch.IntTensor").to(h.dtype),
    "integers of a sum": lambda h: h + h.sum(-1, keepdim=True, dtype=torch.int64),
    "bits read as other numbers": lambda h: h.view(torch.bfloat16)[:, ::2].float(),
    "a gate in einsum": lambda h: torch.einsum("bi,bj->bj", h, h),
    "written into by an index": lambda h: written(h, lambda h: h.__setitem__(0, h[0].abs())),
    "written into by a mask": lambda h: written(h, lambda h: h.__setitem__(h < 0, 0.0)),
    "a part that is changed in place": lambda h: written(h, lambda h: h[:, :3].relu_()),
    "a part that is overwritten": lambda h: written(h, lambda h: h[:, :3].copy_(h[:, :3] ** 2)),
    "a part that is added to": lambda h: written(h, lambda h: h[:, :3].add_(h[:, :3] ** 2)),
    "a view that is changed in place": lambda h: written(h, lambda h: h.transpose(0, 1)[0].abs_()),
    "what shares its memory": lambda h: written(h, lambda h: h.detach().clamp_(min=0)),
    "several in place": lambda h: written(h, lambda h: torch._foreach_abs_([h])),
    "an output that is given": lambda h: torch.mul(h, h, out=h),
    "an activation's output that is given": lambda h: torch.clamp(h, min=0, out=h),
    "a constant that is written into": lambda h: h + written(torch.zeros_like(h), lambda z: z.copy_(h.abs())),
    "a part of a constant": lambda h: h + written(torch.zeros(9, 6), lambda z: z.__setitem__(0, h[0].abs())),
}
READS_OUT: dict[str, Callable[[Tensor], Tensor]] = {
    "a number": lambda h: h * h[0, 0].item(),
    "a truth": lambda h: h if torch.equal(h, h.abs()) else -h,
    "a complex number": lambda h: h * abs(complex(h.detach()[0, 0])),
    "a text": lambda h: h * float(f"{h[0, 0]}"),
    "how many are positive": lambda h: h * len((h > 0).nonzero()),
    "how many a mask leaves": lambda h: h * len(h[h > 0]),
    "the end of a slice": lambda h: torch.cat([h[:, : (h[0] > 0).sum()], 2 * h[:, (h[0] > 0).sum() :]], 1),
    "memory that is shared without a version": lambda h: written(h, lambda h: h.data.abs_()),
    "another memory": lambda h: written(h, lambda h: setattr(h, "data", h.abs())),
}


def written(tensor: Tensor, write: Callable[[Tensor], Any]) -> Tensor:
    """Return a tensor after something was written into it."""
    write(tensor)
    return tensor


class Squared(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x**2

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


@pytest.mark.parametrize("what", LINEAR)
def test_what_is_linear_joins_two_layers(what: str) -> None:
    (found,) = ns.check_linear(Between(LINEAR[what]), torch.randn(9, 6)).stretches
    assert found.layers == ("a", "b")
    assert found.basis == "proved"
    assert found.difference is not None
    assert found.difference < 1e-6


@pytest.mark.parametrize("what", NOT_LINEAR)
def test_what_is_not_linear_parts_two_layers(what: str) -> None:
    assert layers(Between(NOT_LINEAR[what]), torch.randn(9, 6)) == []


@pytest.mark.parametrize("what", READS_OUT)
def test_nothing_is_proved_where_numbers_are_read_out(what: str) -> None:
    found = ns.check_linear(Between(READS_OUT[what]), torch.randn(9, 6))
    assert found.reads_out
    assert [each.basis for each in found.stretches] == ["measured"] * len(found.stretches)


def test_shapes_and_types_are_not_numbers_that_are_read_out() -> None:
    assert not ns.check_linear(
        Between(lambda h: h.view(h.shape[0], len(h[0])) * h.dim() * h.is_floating_point()), torch.randn(9, 6)
    ).reads_out


def test_a_buffer_that_the_forward_writes_is_no_constant() -> None:
    class Remembers(Between):
        def __init__(self) -> None:
            super().__init__(self.add)
            self.register_buffer("last", torch.zeros(9, 6))

        def add(self, h: Tensor) -> Tensor:
            self.last[0] = h[0].abs()
            return h + self.last

    assert layers(Remembers(), torch.randn(9, 6)) == []


def test_two_layers_are_found_before_what_they_gave_is_written_into() -> None:
    class Late(Between):
        def forward(self, x: Tensor) -> Tensor:
            h = super().forward(x)
            h[0] = 0.0
            return h

    assert layers(Late(lambda h: h), torch.randn(9, 6)) == [("a", "b")]


def test_where_a_nonlinearity_lies_in_one_batch_alone_nothing_is_claimed() -> None:
    net = Between(lambda h: h if len(h) > 5 else h.abs())
    assert layers(net, [torch.randn(9, 6), torch.randn(9, 6)]) == [("a", "b")]
    assert layers(net, [torch.randn(9, 6), torch.randn(3, 6)]) == []


@pytest.mark.parametrize("what", [lambda h: h - h.mean(0), lambda h: h + h[:1], lambda h: h.flip(0)])
def test_where_examples_are_mixed_there_is_no_map_of_an_example(what: Callable[[Tensor], Tensor]) -> None:
    (found,) = ns.check_linear(Between(what), torch.randn(9, 6)).stretches
    assert (found.layers, found.inputs, found.rank, found.matrix) == (("a", "b"), -1, -1, None)


def test_a_tensor_that_is_given_twice_is_one_input() -> None:
    class Both(Between):
        def forward(self, left: Tensor, right: Tensor) -> Tensor:
            return self.b(self.a(left) + right)

    x = torch.randn(9, 6)
    (found,) = ns.check_linear(Both(lambda h: h), [{"left": x, "right": x}]).stretches
    assert found.difference is not None
    assert found.difference < 1e-6


def test_fused_attention_may_be_called_by_names() -> None:
    class ByName(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.m = nn.MultiheadAttention(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            output: Tensor = functional.multi_head_attention_forward(
                *(x, x, x),
                embed_dim_to_check=8,
                num_heads=2,
                add_zero_attn=False,
                dropout_p=0.0,
                in_proj_weight=self.m.in_proj_weight,
                in_proj_bias=self.m.in_proj_bias,
                out_proj_weight=self.m.out_proj.weight,
                out_proj_bias=self.m.out_proj.bias,
                bias_k=None,
                bias_v=None,
            )[0]
            return output

    (found,) = ns.check_linear(ByName(), torch.randn(3, 4, 8)).stretches
    assert (found.layers, found.heads, found.rank) == (("m(16:24)", "m.out_proj"), 2, 4)


def test_a_compiled_model_is_followed_in_eager_code() -> None:
    net = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6), nn.Linear(6, 6))
    x = torch.randn(9, 6)

    def fail(*_: Any) -> Any:
        raise AssertionError("compiled")

    found = ns.check_linear(torch.compile(net, backend=fail), x)
    assert found.to_dict() == ns.check_linear(net, x).to_dict()
    assert found.stretches[0].parameters == 84


def test_a_mode_of_the_user_sees_no_call_of_ours() -> None:
    class Names(TorchFunctionMode):
        def __init__(self) -> None:
            super().__init__()
            self.names: list[str] = []

        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.names.append(func.__name__)
            return func(*args, **(kwargs or {}))

    def run(model: nn.Module, x: Tensor) -> Tensor:
        output: Tensor = model(x)
        return output

    net, x = Between(lambda h: h * 2), torch.randn(9, 6)
    with Names() as alone:
        net(x)
    forward = LinearLayersOfForward(net)
    with Names() as seen:
        forward.of(run, x)
    assert forward.notes()
    assert seen.names == alone.names


def test_nothing_is_claimed_in_inference_mode_where_no_writes_are_counted() -> None:
    def run(model: nn.Module, x: Tensor) -> Tensor:
        with torch.inference_mode():
            output: Tensor = model(x)
            return output

    assert ns.check_linear(Between(lambda h: h), torch.randn(9, 6), forward=run).stretches == ()


@pytest.mark.parametrize("method", ["begin", "note_writes", "follow", "end"])
def test_an_error_of_our_own_does_not_end_a_scan(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise KeyError("ours")

    monkeypatch.setattr(f"neuronscope.linear.affine_flow.AffineFlow.{method}", fail)
    with pytest.warns(ns.NeuronscopeWarning, match="no nonlinearity lies were not looked for") as warned:
        report = ns.scan(nn.Sequential(nn.Linear(3, 3), nn.ReLU()), torch.randn(5, 3))
    assert report.neurons == 3
    assert len(warned) == 1


def test_a_norm_of_the_running_statistics_folds_and_one_of_the_batch_does_not() -> None:
    net = nn.Sequential(
        nn.Linear(4, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 4)
    )
    found = ns.check_linear(net, torch.randn(9, 4))
    assert [each.layers for each in found.stretches if each.only_folds] == [("0", "1")]
    assert [each.layers for each in found.stretches if not each.only_folds] == []


_STACK = st.lists(st.sampled_from(["linear", "relu", "gelu", "dropout", "identity", "norm"]), min_size=1, max_size=9)


@given(_STACK)
@settings(max_examples=60, deadline=None)
def test_a_random_stack_is_cut_at_its_nonlinear_modules(kinds: list[str]) -> None:
    made: dict[str, Callable[[], nn.Module]] = {
        "linear": lambda: nn.Linear(4, 4),
        "relu": nn.ReLU,
        "gelu": nn.GELU,
        "dropout": nn.Dropout,
        "identity": nn.Identity,
        "norm": lambda: nn.LayerNorm(4),
    }
    net = nn.Sequential(nn.Linear(4, 4), *(made[kind]() for kind in kinds))
    with torch.no_grad():
        for module in net:
            if isinstance(module, nn.Linear):
                module.bias.zero_()  # so that a unit is on for some examples and off for others
    runs: list[tuple[str, ...]] = [("0",)]
    for place, kind in enumerate(kinds, start=1):
        if kind == "linear":
            runs[-1] = (*runs[-1], str(place))
        elif kind in ("relu", "gelu", "norm"):
            runs.append(())
    found = ns.check_linear(net, torch.cat([x := torch.randn(40, 4), -x]))
    if not found.acting_linear:  # a ReLU behind a ReLU changes nothing
        assert [each.layers for each in found.stretches] == [run for run in runs if len(run) > 1]


def test_a_report_of_a_scan_names_them() -> None:
    net = nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 2))
    notes = ns.scan(net, torch.randn(32, 8)).notes
    assert any("No nonlinearity lies between 0 → 1" in note for note in notes)
    net = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 2))
    assert not any("No nonlinearity" in note for note in ns.scan(net, torch.randn(32, 8)).notes)


def test_a_report_says_where_an_activation_did_nothing() -> None:
    first = nn.Linear(8, 16)
    net = nn.Sequential(first, nn.ReLU(), nn.Linear(16, 2))
    first.bias.data += 100
    notes = ns.scan(net, torch.randn(400, 8)).notes
    assert any(note.startswith("Every neuron of 0/relu was always on") for note in notes)
    first.bias.data -= 100
    assert not any("was always on" in note for note in ns.scan(net, torch.randn(400, 8)).notes)


def test_the_model_is_as_before() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).train()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    data = torch.randn(6, 4)
    random = torch.get_rng_state()
    ns.check_linear(net, data)
    assert net.training
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert all(parameter.grad is None for parameter in net.parameters())


def test_text_and_json_say_it() -> None:
    net = nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 2))
    found = ns.check_linear(net, torch.randn(32, 8))
    assert "`0` → `1` are one linear map of the input. 8 → 16, rank 4: 116 parameters" in str(found)
    assert "Proved: no function between them is nonlinear" in str(found)
    assert '"layers": [\n        "0",\n        "1"\n      ]' in found.to_json()


def test_no_batch_is_an_error() -> None:
    with pytest.raises(UsageError, match="at least one batch"):
        ns.check_linear(nn.Linear(2, 2), [])
