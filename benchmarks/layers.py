"""What a post-mortem of a checkpoint of very many layers takes: reading, examining, and writing the report.

Each checkpoint is made up: linear layers of 8 × 8 with a bias. With Adam's state, one neuron in each 40th layer never
got a gradient; in each 50th layer a row of weights is zero. Each is examined in a process of its own, as the command
line does it, and nothing is trained.

Run it with ``python -m benchmarks.layers [--layers 1000 10000 100000]``; ``docs/scale.md`` has what it printed.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.tables import Table, size

WRITERS = ("text", "html", "json", "markdown")


def make_checkpoint(path: Path, layers: int, *, adam: bool, nested: bool) -> None:
    """Write a checkpoint.

    Args:
        path: Where.
        layers: How many layers.
        adam: Whether with Adam's state.
        nested: Whether the layers lie three levels deep, or all in one ``nn.Sequential``.
    """
    torch.manual_seed(0)
    weights: dict[str, torch.Tensor] = {}
    for at in range(layers):
        name = f"stages.{at // 1000}.blocks.{at // 10 % 100}.layers.{at % 10}.fc" if nested else str(2 * at)
        weights[f"{name}.weight"], weights[f"{name}.bias"] = torch.randn(8, 8), torch.randn(8)
        if at % 50 == 0:
            weights[f"{name}.weight"][3] = 0
    saved: dict[str, Any] = {"model": weights}
    if adam:
        state = {number: _moments(tensor, number // 2 % 40 == 0) for number, tensor in enumerate(weights.values())}
        group = torch.optim.Adam([torch.zeros(1, requires_grad=True)]).state_dict()["param_groups"][0]
        saved["optimizer"] = {"state": state, "param_groups": [{**group, "params": list(state)}]}
    torch.save(saved, path)


def _moments(tensor: torch.Tensor, one_is_silent: bool) -> dict[str, torch.Tensor]:
    mean, square = torch.randn_like(tensor) * 1e-3, torch.rand_like(tensor) * 1e-6 + 1e-7
    if one_is_silent:
        mean[5] = square[5] = 0
    return {"step": torch.tensor(1000.0), "exp_avg": mean, "exp_avg_sq": square}


def peak() -> int:
    """Bytes of this process at its largest: the kernel's own word, for ``ru_maxrss`` begins at what a parent held."""
    status = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in status if "VmHWM" in line)


def examine(path: Path) -> dict[str, Any]:
    """Return the processor's seconds for a post-mortem and each writer, the bytes that each wrote, and the peak."""
    import neuronscope as ns

    _ = ns.postmortem  # loads torch and what is needed
    taken: dict[str, Any] = {}

    def timed(what: str, call: Callable[[], Any]) -> Any:
        began = time.process_time()
        result = call()
        taken[what] = time.process_time() - began
        return result

    report = timed("examine", lambda: ns.postmortem(path))
    draw = {"text": lambda: str(report), "html": report.to_html, "json": report.to_json, "markdown": report.to_markdown}
    for name in WRITERS:
        taken[f"{name} size"] = len(timed(name, draw[name]).encode("utf-8"))
    return {**taken, "dead": report.dead, "layers": len(report.layers), "peak": peak()}


def rows(layers: int) -> Iterator[list[str]]:
    """Yield the table's rows for so many layers: without and with Adam's state, in either way of naming."""
    for adam in (False, True):
        for nested in (False, True):
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / "made_up.pt"
                make_checkpoint(path, layers, adam=adam, nested=nested)
                done = subprocess.run(
                    [sys.executable, "-m", "benchmarks.layers", "--examine", str(path)],
                    check=True,
                    capture_output=True,
                    text=True,
                )
                found, bytes_of = json.loads(done.stdout), path.stat().st_size
            seconds = [found["examine"], *(found[name] for name in WRITERS)]
            yield [
                f"{layers:,}",
                "Adam" if adam else "none",
                "three levels" if nested else "one sequence",
                size(bytes_of),
                *(f"{one:.1f} s" for one in seconds),
                f"{sum(seconds):.0f} s",
                size(found["html size"]),
                size(found["json size"]),
                size(found["peak"]),
            ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, nargs="+", default=[1_000, 10_000, 100_000])
    parser.add_argument("--examine", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.examine is not None:
        print(json.dumps(examine(options.examine)))
        return
    table = Table(
        "A post-mortem of very many layers",
        ("layers", "state", "names", "file", "examined", *WRITERS, "all", "page", "JSON", "largest the process was"),
        note="Seconds of the processor, on one core, without loading torch and Neuronscope.",
    )
    for layers in options.layers:
        table.rows += rows(layers)
    print(table.markdown())


if __name__ == "__main__":
    main()
