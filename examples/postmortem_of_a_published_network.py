"""A post-mortem of a network that somebody else trained and published: three questions, each answered with more.

Resemblyzer's speaker encoder (the architecture of Wan et al. 2018, trained for 1,564,501 steps; Apache-2.0) lies in
its package on PyPI as a checkpoint with the state of its optimizer. Its last layer is 256 units with ReLU: what they
give is the voice's fingerprint. How many of the 256 say anything? The file alone answers first; then the architecture
is given, and half a minute of a real conversation (from pyannote.audio's package; MIT).

Output (shortened)::

    The file alone, by the state of its optimizer:

    Neuronscope post-mortem · pretrained.pt · torch file of the older layout · 1,564,501 optimizer steps
    5 of 256 neurons are dead or get no gradient (at least 2.0 %): 5 inferred.
    ...
    Nothing is known of 9 (3.5 %).
    ...
    With the network's architecture, and half a minute of speech:

    56 of 256 neurons are dead (22 %): 56 measured.
    ...
    42 of the dead were alive lately in training (adam state): most likely they are silent on this data only.
    ...
    Confirmed by measuring
      - no gradient, inferred from adam state: 5 of 5 confirmed, 0 refuted.

docs/published-network.md tells what that means, and what it does not.

Run it with::

    pip install --no-deps Resemblyzer==0.1.4 pyannote.audio==4.0.7   # for two files in them; `make examples` does it
    python examples/postmortem_of_a_published_network.py [--out DIR]
"""

import argparse
import sys
import wave
from importlib import metadata
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import neuronscope as ns

RATE, WINDOW, HOP, BANDS, FRAMES = 16_000, 400, 160, 40, 160


class SpeakerEncoder(nn.Module):
    """Mel spectrograms (B, T, 40) → unit vectors (B, 256): three LSTMs; the last state, a linear layer, ReLU."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(BANDS, 256, num_layers=3, batch_first=True)
        self.linear = nn.Linear(256, 256)
        self.relu = nn.ReLU()
        self.similarity_weight = nn.Parameter(torch.tensor([10.0]))  # of the loss that it was trained with
        self.similarity_bias = nn.Parameter(torch.tensor([-5.0]))

    def forward(self, mels: Tensor) -> Tensor:
        """Of each spectrogram, the voice's vector."""
        _, (states, _) = self.lstm(mels)
        return nn.functional.normalize(self.relu(self.linear(states[-1])))


def file_of(package: str, name: str) -> Path:
    """A file that an installed package ships."""
    try:
        return Path(str(metadata.distribution(package).locate_file(name)))
    except metadata.PackageNotFoundError:
        sys.exit(f"This example reads a file of {package}: pip install --no-deps {package}")


def mels_to_hertz(mels: np.ndarray) -> np.ndarray:
    """Slaney's mel scale: linear up to 1000 Hz, logarithmic above."""
    return np.where(mels < 15, mels * 200 / 3, 1000 * 6.4 ** ((mels - 15) / 27))


def spectrogram(path: Path) -> Tensor:
    """Power in 40 mel bands every 10 ms, (T, 40), of a recording brought to −30 dB as the network was trained on."""
    with wave.open(str(path)) as file:
        sound = np.frombuffer(file.readframes(file.getnframes()), dtype=np.int16) / 32768
    sound *= max(1.0, 10 ** (-30 / 20) / np.sqrt(np.mean(sound**2)))
    frames = np.lib.stride_tricks.sliding_window_view(np.pad(sound, WINDOW // 2), WINDOW)[::HOP]
    power = np.abs(np.fft.rfft(frames * np.hanning(WINDOW + 1)[:-1])) ** 2
    top = 15 + 27 * np.log(RATE / 2000) / np.log(6.4)
    low, centre, high = (mels_to_hertz(np.linspace(0, top, BANDS + 2))[i : i + BANDS, None] for i in range(3))
    hertz = np.fft.rfftfreq(WINDOW, 1 / RATE)
    bands = np.clip(np.minimum((hertz - low) / (centre - low), (high - hertz) / (high - centre)), 0, None)
    return torch.tensor(power @ (bands * 2 / (high - low)).T, dtype=torch.float32)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/postmortem_of_a_published_network"), help="folder")
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    checkpoint = file_of("Resemblyzer", "resemblyzer/pretrained.pt")
    mels = spectrogram(file_of("pyannote.audio", "pyannote/audio/sample/sample.wav"))
    speech = torch.stack([mels[start : start + FRAMES] for start in range(0, len(mels) - FRAMES, 8)])

    print("The file alone, by the state of its optimizer:\n")
    print(ns.postmortem(checkpoint))
    print("\n\nWith the network's architecture, and half a minute of speech:\n")
    report = ns.postmortem(checkpoint, SpeakerEncoder(), data=speech.split(64))
    print(report)
    report.to_html(out / "postmortem.html")
    print(f"\nThe same as a page: {out / 'postmortem.html'}")


if __name__ == "__main__":
    main()
