"""The page on feed-forward layers says what its file says, and the models that it compares are of equal size."""

from __future__ import annotations

import statistics
from pathlib import Path

import pytest
import torch

from examples.transformer_feedforward import CONTEXT, KINDS, LAYERS, FeedForward, read_manual, train
from scripts import feedforward_kinds
from scripts.feedforward_kinds import PAGE, SEEDS, neurons

FILE = feedforward_kinds.load()


def test_the_page_is_what_the_script_makes_of_the_file() -> None:
    assert set(FILE) == set(KINDS)
    assert {len(trained) for trained in FILE.values()} == {SEEDS}
    assert feedforward_kinds.page(FILE) == PAGE.read_text(encoding="utf-8")


def test_the_faq_has_its_row() -> None:
    assert f"{feedforward_kinds.faq_row(FILE)}\n" in (PAGE.parent / "faq.md").read_text(encoding="utf-8")


def test_what_the_page_says_in_words_holds() -> None:
    loss = {kind: statistics.fmean(it.loss for it in trained) for kind, trained in FILE.items()}
    assert sorted(loss, key=loss.__getitem__)[2:] == ["ReLU²", "GELU", "ReLU", "SiLU"]
    assert not any(sum(it.dead) + sum(it.silent) + sum(it.dormant) for it in FILE["SiLU"])


def test_all_kinds_have_equal_parameters() -> None:
    sizes = [sum(parameter.numel() for parameter in FeedForward(kind).parameters()) for kind in KINDS]
    assert max(sizes) / min(sizes) < 1.002
    assert {kind: neurons(kind) // LAYERS for kind in ("ReLU", "SwiGLU")} == {"ReLU": 256, "SwiGLU": 170}


def test_hardly_a_window_of_the_held_out_paragraphs_is_trained_on() -> None:
    text, held_out = read_manual()
    assert held_out.shape[1] == CONTEXT + 1
    training = bytes(text.tolist())
    shared = sum(bytes(window) in training for window in held_out.tolist())
    assert shared <= 0.02 * len(held_out)  # phrases that paragraphs share


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_is_trained_and_its_neurons_counted_once(kind: str) -> None:
    text, held_out = read_manual()
    loss, report = train(kind, 0, 2, 1e-3, text, held_out[:20])
    assert 4 < loss < 7  # ln 128 = 4.85: nothing is learned yet
    assert report.neurons == neurons(kind)
    assert report.layers[0].positions == 20 * CONTEXT
    assert report.layers[0].gradient_positions == 20 * CONTEXT
    products = [site for site in report.layers if site.kind == "gated"]
    assert len(products) == (LAYERS if kind.endswith("GLU") else 0)


def test_a_measurement_that_was_stopped_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def stub(kind: str, seed: int, steps: int, lr: float, *pages: torch.Tensor) -> tuple[float, object]:
        asked.append((kind, seed))
        if len(asked) == 3:
            raise KeyboardInterrupt
        return real

    text, held_out = read_manual()
    real = train("SwiGLU", 0, 1, 1e-3, text, held_out[:4])
    monkeypatch.setattr(feedforward_kinds, "train", stub)
    path = tmp_path / "runs.csv"
    with pytest.raises(KeyboardInterrupt):
        feedforward_kinds.measure_missing(path)
    feedforward_kinds.measure_missing(path)
    assert len(asked) == SEEDS * len(KINDS) + 1
    assert asked[2] == asked[3]
    found = feedforward_kinds.load(path)
    assert {len(each) for each in found.values()} == {SEEDS}
    assert all(len(it.dead) == len(it.silent) == len(it.dormant) == LAYERS for each in found.values() for it in each)
