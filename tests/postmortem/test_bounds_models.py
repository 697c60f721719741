"""Getting the network: every way to name it, weights loaded strictly, errors in one plain sentence; and confirming."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from neuronscope.checkpoints.checkpoint import Checkpoint
from neuronscope.checkpoints.data.measure import contradictions, measure
from neuronscope.checkpoints.model.examine_model import examine_model
from neuronscope.checkpoints.model.load_model import build_model
from neuronscope.checkpoints.user_code import load_named
from neuronscope.checkpoints.verdict.evidence import Evidence
from neuronscope.errors import CheckpointError, UsageError


class Stored:
    """A stored tensor that says when it is read."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor.detach()
        self.reads = 0

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)

    @property
    def dtype(self) -> str:
        return str(self.tensor.dtype).removeprefix("torch.")

    def read(self) -> Tensor:
        self.reads += 1
        return self.tensor.clone()


def checkpoint_of(state: Mapping[str, Tensor], prefix: str = "", **more: Any) -> Checkpoint:
    return Checkpoint(
        Path("run/last.ckpt"), "test", {prefix + name: Stored(tensor) for name, tensor in state.items()}, **more
    )


def small(bias: bool = True) -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 3, bias=bias), nn.BatchNorm1d(3), nn.ReLU(), nn.Linear(3, 2))


class Built(nn.Module):
    """Says on what device it was built."""

    def __init__(self, width: int = 3) -> None:
        super().__init__()
        self.fc = nn.Linear(4, width)
        self.built_on = self.fc.weight.device.type

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x).relu()


class Holder(nn.Module):
    """As a LightningModule holds its network."""

    def __init__(self) -> None:
        super().__init__()
        self.model = small()

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)


