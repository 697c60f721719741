"""What the comparison found, in sentences made from its own numbers: where ReLU dies, where smooth units stop too."""

from __future__ import annotations

from neuronscope.demo.results import Comparison, Run, Spread

__all__ = ["findings", "headline", "number"]

#: From which share of outputs, gradients or neurons on a number is worth a sentence.
_WORTH_SAYING = 0.01

#: Variants that compute a ReLU; the others are what it is compared with.
_RELUS = ("ReLU", "ReLU-BatchNorm", "ReLU-no-spike")
#: Functions that have no exact zero but at 0, and yet give it where they underflow.
_SMOOTH = ("GELU", "SiLU", "Mish")


def headline(comparison: Comparison) -> str:
    """The comparison in one sentence: what share is dead with ReLU, and what share with GELU and SiLU."""
    shares = [
        f"{_percent(comparison.spread(name, _dead).mean / comparison.neurons)} with {name}"
        for name in ("ReLU", "GELU", "SiLU")
        if name in comparison.labels
    ]
    return f"Dead neurons after a spike: {', '.join(shares)}"


def findings(comparison: Comparison) -> list[str]:
    """What to read from the numbers, one or two sentences each.

    Args:
        comparison: All runs.
    """
    said = [
        *_relu(comparison),
        *_others(comparison),
        *_zeros(comparison),
        *_dormant(comparison),
        *_gradients(comparison),
        *_accuracy(comparison),
    ]
    names = [label for name, label in comparison.labels.items() if any(r.end.not_finite for r in comparison.of(name))]
    if names:
        said.append(f"A network gave NaN or infinity, and its other numbers mean nothing: {_listed(names)}.")
    return [*said, _check(comparison)]


def number(spread: Spread) -> str:
    """Mean and deviation; large ones, and a count of one seed, without a decimal.

    >>> number(Spread.of([1, 2, 3])), number(Spread.of([4])), number(Spread.of([100, 150, 200]))
    ('2.0 ± 1.0', '4', '150 ± 50')
    """
    whole = spread.deviation is None and spread.mean.is_integer()
    digits = 0 if whole or spread.mean >= 99.95 else 1
    mean = f"{spread.mean:.{digits}f}"
    return mean if spread.deviation is None else f"{mean} ± {spread.deviation:.{digits}f}"


def _relu(comparison: Comparison) -> list[str]:
    if "ReLU" not in comparison.labels:
        return []
    end = comparison.spread("ReLU", _dead)
    start = comparison.spread("ReLU", lambda run: sum(run.start.dead))
    died = comparison.spread("ReLU", lambda run: run.died)
    revived = comparison.spread("ReLU", lambda run: run.revived)
    share = _percent(end.mean / comparison.neurons)
    said = [f"ReLU ends with {number(end)} of {comparison.neurons} neurons dead ({share})."]
    said[0] += f" {number(start)} were dead before the first step, by the initial weights alone;"
    said[0] += f" {number(revived)} of those came to life, and {number(died)} others died in training."
    if "ReLU-no-spike" in comparison.labels:
        calm = comparison.spread("ReLU-no-spike", _dead)
        blame = "The spike did it" if 2 * calm.mean < end.mean else "The spike is not the cause"
        said.append(f"{blame}: without it, {number(calm)} are dead at the end.")
    return said


def _others(comparison: Comparison) -> list[str]:
    """Which other variants have dead neurons, and which have none."""
    ends = {name: comparison.spread(name, _dead) for name in comparison.labels if name != "ReLU"}
    none = [comparison.labels[name] for name, end in ends.items() if end.most == 0]
    some = [
        f"{comparison.labels[name]} {number(end)}" for name, end in ends.items() if end.most > 0 and name not in _RELUS
    ]
    seeds = len(comparison.seeds)
    said = []
    if none:
        said.append(f"No dead neuron at the end{f' in any of {seeds} seeds' if seeds > 1 else ''}: {_listed(none)}.")
    if some:
        said.append(f"Not quite immune, though no ReLU: {_listed(some)} dead at the end.")
    return said


