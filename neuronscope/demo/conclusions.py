"""Describe what the comparison found, in sentences made from its numbers."""

from __future__ import annotations

from neuronscope.demo.results import Comparison, Run, Spread
from neuronscope.writers.formatting import percent

__all__ = ["findings", "headline", "number"]

#: Fraction of outputs, gradients or neurons from which on a number gets a sentence.
_WORTH_SAYING = 0.01

#: Fraction of dead neurons from which on a network is said to die.
_DIES = 0.1
#: Test accuracy below which a network has not learned the digits.
_LEARNED = 0.5
#: The gradient at the first layer, as a fraction of that at the last, up to which it is called small.
_SMALL_GRADIENT = 0.1

#: Variants that compute a ReLU; they are compared with the others.
_RELUS = ("ReLU", "ReLU-BatchNorm", "ReLU-no-spike")
#: Functions that are exactly zero only at 0 in theory, but also where they underflow.
_SMOOTH = ("GELU", "SiLU", "Mish")
#: Functions that have a slope below zero.
_SLOPED = ("LeakyReLU", "PReLU", "ELU")


def headline(comparison: Comparison) -> str:
    """Return the comparison in one sentence: which of ReLU, GELU and SiLU die, and how many of their neurons."""
    shares: dict[str, float] = {
        name: comparison.share(name, "dead") for name in ("ReLU", "GELU", "SiLU") if name in comparison.networks
    }
    dying = [name for name, share in shares.items() if share >= _DIES]
    living = [name for name, share in shares.items() if share < _WORTH_SAYING]
    said = "after a spike {} of their neurons are dead"
    if dying and living and len(dying) + len(living) == len(shares):
        die, live = (
            f"{_listed(names)} {verb}{'s' if len(names) == 1 else ''}"
            for names, verb in ((dying, "die"), (living, "live"))
        )
        said = f"{die}, {live}: {said}"
        shares = {name: shares[name] for name in (*dying, *living)}
    else:
        said = f"{_listed(list(shares))}: {said}"
    return said.format(_listed([percent(100.0 * share) for share in shares.values()]))


def findings(comparison: Comparison) -> list[str]:
    """Return what the numbers show, as paragraphs of one or two sentences."""
    sentences = [
        *_relu(comparison),
        *_others(comparison),
        *_zeros(comparison),
        *_dormant(comparison),
        *_sloped(comparison),
        *_small_gradients(comparison),
        *_gradients(comparison),
        *_collapse(comparison),
        *_sizes(comparison),
        *_accuracy(comparison),
    ]
    names = [
        each.label for name, each in comparison.networks.items() if any(r.end.not_finite for r in comparison.of(name))
    ]
    if names:
        sentences.append(f"A network gave NaN or infinity, so its other numbers mean nothing: {_listed(names)}.")
    return [*sentences, _check(comparison)]


def number(spread: Spread) -> str:
    """Return mean and deviation as text; without decimals if the mean is large or a count of one seed.

    >>> number(Spread.of([1, 2, 3])), number(Spread.of([4])), number(Spread.of([100, 150, 200]))
    ('2.0 ± 1.0', '4', '150 ± 50')
    """
    whole = spread.deviation is None and spread.mean.is_integer()
    digits = 0 if whole or spread.mean >= 99.95 else 1
    mean = f"{spread.mean:.{digits}f}"
    return mean if spread.deviation is None else f"{mean} ± {spread.deviation:.{digits}f}"


def _relu(comparison: Comparison) -> list[str]:
    if "ReLU" not in comparison.networks:
        return []
    end = comparison.spread("ReLU", "dead_at_end")
    start = comparison.spread("ReLU", "dead_at_start")
    died = comparison.spread("ReLU", "died_in_training")
    revived = comparison.spread("ReLU", "revived_in_training")
    neurons = comparison.networks["ReLU"].neurons
    ended = f"ReLU ends with {number(end)} of {neurons} neurons dead ({percent(100.0 * end.mean / neurons)})."
    born = f"{number(start)} were dead before the first step, because of the initial weights"
    changed = f"{number(revived)} of those came to life, and {number(died)} others died in training."
    sentences = [f"{ended} {born}; {changed}"]
    if "ReLU-no-spike" in comparison.networks:
        calm = comparison.spread("ReLU-no-spike", "dead_at_end")
        cause = "The spike is the cause" if 2 * calm.mean < end.mean else "The spike is not the cause"
        sentences.append(f"{cause}: without it, {number(calm)} are dead at the end.")
    return sentences