class Unsaved(nn.Module):
    """Has a buffer that no checkpoint keeps."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(2, 2)
        self.register_buffer("steps", torch.arange(2.0), persistent=False)


class Shares(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head, self.embed = nn.Linear(4, 5, bias=False), nn.Embedding(5, 4)
        self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.embed(x).relu())


def assert_holds(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    own = model.state_dict()
    assert set(own) == set(state)
    assert all(torch.equal(own[name], state[name]) for name in state)
    assert not model.training


def test_a_module_is_loaded_with_the_checkpoint() -> None:
    state = small().state_dict()
    model = small()
    assert build_model(model, checkpoint_of(state)) is model
    assert_holds(model, state)


@pytest.mark.parametrize("prefix", ["", "model.", "net.backbone."])
def test_a_prefix_of_names_in_model_or_checkpoint_is_ignored(prefix: str) -> None:
    state = small().state_dict()
    assert_holds(build_model(small(), checkpoint_of(state, prefix)), state)
    held = build_model(Holder(), checkpoint_of(state))
    assert_holds(held.model, state)


def test_a_factory_builds_without_memory_and_each_tensor_is_read_once() -> None:
    state = Built().state_dict()
    checkpoint = checkpoint_of(state)
    model = build_model(Built, checkpoint)
    assert model.built_on == "meta"
    assert_holds(model, state)
    assert [stored.reads for stored in checkpoint.tensors.values()] == [1, 1]
    assert model.fc.weight.requires_grad


def test_hyperparameters_of_the_checkpoint_are_given_to_a_class() -> None:
    state = Built(7).state_dict()
    kept = {"width": 7, "_instantiator": "not an argument of it"}
    assert_holds(build_model(Built, checkpoint_of(state, hyperparameters=kept)), state)

    class Picky(Built):
        def __init__(self, width: int, depth: int) -> None:
            super().__init__(width)

    with pytest.raises(
        UsageError, match=r"Picky` to build a network with the checkpoint's hyperparameters \['width'\].*'depth'"
    ):
        build_model(Picky, checkpoint_of(state, hyperparameters=kept))

    class Greedy(Built):
        def __init__(self, **settings: Any) -> None:
            super().__init__(settings["width"])
            assert settings == kept

    assert_holds(build_model(Greedy, checkpoint_of(state, hyperparameters=kept)), state)


def test_a_network_with_numbers_that_are_not_saved_is_built_with_memory() -> None:
    model = build_model(Unsaved, checkpoint_of(Unsaved().state_dict()))
    assert model.steps.tolist() == [0.0, 1.0]


@pytest.mark.parametrize("kept", ["head.weight", "embed.weight", "both"])
def test_shared_weights_may_be_saved_once(kept: str) -> None:
    state = {name: tensor for name, tensor in Shares().state_dict().items() if kept in (name, "both")}
    for source in (Shares, Shares()):
        model = build_model(source, checkpoint_of(state))
        assert model.head.weight is model.embed.weight
        assert torch.equal(model.head.weight, next(iter(state.values())))


def test_the_dtypes_of_the_model_are_kept() -> None:
    state = {
        name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in Built().state_dict().items()
    }
    assert build_model(Built, checkpoint_of(state)).fc.weight.dtype == torch.float32


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("0.bias"), r"1 missing \(0\.bias\)"),
        (
            lambda s: s.update({f"extra.{i}": torch.zeros(1) for i in range(5)}),
            r"5 unexpected \(extra\.0, extra\.1, extra\.2 …\)",
        ),
        (lambda s: s.update({"0.weight": torch.zeros(9, 4)}), r"1 of another shape \(0\.weight \(3, 4\) ≠ \(9, 4\)\)"),
    ],
    ids=["missing", "unexpected", "shape"],
)
def test_weights_that_do_not_fit_the_model_are_refused(change: Any, message: str) -> None:
    state = dict(small().state_dict())
    change(state)
    model = small()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=message) as caught:
        build_model(model, checkpoint_of(state))
    assert "run/last.ckpt" in str(caught.value)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())  # nothing was changed


@pytest.mark.parametrize("parametrization", ["orthogonal", "spectral_norm", "weight_norm"])
def test_a_model_with_parametrized_layers_is_loaded_as_torch_loads_it(parametrization: str) -> None:
    add = getattr(torch.nn.utils.parametrizations, parametrization)

    def factory() -> nn.Module:
        return nn.Sequential(add(nn.Linear(6, 16)), nn.ReLU(), nn.Linear(16, 1))

    saved = factory().state_dict()
    factory().load_state_dict(saved)  # torch finds nothing amiss
    built = build_model(factory, checkpoint_of(saved))
    assert all(torch.equal(tensor, saved[name]) for name, tensor in built.state_dict().items())


class OldName(nn.Module):
    """A network whose first layer had another name once, by a method or by a hook that torch calls when it loads."""

    def __init__(self, hooked: bool = False) -> None:
        super().__init__()
        self.fc, self.out = nn.Linear(3, 4), nn.Linear(4, 1)
        self.hooked = hooked
        if hooked:
            self.register_load_state_dict_pre_hook(self._rename)

    @staticmethod
    def _rename(_: nn.Module, state: dict[str, Any], prefix: str, *__: Any) -> None:
        for name in [name for name in state if name.startswith(f"{prefix}old.")]:
            state[name.replace("old.", "fc.")] = state.pop(name)

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *rest: Any) -> None:
        if not self.hooked:
            self._rename(self, state, prefix)
        super()._load_from_state_dict(state, prefix, *rest)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.out(torch.relu(self.fc(x)))
        return out


class OwnState(nn.Module):
    """A network that keeps a tensor in the checkpoint that is neither a parameter nor a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.times = nn.Linear(3, 1), 7

    def get_extra_state(self) -> torch.Tensor:
        return torch.tensor(self.times)

    def set_extra_state(self, state: torch.Tensor) -> None:
        self.times = int(state)


@pytest.mark.parametrize("hooked", [False, True])
def test_a_network_that_renames_what_is_loaded_gets_it_under_the_new_names(hooked: bool) -> None:
    saved = OldName().state_dict()
    old = {name.replace("fc.", "old."): tensor for name, tensor in saved.items()}
    for model in (OldName(hooked), lambda: OldName(hooked)):
        assert_holds(build_model(model, checkpoint_of(old)), saved)
    model = OldName(hooked)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=r"1 missing \(out.bias\)"):
        build_model(model, checkpoint_of({name: tensor for name, tensor in saved.items() if name != "out.bias"}))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())  # nothing was changed


def test_a_network_gets_the_state_of_its_own_that_a_checkpoint_holds() -> None:
    saved = OwnState()
    saved.times = 9
    built = build_model(OwnState, checkpoint_of(saved.state_dict()))
    assert isinstance(built, OwnState)
    assert built.times == 9
    assert torch.equal(built.fc.weight, saved.fc.weight)


def test_a_lazy_network_takes_its_sizes_from_the_checkpoint() -> None:
    def factory() -> nn.Module:
        return nn.Sequential(nn.LazyLinear(4), nn.LazyBatchNorm1d(), nn.ReLU(), nn.LazyLinear(2))

    saved, x = factory(), torch.randn(5, 3)
    saved(x)
    for model in (factory, factory()):
        built = build_model(model, checkpoint_of(saved.state_dict()))
        assert torch.equal(built(x), saved.eval()(x))


