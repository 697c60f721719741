"""Beside the libraries that train sparse autoencoders: what they count of firing, Neuronscope counts as integers."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import pytest

from tests.agreement import sae_libraries
from tests.agreement.sae_libraries import Counted

ARCHITECTURES = ("standard", "topk", "batchtopk", "jumprelu", "gated")
RUNS = [
    *((sae_libraries.sae_lens, name) for name in ARCHITECTURES),
    *((sae_libraries.dictionary_learning, name) for name in ARCHITECTURES),
    *((sae_libraries.sparsify, name) for name in ("topk", "groupmax")),
]
NEEDED = {"sae_lens": "transformer_lens", "dictionary_learning": "einops", "sparsify": "simple_parsing"}


def is_there(package: str) -> bool:
    return importlib.util.find_spec(package) is not None and importlib.util.find_spec(NEEDED[package]) is not None


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("run", "architecture"), RUNS, ids=lambda each: getattr(each, "__name__", each))
def test_counts_are_those_of_the_library(run: Callable[[str], tuple[Counted, Counted]], architecture: str) -> None:
    if not is_there(run.__name__):
        pytest.skip(f"{run.__name__} is not installed, or not {NEEDED[run.__name__]}")
    theirs, ours = run(architecture)
    assert ours.fired.tolist() == theirs.fired.tolist()
    for own, other in ((ours.steps, theirs.steps), (ours.tokens, theirs.tokens)):
        assert (own is None) == (other is None)
        assert own is None or own.tolist() == other.tolist()
    assert ours.dead.tolist() == theirs.dead.tolist()
    assert theirs.dead.any()
    assert not theirs.dead.all()
