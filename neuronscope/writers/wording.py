"""Say what a report of a watched run amounts to: the sentences and the table cells that every writer shows."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from neuronscope.judge.diagnosis import Diagnosis, diagnose
from neuronscope.report.expert_layers import ExpertLayer, expert_layers
from neuronscope.report.report import Report, SiteReport
from neuronscope.report.run_facts import facts_from_report
from neuronscope.writers.formatting import (
    NONE,
    UNKNOWN,
    at_most,
    count,
    is_are,
    listed,
    percent,
    plural,
    share,
    visible,
)

__all__ = [
    "SiteCells",
    "all_sparse",
    "anything_seen",
    "based_on",
    "causes",
    "confidence",
    "excluded_words",
    "expert_sentence",
    "experts",
    "findings",
    "fold",
    "glossary",
    "legend",
    "lists",
    "mark",
    "not_in_totals",
    "provisional_note",
    "severity",
    "site_cells",
    "sparse",
    "tells_born",
    "title",
    "weights",
    "weights_of",
    "worst_experts",
    "worst_first",
]


def legend(report: Report) -> str:
    """Return the words of the table in one line; :func:`glossary` explains them in full."""
    born = " (born: since watching began)" if tells_born(report) else ""
    return (
        f"dead: output always zero{born} · silent: output always zero, but gradient arrives · "
        f"dormant: almost no output · cut off: no gradient · linear: never zero · {UNKNOWN}: not seen"
    )


def tells_born(report: Report) -> bool:
    """Whether born dead and died are told apart: a scan sees a network at one moment, and its past at none."""
    return report.phase != "scan"


#: Heights of a bar, from none to the highest.
_BARS = " ▁▂▃▄▅▆▇█"


def title(report: Report) -> str:
    """Return the model's name, the phase and, if there were any, the number of optimizer steps."""
    steps = f" · {plural(report.global_step, 'optimizer step')}" if report.global_step else ""
    return f"{visible(report.model)} · {visible(report.phase)}{steps}"


def confidence(report: Report) -> str:
    """Return the confidence of the bounds: ``95 %``."""
    return f"{100.0 * report.policy['confidence']:g} %"


def based_on(report: Report) -> str:
    """Say how many examples and which steps the verdicts are based on, and how sure a dead verdict is."""
    if not report.observed_neurons:
        anything = anything_seen(report)
        return f"Based on nothing: {'no observed neuron is in the totals' if anything else 'no neuron was observed'}."
    seen = [site.examples for site in report.headline_layers if not site.is_unseen]
    numbers = sorted({examples for examples in seen if examples})
    phase = {"train": "training ", "val": "validation ", "scan": ""}.get(report.phase, f"{visible(report.phase)} ")
    if not numbers:
        on = f"on an unknown number of {phase}examples{_window(report)}"
        return f"Provisional: based {on}. No bound is claimed on how often a neuron called dead could still fire."
    examples = count(numbers[0]) if len(numbers) == 1 else f"{count(numbers[0])} to {count(numbers[-1])}"
    on = f"on {examples} {phase}example{'' if numbers == [1] else 's'}{_window(report)}"
    bound = at_most(numbers[0], report.policy["confidence"])
    sure = f"A neuron called dead could still fire on up to {bound} of inputs ({confidence(report)} confidence)."
    unknown = seen.count(0)
    if unknown:
        where = f"In {count(unknown)} of {count(len(seen))} layers"
        sure += f" {where} the number of examples is not known, and no bound is claimed."
    if not report.provisional:
        return f"Based {on}. {sure}"
    needed = f"{count(report.examples_needed)} are needed for a bound of {100.0 * report.policy['max_rate']:g} %"
    return f"Provisional: based {on} ({needed}). {sure}"


def _window(report: Report) -> str:
    window = report.window
    if window.last_step < 0 or not report.global_step:
        return ""  # seen outside any optimizer step: a scan
    if window.first_step == window.last_step:
        return f" at step {count(window.last_step)}"
    return f" from steps {count(window.first_step)}–{count(window.last_step)}"


