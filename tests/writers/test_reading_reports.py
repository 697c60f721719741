"""A report reads back from its JSON as it was, and anything else is refused in one sentence."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import neuronscope as ns
from neuronscope.errors import ReportError
from neuronscope.report.reading import report_from_dict
from neuronscope.report.report import Report

from . import sample_reports as samples


def differences(one: Any, other: Any, place: str = "report") -> Iterator[str]:
    """Yield the places at which two reports differ: types, dtypes, shapes and values."""
    if type(one) is not type(other):
        yield f"{place}: {type(one)} and {type(other)}"
    elif dataclasses.is_dataclass(one):
        for field in dataclasses.fields(one):
            yield from differences(getattr(one, field.name), getattr(other, field.name), f"{place}.{field.name}")
    elif isinstance(one, np.ndarray):
        if one.dtype != other.dtype or not np.array_equal(one, other, equal_nan=one.dtype.kind == "f"):
            yield place
    elif isinstance(one, tuple) and len(one) == len(other):
        for index, (mine, its) in enumerate(zip(one, other, strict=True)):
            yield from differences(mine, its, f"{place}[{index}]")
    elif one != other:
        yield place


def read_again(report: Report) -> Report:
    return report_from_dict(json.loads(report.to_json()))


names = st.text(max_size=12)
counts = st.integers(min_value=0, max_value=3)
fates = st.builds(
    samples.Fate, born=counts, died=counts, revived=counts, dormant=counts, cut_off=counts, not_finite=counts
)
sites = st.builds(
    samples.site,
    names,
    st.integers(min_value=18, max_value=30),
    fates,
    activation=names,
    kind=st.sampled_from(["relu-like", "smooth", "leaky", "saturating", "gated"]),
    axis_source=st.sampled_from(["", "assumed (rank)", "declared"]),
    windows=st.integers(min_value=4, max_value=6),
    positions=st.sampled_from([1, 10_000]),
    examples=st.integers(min_value=0, max_value=400),
    gradients=st.booleans(),
    seed=st.integers(min_value=0, max_value=9),
)
reports = st.builds(
    lambda found, notes, fault, step: dataclasses.replace(
        samples.report(*found, notes=(*notes, fault)), fault=fault, global_step=step
    ),
    st.lists(sites, max_size=3),
    st.lists(names, max_size=2),
    names,
    st.integers(min_value=0, max_value=2**53),
)


@settings(max_examples=60, deadline=None)
@given(reports)
def test_a_report_reads_back_from_its_json_as_it_was(report: Report) -> None:
    assert list(differences(report, read_again(report))) == []


@pytest.mark.parametrize("name", ["mixed", "healthy", "broken", "unwatched", "hostile"])
def test_every_sample_reads_back_and_shows_the_same(name: str) -> None:
    report = getattr(samples, name)()
    again = read_again(report)
    assert list(differences(report, again)) == []
    assert (str(again), again.to_markdown(), again.to_html()) == (str(report), report.to_markdown(), report.to_html())


class Net(nn.Module):
    """A convolution with a norm, a gated product, a head that is read by columns."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4)
        self.gate, self.up, self.out = nn.Linear(16, 6), nn.Linear(16, 6), nn.Linear(6, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = torch.relu(self.norm(self.conv(x))).flatten(1)
        return self.out(nn.functional.silu(self.gate(hidden)) * self.up(hidden))


def test_reports_on_each_phase_of_a_watched_network_read_back(tmp_path: Path) -> None:
    net = Net()
    with ns.watch(net, window_steps=2) as scope:
        for step in range(6):
            if step == 3:
                net.norm.bias.data[0] = -1000.0
            net(torch.randn(320, 1, 4, 4)).sum().backward()
            scope.step()
        with scope.phase("val"), torch.no_grad():
            net(torch.full((5, 1, 4, 4), float("nan")))
    scanned = ns.scan(net, [torch.randn(3, 1, 4, 4)])
    for report in (scope.report(), scope.report("val"), scanned):
        report.to_json(tmp_path / "report.json")
        again = ns.read_report(tmp_path / "report.json")
        assert list(differences(report, again)) == []
        assert again.to_html() == report.to_html()


def test_the_end_of_a_watch_by_an_error_reads_back() -> None:
    report = dataclasses.replace(samples.healthy(), fault="It stopped.", notes=("It stopped.", "Other."))
    assert read_again(report).other_notes == ("Other.",)


def leaves(value: Any, way: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the way to every value of a JSON document; of a list, to its first and last member."""
    if way:
        yield way
    if isinstance(value, dict):
        for key, member in value.items():
            yield from leaves(member, (*way, key))
    elif isinstance(value, list) and value:
        for index in {0, len(value) - 1}:
            yield from leaves(value[index], (*way, index))


def changed(plain: Any, way: tuple[Any, ...], value: Any) -> Any:
    plain = copy.deepcopy(plain)
    inner = plain
    for key in way[:-1]:
        inner = inner[key]
    if value is ...:
        del inner[way[-1]]
    else:
        inner[way[-1]] = value
    return plain


SMALL = samples.report(
    samples.site("a/relu", 12, samples.Fate(born=1, died=1, dormant=2), windows=3),
    notes=("A note.",),
    not_measured=(samples.NotMeasured("b", "It is hidden."),),
).to_dict()
#: A report holds these for people and other programs; they follow from the rest.
DERIVED = {"summary", "in_headlines", "provisional", "died", "weights_unknown"}
WAYS = [
    way
    for way in leaves(SMALL)
    if not DERIVED & {*way} and (way[0] != "window" or way[-1] not in ("examples", "bound"))
]


@pytest.mark.parametrize("way", [way for way in WAYS if isinstance(way[-1], str) and way[:1] != ("versions",)])
def test_a_report_without_one_of_its_fields_is_refused(way: tuple[Any, ...]) -> None:
    with pytest.raises(ReportError):
        report_from_dict(changed(SMALL, way, ...))


WRONG = [None, -2, 1.5, 2**70, 10**400, float("inf"), "x", [], {}, [[1]], {"a": 1}, True, 256]


@settings(max_examples=400, deadline=None)
@given(st.sampled_from(WAYS), st.sampled_from(WRONG))
def test_a_damaged_report_is_refused_or_can_be_shown(way: tuple[Any, ...], value: Any) -> None:
    try:
        report = report_from_dict(changed(SMALL, way, value))
    except ReportError as error:
        assert "\n" not in str(error)  # noqa: PT017 - an error is one of two good ends
    else:
        assert report.to_json()
        assert str(report)
        assert report.to_html()
        assert list(differences(report, read_again(report))) == []


@pytest.mark.parametrize("value", [10**400, float("inf")])
@pytest.mark.parametrize("way", [("layers", 0, "mean_abs_output", 0), ("policy", "confidence")])
def test_a_number_that_float64_does_not_hold_is_refused(way: tuple[Any, ...], value: Any) -> None:
    with pytest.raises(ReportError, match="damaged"):
        report_from_dict(changed(SMALL, way, value))


FOREIGN = {
    "nothing": ("", "is not JSON"),
    "half a report": (samples.healthy().to_json()[:-200], "is not JSON"),
    "nan": (samples.healthy().to_json().replace("0.0,", "NaN,"), "is not JSON"),
    "deep": ("[" * 100_000, "is not JSON"),
    "a list": ("[1]", "holds something else"),
    "another object": ('{"loss": 1.0}', "holds something else"),
    "an older report": (json.dumps({**samples.healthy().to_dict(), "schema_version": 2}), "an older version"),
    "a later report": (json.dumps({**samples.healthy().to_dict(), "schema_version": 99}), "another version"),
    "a post-mortem": (json.dumps({"level": "file", "diagnoses": [], "layers": []}), "is a post-mortem"),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_what_is_no_report_is_refused_in_one_sentence_that_names_the_file(kind: str, tmp_path: Path) -> None:
    text, reason = FOREIGN[kind]
    path = tmp_path / "some.json"
    path.write_text(text)
    with pytest.raises(ReportError, match=reason) as caught:
        ns.read_report(path)
    assert str(path) in str(caught.value)
    assert len(str(caught.value)) < 300


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "bytes.json").write_bytes(b"\xff\xfe\x00")
    for name in ("missing.json", "bytes.json", "."):
        with pytest.raises(ReportError, match=r"Cannot read|is not text"):
            ns.read_report(tmp_path / name)
