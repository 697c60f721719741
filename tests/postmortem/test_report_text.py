"""A post-mortem as text: the terminal's table, markdown, JSON by its schema; names are inert in each."""

from __future__ import annotations

import html
import io
import json
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from neuronscope.checkpoints.postmortem_report import SCHEMA_VERSION, PostmortemReport
from neuronscope.checkpoints.verdict.combine import find_disagreements
from neuronscope.checkpoints.verdict.evidence import BASES, CLAIMS, Abstention
from neuronscope.checkpoints.writers import postmortem_wording
from tests.writers import golden
from tests.writers.screen import bare, on_screen

from . import samples

GOLDENS = Path(__file__).parent / "goldens"
SAMPLES = {
    name: getattr(samples, name)
    for name in ("alone", "with_model", "with_data", "healthy", "broken", "empty", "hostile", "many", "idle", "several")
}
SCHEMA: dict[str, Any] = json.loads(
    (files("neuronscope.checkpoints.writers") / "assets" / "postmortem.schema.json").read_text(encoding="utf-8")
)
VALIDATOR = jsonschema.Draft202012Validator(SCHEMA)


@pytest.mark.parametrize("name", SAMPLES)
def test_piped_text_of_a_postmortem_equals_the_stored_text(name: str) -> None:
    golden.check(f"terminal_{name}.txt", str(SAMPLES[name]()) + "\n", GOLDENS)