def _others(comparison: Comparison) -> list[str]:
    """Say which other variants have dead neurons and which have none."""
    ends = {name: comparison.spread(name, "dead_at_end") for name in comparison.networks if name != "ReLU"}
    none = [comparison.networks[name].label for name, end in ends.items() if end.most == 0]
    some = [
        f"{comparison.networks[name].label} {number(end)}"
        for name, end in ends.items()
        if end.most > 0 and name not in _RELUS
    ]
    seeds = len(comparison.seeds)
    sentences = []
    if none:
        sentences.append(
            f"No dead neuron at the end{f' in any of {seeds} seeds' if seeds > 1 else ''}: {_listed(none)}."
        )
    if some:
        sentences.append(f"Some neurons die without ReLU too: {_listed(some)} dead at the end.")
    return sentences


def _zeros(comparison: Comparison) -> list[str]:
    """Say which smooth functions give exact zeros, which a count of zero elements alone would mistake for death."""
    sentences = []
    for name in (name for name in _SMOOTH if name in comparison.networks):
        zeros = comparison.spread(name, "zero_outputs_at_end")
        if zeros.mean < _WORTH_SAYING:
            continue
        always = Spread.of(sum(run.end.dead) + sum(run.end.silent) for run in comparison.of(name))
        neurons = "no neuron is" if always.most == 0 else f"only {number(always)} neurons are"
        sentences.append(
            f"{percent(100.0 * zeros.mean)} of {name}'s outputs are exactly zero, because inputs far below zero "
            f"underflow; but {neurons} zero for every image."
        )
    return sentences


def _dormant(comparison: Comparison) -> list[str]:
    """Say which functions have many dormant neurons although few are dead."""
    shares = []
    for name, network in comparison.networks.items():
        dormant = comparison.spread(name, "dormant_at_end")
        if name not in _RELUS and dormant.mean >= _WORTH_SAYING * network.neurons:
            shares.append(f"{network.label} {number(dormant)} ({percent(100.0 * dormant.mean / network.neurons)})")
    if not shares:
        return []
    meaning = "outputs of at most 2.5 % of the layer's mean"
    return [f"Not dead is not healthy. Dormant at the end ({meaning}): {_listed(shares)}."]


def _sloped(comparison: Comparison) -> list[str]:
    """Say whether neurons of functions with a slope below zero are lost, and which slopes were learned."""
    names = [name for name in _SLOPED if name in comparison.networks]
    sentences = []
    if names and not any(sum(run.end.dead) + sum(run.end.dormant) for name in names for run in comparison.of(name)):
        sentences.append(f"A slope below zero keeps neurons working: none is dead or dormant with {_listed(names)}.")
    for name, network in comparison.networks.items():
        slopes = [slope for run in comparison.of(name) for slope in run.slopes]
        if slopes:
            sentences.append(f"{network.label} learned slopes from {min(slopes):.2f} to {max(slopes):.2f} below zero.")
    return [" ".join(sentences)] if sentences else []


def _small_gradients(comparison: Comparison) -> list[str]:
    """Say where little gradient comes to the first layer before training, and how accurate such networks become."""
    sentences = []
    for name, network in comparison.networks.items():
        reach = comparison.spread(name, "gradient_reach_at_start")
        if reach.mean <= _SMALL_GRADIENT:
            sentences.append(
                f"{network.label} makes gradients small: before the first step, the first layer gets "
                f"{percent(100.0 * reach.mean)} of the gradient that the last hidden layer gets. "
                f"Test accuracy {number(comparison.accuracy(name))} %."
            )
    return sentences


