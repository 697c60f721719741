"""Laws: no input leaves its bounds, makes a neuron fire that is proved dead, or depends on one that nobody reads."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import event, given, settings
from torch import nn

import neuronscope as ns
from neuronscope.checkpoints.model.bounds.propagate import SiteBounds, propagate_bounds, site_bounds
from neuronscope.checkpoints.model.examine_model import examine_model
from neuronscope.checkpoints.model.trace import trace
from neuronscope.checkpoints.model.traced_graph import Site
from tests.postmortem.random_networks import (
    ACTIVATIONS,
    PICTURE_OPS,
    VECTOR_OPS,
    WIDTH,
    Network,
    adversarial_inputs,
    networks,
    seen_sites,
    site_modules,
    watched,
)

BOXES = st.sampled_from([None, (0.0, 1.0), (-1.0, 1.0), (-0.1, 3.0), (0.5, 0.5), (-100.0, 0.0)])


def check(network: Network, box: tuple[float, float] | None) -> int:
    """How many neurons were proved dead; fails where one of them fires or leaves its bounds."""
    graph = trace(network, (network.example(),))
    assert not graph.branches
    assert not graph.unseen_tensors
    bounds = site_bounds(graph, propagate_bounds(graph, box))
    backwards = backward_bounds(network, box) if box is not None else bounds
    for name, found in bounds.items():
        assert (backwards[name].highest <= found.highest).all()
        assert (backwards[name].lowest >= found.lowest).all()
    for x in adversarial_inputs(network, box):
        with torch.no_grad(), watched(network) as seen:
            network(x)
        for site, before, after in seen_sites(graph, seen):  # functions in the middle are looked at further on
            found = backwards.get(site.name)
            if found is None or not bool(before.isfinite().all()):
                continue
            dead = torch.from_numpy(found.dead)
            assert bool((after[dead] == 0).all()), (site.name, box)
            if before.shape == after.shape:  # else GLU's two halves
                assert bool((before.double().amax(1) <= torch.from_numpy(found.highest)).all()), (site.name, box)
                assert bool((before.double().amin(1) >= torch.from_numpy(found.lowest)).all()), (site.name, box)
    return sum(int(found.dead.sum()) for found in bounds.values())


def backward_bounds(network: nn.Module, box: tuple[float, float]) -> dict[str, SiteBounds]:
    """The bounds of each site that are passed backwards too, from a forward on two examples."""
    example = network.example()
    graph = trace(network, (torch.cat([example, example]),))
    return site_bounds(graph, propagate_bounds(graph, box, backwards=True))


@settings(max_examples=40)  # each operation has a test of its own, below
@given(networks(), BOXES)
def test_no_output_of_a_random_network_leaves_its_bounds(network: Network, box: tuple[float, float] | None) -> None:
    event(f"proved dead: {min(check(network, box), 3)}")


@pytest.mark.parametrize("operation", [*dict.fromkeys(VECTOR_OPS)])
def test_bounds_hold_for_every_operation_on_vectors(operation: str) -> None:
    dead = 0
    for seed, box in enumerate((None, (0.0, 1.0), (-1.0, 1.0))):
        program = (("linear", "sigmoid"), (operation, "relu"), ("linear", "relu"))
        dead += check(Network(program, False, seed), box)
    assert dead > 0  # a sigmoid bounds what comes after it, whatever the input: knowing nothing would prove nothing


@pytest.mark.parametrize("operation", [*dict.fromkeys(PICTURE_OPS)])
def test_bounds_hold_for_every_operation_on_images(operation: str) -> None:
    dead = 0
    for seed, box in enumerate((None, (0.0, 1.0), (-1.0, 1.0))):
        program = (("conv", "sigmoid"), (operation, "relu"), ("conv", "relu"))
        dead += check(Network(program, True, seed), box)
    assert dead > 0


@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
def test_bounds_hold_for_every_activation(activation: str) -> None:
    dead = 0
    for seed in range(4):
        program = (("linear", activation), ("linear", "relu"), ("linear", "relu"))
        dead += check(Network(program, False, seed), (-0.5, 0.5))
    assert dead > 0


@settings(max_examples=40)
@given(networks(), BOXES, st.integers(0, 1000))
def test_changing_an_unread_neuron_changes_no_output(
    network: Network, box: tuple[float, float] | None, seed: int
) -> None:
    """Whatever an unread neuron gives of what it can give, the network's output is the same, as near as sums can be."""
    evidence = [
        one for one in examine_model(network, example=network.example(), box=box).evidence if one.claim == "unread"
    ]
    unread = {one.layer: torch.from_numpy(one.neurons) for one in evidence}
    graph = trace(network, (network.example(),))
    found = propagate_bounds(graph, box)
    calls_at: dict[str, list[Site]] = {}
    for site in graph.sites:
        if site.kind != "gated" and site.layout.dims is None:
            calls_at.setdefault(site.info.place, []).append(site)
    event(f"unread: {min(sum(map(len, unread.values())), 3)}")
    torch.manual_seed(seed)
    inputs = next(adversarial_inputs(network, box or (-1.0, 1.0)))
    with torch.no_grad():
        expected = network(inputs)
    calls: dict[str, int] = {}

    def disturb(path: str) -> object:
        def hook(module: nn.Module, args: object, output: torch.Tensor) -> torch.Tensor:
            number = calls[path] = calls.get(path, -1) + 1
            if path not in calls_at:
                return output
            site = calls_at[path][number]
            neurons, axis = unread.get(site.name, torch.zeros(0, dtype=torch.long)), site.layout.axis
            ends = [end.clamp(-10, 10).float()[neurons] for end in found[site.after].along(axis)]
            changed = output.clone().movedim(axis, -1)
            changed[..., neurons] = ends[0] + (ends[1] - ends[0]) * torch.rand_like(changed[..., neurons])
            return changed.movedim(-1, axis)

        return hook

    handles = [module.register_forward_hook(disturb(path)) for path, module in site_modules(network)]
    with torch.no_grad():
        disturbed = network(inputs)
    for handle in handles:
        handle.remove()
    torch.testing.assert_close(disturbed, expected, rtol=1e-5, atol=1e-6, equal_nan=True)


