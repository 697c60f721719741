"""Take the dead neurons out of the demo's ReLU networks, of several seeds, and print what docs/shrink.md shows.

Run by hand: ``python scripts/shrink_demo_network.py [--seeds N] [--spike FACTOR]``.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

import neuronscope as ns
from neuronscope.demo.digits import Digits, load_digits
from neuronscope.demo.recipe import VARIANTS, Recipe, build_network

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
from shrink_a_published_network import milliseconds, multiply_adds


def trained(data: Digits, seed: int, recipe: Recipe) -> nn.Module:
    """Train the network as ``neuronscope demo`` does."""
    network = build_network(VARIANTS[0], recipe, seed)
    optimizer = torch.optim.Adam(network.parameters(), lr=recipe.learning_rate)
    order = torch.Generator().manual_seed(seed)
    for epoch in range(1, recipe.epochs + 1):
        for group in optimizer.param_groups:
            group["lr"] = recipe.rate(epoch, spike=True)
        for batch in torch.randperm(len(data.train_y), generator=order).split(recipe.batch_size):
            F.cross_entropy(network(data.train_x[batch]), data.train_y[batch]).backward()
            optimizer.step()
            optimizer.zero_grad()
    return network.eval()


def main() -> None:
    """Train, scan, shrink, and print a row for each seed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--spike", type=float, default=Recipe().spike_factor)
    given = parser.parse_args()
    data, recipe = load_digits(), Recipe(spike_factor=given.spike)
    heads = ["seed", "dead", "parameters", "multiply-adds", "ms for 360 images", "largest difference"]
    heads += ["in float64", "test", "there"]
    print(f"| {' | '.join(heads)} |")
    print("| --- |" + " ---: |" * (len(heads) - 1))
    for seed in range(given.seeds):
        network = trained(data, seed, recipe)
        report = ns.scan(network, [data.train_x])
        shrunk = ns.shrink(network, report, [data.train_x])
        pair = [network, shrunk.model]
        sums = [multiply_adds(model, data.test_x[:1]) for model in pair]
        times = milliseconds(pair, data.test_x, 300)
        right = [int((model(data.test_x).argmax(1) == data.test_y).sum()) for model in pair]
        with torch.no_grad():
            there = float((network(data.test_x) - shrunk.model(data.test_x)).abs().max())
        own, exact = shrunk.difference, shrunk.in_float64 or shrunk.difference
        assert own is not None
        assert exact is not None
        print(
            f"| {seed} | {report.dead} of {report.neurons} | {shrunk.parameters[0]:,} → {shrunk.parameters[1]:,} "
            f"| {sums[0]:,} → {sums[1]:,} | {times[0]:.2f} → {times[1]:.2f} "
            f"| {own.largest:.1e} of {own.scale:.0f} | {exact.largest:.0e} | {right[0]} → {right[1]} | {there:.1g} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
