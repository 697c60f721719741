"""Record, weights, optimizer and data of one unit of a layer are joined, and no neuron is counted twice."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import neuronscope as ns

ROWS = (nn.Linear, nn.Conv2d)


class PoolBetween(nn.Module):
    """A convolution, pooling and its norm: one set of 6 neurons."""

    def __init__(self) -> None:
        super().__init__()
        # The names are sorted as safetensors sorts them: the norm comes before its convolution.
        self.a_norm, self.b_conv, self.c_out = nn.BatchNorm2d(6), nn.Conv2d(1, 6, 3), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.a_norm(F.max_pool2d(self.b_conv(x.view(-1, 1, 4, 4)), 2)))
        return self.c_out(x.flatten(1))


class Around(nn.Module):
    """A network with another one inside."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.net(x)
        return result


class SharedHead(nn.Module):
    """One layer over two levels of features."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head, self.out = nn.Linear(16, 8), nn.Linear(8, 5), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.first(x))
        return self.out(F.relu(self.head(h)) + F.relu(self.head(h * 0.5)))


class Gated(nn.Module):
    """A gate and its product are one neuron; the other factor has rows of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(16, 7), nn.Linear(16, 7), nn.Linear(7, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.relu(self.gate(x)) * self.up(x))


class TwoSigns(nn.Module):
    """Both signs of a layer go through a ReLU: 4 neurons, seen twice."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.out = nn.Linear(16, 4), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.fc(x)
        return self.out(torch.cat((F.relu(h), F.relu(-h)), 1))


class Joined(nn.Module):
    """The units of two layers go through one ReLU."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.out = nn.Linear(16, 4), nn.Linear(16, 3), nn.Linear(7, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.relu(torch.cat((self.a(x), self.b(x)), 1)))


