"""A watched run is bit for bit the run that it would have been, in every set-up, and leaves nothing behind."""

from __future__ import annotations

import pytest
import torch

from tests.core.setups import SETUPS, Setup
from tests.core.slow_twin import Nobody, Watched, assert_bits, hook_tables, state_of


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage")  # torch's own fast path
@pytest.mark.parametrize("setup", SETUPS, ids=lambda setup: setup.name)
def test_weights_and_random_numbers_are_the_same(setup: Setup):
    runs = []
    for watcher in (Nobody(), Watched(**setup.options)):
        torch.manual_seed(0)
        model = setup.build(False)
        before = hook_tables(model)
        attributes = {path: sorted(vars(module)) for path, module in model.named_modules()}
        with watcher.attach(model):
            setup.loop(model, watcher)
        assert hook_tables(model) == before
        assert {path: sorted(vars(module)) for path, module in model.named_modules()} == attributes
        assert torch.overrides._len_torch_function_stack() == 0
        runs.append((state_of(model), torch.get_rng_state()))
    assert_bits(runs[0][0], runs[1][0])
    assert runs[0][1].equal(runs[1][1])
