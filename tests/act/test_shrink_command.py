"""``neuronscope shrink`` writes a smaller checkpoint that loads, or nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from neuronscope.act.widths import set_widths
from neuronscope.checkpoints.shrink_checkpoint import shrink_checkpoint
from neuronscope.cli import main
from tests.act.llama import small_llama

MODULE = """
import torch
from torch import nn

def network():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)).double()
    with torch.no_grad():
        net[0].weight[1], net[0].bias[1] = 0, -1
    return net

def healthy():
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2)).double()

class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.out = nn.Linear(4, 4).double(), nn.Linear(4, 2).double()
    def forward(self, x):
        return self.out(torch.relu(self.a(x)) + x)

def data():
    torch.manual_seed(1)
    yield torch.randn(200, 4).double()
    yield torch.randn(120, 4).double()

def failing():
    raise RuntimeError("no disk")
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> str:
    """A folder with a module of the user's, whose name it returns, and a checkpoint."""
    monkeypatch.chdir(tmp_path)
    name = f"mine_{abs(hash(request.node.nodeid))}"
    (tmp_path / f"{name}.py").write_text(MODULE)
    scope: dict[str, object] = {}
    exec(MODULE, scope)
    for maker in ("network", "healthy"):
        torch.save(scope[maker]().state_dict(), f"{maker}.pt")  # type: ignore[operator]
    residual = scope["Residual"]().double()  # type: ignore[operator]
    with torch.no_grad():
        residual.a.weight[2], residual.a.bias[2] = 0, -1
    torch.save(residual.state_dict(), "residual.pt")
    return name


@pytest.mark.parametrize("out", ["small.pt", "small.safetensors"])
def test_the_smaller_checkpoint_loads_and_computes_the_same(
    here: str, out: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--model", f"{here}:network", "--data", f"{here}:data", "--out", out]
    assert main(["shrink", "network.pt", *arguments]) == 0
    text = capsys.readouterr().out
    assert "1 neuron taken out of 1 layer: 44 → 37 parameters." in text
    assert f"Wrote {out}, and the new widths beside it: small-widths.json." in text
    record = json.loads(Path("small-widths.json").read_text())
    assert record["removed"] == {"0/relu": [1]}
    assert record["layers"]["0"] == {"in_features": 4, "out_features": 5, "bias": True}
    original = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)).double()
    small = set_widths(nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)).double(), record["layers"])
    small.load_state_dict(torch.load(out) if out.endswith(".pt") else load_file(out))
    original.load_state_dict(torch.load("network.pt"))
    x = torch.randn(50, 4).double()
    torch.testing.assert_close(small(x), original(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("checkpoint", "model", "data", "out", "reason"),
    [
        ("healthy.pt", "healthy", "data", "small.pt", "none is dead on the data: nothing was written"),
        ("residual.pt", "Residual", "data", "small.pt", "must stay: "),
        ("network.pt", "network", "failing", "small.pt", "no disk"),
        ("network.pt", "network", "data", "no/small.pt", "there is no folder"),
        ("network.pt", "healthy", "missing", "small.pt", "has no 'missing'"),
        ("none.pt", "network", "data", "small.pt", "none.pt"),
        ("network.pt", "network", "data", "network.pt", "network.pt is of the checkpoint"),
        (".", "network", "data", "network.pt", "network.pt is of the checkpoint"),
    ],
)
def test_nothing_is_written_where_it_cannot_be_done(
    here: str, checkpoint: str, model: str, data: str, out: str, reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.read_bytes() for path in Path().rglob("*.*")}
    arguments = ["--model", f"{here}:{model}", "--data", f"{here}:{data}", "--out", out]
    assert main(["shrink", checkpoint, *arguments]) == 2
    error = capsys.readouterr().err
    assert reason in error
    assert len(error.splitlines()) == 1
    assert {path: path.read_bytes() for path in Path().rglob("*.*") if path.suffix != ".pyc"} == before


def test_a_hugging_face_folder_gets_a_config_where_every_layer_allows_one_width(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    monkeypatch.chdir(tmp_path)
    model = small_llama()
    with torch.no_grad():
        model.model.layers[0].mlp.gate_proj.weight[[5, 6]] = 0  # relu(0) is 0 for every input
        model.model.layers[1].mlp.gate_proj.weight[[7, 8, 9]] = 0
    model.save_pretrained("whole")
    data = [{"input_ids": torch.randint(0, 50, (300, 3))}]
    shrunk = shrink_checkpoint("whole", "whole", data, "small.safetensors")
    assert list(shrunk.kept.values()) == [1]
    built = LlamaForCausalLM(LlamaConfig.from_json_file("small-config.json")).eval()
    assert built.config.intermediate_size == 22
    built.load_state_dict(load_file("small.safetensors"))
    with torch.no_grad():
        torch.testing.assert_close(built(**data[0]).logits, model(**data[0]).logits, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        model.model.layers[0].mlp.gate_proj.weight.normal_()  # no neuron of this layer is dead
    model.save_pretrained("other")
    shrink_checkpoint("other", "other", data, "uneven.safetensors")
    assert Path("uneven-widths.json").exists()
    assert not Path("uneven-config.json").exists()
