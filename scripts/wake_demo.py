"""Decide the dead neurons of the demo's network after its spike: proved, woken by an input of the box, or open.

Trains the demo's ReLU network as ``neuronscope demo`` does (without watching it, which changes no bit), saves it, and
runs a post-mortem with the box of all possible images. Then a plain loop without hooks gives the network every input
that was found, and random inputs of the box. The figures in ``docs/postmortem.md`` come from here::

    python scripts/wake_demo.py [--seeds 0 1 2] [--wake SECONDS] [--random 100000]
"""

import argparse
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import neuronscope as ns
from neuronscope.demo.digits import Digits, load_digits
from neuronscope.demo.recipe import VARIANTS, Recipe, build_network


def train(seed: int, data: Digits, recipe: Recipe) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Train the demo's ReLU network as :func:`neuronscope.demo.training.train` does."""
    network = build_network(VARIANTS[0], recipe, seed)
    optimizer = torch.optim.Adam(network.parameters(), lr=recipe.learning_rate)
    order = torch.Generator().manual_seed(seed)
    for number in range(1, recipe.epochs + 1):
        optimizer.param_groups[0]["lr"] = recipe.rate(number, spike=True)
        for _ in steps(network, optimizer, data, recipe, order):
            pass
    return network, optimizer


def steps(
    network: nn.Module, optimizer: torch.optim.Optimizer, data: Digits, recipe: Recipe, order: torch.Generator
) -> Iterator[None]:
    """Train for one epoch, and yield after each step."""
    for batch in torch.randperm(len(data.train_y), generator=order).split(recipe.batch_size):
        F.cross_entropy(network(data.train_x[batch]), data.train_y[batch]).backward()
        optimizer.step()
        optimizer.zero_grad()
        yield


def outputs(network: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Return the output of each hidden layer, ``(B, N)``, by the name of its linear layer."""
    found = {}
    with torch.no_grad():
        for name, module in network.named_children():
            x = module(x)
            if name.startswith("act"):
                found[f"linear{name[3:]}"] = x
    return found


def main() -> None:
    """Print the figures of each seed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="seeds of the networks")
    parser.add_argument("--wake", type=float, default=10.0, help="seconds for each search")
    parser.add_argument("--random", type=int, default=100_000, help="random inputs of the box")
    parsed = parser.parse_args()
    torch.set_num_threads(1)  # for matrices this small, more threads only wait for each other
    data, recipe = load_digits(), Recipe()
    images = torch.cat([data.train_x, data.test_x])
    box = (float(images.min()), float(images.max()))  # of pixels that are black and white
    for seed in parsed.seeds:
        network = train(seed, data, recipe)[0].eval()
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "demo.pt"
            torch.save(network.state_dict(), path)
            times = [time.process_time()]
            for wake in (0.0, parsed.wake):
                report = ns.postmortem(path, network, images.split(256), box=box, wake_seconds=wake)
                times.append(time.process_time())
        found = report.in_box
        assert found is not None
        print(
            f"seed {seed}: {found.dead} dead: {found.proved} proved, {found.woken} woken (by "
            f"{len(report.waking_inputs)} inputs), {found.open} open: "
            f"{100 * (found.proved + found.woken) / max(found.dead, 1):.0f} % decided. "
            f"Post-mortem without the search {times[1] - times[0]:.1f} s, with it {times[2] - times[1]:.1f} s (CPU).",
            *(one.reason for one in report.abstentions),
        )
        for layer in report.layers:
            assert layer.woken is not None
            for neuron in np.flatnonzero(layer.woken >= 0).tolist():
                image = torch.from_numpy(report.waking_inputs[layer.woken[neuron]]["0"])
                assert box[0] <= float(image.min())
                assert float(image.max()) <= box[1]
                assert float(outputs(network, image)[layer.name][0, neuron]) != 0
        fired = 0
        generator = torch.Generator().manual_seed(seed)
        for _ in range(0, parsed.random, 1000):
            x = box[0] + (box[1] - box[0]) * torch.rand(1000, 64, generator=generator)
            for name, values in outputs(network, x).items():
                fired += int((values[:, torch.from_numpy(report[name].proved_dead)] != 0).sum())
        print(f"        Every input was replayed; {parsed.random:,} random ones make {fired} proved neurons fire.")


if __name__ == "__main__":
    main()
