"""Sample post-mortems: evidence made by hand with numpy alone, as the examiners give it, with a known fate for all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from neuronscope.checkpoints.diagnosis_inputs import postmortem_facts
from neuronscope.checkpoints.postmortem_report import PostmortemReport
from neuronscope.checkpoints.verdict.checkpoint_timeline import GradientMasks, LeftOut, TimelineBuilder
from neuronscope.checkpoints.verdict.combine import combine_evidence, confirmations
from neuronscope.checkpoints.verdict.evidence import Abstention, Evidence
from neuronscope.judge.diagnosis import diagnose

VERSIONS = {"neuronscope": "0.1.0", "torch": "2.13.0", "numpy": "2.0.0"}
HOSTILE = "<script>alert(1)</script>"


def evidence(
    layer: str,
    width: int,
    claim: str,
    basis: str,
    neurons: Sequence[int],
    *,
    source: str = "weights",
    numbers: Sequence[float] | None = None,
    since: Sequence[int] | int | None = None,
    measure: str = "",
    text: str = "Said by hand.",
    whole_layer: bool = False,
) -> Evidence:
    """One piece of evidence; numbers and steps may be left out, or one step given for all."""
    size = len(neurons)
    steps = np.full(size, since, dtype=np.int64) if isinstance(since, int) else since
    return Evidence(
        layer=layer,
        width=width,
        source=source,
        claim=claim,
        basis=basis,
        neurons=np.array(neurons, dtype=np.int64),
        numbers=np.full(size, np.nan) if numbers is None else np.array(numbers, dtype=np.float64),
        measure=measure,
        text=text,
        since=None if steps is None else np.array(steps, dtype=np.int64),
        whole_layer=whole_layer,
    )


def adam(
    layer: str, width: int, gone: Sequence[int], since: Sequence[int], step: int, born: Sequence[int] = ()
) -> list[Evidence]:
    """What the optimizer's clock says of a layer: never trained, no gradient since, and the rest alive."""
    rest = sorted(set(range(width)) - set(gone) - set(born))
    never = "Its second moment is zero over the whole row: no gradient ever reached it."
    clock = "By Adam's two moments; sound in float32 state, up to about 850 steps."
    age = "steps since its last gradient, at most"
    return [
        evidence(layer, width, "never trained", "inferred", sorted(born), source="adam state", since=-1, text=never),
        evidence(
            layer,
            width,
            "no gradient",
            "inferred",
            gone,
            source="adam state",
            numbers=[step - at for at in since],
            since=since,
            measure=age,
            text=clock,
        ),
        evidence(
            layer,
            width,
            "alive",
            "inferred",
            rest,
            source="adam state",
            numbers=[3.0] * len(rest),
            measure=age,
            text=clock,
        ),
    ]


def report(
    said: Sequence[Evidence],
    *,
    level: str = "file",
    step: int | None = 5000,
    model: str = "",
    abstentions: tuple[Abstention, ...] = (),
    notes: tuple[str, ...] = (),
    path: str = "runs/last.ckpt",
    form: str = "Lightning checkpoint",
    rates: tuple[float, ...] = (),
) -> PostmortemReport:
    """Evidence brought to a report, with its diagnosis."""
    layers = combine_evidence(said)
    facts = postmortem_facts(layers, step=step, learning_rates=rates)
    return PostmortemReport(
        path=path,
        format=form,
        global_step=step,
        level=level,
        model=model,
        layers=layers,
        abstentions=abstentions,
        diagnoses=diagnose(facts),
        confirmations=confirmations(layers),
        notes=notes,
        versions=VERSIONS,
    )


def spike(
    width: int, count: int, seed: int, around: int = 4100, step: int = 5000, born: int = 0
) -> tuple[list[int], list[int], list[int]]:
    """Neurons that died around a step, when each did, and neurons born dead; strewn over the layer."""
    rng = np.random.default_rng(seed)
    order = rng.permutation(width)
    gone = sorted(order[:count].tolist())
    return (
        gone,
        rng.integers(around - 3, around + 20, count).clip(0, step).tolist(),
        sorted(order[count : count + born].tolist()),
    )


def _network(step: int = 5000) -> list[Evidence]:
    said = []
    for index, (width, count, born) in enumerate([(64, 18, 0), (64, 9, 0), (96, 14, 2), (128, 0, 0)]):
        gone, since, never = spike(width, count, seed=index, step=step, born=born)
        said += adam(f"net.{2 * index}", width, gone, since, step, never)
    return said


def alone() -> PostmortemReport:
    """A file alone, of a run whose neurons died in a spike."""
    said = _network()
    said.append(evidence("net.4", 96, "zero row", "proved", [5], text="All its incoming weights are zero."))
    abstentions = (
        Abstention("monitor record", "", "The run was not watched: no record in the checkpoint."),
        Abstention("adam state", "head", "Its state is bfloat16, in which the clock stands still."),
    )
    notes = ("Optimizer: AdamW, float32 state.",)
    return report(said, abstentions=abstentions, notes=notes, rates=(0.001,))


def with_model() -> PostmortemReport:
    """The model too: proofs from bounds, and what is only suspected."""
    said = [
        *_network(),
        evidence(
            "net.4",
            96,
            "dead",
            "proved",
            spike(96, 14, seed=2)[0][:6],
            source="layer norm",
            numbers=[-0.4, -1.2, -0.1, -2.0, -0.7, -0.3],
            measure="largest pre-activation of any input",
            text="LayerNorm bounds what the layer can be given: no input lifts it above zero.",
        ),
        evidence(
            "net.6",
            128,
            "dead",
            "suspected",
            [3, 77],
            source="batch norm",
            numbers=[4.2, 4.9],
            measure="standard deviations that its mean lies below zero",
            text="If its input is normal; no proof.",
        ),
        evidence(
            "net.6",
            128,
            "quiet",
            "proved",
            [3, 40, 77],
            source="batch norm",
            numbers=[0.054, 0.09, 0.04],
            measure="share of positions at which it fires, at most",
            text="By Cantelli's inequality, whatever the distribution.",
        ),
    ]
    return report(said, level="model", model="DigitsNet", rates=(0.001,))


