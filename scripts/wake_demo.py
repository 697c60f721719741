"""Decide the dead neurons of the demo's network after its spike: proved, woken by an input of the box, or open.

Trains the demo's ReLU network as ``neuronscope demo`` does (without watching it, which changes no bit), saves it, runs a
post-mortem with the box of all possible images, replays every input that was found, and sends random inputs of the box
through the network. The figures in ``docs/postmortem.md`` come from here::

    python scripts/wake_demo.py [--seeds 0 1 2] [--wake SECONDS] [--out DIR]
"""

import argparse
import math
import time
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from neuronscope.demo.digits import Digits, load_digits
from neuronscope.demo.recipe import VARIANTS, Recipe, build_network


def train(seed: int, data: Digits, recipe: Recipe) -> nn.Module:
    """Train the demo's ReLU network as :func:`neuronscope.demo.training.train` does."""
    network = build_network(VARIANTS[0], recipe, seed)
    optimizer = torch.optim.Adam(network.parameters(), lr=recipe.learning_rate)
    order = torch.Generator().manual_seed(seed)
    for number in range(1, recipe.epochs + 1):
        optimizer.param_groups[0]["lr"] = recipe.rate(number, spike=True)
        for batch in torch.randperm(len(data.train_y), generator=order).split(recipe.batch_size):
            F.cross_entropy(network(data.train_x[batch]), data.train_y[batch]).backward()
            optimizer.step()
            optimizer.zero_grad()
    return network
