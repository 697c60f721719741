"""Write docs/smooth-units.md: from which pre-activation on smooth activations give exactly zero, and their gradients.

    python -m scripts.smooth_zeros            # writes the page and its picture

In 16 bits every number is tried. In float32 a dense grid is tried, and every number between the last point of the grid
that is not zero and the next one. The page also says what shares of zeros the demo's networks show; for that it trains
one network of each kind (about a minute).
"""

from __future__ import annotations

import argparse
import math
import platform
import sys
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from neuronscope.demo.digits import load_digits
from neuronscope.demo.picture import house_style
from neuronscope.demo.recipe import Recipe, Variant
from neuronscope.demo.training import train
from neuronscope.writers.formatting import percent

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "smooth-units.md"
PICTURE = ROOT / "docs" / "images" / "smooth-units.png"

Function = Callable[[Tensor], Tensor]

FUNCTIONS: dict[str, Function] = {
    "ReLU": functional.relu,
    "GELU": functional.gelu,
    "GELU, tanh formula": lambda x: functional.gelu(x, approximate="tanh"),
    "SiLU": functional.silu,
    "Mish": functional.mish,
    "ELU": functional.elu,
    "SELU": functional.selu,
    "Softplus": functional.softplus,
    "Sigmoid": torch.sigmoid,
    "Tanh": torch.tanh,
}
TYPES = (torch.float32, torch.bfloat16, torch.float16)
#: Beyond this nothing is looked for: all of the functions are constant or linear long before.
FARTHEST = 1e4


class Zeros(NamedTuple):
    """Where an activation gives exactly zero.

    Attributes:
        output_below: The output is exactly zero for all numbers up to this one; NaN if there is no such number.
        gradient_below: The gradient, likewise.
        gradient_above: The gradient is exactly zero for all numbers from this one on; NaN if it is so for no number.
    """

    output_below: float
    gradient_below: float
    gradient_above: float