class Residual(nn.Module):
    """A norm of a sum: its 8 units are not those of the layer before the sum."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.norm, self.out = nn.Linear(16, 8), nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        return self.out(F.relu(self.norm(h + self.b(F.relu(h)))))


NETWORKS: list[tuple[Callable[[], nn.Module], dict[str, tuple[int, ...]]]] = [
    (PoolBetween, {"a_norm": (1, 4)}),
    (SharedHead, {"first": (2,), "head": (0, 3)}),
    (Gated, {"gate": (5, 6)}),
    (Joined, {"a": (1,), "b": (0, 2)}),
    (Residual, {"norm": (3,)}),
]


def rows(model: nn.Module) -> int:
    """The output rows of all layers with weights; norms add none unless they normalise a sum."""
    return sum(module.weight.shape[0] for module in model.modules() if isinstance(module, ROWS))


def saved(make: Callable[[], nn.Module], dead: dict[str, tuple[int, ...]], folder: Path) -> tuple[Path, Tensor]:
    """A watched run whose neurons ``dead`` are held far below zero, saved with its record and its optimizer."""
    torch.manual_seed(0)
    model, data = make(), torch.rand(400, 16)
    for layer, neurons in dead.items():
        model.get_submodule(layer).bias.data[list(neurons)] = -100.0
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-5)
    with ns.watch(model) as scope:
        for batch in data.split(100) * 40:
            optimizer.zero_grad()
            model(batch).sum().backward()
            optimizer.step()
            scope.step()
    torch.save(
        {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "neuronscope": scope.state_dict()},
        folder / "last.pt",
    )
    return folder / "last.pt", data


@pytest.mark.parametrize(("make", "dead"), NETWORKS, ids=[make.__name__ for make, _ in NETWORKS])
@pytest.mark.parametrize("level", ["file", "model", "data"])
def test_every_unit_is_counted_once_at_every_level(
    make: Callable[[], nn.Module], dead: dict[str, tuple[int, ...]], level: str, tmp_path: Path
) -> None:
    path, data = saved(make, dead, tmp_path)
    report = ns.postmortem(path, None if level == "file" else make, data if level == "data" else None)
    of_its_own = 8 if make is Residual else 0  # the norm of a sum
    # With the model it is known which layers lead to an activation, as in a watched run. In the file alone the last
    # layer is taken for the outputs, of which there are two.
    hidden = ns.scan(make(), data).neurons
    assert report.neurons == (rows(make()) + of_its_own - 2 if level == "file" else hidden)
    for layer, neurons in dead.items():
        assert set(neurons) <= set(report[layer].dead_mask.nonzero()[0].tolist())
        sources = {one.source for one in report[layer].evidence}
        assert {"monitor record"} <= sources
        assert level != "data" or {"monitor record", "scan"} <= sources
    assert len({layer.name for layer in report.layers}) == len(report.layers)


def test_record_weights_optimizer_and_data_speak_of_one_layer(tmp_path: Path) -> None:
    path, data = saved(PoolBetween, {"a_norm": (1, 4)}, tmp_path)
    report = ns.postmortem(path, PoolBetween, data)
    assert [layer.name for layer in report.layers] == ["a_norm", "c_out"]
    layer = report["a_norm"]
    assert layer.sites == ("a_norm/relu",)
    assert report["a_norm/relu"] is layer
    assert {"monitor record", "adam state", "scan"} <= {one.source for one in layer.evidence}


def test_a_unit_that_is_dead_at_one_of_its_activations_counts_as_in_the_report_of_the_run(tmp_path: Path) -> None:
    model, data = TwoSigns(), torch.rand(400, 16)
    model.fc.bias.data[[0, 2]] = -100.0
    torch.save(model.state_dict(), tmp_path / "net.pt")
    report, scanned = ns.postmortem(tmp_path / "net.pt", TwoSigns, data), ns.scan(model, data)
    h = model.fc(data)
    truth = ((h <= 0).all(0) | (h >= 0).all(0)).nonzero().flatten().tolist()
    assert {0, 2} <= set(truth)
    assert report["fc"].dead_mask.nonzero()[0].tolist() == truth
    assert (report.neurons, scanned.neurons, scanned.dead) == (4, 4, len(truth))
    assert report.contested == 0


def test_a_model_without_the_prefix_of_the_checkpoint_has_the_same_layers(tmp_path: Path) -> None:
    path, data = saved(lambda: Around(SharedHead()), {"net.head": (0, 3)}, tmp_path)
    report = ns.postmortem(path, SharedHead, data)
    assert report.neurons == rows(SharedHead()) - 2
    assert {0, 3} <= set(report["head"].dead_mask.nonzero()[0].tolist())
    assert {"monitor record", "adam state", "scan"} <= {one.source for one in report["head"].evidence}


def whole() -> Around:
    return Around(PoolBetween())


@pytest.mark.parametrize("watched", ["the whole", "the part"])
@pytest.mark.parametrize("model", [None, whole, PoolBetween])
def test_the_record_of_a_network_is_joined_with_the_weights_of_its_part_or_of_its_whole(
    watched: str, model: Callable[[], nn.Module] | None, tmp_path: Path
) -> None:
    whole_is_watched = watched == "the whole"
    path, _ = saved(whole if whole_is_watched else PoolBetween, {}, tmp_path)
    record = torch.load(path, weights_only=True)["neuronscope"]
    other: nn.Module = PoolBetween() if whole_is_watched else whole()
    torch.save({"model": other.state_dict(), "neuronscope": record}, tmp_path / "other.pt")
    report = ns.postmortem(tmp_path / "other.pt", model)
    name = "a_norm" if (other if model is None else model()).__class__ is PoolBetween else "net.a_norm"
    assert [layer.name for layer in report.layers if layer.sites] == [name]
    assert (report[name].neurons, report[name].sites) == (report.neurons, (f"{name}/relu",))
    assert "monitor record" in {one.source for one in report[name].evidence}


def test_a_record_that_fits_two_networks_of_a_file_is_joined_with_neither(tmp_path: Path) -> None:
    path, _ = saved(PoolBetween, {}, tmp_path)
    record = torch.load(path, weights_only=True)["neuronscope"]
    both = nn.ModuleDict({"one": PoolBetween(), "other": PoolBetween()})
    torch.save({"model": both.state_dict(), "neuronscope": record}, tmp_path / "both.pt")
    assert "a_norm" in [layer.name for layer in ns.postmortem(tmp_path / "both.pt").layers]


def test_a_record_of_a_wider_layer_is_not_taken_for_the_layer_of_the_file(tmp_path: Path) -> None:
    def make(width: int) -> nn.Module:
        return nn.Sequential(nn.Linear(16, width), nn.ReLU(), nn.Linear(width, 2))

    wide, _ = saved(lambda: make(9), {"0": (8,)}, tmp_path)
    record = torch.load(wide, weights_only=True)["neuronscope"]
    torch.save({"model": make(5).state_dict(), "neuronscope": record}, tmp_path / "other.pt")
    report = ns.postmortem(tmp_path / "other.pt")
    assert {layer.name: layer.neurons for layer in report.layers} == {"0": 5, "2": 2, "0/relu": 9}


def test_a_site_whose_axis_is_assumed_is_in_no_total(tmp_path: Path) -> None:
    class Lost(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.act, self.out = nn.Linear(16, 6), nn.ReLU(), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            h = self.fc(x).reshape(-1, 4)  # cuts units and positions in one group
            return self.out(self.act(h - 100.0))

    data = [torch.rand(60, 16) for _ in range(10)]
    torch.save(Lost().state_dict(), tmp_path / "lost.pt")
    report = ns.postmortem(tmp_path / "lost.pt", Lost, data)
    assert not report["act"].in_headlines
    assert (report["act"].neurons, report["act"].dead) == (4, 4)
    assert (report.neurons, report.dead, report.collapsed) == (6, 0, ())
    assert report["out"].left_out == "output"  # which layer the activation follows is not known, but for its place
    assert "act is not in the totals" in str(report)
    assert report.to_dict()["summary"]["neurons"] == 6


class Attention(nn.Module):
    """A block of attention and of two layers, as transformers call them."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(4, 4) for _ in range(4))
        self.up_proj, self.down_proj, self.lm_head = nn.Linear(4, 6), nn.Linear(6, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = x.unflatten(1, (4, 4))
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        x = x + self.o_proj(nn.functional.scaled_dot_product_attention(q, k, v))
        x = x + self.down_proj(nn.functional.relu(self.up_proj(x)))
        result: Tensor = self.lm_head(x.mean(1))
        return result


@pytest.mark.parametrize("with_model", [False, True])
def test_projections_and_outputs_dilute_no_share(with_model: bool, tmp_path: Path) -> None:
    """Three of the six hidden neurons have rows of zeros and a bias below zero: half of them."""
    torch.manual_seed(0)
    model = Attention()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-5)
    with torch.no_grad():
        model.up_proj.weight[:3] = 0
        model.up_proj.bias[:3] = -1
    for _ in range(300):
        optimizer.zero_grad()
        model(torch.rand(50, 16)).sum().backward()
        optimizer.step()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "net.pt")
    report = ns.postmortem(
        tmp_path / "net.pt", Attention if with_model else None, example="1x16" if with_model else None
    )
    assert (report.neurons, report.dead) == (6, 3)
    reason = "no activation follows" if with_model else "taken for the network's outputs"
    assert reason in " ".join(str(report).split())
    assert report["lm_head"].left_out == ("no activation" if with_model else "output")


