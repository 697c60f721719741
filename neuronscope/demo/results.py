"""The results as plain numbers: what one run gave, and what the runs of a variant have in common. No torch here."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

__all__ = ["Comparison", "Epoch", "Moment", "Run", "Spread"]

#: Version of the JSON that :meth:`Comparison.to_dict` gives.
_SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Moment:
    """A network between two epochs, its weights fixed, scanned over the whole training set (``L`` layers).

    Attributes:
        step: Optimizer steps taken.
        dead: Dead neurons by layer, ``(L,)``.
        dormant: Dormant (not dead) neurons by layer, ``(L,)``.
        cut_off: Neurons by layer that fire and get no gradient, ``(L,)``.
        zero_outputs: Share of all outputs that are exactly zero.
        zero_gradients: Share of all gradients at the pre-activations that are exactly zero.
        not_finite: NaN and infinite outputs.
    """

    step: int
    dead: tuple[int, ...]
    dormant: tuple[int, ...]
    cut_off: tuple[int, ...]
    zero_outputs: float
    zero_gradients: float
    not_finite: int


@dataclass(frozen=True)
class Epoch:
    """One epoch as it was watched while the weights moved: a window of its own (``L`` layers).

    Attributes:
        step: Optimizer steps taken at its end.
        dead: Neurons by layer that were dead throughout the epoch, ``(L,)``.
        dormant: Dormant (not dead) neurons by layer, ``(L,)``.
        loss: Mean training loss.
        accuracy: Share of the test images named right after it.
    """

    step: int
    dead: tuple[int, ...]
    dormant: tuple[int, ...]
    loss: float
    accuracy: float


@dataclass(frozen=True)
class Run:
    """One training run.

    Attributes:
        variant: The variant's name.
        seed: The seed.
        scans: Before the first epoch and after each, one more than epochs.
        epochs: What was watched, epoch by epoch.
        died: Neurons dead at the end that were not dead at the start.
        revived: Neurons dead at the start that were not dead at the end.
        recount_agrees: Whether the slow recount names the same dead neurons at the end as the library.
        seconds: How long it took.
    """

    variant: str
    seed: int
    scans: tuple[Moment, ...]
    epochs: tuple[Epoch, ...]
    died: int
    revived: int
    recount_agrees: bool
    seconds: float

    @property
    def start(self) -> Moment:
        """Before the first step."""
        return self.scans[0]

    @property
    def end(self) -> Moment:
        """After the last epoch."""
        return self.scans[-1]

    @property
    def accuracy(self) -> float:
        """Share of the test images named right at the end."""
        return self.epochs[-1].accuracy


@dataclass(frozen=True)
class Spread:
    """A number over the seeds.

    Attributes:
        mean: Its mean.
        deviation: Its sample standard deviation; ``None`` where there is only one seed.
        least: The least.
        most: The most.
    """

    mean: float
    deviation: float | None
    least: float
    most: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        """The spread of some values, at least one.

        >>> Spread.of([1, 2, 3])
        Spread(mean=2.0, deviation=1.0, least=1.0, most=3.0)
        """
        listed = [float(value) for value in values]
        deviation = statistics.stdev(listed) if len(listed) > 1 else None
        return cls(statistics.fmean(listed), deviation, min(listed), max(listed))


@dataclass(frozen=True)
class Comparison:
    """All runs.

    Attributes:
        recipe: What they share, as plain data.
        neurons: Hidden neurons of a network.
        labels: Variant's name → its label, in the order in which they are shown.
        runs: The runs, variant by variant.
        versions: Versions of what made them.
    """

    recipe: dict[str, Any]
    neurons: int
    labels: dict[str, str]
    runs: tuple[Run, ...]
    versions: dict[str, str]

    @property
    def seeds(self) -> list[int]:
        """The seeds, rising."""
        return sorted({run.seed for run in self.runs})

    @property
    def around_spike(self) -> tuple[int, int]:
        """The last epoch before the learning rate's spike, and the last of the spike; they are also places in scans."""
        first, last = self.recipe["spike_epochs"]
        return first - 1, last

    def of(self, variant: str) -> list[Run]:
        """The runs of a variant."""
        return [run for run in self.runs if run.variant == variant]

    def spread(self, variant: str, number: Callable[[Run], float]) -> Spread:
        """A number over the seeds of a variant."""
        return Spread.of(number(run) for run in self.of(variant))

    def by_layer(self, variant: str, counts: Callable[[Run], tuple[int, ...]]) -> list[float]:
        """Mean counts over the seeds of a variant, by layer, ``(L,)``."""
        return [statistics.fmean(layer) for layer in zip(*(counts(run) for run in self.of(variant)), strict=True)]

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain data, fit for JSON."""
        return {
            "schema_version": _SCHEMA_VERSION,
            "recipe": self.recipe,
            "neurons": self.neurons,
            "seeds": self.seeds,
            "versions": self.versions,
            "summary": {name: self._summary(name) for name in self.labels},
            "runs": [_plain(asdict(run)) for run in self.runs],
        }

    def _summary(self, variant: str) -> dict[str, Any]:
        before, after = self.around_spike
        numbers: dict[str, Callable[[Run], float]] = {
            "dead_at_start": lambda run: sum(run.start.dead),
            "dead_before_spike": lambda run: sum(run.scans[before].dead),
            "dead_after_spike": lambda run: sum(run.scans[after].dead),
            "dead_at_end": lambda run: sum(run.end.dead),
            "died_in_training": lambda run: run.died,
            "revived_in_training": lambda run: run.revived,
            "dormant_at_end": lambda run: sum(run.end.dormant),
            "cut_off_at_end": lambda run: sum(run.end.cut_off),
            "zero_outputs_at_end": lambda run: run.end.zero_outputs,
            "zero_gradients_at_end": lambda run: run.end.zero_gradients,
            "test_accuracy": lambda run: run.accuracy,
        }
        return {
            "label": self.labels[variant],
            **{name: _plain(asdict(self.spread(variant, number))) for name, number in numbers.items()},
            "dead_at_end_by_layer": self.by_layer(variant, lambda run: run.end.dead),
            "dormant_at_end_by_layer": self.by_layer(variant, lambda run: run.end.dormant),
        }


def _plain(value: Any) -> Any:
    """``value`` fit for JSON: tuples as lists, and numbers that are not finite as ``None``."""
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
