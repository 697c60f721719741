"""Hold the results as plain numbers, for single runs and over the seeds of a variant, without torch."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

__all__ = ["NUMBERS", "Collapse", "Comparison", "Epoch", "Moment", "Network", "Run", "Spread"]

#: Version of the data that :meth:`Comparison.to_dict` returns.
_SCHEMA_VERSION = 2


@dataclass(frozen=True)
class Network:
    """Describe the networks of a variant."""

    label: str  # the variant's name in tables and sentences
    neurons: int  # number of hidden neurons; all layers have as many
    parameters: int


@dataclass(frozen=True)
class Moment:
    """Hold the numbers of a scan between two epochs, over the whole training set with fixed weights (``L`` layers)."""

    step: int  # number of optimizer steps taken
    dead: tuple[int, ...]  # dead neurons in each layer, ``(L,)``
    silent: tuple[int, ...]  # neurons in each layer with zero output for every image, but with gradient, ``(L,)``
    dormant: tuple[int, ...]  # dormant neurons in each layer, neither dead nor silent, ``(L,)``
    cut_off: tuple[int, ...]  # neurons in each layer that fire but get no gradient, ``(L,)``
    zero_outputs: float  # fraction of all outputs that are exactly zero
    zero_gradients: float  # fraction of all gradients at the pre-activations that are exactly zero
    not_finite: int  # number of NaN and infinite outputs


@dataclass(frozen=True)
class Epoch:
    """Hold the numbers of one epoch, watched during training as one window (``L`` layers)."""

    step: int  # number of optimizer steps taken at its end
    dead: tuple[int, ...]  # neurons in each layer that were dead during the whole epoch, ``(L,)``
    dormant: tuple[int, ...]  # dormant (not dead) neurons in each layer, ``(L,)``
    loss: float  # mean training loss
    accuracy: float  # fraction of the test images classified correctly at its end


@dataclass(frozen=True)
class Collapse:
    """Hold what the layers of a network without activations come to: one linear map."""

    layers: int  # number of layers that are one map, the last one included
    inputs: int  # number of inputs of the map
    outputs: int
    rank: int  # rank of its matrix
    parameters: int  # number of parameters of one layer that computes it
    #: Largest difference between the network's outputs, in float32, and those of the product of its layers, in float64,
    #: over all images, as a share of the largest output.
    difference: float
    #: Whether rounding to float32 explains the difference, and :func:`neuronscope.check_linear` finds the same product.
    equal: bool
    #: Fraction of the test images that a linear classifier, trained in the same way, gets right.
    classifier_accuracy: float


@dataclass(frozen=True)
class Run:
    """Hold the numbers of one training run."""

    variant: str
    seed: int
    scans: tuple[Moment, ...]  # scans before the first epoch and after each one
    epochs: tuple[Epoch, ...]
    died: int  # neurons dead at the end that were not dead at the start
    revived: int  # neurons dead at the start that were not dead at the end
    recount_agrees: bool  # whether the slow recount finds the same dead neurons at the end as the library
    seconds: float  # duration of the run
    gradient_reach: float = 1.0  # before the first step, the gradient at the first layer ÷ that at the last hidden one
    slopes: tuple[float, ...] = ()  # the slope below zero that each layer has learned, if its activation learns one
    collapse: Collapse | None = None  # the one linear map that the network is, if it has no activation

    @property
    def start(self) -> Moment:
        """The scan before the first step."""
        return self.scans[0]

    @property
    def end(self) -> Moment:
        """The scan after the last epoch."""
        return self.scans[-1]

    @property
    def accuracy(self) -> float:
        """Fraction of the test images classified correctly at the end."""
        return self.epochs[-1].accuracy


@dataclass(frozen=True)
class Spread:
    """Summarize a number over the seeds."""

    mean: float
    deviation: float | None  # the sample standard deviation; ``None`` if there is only one seed
    least: float  # the minimum
    most: float  # the maximum

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        """Summarize one value or several.

        >>> Spread.of([1, 2, 3])
        Spread(mean=2.0, deviation=1.0, least=1.0, most=3.0)
        """
        numbers = [float(value) for value in values]
        deviation = statistics.stdev(numbers) if len(numbers) > 1 else None
        return cls(statistics.fmean(numbers), deviation, min(numbers), max(numbers))


#: What is told of a run in numbers.
NUMBERS: dict[str, Callable[[Run], float]] = {
    "dead_at_start": lambda run: sum(run.start.dead),
    "dead_at_end": lambda run: sum(run.end.dead),
    "died_in_training": lambda run: run.died,
    "revived_in_training": lambda run: run.revived,
    "silent_at_end": lambda run: sum(run.end.silent),
    "dormant_at_end": lambda run: sum(run.end.dormant),
    "cut_off_at_end": lambda run: sum(run.end.cut_off),
    "zero_outputs_at_end": lambda run: run.end.zero_outputs,
    "zero_gradients_at_end": lambda run: run.end.zero_gradients,
    "test_accuracy": lambda run: run.accuracy,
    "gradient_reach_at_start": lambda run: run.gradient_reach,
}


@dataclass(frozen=True)
class Comparison:
    """Hold all runs of the comparison."""

    recipe: dict[str, Any]  # the settings that all runs share, as plain data
    networks: dict[str, Network]  # the variants by name, in the order in which they are shown
    runs: tuple[Run, ...]  # the runs, variant by variant
    versions: dict[str, str]  # versions of the software that made them

    @property
    def seeds(self) -> list[int]:
        """The seeds, ascending."""
        return sorted({run.seed for run in self.runs})

    @property
    def around_spike(self) -> tuple[int, int]:
        """The last epoch before the spike and the last epoch of the spike, which are also indices into ``scans``."""
        first, last = self.recipe["spike_epochs"]
        return first - 1, last

    def of(self, variant: str) -> list[Run]:
        """Return the runs of a variant."""
        return [run for run in self.runs if run.variant == variant]

    def spread(self, variant: str, number: str) -> Spread:
        """Summarize a number over the seeds of a variant.

        Args:
            variant: Name of the variant.
            number: Name of the number in :data:`NUMBERS`.
        """
        return Spread.of(NUMBERS[number](run) for run in self.of(variant))

    def accuracy(self, variant: str) -> Spread:
        """Summarize the test accuracy over the seeds of a variant, in percent."""
        return Spread.of(100 * run.accuracy for run in self.of(variant))

    def share(self, variant: str, label: str) -> float:
        """Return the mean number of neurons with a label at the end, as a fraction of a variant's neurons.

        Args:
            variant: Name of the variant.
            label: A field of :class:`Moment` that has a number for each layer.
        """
        return sum(self.by_layer(variant, label)) / self.networks[variant].neurons

    def by_layer(self, variant: str, label: str) -> list[float]:
        """Return the mean number of neurons with a label at the end in each layer, over the seeds of a variant.

        Args:
            variant: Name of the variant.
            label: A field of :class:`Moment` that has a number for each layer.
        """
        counts = (getattr(run.end, label) for run in self.of(variant))
        return [statistics.fmean(layer) for layer in zip(*counts, strict=True)]

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain data for JSON."""
        return {
            "schema_version": _SCHEMA_VERSION,
            "recipe": self.recipe,
            "seeds": self.seeds,
            "versions": self.versions,
            "summary": {name: self._summary(name) for name in self.networks},
            "runs": [_plain(asdict(run)) for run in self.runs],
        }

    def _summary(self, variant: str) -> dict[str, Any]:
        before, after = self.around_spike
        around = {
            "dead_before_spike": Spread.of(sum(run.scans[before].dead) for run in self.of(variant)),
            "dead_after_spike": Spread.of(sum(run.scans[after].dead) for run in self.of(variant)),
        }
        spreads = {**around, **{name: self.spread(variant, name) for name in NUMBERS}}
        return {
            **asdict(self.networks[variant]),
            **{name: _plain(asdict(spread)) for name, spread in spreads.items()},
            "dead_at_end_by_layer": self.by_layer(variant, "dead"),
            "dormant_at_end_by_layer": self.by_layer(variant, "dormant"),
        }


def _plain(value: Any) -> Any:
    """Return ``value`` in a form for JSON: tuples as lists, numbers that are not finite as ``None``."""
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
