"""Hold the results on a watched network as plain data: counts, verdicts and history of each site.

Everything that a person sees is made from a report by one of :mod:`neuronscope.writers`. This module does not import
torch, so reports can be read, shown and compared where torch is not installed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar

import numpy as np

from neuronscope.arrays import BoolArray, ByteArray, FloatArray, IntArray
from neuronscope.errors import UsageError
from neuronscope.judge.verdicts import LABELS, Judgement, Policy, Verdict, rate_bound
from neuronscope.report.acts import Act
from neuronscope.report.rendering import LayersByName, Renderable
from neuronscope.report.totals import NeuronCounts, Totals
from neuronscope.sites import SiteDescription

__all__ = [
    "COUNTS",
    "HISTORY_COUNTS",
    "LEVELS",
    "LEVEL_CUT_OFF",
    "LEVEL_DEAD",
    "LEVEL_DORMANT",
    "LEVEL_MAX",
    "LEVEL_NOT_FINITE",
    "LEVEL_SILENT",
    "LEVEL_UNSEEN",
    "MEANS",
    "POSITIONS",
    "SCHEMA_VERSION",
    "SITE_COUNTS",
    "NotMeasured",
    "Report",
    "SiteHistory",
    "SiteReport",
    "WindowSpan",
]

#: Version of the data that :meth:`Report.to_dict` returns. Increased when a field is renamed, moved or removed.
SCHEMA_VERSION = 3

# A history has one byte per neuron and window. Values below LEVEL_MAX are zero-output fractions, in units of
# 1 / LEVEL_MAX (0 = never zero). A neuron with zero output at every position that still gets gradient is silent, so
# LEVEL_MAX itself is that verdict. The values above it are the other verdicts.
LEVEL_MAX = 250
LEVEL_SILENT = LEVEL_MAX
LEVEL_UNSEEN = 251
LEVEL_DORMANT = 252
LEVEL_CUT_OFF = 253
LEVEL_NOT_FINITE = 254
LEVEL_DEAD = 255
#: The level of each label that has one.
LEVELS = {
    "unseen": LEVEL_UNSEEN,
    "not finite": LEVEL_NOT_FINITE,
    "dead": LEVEL_DEAD,
    "silent": LEVEL_SILENT,
    "cut off": LEVEL_CUT_OFF,
    "dormant": LEVEL_DORMANT,
}

#: Names in :meth:`Report.to_dict`: the numbers of neurons in the totals, …
COUNTS = ("dead", "born_dead", "silent", "dormant", "tau_dormant", "cut_off")
#: … those of each site, …
SITE_COUNTS = (*COUNTS, "linear", "unseen")
#: … those of each window of a site's history, …
HISTORY_COUNTS = ("dead", "silent", "dormant", "cut_off")
#: … what was observed of a site, …
POSITIONS = ("positions", "gradient_positions", "examples")
#: … and the means of each neuron over its positions.
MEANS = ("zero_output_fraction", "zero_gradient_fraction", "mean_abs_output")


_CODES_OF_LEVELS: ByteArray = np.full(256, LABELS.index("alive"), dtype=np.uint8)
_CODES_OF_LEVELS[list(LEVELS.values())] = [LABELS.index(label) for label in LEVELS]


@dataclass(frozen=True)
class WindowSpan:
    """Describe the window that verdicts are based on.

    Attributes:
        name: ``last`` (the newest closed window), or ``all`` (everything since watching began) if none has closed.
        first_step: First optimizer step observed in it; −1 if none was.
        last_step: Last optimizer step observed in it; −1 if none was.
        steps: Number of optimizer steps observed in it.
        long_enough: Whether it has enough examples for the policy's confidence.
    """

    name: str
    first_step: int
    last_step: int
    steps: int
    long_enough: bool


@dataclass(frozen=True)
class NotMeasured:
    """Name something that could not be measured, and the reason. It is never reported as zero."""

    name: str  # module path or site name
    reason: str  # one sentence


@dataclass(frozen=True)
class SiteHistory:
    """Hold the verdicts on one site over all windows of a phase, oldest first (``W`` windows, ``N`` neurons).

    Attributes:
        steps: Last optimizer step of each window, int64 ``(W,)``, ascending.
        levels: One byte per window and neuron, uint8 ``(W, N)``: values below ``LEVEL_MAX`` are the zero-output
            fraction, the others are the ``LEVEL_*`` verdicts.
        died_step: Step of each neuron's latest death: the first step at which it was observed not to fire. −1 = it did
            not die while it was watched, or it was dead from the start. int64 ``(N,)``.
        revived_step: Step of each neuron's latest revival: the step at which it was observed to fire again; −1 = never.
            int64 ``(N,)``.
        deaths: Number of deaths of each neuron, int64 ``(N,)``.
        revivals: Number of revivals of each neuron, int64 ``(N,)``.
    """

    steps: IntArray
    levels: ByteArray
    died_step: IntArray
    revived_step: IntArray
    deaths: IntArray
    revivals: IntArray

    @cached_property
    def dead(self) -> IntArray:
        """Dead neurons in each window, int64 ``(W,)``; 0 for a window in which the site did not run."""
        return self._number_at(LEVEL_DEAD)

    @cached_property
    def silent(self) -> IntArray:
        """Silent neurons in each window, int64 ``(W,)``."""
        return self._number_at(LEVEL_SILENT)

    @cached_property
    def dormant(self) -> IntArray:
        """Dormant neurons in each window, int64 ``(W,)``."""
        return self._number_at(LEVEL_DORMANT)

    @cached_property
    def cut_off(self) -> IntArray:
        """Cut-off neurons in each window, int64 ``(W,)``."""
        return self._number_at(LEVEL_CUT_OFF)

    def _number_at(self, level: int) -> IntArray:
        number: IntArray = (self.levels == level).sum(axis=1)
        return number

    def labels(self, window: int) -> ByteArray:
        """Return the labels in one window, as indices into :data:`neuronscope.judge.verdicts.LABELS`, uint8 ``(N,)``.

        Levels do not tell neurons that were never off from others, so ``linear`` ones are ``alive`` here.
        """
        labels: ByteArray = _CODES_OF_LEVELS[self.levels[window]]
        return labels

    def to_dict(self) -> dict[str, Any]:
        """Return the history as plain lists."""
        return {name: getattr(self, name).tolist() for name in (*self.__dataclass_fields__, *HISTORY_COUNTS)}


@dataclass(frozen=True, kw_only=True)
class SiteReport(SiteDescription, NeuronCounts):
    """Hold the results on one site over the report's window (``N`` neurons).

    Attributes:
        name: The site's name.
        neurons: ``N``.
        positions: Positions at which each neuron's output was observed.
        gradient_positions: Positions at which each neuron's gradient was observed; 0 = no gradient was observed.
        examples: Independent examples (rows of the network's input) in the counts; 0 if that is not known.
        not_finite: Number of NaN and infinite outputs of all neurons.
        zero_output_fraction: Zero outputs ÷ positions, float64 ``(N,)``; NaN if unseen.
        zero_gradient_fraction: Zero gradients ÷ gradient positions, float64 ``(N,)``; NaN if unseen.
        mean_abs_output: Mean of ``|y|``, float64 ``(N,)``; NaN if unseen.
        last_active_step: Last observed step at which each neuron fired, from the start of watching to the end of the
            window, int64 ``(N,)``; −1 = never.
        judgement: One mask per verdict; see :class:`neuronscope.judge.verdicts.Judgement`.
        history: The site's history; see :class:`SiteHistory`.
        idle_positions: Of a site of kind ``sparse``: positions since the last step in which each neuron fired, from the
            start of watching to the end of the window, int64 ``(N,)``; all of them for one that never did. ``None`` for
            other kinds.
    """

    name: str
    neurons: int
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
    idle_positions: IntArray | None = None

    def __repr__(self) -> str:
        return f"<SiteReport {self.name!r}: {self.dead} of {self.neurons} neurons dead>"

    def count(self, mask: Callable[[SiteReport], BoolArray]) -> int:
        """Return the number of the site's neurons with some property.

        Args:
            mask: Returns which neurons of a site have the property, bool ``(N,)``.
        """
        return int(mask(self).sum())

    @property
    def is_unseen(self) -> bool:
        """Whether none of its neurons was observed in the window."""
        return not self.observed_neurons

    def not_fired_in(self, positions: int) -> int:
        """Return how many neurons of a site of kind ``sparse`` did not fire in the last positions (tokens).

        Args:
            positions: Number of positions. A neuron counts from the end of the last step in which it fired, as in the
                training libraries for sparse autoencoders.

        Raises:
            UsageError: This is not kept for the site's kind.
        """
        if self.idle_positions is None:
            raise UsageError(
                f"Expected a layer of kind 'sparse', but {self.name!r} is of kind {self.kind!r}: how long its neurons "
                "have not fired is not kept. Count its output with `scope.count()`."
            )
        return int((self.idle_positions >= positions).sum())

    @property
    def log10_density(self) -> FloatArray:
        """log10 of the share of positions at which each neuron fired, float64 ``(N,)``; −inf = never, NaN = unseen."""
        with np.errstate(divide="ignore"):
            density: FloatArray = np.log10(1.0 - self.zero_output_fraction)
        return density

    def density_histogram(self, bins_per_decade: int = 2) -> tuple[IntArray, FloatArray]:
        """Return how many neurons have which log10 firing density; those that never fired are in no bin.

        Args:
            bins_per_decade: Number of bins for a factor of 10.

        Returns:
            The numbers, int64 ``(B,)``, and the edges, float64 ``(B + 1,)``: from a whole number that is low enough for
            a neuron that fired once, up to 0. A neuron on an edge is in the bin above it; 0 is in the last one.
        """
        decades = max(1, int(np.ceil(np.log10(max(self.positions, 1)))))
        edges: FloatArray = np.linspace(-decades, 0, decades * bins_per_decade + 1)
        density = self.log10_density
        counts, _ = np.histogram(density[np.isfinite(density)].clip(-decades, 0), edges)
        return counts.astype(np.int64), edges

    def worst(self, count: int = 5) -> list[int]:
        """Return the neurons that are not alive, the most serious label first, then the lowest output.

        Args:
            count: Maximum number of neurons.

        Returns:
            Their indices along the site's neuron axis.
        """
        labels = self.judgement.labels()
        order = np.lexsort((np.arange(self.neurons), np.nan_to_num(self.mean_abs_output), labels))
        unhealthy = [int(i) for i in order if LABELS[labels[i]] not in ("alive", "linear", "unseen")]
        return unhealthy[:count]

    def to_dict(self) -> dict[str, Any]:
        """Return the site as plain data; NaN becomes ``None``."""
        return {
            **self.description(),
            "units": [list(run) for run in self.units],
            "reader_columns": [each._asdict() for each in self.reader_columns],
            "incoming": [each._asdict() for each in self.incoming],
            **{name: list(getattr(self, name)) for name in ("readers", "reader_notes", "incoming_notes")},
            **{name: getattr(self, name) for name in ("weights_unknown", "in_headlines", "died", *SITE_COUNTS)},
            **{name: getattr(self, name) for name in ("name", "neurons", "not_finite", *POSITIONS)},
            **{name: _plain(getattr(self, name)) for name in MEANS},
            "labels": [LABELS[code] for code in self.judgement.labels()],
            "last_active_step": self.last_active_step.tolist(),
            **({} if self.idle_positions is None else {"idle_positions": self.idle_positions.tolist()}),
            "history": self.history.to_dict(),
        }


@dataclass(frozen=True, repr=False)
class Report(Renderable, LayersByName[SiteReport], NeuronCounts):
    """Hold the results on a watched network in one phase, as plain data.

    Printing a report shows a table with one row per site. :meth:`to_html`, :meth:`to_json` and :meth:`to_markdown`
    return it in other formats.

    Attributes:
        model: Class name of the watched model.
        phase: ``train``, ``val``, ``test`` or ``scan``.
        global_step: Number of optimizer steps taken since watching began.
        window: The window that the verdicts are based on.
        policy: The thresholds, as plain data.
        layers: One :class:`SiteReport` per site, in the order in which the sites first ran.
        not_measured: What could not be measured, and why.
        notes: Sentences that a reader should know (the network gave NaN, no gradients were seen, …). If there is a
            ``fault``, it comes first.
        fault: How an error inside Neuronscope ended the watch; ``""`` if none did.
        series: What the training logged, as points ``(step, value)`` by name, steps rising: ``learning_rate``, ``loss``
            and ``gradient_norm``, as far as the watch was told. Of many neighbours the highest value is kept.
        checkpoints: Steps at which checkpoints were saved, as far as the watch was told, ascending.
        versions: Versions of neuronscope, torch and numpy that made the report.
        schema_version: Version of the data that :meth:`to_dict` returns.
        acts: What was done to neurons by :func:`neuronscope.revive`, oldest first.
    """

    WRITERS: ClassVar[Mapping[str, str]] = {
        name: f"neuronscope.writers.{name}" for name in ("terminal", "markdown", "html", "table", "figure")
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
    series: Mapping[str, tuple[tuple[int, float], ...]] = field(default_factory=dict)
    checkpoints: tuple[int, ...] = ()
    versions: dict[str, str] = field(default_factory=dict)
    schema_version: int = SCHEMA_VERSION
    acts: tuple[Act, ...] = ()

    @property
    def provisional(self) -> bool:
        """Whether the window has fewer examples than the policy asks for, so that verdicts may still change."""
        return not self.window.long_enough

    @property
    def examples(self) -> int:
        """Number of examples that the verdicts are based on: that of the observed site with the fewest.

        Sites that are not in the totals are left out, unless there are no others.
        """
        seen = [site for site in self.layers if site.unseen < site.neurons]
        return min((site.examples for site in [site for site in seen if site.in_headlines] or seen), default=0)

    @property
    def examples_known(self) -> bool:
        """Whether the number of examples is known at every observed site; where it is not, no bound is claimed."""
        return self.examples > 0 or not self.observed_neurons

    @property
    def examples_needed(self) -> int:
        """Number of examples that the policy asks for."""
        return Policy(confidence=self.policy["confidence"], max_rate=self.policy["max_rate"]).min_examples

    @property
    def other_notes(self) -> tuple[str, ...]:
        """The notes without ``fault``, which writers show first."""
        return tuple(note for note in self.notes if note != self.fault)

    @cached_property
    def totals(self) -> Totals:
        """The totals, in which each unit of a layer is one neuron; see :class:`neuronscope.report.totals.Totals`."""
        return Totals(self.layers)

    @property
    def headline_layers(self) -> tuple[SiteReport, ...]:
        """The sites that totals include: not those whose axis is assumed, nor outputs."""
        return tuple(site for site in self.layers if site.in_headlines)

    @property
    def neurons(self) -> int:
        """Number of neurons in the totals. A neuron that goes through several activations is counted once."""
        return self.totals.neurons

    @property
    def label_counts(self) -> dict[str, int]:
        """Number of neurons in the totals by label; each has one, so they add up to ``neurons``."""
        return self.totals.label_counts()

    def count(self, mask: Callable[[SiteReport], BoolArray]) -> int:
        """Return the number of neurons in the totals with some property.

        Args:
            mask: Returns which neurons of a site have the property, bool ``(N,)``.
        """
        return self.totals.count(mask)

    @property
    def not_finite(self) -> int:
        """Number of NaN and infinite outputs at all sites, also at those that are not in the totals."""
        return sum(site.not_finite for site in self.layers)

    @property
    def collapsed(self) -> tuple[str, ...]:
        """Names of the layers in the totals, of two neurons or more, in which every neuron is dead."""
        return tuple(site.name for site in self.headline_layers if 1 < site.neurons == site.dead)

    def _in_short(self) -> str:
        broken = "; NaN or infinite outputs" if self.not_finite else ""
        dead = f"{self.dead} of {self.judged_neurons} neurons dead{', provisional' if self.provisional else ''}{broken}"
        return f"on {self.model!r}, phase {self.phase!r}, step {self.global_step}: {dead}"

    def verdicts(self) -> Iterator[Verdict]:
        """Yield a verdict for every neuron that is neither alive nor linear, site by site.

        A neuron that is seen at several sites has one verdict, at the site that gives it its label. Verdicts on neurons
        that are not in the totals are marked; see :attr:`neuronscope.judge.verdicts.Verdict.in_headlines`.
        """
        for site, stands_in in zip(self.layers, self.totals.stand_ins, strict=True):
            labels = site.judgement.labels()
            bound = rate_bound(site.examples, self.policy["confidence"]) if site.examples else None
            for neuron in np.flatnonzero(stands_in & (labels < LABELS.index("linear"))):
                label = LABELS[labels[neuron]]
                is_dead = label == "dead"
                born_dead = bool(site.last_active_step[neuron] < 0)
                yield Verdict(
                    site=site.name,
                    neuron=int(neuron),
                    label=label,
                    basis="measured",
                    examples=site.examples,
                    bound=bound if label in ("dead", "silent") else None,
                    since=(-1 if born_dead else int(site.history.died_step[neuron])) if is_dead else None,
                    in_headlines=site.in_headlines,
                )

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain data: dicts, lists, strings and numbers; NaN becomes ``None``."""
        return {
            "schema_version": self.schema_version,
            "model": self.model,
            "phase": self.phase,
            "global_step": self.global_step,
            "window": {
                **vars(self.window),
                "provisional": self.provisional,
                "examples": self.examples,
                "bound": rate_bound(self.examples, self.policy["confidence"]) if self.examples_known else None,
            },
            "policy": dict(self.policy),
            "summary": {
                "layers": len(self.layers),
                **{name: getattr(self, name) for name in ("neurons", "not_finite", *COUNTS)},
                "labels": self.label_counts,
                "dead_percent": _plain(np.array([self.dead_percent]))[0],
            },
            "layers": [site.to_dict() for site in self.layers],
            "not_measured": [vars(item).copy() for item in self.not_measured],
            "notes": list(self.notes),
            "fault": self.fault,
            "series": {
                name: {
                    "steps": [step for step, _ in points],
                    "values": _plain(np.array([value for _, value in points])),
                }
                for name, points in self.series.items()
            },
            "checkpoints": list(self.checkpoints),
            "versions": dict(self.versions),
            "acts": [act.to_dict() for act in self.acts],
        }


def _plain(values: FloatArray) -> list[float | None]:
    return [float(value) if np.isfinite(value) else None for value in values]