def evaluate(function: Function, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return an activation's outputs and derivatives, each ``(N,)``, in the type of ``x``."""
    x = x.detach().requires_grad_()
    y = function(x)
    (slope,) = torch.autograd.grad(y.sum(), x)
    return y.detach(), slope


def grid(dtype: torch.dtype) -> Tensor:
    """Return all finite numbers of a 16-bit type up to :data:`FARTHEST`, or a dense grid of float32, ascending."""
    if dtype == torch.float32:
        side = torch.logspace(-6, math.log10(FARTHEST), 1 << 20, dtype=torch.float64).float()
        return torch.cat([-side.flip(0), side])
    every = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(dtype)
    return every[every.isfinite() & (every.abs() <= FARTHEST)].sort().values


def between(low: float, high: float) -> Tensor:
    """Return every float32 from ``low`` to ``high``, ascending; zero and its neighbours where they lie around it."""
    if low < 0 < high:
        tiny = float(np.nextafter(np.float32(0), np.float32(1)))
        return torch.tensor([low, -tiny, 0.0, tiny, high])
    found = [np.float32(low)]
    while found[-1] < np.float32(high):
        found.append(np.nextafter(found[-1], np.float32(math.inf)))
    return torch.from_numpy(np.array(found, dtype=np.float32))


def edge(values: Function, x: Tensor, *, above: bool = False) -> float:
    """Return the last number up to which some values are all zero, or the first from which on they are.

    Args:
        values: Gives the values of numbers.
        x: Numbers to try, ascending.
        above: Whether to look at the upper end.
    """
    x = x.flip(0) if above else x
    zero = values(x) == 0
    count = len(zero) if bool(zero.all()) else int((~zero).int().argmax())
    if count == 0:
        return math.nan
    last = float(x[count - 1])
    if x.dtype == torch.float32 and count < len(x):  # every number up to the next point of the grid
        fine = between(*sorted((last, float(x[count]))))
        fine = fine.flip(0) if above else fine
        zero = values(fine) == 0
        last = float(fine[(len(zero) if bool(zero.all()) else int((~zero).int().argmax())) - 1])
    return last


def zeros_of(function: Function, dtype: torch.dtype) -> Zeros:
    """Return where an activation and its derivative are exactly zero, in one type."""
    x = grid(dtype)

    def output(points: Tensor) -> Tensor:
        return evaluate(function, points)[0]

    def slope(points: Tensor) -> Tensor:
        return evaluate(function, points)[1]

    return Zeros(edge(output, x), edge(slope, x), edge(slope, x, above=True))


def _number(value: float) -> str:
    value += 0.0  # no negative zero
    text = "–" if math.isnan(value) else f"{value:.3g}" if abs(value) < 1e3 else f"{value:,.0f}"
    return text.replace("-", "−")


def zero_table(found: dict[tuple[str, torch.dtype], Zeros]) -> list[str]:
    """Return the table of thresholds, one row for each function."""
    heads = [str(dtype).removeprefix("torch.") for dtype in TYPES]
    lines = [
        "| activation | " + " | ".join(f"{head}: output is 0 up to | gradient is 0 up to" for head in heads) + " |",
        "| --- " + "| ---: | ---: " * len(TYPES) + "|",
    ]
    for name in FUNCTIONS:
        cells = []
        for zeros in (found[name, dtype] for dtype in TYPES):
            above = "" if math.isnan(zeros.gradient_above) else f", from {_number(zeros.gradient_above)}"
            cells += [_number(zeros.output_below), _number(zeros.gradient_below) + above]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


def demo_table(seed: int) -> list[str]:
    """Train the demo's network with several activations, and return a table of their zeros."""
    data, recipe = load_digits(), Recipe()
    lines = [
        "| activation | zero outputs | zero gradients | dead | silent | dormant |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for variant in (
        *(Variant("ReLU", "ReLU", nn.ReLU), Variant("GELU", "GELU", nn.GELU), Variant("SiLU", "SiLU", nn.SiLU)),
        *(Variant("Mish", "Mish", nn.Mish), Variant("ELU", "ELU", nn.ELU), Variant("Sigmoid", "Sigmoid", nn.Sigmoid)),
        Variant("Tanh", "Tanh", nn.Tanh),
    ):
        run, _ = train(variant, seed, data, recipe)
        end = run.end
        counts = [sum(each) for each in (end.dead, end.silent, end.dormant)]
        shares = [percent(100 * share) for share in (end.zero_outputs, end.zero_gradients)]
        lines.append(f"| {variant.label} | " + " | ".join([*shares, *map(str, counts)]) + " |")
    return lines


@house_style()
def draw(found: dict[tuple[str, torch.dtype], Zeros]) -> None:
    """Draw f and f′ of six activations in float32, with the zones in which the gradient is exactly zero."""
    from matplotlib.figure import Figure

    shown = ("ReLU", "GELU", "SiLU", "Mish", "ELU", "Tanh")
    figure = Figure(figsize=(5.6, 7.2), dpi=200, layout="constrained")
    axes = figure.subplots(3, 2)  # upright, so that it can be read on a phone
    for place, name in enumerate(shown):
        panel, zeros = axes.flat[place], found[name, torch.float32]
        low = max(-120.0, 1.25 * zeros.gradient_below) if not math.isnan(zeros.gradient_below) else -8.0
        low, high = min(low, -4.0), 4.0 if math.isnan(zeros.gradient_above) else 1.25 * zeros.gradient_above
        x = torch.linspace(low, high, 4000)
        y, slope = evaluate(FUNCTIONS[name], x)
        for zone in ((low, zeros.gradient_below), (zeros.gradient_above, high)):
            if not any(map(math.isnan, zone)):
                panel.axvspan(*zone, color="#d03b3b", alpha=0.16, linewidth=0)
        panel.plot(x, y, color="#2a6fbb", label="f(x)")
        panel.plot(x, slope, color="#c1762a", label="f′(x)")
        panel.set_xlim(low, high)
        panel.set_ylim(-1.4, 1.6)
        edges = [
            f"{word} {_number(each)}"
            for word, each in (("up to", zeros.gradient_below), ("from", zeros.gradient_above))
            if not math.isnan(each)
        ]
        panel.set_title(f"{name}: {', '.join(edges)}", fontsize=10)
        panel.tick_params(labelsize=8)
    axes.flat[0].legend(loc="upper left", frameon=False)
    figure.suptitle("Where the gradient f′ is exactly zero (float32)", x=0.01, ha="left", fontsize=13)
    figure.savefig(PICTURE, format="png", metadata={"Software": None}, pil_kwargs={"optimize": True})


TEXT = """\
# Where smooth units stop

<!-- Written by scripts/smooth_zeros.py. Do not edit. -->

GELU, SiLU, Mish and ELU have a gradient that is nonzero nearly everywhere, so their neurons do not
die as ReLU's do. *Nearly*: a number has finitely many digits. Far enough below zero the output of a
smooth unit, and its gradient, underflow to exactly zero. From there on it is as dead as a ReLU.

<img src="images/smooth-units.png" width="480"
alt="Six activations and their derivatives; red where the gradient is exactly zero">

## From where on

Measured with PyTorch {torch}, {machine}, {today}. In 16 bits every number was tried; in
float32 a dense grid, and at each edge every number. – means nowhere up to ±10,000. Where output and
gradient do not end together, a neuron between the two is *silent* (no output, but a gradient) or
*cut off* (an output, but no gradient).

{zeros}

The exact GELU ends soon (its tail is that of a normal distribution), its tanh formula sooner, in
every type; SiLU, Mish and Softplus fall off like an exponential, and last to about −90 or −100 in
float32 and bfloat16. In float16, whose smallest number is 6·10⁻⁸, they end at −17 to −20. ELU never
has an output of zero below zero (it tends to −1), but its gradient ends. Sigmoid and tanh end on
both sides: above (*from* in the table), their gradient is zero as soon as the output rounds to 1,
which comes first in the types with few digits.

PyTorch computes most elements of a tensor in vectors, and the last few one by one, in other code.
The table is of vectors. One by one GELU's output ends where the table says, but its gradient lasts
to −14.3 in float32 and −13.8 in bfloat16; those of SiLU and Mish end as in the table. Processors
without AVX-512 compute GELU's gradient in bfloat16 one by one throughout. GPUs have code of their
own.

## What networks show

The demo's network (6 × 64, a learning-rate spike; one seed, all training images) with each
activation, at the end of training:

{demo}

Zeros of smooth units are no rarity, then: after a spike many pre-activations lie far below zero,
and GELU gives exact zeros for half of them. But a neuron is dead only if *all* of its inputs lie
there, and one input that does not sends it a gradient. What a spike does leave behind are *dormant*
neurons, whose output is next to nothing for all inputs: they are counted apart. See [the
definitions](definitions.md).
"""


def main() -> int:
    """Write the page and the picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0, help="seed of the demo's networks")
    options = parser.parse_args()
    found = {(name, dtype): zeros_of(function, dtype) for name, function in FUNCTIONS.items() for dtype in TYPES}
    draw(found)
    text = TEXT.format(
        torch=torch.__version__.partition("+")[0],
        machine=f"CPU ({platform.machine()})",
        today=date.today().isoformat(),
        zeros="\n".join(zero_table(found)),
        demo="\n".join(demo_table(options.seed)),
    )
    PAGE.write_text(text, encoding="utf-8")
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