def test_the_rows_of_a_network_that_nothing_tells_apart_all_count(tmp_path: Path) -> None:
    torch.save(nn.Linear(4, 3).state_dict(), tmp_path / "one.pt")
    assert ns.postmortem(tmp_path / "one.pt").neurons == 3


def test_an_output_that_is_not_finite_is_reported_though_it_is_in_no_total(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    model[2].bias.data[1] = torch.nan
    torch.save(model.state_dict(), tmp_path / "net.pt")
    report = ns.postmortem(tmp_path / "net.pt")
    assert (report.neurons, report.not_finite) == (3, 1)
    assert "NOT FINITE: 1 neuron" in str(report)


@pytest.mark.parametrize("shared", [False, True])
def test_each_network_of_a_file_has_outputs_of_its_own(shared: bool, tmp_path: Path) -> None:
    """An encoder whose rows the head reads has none."""
    heads = {"actor": nn.Linear(12, 2), "critic": nn.Linear(12, 1)}
    bodies = {name: nn.Sequential(nn.Linear(4, 12), nn.ReLU(), head) for name, head in heads.items()}
    shared_body = {"body": nn.Sequential(nn.Linear(4, 12), nn.ReLU()), "head": heads["actor"]}
    networks = {name: net.state_dict() for name, net in (shared_body if shared else bodies).items()}
    torch.save({"net": networks, "step": 3}, tmp_path / "agent.pt")
    assert ns.postmortem(tmp_path / "agent.pt").neurons == (12 if shared else 24)
