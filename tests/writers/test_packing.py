"""Packing: what is unpacked is what went in, or says by how much it is not; a dead neuron never vanishes."""

from __future__ import annotations

import base64
import zlib
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from neuronscope.judge.verdicts import LABELS
from neuronscope.report.report import LEVEL_DEAD, LEVEL_MAX, LEVEL_NOT_FINITE, LEVEL_SILENT, LEVEL_UNSEEN, SiteReport
from neuronscope.writers.packing import LADDER, Packed, pack

from . import sample_reports as samples

PLENTY = 10**9


@dataclass(frozen=True)
class Unpacked:
    order: npt.NDArray[np.int64]
    labels: npt.NDArray[np.uint8]
    fraction: npt.NDArray[np.uint8]
    died: npt.NDArray[np.int64]
    revived: npt.NDArray[np.int64]
    share: npt.NDArray[np.uint8]
    rest: npt.NDArray[np.uint8]


def unpack(packed: Packed, neurons: int) -> Unpacked:
    """A twin of the page's script, by the words of ``Packed.data``; only for what holds every plane."""
    raw = np.frombuffer(zlib.decompress(base64.b64decode(packed.data)), np.uint8)
    cells = packed.rows * len(packed.steps)
    parts = np.split(raw, np.cumsum([4 * neurons, neurons, neurons, 4 * neurons, 4 * neurons, cells, cells]))
    assert parts.pop().size == 0

    def numbers(planes: npt.NDArray[np.uint8]) -> npt.NDArray[np.int64]:
        whole: npt.NDArray[np.int64] = (planes.reshape(4, neurons).astype(np.int64) * 256 ** np.arange(4)[:, None]).sum(
            0
        )
        return whole

    grid = (packed.rows, len(packed.steps))
    return Unpacked(
        numbers(parts[0]),
        parts[1],
        parts[2],
        numbers(parts[3]) - 1,
        numbers(parts[4]) - 1,
        parts[5].reshape(grid),
        parts[6].reshape(grid),
    )


def big(seed: int = 0, windows: int = 40) -> SiteReport:
    fate = samples.Fate(born=31, died=50, revived=9, dormant=40, cut_off=12, not_finite=3)
    return samples.site("relu", 700, fate, seed=seed, windows=windows)


def test_without_a_limit_on_bytes_nothing_is_lost() -> None:
    site = big()
    packed = pack(site, PLENTY, 0)
    back = unpack(packed, site.neurons)
    assert sorted(back.order) == list(range(site.neurons))
    levels = np.where(back.share == 255, LEVEL_DEAD, back.rest)
    assert np.array_equal(levels.T, site.history.levels[:, back.order])
    assert set(np.unique(back.share)) == {0, 255}
    assert np.array_equal(back.labels, site.judgement.labels()[back.order])
    assert np.array_equal(back.died, site.history.died_step[back.order])
    assert np.array_equal(back.revived, site.history.revived_step[back.order])
    assert np.abs(back.fraction / LEVEL_MAX - site.zero_output_fraction[back.order]).max() <= 0.5 / LEVEL_MAX + 1e-9
    assert packed.steps == site.history.steps.tolist()


def test_the_worst_neurons_come_first_and_dead_ones_by_their_step_of_death() -> None:
    site = big()
    back = unpack(pack(site, PLENTY, 0), site.neurons)
    assert np.all(np.diff(back.labels.astype(int)) >= 0)
    assert LABELS[back.labels[0]] == "not finite"
    dead = back.labels == LABELS.index("dead")
    assert dead.sum() == 81  # 31 born dead and 50 that died
    assert np.all(np.diff(back.died[dead]) >= 0)
    assert np.all(back.died[dead][:31] == -1)


