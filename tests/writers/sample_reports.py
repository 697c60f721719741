"""Sample reports: synthetic networks with a known fate for every neuron, made with numpy alone."""

from __future__ import annotations

from dataclasses import dataclass, replace
from types import SimpleNamespace

import numpy as np

from neuronscope.judge.verdicts import Policy, judge
from neuronscope.report.acts import Act
from neuronscope.report.report import (
    LEVEL_CUT_OFF,
    LEVEL_DEAD,
    LEVEL_DORMANT,
    LEVEL_MAX,
    LEVEL_NOT_FINITE,
    LEVEL_SILENT,
    NotMeasured,
    Report,
    SiteHistory,
    SiteReport,
    WindowSpan,
)
from neuronscope.sites import IncomingRows, ReaderColumns

POLICY = Policy()
VERSIONS = {"neuronscope": "0.1.0", "numpy": "2.0.0", "torch": "2.13.0"}
HOSTILE = "<script>alert(1)</script>"


@dataclass(frozen=True)
class Fate:
    """How many neurons of a site meet which end; the rest live."""

    born: int = 0
    died: int = 0
    revived: int = 0
    dormant: int = 0
    cut_off: int = 0
    linear: int = 0
    not_finite: int = 0
    silent: int = 0


def site(
    name: str,
    neurons: int,
    fate: Fate | None = None,
    *,
    activation: str = "relu",
    kind: str = "relu-like",
    axis_source: str = "",
    windows: int = 20,
    stride: int = 100,
    positions: int = 10_000,
    examples: int = 1_000,
    gradients: bool = True,
    seed: int = 0,
) -> SiteReport:
    """A site whose neurons are strewn over its indices, each with its fate and a history that fits it."""
    fate = fate or Fate()
    layer = name.partition("/")[0]
    rng = np.random.default_rng(seed)
    order = rng.permutation(neurons)
    ends = np.cumsum(
        [fate.born, fate.died, fate.revived, fate.dormant, fate.cut_off, fate.linear, fate.not_finite, fate.silent]
    )
    born, died, revived, dormant, cut_off, linear, broken, silent = np.split(order, ends)[:8]
    steps = stride * np.arange(1, windows + 1)

    base = np.clip(rng.normal(0.5, 0.18, neurons), 0.02, 0.97)
    base[linear] = 0.0
    fractions = np.clip(base + rng.normal(0, 0.03, (windows, neurons)), 0.004, 0.996)
    fractions[:, linear] = 0.0
    levels = np.round(fractions * LEVEL_MAX).astype(np.uint8)
    levels[:, dormant] = LEVEL_DORMANT
    levels[:, born] = LEVEL_DEAD
    died_step = np.full(neurons, -1)
    revived_step = np.full(neurons, -1)
    last_active = np.full(neurons, int(steps[-1]) if windows else 0)
    last_active[born] = -1
    for neuron in died:
        start = int(rng.integers(1, windows)) if windows > 1 else 0
        levels[start:, neuron] = LEVEL_DEAD
        died_step[neuron], last_active[neuron] = steps[start], steps[start] - stride
    for neuron in revived:
        start = int(rng.integers(1, windows - 2))
        levels[start : start + 2, neuron] = LEVEL_DEAD
        died_step[neuron], revived_step[neuron] = steps[start], steps[start + 2]
    levels[windows // 2 :, cut_off] = LEVEL_CUT_OFF
    levels[-1:, broken] = LEVEL_NOT_FINITE
    levels[windows // 3 :, silent] = LEVEL_SILENT

    dead = np.concatenate([born, died]).astype(int)
    zero = np.round(base * positions).astype(np.int64)
    zero[dead] = positions
    zero[silent] = positions
    zero_gradients = np.minimum(zero, positions - 1)
    zero_gradients[dead] = positions
    zero_gradients[cut_off] = positions
    mean = np.where(zero == positions, 0.0, 0.6 * (1.1 - base))
    mean[dormant] = 0.001
    bad = np.zeros(neurons, dtype=np.int64)
    bad[broken] = 7
    judgement = judge(
        SimpleNamespace(
            kind=kind,
            linear_when_on=kind == "relu-like",
            zero_outputs=zero,
            zero_gradients=zero_gradients,
            not_finite_outputs=bad,
            mean_abs_output=mean,
            positions=positions,
            gradient_positions=positions if gradients else 0,
        ),
        POLICY,
    )
    seen = positions > 0
    return SiteReport(
        name=name,
        activation=activation,
        kind=kind,
        neurons=neurons,
        axis=1,
        axis_source=axis_source or f"layer ({layer})",
        positions=positions,
        gradient_positions=positions if gradients else 0,
        examples=examples if seen else 0,
        not_finite=int(bad.sum()),
        zero_output_fraction=zero / positions if seen else np.full(neurons, np.nan),
        zero_gradient_fraction=zero_gradients / positions if seen and gradients else np.full(neurons, np.nan),
        mean_abs_output=mean if seen else np.full(neurons, np.nan),
        last_active_step=last_active,
        judgement=judgement,
        history=SiteHistory(
            steps=steps,
            levels=levels,
            died_step=died_step,
            revived_step=revived_step,
            deaths=(died_step >= 0).astype(np.int64),
            revivals=(revived_step >= 0).astype(np.int64),
        ),
        layer="" if axis_source else layer,
        units=() if axis_source else ((layer, 0, neurons, 1),),
    )


def renamed(plain: SiteReport, name: str) -> SiteReport:
    """The same site under another name."""
    layer = name.partition("/")[0]
    return replace(plain, name=name, layer=layer, units=((layer, 0, plain.neurons, 1),))


def report(*sites: SiteReport, notes: tuple[str, ...] = (), not_measured: tuple[NotMeasured, ...] = ()) -> Report:
    """A report of the last window over ``sites``."""
    last = max((int(site.history.steps[-1]) for site in sites if site.history.steps.size), default=0)
    return Report(
        model="TinyNet",
        phase="train",
        global_step=last,
        window=WindowSpan("last", last - 99 if last else -1, last if last else -1, 100 if last else 0, True),
        policy=POLICY.to_dict(),
        layers=sites,
        not_measured=not_measured,
        notes=notes,
        versions=VERSIONS,
    )


def mixed() -> Report:
    """One site of every sort: each column of a table has something to say."""
    return report(
        site("features.0/relu", 64, Fate(born=10, died=2, revived=2), seed=1),
        site("features.3/relu", 128, Fate(died=24, dormant=6, revived=5, silent=3), seed=2),
        site("block.mlp.gate_proj/swiglu", 256, Fate(born=3, dormant=30), activation="swiglu", kind="gated", seed=3),
        site("block.gate/sigmoid", 32, Fate(cut_off=5), activation="sigmoid", kind="saturating", seed=4),
        site("block.act", 96, Fate(linear=7, silent=3), axis_source="assumed (rank)", seed=5),
        site("blind.fc/relu#1", 48, Fate(born=1), gradients=False, seed=6),
        site("never.ran/relu", 16, positions=0, windows=0),
        site("classifier.1", 512, axis_source="declared", seed=8),
        notes=("Gradients at blind.fc/relu#1 were not seen: its input needs none.",),
        not_measured=(NotMeasured("head.fused", "A fused kernel hides its activation."),),
    )


def acted() -> Report:
    """The weights of one layer are known and five of its neurons were revived; those of another are not known."""
    known = replace(
        site("fc1/relu", 16, Fate(died=4), seed=1),
        incoming=(IncomingRows("fc1", 0, 16, 0, 1), IncomingRows("norm", 0, 16, 0, 1)),
        reader_columns=(ReaderColumns("fc2", 0, 16, 0, 1, 1, 1),),
    )
    blocked = replace(
        site(f"{HOSTILE}/relu", 24, Fate(died=4), seed=2),
        incoming=(IncomingRows(HOSTILE, 0, 24, 0, 1),),
        reader_notes=("added in (a residual sum)",),
    )
    acts = (Act(100, "fc1/relu", (3,), "Dead()", 0, 99), Act(1200, "fc1/relu", (1, 2, 3, 7), HOSTILE, 100, 1199))
    return replace(report(known, blocked, site("fc3/relu", 8, seed=3)), acts=acts)


def healthy() -> Report:
    """Nothing is wrong anywhere."""
    return report(site("fc1/relu", 16, seed=1), site("fc2/relu", 24, seed=2))


def broken() -> Report:
    """A network that has gone NaN, and in which nothing else is wrong."""
    return report(site("fc1/relu", 16, seed=1), site("fc2/relu", 24, Fate(not_finite=24), seed=2))


def unwatched() -> Report:
    """Nothing was observed at all."""
    return report(site("fc1/relu", 16, positions=0, windows=0), site("fc2/relu", 24, positions=0, windows=0))


def hostile() -> Report:
    """Names that try to become markup, in every place a name can stand."""
    names = (HOSTILE, "a|b`c`|d", "*x*_y_[z](http://q)", "\x1b[31mred\n| x |", "q\"'></td>&amp;", "</script><!--")
    sites = tuple(site(name, 8, Fate(born=2, died=1), seed=i) for i, name in enumerate(names))
    whole = report(*sites, notes=(HOSTILE, "1. - <img src=x onerror=alert(2)>", "\x1b[2Jcleared\u202e"))
    return replace(
        whole,
        model=HOSTILE,
        phase=HOSTILE,
        not_measured=(NotMeasured(HOSTILE, f"because {HOSTILE} | `x`"),),
        versions={HOSTILE: HOSTILE},
    )


def many(count: int = 120) -> Report:
    """Hundreds of sites of which three have something to report."""
    fates = {7: Fate(born=2), 50: Fate(dormant=3), 99: Fate(died=1)}
    long = "encoder.layers.{}.feed_forward.intermediate_dense/relu"
    return report(*(site(long.format(i), 16, fates.get(i), windows=4, seed=i) for i in range(count)))


def noisy(sites: int = 12, neurons: int = 4096, windows: int = 200) -> Report:
    """Histories of pure noise, which no compression can shrink: the worst that a page may have to hold."""
    rng = np.random.default_rng(0)
    made = []
    for index in range(sites):
        plain = site(f"layers.{index}.fc/relu", neurons, Fate(born=neurons // 9, died=neurons // 3), windows=windows)
        history = replace(
            plain.history,
            levels=rng.integers(0, 256, (windows, neurons), dtype=np.uint8),
            died_step=rng.integers(-1, 100 * windows, neurons),
            revived_step=rng.integers(-1, 100 * windows, neurons),
        )
        made.append(replace(plain, zero_output_fraction=rng.random(neurons), history=history))
    return report(*made)