def with_data() -> PostmortemReport:
    """Data too: most of what was inferred held, some was refuted."""
    said = list(with_model_evidence())
    for name, width, count, seed in [("net.0", 64, 18, 0), ("net.2", 64, 9, 1), ("net.4", 96, 14, 2)]:
        gone = spike(width, count, seed=seed)[0]
        silent = gone[:-2]
        rest = sorted(set(range(width)) - set(silent))
        share = "share of examples it may still fire in, at most"
        ground = "0 of 1,797 examples at 95 % confidence."
        said += [
            evidence(
                name,
                width,
                "dead",
                "measured",
                silent,
                source="scan",
                numbers=[0.00167] * len(silent),
                measure=share,
                text=ground,
            ),
            evidence(name, width, "alive", "measured", rest, source="scan", text="It fired."),
        ]
    return report(said, level="data", model="DigitsNet", rates=(0.001,))


def with_model_evidence() -> list[Evidence]:
    """All evidence of :func:`with_model`."""
    return [one for layer in with_model().layers for one in layer.evidence]


def several() -> PostmortemReport:
    """The last of four checkpoints: a spike before the third one, and two revivals after it."""
    builder = TimelineBuilder()
    for at, step in enumerate((1000, 3000, 4200, 5000)):
        said = []
        for name, gone in (("net.0", range(20, 32)), ("net.2", range(4)), ("head", range(0))):
            dead = [[], [*gone][:1], [*gone], [*gone][:-1]][at]
            since = [3990 + 10 * neuron % 100 if step > 4000 else 2900 for neuron in dead]
            said += adam(name, 32, dead, since, step, born=[0] if name == "net.0" else [])
        layers = combine_evidence(said)
        some = np.isin(np.arange(32), 0, invert=True)
        between = {layer.name: GradientMasks(~some & (at > 0), some & ~layer.dead_mask) for layer in layers}
        builder.add(f"runs/step{step}.ckpt", step, layers, between, {})
    whole = report(said, path="runs/step5000.ckpt", notes=("Left out: runs/old.ckpt: it does not say its step",))
    left_out = (LeftOut("runs/old.ckpt", "it does not say its step", False),)
    return replace(whole, timeline=builder.build(left_out))


def healthy() -> PostmortemReport:
    """All alive."""
    return report([*adam("a", 32, [], [], 5000), *adam("b", 32, [], [], 5000)])


def idle() -> PostmortemReport:
    """A layer that was frozen: none of it ever got a gradient."""
    text = "This is so for the whole layer: it was cut off from the loss all along."
    frozen = evidence(
        "frozen",
        32,
        "never trained",
        "inferred",
        list(range(32)),
        source="adam state",
        since=-1,
        text=text,
        whole_layer=True,
    )
    return report([frozen, *adam("b", 32, [4], [4000], 5000)])


def broken() -> PostmortemReport:
    """Weights that have gone NaN."""
    said = [
        *adam("a", 32, [], [], 5000),
        evidence("b", 32, "not finite", "proved", list(range(7)), text="NaN in the row."),
    ]
    return report(said)


def empty() -> PostmortemReport:
    """Nothing could be examined."""
    return report(
        [], step=None, abstentions=(Abstention("weights", "", "No tensor has rows of neurons."),), form="state dict"
    )


def hostile() -> PostmortemReport:
    """Names that try to become markup, in every place a name can stand."""
    names = (HOSTILE, "a|b`c`|d", "*x*_y_[z](http://q)", "\x1b[31mred\n| x |", "q\"'></td>&amp;", "</script><!--")
    said = []
    for name in names:
        one = adam(name, 8, [1, 4], [4000, 4001], 5000, [6])
        said += [replace(part, source=HOSTILE, text=HOSTILE, measure=HOSTILE) for part in one]
        said.append(evidence(name, 8, "alive", "measured", [1], source=HOSTILE, text=HOSTILE))
    whole = report(
        said,
        level="data",
        model=HOSTILE,
        path=f"runs/{HOSTILE}\u202e.ckpt",
        form=HOSTILE,
        abstentions=(Abstention(HOSTILE, HOSTILE, HOSTILE), Abstention("\x1b[2J", "", "cleared\u202e")),
        notes=(HOSTILE, "1. - <img src=x onerror=alert(2)>", "\x1b[2Jcleared\u202e"),
    )
    return replace(whole, versions={HOSTILE: HOSTILE})


def many(layers: int = 120) -> PostmortemReport:
    """Hundreds of layers, of which three have something to report."""
    hit = {7: 2, 50: 1, 99: 3}
    said = []
    for index in range(layers):
        count = hit.get(index, 0)
        said += adam(f"encoder.layers.{index}.feed_forward.dense", 16, list(range(count)), [4000] * count, 5000)
    return report(said)


def wide(layers: int = 12, width: int = 4096, *, noise: bool = False) -> PostmortemReport:
    """A wide network; with noise, every neuron has a number and a step of its own, which nothing can shrink."""
    rng = np.random.default_rng(0)
    said = []
    for index in range(layers):
        count = width if noise else width // 5
        gone = np.sort(rng.permutation(width)[:count]).tolist()
        since = rng.integers(0, 5000, count) if noise else rng.integers(4090, 4120, count)
        said += adam(f"layers.{index}", width, gone, since.tolist(), 5000)
    return report(said)
