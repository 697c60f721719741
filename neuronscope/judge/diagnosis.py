"""Diagnosis: signs → cause → remedy, as a table of data, each sign with a test on what is known of a run.

A sign that has no evidence says nothing. What is said comes with the layers, neurons and steps that it rests on. No
torch here; :func:`facts_of` takes the facts from a report of a watched run, a post-mortem brings its own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from neuronscope.judge import symptoms
from neuronscope.judge.symptoms import RunFacts, Support

__all__ = ["SIGNS", "Diagnosis", "Sign", "diagnose"]


@dataclass(frozen=True)
class Sign:
    """One row of the table.

    Attributes:
        name: The sign in a few words.
        cause: What is likely behind it, as a sentence.
        remedy: What to do, as a sentence.
        source: Where that is from; ``""`` for arithmetic.
        test: Tells from the facts what supports it, or ``None`` where nothing does.
    """

    name: str
    cause: str
    remedy: str
    source: str
    test: Callable[[RunFacts], Support | None]


@dataclass(frozen=True)
class Diagnosis:
    """A sign that was found, with its cause, its remedy and what supports it; fields as in the two above."""

    sign: str
    cause: str
    remedy: str
    source: str
    evidence: str
    neurons: int
    layers: tuple[str, ...]
    steps: tuple[int, int] | None

    def as_dict(self) -> dict[str, Any]:
        """The diagnosis as plain data."""
        plain = asdict(self)
        plain["layers"] = list(self.layers)
        plain["steps"] = list(self.steps) if self.steps else None
        return plain


def diagnose(facts: RunFacts) -> tuple[Diagnosis, ...]:
    """Every sign of the table that the facts show, most neurons first.

    >>> steps = np.array([300, 301, 301, 302, 305, 306, UNDATED, UNDATED])
    >>> layer = LayerFacts("relu", dead=steps >= 0, since=steps)
    >>> [found.sign for found in diagnose(RunFacts((layer,), step=5000))]
    ['deaths close together in time']
    >>> diagnose(RunFacts((LayerFacts("relu", dead=steps < -2, since=steps),), step=5000))
    ()
    """
    found = []
    for sign in SIGNS:
        support = sign.test(facts)
        if support is not None:
            found.append(Diagnosis(sign.name, sign.cause, sign.remedy, sign.source, **vars(support)))
    return tuple(sorted(found, key=lambda one: -one.neurons))


#: Signs, causes, remedies. Sources are named where a claim is not arithmetic.
SIGNS = (
    Sign(
        "NaN or infinite numbers",
        "The weights overflowed: a learning rate too high, an exploding gradient, or a half-precision overflow.",
        "Go back to an earlier checkpoint; lower the learning rate, clip gradients, scale the loss or use bfloat16.",
        "",
        symptoms.not_finite,
    ),
    Sign(
        "deaths close together in time",
        "A spike: the learning rate was too high then, or one batch gave a gradient that threw biases far below zero.",
        "Lower the learning rate there, warm up after a change of it, clip gradients; look at the loss at those steps.",
        "CS231n, notes on neural networks 1; Anthropic, notes on training sparse autoencoders",
        symptoms.grouped,
    ),
    Sign(
        "deaths in the first steps",
        "The learning rate was too high before training was under way: no warm-up, or one too short.",
        "Warm the learning rate up, lower it, clip gradients.",
        "CS231n, notes on neural networks 1; Anthropic, notes on training sparse autoencoders",
        symptoms.early,
    ),
    Sign(
        "deaths spread over the run",
        "Loss of plasticity: neurons go one by one and none come back, as when the task or the data change.",
        "Recycle dormant neurons (ReDo), continual backprop, CReLU, or LayerNorm with weight decay.",
        "Sokar et al. 2023; Dohare et al. 2024; Abbas et al. 2023",
        symptoms.spread,
    ),
    Sign(
        "dead since the beginning, deep and narrow",
        "Born dead: the deeper and narrower a ReLU network, the likelier that initialisation leaves neurons silent.",
        "Wider layers, a randomised asymmetric (RAI) or He initialisation, normalisation, residual connections.",
        "Lu et al. 2019, Dying ReLU and Initialization",
        symptoms.born_deep,
    ),
    Sign(
        "dead since the beginning",
        "Born dead: the initialisation, or the input's scale, left these neurons silent before the first step.",
        "He initialisation with small positive biases, standardised input, normalisation before the activation.",
        "Lu et al. 2019, Dying ReLU and Initialization",
        symptoms.born_plain,
    ),
    Sign(
        "held below zero",
        "The bias has drifted so far down that no input can lift the neuron above zero.",
        "Reset these biases, or give the activation a slope below zero (LeakyReLU, ELU, GELU).",
        "",
        symptoms.drifted,
    ),
    Sign(
        "an input that is off centre",
        "The input was not standardised: a common offset drives whole neurons of the first layer below zero.",
        "Subtract the mean of the input and divide by its standard deviation.",
        "Schoop et al. 2021 (UMLAUT)",
        symptoms.off_centre,
    ),
    Sign(
        "a layer nearly all dead",
        "The layer has collapsed: next to no signal passes it, and nothing below it learns through it.",
        "Replace the activation (LeakyReLU, GELU, SiLU), normalise before it, or lead a residual connection around it.",
        "Zhang et al. 2021 (AutoTrainer)",
        symptoms.collapsed,
    ),
    Sign(
        "dead weights shrink",
        "Weight decay goes on where no gradient comes any more.",
        "Recycle these neurons, or leave them: they take no part.",
        "",
        symptoms.shrunk,
    ),
    Sign(
        "outputs that nothing reads",
        "Every weight that reads these neurons is zero, or its reader is dead: pruning, decay, or deaths further on.",
        "Remove them: the network computes the same without them.",
        "",
        symptoms.unread,
    ),
)
