"""Where the number of independent examples is not known, no writer claims a bound, and each says why."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import numpy as np
import pytest

from neuronscope.callbacks.publishing import summary
from neuronscope.checkpoints.data.measure import counted_evidence, example_count
from neuronscope.report.report import Report
from neuronscope.writers import html, wording
from neuronscope.writers.tensorboard.diagnosis_text import diagnosis

from . import sample_reports as samples
from .test_json import VALIDATOR

NO_BOUND = "No bound is claimed on how often a neuron called dead could still fire."


def unknown(*examples: int) -> Report:
    """A report on one layer for each number of examples; 0 = not known."""
    sites = [
        samples.site(f"relu{number}", 16, samples.Fate(born=2), examples=each) for number, each in enumerate(examples)
    ]
    whole = samples.report(*sites)
    return replace(whole, window=replace(whole.window, long_enough=max(examples) >= whole.examples_needed))


@pytest.mark.parametrize("writer", ["terminal", "markdown", "html", "tensorboard"])
def test_every_text_says_that_the_examples_are_not_known_and_claims_no_bound(writer: str) -> None:
    report = unknown(0, 0)
    text = {
        "terminal": lambda: " ".join(str(report).split()),
        "markdown": report.to_markdown,
        "html": lambda: page_text(report),
        "tensorboard": lambda: diagnosis(report),
    }[writer]()
    assert "Provisional: based on an unknown number of training examples from steps" in text
    assert NO_BOUND in text
    assert "100 %" not in text
    assert not re.search(r"fire on up to \d", text)


def page_text(report: Report) -> str:
    """The page as text, without its tags."""
    body = html.render(report).partition("<body")[2]
    return " ".join(re.sub(r"<(script|style)\b.*?</\1>|<[^>]*>", " ", body, flags=re.DOTALL).split())


def test_json_has_no_bound_where_the_examples_are_not_known() -> None:
    plain = json.loads(unknown(0, 0).to_json())
    VALIDATOR.validate(plain)
    assert plain["window"]["bound"] is None
    assert plain["window"]["examples"] == 0
    assert plain["window"]["provisional"] is True


def test_a_verdict_has_no_bound_where_the_examples_are_not_known() -> None:
    bounds = {
        (verdict.site, verdict.bound is None) for verdict in unknown(0, 400).verdicts() if verdict.label == "dead"
    }
    assert bounds == {("relu0", True), ("relu1", False)}


def test_the_log_line_and_the_note_below_pictures_say_it_too() -> None:
    report = unknown(0)
    assert "provisional, from an unknown number of examples" in summary(report)
    note = wording.provisional_note(report, 0)
    assert note == "Provisional: the number of examples is not known, so no bound is claimed for dead ones"


def test_layers_with_known_examples_keep_their_bound_beside_one_without() -> None:
    said = wording.based_on(unknown(0, 400, 1000))
    assert "on 400 to 1,000 training examples" in said
    assert "up to 0.75 % of inputs" in said
    assert "In 1 of 3 layers the number of examples is not known, and no bound is claimed." in said
    cells = [wording.site_cells(site, unknown(0, 400)) for site in unknown(0, 400).layers]
    assert [(each.examples, each.bound) for each in cells] == [("–", "–"), ("400", "< 0.75 %")]


def test_a_report_on_known_examples_says_nothing_of_unknown_ones() -> None:
    assert unknown(400).examples_known
    assert "not known" not in wording.based_on(unknown(400))
    assert not unknown(400, 0).examples_known


def test_a_silent_neuron_on_an_unknown_number_of_examples_is_suspected_only() -> None:
    report = unknown(0)
    found = {
        one.claim: one
        for one in counted_evidence(report.layers[0], samples.POLICY, source="test", where="over data", blocked=False)
    }
    assert found["dead"].basis == "suspected"
    assert np.isnan(found["dead"].numbers).all()
    assert "The number of independent examples is not known" in found["dead"].text
    assert "0 examples" not in found["dead"].text + example_count(0)
