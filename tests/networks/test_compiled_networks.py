"""Networks of others, compiled: one graph, the weights of the unwatched compiled run, and the counts of eager.

A few run here. `NEURONSCOPE_COMPILED_NETWORKS=all` runs all of them that compile unwatched without a break; for the
others torch's reason is shown.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
import torch._dynamo

import neuronscope as ns
from tests.core.slow_twin import Nobody, Watched, assert_bits, state_of
from tests.core.test_compile import Counter, assert_same_census
from tests.networks.agreement import NETWORKS, _quiet, _threads, train
from tests.networks.test_networks import name_of
from tests.networks.zoo import Network

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

#: Networks that call `chunk`, `split`, `topk` or `unbind`, and are quick to compile.
FEW = ("shufflenet_v2_x0_5", "GPTNeoXForCausalLM", "Phi3ForCausalLM")
CHOSEN = [
    network for network in NETWORKS if os.environ.get("NEURONSCOPE_COMPILED_NETWORKS") == "all" or network.name in FEW
]


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("network", CHOSEN, ids=name_of)
def test_a_network_of_others_is_one_graph_with_the_counts_of_eager(network: Network) -> None:
    pytest.importorskip(network.family, exc_type=ImportError)
    states, backends, censuses = [], [], []
    with _threads(1), _quiet(bool(network.unseen)):
        for watcher, compiles in ((Nobody(), True), (Watched(), True), (Watched(), False)):
            torch._dynamo.reset()
            torch.manual_seed(0)
            model, backend = network.build().train(), Counter("aot_eager")
            with watcher.attach(model):
                if compiles:
                    model.compile(backend=backend, fullgraph=True)
                try:
                    train(model, watcher, network)
                except torch._dynamo.exc.Unsupported as error:
                    if isinstance(watcher, Watched):
                        raise
                    pytest.skip(f"unwatched, it does not compile without a break: {str(error).splitlines()[0]}")
            states.append(state_of(model))
            backends.append(backend)
            if isinstance(watcher, Watched):
                assert watcher.scope._hooks.failure is None
                censuses.append(watcher.scope.census("train"))
    assert_bits(states[0], states[1])
    assert (backends[1].graphs, backends[1].outputs) == (backends[0].graphs, backends[0].outputs)
    compiled, eager = censuses
    assert isinstance(compiled, ns.Census)
    assert_same_census(compiled, eager)
