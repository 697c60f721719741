"""Report: plain data made from a census, its judgements and its history.

Everything that is shown to a person is drawn from a report by one of :mod:`neuronscope.writers`. No torch here: a
report can be read, drawn and compared where torch is not installed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from neuronscope.judge.verdicts import LABELS, Judgement, Policy, Verdict, rate_bound
from neuronscope.report.rendering import Renderable

__all__ = [
    "LEVEL_CUT_OFF",
    "LEVEL_DEAD",
    "LEVEL_DORMANT",
    "LEVEL_MAX",
    "LEVEL_NOT_FINITE",
    "LEVEL_UNSEEN",
    "SCHEMA_VERSION",
    "NotMeasured",
    "Report",
    "SiteHistory",
    "SiteReport",
    "WindowSpan",
]

#: Version of the plain data that :meth:`Report.to_dict` gives. Raised when a field is renamed, moved or removed.
SCHEMA_VERSION = 2

# One byte a neuron and window in a history. 0 … LEVEL_MAX is the zero-output fraction (0 = exactly never zero,
# LEVEL_MAX = always zero, yet not dead: gradient still comes); the rest are verdicts.
LEVEL_MAX = 250
LEVEL_UNSEEN = 251
LEVEL_DORMANT = 252
LEVEL_CUT_OFF = 253
LEVEL_NOT_FINITE = 254
LEVEL_DEAD = 255

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]
ByteArray = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class WindowSpan:
    """The window that verdicts are of.

    Attributes:
        name: ``last`` (the newest closed window), or ``all`` (everything since watching began) where none has closed.
        first_step: First optimizer step observed in it; −1 when nothing was.
        last_step: Last optimizer step observed in it; −1 when nothing was.
        steps: Number of optimizer steps observed in it.
        long_enough: Whether its examples suffice for the policy's confidence.
    """

    name: str
    first_step: int
    last_step: int
    steps: int
    long_enough: bool


@dataclass(frozen=True)
class NotMeasured:
    """Something that could not be seen, and why. Not measured is never written as zero.

    Attributes:
        name: Module path or site name.
        reason: One sentence.
    """

    name: str
    reason: str


@dataclass(frozen=True)
class SiteHistory:
    """How one site fared over all windows of a phase, oldest first (``W`` windows, ``N`` neurons).

    Attributes:
        steps: Last optimizer step of each window, int64 ``(W,)``, rising.
        dead: Dead neurons in each window, int64 ``(W,)``; none in a window in which the site did not run.
        dormant: Dormant (not dead) neurons in each window, int64 ``(W,)``.
        cut_off: Cut-off neurons in each window, int64 ``(W,)``.
        levels: One byte per window and neuron, uint8 ``(W, N)``: 0 … ``LEVEL_MAX`` is the zero-output fraction,
            above it the ``LEVEL_*`` verdicts.
        died_step: Step at which each neuron was first observed not to fire, for its latest death; −1 = it never died
            while watched, or was dead from the start. int64 ``(N,)``.
        revived_step: Step at which each neuron was observed to fire again, for its latest revival; −1 = never.
        deaths: Number of deaths of each neuron, int64 ``(N,)``.
        revivals: Number of revivals of each neuron, int64 ``(N,)``.
    """

    steps: IntArray
    dead: IntArray
    dormant: IntArray
    cut_off: IntArray
    levels: ByteArray
    died_step: IntArray
    revived_step: IntArray
    deaths: IntArray
    revivals: IntArray

    def to_dict(self) -> dict[str, Any]:
        """The history as plain lists."""
        return {name: getattr(self, name).tolist() for name in self.__dataclass_fields__}


@dataclass(frozen=True)
class SiteReport:
    """What is known of one site over the report's window (``N`` neurons).

    Attributes:
        name: The site's name.
        activation: The activation function's name (``relu``, ``gelu``, …).
        kind: ``relu-like``, ``smooth``, ``leaky``, ``saturating`` or ``gated``.
        neurons: ``N``.
        axis: The dimension of the activation tensor that holds the neurons, as seen (≥ 0).
        axis_source: How the axis is known: ``declared``, ``producer (conv2d)`` …, or ``assumed (rank)``.
        positions: Positions at which each neuron's output was observed.
        gradient_positions: Positions at which each neuron's gradient was observed; 0 = gradients unseen.
        examples: Independent examples (rows of the network's input) behind this.
        not_finite: NaN and infinite outputs, all neurons together.
        zero_output_fraction: float64 ``(N,)``; NaN where unseen.
        zero_gradient_fraction: float64 ``(N,)``; NaN where unseen.
        mean_abs_output: Mean of ``|y|``, float64 ``(N,)``; NaN where unseen.
        last_active_step: Last observed step, up to the end of the window, at which each neuron fired since watching
            began, int64 ``(N,)``; −1 = never.
        judgement: The masks; see :class:`neuronscope.judge.verdicts.Judgement`.
        history: The site's history; see :class:`SiteHistory`.
    """

    name: str
    activation: str
    kind: str
    neurons: int
    axis: int
    axis_source: str
    positions: int
    gradient_positions: int
    examples: int
    not_finite: int
    zero_output_fraction: FloatArray
    zero_gradient_fraction: FloatArray
    mean_abs_output: FloatArray
    last_active_step: IntArray
    judgement: Judgement
    history: SiteHistory

    @property
    def dead(self) -> int:
        """Number of dead neurons."""
        return int(self.judgement.dead.sum())

    @property
    def born_dead(self) -> int:
        """Number of dead neurons that never fired since watching began."""
        return int((self.judgement.dead & (self.last_active_step < 0)).sum())

    @property
    def died(self) -> int:
        """Number of dead neurons that fired once and then stopped."""
        return self.dead - self.born_dead

    @property
    def dormant(self) -> int:
        """Number of dormant neurons that are not dead."""
        return int(self.judgement.dormant.sum())

    @property
    def cut_off(self) -> int:
        """Number of neurons that fire and get no gradient at any position."""
        return int(self.judgement.cut_off.sum())

    @property
    def linear(self) -> int:
        """Number of piecewise-linear neurons that were never off."""
        return int(self.judgement.linear.sum())

    @property
    def unseen(self) -> int:
        """Number of neurons that were never observed."""
        return int(self.judgement.unseen.sum())

    def worst(self, count: int = 5) -> list[int]:
        """Indices of up to ``count`` neurons that are not alive, most serious label first, then lowest output."""
        labels = self.judgement.labels()
        order = np.lexsort((np.arange(self.neurons), np.nan_to_num(self.mean_abs_output), labels))
        ill = [int(i) for i in order if LABELS[labels[i]] not in ("alive", "linear", "unseen")]
        return ill[:count]

    def to_dict(self) -> dict[str, Any]:
        """The site as plain data; NaN becomes ``None``."""
        labels = self.judgement.labels()
        return {
            "name": self.name,
            "activation": self.activation,
            "kind": self.kind,
            "neurons": self.neurons,
            "axis": self.axis,
            "axis_source": self.axis_source,
            "positions": self.positions,
            "gradient_positions": self.gradient_positions,
            "examples": self.examples,
            "not_finite": self.not_finite,
            "dead": self.dead,
            "born_dead": self.born_dead,
            "died": self.died,
            "dormant": self.dormant,
            "cut_off": self.cut_off,
            "linear": self.linear,
            "unseen": self.unseen,
            "labels": [LABELS[code] for code in labels],
            "zero_output_fraction": _plain(self.zero_output_fraction),
            "zero_gradient_fraction": _plain(self.zero_gradient_fraction),
            "mean_abs_output": _plain(self.mean_abs_output),
            "last_active_step": self.last_active_step.tolist(),
            "history": self.history.to_dict(),
        }


@dataclass(frozen=True)
class Report(Renderable):
    """Everything that is known of a watched network in one phase, as plain data.

    Printing a report gives a table by site. :meth:`to_html`, :meth:`to_json` and :meth:`to_markdown` draw it elsewhere.

    Attributes:
        model: Class name of the watched model.
        phase: ``train``, ``val``, ``test`` or ``scan``.
        global_step: Optimizer steps taken since watching began.
        window: The window that the verdicts are of.
        policy: The thresholds, as plain data.
        layers: One :class:`SiteReport` a site, in the order in which the sites ran.
        not_measured: What could not be seen.
        notes: Sentences a reader should know (network has gone NaN, no gradients were seen, …). The first is ``fault``
            where there was one.
        fault: How a fault of Neuronscope's own ended the watch; ``""`` where none did.
        versions: Versions of neuronscope, torch and numpy that made it.
    """

    WRITERS: ClassVar[Mapping[str, str]] = {
        name: f"neuronscope.writers.{name}" for name in ("terminal", "markdown", "json", "html")
    }

    model: str
    phase: str
    global_step: int
    window: WindowSpan
    policy: dict[str, float]
    layers: tuple[SiteReport, ...]
    not_measured: tuple[NotMeasured, ...] = ()
    notes: tuple[str, ...] = ()
    fault: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    schema_version: int = SCHEMA_VERSION

    @property
    def provisional(self) -> bool:
        """Whether the window has fewer examples than the policy asks for, so that verdicts may yet change."""
        return not self.window.long_enough

    @property
    def examples(self) -> int:
        """Examples behind the verdicts, at the observed site that has fewest of them."""
        return min((site.examples for site in self.layers if site.unseen < site.neurons), default=0)

    @property
    def examples_needed(self) -> int:
        """Examples that the policy asks for."""
        return Policy(confidence=self.policy["confidence"], max_rate=self.policy["max_rate"]).min_examples

    @property
    def other_notes(self) -> tuple[str, ...]:
        """The notes without ``fault``, which writers show before anything else."""
        return tuple(note for note in self.notes if note != self.fault)

    @property
    def neurons(self) -> int:
        """Neurons of all sites."""
        return sum(site.neurons for site in self.layers)

    @property
    def dead(self) -> int:
        """Dead neurons of all sites."""
        return sum(site.dead for site in self.layers)

    @property
    def born_dead(self) -> int:
        """Dead neurons that never fired since watching began."""
        return sum(site.born_dead for site in self.layers)

    @property
    def dormant(self) -> int:
        """Dormant neurons that are not dead."""
        return sum(site.dormant for site in self.layers)

    @property
    def cut_off(self) -> int:
        """Neurons that fire and get no gradient."""
        return sum(site.cut_off for site in self.layers)

    @property
    def not_finite(self) -> int:
        """NaN and infinite outputs seen."""
        return sum(site.not_finite for site in self.layers)

    @property
    def observed_neurons(self) -> int:
        """Neurons that were observed at least once in the window."""
        return sum(site.neurons - site.unseen for site in self.layers)

    @property
    def judged_neurons(self) -> int:
        """Neurons that were observed in the window and gave finite outputs only."""
        return sum(site.neurons - site.unseen - int(site.judgement.not_finite.sum()) for site in self.layers)

    @property
    def dead_percent(self) -> float:
        """Dead neurons in percent of the judged ones; NaN when none was: a broken network has no healthy share."""
        return 100.0 * self.dead / self.judged_neurons if self.judged_neurons else float("nan")

    @property
    def dormant_percent(self) -> float:
        """Dormant (not dead) neurons in percent of the judged ones; NaN when none was."""
        return 100.0 * self.dormant / self.judged_neurons if self.judged_neurons else float("nan")

    def __getitem__(self, name: str) -> SiteReport:
        """The site called ``name``."""
        for site in self.layers:
            if site.name == name:
                return site
        raise KeyError(name)

    def verdicts(self) -> Iterator[Verdict]:
        """Every neuron that is dead, cut off, dormant, not finite or unseen, site by site."""
        for site in self.layers:
            labels = site.judgement.labels()
            bound = rate_bound(site.examples, self.policy["confidence"])
            for neuron in np.flatnonzero(labels < LABELS.index("linear")):
                label = LABELS[labels[neuron]]
                dead = label == "dead"
                born = bool(site.last_active_step[neuron] < 0)
                yield Verdict(
                    site=site.name,
                    neuron=int(neuron),
                    label=label,
                    basis="measured",
                    examples=site.examples,
                    bound=bound if dead else None,
                    since=(-1 if born else int(site.history.died_step[neuron])) if dead else None,
                )

    def to_dict(self) -> dict[str, Any]:
        """The whole report as plain data: dicts, lists, strings and numbers; NaN becomes ``None``."""
        return {
            "schema_version": self.schema_version,
            "model": self.model,
            "phase": self.phase,
            "global_step": self.global_step,
            "window": {
                **vars(self.window),
                "provisional": self.provisional,
                "examples": self.examples,
                "bound": rate_bound(self.examples, self.policy["confidence"]),
            },
            "policy": dict(self.policy),
            "summary": {
                "layers": len(self.layers),
                "neurons": self.neurons,
                "dead": self.dead,
                "born_dead": self.born_dead,
                "dormant": self.dormant,
                "cut_off": self.cut_off,
                "not_finite": self.not_finite,
                "dead_percent": _plain(np.array([self.dead_percent]))[0],
            },
            "layers": [site.to_dict() for site in self.layers],
            "not_measured": [vars(item).copy() for item in self.not_measured],
            "notes": list(self.notes),
            "versions": dict(self.versions),
        }


def _plain(values: FloatArray) -> list[float | None]:
    return [float(value) if np.isfinite(value) else None for value in values]
