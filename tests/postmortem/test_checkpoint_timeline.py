"""Several checkpoints of one run: deaths and revivals between them, beside gradients noted at every step."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import neuronscope as ns
from neuronscope.checkpoints.verdict.checkpoint_timeline import (
    DIED,
    REVIVED,
    CheckpointTimeline,
    GradientMasks,
    LayerTimeline,
    TimelineBuilder,
    TimelinePoint,
)
from neuronscope.checkpoints.verdict.combine import combine_evidence
from neuronscope.checkpoints.writers.timeline_wording import findings
from neuronscope.demo.digits import load_digits
from tests.postmortem import samples

STEPS, EVERY = 720, 60
#: Spans of steps in which each neuron of the first layer gets a gradient.
SPANS = (
    [(1, STEPS)],  # lives
    [],  # born dead
    [(1, 100)],  # dies
    [(1, 230), (550, STEPS)],  # dies and revives
    [(1, 380)],
    [(500, STEPS)],  # born dead, wakes
    [(1, 179)],  # dies just before a checkpoint
    [(1, 181)],  # and just after one
    [(1, 60), (370, 375)],  # wakes for a moment and dies again
    [(310, 312)],  # born dead, wakes for a moment
)
OPTIMIZERS = {
    "Adam": lambda p: torch.optim.Adam(p, lr=1e-3),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=1e-3, weight_decay=0.1),
    "SGD": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9),
    "SGD with decay": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, weight_decay=5e-4),
}


def network(width: int = len(SPANS)) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(20, width), nn.ReLU(), nn.Linear(width, 3))


def run(folder: Path, make, spans=SPANS, rate=lambda step: 1.0, steps: int = STEPS, **more) -> None:
    """Checkpoints of a run with random gradients in these spans. Names and times of the files are misleading."""
    model = network(len(spans))
    optimizer = make(model.parameters())
    base = optimizer.param_groups[0]["lr"]
    for step in range(1, steps + 1):
        optimizer.param_groups[0]["lr"] = base * rate(step)
        for name, parameter in model.named_parameters():
            parameter.grad = torch.randn_like(parameter)
            if name.startswith("0."):
                parameter.grad[[not any(a <= step <= b for a, b in each) for each in spans]] = 0
        optimizer.step()
        if step % EVERY == 0:
            path = folder / f"model_{1000 - step}.pt"
            torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step, **more}, path)
            os.utime(path, (1e9 - step, 1e9 - step))


def events(report: ns.PostmortemReport, layer: str, kind: int) -> dict[int, list[tuple[int, int]]]:
    """The first and the last possible step of each death or revival, by neuron."""
    (found,) = (one for one in report.timeline.layers if one.name == layer)
    mask = found.kind == kind
    result: dict[int, list[tuple[int, int]]] = {}
    for neuron, early, late in zip(found.neuron[mask], found.earliest[mask], found.latest[mask], strict=True):
        result.setdefault(int(neuron), []).append((int(early), int(late)))
    return result


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_death_and_revival_is_in_the_interval_between_two_checkpoints(name: str, tmp_path: Path) -> None:
    run(tmp_path, OPTIMIZERS[name], rate=lambda step: 1.0 if step < 300 else 0.3)
    report = ns.postmortem(tmp_path)
    assert report.path.endswith("model_280.pt")
    assert [point.step for point in report.timeline.checkpoints] == [*range(EVERY, STEPS + 1, EVERY)]
    died, revived = events(report, "0", DIED), events(report, "0", REVIVED)
    # The last gradients, by neuron; 0 = there was none. Each is known to within the time between two checkpoints.
    deaths = {1: [0], 2: [100], 3: [230], 4: [380], 5: [0], 6: [179], 7: [181], 8: [60, 375], 9: [0, 312]}
    assert died.keys() == deaths.keys()
    for neuron, steps in deaths.items():
        for step, (early, late) in zip(steps, died[neuron], strict=True):
            assert early <= step <= late or (early, late) == (-1, -1)
            assert late - max(early, 0) <= EVERY
    births = {3: [550], 5: [500], 8: [370], 9: [310]}
    assert revived.keys() == births.keys()
    for neuron, steps in births.items():
        for step, (early, late) in zip(steps, revived[neuron], strict=True):
            assert early <= step <= late < early + EVERY


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_counts_of_the_timeline_add_up_and_end_at_the_verdicts(name: str, tmp_path: Path) -> None:
    run(tmp_path, OPTIMIZERS[name])
    timeline = (report := ns.postmortem(tmp_path)).timeline
    assert timeline.dead[-1] == report.dead == report["0"].dead == 7
    died, revived = timeline.count(DIED), timeline.count(REVIVED)
    assert timeline.dead.tolist() == np.cumsum(died - revived).tolist()  # nobody's fate was lost in between
    # 1, 5 and 9 born; 8 at 60, 2 by 120, 6 by 180, 3 and 7 by 240, 9 woke and died by 360, 8 by 420, 4 by 420; then 5
    # woke, and 3.
    assert timeline.dead.tolist() == [4, 5, 6, 8, 8, 8, 9, 9, 8, 7, 7, 7]


def test_a_watched_run_gives_the_exact_steps(tmp_path: Path) -> None:
    model = network(5)
    with torch.no_grad():
        model[0].weight.fill_(1.0)
        model[0].bias.fill_(1.0)
    # The bias of a neuron makes it silent in these spans of steps.
    silent = {0: [(1, 300)], 1: [(57, 300)], 2: [(57, 213)], 3: [(101, 150), (201, 300)]}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    scope = ns.watch(model, window_steps=10, optimizer=optimizer)
    for step in range(300):
        for neuron, spans in silent.items():
            model[0].bias.data[neuron] = -99.0 if any(a <= step + 1 <= b for a, b in spans) else 1.0
        model(torch.rand(400, 20)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 50 == 49:
            state = {"model": model.state_dict(), "scope": scope.state_dict(), "step": step + 1}
            torch.save(state, tmp_path / f"{step}.pt")
    scope.detach()
    report = ns.postmortem(tmp_path)
    # A scope counts steps from 0: step 57 of the loop is its step 56.
    assert events(report, "0", DIED) == {0: [(-1, -1)], 1: [(56, 56)], 2: [(56, 56)], 3: [(100, 100), (200, 200)]}
    assert events(report, "0", REVIVED) == {2: [(213, 213)], 3: [(150, 150)]}
    (layer,) = (one for one in report.timeline.layers if one.name == "0")
    assert layer.dead.tolist() == [1, 3, 4, 3, 3, 3]
    assert {report.to_dict()["timeline"]["layers"][0]["events"]["basis"][at] for at in range(7)} == {"measured"}


@pytest.mark.parametrize(
    ("make", "factor"),
    [
        (lambda p: torch.optim.Adam(p, lr=1e-3), 100.0),
        (lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, weight_decay=5e-4), 40.0),
    ],
    ids=["Adam", "SGD with decay"],
)
def test_a_spike_and_a_later_reset_of_weights_are_dated_in_a_real_training(make, factor, tmp_path: Path) -> None:
    digits, order = load_digits(), torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    for at in (0, 2, 4):
        nn.init.kaiming_normal_(model[at].weight, nonlinearity="relu")
        nn.init.zeros_(model[at].bias)
    optimizer = make(model.parameters())
    base = optimizer.param_groups[0]["lr"]
    noted: list[np.ndarray] = []  # whether each neuron of layer 0 got a gradient, step by step
    for step in range(1, 721):
        optimizer.param_groups[0]["lr"] = base * (factor if 130 <= step < 150 else 1.0)
        batch = torch.randint(len(digits.train_y), (32,), generator=order)
        F.cross_entropy(model(digits.train_x[batch]), digits.train_y[batch]).backward()
        noted.append(((model[0].weight.grad != 0).any(dim=1) | (model[0].bias.grad != 0)).numpy())
        optimizer.step()
        optimizer.zero_grad()
        if step == 510:
            reset = np.flatnonzero(~np.stack(noted[-310:]).any(axis=0))[:6]
            model[0].weight.data[reset] = torch.randn(len(reset), 64, generator=order) * 0.2
            model[0].bias.data[reset] = 0.2
        if step % EVERY == 0:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step}
            torch.save(state, tmp_path / f"{step}.pt")
    got, report = np.stack(noted), ns.postmortem(tmp_path)
    died, revived = events(report, "0", DIED), events(report, "0", REVIVED)
    silences = 0
    for neuron in range(64):
        steps = np.flatnonzero(got[:, neuron]) + 1
        # Silences of which the clock is sure at some checkpoint.
        ends = np.concatenate([steps, [721]])
        for last, following in zip(ends, ends[1:], strict=False):
            if following - last > 300 + 2 * EVERY:
                silences += 1
                assert any(early <= last <= late for early, late in died.get(neuron, ())), neuron
        for early, late in died.get(neuron, ()):
            assert ((steps >= early) & (steps <= late)).any() or early < 0
        for early, late in revived.get(neuron, ()):
            assert ((steps >= early) & (steps <= late)).any()
    assert silences >= 8
    woken = [int(neuron) for neuron in reset if got[510:, neuron].any()]
    assert len(woken) >= 3
    assert all(any(early <= 511 <= late for early, late in revived[neuron]) for neuron in woken)


def test_checkpoints_a_few_steps_apart_call_no_pause_a_death(tmp_path: Path) -> None:
    """A neuron that gets a gradient every 70th step is alive at each of many checkpoints."""
    spans = ([(1, STEPS)], [(at, at) for at in range(35, STEPS, 70)])
    run(tmp_path, OPTIMIZERS["AdamW"], spans)
    report = ns.postmortem(tmp_path)
    assert (report.dead, report.suspected, report.contested) == (0, 0, 0)
    assert events(report, "0", DIED) == {}


def test_a_gradient_that_two_checkpoints_show_refutes_the_clock(tmp_path: Path) -> None:
    """From step 250 on, a neuron's gradients are so faint that one checkpoint's clock takes it for silent."""
    model = network(4)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for step in range(1, 601):
        for name, parameter in model.named_parameters():
            parameter.grad = torch.randn_like(parameter)
            if name.startswith("0.") and step >= 250:
                parameter.grad[2] *= 1e-14
        optimizer.step()
        if step in (540, 600):
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step}
            torch.save(state, tmp_path / f"{step}.pt")
    assert ns.postmortem(tmp_path / "600.pt").dead == 1
    report = ns.postmortem(tmp_path)
    assert (report.dead, report.contested, report.count("alive")) == (0, 0, 4)


# --- made up by hand ------------------------------------------------------------------------------------------------


def built(*points, gradients=()):
    """The timeline of one layer of four neurons, from evidence at steps 100, 200 …"""
    builder = TimelineBuilder()
    for at, said in enumerate(points):
        between = {"a": gradients[at]} if at < len(gradients) and gradients[at] else {}
        builder.add(f"{at}.pt", 100 * (at + 1), combine_evidence(said), between, {})
    (layer,) = builder.build().layers
    return layer


def at_step(dead=(), alive=(), basis="measured", source="scan", since=None):
    return [
        samples.evidence("a", 4, "dead", basis, dead, source=source, since=since),
        samples.evidence("a", 4, "alive", "measured", alive, source=source),
    ]


def mask(*neurons: int) -> np.ndarray:
    return np.isin(np.arange(4), neurons)


def test_what_fires_on_the_data_at_one_checkpoint_died_after_it() -> None:
    layer = built(at_step(alive=[0, 1, 2, 3]), at_step([2], [0, 1, 3]), at_step([2, 3], [0, 1]))
    assert list(zip(layer.neuron, layer.earliest, layer.latest, strict=True)) == [(2, 100, 200), (3, 200, 300)]


def test_a_proof_at_one_checkpoint_is_shown_with_its_basis() -> None:
    layer = built(at_step(alive=[0, 1]), at_step([1], [0], basis="proved", source="interval bound"))
    assert layer.to_dict()["events"]["basis"] == ["proved"]


def test_a_neuron_of_which_nothing_was_known_before_is_not_dated_to_the_gap() -> None:
    layer = built(at_step(alive=[0]), at_step(), at_step([0, 1]))
    assert layer.dead.tolist() == [0, 0, 2]
    assert layer.unknown.tolist() == [3, 4, 2]
    assert list(zip(layer.neuron, layer.earliest, layer.latest, strict=True)) == [(0, 100, 300), (1, -1, 300)]


def test_a_dead_neuron_that_is_unknown_for_a_while_has_not_revived() -> None:
    layer = built(at_step([0]), at_step(), at_step([0]))
    assert layer.events(REVIVED).sum() == 0
    layer = built(at_step([0]), at_step(), at_step([], [0]))
    at = layer.events(REVIVED)
    assert (layer.earliest[at].tolist(), layer.latest[at].tolist()) == ([101], [300])


def test_no_gradient_since_an_earlier_checkpoint_dates_a_death_before_it() -> None:
    none = GradientMasks(mask(0), mask(1))
    last = at_step([0, 1], basis="inferred", source="x")
    layer = built(at_step(), at_step(), last, gradients=(None, none, none))
    assert layer.dead.tolist() == [1, 1, 2]
    assert list(zip(layer.neuron, layer.earliest, layer.latest, strict=True)) == [(0, -1, 100), (1, 201, 300)]


def test_a_dead_neuron_without_gradient_since_stays_dead() -> None:
    none = GradientMasks(mask(0), mask())
    layer = built(at_step([0, 1]), at_step(), at_step(), gradients=(None, none, none))
    assert layer.dead.tolist() == [2, 1, 1]


def test_the_bound_of_a_later_checkpoint_dates_a_death_before_an_earlier_one() -> None:
    bound = samples.evidence(
        "a",
        4,
        "no gradient",
        "inferred",
        [0],
        source="adam state",
        since=[60],
        measure="steps since the last gradient, at most",
    )
    layer = built(at_step(), [bound], gradients=(None, GradientMasks(mask(0), mask())))
    assert (layer.dead.tolist(), layer.earliest.tolist(), layer.latest.tolist()) == ([1, 1], [60], [100])


def recorded(since: int) -> list:
    return at_step([0], source="monitor record", since=since)


def test_the_exact_step_that_a_later_record_has_dates_a_death() -> None:
    layer = built(at_step(), at_step([0], basis="inferred", source="x"), recorded(150))
    assert layer.to_dict()["events"] == {
        "neuron": [0],
        "event": ["died"],
        "checkpoint": [1],
        "earliest": [150],
        "latest": [150],
        "basis": ["measured"],
    }


def test_a_record_that_ends_before_its_checkpoint_hides_no_revival() -> None:
    """The third record ends before the gradient that the optimizer's state shows; the fourth has the second death."""
    some = GradientMasks(mask(), mask(0))
    layer = built(recorded(50), recorded(50), recorded(50), recorded(250), gradients=(None, None, some, None))
    assert layer.dead.tolist() == [1, 1, 0, 1]
    died, revived = layer.events(DIED), layer.events(REVIVED)
    assert (layer.earliest[died].tolist(), layer.latest[died].tolist()) == ([50, 250], [50, 250])
    assert (layer.earliest[revived].tolist(), layer.latest[revived].tolist()) == ([51], [250])


