"""Watch any PyTorch loop: four lines more, and a table that says which neurons are dead.

A deep, narrow ReLU network without normalisation learns scikit-learn's digits with PyTorch's default initialisation.
Its learning rate is ten times too high, as it happens in a first try. The four lines are marked.

Output (shortened; numbers differ a little between machines)::

    epoch 1: accuracy 85.8%, 3 neurons dead
    epoch 2: accuracy 93.0%, 58 neurons dead
    ...
    53 of 256 neurons are dead (21 %). All of them worked before and stopped, most at steps 1–187.
    Worst layer: `4/relu`, with 16 of 64 dead.
    4 neurons are dormant: almost no output.

                                                            dor-  cut
    layer   activation  neurons  axis  dead              %  mant  off  worst neurons
    ───────────────────────────────────────────────────────────────────────────────────
    0/relu  relu             64  1     12 (all died)  19 %     1    ·  0, 9, 16, 21 …
    2/relu  relu             64  1     9 (all died)   14 %     1    ·  0, 11, 14, 21 …
    4/relu  relu             64  1     16 (all died)  25 %     1    ·  2, 6, 9, 13 …
    6/relu  relu             64  1     16 (all died)  25 %     1    ·  1, 4, 5, 8 …

The accuracy hardly shows that a fifth of the network has died. Run it with::

    python examples/plain_loop.py [--out DIR]
"""

import argparse
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset, random_split

import neuronscope as ns


def digits() -> TensorDataset:
    """1797 images of 8 × 8 pixels, standardised, and the digits that they show."""
    pixels, labels = load_digits(return_X_y=True)
    images = torch.tensor(pixels, dtype=torch.float32)
    return TensorDataset((images - images.mean()) / images.std(), torch.tensor(labels))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/plain_loop"), help="folder for the HTML report")
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)  # for matrices this small, more threads only wait for each other
    torch.manual_seed(0)

    train_set, val_set = random_split(digits(), [0.8, 0.2])
    train_loader = DataLoader(train_set, batch_size=32, shuffle=True)
    val_loader = DataLoader(val_set, batch_size=256)
    model = nn.Sequential(
        nn.Linear(64, 64), nn.ReLU(),
        nn.Linear(64, 64), nn.ReLU(),
        nn.Linear(64, 64), nn.ReLU(),
        nn.Linear(64, 64), nn.ReLU(),
        nn.Linear(64, 10),
    )  # fmt: skip
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)

    with ns.watch(model, window_steps=len(train_loader)) as scope:  # 1: attach; verdicts are of one epoch each
        for epoch in range(8):
            for images, labels in train_loader:
                loss = F.cross_entropy(model(images), labels)
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                scope.step()  # 2: one optimizer step is over

            model.eval()
            with scope.phase("val"), torch.no_grad():  # 3: count validation apart from training
                right = sum(int((model(images).argmax(dim=1) == labels).sum()) for images, labels in val_loader)
            model.train()
            dead = scope.report().dead
            print(f"epoch {epoch + 1}: accuracy {right / len(val_set):.1%}, {dead} neurons dead")

    report = scope.report()  # 4: what became of the neurons
    print(f"\n{report}")
    report.to_html(out / "report.html")
    print(f"\nThe same with a map of every neuron over time: {out / 'report.html'}")


if __name__ == "__main__":
    main()