def provisional_note(report: Report, examples: int) -> str:
    """Return the line for below a picture of a window that is too short for the policy; empty if it is long enough.

    Args:
        report: The report.
        examples: Number of examples that the picture is based on.
    """
    if not report.provisional:
        return ""
    if not examples:
        return "Provisional: the number of examples is not known, so no bound is claimed for dead ones"
    of = f"{count(examples)} of {count(report.examples_needed)} examples"
    return f"Provisional: {of}; dead ones may fire on up to {at_most(examples, report.policy['confidence'])}"


def findings(report: Report) -> list[str]:
    """Return what was found as plain sentences, worst first."""
    seen = [site for site in report.headline_layers if not site.is_unseen]
    sentences: list[str] = []
    broken = [site.name for site in report.layers if site.not_finite]
    if broken:
        sentences.append(
            f"NOT FINITE: {plural(report.not_finite, 'output')} {is_are(report.not_finite)} NaN or infinite, in "
            f"{plural(len(broken), 'layer')} ({listed(broken)}). This network is not healthy, whatever the rest says."
        )
    if not report.observed_neurons:
        none = "No observed neuron is in the totals" if anything_seen(report) else "No neuron was observed"
        return [*sentences, f"{none}, so there is no verdict.", *_excluded(report)]
    sentences += _deaths(report)
    for number, what in (
        (report.silent, "silent: the output is always zero, but gradient arrives"),
        (report.dormant, "dormant: almost no output"),
        (report.cut_off, "cut off: no gradient"),
    ):
        if number:
            sentences.append(f"{plural(number, 'neuron')} {is_are(number)} {what}.")
    blind = sum(site.gradient_positions == 0 for site in seen)
    if blind:
        where = "" if blind == len(seen) else f" in {count(blind)} of {count(len(seen))} layers"
        sentences.append(
            f"No gradients were seen{where}: {'there, ' if where else ''}dead means only that the output is zero; "
            "silent and cut off are not known."
        )
    unseen = sum(site.is_unseen for site in report.layers)
    if unseen:
        sentences.append(f"{plural(unseen, 'layer')} never ran in this window (unseen).")
    return [*sentences, *_excluded(report)]


def causes(report: Report) -> tuple[Diagnosis, ...]:
    """Return why neurons died, as far as the report shows it, and what to do."""
    return diagnose(facts_from_report(report))


def _excluded(report: Report) -> list[str]:
    """Say which layers are not in the totals, one sentence for each reason."""
    excluded = [site for site in report.layers if not site.in_headlines]
    sentences = []
    for sign, words in excluded_words(report):
        names = [site.name for site in excluded if mark(site) == sign]
        sentences.append(f"{sign} {words} ({plural(len(names), 'layer')}: {listed(names)}).")
    return sentences


def excluded_words(report: Report) -> list[tuple[str, str]]:
    """Return the marks of layers that are not in the totals, each with its meaning; only those that occur."""
    return sorted({(mark(site), not_in_totals(site)) for site in report.layers if not site.in_headlines})


def mark(site: SiteReport) -> str:
    """Return the mark beside the name of a layer that is not in the totals; empty for the others."""
    return "*" if site.assumed else "**" if site.output else ""


def not_in_totals(site: SiteReport) -> str:
    """Say why a layer is not in the totals; empty if it is."""
    if site.assumed:
        return "axis assumed: not in the totals"
    return "output: not in the totals" if site.output else ""


def lists(report: Report, shown: Sequence[SiteReport], most: int) -> list[tuple[str, list[str]]]:
    """Return the lists that follow the table of layers, each below its heading; most are empty.

    Args:
        report: The report.
        shown: The layers in the table.
        most: Most mixtures of experts.
    """
    return [
        ("Latents", sparse(shown)),
        ("Experts", experts(report, most)),
        ("Weights of layers with idle neurons", weights(shown)),
    ]


def weights(sites: Sequence[SiteReport]) -> list[str]:
    """Say which weights lead into the neurons of each layer that has idle ones, and which read them."""
    return [
        f"{visible(site.name)}: {weights_of(site)}"
        for site in sites
        if site.incoming and (site.dead or site.silent or site.dormant)
    ]


