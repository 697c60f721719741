"""A sparse autoencoder whose latents die: left alone, and with those latents resampled.

The features are the 64 hidden activations of a small network that reads scikit-learn's digits. The autoencoder has
eight times as many latents, of which the 16 largest are kept. What the decoder reads of them is counted by itself, as
sparse latents: for how many tokens (here: images) each has not fired, and how densely it fires. In two thirds of the
steps, every 100, latents that fired at no image of the window are resampled as in Bricken et al. 2023, "Towards
Monosemanticity": they get the direction of an image that is badly rebuilt.

Output (dead: fired at no image of the newest window; numbers differ a little between machines)::

    left alone
      step  500: 137 of 512 latents are dead, 85 have not fired for 20,000 images; squared error 1.00
      step 1000: 220 of 512 latents are dead, 199 have not fired for 20,000 images; squared error 0.73
      step 1500: 255 of 512 latents are dead, 240 have not fired for 20,000 images; squared error 0.70
    resampled
      step  500: 97 of 512 latents are dead, 30 have not fired for 20,000 images; squared error 0.98
      step 1000: 77 of 512 latents are dead, 38 have not fired for 20,000 images; squared error 0.85
      step 1500: 153 of 512 latents are dead, 148 have not fired for 20,000 images; squared error 0.70

Run it with::

    python examples/sparse_autoencoder.py
"""

from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

import neuronscope as ns

FEATURES, LATENTS, LARGEST, BATCH, STEPS = 64, 512, 16, 128, 1500
#: The latents, as the decoder reads them.
SITE = "encoder/topk relu"
#: A latent that has not fired for so many images is called dead by the training libraries, with a number of their own.
LONG = 20_000


class SparseAutoencoder(nn.Module):
    """Features (B, 64) → the largest latents of (B, 512) → features."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Linear(FEATURES, LATENTS), nn.Linear(LATENTS, FEATURES)
        with torch.no_grad():
            self.decoder.weight.copy_(F.normalize(self.encoder.weight).T)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Return the reconstruction."""
        latents = F.relu(self.encoder(features - self.decoder.bias))
        values, index = latents.topk(LARGEST, sorted=False)
        return self.decoder(torch.zeros_like(latents).scatter(-1, index, values))


def features() -> torch.Tensor:
    """Train a small network on the digits, and return its hidden activations on all 1797 images, standardised."""
    pixels, labels = load_digits(return_X_y=True)
    images, digits = torch.tensor(pixels, dtype=torch.float32) / 16, torch.tensor(labels)
    network = nn.Sequential(nn.Linear(64, FEATURES), nn.GELU(), nn.Linear(FEATURES, 10))
    optimizer = torch.optim.Adam(network.parameters(), lr=3e-3)
    for _ in range(150):
        F.cross_entropy(network(images), digits).backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        hidden = network[1](network[0](images))
    return (hidden - hidden.mean(0)) / hidden.std()


def resample(coder: SparseAutoencoder, optimizer: torch.optim.Adam, dead: torch.Tensor, data: torch.Tensor) -> None:
    """Give dead latents, bool (512,), the directions of features that are badly rebuilt, and no momentum."""
    if not dead.any():
        return
    with torch.no_grad():
        errors = (coder(data) - data).square().sum(1)
        rows = torch.multinomial(errors.square(), int(dead.sum()))
        directions = F.normalize(data[rows] - coder.decoder.bias)
        encoder, decoder = coder.encoder, coder.decoder
        encoder.weight[dead] = directions * 0.2 * encoder.weight[~dead].norm(dim=1).mean()
        encoder.bias[dead] = 0
        decoder.weight[:, dead] = directions.T
        for parameter, own in ((encoder.weight, dead), (encoder.bias, dead), (decoder.weight, (slice(None), dead))):
            for name in ("exp_avg", "exp_avg_sq"):
                optimizer.state[parameter][name][own] = 0


def train(data: torch.Tensor, *, resamples: bool) -> tuple[list[int], Any]:
    """Train an autoencoder; return after each 100 steps how many latents are long silent, and the layer's report."""
    torch.manual_seed(0)
    coder = SparseAutoencoder()
    optimizer = torch.optim.Adam(coder.parameters(), lr=3e-3)
    silent, loss = [], torch.zeros(())
    with ns.watch(coder, window_steps=100) as scope:
        for step in range(1, STEPS + 1):
            batch = data[torch.randint(len(data), (BATCH,))]
            loss = (coder(batch) - batch).square().sum(1).mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            scope.step()
            if step % 100 == 0:
                if resamples and step < STEPS * 2 // 3:
                    with scope.paused():
                        resample(coder, optimizer, torch.from_numpy(scope.report()[SITE].judgement.dead), data)
                latents_now = scope.report()[SITE]
                silent.append(latents_now.not_fired_in(LONG))
                if step % 500 == 0:
                    print(
                        f"  step {step:4}: {latents_now.dead} of {LATENTS} latents are dead, "
                        f"{silent[-1]} have not fired for {LONG:,} images; squared error {loss.item():.2f}"
                    )
    return silent, scope.report()[SITE]


def main() -> None:
    torch.set_num_threads(1)  # for matrices this small, more threads only wait for each other
    torch.manual_seed(0)
    data = features()
    for name in ("left alone", "resampled"):
        print(name)
        train(data, resamples=name == "resampled")


if __name__ == "__main__":
    main()
