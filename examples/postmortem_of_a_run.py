"""Post-mortem: nobody watched the run, and all that is left of it is a checkpoint. Which neurons are dead, and why?

A ReLU network learns scikit-learn's digits with AdamW; for a moment its learning rate jumps. Then the last checkpoint
is examined three times: the file alone, with the model, and with data.

Output (shortened; numbers differ a little between machines)::

    33 of 160 neurons are dead or get no gradient (21 %): 33 inferred.
    Worst layer: `0`, with 16 of 32.
    1 more may be dead; it is not included in the totals.
    ...
    layer  neurons  dead     %  how sure     since                            suspected
    0           32    16  50 %  16 inferred  16 at steps 15–299, half by 296          ·
    2           64     9  14 %  9 inferred   9 at steps 292–321, half by 296          1
    4           64     8  12 %  8 inferred   8 at steps 294–311, half by 304          ·
    ...
    2. The model too: what no input can wake is proved.
       33 of 160 neurons: {'proved': 1, 'measured': 0, 'inferred': 32}
    3. Data too: every verdict is held against what the neurons really do.
       33 of 160 neurons: {'proved': 1, 'measured': 32, 'inferred': 0}
       in the box: 1 proved dead, 25 woken by some input
       no gradient, inferred from adam state: 33 held, 0 refuted
       no gradient, suspected from adam state: 0 held, 1 refuted
       dead, proved from interval bound: 1 held, 0 refuted
       deaths close together in time: 29 of 33 dated deaths are at steps 292 to 311 of 627: ...

The learning rate jumped at step 300, which the optimizer's state still knows. Run it with::

    python examples/postmortem_of_a_run.py [--out DIR]
"""

import argparse
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

import neuronscope as ns


def network() -> nn.Module:
    return nn.Sequential(
        nn.Linear(64, 32), nn.ReLU(),
        nn.Linear(32, 64), nn.ReLU(),
        nn.Linear(64, 64), nn.ReLU(),
        nn.Linear(64, 10),
    )  # fmt: skip


def train(images: torch.Tensor, digits: torch.Tensor, path: Path) -> None:
    """A run as many are: no monitor, and a checkpoint at the end. The learning rate jumps at steps 300 to 319."""
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05)
    step = 0
    for _ in range(11):
        for batch in torch.randperm(len(digits)).split(32):
            optimizer.param_groups[0]["lr"] = 3e-2 if 300 <= step < 320 else 1e-3
            F.cross_entropy(model(images[batch]), digits[batch]).backward()
            optimizer.step()
            optimizer.zero_grad()
            step += 1
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step}, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/postmortem_of_a_run"), help="folder for the files")
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)  # for matrices this small, more threads only wait for each other
    torch.manual_seed(0)
    pixels, labels = load_digits(return_X_y=True)
    images, digits = torch.tensor(pixels, dtype=torch.float32) / 16, torch.tensor(labels)
    checkpoint = out / "last.pt"
    train(images, digits, checkpoint)

    print("1. The file alone: the optimizer's state tells who gets no gradient any more, and since when.\n")
    print(ns.postmortem(checkpoint))

    print("\n2. The model too: what no input can wake is proved.\n")
    report = ns.postmortem(checkpoint, network, example=images[:1], box=(0.0, 1.0))  # pixels lie between 0 and 1
    print(f"   {report.dead} of {report.neurons} neurons: {report.dead_by_basis()}")

    print("\n3. Data too: every verdict is held against what the neurons really do.\n")
    batches = list(zip(images.split(256), digits.split(256), strict=True))
    report = ns.postmortem(
        checkpoint, network, batches, lambda output, batch: F.cross_entropy(output, batch[1]), box=(0.0, 1.0)
    )
    print(f"   {report.dead} of {report.neurons} neurons: {report.dead_by_basis()}")
    if report.in_box is not None:  # an input that makes a neuron fire need not look like a digit
        print(f"   in the box: {report.in_box.proved} proved dead, {report.in_box.woken} woken by some input")
    for one in report.confirmations:
        print(f"   {one.claim}, {one.basis} from {one.source}: {one.held} held, {one.refuted} refuted")
    for sign in report.diagnoses:
        print(f"\n   {sign.sign}: {sign.evidence}\n   {sign.cause}\n   {sign.remedy}")
    report.to_html(out / "postmortem.html")
    print(f"\nThe same as a page, with every neuron: {out / 'postmortem.html'}")


if __name__ == "__main__":
    main()
