"""The sentence above the page, and the timeline: each part only as far as it is known."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest

from neuronscope.report.report import Report, SiteReport
from neuronscope.writers.page_headline import headline, spike
from neuronscope.writers.page_timeline import timeline

from . import sample_reports as samples

EMPTY = np.zeros(0, np.int64)


def died_at(name: str, neurons: int, dead: int, step: int) -> SiteReport:
    """A layer of which so many neurons died at a step, one after another within three steps."""
    plain = samples.site(name, neurons, samples.Fate(died=dead), windows=50, stride=40)
    steps = np.where(plain.judgement.dead, step + np.arange(neurons) % 3, -1)
    active = np.where(plain.judgement.dead, steps - 1, plain.last_active_step)
    return replace(plain, last_active_step=active, history=replace(plain.history, died_step=steps))


def collapsed(**more: object) -> Report:
    sites = (samples.site("net.0/relu", 64, windows=50, stride=40), died_at("net.3/relu", 64, 61, 304))
    return replace(samples.report(*sites), **more)


RATE = tuple((step, 0.06 if 300 <= step <= 330 else 0.001) for step in range(0, 2_000, 10))


def test_the_headline_says_what_died_when_beside_what_and_how_far_to_go_back() -> None:
    report = collapsed(series={"learning_rate": RATE}, checkpoints=(96, 192, 288, 384))
    text = "Layer `net.3/relu` died at steps 304–306: 61 of 64 neurons. The learning rate was 60 × its median at steps "
    assert " ".join(headline(report)) == text + "300–330. Last healthy checkpoint: step 288."
    assert f'<p class="sentence lead">{text}'.replace("`net.3/relu`", "<code>net.3/relu</code>") in report.to_html()


def test_what_is_not_known_is_left_out() -> None:
    died = "Layer `net.3/relu` died at steps 304–306: 61 of 64 neurons."
    assert headline(collapsed()) == [died]
    late = collapsed(checkpoints=(400, 500), series={"learning_rate": tuple((step, 0.001) for step, _ in RATE)})
    assert headline(late) == [died, "No checkpoint before step 304 is known."]
    norm = tuple((step, 40.0 if step == 300 else 2.0) for step in range(0, 2_000, 10))
    assert headline(collapsed(series={"gradient_norm": norm}))[1:] == [
        "The gradient norm was 20 × its median at step 300."
    ]
    born = samples.report(samples.site("net.0/relu", 16, samples.Fate(born=16)))
    assert headline(replace(born, series={"learning_rate": RATE}, checkpoints=(1,))) == [
        "Layer `net.0/relu` is dead from the start: 16 of 16 neurons."
    ]
    one_later = samples.report(samples.site("net.0/relu", 16, samples.Fate(born=12, died=1)))
    assert headline(one_later) == ["Layer `net.0/relu` is dead from the start: 12 of 16 neurons; 1 more died later."]
    assert headline(replace(one_later, phase="scan")) == ["Layer `net.0/relu` is dead: 13 of 16 neurons."]
    assert headline(replace(born, phase="scan")) == ["Layer `net.0/relu` is dead: 16 of 16 neurons."]


def test_neurons_that_never_fired_did_not_die() -> None:
    """Three of twelve never fired; the nine others died at step 16."""
    layer = died_at("first/relu", 12, 12, 16)
    dead = np.arange(12) >= 3
    steps = np.where(dead, 16, -1)
    layer = replace(layer, last_active_step=steps - dead, history=replace(layer.history, died_step=steps))
    assert (layer.dead, layer.born_dead) == (12, 3)
    assert headline(samples.report(layer))[0] == (
        "Layer `first/relu` died at step 16: 9 of 12 neurons; 3 more never fired."
    )


@pytest.mark.parametrize("sample", [samples.mixed, samples.healthy, samples.broken, samples.unwatched, samples.hostile])
def test_every_report_has_a_headline_that_its_numbers_bear_out(sample: object) -> None:
    report = sample()  # type: ignore[operator]
    sentences = headline(report)
    assert sentences
    assert all(text.endswith(".") for text in sentences)
    found = re.match(r"Layer `(.+)` (?:died|is dead).*: (\d+) of (\d+) neurons(?:; (\d+) more .*)?\.", sentences[0])
    if found:
        site = report[found[1]]
        assert int(found[2]) + int(found[4] or 0) == site.dead
        assert 2 * site.dead >= int(found[3])


def test_a_spike_is_a_rise_that_leads_to_what_began() -> None:
    assert spike(RATE, 305) == (pytest.approx(60.0), 300, 330)
    assert spike(RATE, 335) == (pytest.approx(60.0), 300, 330)
    assert spike(RATE, 700) is None
    assert spike(RATE[:4], 300) is None  # too few to know what is usual
    assert spike([(step, float("nan")) for step in range(100)], 50) is None
    assert spike([(step, 0.0) for step in range(100)], 50) is None


def test_the_timeline_draws_everything_on_one_axis() -> None:
    died, revived = np.array([304, 305, 305]), np.array([900])
    loss = tuple((step, float("nan") if step >= 500 else 1.0 + step) for step in range(0, 1_000, 10))
    drawn = timeline(died, revived, 999, {"learning_rate": RATE[:100], "loss": loss}, (288, 5_000))
    assert drawn is not None
    deaths, revivals, rate, losses = drawn.tracks
    assert deaths.scale == "3 in all, at most 3 within about 8 steps"
    assert re.findall(r"M([\d.]+)", deaths.path) == ["300"]  # bin 36 of 120
    assert revivals.scale.startswith("1 in all")
    assert rate.scale == "at most 0.06 at step 300, median 0.001"
    highest = min(re.findall(r"[ML]([\d.]+) ([\d.]+)", rate.path), key=lambda point: float(point[1]))
    assert float(highest[0]) == pytest.approx(1_000 * 300 / 999, abs=0.1)
    assert losses.scale.endswith("not finite from step 500")
    assert losses.path.count("M") == 1
    assert drawn.marks == [288.3]
    assert drawn.ticks == [0, 499, 999]
    assert timeline(EMPTY, EMPTY, 999, {}) is None
    assert timeline(EMPTY, EMPTY, 0, {"loss": ((0, 1.0), (1, 1.0))}) is not None
    nothing = timeline(EMPTY, EMPTY, 9, {"loss": ((0, float("inf")), (1, float("nan")))})
    assert nothing is not None
    assert nothing.tracks[0].scale == "not finite from step 0"


def test_names_in_the_headline_are_escaped() -> None:
    report = samples.report(died_at(samples.HOSTILE, 8, 8, 304))
    assert samples.HOSTILE not in report.to_html()
    assert "Layer <code>&lt;script&gt;alert(1)&lt;/script&gt;</code> died" in report.to_html()
