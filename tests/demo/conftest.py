"""One miniature of the demo for all tests of this folder: real data, real training, seconds instead of minutes."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from rich.console import Console

from neuronscope.demo.digits import Digits, load_digits
from neuronscope.demo.program import run_demo
from neuronscope.demo.recipe import VARIANTS, Recipe
from neuronscope.demo.results import Comparison, Run
from neuronscope.demo.training import train
from neuronscope.report.report import Report

# Four layers, the spike early: ReLU's neurons die in the third epoch already.
MINIATURE = Recipe(layers=4, epochs=5, spike_epochs=(3, 3), spike_factor=30.0)


class Shown:
    """A demo that was run: what it returned, what it printed, and where it wrote."""

    def __init__(self, out: Path, result: Comparison, text: str) -> None:
        self.out, self.result, self.text = out, result, text


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """As in the demo: the number of threads changes the last bits of a sum, and with them a run."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def digits() -> Digits:
    pytest.importorskip("sklearn", reason="scikit-learn is not installed (the extra `demo`)")
    return load_digits()


@pytest.fixture(scope="session")
def others(digits: Digits) -> dict[str, tuple[Run, list[Report]]]:
    """What else is trained: two networks of gated products, one that learns slopes, and one without activations."""
    names = ("GLU", "SwiGLU-LayerNorm", "PReLU", "none")
    return {each.name: train(each, 0, digits, MINIATURE) for each in VARIANTS if each.name in names}


@pytest.fixture(scope="session")
def shown(digits: Digits, tmp_path_factory: pytest.TempPathFactory) -> Shown:
    """ReLU, GELU and SiLU from two seeds."""
    out = tmp_path_factory.mktemp("demo") / "a folder"
    text = io.StringIO()
    threads = torch.get_num_threads()
    result = run_demo(out, 2, quick=True, recipe=MINIATURE, console=Console(file=text, width=120, highlight=False))
    assert torch.get_num_threads() == threads
    return Shown(out, result, text.getvalue())
