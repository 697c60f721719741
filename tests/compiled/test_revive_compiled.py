"""A compiled model is revived as any other: its graphs read the same weights."""

from __future__ import annotations

import pytest
import torch

import neuronscope as ns
from tests.act.test_revive import DEAD, Gated, Perceptron, adam, loss_of
from tests.compiled.compiler_marks import COMPILES

pytestmark = COMPILES


@pytest.mark.parametrize(("network", "site"), [(Perceptron, "0/relu"), (Gated, "gate/swiglu")])
def test_the_function_of_a_compiled_model_does_not_change_by_a_bit(network: type[torch.nn.Module], site: str) -> None:
    torch.manual_seed(0)
    model, x = network(), torch.randn(320, 4)
    compiled, optimizer = torch.compile(model, backend="aot_eager"), adam(model)
    with ns.watch(compiled) as scope:
        loss_of(compiled, x).backward()
        scope.step()
        torch.manual_seed(1)
        before = compiled(x).detach()
        done = ns.revive(scope, optimizer)
    assert [(act.site, act.neurons) for act in done.acts] == [(site, tuple(DEAD))]
    torch.manual_seed(1)
    assert torch.equal(compiled(x).detach(), before)
    with ns.watch(compiled) as again:
        compiled(x)
        again.step()
    assert (again.census()[site].zero_output_fraction[DEAD] < 1).all()