def _collapse(comparison: Comparison) -> list[str]:
    """Say what map a network without activations is, and what its depth bought."""
    sentences = []
    for name, network in comparison.networks.items():
        runs = [(run, run.collapse) for run in comparison.of(name) if run.collapse is not None]
        if not runs:
            continue
        found = runs[0][1]
        equal, apart = sum(each.equal for _, each in runs), max(each.difference for _, each in runs)
        deep = Spread.of(100 * run.accuracy for run, _ in runs)
        flat = Spread.of(100 * each.classifier_accuracy for _, each in runs)
        gained = deep.mean - flat.mean > max(deep.deviation or 0.0, flat.deviation or 0.0)
        product = (
            f"With {network.label}, {found.layers} layers are one: their product, computed in float64, is a matrix of "
            f"{found.outputs} × {found.inputs} and rank {found.rank}; with its offset {found.parameters:,} parameters "
            f"instead of {network.parameters:,}."
        )
        checked = (
            f"Checked: in {equal} of {len(runs)} runs the network's outputs equal the product's for every image, "
            f"within the rounding of float32 (differences of at most {apart:.0e} of the largest output)."
        )
        bought = (
            f"Depth bought {'accuracy' if gained else 'nothing'}: test accuracy {number(deep)} %, and {number(flat)} % "
            "for one linear layer that was trained beside it."
        )
        sentences += [f"{product} {bought}", checked]
    return sentences


def _sizes(comparison: Comparison) -> list[str]:
    """Say which networks have other numbers of neurons, for as many parameters."""
    usual = comparison.networks.get("ReLU")
    others = [
        f"{each.label} {each.neurons} ({each.parameters:,} parameters)"
        for each in comparison.networks.values()
        if usual is not None and each.neurons != usual.neurons
    ]
    if usual is None or not others:
        return []
    same = f"ReLU {usual.neurons} ({usual.parameters:,})"
    return [f"A gated neuron costs two, so gated networks of equal size have fewer: {_listed(others)}, {same}."]


def _gradients(comparison: Comparison) -> list[str]:
    """Say where gradients are zero although outputs are not: saturated units, or images classified with certainty."""
    shares, silent, cut_off = [], [], []
    for name, label in ((name, network.label) for name, network in comparison.networks.items()):
        beyond = Spread.of(run.end.zero_gradients - run.end.zero_outputs for run in comparison.of(name))
        if beyond.mean >= _WORTH_SAYING:
            shares.append(f"{label} {percent(100.0 * beyond.mean)}")
        zero = comparison.spread(name, "silent_at_end")
        if zero.most > 0:
            silent.append(f"{label} {number(zero)}")
        cut = comparison.spread(name, "cut_off_at_end")
        if cut.most > 0:
            cut_off.append(f"{label} {number(cut)}")
    sentences = []
    if shares:
        sentences.append(
            f"More gradients than outputs are exactly zero, by {_listed(shares)}: units are saturated, or the network "
            "is certain about an image."
        )
    if silent:
        sentences.append(f"Silent (zero for every image, but some give them a gradient): {_listed(silent)}.")
    if cut_off:
        sentences.append(f"Cut off (they fire, but no image gives them a gradient): {_listed(cut_off)}.")
    return sentences


def _accuracy(comparison: Comparison) -> list[str]:
    """Say so if the test accuracy does not show that neurons died, and where none died and it is low all the same."""
    sentences = []
    if {"ReLU", "LeakyReLU"} <= comparison.networks.keys():
        dying, living = map(comparison.accuracy, ("ReLU", "LeakyReLU"))
        if abs(dying.mean - living.mean) <= max(dying.deviation or 0.0, living.deviation or 0.0):
            sentences.append(
                f"Test accuracy does not show it: ReLU {number(dying)} %, LeakyReLU with no dead neuron "
                f"{number(living)} %."
            )
    low = [
        f"{network.label} {percent(100.0 * min(run.accuracy for run in comparison.of(name)))}"
        for name, network in comparison.networks.items()
        if any(run.accuracy < _LEARNED and not _dead(run) for run in comparison.of(name))
    ]
    if low:
        sentences.append(
            f"Living neurons do not make a network learn. Test accuracy of the worst seed: {_listed(low)}."
        )
    return sentences


def _check(comparison: Comparison) -> str:
    runs = comparison.runs
    agree = sum(run.recount_agrees for run in runs)
    apart = max(abs(_dead(run) - sum(run.epochs[-1].dead)) for run in runs)
    return (
        f"Checked: a recount that shares no code with Neuronscope finds the same dead neurons in {agree} of "
        f"{len(runs)} runs. The last epoch, watched during training, differs from the scan after it by at most "
        f"{apart} neurons."
    )


def _dead(run: Run) -> int:
    return sum(run.end.dead)


def _listed(parts: list[str]) -> str:
    """Return words as an enumeration.

    >>> _listed(["a", "b", "c"]), _listed(["a"])
    ('a, b and c', 'a')
    """
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
