"""Realistic reports made without a network: what the writers are tried on.

Every site's history, masks and counts are derived from one array of levels, so that they agree with each other.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from neuronscope.judge.verdicts import Judgement, Policy
from neuronscope.report.report import (
    LEVEL_CUT_OFF,
    LEVEL_DEAD,
    LEVEL_DORMANT,
    LEVEL_MAX,
    LEVEL_NOT_FINITE,
    LEVEL_SILENT,
    LEVEL_UNSEEN,
    NotMeasured,
    Report,
    SiteHistory,
    SiteReport,
    WindowSpan,
)

Levels = npt.NDArray[np.uint8]
Steps = npt.NDArray[np.int64]


def windows(count: int = 40, apart: int = 100) -> Steps:
    """Last steps of ``count`` windows."""
    return np.arange(1, count + 1, dtype=np.int64) * apart


def levels_of(
    neurons: int,
    steps: Steps,
    *,
    seed: int = 0,
    born_dead: float = 0.0,
    dying: float = 0.0,
    spike: int | None = None,
    dormant: float = 0.0,
    cut_off: float = 0.0,
    silent: float = 0.0,
    reviving: float = 0.0,
) -> Levels:
    """Levels ``(W, N)`` of a site in which given shares of neurons fare badly; most deaths come at ``spike``."""
    rng = np.random.default_rng(seed)
    base = rng.beta(3.0, 3.0, neurons)
    noise = rng.normal(0.0, 0.03, (len(steps), neurons))
    levels = np.clip(np.rint((base + noise) * LEVEL_MAX), 0, LEVEL_MAX - 1).astype(np.uint8)
    fate = rng.permutation(neurons)
    parts = np.cumsum([round(share * neurons) for share in (born_dead, dying, dormant, cut_off, silent)])
    born, died, sleepy, cut, quiet, _ = np.split(fate, parts)
    levels[:, born] = LEVEL_DEAD
    last = int(steps[-1])
    for neuron in died:
        at = spike + rng.exponential(last * 0.02) if spike and rng.random() < 0.8 else rng.uniform(0.05, 1.0) * last
        gone = steps > at
        if rng.random() < reviving:
            gone &= steps < at + rng.uniform(0.05, 0.3) * last
        levels[gone, neuron] = LEVEL_DEAD
    for neuron in sleepy:
        levels[steps > rng.uniform(0.1, 0.8) * last, neuron] = LEVEL_DORMANT
    for neuron in cut:
        levels[steps > rng.uniform(0.1, 0.8) * last, neuron] = LEVEL_CUT_OFF
    for neuron in quiet:
        levels[steps > rng.uniform(0.1, 0.8) * last, neuron] = LEVEL_SILENT
    return levels


def site_of(
    name: str,
    levels: Levels,
    steps: Steps,
    *,
    activation: str = "relu",
    kind: str = "relu-like",
    gradients: bool = True,
) -> SiteReport:
    """A site whose every field follows from its levels; verdicts are of the last window."""
    layer = name.partition("/")[0]
    count, neurons = levels.shape
    last = levels[-1] if count else np.full(neurons, LEVEL_UNSEEN, np.uint8)
    dead = levels == LEVEL_DEAD
    fell, rose = ~dead[:-1] & dead[1:], dead[:-1] & ~dead[1:]
    ever_fired = (~dead & (levels != LEVEL_UNSEEN)).any(axis=0)
    unseen = bool((last == LEVEL_UNSEEN).all())
    positions = 0 if unseen else 4096
    zeros = np.where(last <= LEVEL_MAX, last / LEVEL_MAX, np.where(last == LEVEL_DEAD, 1.0, 0.5))
    zeros = np.where(last == LEVEL_UNSEEN, np.nan, zeros)
    return SiteReport(
        name=name,
        activation=activation,
        kind=kind,
        neurons=neurons,
        axis=1,
        axis_source=f"layer ({layer})",
        positions=positions,
        gradient_positions=positions if gradients else 0,
        examples=positions,
        not_finite=int((last == LEVEL_NOT_FINITE).sum()) * positions,
        zero_output_fraction=zeros,
        zero_gradient_fraction=zeros if gradients else np.full(neurons, np.nan),
        mean_abs_output=np.where(last == LEVEL_DEAD, 0.0, 1.0 - zeros),
        last_active_step=np.where(ever_fired, _last_where(~dead, steps), -1),
        judgement=Judgement(
            dead=last == LEVEL_DEAD,
            silent=last == LEVEL_SILENT,
            dormant=last == LEVEL_DORMANT,
            cut_off=last == LEVEL_CUT_OFF,
            linear=last == 0,
            not_finite=last == LEVEL_NOT_FINITE,
            unseen=last == LEVEL_UNSEEN,
            tau_dormant=np.isin(last, (LEVEL_DEAD, LEVEL_SILENT, LEVEL_DORMANT)),
        ),
        history=SiteHistory(
            steps=steps,
            levels=levels,
            died_step=_last_where(fell, steps[1:]),
            revived_step=_last_where(rose, steps[1:]),
            deaths=fell.sum(axis=0),
            revivals=rose.sum(axis=0),
        ),
        layer=layer,
        units=((layer, 0, neurons, 1),),
    )


def report_of(
    sites: Sequence[SiteReport],
    *,
    phase: str = "train",
    model: str = "ConvNet",
    not_measured: Sequence[NotMeasured] = (),
    notes: Sequence[str] = (),
) -> Report:
    """A report over sites; its step is the last window's."""
    steps = [int(site.history.steps[-1]) for site in sites if len(site.history.steps)]
    last = max(steps, default=0)
    return Report(
        model=model,
        phase=phase,
        global_step=last,
        window=WindowSpan("last", max(last - 99, 0), last, 100, True),
        policy=Policy().to_dict(),
        layers=tuple(sites),
        not_measured=tuple(not_measured),
        notes=tuple(notes),
        versions={"neuronscope": "0.1.0"},
    )