@pytest.mark.parametrize("columns", [80, 200])
def test_terminal_text_of_a_postmortem_equals_the_stored_text(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    text = bare(on_screen(monkeypatch, samples.with_data(), columns))
    golden.check(f"terminal_with_data_{columns}.txt", text + "\n", GOLDENS)


@pytest.mark.parametrize("name", ["with_data", "broken", "hostile", "several"])
def test_markdown_of_a_postmortem_equals_the_stored_text(name: str) -> None:
    golden.check(f"markdown_{name}.md", SAMPLES[name]().to_markdown(), GOLDENS)


@pytest.mark.parametrize("columns", [40, 80, 120, 200])
@pytest.mark.parametrize("name", SAMPLES)
def test_a_terminal_gets_colours_and_its_own_width(name: str, columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    text = on_screen(monkeypatch, SAMPLES[name](), columns)
    assert "\x1b[1m" in text
    lines = bare(text).split("\n")
    assert max(map(len, lines)) <= columns
    assert all(line.isprintable() for line in lines)


@pytest.mark.parametrize("name", SAMPLES)
def test_piped_text_has_no_control_codes(name: str) -> None:
    for line in str(SAMPLES[name]()).split("\n"):
        assert line.isprintable()
        assert len(line) <= 120


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_printing_never_fails_when_an_encoding_lacks_a_character(
    encoding: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding=encoding))
    print(samples.with_data())
    sys.stdout.flush()
    assert "net.0" in raw.getvalue().decode(encoding)


def test_unknown_values_are_not_shown_as_zero() -> None:
    blank = samples.report([samples.evidence("a", 9, "dead", "proved", [])])
    row = postmortem_wording.layer_cells(blank["a"])
    assert (row.dead, row.dead_share, row.sure, row.since, row.unknown) == ("–", "–", "–", "–", "9")
    assert "Nothing is known of 9 (100 %)." in postmortem_wording.findings(blank)
    assert postmortem_wording.layer_cells(samples.idle()["frozen"]).dead_share == "–"
    partly = samples.report([samples.evidence("a", 8, "dead", "proved", [1])])
    assert postmortem_wording.layer_cells(partly["a"]).dead_share == "≥ 12 %"
    assert postmortem_wording.findings(partly)[0].startswith("1 of 8 neurons is dead (at least 12 %): 1 proved.")
    alive = postmortem_wording.layer_cells(samples.healthy()["a"])
    assert (alive.dead, alive.dead_share, alive.unknown) == ("·", "0 %", "·")


def test_values_that_are_not_finite_are_shown_prominently_and_never_beside_zero() -> None:
    text = str(samples.broken())
    assert "!! NOT FINITE: 7 neurons are NaN or infinite, in layer b." in text
    row = postmortem_wording.layer_cells(samples.broken()["b"])
    assert (row.dead, row.dead_share, row.tone) == ("–", "–", "alarm")


def test_evidence_against_a_verdict_is_shown() -> None:
    said = " ".join(str(samples.with_data()).split())
    assert re.search(
        r"net\.0, neurons \d+, \d+: alive, measured \(scan\); against it: no gradient, inferred \(adam state\)", said
    )
    assert re.search(
        r"net\.6, neurons 3, 77: quiet, proved \(batch norm\); share .*, at most: 0\.04 to 0\.054; against it: dead, "
        r"suspected \(batch norm\)",
        said,
    )


def test_a_layer_has_one_line_for_each_way_in_which_sources_disagree() -> None:
    """44 neurons are silent on the data: of 42 the optimizer had gradients lately. 2 fire and were taken for dead."""
    said = samples.report(
        [
            samples.evidence("a", 60, "alive", "inferred", list(range(42)), source="adam state"),
            samples.evidence("a", 60, "no gradient", "inferred", [42, 43, 50, 51], source="adam state"),
            samples.evidence("a", 60, "unread", "suspected", [7]),  # not what the contest is about
            samples.evidence(
                "a", 60, "dead", "measured", list(range(44)), source="scan", numbers=[0.01] * 44, measure="share"
            ),
            samples.evidence("a", 60, "alive", "measured", list(range(44, 60)), source="scan"),
        ]
    )
    silent = (
        "a, neurons 0, 1, 2 … (42): dead, measured (scan); share: 0.01; against it: alive, inferred (adam state); as "
        "they were alive in training lately, most likely silent on this data only"
    )
    fires = "a, neurons 50, 51: alive, measured (scan); against it: no gradient, inferred (adam state)"
    assert postmortem_wording.lists(said, 9, 3)["Contested"] == [silent, fires]
    assert postmortem_wording.lists(said, 1, 3)["Contested"] == [silent, "and 2 more neurons"]
    assert (
        "42 of the dead were alive lately in training (adam state): most likely they are silent on this data only."
        in postmortem_wording.findings(said)
    )
    assert not any("alive lately" in sentence for sentence in postmortem_wording.findings(samples.with_data()))


CLAIMED = st.lists(
    st.tuples(st.sampled_from(CLAIMS), st.sampled_from(BASES), st.lists(st.integers(0, 7), unique=True).map(sorted)),
    max_size=7,
)


@given(CLAIMED)
def test_each_disputed_neuron_is_in_one_disagreement_with_all_evidence_against_it(
    pieces: list[tuple[str, str, list[int]]],
) -> None:
    report = samples.report([samples.evidence("a", 8, *piece) for piece in pieces])
    found = find_disagreements(report.layers)
    for neuron in range(8 if pieces else 0):
        mine = [one for one in found if neuron in one.neurons]
        verdict = report["a"].verdict(neuron)
        assert len(mine) == bool(report["a"].contested[neuron])
        for one in mine:
            assert (one.verdict.claim, one.verdict.basis) == (verdict.label, verdict.basis)
            assert len(one.against) == len(verdict.contradictions)


def test_a_list_of_disagreements_that_is_cut_says_so() -> None:
    said = samples.report(
        [
            samples.evidence(f"a{layer}", 30, claim, basis, list(range(30)))
            for layer in range(25)
            for claim, basis in (("dead", "suspected"), ("alive", "measured"))
        ]
    )
    assert "- and 450 more neurons" in str(said)  # 15 layers of 30
    assert "- and 150 more neurons" in said.to_markdown()  # 5
    assert "0, 1, 2, 3, 4, 5, 6, 7 … (30)" in str(said)


@pytest.mark.parametrize(("layers", "folded"), [(20, 0), (120, 117)])
def test_layers_without_a_finding_are_folded_beyond_twenty(layers: int, folded: int) -> None:
    text = str(samples.many(layers))
    assert len(re.findall(r"^encoder\.layers\S+ {2}", text, re.MULTILINE)) == layers - folded
    assert ("… 117 more layers with nothing to report" in text) == bool(folded)


def test_among_very_many_layers_with_findings_the_worst_are_shown() -> None:
    said = [samples.evidence(f"l{at}", 9, "dead", "proved", list(range(1 + (at % 7 == 0)))) for at in range(70)]
    report = samples.report(said)
    for top, left_out in ((20, 50), (60, 10)):
        text = report.to_text(top)
        rows = re.findall(r"^l(\d+) {2}", text, re.MULTILINE)
        # 10 layers have two dead neurons each; of the others the first fill the rest of the rows.
        assert len(rows) == top
        assert {str(at) for at in range(0, 70, 7)} <= set(rows)
        assert rows == sorted(rows, key=int)
        assert f"… {left_out} more layers with no more dead than these" in text
    assert report.to_text() == str(report)


def test_lists_of_very_many_layers_are_cut_and_say_so() -> None:
    said = [samples.evidence(f"l{at}", 4, "dead", "measured", [0, 1, 2, 3]) for at in range(300)]
    reasons = tuple(Abstention("model", f"l{at}", f"Reason {at}.") for at in range(300))
    report = samples.report(said, abstentions=reasons)
    report = replace(report, layers=tuple(replace(layer, woken=np.zeros(4, dtype=np.int64)) for layer in report.layers))
    for text in (str(report), report.to_markdown(), report.to_html()):
        assert text.count("COLLAPSED: layer") == 5 + (
            text == str(report)
        )  # a terminal shows the first again at the end
        assert "The same holds for 295 more layers" in text
        assert text.count("Reason ") == text.count("by 1 input") < 50
        assert re.search(r"2\d0 more reasons", text)


def test_every_name_in_markdown_is_escaped() -> None:
    text = samples.hostile().to_markdown()
    rest = re.sub(r"&#\d+;", "", text)
    assert "<" not in rest
    assert "](" not in rest
    assert "://" not in rest
    assert html.unescape(text).count("<script>alert(1)</script>") > 10  # they are there, and are text
    for line in text.splitlines():
        assert line.isprintable()
    tables = [line for line in text.splitlines() if line.startswith("|")]
    assert {line.count("|") for line in tables if "·" in line or "8 |" in line} <= {11, 7}


@pytest.mark.parametrize("name", SAMPLES)
def test_a_postmortem_in_json_fits_the_schema_and_reads_back_complete(name: str) -> None:
    text = SAMPLES[name]().to_json()
    plain = json.loads(text, parse_constant=lambda constant: pytest.fail(f"{constant} is not JSON"))
    VALIDATOR.validate(plain)
    assert plain == SAMPLES[name]().to_dict()
    assert text == SAMPLES[name]().to_json()


def test_the_postmortem_schema_is_the_one_of_this_version() -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    assert SCHEMA["properties"]["schema_version"]["const"] == SCHEMA_VERSION


def resolve(schema: dict[str, Any]) -> dict[str, Any]:
    return resolve(SCHEMA["$defs"][schema["$ref"].rpartition("/")[2]]) if "$ref" in schema else schema


def undescribed(value: Any, schema: dict[str, Any], path: str = "$") -> Iterator[str]:
    """Paths of fields that the schema says nothing of, and of fields it lists that are not there."""
    schema = resolve(schema)
    if isinstance(value, dict) and path != "$.versions":
        yield from (f"{path}.{key}" for key in value.keys() ^ schema["properties"].keys())
        for key in value.keys() & schema["properties"].keys():
            yield from undescribed(value[key], schema["properties"][key], f"{path}.{key}")
    elif isinstance(value, list) and value and "items" in schema:
        yield from undescribed(value[0], schema["items"], f"{path}[]")


def test_the_postmortem_schema_describes_every_field_and_no_other() -> None:
    assert list(undescribed(samples.with_data().to_dict(), SCHEMA)) == []
    assert list(undescribed(samples.several().to_dict(), SCHEMA)) == []


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("layers.0.verdicts.label.0", "sleepy"),
        ("layers.0.verdicts.since.0", -2),
        ("layers.0.evidence.0.basis", "guessed"),
        ("layers.0.labels.dead", -1),
        ("summary.dead_percent", 101),
        ("summary.dead_by_basis.suspected", 3),
        ("level", "all"),
        ("schema_version", 1),
        ("confirmations.0.held", None),
    ],
)
def test_the_postmortem_schema_refuses_wrong_documents(path: str, value: Any) -> None:
    whole = json.loads(samples.with_data().to_json())
    plain: Any = whole
    *way, last = path.split(".")
    for key in way:
        plain = plain[int(key) if key.isdigit() else key]
    plain[int(last) if last.isdigit() else last] = value
    assert not VALIDATOR.is_valid(whole)