def sparse(sites: Sequence[SiteReport]) -> list[str]:
    """Say of each layer of latents how many never fired, not lately, and how often the others do."""
    return [f"{visible(site.name)}: {_sparse(site)}" for site in sites if site.kind == "sparse" and not site.is_unseen]


def experts(report: Report, most: int) -> list[str]:
    """Say of each mixture how the tokens are spread over its experts.

    Args:
        report: The report.
        most: How many mixtures are shown: those with the most experts without a token and the most dead neurons.
    """
    found = expert_layers(report.headline_layers)
    shown = worst_experts(found, most)
    lines = [f"{visible(layer.name)}: {expert_sentence(layer, sure=not report.provisional)}" for layer in shown]
    more = len(found) - len(shown)
    return [*lines, f"… {plural(more, 'more mixture')}"] if more else lines


def worst_experts(found: Sequence[ExpertLayer], most: int) -> list[ExpertLayer]:
    """Return the mixtures with the most experts without a token and the most dead neurons, in their order.

    Args:
        found: All mixtures.
        most: How many to return at most.
    """

    def severity(place: int) -> tuple[int, int]:
        return len(found[place].idle), sum(int(expert.judgement.dead.sum()) for expert in found[place].experts)

    worst = sorted(range(len(found)), key=severity, reverse=True)[:most]
    return [found[place] for place in sorted(worst)]


def expert_sentence(layer: ExpertLayer, *, sure: bool) -> str:
    """Say how many tokens the experts of a mixture were given, how evenly, and how many experts got none.

    Args:
        layer: The mixture.
        sure: Whether the window is long enough to call an expert dead.
    """
    tokens, idle = layer.tokens, layer.idle
    sentence = f"{count(len(layer.experts))} experts were given {plural(int(tokens.sum()), 'token')}."
    if tokens.sum():
        even, most = percent(100 * layer.routing_entropy), percent(100 * float(tokens.max() / tokens.sum()))
        sentence += f" Routing entropy: {even} of that of an even spread; the busiest has {most}."
    if idle:
        which = f"{plural(len(idle), 'expert')} got no token"
        sentence += f" {which}: dead." if sure else f" {which} so far; the window is too short to call them dead."
    return sentence


def all_sparse(report: Report) -> bool:
    """Whether all layers are of latents that seldom fire, so that none can be called dormant."""
    return bool(report.layers) and all(site.kind == "sparse" for site in report.layers)


