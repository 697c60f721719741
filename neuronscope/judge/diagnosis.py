"""Diagnosis: signs → cause → remedy, as a table of data, each sign with a test on what is known of a run.

A sign that has no evidence says nothing. What is said comes with the layers, neurons and steps that it rests on. No
torch here; :func:`facts_of` takes the facts from a report of a watched run, a post-mortem brings its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from neuronscope.judge import symptoms
from neuronscope.judge.symptoms import LayerFacts, RunFacts, Support

__all__ = ["SYMPTOMS", "Diagnosis", "Remedy", "Symptom", "diagnose"]


@dataclass(frozen=True)
class Remedy:
    """One piece of advice, and where it fits.

    Attributes:
        text: A sentence; ``{before}`` stands for the step before which a checkpoint does not show the sign yet.
        dated: Fits only where such a step is known (``True``), or where nothing is dated (``False``).
        kinds: Fits only where a layer's activation is known to be of one of these kinds; ``unknown`` = no layer's is.
        normalises: Fits only where some layer is not known to be normalised already.
    """

    text: str
    dated: bool | None = None
    kinds: tuple[str, ...] = ()
    normalises: bool = False

    def fits(self, support: Support, layers: Sequence[LayerFacts]) -> bool:
        """Whether the advice fits.

        Args:
            support: What the sign rests on.
            layers: The layers that show it.
        """
        if self.dated is not None and (support.before is None if self.dated else support.steps is not None):
            return False
        if self.normalises and layers and all(layer.normalised for layer in layers):
            return False
        known = {layer.kind for layer in layers if layer.kind} or {"unknown"}
        return not self.kinds or not known.isdisjoint(self.kinds)


_GO_BACK = Remedy("Go back to a checkpoint before step {before:,}.", dated=True)
_GO_BACK_UNDATED = Remedy("Go back to a checkpoint from before it.", dated=False)
_SLOPE = Remedy("If the activation is zero for all that is below zero, give it a slope there.", kinds=("unknown",))
_NORMALISE = Remedy("Normalise before the activation.", normalises=True)


@dataclass(frozen=True)
class Symptom:
    """One row of the table.

    Attributes:
        name: The sign in a few words.
        cause: What is likely behind it, as a sentence.
        remedies: What to do; of these, what fits is said.
        source: Where that is from; ``""`` for arithmetic.
        test: Tells from the facts what supports it, or ``None`` where nothing does.
    """

    name: str
    cause: str
    remedies: tuple[Remedy, ...]
    source: str
    test: Callable[[RunFacts], Support | None]

    def remedy(self, support: Support, facts: RunFacts) -> str:
        """What to do, as far as it fits what is known.

        Args:
            support: What the sign rests on.
            facts: What is known of the run.
        """
        layers = [layer for layer in facts.layers if layer.name in support.layers]
        return " ".join(one.text.format(before=support.before) for one in self.remedies if one.fits(support, layers))


@dataclass(frozen=True)
class Diagnosis:
    """A sign that was found, with its cause, what to do and what supports it; fields as in the classes above."""

    sign: str
    cause: str
    remedy: str
    source: str
    evidence: str
    neurons: int
    layers: tuple[str, ...]
    steps: tuple[int, int] | None

    def to_dict(self) -> dict[str, Any]:
        """The diagnosis as plain data."""
        plain = asdict(self)
        plain["layers"] = list(self.layers)
        plain["steps"] = list(self.steps) if self.steps else None
        return plain


def diagnose(facts: RunFacts) -> tuple[Diagnosis, ...]:
    """Every sign of the table that the facts show, most neurons first.

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
    for sign in SYMPTOMS:
        support = sign.test(facts)
        if support is not None:
            found.append(
                Diagnosis(
                    sign.name,
                    sign.cause,
                    sign.remedy(support, facts),
                    sign.source,
                    support.evidence,
                    support.neurons,
                    support.layers,
                    support.steps,
                )
            )
    return tuple(sorted(found, key=lambda one: -one.neurons))