def test_a_layer_that_is_not_in_a_checkpoint_has_no_count_there() -> None:
    builder = TimelineBuilder()
    builder.add("a.pt", 1, combine_evidence([samples.evidence("b", 4, "dead", "proved", [1])]), {}, {})
    builder.add("b.pt", 2, combine_evidence(at_step([1], [0])), {}, {})
    builder.add("c.pt", 3, combine_evidence([replace(one, width=5) for one in at_step([1], [0])]), {}, {})
    (layer,) = builder.build().layers
    assert (layer.neurons, layer.dead.tolist()) == (5, [-1, -1, 1])


def test_sentences_add_up_where_a_later_checkpoint_leaves_a_death_open() -> None:
    def layer(dead: list[int]) -> LayerTimeline:
        events = np.arange(2, dtype=np.int64)
        return LayerTimeline(
            name="0",
            neurons=4,
            in_headlines=True,
            dead=np.array(dead),
            unknown=np.zeros(3, np.int64),
            neuron=events,
            kind=np.full(2, DIED, np.uint8),
            checkpoint=np.array([1, 1]),
            earliest=np.array([101, 101]),
            latest=np.array([200, 200]),
            basis=np.zeros(2, np.uint8),
        )

    points = tuple(TimelinePoint(f"{step}.pt", step, 0) for step in (100, 200, 300))
    assert findings(CheckpointTimeline(points, (layer([0, 2, 1]),)))[1] == (
        "1 neuron was dead at a checkpoint, and a later one leaves it open."
    )
    assert not any("leaves it open" in each for each in findings(CheckpointTimeline(points, (layer([0, 2, 2]),))))