def test_json_holds_every_verdict_and_all_evidence() -> None:
    report = samples.with_data()
    plain = json.loads(report.to_json())
    told = [
        (layer["name"], neuron, label, basis, since)
        for layer in plain["layers"]
        for neuron, label, basis, since in zip(
            *(layer["verdicts"][key] for key in ("neuron", "label", "basis", "since"))
        )
    ]
    assert told == [(one.site, one.neuron, one.label, one.basis, one.since) for one in report.verdicts()]
    assert [len(layer["evidence"]) for layer in plain["layers"]] == [len(layer.evidence) for layer in report.layers]


@pytest.mark.parametrize(
    ("report", "sentence"),
    [
        (samples.alone, "43 of 352 neurons are dead or get no gradient (12 %): 43 inferred."),
        (
            samples.alone,
            "When they died (earliest possible step, by the optimizer clock): 2 since the beginning",
        ),
        (samples.with_model, "2 are contested: one source calls them dead, another alive. The surer source decides."),
        (samples.with_data, "35 of 352 neurons are dead (9.9 %): 6 proved, 29 measured."),
        (samples.healthy, "No dead neuron was found among 64."),
        (samples.empty, "No layer could be examined, so there is no verdict on any neuron."),
        (
            samples.idle,
            "Layer frozen gets no gradient at all: frozen, or cut off by what follows. Its 32",
        ),
    ],
)
def test_each_kind_of_report_has_its_first_sentence(report: Callable[[], PostmortemReport], sentence: str) -> None:
    assert any(one.startswith(sentence) for one in postmortem_wording.findings(report())), postmortem_wording.findings(
        report()
    )


