"""A watched run is bit for bit the run that it would have been, in every set-up, and leaves nothing behind."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from tests.agreement.setups import SETUPS, Setup
from tests.agreement.slow_twin import Nobody, Watched, assert_bits, hook_tables, state_of

ACTIVATIONS = (nn.ReLU, nn.ReLU6, nn.SiLU, nn.Hardswish)


def users_hook(*args: Any) -> None:
    """A hook of the user's own, that must be where it was in the end."""


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage")  # torch's own fast path
@pytest.mark.parametrize("setup", SETUPS, ids=lambda setup: setup.name)
def test_a_watched_run_has_the_weights_and_random_numbers_of_an_unwatched_one(setup: Setup):
    runs = []
    for watcher in (Nobody(), Watched(**setup.options)):
        torch.manual_seed(0)
        model = setup.build(False)
        for module in (model, *(module for module in model.modules() if isinstance(module, ACTIVATIONS))):
            module.register_forward_pre_hook(users_hook, with_kwargs=True)
            module.register_forward_hook(users_hook, always_call=True)
        with watcher.attach(model):
            ended_with = setup.loop(model, watcher) or model
        assert torch.overrides._len_torch_function_stack() == 0
        tables = [hook_tables(each) for each in (model, ended_with)]
        attributes = {path: sorted(vars(module)) for path, module in ended_with.named_modules()}
        runs.append((state_of(ended_with), torch.get_rng_state(), tables, attributes))
    (unwatched, numbers, *rest), (watched, numbers_when_watched, *rest_when_watched) = runs
    assert_bits(unwatched, watched)
    assert numbers.equal(numbers_when_watched)
    assert rest == rest_when_watched
