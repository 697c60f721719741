"""The dead-neuron part of a well-known course, in a few lines: the "Activation Functions" tutorial of the UvA.

The tutorial (Phillip Lippe, UvA Deep Learning course, tutorial 3) trains one network with each of several activation
functions and then counts the neurons that are zero for all training images, by a function that keeps every activation
in memory. :func:`neuronscope.scan` does that for any model in bounded memory, by layer, and sees dormant neurons too.

The network is the tutorial's (hidden layers of 512, 256, 256 and 128; Kaiming-uniform weights, SGD with momentum); the
images are scikit-learn's digits instead of Fashion-MNIST, so that nothing has to be downloaded.

Output, before → after training (shortened; numbers differ a little between machines)::

               dead by layer, of 512 + 256 + 256 + 128            dormant         zero outputs  accuracy
    Sigmoid         0 + 0 + 0 + 0 → 0 + 0 + 0 + 0                0 →    0       0.0% →   0.0%     17.9%
    ReLU           5 + 6 + 13 + 4 → 5 + 7 + 2 + 0              126 →  113      52.3% →  56.9%    100.0%
    LeakyReLU       0 + 0 + 0 + 0 → 0 + 0 + 0 + 0                0 →    0       0.0% →   0.0%    100.0%
    Swish           0 + 0 + 0 + 0 → 0 + 0 + 0 + 0                0 →    0       0.0% →   0.0%     99.9%

The sigmoid network has no dead neuron either, and learns next to nothing: death is one way to fail of several. The
accuracy is that on the training images. Run it with::

    python examples/activation_functions_tutorial.py
"""

from collections.abc import Callable
from itertools import pairwise

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

import neuronscope as ns

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "Sigmoid": nn.Sigmoid,
    "Tanh": nn.Tanh,
    "ReLU": nn.ReLU,
    "LeakyReLU": lambda: nn.LeakyReLU(0.1),
    "ELU": nn.ELU,
    "Swish": nn.SiLU,
}


def network(name: str) -> nn.Sequential:
    """The tutorial's ``BaseNetwork``, its layers named so that reports are easy to read."""
    torch.manual_seed(42)
    layers = nn.Sequential()
    sizes = [64, 512, 256, 256, 128]
    for number, (inputs, outputs) in enumerate(pairwise(sizes), 1):
        linear = nn.Linear(inputs, outputs)
        nn.init.kaiming_uniform_(linear.weight, nonlinearity="relu")
        layers.add_module(f"linear{number}", linear)
        layers.add_module(f"act{number}", ACTIVATIONS[name]())
    layers.add_module("head", nn.Linear(sizes[-1], 10))
    return layers


def loss(output: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
    """What :func:`neuronscope.scan` follows back to see gradients."""
    return F.cross_entropy(output, batch[1])


def layers(report: ns.Report) -> str:
    """The dead neurons of each layer."""
    return " + ".join(str(site.dead) for site in report.layers)


def zeros(report: ns.Report) -> float:
    """Share of outputs that are exactly zero: of a healthy ReLU about half, which is not death."""
    return float(sum(site.zero_output_fraction.sum() for site in report.layers) / report.neurons)


def main() -> None:
    torch.set_num_threads(1)  # quicker for networks this small
    pixels, labels = load_digits(return_X_y=True)
    images, digits = torch.tensor(pixels, dtype=torch.float32) / 8 - 1, torch.tensor(labels)
    batches = list(zip(images.split(256), digits.split(256), strict=True))

    print(
        f"{'':10} {'dead by layer, of 512 + 256 + 256 + 128':43} {'dormant':>14} {'zero outputs':>20} {'accuracy':>9}"
    )
    for name in ACTIVATIONS:
        model = network(name)
        before = ns.scan(model, batches, loss=loss)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.03, momentum=0.9)
        for _ in range(10):
            for batch in torch.randperm(len(digits)).split(64):
                F.cross_entropy(model(images[batch]), digits[batch]).backward()
                optimizer.step()
                optimizer.zero_grad()
        after = ns.scan(model, batches, loss=loss)

        with torch.no_grad():
            right = (model(images).argmax(dim=1) == digits).float().mean().item()
        print(
            f"{name:10} {layers(before):>18} → {layers(after):<22} {before.dormant:7} → {after.dormant:4} "
            f"{zeros(before):10.1%} → {zeros(after):6.1%} {right:9.1%}"
        )


if __name__ == "__main__":
    main()