@settings(max_examples=30)
@given(networks())
def test_sites_of_a_traced_model_have_the_names_of_a_watched_one(network: Network) -> None:
    with torch.no_grad(), ns.watch(network) as scope:
        network(network.example())
    graph = trace(network, (network.example(),))
    census = scope.census("inference")
    assert sorted({site.name for site in graph.sites}) == sorted(census)
    assert all(census[site.name].neurons == site.neurons for site in graph.sites)
    assert all(census[site.name].axis == site.info.axis for site in graph.sites)
    assert all(census[site.name].units == site.units for site in graph.sites)
    assert all(census[site.name].readers == site.info.readers for site in graph.sites)


LARGE = {
    "vectors": ((("layer norm", "relu"), ("residual", "relu"), ("rms norm", "relu"), ("batch norm", "relu")), False),
    "pictures": ((("batch norm", "relu"), ("padded", "relu"), ("max pool", "relu"), ("group norm", "relu")), True),
}


@pytest.mark.parametrize("which", LARGE)
def test_no_output_of_a_hundred_thousand_inputs_leaves_its_bounds(which: str) -> None:
    program, picture = LARGE[which]
    network = Network(program, picture, seed=3)
    box = (-1.0, 1.0)
    graph = trace(network, (network.example(),))
    bounds = site_bounds(graph, propagate_bounds(graph, box))
    assert sum(found.dead.sum() for found in bounds.values()) >= 4
    shape = (5000, *network.example().shape[1:])
    for number in range(20):  # 20 × 5000, every other time corners of the box
        x = torch.empty(shape).uniform_(-1, 1)
        x = x.sign() if number % 2 else x
        with torch.no_grad(), watched(network) as seen:
            network(x)
        for site, before, after in seen_sites(graph, seen):
            found = bounds[site.name]
            assert bool((before.double().amax(1) <= torch.from_numpy(found.highest)).all())
            assert bool((before.double().amin(1) >= torch.from_numpy(found.lowest)).all())
            assert not bool(after[torch.from_numpy(found.dead)].any())
    assert network.example().shape[1] == WIDTH