def _sparse(site: SiteReport) -> str:
    density = site.log10_density
    fired = density[np.isfinite(density)]
    counts, edges = site.density_histogram()
    bars = "".join(_BARS[-(-int(number) * (len(_BARS) - 1) // max(int(counts.max()), 1))] for number in counts)
    parts = [f"{count(site.neurons - len(fired))} of {plural(site.neurons, 'latent')} never fired in "]
    parts[0] += f"{plural(site.positions, 'token')}"
    if site.idle_positions is not None:
        seen = int(site.idle_positions.max(initial=0))
        lately = min(10_000_000, 10 ** (len(str(max(seen, site.positions))) - 1))
        parts.append(f"{count(site.not_fired_in(lately))} not in the last {plural(lately, 'token')}")
    if fired.size:
        parts.append(
            f"log10 of the firing density, from {edges[0]:g} to 0: {bars.rstrip()} (half of those that fired below "
            f"{np.median(fired):.1f})"
        )
    return "; ".join(parts)


def weights_of(site: SiteReport) -> str:
    """Say which weights lead into a layer's neurons, and which read them."""
    rows = _layers(each.layer for each in site.incoming)
    if site.weights_unknown:
        return f"rows of {rows}; not known exactly: {visible(site.weights_unknown)}"
    return f"rows of {rows} lead in, columns of {_layers(each.layer for each in site.reader_columns)} read it"


def _layers(paths: Iterable[str]) -> str:
    names = list(dict.fromkeys(paths))
    return f"layer{'s' * (len(names) > 1)} {listed(names)}"


def _deaths(report: Report) -> list[str]:
    if not report.judged_neurons:
        return ["No neuron gave only finite outputs, so none can be called dead or alive."]
    if not report.dead:
        what = "with finite outputs" if report.not_finite else "that were observed"
        return [f"No dead neuron among the {count(report.judged_neurons)} {what}."]
    died, born = report.dead - report.born_dead, report.born_dead
    if not tells_born(report):
        how = f"{'Its' if report.dead == 1 else 'Their'} output was zero at every position of the data"
    elif not died:
        how = f"{'It has' if born == 1 else 'All of them have'} never fired since watching began (born dead)"
    elif not born:
        how = f"{'It' if died == 1 else 'All of them'} worked before and stopped{_most_steps(report)}"
    else:
        how = (
            f"{count(born)} never fired since watching began (born dead); {count(died)} worked before and "
            f"stopped{_most_steps(report)}"
        )
    with_deaths = report.totals.sites_with(lambda site: site.judgement.dead)
    worst = max(with_deaths, key=lambda site: site.dead / max(site.judged_neurons, 1))
    how_many = f"{count(report.dead)} of {plural(report.judged_neurons, 'neuron')} {is_are(report.dead)} dead"
    return [
        f"{how_many} ({percent(report.dead_percent)}). {how}.",
        f"Worst layer: `{visible(worst.name)}`, with {count(worst.dead)} of {count(worst.judged_neurons)} dead.",
    ]


def _most_steps(report: Report) -> str:
    """Return the steps at which neurons died, without the first and the last tenth; empty if a death is not dated."""
    steps = np.concatenate(
        [layer.since[layer.dead & (layer.since != -1)] for layer in facts_from_report(report).layers]
    )
    if (steps < 0).any():
        return ""
    first, last = (int(step) for step in np.quantile(steps, (0.1, 0.9), method="nearest"))
    most = "" if (first, last) == (steps.min(), steps.max()) else "most "
    return f", {most}at step {count(first)}" if first == last else f", {most}at steps {count(first)}–{count(last)}"


def glossary(report: Report) -> list[tuple[str, str]]:
    """Return each word of a report with its meaning, short enough for a legend."""
    tau = f"{report.policy.get('dormant_tau', math.nan):g}"
    return [
        ("dead", "output is zero at every position of the window; where gradients were seen, they are zero too"),
        *(
            [("born", "dead, and never fired since watching began"), ("died", "dead, but fired before")]
            if tells_born(report)
            else []
        ),
        ("silent", "output is zero at every position of the window, but gradient arrives, so training can wake it"),
        ("dormant", f"neither dead, silent nor cut off, but its mean |y| is at most {tau} of the layer's mean"),
        ("cut off", "fires, but its gradient is zero at every position"),
        ("linear", "never off, so it adds no non-linearity"),
        ("fires in", "a neuron called dead or silent may still fire in up to this share of examples"),
        (UNKNOWN, "not seen (this is not zero)"),
        (NONE, "none"),
    ]


def anything_seen(report: Report) -> bool:
    """Whether any neuron was observed in the window, in the totals or not."""
    return not all(site.is_unseen for site in report.layers)


def severity(site: SiteReport) -> tuple[float, float]:
    """Return how bad a layer is: its share of dead and not finite neurons, then of other unhealthy ones."""
    seen = max(site.observed_neurons, 1)
    return (site.dead + site.not_finite_neurons) / seen, (site.silent + site.dormant + site.cut_off) / seen


def worst_first(sites: Iterable[SiteReport]) -> list[SiteReport]:
    """Return layers, the worst first and those that are not in the totals last; the order of equal ones stays."""
    return sorted(sorted(sites, key=severity, reverse=True), key=lambda site: not site.in_headlines)


@dataclass(frozen=True)
class SiteCells:
    """The table cells of one layer."""

    name: str
    activation: str
    neurons: str
    axis: str
    dead: str
    dead_share: str
    silent: str
    dormant: str
    cut_off: str
    linear: str
    not_finite: str
    worst: str
    examples: str
    bound: str
    #: ``alarm`` (not finite), ``bad`` (dead neurons), ``warn`` (silent, dormant or cut off), ``unknown`` (unseen) or
    #: ``calm``.
    tone: str
    mark: str = ""  # the mark of a layer that is not in the totals; ``""`` for others

    @property
    def marked_name(self) -> str:
        """The layer's name, with its mark if it has one."""
        return f"{self.name} {self.mark}".rstrip()


def site_cells(site: SiteReport, report: Report, worst: int = 4) -> SiteCells:
    """Return the table cells of one layer.

    Args:
        site: The layer.
        report: The report that it is in.
        worst: How many of the worst neurons to name.
    """
    unseen = site.is_unseen
    indices = site.worst(worst + 1)
    some = UNKNOWN if unseen else (", ".join(str(index) for index in indices[:worst]) or NONE)
    neurons = count(site.neurons) if unseen or not site.unseen else f"{count(site.neurons)} ({site.unseen} unseen)"
    tone = _tone(site)
    nothing = UNKNOWN if tone == "alarm" else NONE  # beside a NaN, a calm dot would look healthy

    def number(value: int, known: bool = True) -> str:
        if unseen or not known:
            return UNKNOWN
        return count(value) if value else nothing

    return SiteCells(
        name=visible(site.name),
        activation=visible(site.activation),
        neurons=neurons,
        axis=_axis(site),
        dead="unseen" if unseen else _dead(site, born=tells_born(report)),
        dead_share=UNKNOWN if tone == "alarm" and not site.dead else share(site.dead, site.judged_neurons),
        silent=number(site.silent, known=site.gradient_positions > 0),
        dormant=number(site.dormant),
        cut_off=number(site.cut_off, known=site.gradient_positions > 0),
        linear=number(site.linear),
        not_finite=number(site.not_finite),
        worst=f"{some} …" if len(indices) > worst and not unseen else some,
        examples=count(site.examples) if site.examples else UNKNOWN,
        bound=UNKNOWN if unseen or not site.examples else f"< {at_most(site.examples, report.policy['confidence'])}",
        tone=tone,
        mark=mark(site),
    )


def _dead(site: SiteReport, *, born: bool) -> str:
    if not site.dead:
        return "not finite" if site.not_finite else NONE
    if not born:
        return count(site.dead)
    every = "" if site.dead == 1 else "all "
    if site.born_dead == site.dead:
        return f"{count(site.dead)} ({every}born)"
    return f"{count(site.dead)} ({f'{count(site.born_dead)} born' if site.born_dead else f'{every}died'})"


def _axis(site: SiteReport) -> str:
    if site.assumed:
        return f"{site.axis} · assumed ?"
    if site.axis_source.startswith("layer ("):  # the layer is in the site's name
        return str(site.axis)
    return f"{site.axis} · {visible(site.axis_source)}"


def _tone(site: SiteReport) -> str:
    if site.not_finite or site.not_finite_neurons:
        return "alarm"
    if site.dead:
        return "bad"
    if site.is_unseen or site.unseen:
        return "unknown"
    return "warn" if site.silent or site.dormant or site.cut_off else "calm"


def fold(sites: Sequence[SiteReport], limit: int = 40, most: int = 40) -> tuple[list[SiteReport], list[str]]:
    """Return the layers that get a row of the table, and sentences about those that were left out.

    Args:
        sites: All layers.
        limit: Up to this many layers, each gets a row; of more, only those with something to report.
        most: Most rows. If more layers have something to report, the worst get a row.
    """
    if len(sites) <= limit:
        return list(sites), []
    found = [index for index, site in enumerate(sites) if _tone(site) != "calm" or site.linear]

    def rank(index: int) -> tuple[bool, bool, tuple[float, float]]:  # those in the totals and those seen come first
        return sites[index].in_headlines, not sites[index].is_unseen, severity(sites[index])

    worst = sorted(found, key=rank, reverse=True)[:most]
    left_out = []
    if len(found) > most:
        left_out.append(f"… {plural(len(found) - most, 'more layer')} with something to report, none worse than these")
    if len(sites) > len(found):
        left_out.append(f"… {plural(len(sites) - len(found), 'more layer')} with nothing to report")
    return [sites[index] for index in sorted(worst)], left_out