def _zeros(comparison: Comparison) -> list[str]:
    """Smooth functions that give exact zeros; whoever counts zero elements would call it death."""
    said = []
    for name in (name for name in _SMOOTH if name in comparison.labels):
        zeros = comparison.spread(name, lambda run: run.end.zero_outputs)
        if zeros.mean < _WORTH_SAYING:
            continue
        dead = comparison.spread(name, _dead)
        but = (
            "no neuron is zero for every image"
            if dead.most == 0
            else f"only {number(dead)} neurons are so for every image"
        )
        said.append(
            f"{_percent(zeros.mean)} of {name}'s outputs are exactly zero, since inputs far below zero underflow; "
            f"yet {but}."
        )
    return said


def _dormant(comparison: Comparison) -> list[str]:
    """Dormant neurons of functions that hardly die: not dead by the letter, and of next to no use."""
    shares = []
    for name, label in comparison.labels.items():
        dormant = comparison.spread(name, lambda run: sum(run.end.dormant))
        if name not in _RELUS and dormant.mean >= _WORTH_SAYING * comparison.neurons:
            shares.append(f"{label} {number(dormant)}")
    if not shares:
        return []
    what = "next to no output, 2.5% of the layer's mean or less"
    return [f"Not dead is not healthy. Dormant at the end ({what}): {_listed(shares)}."]


def _gradients(comparison: Comparison) -> list[str]:
    """Zero gradients where outputs are not zero: saturated units, and images of which the network is sure."""
    shares, cut_off = [], []
    for name, label in comparison.labels.items():
        beyond = comparison.spread(name, lambda run: run.end.zero_gradients - run.end.zero_outputs)
        if beyond.mean >= _WORTH_SAYING:
            shares.append(f"{label} {_percent(beyond.mean)}")
        cut = comparison.spread(name, lambda run: sum(run.end.cut_off))
        if cut.most > 0:
            cut_off.append(f"{label} {number(cut)}")
    said = []
    if shares:
        said.append(
            f"More gradients than outputs are exactly zero, by {_listed(shares)}: saturated units, or images that the "
            "network is sure of."
        )
    if cut_off:
        said.append(f"Cut off (they fire, and no image gives them a gradient): {_listed(cut_off)}.")
    return said


def _accuracy(comparison: Comparison) -> list[str]:
    """Whether the accuracy tells that neurons died."""
    if not {"ReLU", "LeakyReLU"} <= comparison.labels.keys():
        return []
    dying, living = (comparison.spread(name, lambda run: 100 * run.accuracy) for name in ("ReLU", "LeakyReLU"))
    if abs(dying.mean - living.mean) > max(dying.deviation or 0.0, living.deviation or 0.0):
        return []
    return [f"Test accuracy does not tell: ReLU {number(dying)}%, LeakyReLU, with none dead, {number(living)}%."]


def _check(comparison: Comparison) -> str:
    runs = comparison.runs
    agree = sum(run.recount_agrees for run in runs)
    apart = max(abs(_dead(run) - sum(run.epochs[-1].dead)) for run in runs)
    return (
        f"Checked: a recount that shares no code with Neuronscope finds the same dead neurons in {agree} of "
        f"{len(runs)} runs. The last epoch, watched while weights moved, differs from the scan after it by at most "
        f"{apart} neurons."
    )


def _dead(run: Run) -> int:
    return sum(run.end.dead)


def _percent(share: float) -> str:
    """A share in percent; something is never written as nothing.

    >>> _percent(0.0), _percent(0.0004), _percent(0.014), _percent(0.49)
    ('0%', '0.04%', '1.4%', '49%')
    """
    value = 100 * share
    return (
        "0%"
        if value == 0
        else f"{value:.0f}%"
        if value >= 9.95
        else f"{value:.1f}%"
        if value >= 0.095
        else f"{value:.1g}%"
    )


def _listed(parts: list[str]) -> str:
    """Words as a list.

    >>> _listed(["a", "b", "c"]), _listed(["a"])
    ('a, b and c', 'a')
    """
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
