"""Count how many dead neurons of the demo's network are proved permanent, and how many of those ever fire again.

Trains the demo's ReLU network as ``neuronscope demo`` does, with its spike, saves it with its optimizer, and runs a
post-mortem with ``fixed_data``. Then training goes on from there, on the same images. After every step the network is
run on all of them: a neuron that was called permanent and fires is a contradiction. The figures in
``docs/postmortem.md`` come from here::

    python scripts/permanent_demo.py [--seeds 0 1 2] [--epochs 30]
"""

import argparse
import tempfile
from pathlib import Path

import torch
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
    sums = [0] * 6
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
        for _ in range(parsed.epochs):
            for _ in steps(network, optimizer, data, recipe, order):
                for name, values in outputs(network, data.train_x).items():
                    fired[name] |= (values != 0).any(0)
        revived = {name: fired[name] & mask for name, mask in dead.items()}
        first = next(iter(dead))
        counts = (
            report.dead,
            int(dead[first].sum()),
            sum(int(mask.sum()) for mask in permanent.values()),
            sum(int((fired[name] & mask).sum()) for name, mask in permanent.items()),
            int(revived[first].sum()),
            sum(int(mask.sum()) for name, mask in revived.items() if name != first),
        )
        sums = [one + other for one, other in zip(sums, counts, strict=True)]
        print(f"seed {seed}: {_line(counts)}", flush=True)
    print(f"all:    {_line(sums)}")


def _line(counts: tuple[int, ...] | list[int]) -> str:
    dead, first, permanent, contradicted, revived, others = counts
    return (
        f"{dead} dead, {first} of them in the first layer; {permanent} permanent ({100 * permanent / max(dead, 1):.0f} "
        f"%), of which {contradicted} fired again. Revived: {revived} in the first layer, {others} in the others."
    )


if __name__ == "__main__":
    main()