class Keeper:
    """An object of the user's that holds a tensor."""

    def __init__(self) -> None:
        self.shift = torch.full((2,), -3.0)


class Shifted(nn.Module):
    """A network whose checkpoint does not hold all of its tensors."""

    def __init__(self, shift: Callable[[], torch.Tensor], held: Any = None) -> None:
        super().__init__()
        self.fc = nn.Linear(2, 2)
        self.held, self._shift = held, shift

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.fc(x) + self._shift())


def _in_list() -> nn.Module:
    held = [{"a": (torch.full((2,), -3.0),)}]
    return Shifted(lambda: held[0]["a"][0], held)


def _in_closure() -> nn.Module:
    shift = torch.full((2,), -3.0)
    return Shifted(lambda: shift)


def _in_object() -> nn.Module:
    held = Keeper()
    return Shifted(lambda: held.shift, held)


def _by_numbers() -> nn.Module:
    width = int(torch.tensor([2]))
    return Shifted(lambda: torch.full((width,), -3.0))


@pytest.mark.parametrize("factory", [_in_list, _in_closure, _in_object, _by_numbers])
def test_a_network_with_tensors_that_no_checkpoint_holds_is_built_for_real(factory: Callable[[], nn.Module]) -> None:
    saved = factory().state_dict()
    built = build_model(factory, checkpoint_of(saved))
    assert torch.equal(built(torch.zeros(1, 2)), torch.relu(saved["fc.bias"] - 3)[None])


def test_a_network_is_built_without_memory_for_its_weights() -> None:
    devices = []

    def factory() -> nn.Module:
        network = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.LSTM(2, 2), nn.MultiheadAttention(2, 1))
        nn.init.kaiming_normal_(network[0].weight)
        devices.extend(parameter.device.type for parameter in network.parameters())
        return network

    saved = factory().state_dict()
    devices.clear()
    build_model(factory, checkpoint_of(saved))
    assert set(devices) == {"meta"}


def test_the_users_modules_are_found_in_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_networks_here.py").write_text(
        "from torch import nn\n"
        "def factory():\n    return nn.Sequential(nn.Linear(2, 2), nn.ReLU())\n"
        "ready = factory()\nanswer = 42\n"
        "def broken():\n    raise RuntimeError('no weights here')\n"
        "def no_network():\n    return 3\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [part for part in sys.path if part])
    state = nn.Sequential(nn.Linear(2, 2), nn.ReLU()).state_dict()
    path = list(sys.path)
    for name in ("factory", "ready"):
        assert_holds(build_model(f"my_networks_here:{name}", checkpoint_of(state)), state)
    assert sys.path == path
    for name, message in {
        "answer": "to name a function or a class, but got a int",
        "broken": "`broken` to build a network, but it gave RuntimeError: no weights here",
        "no_network": "`no_network` to give a torch.nn.Module, but it gave a int",
        "nothing": "my_networks_here has no 'nothing'",
    }.items():
        with pytest.raises(UsageError, match=message):
            build_model(f"my_networks_here:{name}", checkpoint_of(state))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nothing", "`package.module:name`, a torch.nn.Module, or a folder with a `config.json`, but got 'nothing'"),
        ("no_such_module:x", "'no_such_module' gave ModuleNotFoundError"),
        (":x", "like `package.module:name`"),
    ],
)
def test_a_wrong_name_of_a_model_is_refused(name: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        build_model(name, checkpoint_of({}))
    assert load_named("collections:abc.Mapping", "model") is Mapping


def test_a_model_is_built_from_a_hugging_face_folder(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.OPTConfig(
        hidden_size=8, ffn_dim=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=20, word_embed_proj_dim=8,
        max_position_embeddings=16,
    )  # fmt: skip
    torch.manual_seed(3)
    network = transformers.OPTForCausalLM(config)
    network.model.decoder.layers[0].fc1.bias.data[5] = -1e3
    text = json.loads(config.to_json_string(use_diff=False)) | {"architectures": ["OPTForCausalLM"]}
    (tmp_path / "config.json").write_text(json.dumps(text))
    state = dict(network.state_dict())
    state.pop("lm_head.weight")  # shared with the embedding, as transformers saves it
    for named in (tmp_path, str(tmp_path / "config.json")):
        model = build_model(named, checkpoint_of(state))
        assert_holds(model, network.state_dict())
    (dead,) = (one for one in examine_model(model).evidence if one.claim == "dead")
    assert (dead.layer, dead.source, dead.neurons.tolist()) == (
        "model.decoder.layers.0.fc1/relu",
        "layer norm bound",
        [5],
    )
    text["architectures"] = ["NoSuchNetwork"]
    (tmp_path / "config.json").write_text(json.dumps(text))
    with pytest.raises(UsageError, match=r"under `architectures`, but got \['NoSuchNetwork'\]"):
        build_model(tmp_path, checkpoint_of(state))


# --- confirming ------------------------------------------------------------------------------------------------------


def dying() -> nn.Sequential:
    """Of its neurons, 0 is dead, 1 fires always, 2 fires for x > ½, 3 fires and gets no gradient."""
    model = nn.Sequential(nn.Linear(1, 4), nn.ReLU(), nn.Linear(4, 1))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0], [1.0], [1.0], [1.0]]))
        model[0].bias.copy_(torch.tensor([-2.0, 1.0, -0.5, 1.0]))
        model[2].weight.copy_(torch.tensor([[1.0, 1.0, 1.0, 0.0]]))
    return model


