"""A report becomes bytes for TensorBoard's tab and back: the page is the same, and what is thinned is said."""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from neuronscope.errors import ReportError
from neuronscope.judge.verdicts import LABELS
from neuronscope.report.acts import Act
from neuronscope.report.report import LEVEL_MAX, Report
from neuronscope.writers import report_bytes
from neuronscope.writers.html import render
from neuronscope.writers.report_bytes import from_bytes, to_bytes
from tests.writers_tensorboard import samples

from .sample_reports import broken, healthy, hostile, many, mixed, unwatched

BEGIN = b"neuronscope report\0"


def logged() -> Report:
    """What the training logged and did is in the page too."""
    series = {"loss": ((1, 2.5), (900, float("nan")), (1500, 0.25)), "learning_rate": ((1, 0.1), (1500, 0.01))}
    acts = (Act(step=1200, site="features.3/relu", neurons=(1, 5), rule="dead", first_step=1100, last_step=1199),)
    return replace(samples.conv_net(), series=series, checkpoints=(500, 1400), acts=acts, fault="Something failed.")


@pytest.mark.parametrize("made", [broken, healthy, hostile, many, mixed, unwatched, logged, samples.conv_net])
def test_the_page_of_what_was_packed_is_the_same_to_the_byte(made: Callable[[], Report]) -> None:
    report = made()
    assert render(from_bytes(to_bytes(report))) == render(report)


def long_history(neurons: int = 300, windows: int = 200) -> Report:
    steps = samples.windows(windows)
    levels = samples.levels_of(
        neurons, steps, dying=0.2, spike=5000, dormant=0.1, cut_off=0.05, reviving=0.3, silent=0.1
    )
    return samples.report_of(
        [samples.site_of("a/relu", levels, steps), samples.site_of("b/relu", levels[:3], steps[:3])]
    )


