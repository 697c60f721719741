"""How right hints in weights alone are: small trained networks, with the neurons that are dead on all images counted.

    python -m scripts.weight_hints [--seeds 2] [--first-seed 0]        # prints the tables of docs/postmortem.md

The networks train on scikit-learn's digits and die for real reasons: spikes, high learning rates, and weight decay that
shrinks the dead. A neuron is dead if it is zero on all 1,797 images, and living if it fires on one.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from neuronscope.checkpoints.checkpoint import StoredTensor
from neuronscope.checkpoints.file.layers import NEURON_KINDS, Layer, find_layers
from neuronscope.checkpoints.file.weights import HINTS, hint_scores, sequential_readers
from neuronscope.demo.digits import load_digits
from scripts.dying_networks import CASES, Case, as_checkpoint, cnn, constant, mlp, spike, train

Numbers = npt.NDArray[np.float64]

#: Networks of long training in which decay shrinks what gets no gradient.
DECAYED = (
    Case(
        "MLP, AdamW 1e-3, decay 1, spike × 20, 60 epochs",
        mlp,
        lambda p: torch.optim.AdamW(p, lr=1e-3, weight_decay=1.0),
        spike(1e-3),
        60,
    ),
    Case(
        "MLP, AdamW 1e-2, decay .3, 40 epochs",
        mlp,
        lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.3),
        constant(1e-2),
        40,
    ),
    Case(
        "CNN, AdamW 1e-2, decay .3, 40 epochs",
        cnn,
        lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.3),
        constant(1e-2),
        40,
    ),
)
#: Thresholds that the second table compares.
THRESHOLDS = {
    "negative weights": (0.05, 0.1, 0.2, 0.3, 0.4),
    "small row": (0.05, 0.1, 0.2, 0.3, 0.5),
    "small column": (0.01, 0.02, 0.05, 0.1, 0.2),
    "duplicate": (1e-6, 1e-4, 1e-3, 1e-2, 0.05),
}


def scores(model: nn.Module, images: Tensor) -> dict[str, Numbers]:
    """Return the scores of all neurons behind a ReLU, and whether each is dead on the images (``dead``)."""
    fired: dict[str, Tensor] = {}

    def note(path: str) -> None:
        def hook(_: nn.Module, _inputs: object, output: Tensor) -> None:
            fired[path] = (output > 0).transpose(0, 1).flatten(1).any(dim=1)

        model.get_submodule(path).register_forward_hook(hook)

    for path, module in model.named_modules():
        if isinstance(module, nn.ReLU):
            note(path)
    with torch.no_grad():
        model(images)
    tensors = as_checkpoint(model).tensors
    layers = find_layers(tensors)
    readers = {writer.path: reader for writer, reader in sequential_readers(layers)}
    found: dict[str, list[Numbers]] = {name: [] for name in (*THRESHOLDS, "dead")}
    for layer in layers:
        follows = str(int(layer.path) + 1) if layer.kind in NEURON_KINDS else ""
        if follows not in fired:
            continue
        known = hint_scores(layer, tensors, readers.get(layer.path))
        too_small = known["negative weights"].isnan()
        known["duplicate"] = distance_to_nearest(layer, tensors).masked_fill(too_small, torch.nan)
        for name, score in known.items():
            found[name].append(score.numpy())
        found["dead"].append((~fired[follows]).double().numpy())
    return {name: np.concatenate(parts) for name, parts in found.items()}


def distance_to_nearest(layer: Layer, tensors: Mapping[str, StoredTensor]) -> Tensor:
    """Return 1 − the largest cosine of each row of a layer, its bias included, with another row, float64 ``(N,)``."""
    parts = [tensors[name].read() for name in (layer.weight, layer.bias) if name is not None]
    rows = F.normalize(torch.cat([layer.rows(part).double() for part in parts], dim=1))
    return 1.0 - (rows @ rows.T).fill_diagonal_(-1.0).amax(dim=1)


def caught(found: Mapping[str, Numbers], thresholds: Mapping[str, float]) -> tuple[int, int]:
    """Return how many dead neurons and how many living ones have any of some scores below its threshold."""
    low = np.any([(found[name] < below) & (found[name] > 0) for name, below in thresholds.items()], axis=0)
    return int((low & (found["dead"] > 0)).sum()), int((low & (found["dead"] == 0)).sum())


def _tables(seeds: range) -> Iterator[str]:
    digits = load_digits()
    images = torch.cat([digits.train_x, digits.test_x])
    everything: list[dict[str, Numbers]] = []
    yield f"| network | dead | living | {' | '.join(hint.name for hint in HINTS)} | any of them |"
    yield "| --- |" + " ---: |" * (3 + len(HINTS))
    for case in (*(case for case in CASES if not case.layers), *DECAYED):
        print(f"… {case.label}", file=sys.stderr, flush=True)
        parts = [scores(train(case, seed, digits)[0], images) for seed in seeds]
        found = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        everything.append(found)
        yield f"| {case.label} | {' | '.join(_cells(found))} |"
    whole = {name: np.concatenate([part[name] for part in everything]) for name in everything[0]}
    yield f"| all | {' | '.join(_cells(whole))} |"
    dead, living = int(whole["dead"].sum()), int((whole["dead"] == 0).sum())
    yield ""
    yield f"| sign | threshold | of {dead:,} dead | of {living:,} living |"
    yield "| --- | ---: | ---: | ---: |"
    for name, thresholds in THRESHOLDS.items():
        for below in thresholds:
            right, wrong = caught(whole, {name: below})
            shares = f"{right} ({100 * right / dead:.1f} %) | {wrong} ({100 * wrong / living:.2f} %)"
            yield f"| {name} | {below:g} | {shares} |"


def _cells(found: Mapping[str, Numbers]) -> Iterator[str]:
    """Yield the cells of a line: how many are dead and living, and how many of each a hint points at."""
    dead = int(found["dead"].sum())
    yield from (f"{dead:,}", f"{found['dead'].size - dead:,}")
    thresholds = {hint.name: hint.below for hint in HINTS}
    for chosen in (*({name: below} for name, below in thresholds.items()), thresholds):
        yield " + ".join(map(str, caught(found, chosen)))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--first-seed", type=int, default=0)
    parsed = parser.parse_args()
    for line in _tables(range(parsed.first_seed, parsed.first_seed + parsed.seeds)):
        print(line, flush=True)