def data() -> list[Tensor]:
    return [torch.linspace(0, 1, 100).view(-1, 1) for _ in range(4)]


def test_measured_evidence_equals_a_calculation_by_hand() -> None:
    evidence, abstentions, report = measure(dying(), data(), lambda output, batch: output.sum())
    found = {one.claim: one for one in evidence}
    assert abstentions == ()
    assert report.phase == "scan"
    assert {claim: one.neurons.tolist() for claim, one in found.items()} == {
        "dead": [0],
        "no gradient": [3],
        "alive": [1, 2],
    }
    assert all((one.layer, one.width, one.source, one.basis) == ("0/relu", 4, "scan", "measured") for one in evidence)
    assert found["dead"].numbers.tolist() == pytest.approx([1 - 0.05 ** (1 / 400)])  # 0 of 400 examples, at 95 %
    assert found["alive"].numbers.tolist() == [1.0, 0.5]  # of 100 points on [0, 1], 50 lie above ½
    assert found["no gradient"].numbers.tolist() == [1.0]
    assert "400 examples, 400 positions" in found["alive"].text


def test_without_a_loss_gradients_are_unseen_and_nan_is_reported() -> None:
    model = dying()
    model[0].bias.data[1] = torch.nan
    found = {one.claim: one.neurons.tolist() for one in measure(model, data())[0]}
    assert found == {"not finite": [1], "dead": [0], "alive": [2, 3]}


def test_a_module_that_cannot_be_watched_gives_no_verdict() -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn, self.relu = nn.RNN(2, 3, nonlinearity="relu"), nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            return self.relu(self.rnn(x)[0])

    _, abstentions, _ = measure(Recurrent(), torch.randn(300, 2))
    assert [(one.layer, one.source) for one in abstentions] == [("rnn", "scan")]


def test_a_proof_that_data_contradicts_is_reported_prominently() -> None:
    measured, _, _ = measure(dying(), data())

    def proof(claim: str, *neurons: int, basis: str = "proved") -> Evidence:
        numbers = np.zeros(len(neurons))
        return Evidence("0/relu", 4, "interval bound", claim, basis, np.array(neurons), numbers, "", "For every input.")

    assert contradictions([*measured, proof("dead", 0)]) == ()
    assert contradictions([*measured, proof("dead", 2, basis="suspected")]) == ()
    assert contradictions([*measured, proof("unread", 2)]) == ()
    (fault,) = contradictions([*measured, proof("dead", 0, 1, 2)])
    assert fault.startswith(
        "FAULT OF NEURONSCOPE: interval bound called 2 neurons of 0/relu proved dead that fired on the data (first 1)"
    )
    (fault,) = contradictions([*measured, proof("dead", 2)])
    assert "called 1 neuron of 0/relu" in fault


def test_proofs_and_measurement_agree_on_a_trained_network() -> None:
    """A network trained at far too high a rate: what is proved is measured, neuron by neuron; and much is proved."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.LayerNorm(64), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    x = torch.rand(512, 8)
    for _ in range(30):
        optimizer.zero_grad()
        ((model(x) - 5 * x.sum(1, keepdim=True)) ** 2).mean().clamp(max=1e4).backward()
        optimizer.step()
    assert all(bool(p.isfinite().all()) for p in model.parameters())
    proved = [one for one in examine_model(model, box=(0.0, 1.0)).evidence if one.claim == "dead"]
    measured, _, _ = measure(model, [x])
    dead = {(one.layer, n) for one in measured if one.claim == "dead" for n in one.neurons.tolist()}
    claimed = {(one.layer, n) for one in proved for n in one.neurons.tolist()}
    assert claimed <= dead
    assert len(claimed) >= 10
    assert contradictions([*proved, *measured]) == ()
