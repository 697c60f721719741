"""Networks of others, compiled: one graph, the weights of the unwatched compiled run, and the counts of eager.

A few run here; ``NEURONSCOPE_COMPILED_NETWORKS=all`` runs more by Inductor. What came of the networks that do not run
here is kept in ``compiled_runs.json``; see :mod:`tests.networks.compiled`.
"""

from __future__ import annotations

import os

import pytest
import torch
import torch._dynamo
from torch._inductor.cpp_builder import get_cpp_compiler
from torch._inductor.exc import InvalidCxxCompiler

from tests.agreement.slow_twin import assert_bits
from tests.compiled.test_compile import assert_same_census
from tests.networks.agreement import NETWORKS
from tests.networks.clients import CLIENTS
from tests.networks.compiled import EQUAL, REASON, kept, run
from tests.networks.test_networks import name_of
from tests.networks.vision import timm
from tests.networks.zoo import FEATURES, Network

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("fresh_compiler"), pytest.mark.filterwarnings("ignore")]

#: Quick to compile, and between them they call `chunk`, `split`, `topk` and `unbind`. `tensor_split`, which
#: none of these packages calls, is in `tests/compiled/test_compile.py` and in the random programs.
FEW = (
    "shufflenet_v2_x0_5",
    "MaxVit",
    "GPTNeoXForCausalLM",
    "Phi3ForCausalLM",
    "MambaForCausalLM",
    "ModernBertModel",
    "Llama4ForCausalLM",
)

BY_NAME = {network.name: network for network in NETWORKS}
#: Attention and SwiGLU, and a fused QKV.
BY_INDUCTOR = [
    BY_NAME["Phi3ForCausalLM"],
    timm("vit_tiny_patch16_224", 32, axes=FEATURES, img_size=32, depth=1, embed_dim=24, num_heads=2),
]
if os.environ.get("NEURONSCOPE_COMPILED_NETWORKS") == "all":  # convolutions, experts by top-k, cells written by hand
    cells = Network(
        "torch",
        "recurrent cells",
        "by hand",
        lambda: CLIENTS["recurrent cells"]()[0],
        lambda generator: {"x": torch.rand(2, 3, 5, generator=generator)},
    )
    BY_INDUCTOR += [BY_NAME["ResNetModel"], BY_NAME["Llama4ForCausalLM"], cells]


def _has_compiler() -> bool:
    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        return False
    return True


@pytest.mark.parametrize("name", FEW)
def test_a_network_of_others_is_one_graph_with_the_counts_of_eager(name: str) -> None:
    network = BY_NAME[name]
    pytest.importorskip(network.family, exc_type=ImportError)
    runs = run(network)
    assert_bits(*runs.states)
    assert_same_census(runs.compiled, runs.eager)
    assert runs.compiled


@pytest.mark.skipif(not _has_compiler(), reason="Inductor needs a C++ compiler")
@pytest.mark.parametrize("network", BY_INDUCTOR, ids=name_of)
def test_inductor_gives_a_watched_network_the_weights_of_the_unwatched_one(network: Network) -> None:
    """In float32 on the CPU, bit for bit; and the counts of eager."""
    pytest.importorskip(network.family, exc_type=ImportError)
    runs = run(network, "inductor")
    assert_bits(*runs.states)
    assert_same_census(runs.compiled, runs.eager)
    assert runs.compiled


def test_of_all_that_were_tried_those_of_one_graph_are_equal() -> None:
    for name, backends in kept().items():
        for backend, row in backends.items():
            assert row.get("sites") != 0, (name, backend)  # nothing was compared
            if REASON not in row:
                assert (row.get("weights"), row.get("counts"), row.get("failed")) == (EQUAL, EQUAL, None), (
                    name,
                    backend,
                )
