"""The comparison as the picture that one would put in a talk."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from neuronscope.demo.conclusions import headline
from neuronscope.demo.results import Comparison
from neuronscope.writers.pictures.comparison import Curve, Spike, comparison

__all__ = ["talk_picture"]

#: Variants in the picture, and short names for them; more curves than these cannot be told apart on a wall.
_SHOWN = {
    "ReLU": "ReLU",
    "LeakyReLU": "LeakyReLU",
    "GELU": "GELU",
    "SiLU": "SiLU",
    "Mish": "Mish",
    "Tanh": "Tanh",
    "ReLU-BatchNorm": "ReLU + BN",
    "ReLU-no-spike": "no spike",
}


def talk_picture(result: Comparison) -> npt.NDArray[np.uint8]:
    """Draw dead and dormant shares over the optimizer steps, accuracy, and dead share by layer.

    Args:
        result: All runs.

    Returns:
        uint8 ``(H, W, 3)``.
    """
    recipe, seeds = result.recipe, len(result.seeds)
    before, after = result.around_spike
    scans = result.runs[0].scans
    subtitle = (
        f"MLP of {recipe['layers']} x {recipe['width']} neurons on {recipe['images']} handwritten digits, Adam; "
        f"{seeds} seed{'s' if seeds > 1 else ''}, the same initial weights and batches for all"
    )
    return comparison(
        [_curve(result, name) for name in result.labels if name in _SHOWN],
        title=headline(result),
        subtitle=subtitle + ("; no spike: ReLU without it" if "ReLU-no-spike" in result.labels else ""),
        spike=Spike(scans[before].step, scans[after].step, f"learning rate x {recipe['spike_factor']:g}"),
    )


def _curve(result: Comparison, name: str) -> Curve:
    runs = result.of(name)
    layers = len(runs[0].end.dead)
    shares = {
        kind: np.array([[100.0 * sum(getattr(scan, kind)) / result.neurons for scan in run.scans] for run in runs])
        for kind in ("dead", "dormant")
    }
    return Curve(
        label=_SHOWN[name],
        steps=np.array([scan.step for scan in runs[0].scans], dtype=np.int64),
        dead_percent=shares["dead"],
        dormant_percent=shares["dormant"],
        accuracy=np.array([100.0 * run.accuracy for run in runs]),
        dead_by_layer=np.array([run.end.dead for run in runs]) * (100.0 * layers / result.neurons),
        layers=tuple(f"layer {layer}" for layer in range(1, layers + 1)),
    )