def test_a_reason_shared_by_several_layers_names_them() -> None:
    said = [
        samples.evidence("a", 4, "dead", "measured", [1], source="scan", text="Over 9 positions."),
        samples.evidence("b", 4, "dead", "measured", [1, 2], source="scan", text="Over 3 positions."),
        samples.evidence("b", 4, "dead", "measured", [3], source="scan", text="Over 3 positions."),
        samples.evidence("b", 4, "dead", "measured", [3], source="scan", measure="share", text="Another thing."),
    ]
    rows = [(row.neurons, row.layers, row.text) for row in postmortem_wording.grounds(samples.report(said))]
    assert rows == [(4, 2, "Over 9 positions. (In a.)"), (1, 1, "Another thing.")]


def test_suspected_neurons_are_in_no_total() -> None:
    said = samples.report(
        [samples.evidence("a", 4, "dead", "suspected", [1, 2]), samples.evidence("a", 4, "dead", "proved", [0])]
    )
    assert (said.dead, said.suspected, said.dead_percent) == (1, 2, 25.0)
    assert "2 more may be dead; they are not included in the totals." in postmortem_wording.findings(said)


def test_a_measured_step_is_not_shown_as_the_earliest_possible_one() -> None:
    said = samples.report([samples.evidence("a", 4, "dead", "measured", [1], source="monitor record", since=300)])
    assert "When they died: 1 at step 300." in postmortem_wording.findings(said)


def test_a_postmortem_report_gives_its_layers_totals_and_files(tmp_path: Path) -> None:
    report = samples.with_data()
    assert report["net.2"].dead == 7
    with pytest.raises(KeyError):
        report["nothing"]
    assert report.dead_percent == pytest.approx(100 * 35 / 352)
    assert [item.name for item in samples.alone().not_measured] == ["monitor record", "head"]
    for name, text in (
        ("a.json", report.to_json(tmp_path / "a.json")),
        ("a.html", report.to_html(tmp_path / "a.html")),
    ):
        assert (tmp_path / name).read_text(encoding="utf-8") == text
    windows = replace(report, path="C:\\runs\\last.ckpt")
    assert postmortem_wording.title(windows).startswith("last.ckpt · Lightning checkpoint · 5,000 optimizer steps")
