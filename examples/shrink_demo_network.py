"""Train the demo's ReLU network through its spike, take its dead neurons out, and compare both networks."""

import argparse
import time
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import neuronscope as ns
from neuronscope.demo.digits import Digits, load_digits
from neuronscope.demo.recipe import VARIANTS, Recipe, build_network


def trained(data: Digits, seed: int) -> nn.Module:
    """Train the network as ``neuronscope demo`` does."""
    recipe = Recipe()
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
    return network


def multiply_adds(model: nn.Module, example: Tensor) -> int:
    """Return the multiply-adds of one forward."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(example)
    return counter.get_total_flops() // 2


def microseconds(model: nn.Module, example: Tensor, times: int = 200) -> float:
    """Return the shortest time of a forward."""
    shortest = float("inf")
    with torch.no_grad():
        for _ in range(times):
            start = time.perf_counter()
            model(example)
            shortest = min(shortest, time.perf_counter() - start)
    return shortest * 1e6


def main() -> None:
    """Train, scan, shrink, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="where to write the smaller network's weights")
    given = parser.parse_args()
    data = load_digits()
    network = trained(data, given.seed).eval()
    batches = [data.train_x]
    report = ns.scan(network, batches)
    shrunk = ns.shrink(network, report, batches)
    print(shrunk)
    print("\n| | before | after |\n| --- | ---: | ---: |")
    print(f"| parameters | {shrunk.parameters[0]:,} | {shrunk.parameters[1]:,} |")
    one = data.test_x[:1]
    print(f"| multiply-adds an image | {multiply_adds(network, one):,} | {multiply_adds(shrunk.model, one):,} |")
    times = [microseconds(model, data.test_x) for model in (network, shrunk.model)]
    print(f"| time of the {len(data.test_y)} test images, µs | {times[0]:.0f} | {times[1]:.0f} |")
    right = [int((model(data.test_x).argmax(1) == data.test_y).sum()) for model in (network, shrunk.model)]
    print(f"| test images told right | {right[0]} | {right[1]} |")
    print(f"\nDead before: {report.dead} of {report.neurons}; after: {ns.scan(shrunk.model, batches).dead}.")
    if given.out:
        torch.save(shrunk.model.state_dict(), given.out)


if __name__ == "__main__":
    main()
