"""Torch runs attention and encoder layers in fused kernels, which hooks and modes would switch off: we do not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import neuronscope as ns
from tests.agreement.slow_twin import assert_bits, hook_tables

pytestmark = pytest.mark.filterwarnings(
    "ignore:The PyTorch API of nested tensors is in prototype stage", "ignore:enable_nested_tensor is True"
)
PADDING = torch.arange(5) >= torch.tensor([4, 5, 2])[:, None]
KERNELS = ("_transformer_encoder_layer_fwd", "_native_multi_head_attention")


def encoder_layer(**options: Any) -> nn.TransformerEncoderLayer:
    return nn.TransformerEncoderLayer(16, 2, 32, **{"batch_first": True, "dropout": 0.0, **options})


class Attention(nn.Module):
    """Attention alone, as in a decoder or a vision transformer."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 2, **{"batch_first": True, **options})

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


class Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerDecoderLayer(16, 2, 32, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x, x.flip(1))


class Layers(nn.Module):
    """Layers in a list, with functional activations between them, given by keyword."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([encoder_layer(), encoder_layer(activation=nn.GELU())])
        self.fc = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = F.relu(self.fc(layer(src=x)))
        return x


class Padded(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.encoder = nn.TransformerEncoder(encoder_layer(**options), 2, norm=nn.LayerNorm(16))

    def forward(self, x: Tensor) -> Tensor:
        batch_first = self.encoder.layers[0].self_attn.batch_first
        return self.encoder(x, src_key_padding_mask=PADDING if batch_first else PADDING.T)


class OwnLayer(nn.TransformerEncoderLayer):
    """A subclass that adds something to what its base class does."""

    def forward(self, src: Tensor, **options: Any) -> Tensor:
        return super().forward(src, **options) + 1


class OtherParts(nn.TransformerEncoderLayer):
    """A subclass with another attention, no norms, and a forward of its own."""

    def __init__(self) -> None:
        super().__init__(16, 2, 32, batch_first=True)
        self.self_attn = nn.Linear(16, 16)  # type: ignore[assignment]
        del self.norm1, self.norm2

    def forward(self, src: Tensor, **options: Any) -> Tensor:
        return src + self.linear2(F.relu(self.linear1(self.self_attn(src))))


#: Networks, and whether torch fuses anything in them.
NETWORKS: dict[str, tuple[Callable[[], nn.Module], bool]] = {
    "attention": (Attention, True),
    "attention without bias": (lambda: Attention(bias=False), False),
    "attention, time first": (lambda: Attention(batch_first=False), False),
    "decoder layer": (Decoder, True),
    "encoder layer": (encoder_layer, True),
    "encoder layer, norm first": (lambda: encoder_layer(norm_first=True), True),
    "encoder layer, GELU module": (lambda: encoder_layer(activation=nn.GELU()), True),
    "encoder layer, SiLU module": (lambda: encoder_layer(activation=nn.SiLU()), True),  # its attention alone
    "encoder layer, time first": (lambda: encoder_layer(batch_first=False), False),
    "encoder layer, subclass": (lambda: OwnLayer(16, 2, 32, batch_first=True), True),
    "encoder layer, other parts": (OtherParts, False),
    "encoder": (lambda: nn.TransformerEncoder(encoder_layer(), 2), True),
    "encoder, padded": (Padded, True),
    "encoder, padded, norm first": (lambda: Padded(norm_first=True), True),
    "encoder, padded, time first": (lambda: Padded(batch_first=False), False),
    "layers in a list": (Layers, True),
}


def built(name: str) -> nn.Sequential:
    """The network behind a layer with an activation."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 16), nn.ReLU(), NETWORKS[name][0]()).eval()


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The fused kernels that torch called."""
    calls: list[str] = []

    def spy(name: str) -> Callable[..., Any]:
        kernel = getattr(torch, name)

        def call(*args: Any) -> Any:
            calls.append(name)
            return kernel(*args)

        return call

    for name in KERNELS:
        monkeypatch.setattr(torch, name, spy(name))
    return calls


@pytest.mark.parametrize("options", [{}, {"every_n_steps": 2}, {"every_n_steps": 1000}], ids=str)
@pytest.mark.parametrize("name", NETWORKS)
def test_a_watched_network_takes_the_fused_kernels_of_an_unwatched_one(
    name: str, options: dict[str, int], fused: list[str]
) -> None:
    model = built(name)
    x = torch.randn(3, 5, 16)
    with torch.no_grad():
        alone = model(x)
        expected = fused.copy()
        before = hook_tables(model)
        with ns.watch(model, **options) as scope:
            for _ in range(3):
                fused.clear()
                assert torch.equal(model(x), alone)
                assert fused == expected
                scope.step()
            assert scope._hooks.failure is None
        assert hook_tables(model) == before
    assert bool(expected) == NETWORKS[name][1]


@pytest.mark.parametrize("name", NETWORKS)
def test_what_is_not_fused_is_counted_and_what_is_fused_is_listed(name: str, fused: list[str]) -> None:
    model = built(name)
    with torch.no_grad(), ns.watch(model) as scope:
        model(torch.randn(3, 5, 16))
    counted = [site for site in scope.census("inference") if "linear1" in site]
    listed = [item.name for item in scope.report().not_measured if "linear1" in item.name]
    layers = sum(isinstance(module, nn.TransformerEncoderLayer) for module in model.modules())
    whole = fused.count("_transformer_encoder_layer_fwd")
    if isinstance(model[2], Decoder):
        layers += 1
    assert (len(counted), len(listed)) == (layers - whole, whole)
    assert not any("did not run" in item.reason for item in scope.report().not_measured)


@pytest.mark.parametrize("name", NETWORKS)
def test_with_gradients_or_in_training_nothing_is_fused_and_all_is_counted(name: str) -> None:
    model = built(name)
    kinds = (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)
    layers = sum(isinstance(module, kinds) for module in model.modules())
    with ns.watch(model) as scope:
        for training in (False, True):
            model.train(training)
            model(torch.randn(3, 5, 16)).sum().backward()
            scope.step()
    census = scope.census("train")
    assert [tally.positions for site, tally in census.items() if "linear1" in site] == [2 * 15] * layers
    assert not scope.report().not_measured


def test_a_frozen_layer_is_fused_with_gradients_on_unless_its_input_needs_one(fused: list[str]) -> None:
    layer = encoder_layer().eval().requires_grad_(False)
    x = torch.randn(3, 5, 16)
    alone = layer(x)
    with ns.watch(layer) as scope:
        assert torch.equal(layer(x), alone)
        assert fused == [KERNELS[0]] * 2
        assert not scope.census("train")
        layer(x.requires_grad_()).sum().backward()
        scope.step()
    assert fused == [KERNELS[0]] * 2
    assert scope.census("train")["linear1/relu"].positions == 15


@pytest.mark.parametrize("teacher", ["attention", "encoder layer", "encoder", "encoder, padded", "layers in a list"])
@pytest.mark.parametrize("averaged", [False, True], ids=["frozen", "moving average"])
def test_a_student_of_a_fused_teacher_gets_the_weights_of_an_unwatched_run(teacher: str, averaged: bool) -> None:
    class Distillation(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.teacher = built(teacher)
            self.student = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))

        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                goal = self.teacher(x)
            return F.mse_loss(F.relu(self.student(x)), goal)

    def train(watched: bool) -> dict[str, Tensor]:
        model = Distillation()
        torch.manual_seed(1)
        optimizer = torch.optim.Adam(model.student.parameters(), 0.05)
        scope = ns.watch(model) if watched else None
        for _ in range(10):
            optimizer.zero_grad()
            model(torch.randn(3, 5, 16)).backward()
            optimizer.step()
            if averaged:
                with torch.no_grad():
                    next(model.teacher.parameters()).mul_(0.99)
            if scope is not None:
                scope.step()
        if scope is not None:
            assert scope._hooks.failure is None
            census = scope.census("train")
            assert {census[name].positions for name in ("student.0/relu", "student.2/relu")} == {150}
            scope.detach()
        return model.state_dict()

    assert_bits(train(False), train(True))


def test_functions_after_a_fused_layer_are_counted_with_its_units() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.layer, self.attention = nn.Linear(16, 16), encoder_layer(), Attention()

        def forward(self, x: Tensor) -> Tensor:
            x = F.gelu(self.layer(F.silu(self.stem(x))))
            return torch.tanh(self.attention(x)).sum()

    model = Net().eval()
    with torch.no_grad(), ns.watch(model) as scope:
        model(torch.randn(3, 5, 16))
    assert {name: tally.positions for name, tally in scope.census("inference").items()} == {
        "stem/silu": 15,
        "layer.norm2/gelu": 15,
        "attention.attention.out_proj/tanh": 15,
    }
    assert [site.name for site in scope.report().layers if not site.in_headlines] == [
        "attention.attention.out_proj/tanh"
    ]


def test_two_watches_of_one_network_leave_its_fused_kernels(fused: list[str]) -> None:
    model = built("layers in a list")
    x = torch.randn(3, 5, 16)
    before = hook_tables(model)
    with torch.no_grad():
        alone = model(x)
        with ns.watch(model) as first, ns.watch(model) as second:
            assert torch.equal(model(x), alone)
            assert [scope.census("inference")["2.fc/relu"].positions for scope in (first, second)] == [30, 30]
    assert fused == [KERNELS[0]] * 4
    assert hook_tables(model) == before


def test_a_users_hook_or_mode_switches_a_fused_kernel_off_as_ever_and_its_activation_is_counted(
    fused: list[str],
) -> None:
    model = built("encoder layer")
    x = torch.randn(3, 5, 16)
    with torch.no_grad(), ns.watch(model) as scope:
        handle = model[2].dropout.register_forward_hook(lambda *call: None)
        model(x)
        handle.remove()
        with torch.device("cpu"):
            model(x)
        assert KERNELS[0] not in fused
        assert scope.census("inference")["2.linear1/relu"].positions == 30
        model(x)
    assert KERNELS[0] in fused


@pytest.mark.parametrize("error", [ArithmeticError, KeyboardInterrupt])
def test_a_fused_call_that_fails_leaves_hooks_and_counts_as_they_were(
    error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any) -> None:
        raise error

    model = built("layers in a list")
    x = torch.randn(3, 5, 16)
    before = hook_tables(model)
    with ns.watch(model) as scope, torch.no_grad():
        watched = hook_tables(model)
        with monkeypatch.context() as patch, pytest.raises(error):
            patch.setattr(torch, KERNELS[0], fail)
            model(x)
        model(x)
        assert hook_tables(model) == watched
        assert not torch.nn.modules.module._global_forward_hooks
        assert scope.census("inference")["2.fc/relu"].positions == 30
    assert hook_tables(model) == before
    assert torch.overrides._len_torch_function_stack() == 0


def test_a_scan_sees_what_a_fused_kernel_would_hide() -> None:
    model = built("layers in a list")
    report = ns.scan(model, torch.randn(300, 5, 16))
    assert {site.name for site in report.layers} >= {"2.layers.0.linear1/relu", "2.layers.1.linear1/gelu"}
    assert not report.not_measured
    assert torch.backends.mha.get_fastpath_enabled()