@pytest.mark.parametrize("resolution", LADDER[:8], ids=str)
def test_every_resolution_packs_the_columns_and_rows_that_it_promises(
    resolution: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("neuronscope.writers.packing.LADDER", (resolution,))
    site = big(windows=300)
    packed = pack(site, 0, 0)
    assert packed.resolution is resolution
    assert len(packed.steps) == min(300, packed.resolution.columns)
    assert packed.windows == 300
    assert (packed.steps[0], packed.steps[-1]) == (site.history.steps[0], site.history.steps[-1])
    back = unpack(packed, site.neurons)
    picked = np.searchsorted(site.history.steps, packed.steps)
    levels = site.history.levels[picked][:, back.order]
    for row in range(packed.rows):
        first, last = row * site.neurons // packed.rows, (row + 1) * site.neurons // packed.rows
        band = levels[:, first:last]
        dead = (band == LEVEL_DEAD).mean(axis=1)
        assert np.array_equal(back.share[row] == 0, dead == 0)
        assert np.array_equal(back.share[row] == 255, dead == 1)
        assert np.abs(back.share[row] / 255 - dead).max() <= 0.5 / packed.resolution.greys + 1 / 255
        broken = (band == LEVEL_NOT_FINITE).any(axis=1)
        assert np.array_equal(back.rest[row] == LEVEL_NOT_FINITE, broken)
        graded = band < LEVEL_MAX
        plain = (graded | (band == LEVEL_DEAD)).all(axis=1) & graded.any(axis=1)
        mean = np.where(graded, band, 0).sum(axis=1) / np.maximum(graded.sum(axis=1), 1)
        off = np.abs(back.rest[row].astype(float) - mean)[plain]
        assert off.size == 0 or off.max() <= 0.5 * LEVEL_MAX / packed.resolution.greys + 1


@given(
    neurons=st.integers(1, 1500),
    windows=st.integers(1, 5),
    rows=st.one_of(st.integers(1, 4), st.integers(1, 400)),
    greys=st.sampled_from([LEVEL_MAX, 25, 5]),
    dead=st.sampled_from(["none", "one", "half", "all but one", "all"]),
    seed=st.integers(0, 1000),
)
@example(neurons=1200, windows=1, rows=1, greys=LEVEL_MAX, dead="one", seed=0)  # 255 / 1200 would round to none
@example(neurons=1200, windows=1, rows=1, greys=LEVEL_MAX, dead="all but one", seed=0)  # and this to all
def test_a_dead_neuron_is_visible_at_every_resolution(
    neurons: int, windows: int, rows: int, greys: int, dead: str, seed: int
) -> None:
    number = {"none": 0, "one": 1, "half": neurons // 2, "all but one": neurons - 1, "all": neurons}[dead]
    rng = np.random.default_rng(seed)
    levels = rng.integers(0, LEVEL_MAX, (windows, neurons), endpoint=True).astype(np.uint8)
    for window in levels:
        window[rng.permutation(neurons)[:number]] = LEVEL_DEAD
    plain = samples.site("relu", neurons, windows=windows)
    site = replace(plain, history=replace(plain.history, levels=levels))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("neuronscope.writers.packing.LADDER", (replace(LADDER[0], rows=rows, greys=greys),))
        packed = pack(site, 0, 0)
    back = unpack(packed, neurons)
    starts = np.arange(packed.rows) * neurons // packed.rows
    found = np.add.reduceat((levels[:, back.order] == LEVEL_DEAD).astype(int), starts, axis=1).T
    sizes = np.diff([*starts, neurons])[:, None]
    assert np.array_equal(back.share > 0, found > 0)
    assert np.array_equal(back.share == 255, found == sizes)
    assert np.array_equal(back.rest == LEVEL_DEAD, found == sizes)


@pytest.mark.parametrize("budget", [2_000, 4_000, 16_000, 60_000])
def test_the_finest_resolution_that_fits_the_byte_limit_is_taken(budget: int) -> None:
    site = samples.noisy(sites=1, neurons=4096, windows=200).layers[0]
    packed = pack(site, budget, 0)
    assert len(packed.data) <= budget
    finer = LADDER[: LADDER.index(packed.resolution)]
    with pytest.MonkeyPatch.context() as patch:
        for rung in finer[-2:]:
            patch.setattr("neuronscope.writers.packing.LADDER", (rung,))
            assert len(pack(site, 0, 0).data) > budget


def test_without_a_history_the_verdicts_are_drawn_as_one_window() -> None:
    site = samples.site("relu", 20, samples.Fate(born=3, dormant=2), windows=0)
    packed = pack(site, PLENTY, 700)
    back = unpack(packed, 20)
    assert packed.steps == [700]
    assert (back.share[:, 0] == 255).sum() == 3
    assert sorted(back.order[:3]) == np.flatnonzero(site.judgement.dead).tolist()


def test_silence_is_kept_apart_from_a_zero_output_fraction_at_every_resolution() -> None:
    levels = np.full((2, 12), LEVEL_MAX - 1, np.uint8)  # zero at nearly all positions
    levels[:, :3] = LEVEL_SILENT
    plain = samples.site("relu", 12, windows=2)
    site = replace(plain, history=replace(plain.history, levels=levels))
    for greys in (LEVEL_MAX, 5):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("neuronscope.writers.packing.LADDER", (replace(LADDER[0], greys=greys),))
            back = unpack(pack(site, 0, 0), 12)
        assert np.array_equal(back.rest == LEVEL_SILENT, levels.T[back.order] == LEVEL_SILENT)


@pytest.mark.parametrize(("silent", "rest"), [(7, LEVEL_SILENT), (5, 0)])
def test_a_row_for_several_neurons_is_silent_if_most_of_them_are(silent: int, rest: int) -> None:
    levels = np.zeros((1, 12), np.uint8)  # the others are never zero
    levels[:, :silent] = LEVEL_SILENT
    plain = samples.site("relu", 12, windows=1)
    site = replace(plain, history=replace(plain.history, levels=levels))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("neuronscope.writers.packing.LADDER", (replace(LADDER[0], rows=1),))
        assert unpack(pack(site, 0, 0), 12).rest.tolist() == [[rest]]


def test_an_unseen_window_is_not_packed_as_zero() -> None:
    site = samples.site("relu", 6, positions=0, windows=0)
    back = unpack(pack(site, PLENTY, 0), 6)
    assert set(back.rest.ravel()) == {LEVEL_UNSEEN}
    assert set(back.fraction) == {LEVEL_UNSEEN}
