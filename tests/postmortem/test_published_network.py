"""A real checkpoint that somebody published, with its optimizer's state, against twins; docs/published-network.md."""

from __future__ import annotations

import math
from importlib import import_module, metadata
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

import neuronscope as ns
from neuronscope.checkpoints.postmortem_report import PostmortemReport
from neuronscope.checkpoints.verdict.layer_verdicts import UNKNOWN


@pytest.fixture(scope="module")
def example() -> ModuleType:
    try:
        _ = metadata.distribution("Resemblyzer"), metadata.distribution("pyannote.audio")
    except metadata.PackageNotFoundError as error:
        pytest.skip(f"no {error.name} (make test installs it into specimens/ of the environment)")
    return import_module("examples.postmortem_of_a_published_network")


@pytest.fixture(scope="module")
def path(example: ModuleType) -> Path:
    found: Path = example.file_of("Resemblyzer", "resemblyzer/pretrained.pt")
    return found


@pytest.fixture(scope="module")
def speech(example: ModuleType) -> Tensor:
    mels = example.spectrogram(example.file_of("pyannote.audio", "pyannote/audio/sample/sample.wav"))
    assert mels.shape == (3001, 40)  # 30 s, a frame each 10 ms
    return torch.stack([mels[start : start + 160] for start in range(0, 3001 - 160, 8)])


@pytest.fixture(scope="module")
def tested(example: ModuleType, path: Path, speech: Tensor) -> PostmortemReport:
    torch.manual_seed(0)
    return ns.postmortem(path, example.SpeakerEncoder(), data=speech.split(64))


def test_evidence_from_a_published_file_equals_that_of_a_twin(path: Path) -> None:
    layer = ns.postmortem(path)["linear"]
    saved = torch.load(path, map_location="cpu", weights_only=True)
    names = list(saved["model_state"])
    # torch numbers parameters in the model's order; this one's loss had its two before all others.
    slots = saved["optimizer_state"]["state"]
    keys = saved["optimizer_state"]["param_groups"][0]["params"]
    state = {name: slots[key] for name, key in zip(names, keys, strict=True)}
    silent, faint = [], []
    for neuron in range(256):
        moments = [
            (float(m), float(v))
            for name in ("linear.weight", "linear.bias")
            for m, v in zip(
                state[name]["exp_avg"][neuron].reshape(-1).tolist(),
                state[name]["exp_avg_sq"][neuron].reshape(-1).tolist(),
                strict=True,
            )
        ]
        told = [(m, v) for m, v in moments if v >= 65536 * 2.0**-126]
        ratios = [abs(m) / math.sqrt(v) for m, v in told if abs(m) >= 2 * 2.0**-126]
        if not told:
            faint.append(neuron)
        elif not ratios:
            silent.append(neuron)
        else:
            bound = math.log(7.27 / max(ratios)) / 0.1049
            assert bound < 80
    assert layer.dead_mask.nonzero()[0].tolist() == silent
    assert (layer.labels == UNKNOWN).nonzero()[0].tolist() == faint
    assert (len(silent), len(faint)) == (5, 9)


def test_measurements_of_a_published_network_equal_those_of_a_twin(
    example: ModuleType, path: Path, speech: Tensor, tested: PostmortemReport
) -> None:
    network = example.SpeakerEncoder()
    network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True)["model_state"])
    with torch.no_grad():
        outputs = torch.cat([network.eval()(batch) for batch in speech.split(64)])
    silent = (outputs == 0).all(dim=0).nonzero().flatten().tolist()
    layer = tested["linear"]
    assert layer.dead_mask.nonzero()[0].tolist() == silent
    assert 40 < len(silent) < 80  # docs/published-network.md: 56


def test_neurons_of_a_published_network_without_gradient_are_silent_on_data(tested: PostmortemReport) -> None:
    (clock,) = tested.confirmations
    assert (clock.source, clock.held, clock.refuted, clock.untested) == ("adam state", 5, 0, 0)
    assert "most likely they are silent on this data only" in str(tested)