@pytest.mark.parametrize(
    ("budget", "windows", "said"),
    [
        (60_900, 200, ""),  # 200 × 300 + 3 × 300 bytes
        (60_899, 64, "it has 64 of 200 windows."),
        (20_099, 64, "it has 64 of 200 windows; fractions of zeros in it are rounded to 25 steps."),  # 67 × 300 − 1
        (12_000, 64, "it has 64 of 200 windows; a neuron that works has one shade, its mean over time."),
        (0, 16, "it has 16 of 200 windows; a neuron that works has one shade, its mean over time."),
    ],
)
def test_a_history_is_thinned_to_its_budget_and_no_verdict_or_date_is_lost(
    budget: int, windows: int, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = long_history()
    monkeypatch.setattr(report_bytes, "BUDGET", budget)
    found = from_bytes(to_bytes(report))
    assert [note.partition("thinned: ")[2] for note in found.notes] == ([said] if said else [])
    for before, after in zip(report.layers, found.layers):
        old, new = before.history, after.history
        assert (before.judgement.labels() == after.judgement.labels()).all()
        assert (before.last_active_step == after.last_active_step).all()
        assert before.worst(99) == after.worst(99)
        for name in ("died_step", "revived_step", "deaths", "revivals"):
            assert (getattr(old, name) == getattr(new, name)).all()
        assert len(new.steps) == min(windows, len(old.steps))
        assert (new.steps[0], new.steps[-1]) == (old.steps[0], old.steps[-1])
        for at, step in enumerate(new.steps):
            (was,) = np.flatnonzero(old.steps == step)
            lives = old.levels[was] < LEVEL_MAX
            assert (new.levels[at] < LEVEL_MAX).tolist() == lives.tolist()
            assert (new.levels[at][~lives] == old.levels[was][~lives]).all(), "a verdict is never rounded"
            assert [getattr(new, n)[at] for n in ("dead", "silent", "dormant", "cut_off")] == [
                getattr(old, n)[was] for n in ("dead", "silent", "dormant", "cut_off")
            ]
        off = np.abs(new.levels.astype(int) - old.levels[np.isin(old.steps, new.steps)])
        assert off.max() <= {64: 5}.get(windows if "rounded" in said else 0, 0 if "shade" not in said else 60)


def test_the_one_shade_of_a_neuron_is_its_mean_over_the_windows_in_which_it_worked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    levels = np.array([[0, 10, 30, 255], [0, 30, 255, 255], [0, 0, 50, 252]], np.uint8)
    report = samples.report_of([samples.site_of("a/relu", levels, samples.windows(3))])
    monkeypatch.setattr(report_bytes, "BUDGET", 0)
    # Means 0, 40 / 3 and 80 / 2, in steps of ten: 250 / 25.
    assert from_bytes(to_bytes(report)).layers[0].history.levels.tolist() == [
        [0, 10, 40, 255],
        [0, 10, 255, 255],
        [0, 10, 40, 252],
    ]


def test_a_report_without_neurons_is_packed_too() -> None:
    report = replace(unwatched(), layers=())
    assert from_bytes(to_bytes(report)) == report


def test_a_neuron_that_is_never_or_always_zero_is_told_from_one_that_nearly_is() -> None:
    site = samples.site_of("act", np.full((1, 5), 100, np.uint8), samples.windows(1))
    fractions = np.array([0.0, 1e-9, 1 - 1e-9, 1.0, np.nan])
    report = samples.report_of([replace(site, zero_output_fraction=fractions)])
    found = from_bytes(to_bytes(report)).layers[0].zero_output_fraction
    assert (found[0], found[3], np.isnan(found[4])) == (0.0, 1.0, True)
    assert 0 < found[1] < 0.5 < found[2] < 1


def test_wide_layers_take_some_bytes_a_neuron_however_long_their_history() -> None:
    sizes = [len(to_bytes(samples.language_model(layers=2, count=count))) for count in (60, 200)]
    assert max(sizes) < 10 * 2 * 4096
    assert sizes[1] < 1.2 * sizes[0]


def repacked(report: Report, change: Any) -> bytes:
    raw = zlib.decompress(to_bytes(report)[len(BEGIN) :])
    (length,) = struct.unpack_from("<I", raw)
    header, rest = json.loads(raw[4 : 4 + length]), raw[4 + length :]
    rest = change(header) or rest
    text = json.dumps(header).encode()
    return BEGIN + zlib.compress(struct.pack("<I", len(text)) + text + rest)


def newer_layout(header: Any) -> None:
    header["version"] += 1


def newer_schema(header: Any) -> None:
    header["report"]["schema_version"] += 1
    header["layers"] = "something new"


def fewer_neurons(header: Any) -> None:
    header["layers"][0]["neurons"] -= 1


def negative(header: Any) -> None:
    header["layers"][0]["neurons"] = -1


def no_layers(header: Any) -> None:
    del header["layers"]


def other_counts(header: Any) -> None:
    header["layers"][1]["dead"] += 1


def unknown_label(header: Any) -> bytes:
    neurons = sum(layer["neurons"] for layer in header["layers"])
    windows = sum(layer["neurons"] * len(layer["history"]["steps"]) for layer in header["layers"])
    return bytes([len(LABELS)]) * (neurons * (2 + 4 + 5 * 8) + windows)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (newer_layout, "another version"),
        (newer_schema, "schema version"),
        (fewer_neurons, "bytes of neurons"),
        (negative, "damaged"),
        (no_layers, "damaged"),
        (other_counts, "damaged"),
        (unknown_label, "damaged"),
    ],
)
def test_what_another_version_wrote_or_a_disk_damaged_is_refused_in_plain_words(change: Any, message: str) -> None:
    with pytest.raises(ReportError, match=message):
        from_bytes(repacked(samples.conv_net(), change), "run a")


def test_no_damaged_byte_gives_another_error() -> None:
    data = to_bytes(samples.conv_net(3, widths=(4, 6)))
    assert from_bytes(data).neurons == 10
    for cut in range(0, len(data), 7):
        with pytest.raises(ReportError):
            from_bytes(data[:cut])
    rng = np.random.default_rng(0)
    for at in range(len(BEGIN) + 2, len(data), 3):  # the two bytes before it name a level that nobody asks for
        bad = bytearray(data)
        bad[at] ^= int(rng.integers(1, 256))
        with pytest.raises(ReportError):  # by the checksum of zlib at the latest
            from_bytes(bytes(bad))


def test_what_unpacks_to_more_than_any_report_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report_bytes, "MOST_BYTES", 1000)
    with pytest.raises(ReportError, match="too long"):
        from_bytes(BEGIN + zlib.compress(bytes(10_000)))
