"""Count how many dead neurons of the demo's network are proved permanent, and how many of those ever fire again.

Trains the demo's ReLU network as ``neuronscope demo`` does, with its spike, saves it with its optimizer, and runs a
post-mortem with ``fixed_data``. Then training goes on from there, on the same images. After every step the network is
run on all of them: a neuron that was called permanent and fires is a contradiction.

How much more could be proved? Of a deeper neuron, inputs change while the layers before it learn. It stays dead as long
as they move by less than its distance from firing, -z / |w|, on each image. The script counts for how many dead neurons
that still holds after one epoch and at the end. The figures in ``docs/postmortem.md`` come from here::

    python scripts/permanent_demo.py [--seeds 0 1 2] [--epochs 30]
"""

import argparse
import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn
from wake_demo import outputs, steps, train

import neuronscope as ns
from neuronscope.demo.digits import load_digits
from neuronscope.demo.recipe import Recipe


def main() -> None:
    """Print the figures of each seed, and their sums."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=range(10), help="seeds of the networks")
    parser.add_argument("--epochs", type=int, default=30, help="epochs for which training goes on")
    parsed = parser.parse_args()
    torch.set_num_threads(1)  # for matrices this small, more threads only wait for each other
    data, recipe = load_digits(), Recipe()
    sums = [0] * 8
    for seed in parsed.seeds:
        network, optimizer = train(seed, data, recipe)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "demo.pt"
            torch.save({"model": network.state_dict(), "optimizer": optimizer.state_dict()}, path)
            report = ns.postmortem(path, network, data.train_x.split(256), fixed_data=True)
        permanent = {layer.name: torch.from_numpy(layer.permanent) for layer in report.layers}
        dead = {layer.name: torch.from_numpy(layer.dead_mask) for layer in report.layers}
        fired = {name: torch.zeros_like(mask) for name, mask in dead.items()}
        order = torch.Generator().manual_seed(1000 + seed)
        inputs = layer_inputs(network, data.train_x)
        distances = {name: _distances(network, name, x) for name, x in inputs.items()}
        moved = {name: torch.zeros(len(x)) for name, x in inputs.items()}
        near: list[int] = []  # after each epoch, deeper neurons whose inputs never moved as far as would wake them
        for _ in range(parsed.epochs):
            for _ in steps(network, optimizer, data, recipe, order):
                for name, values in outputs(network, data.train_x).items():
                    fired[name] |= (values != 0).any(0)
                for name, x in layer_inputs(network, data.train_x).items():
                    moved[name] = torch.maximum(moved[name], (x - inputs[name]).norm(dim=1))
            stays = {name: (distances[name] > moved[name][:, None]).all(0) & dead[name] for name in inputs}
            near.append(sum(int(mask.sum()) for mask in stays.values()))
        revived = {name: fired[name] & mask for name, mask in dead.items()}
        first = next(iter(dead))
        counts = (
            report.dead,
            int(dead[first].sum()),
            sum(int(mask.sum()) for mask in permanent.values()),
            sum(int((fired[name] & mask).sum()) for name, mask in permanent.items()),
            int(revived[first].sum()),
            sum(int(mask.sum()) for name, mask in revived.items() if name != first),
            near[0],
            near[-1],
        )
        sums = [one + other for one, other in zip(sums, counts, strict=True)]
        print(f"seed {seed}: {_line(counts)}", flush=True)
    print(f"all:    {_line(sums)}")


def layer_inputs(network: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Return the input of each hidden layer but the first, ``(B, F)``, by its name."""
    found = outputs(network, x)
    return dict(zip(list(found)[1:], found.values(), strict=False))


def _distances(network: nn.Module, name: str, x: Tensor) -> Tensor:
    """Return how far the input must move to make each neuron of a layer fire, on each image, ``(B, N)``."""
    layer = network.get_submodule(name)
    with torch.no_grad():
        z: Tensor = layer(x)
    assert isinstance(layer, nn.Linear)
    return -z / layer.weight.detach().norm(dim=1)


def _line(counts: tuple[int, ...] | list[int]) -> str:
    dead, first, permanent, contradicted, revived, others, near, still_near = counts
    return (
        f"{dead} dead, {first} of them in the first layer; {permanent} permanent ({100 * permanent / max(dead, 1):.0f} "
        f"%), of which {contradicted} fired again. Revived: {revived} in the first layer, {others} in the others. Of "
        f"these others, {near} had inputs that stayed too near to wake them for an epoch, and {still_near} for all."
    )


if __name__ == "__main__":
    main()