#: Signs, causes, remedies. Sources are named where a claim is not arithmetic.
SYMPTOMS = (
    Symptom(
        "NaN or infinite numbers",
        "The weights overflowed: a learning rate too high, an exploding gradient, or a half-precision overflow.",
        (
            Remedy(
                "Go back to a checkpoint from before it; lower the learning rate, clip gradients, scale the loss or "
                "use bfloat16."
            ),
        ),
        "",
        symptoms.not_finite,
    ),
    Symptom(
        "deaths close together in time",
        "A spike: the learning rate was too high then, or one batch gave a gradient that threw biases far below zero.",
        (
            _GO_BACK,
            Remedy(
                "Lower the learning rate there, warm up after a change of it, clip gradients; look at the loss at "
                "those steps."
            ),
        ),
        "CS231n, notes on neural networks 1; Anthropic, notes on training sparse autoencoders",
        symptoms.grouped,
    ),
    Symptom(
        "deaths in the first steps",
        "The learning rate was too high before training was under way: no warm-up, or one too short.",
        (Remedy("Start again: warm the learning rate up, lower it, clip gradients."),),
        "CS231n, notes on neural networks 1; Anthropic, notes on training sparse autoencoders",
        symptoms.early,
    ),
    Symptom(
        "deaths spread over the run",
        "Loss of plasticity: neurons go one by one and none come back, as when the task or the data change.",
        (
            Remedy("Recycle dormant neurons (ReDo), or use continual backprop."),
            Remedy("Replace the activation by CReLU.", kinds=("relu-like",)),
            Remedy("Use LayerNorm with weight decay.", normalises=True),
        ),
        "Sokar et al. 2023; Dohare et al. 2024; Abbas et al. 2023",
        symptoms.spread,
    ),
    Symptom(
        "dead since the beginning, deep and narrow",
        "Born dead: the deeper and narrower a ReLU network, the likelier that initialisation leaves neurons silent.",
        (
            Remedy("Use wider layers, residual connections, a randomised asymmetric (RAI) or He initialisation."),
            _NORMALISE,
        ),
        "Lu et al. 2019, Dying ReLU and Initialization",
        symptoms.born_deep,
    ),
    Symptom(
        "dead since the beginning",
        "Born dead: the initialisation, or the input's scale, left these neurons silent before the first step.",
        (
            Remedy("Use He initialisation with small positive biases, and standardise the input."),
            _NORMALISE,
        ),
        "Lu et al. 2019, Dying ReLU and Initialization",
        symptoms.born_plain,
    ),
    Symptom(
        "held below zero",
        "The bias has drifted so far down that no input can lift the neuron above zero.",
        (
            Remedy("Reset these biases."),
            Remedy("Or give the activation a slope below zero (LeakyReLU, ELU, GELU).", kinds=("relu-like",)),
            _SLOPE,
        ),
        "",
        symptoms.drifted,
    ),
    Symptom(
        "an input that is off centre",
        "The input was not standardised: a common offset drives whole neurons of the first layer below zero.",
        (Remedy("Subtract the mean of the input and divide by its standard deviation."),),
        "Schoop et al. 2021 (UMLAUT)",
        symptoms.off_centre,
    ),
    Symptom(
        "a layer nearly all dead",
        "The layer has collapsed: next to no signal passes it, and nothing below it learns through it.",
        (
            _GO_BACK,
            _GO_BACK_UNDATED,
            Remedy("Lower the learning rate, warm it up, clip gradients."),
            Remedy(
                "Replace the activation by one with a slope below zero (LeakyReLU, GELU, SiLU).", kinds=("relu-like",)
            ),
            Remedy(
                "Replace the activation by one that does not saturate (LeakyReLU, GELU, SiLU).", kinds=("saturating",)
            ),
            _SLOPE,
            _NORMALISE,
            Remedy("Lead a residual connection around the layer."),
        ),
        "Zhang et al. 2021 (AutoTrainer)",
        symptoms.collapsed,
    ),
    Symptom(
        "a layer that may have collapsed",
        "The layer has collapsed, or was frozen in a way that leaves gradients of zero, or the loss gives no gradient "
        "any more: the optimizer's state alone does not tell.",
        (
            Remedy("Run it over data (--data) to tell."),
            Remedy("If it was not frozen, go back to a checkpoint before step {before:,}.", dated=True),
            Remedy("If it was not frozen, go back to a checkpoint from before it.", dated=False),
        ),
        "",
        symptoms.may_have_collapsed,
    ),
    Symptom(
        "dead weights shrink",
        "Weight decay goes on where no gradient comes any more.",
        (Remedy("Recycle these neurons, or leave them: they take no part."),),
        "",
        symptoms.shrunk,
    ),
    Symptom(
        "outputs that nothing reads",
        "Every weight that reads these neurons is zero, or its reader is dead: pruning, decay, or deaths further on.",
        (Remedy("Remove them: the network computes the same without them."),),
        "",
        symptoms.unread,
    ),
)