def conv_net(upto: int = 40, *, phase: str = "train", widths: Sequence[int] = (64, 128, 256, 256, 512, 512)) -> Report:
    """The first ``upto`` windows of a small net in which a spike at step 1500 kills neurons of the deeper layers."""
    steps = windows(40)
    sites = []
    for index, width in enumerate(widths):
        levels = levels_of(
            width,
            steps,
            seed=index,
            born_dead=0.01 * index,
            dying=0.1 * index,
            spike=1500,
            dormant=0.02 * index,
            cut_off=0.01 * (index % 2),
            silent=0.03 * (index // 4) * (phase == "train"),
            reviving=0.2,
        )
        sites.append(site_of(f"features.{3 * index}/relu", levels[:upto], steps[:upto], gradients=phase == "train"))
    return report_of(sites, phase=phase)


def uniform(level: int, *, sites: int = 4, neurons: int = 96, count: int = 20) -> Report:
    """A network whose every neuron has the same level in every window (all dead, all alive, not finite, unseen)."""
    steps = windows(count)
    levels = np.full((count, neurons), level, np.uint8)
    return report_of([site_of(f"layers.{i}/relu", levels, steps) for i in range(sites)], model="MLP")


def language_model(layers: int = 12, neurons: int = 4096, count: int = 60) -> Report:
    """Wide gated and plain feed-forward layers, windows of uneven length."""
    steps = np.cumsum(np.where(np.arange(count) < count // 2, 20, 100)).astype(np.int64)
    sites = [
        site_of(
            f"model.decoder.layers.{i}.mlp.fc1/relu",
            levels_of(neurons, steps, seed=i, born_dead=0.0005, dying=0.03 * i, spike=900, dormant=0.05, reviving=0.1),
            steps,
        )
        for i in range(layers)
    ]
    return report_of(sites, model="DecoderForCausalLM")


def many_sites(count: int = 200, neurons: int = 32) -> Report:
    """A deep residual network with hundreds of sites, four to a block."""
    steps = windows(12)
    sites = [
        site_of(
            f"stages.{i // 40}.blocks.{i // 4 % 10}.{('conv1', 'conv2', 'conv3', 'out')[i % 4]}/relu",
            levels_of(neurons, steps, seed=i, dying=min(0.9, 0.004 * i)),
            steps,
        )
        for i in range(count)
    ]
    return report_of(sites, model="ResNet")


def _last_where(mask: npt.NDArray[np.bool_], steps: Steps) -> Steps:
    """Last step at which each column of ``mask`` is true; -1 where it never is."""
    if not len(mask):
        return np.full(mask.shape[1], -1, np.int64)
    last: Steps = np.where(mask, steps[:, None], -1).max(axis=0)
    return last
