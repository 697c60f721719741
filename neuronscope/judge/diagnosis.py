"""Find the likely causes of dead neurons: a table of symptoms, each with a test, a cause and remedies.

A symptom is reported only if its test finds evidence, together with the layers, neurons and steps that show it. The
facts come from :func:`neuronscope.report.run_facts.facts_from_report` for a watched run, or from a post-mortem. This
module does not import torch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from neuronscope.judge import symptoms
from neuronscope.judge.symptoms import COLLAPSED, GROUPED, NOT_FINITE, LayerFacts, RunFacts, Support

__all__ = ["GUESS", "SYMPTOMS", "Diagnosis", "Remedy", "Symptom", "diagnose", "remedy_of"]


#: Heads a cause that does not follow from the evidence, so that every writer sets it apart.
GUESS = "Likely cause"


@dataclass(frozen=True)
class Remedy:
    """Hold one piece of advice and the conditions under which it applies."""

    #: A sentence. ``{before}`` is replaced by the step before which checkpoints do not show the symptom yet, ``{last}``
    #: by the last one that was saved before it, and ``{where}`` by the layers that the advice is for, if it is not for
    #: all of the symptom's layers.
    text: str
    #: ``True``: applies only if that step is known. ``False``: applies only if no step is known at all. ``None``:
    #: always applies.
    dated: bool | None = None
    #: Applies only if some layer's activation is of one of these kinds; ``unknown`` = no layer's kind is known. Empty:
    #: always applies.
    kinds: tuple[str, ...] = ()
    normalises: bool = False  # applies only if some layer is not known to be normalised already

    def where(self, layers: Sequence[LayerFacts]) -> str:
        """Return `` of <layers>``, those of the symptom's layers that are of the advice's kinds; empty if all are."""
        names = [layer.name for layer in layers if layer.kind in self.kinds]
        if not names or len(names) == len(layers):
            return ""
        return f" of {', '.join(names[:3])}{f' and {len(names) - 3:,} more' if len(names) > 3 else ''}"

    def applies(self, support: Support, layers: Sequence[LayerFacts]) -> bool:
        """Whether the advice applies.

        Args:
            support: The evidence for the symptom.
            layers: The layers that show it.
        """
        if self.dated is not None and (support.before is None if self.dated else support.steps is not None):
            return False
        if self.normalises and layers and all(layer.normalised for layer in layers):
            return False
        found = {layer.kind for layer in layers if layer.kind} or {"unknown"}
        return not self.kinds or not found.isdisjoint(self.kinds)


_GO_BACK = Remedy("Go back to a checkpoint before step {before:,}{last}.", dated=True)
_GO_BACK_UNDATED = Remedy("Go back to an earlier checkpoint that does not show this.", dated=False)
_SLOPE = Remedy("If the activation is zero for all negative inputs, use one with a slope there.", kinds=("unknown",))
_NORMALISE = Remedy("Normalise before the activation.", normalises=True)


@dataclass(frozen=True)
class Symptom:
    """Hold one row of the table."""

    name: str  # the symptom in a few words
    cause: str  # the likely cause, as a sentence
    remedies: tuple[Remedy, ...]  # what to do; only the remedies that apply are shown
    source: str  # source of this knowledge; ``""`` if it is arithmetic
    #: A function that returns the evidence in the facts, or ``None`` without evidence.
    test: Callable[[RunFacts], Support | None]
    certain: bool = False  # whether the cause follows from the evidence; otherwise it is the likely one

    def remedy(self, support: Support, facts: RunFacts) -> str:
        """Return the remedies that apply, as one text.

        Args:
            support: The evidence for the symptom.
            facts: The facts about the run.
        """
        layers = [layer for layer in facts.layers if layer.name in support.layers]
        saved, last = facts.last_checkpoint(support.before), ""
        if facts.checkpoints:
            last = " (none is known)" if saved is None else f" (the last one known is of step {saved:,})"
        return " ".join(
            each.text.format(before=support.before, last=last, where=each.where(layers))
            for each in self.remedies
            if each.applies(support, layers)
        )


@dataclass(frozen=True)
class Diagnosis:
    """Hold a symptom that was found, with its cause, remedy and evidence.

    Attributes:
        sign: Name of the symptom.
        cause: See :class:`Symptom`.
        remedy: The remedies that apply, as one text.
        source: See :class:`Symptom`.
        evidence: See :class:`neuronscope.judge.symptoms.Support`, as the fields that follow.
        neurons: Number of neurons that show it.
        layers: Names of the layers that show it, the most affected first.
        steps: First and last step that it concerns; ``None`` if no step is known.
        certain: Whether the cause follows from the evidence; otherwise it is the likely one.
    """

    sign: str
    cause: str
    remedy: str
    source: str
    evidence: str
    neurons: int
    layers: tuple[str, ...]
    steps: tuple[int, int] | None
    certain: bool = False

    def parts(self) -> list[tuple[str, str]]:
        """Return what is seen, the cause, what to do and the source: the name of each, and its text.

        The name of the cause says whether it is a guess.
        """
        cause = ("What it means" if self.certain else GUESS, self.cause)
        parts = [("What is seen", self.evidence), cause, ("What to do", self.remedy)]
        return [*parts, ("Source", self.source)] if self.source else parts

    def to_dict(self) -> dict[str, Any]:
        """Return the diagnosis as plain data."""
        plain = asdict(self)
        plain["layers"] = list(self.layers)
        plain["steps"] = list(self.steps) if self.steps else None
        return plain


def diagnose(facts: RunFacts) -> tuple[Diagnosis, ...]:
    """Return every symptom of the table that the facts show, the one with the most neurons first.

    >>> import numpy as np
    >>> from neuronscope.judge.symptoms import UNDATED
    >>> steps = np.array([300, 301, 301, 302, 305, 306, UNDATED, UNDATED])
    >>> layer = LayerFacts("relu", dead=steps >= 0, since=steps)
    >>> [found.sign for found in diagnose(RunFacts((layer,), step=5000))]
    ['deaths close together in time']
    >>> diagnose(RunFacts((LayerFacts("relu", dead=steps < -2, since=steps),), step=5000))
    ()
    """
    found = []
    for symptom in SYMPTOMS:
        support = symptom.test(facts)
        if support is not None:
            found.append(
                Diagnosis(
                    sign=symptom.name,
                    cause=symptom.cause,
                    remedy=symptom.remedy(support, facts),
                    source=symptom.source,
                    evidence=support.evidence,
                    neurons=support.neurons,
                    layers=support.layers,
                    steps=support.steps,
                    certain=symptom.certain,
                )
            )
    return tuple(sorted(found, key=lambda each: -each.neurons))


def remedy_of(name: str, support: Support, facts: RunFacts) -> str:
    """Return the remedies of a symptom that apply to some evidence, as one text.

    Args:
        name: The symptom's name.
        support: The evidence.
        facts: The facts about the run.
    """
    return next(symptom for symptom in SYMPTOMS if symptom.name == name).remedy(support, facts)


#: Symptoms, causes and remedies. Each claim that is not arithmetic names its source.
SYMPTOMS = (
    Symptom(
        NOT_FINITE,
        "The weights overflowed: the learning rate was too high, a gradient exploded, or half precision overflowed.",
        (
            Remedy(
                "Go back to an earlier checkpoint without NaN. Lower the learning rate, clip gradients, scale the loss "
                "or use bfloat16."
            ),
        ),
        "",
        symptoms.not_finite,
    ),
    Symptom(
        GROUPED,
        "A spike: the learning rate was too high then, or the gradient of one batch pushed biases far below zero.",
        (
            _GO_BACK,
            Remedy(
                "Lower the learning rate at those steps, warm it up after every change, clip gradients, and look at "
                "the loss there."
            ),
        ),
        "CS231n, notes on neural networks 1; Anthropic, notes on training sparse autoencoders",
        symptoms.grouped,
    ),
    Symptom(
        "deaths in the first steps",
        "The learning rate was too high at the start of training: there was no warm-up, or it was too short.",
        (Remedy("Start again with a lower learning rate or a longer warm-up, and clip gradients."),),
        "CS231n, notes on neural networks 1; Anthropic, notes on training sparse autoencoders",
        symptoms.early,
    ),
    Symptom(
        "deaths spread over the run",
        "Loss of plasticity: neurons die one by one and stay dead, for example when the task or the data change.",
        (
            Remedy("Recycle dormant neurons (ReDo), or use continual backprop."),
            Remedy("Replace the activation{where} by CReLU.", kinds=("relu-like",)),
            Remedy("Use LayerNorm with weight decay.", normalises=True),
        ),
        "Sokar et al. 2023; Dohare et al. 2024; Abbas et al. 2023",
        symptoms.spread,
    ),
    Symptom(
        "dead since the beginning, deep and narrow",
        "Born dead: the deeper and narrower a ReLU network is, the more likely its initialisation makes neurons dead.",
        (
            Remedy(
                "Use wider layers, residual connections, or another initialisation: He, or randomised asymmetric (RAI)."
            ),
            _NORMALISE,
        ),
        "Lu et al. 2019, Dying ReLU and Initialization",
        symptoms.born_deep,
    ),
    Symptom(
        "dead since the beginning",
        "Born dead: the initialisation or the scale of the input made these neurons dead before the first step.",
        (
            Remedy(
                "Use He initialisation with small positive biases, and standardise the input.",
                kinds=("relu-like", "leaky", "smooth", "gated", "sparse", "unknown"),
            ),
            Remedy("Use Xavier initialisation{where}, and standardise the input.", kinds=("saturating",)),
            _NORMALISE,
        ),
        "Lu et al. 2019, Dying ReLU and Initialization",
        symptoms.born_plain,
    ),
    Symptom(
        "held below zero",
        "Their incoming weights and biases keep the pre-activation below zero for every input that the proof covers.",
        (
            Remedy("Reset their incoming weights and biases."),
            Remedy(
                "Or replace the activation{where} by one with a slope below zero (LeakyReLU, ELU, GELU).",
                kinds=("relu-like",),
            ),
            _SLOPE,
        ),
        "",
        symptoms.drifted,
        certain=True,
    ),
    Symptom(
        "an input that is off centre",
        "The input was not standardised: its offset keeps neurons of the first layer below zero for every example.",
        (Remedy("Subtract the mean of the input and divide by its standard deviation."),),
        "Schoop et al. 2021 (UMLAUT)",
        symptoms.off_centre,
    ),
    Symptom(
        COLLAPSED,
        "The layer has collapsed: almost no signal passes through it, and no earlier layer learns through it.",
        (
            _GO_BACK,
            _GO_BACK_UNDATED,
            Remedy("Lower the learning rate, warm it up, clip gradients."),
            Remedy(
                "Replace the activation{where} by one with a slope below zero (LeakyReLU, GELU, SiLU).",
                kinds=("relu-like",),
            ),
            Remedy(
                "Replace the activation{where} by one that does not saturate (LeakyReLU, GELU, SiLU).",
                kinds=("saturating",),
            ),
            _SLOPE,
            _NORMALISE,
            Remedy("Add a residual connection around the layer."),
        ),
        "Zhang et al. 2021 (AutoTrainer)",
        symptoms.collapsed,
        certain=True,
    ),
    Symptom(
        "a layer that may have collapsed",
        "The layer has collapsed, or it was frozen in a way that leaves gradients of zero, or the loss no longer gives "
        "gradients. The optimizer's state alone does not show which.",
        (
            Remedy("Run the network over data (--data) to find out."),
            Remedy("If it was not frozen, go back to a checkpoint before step {before:,}{last}.", dated=True),
            Remedy("If it was not frozen, go back to an earlier checkpoint that does not show this.", dated=False),
        ),
        "",
        symptoms.may_have_collapsed,
    ),
    Symptom(
        "dead weights shrink",
        "Weight decay continues to shrink weights that no longer get gradients.",
        (Remedy("Recycle these neurons, or leave them: they contribute nothing."),),
        "",
        symptoms.shrunk,
    ),
    Symptom(
        "silent neurons",
        "Their output is always zero, so the network computes the same without them. But a gradient arrives, for "
        "example from an auxiliary loss or a straight-through estimator, so training can wake them. Papers on sparse "
        "autoencoders call such latents dead.",
        (
            Remedy(
                "Keep an auxiliary loss that does this: it keeps these neurons trainable. If their number does not "
                "fall, give that loss more weight, or resample them."
            ),
            Remedy(
                "Or look at their incoming weights and biases: a pre-activation of exactly zero gives this (weights "
                "that begin at zero or were pruned), and so does an output that underflows before its gradient does "
                "(GELU at about -6).",
                kinds=("smooth", "leaky", "saturating", "gated", "unknown"),
            ),
        ),
        "Bricken et al. 2023, Towards Monosemanticity (resampling); Gao et al. 2024, Scaling and evaluating sparse "
        "autoencoders (auxiliary loss)",
        symptoms.silent,
        certain=True,
    ),
    Symptom(
        "outputs that nothing reads",
        "Every weight that reads these neurons is zero or belongs to a dead neuron, by pruning, weight decay or deaths "
        "in later layers.",
        (Remedy("Remove them: the network computes the same without them."),),
        "",
        symptoms.unread,
        certain=True,
    ),
)
