"""Bad input: each case gives its plain error, which names what was expected, or a warning where training could go on.

And good use at its edges: patterns, phases, a scope used after it was detached, a fault of our own.
"""

from __future__ import annotations

import copy
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import neuronscope as ns
from neuronscope.errors import DetachedError, NeuronscopeError, NothingToWatchError, StateError, UsageError
from tests.agreement.slow_twin import assert_bits, hook_tables, state_of


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 1))


def step(model: nn.Module, scope: ns.Scope) -> None:
    model(torch.randn(5, 3)).sum().backward()
    scope.step()


# --- what watch() takes
# ------------------------------------------------------------------------------------------------

BAD_OPTIONS = [
    ({"every_n_steps": 0}, "`every_n_steps` to be an integer of at least 1, but got 0"),
    ({"every_n_steps": -3}, "`every_n_steps`"),
    ({"every_n_steps": 1.5}, "`every_n_steps`"),
    ({"every_n_steps": "2"}, "`every_n_steps`"),
    ({"every_n_steps": True}, "`every_n_steps`"),
    ({"every_n_steps": None}, "`every_n_steps`"),
    ({"window_steps": 0}, "`window_steps` to be an integer of at least 1"),
    ({"window_steps": float("inf")}, "`window_steps`"),
    ({"sites": 3}, "`sites` to be a glob pattern or a list of them, but got 3"),
    ({"sites": []}, "`sites`"),
    ({"sites": ""}, "`sites`"),
    ({"sites": ["a", 5]}, "`sites`"),
    ({"exclude": b"relu"}, "`exclude`"),
    ({"exclude": [None]}, "`exclude`"),
    ({"axes": 1}, "`axes` to map glob patterns to integer dimensions, but got 1"),
    ({"axes": ["relu"]}, "`axes`"),
    ({"axes": {"relu": "1"}}, "`axes`"),
    ({"axes": {"relu": True}}, "`axes`"),
    ({"axes": {1: 1}}, "`axes`"),
    ({"policy": "strict"}, "`policy` to be a neuronscope.Policy, but got str"),
    ({"policy": {"tolerance": 0}}, "`policy`"),
    ({"activations": ["relu"]}, "activation"),
    ({"activations": {"relu": "relu"}}, "a module class or a function, but got 'relu'"),
    ({"activations": {nn.Linear: "wobbly"}}, "`kind` to be one of relu-like, smooth, leaky, saturating, gated"),
    ({"activations": {nn.Linear: 5}}, "kind"),
    ({"activations": {nn.Linear: ["relu"]}}, "kind"),
]


@pytest.mark.parametrize(("options", "message"), BAD_OPTIONS, ids=str)
def test_a_wrong_option_raises_a_clear_error(options, message):
    model = net()
    before = hook_tables(model)
    with pytest.raises(UsageError, match=message):
        ns.watch(model, **options)
    assert hook_tables(model) == before


def test_an_unknown_option_is_named():
    with pytest.raises(TypeError, match="every_n_step"):
        ns.watch(net(), every_n_step=3)
    with pytest.raises(TypeError, match="every_n_step"):
        ns.scan(net(), [torch.randn(2, 3)], every_n_step=3)


@pytest.mark.parametrize(
    "model", [None, "resnet18", [net()], F.relu, nn.Linear], ids=["None", "name", "list", "function", "class"]
)
def test_what_is_not_a_module_raises_a_clear_error(model):
    with pytest.raises(UsageError, match=r"`model` to be a torch.nn.Module, but got"):
        ns.watch(model)


@pytest.mark.parametrize(
    ("model", "options"),
    [
        (nn.Linear(3, 4), {}),
        (nn.Sequential(nn.Linear(3, 4), nn.Flatten(), nn.Identity(), nn.Linear(4, 4)), {}),
        (nn.Sequential(), {}),
        (nn.TransformerEncoderLayer(8, 2), {"functional": False}),
    ],
    ids=["Linear", "Linears", "empty", "functional only"],
)
def test_a_model_without_an_activation_raises_a_clear_error(model, options):
    before = hook_tables(model)
    with pytest.raises(NothingToWatchError, match=r"at least one activation, but found none in \w+"):
        ns.watch(model, **options)
    assert hook_tables(model) == before


def test_every_error_is_a_neuronscope_error():
    for error in (UsageError, NothingToWatchError, DetachedError, StateError):
        assert issubclass(error, NeuronscopeError)
    assert issubclass(UsageError, ValueError)


# --- patterns
# ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, ["0/relu", "2/gelu"]),
        ({"sites": "1"}, ["0/relu"]),
        ({"sites": ["1", "3"]}, ["0/relu", "2/gelu"]),
        ({"exclude": "1"}, ["2/gelu"]),
        ({"sites": "*", "exclude": ["3"]}, ["0/relu"]),
        ({"sites": "[13]"}, ["0/relu", "2/gelu"]),
    ],
    ids=str,
)
def test_patterns_select_sites(options, expected):
    model = net()
    with ns.watch(model, **options) as scope:
        step(model, scope)
    assert list(scope.census()) == expected


@pytest.mark.parametrize(
    ("options", "counted"),
    [
        ({"sites": ["1", "layer*"]}, ["0/relu"]),
        ({"sites": "layer*"}, []),
        ({"exclude": "layer*"}, ["0/relu", "2/gelu"]),
        ({"exclude": ["3", "layer*"]}, ["0/relu"]),
        ({"axes": {"layer*": 1}}, ["0/relu", "2/gelu"]),
    ],
    ids=str,
)
def test_a_pattern_that_matches_nothing_warns_once_and_counting_goes_on(options, counted):
    model = net()
    with ns.watch(model, **options) as scope:
        with pytest.warns(
            ns.NeuronscopeWarning,
            match=r"'layer\*' to match a site, but it matched none of those seen: 0/relu, 2/gelu\.",
        ) as caught:
            step(model, scope)
        assert len(caught) == 1
        step(model, scope)  # no warning again: warnings are errors here
    assert list(scope.census()) == counted
    assert all(tally.positions == 10 for tally in scope.census().values())


def test_a_pattern_that_matched_only_in_an_earlier_run_warns():
    model = net()
    with ns.watch(model, sites="1") as scope:
        step(model, scope)
    model[1] = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    with ns.watch(model, sites="1") as second:
        second.load_state_dict(scope.state_dict())
        with pytest.warns(
            ns.NeuronscopeWarning, match=r"'1' to match a site, .* none of those seen: 1\.0/relu, 2/gelu\."
        ):
            step(model, second)


def test_a_model_in_which_nothing_was_seen_warns():
    class Indirect(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3))

        def forward(self, x: Tensor) -> Tensor:
            return torch.where(x > 0, x, 0.0) * self.weight

    model = Indirect()
    with ns.watch(model) as scope, pytest.warns(ns.NeuronscopeWarning, match="No activation of Indirect was seen"):
        step(model, scope)
    assert scope.report().neurons == 0
    assert "Nothing was observed" in scope.report().notes[0]


@pytest.mark.parametrize(("axis", "neurons"), [(0, 5), (1, 6), (2, 4), (-1, 4), (-3, 5)])
def test_a_declared_axis_is_used(axis, neurons):
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU())
    with ns.watch(model, axes={"1": axis}) as scope:
        model(torch.randn(5, 6, 3)).sum().backward()
        scope.step()
    tally = scope.census()["0/relu"]
    assert (tally.neurons, tally.axis, tally.axis_source) == (neurons, axis % 3, "declared")
    assert tally.positions == tally.gradient_positions == 5 * 6 * 4 // neurons


@pytest.mark.parametrize("axis", [3, 17, -4])
def test_a_declared_axis_that_does_not_exist_is_reported_and_not_guessed(axis):
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU())
    with ns.watch(model, axes={"1": axis}) as scope, warnings.catch_warnings():
        warnings.simplefilter("ignore", ns.NeuronscopeWarning)
        model(torch.randn(5, 6, 3)).sum().backward()
        scope.step()
    assert "0/relu" not in scope.census()
    assert scope.census()["2/relu"].positions == 30
    (missing,) = scope.report().not_measured
    assert missing.name == "0/relu"
    assert str(axis) in missing.reason


# --- after the end
# -----------------------------------------------------------------------------------------------------


def test_using_a_detached_scope_raises_a_clear_error():
    model = net()
    scope = ns.watch(model)
    step(model, scope)
    before = scope.census()["0/relu"].positions
    scope.detach()
    scope.detach()  # harmless
    with pytest.raises(DetachedError, match=r"attached for `step\(\)`, but this one was detached"):
        scope.step()
    with pytest.raises(DetachedError, match=r"`phase\(\)`"), scope.phase("val"):
        pass
    with scope.paused():
        model(torch.randn(2, 3))
    scope.open_step()
    scope.close_step()
    model(torch.randn(2, 3)).sum().backward()
    assert scope.detached
    assert scope.census()["0/relu"].positions == before  # and what was counted stays readable
    assert scope.report().neurons == 8
    assert scope.state_dict()["step"] == 1


def test_a_gradient_that_comes_after_detach_is_not_counted():
    model = net()
    with ns.watch(model) as scope:
        loss = model(torch.randn(2, 3)).sum()
        scope.step()
    loss.backward()
    assert scope.census()["0/relu"].gradient_positions == 0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda scope: scope.census("validation"), r"`phase` to be one that was observed \(.*\), but got 'validation'"),
        (lambda scope: scope.report("trian"), "'trian'"),
        (lambda scope: scope.census(window="newest"), "`window` to be one of all, last, open, but got 'newest'"),
        (lambda scope: scope.census("val", window=3), "`window`"),
        (lambda scope: scope.phase("").__enter__(), "`name` of a phase"),
        (lambda scope: scope.phase(None).__enter__(), "`name` of a phase"),
        (lambda scope: scope.phase(3).__enter__(), "`name` of a phase"),
        (lambda scope: scope.step("three"), "`step`"),
        (lambda scope: scope.step(-1), "`step`"),
        (lambda scope: scope.step(1.5), "`step`"),
    ],
)
def test_a_misused_scope_raises_a_clear_error_and_counting_goes_on(call, message):
    model = net()
    with ns.watch(model) as scope:
        step(model, scope)
        with pytest.raises(UsageError, match=message):
            call(scope)
        step(model, scope)
    assert scope.census()["0/relu"].positions == 10
    assert scope.global_step == 2


def test_a_census_without_the_requested_site_raises_a_clear_error():
    model = net()
    with ns.watch(model) as scope:
        step(model, scope)
    with pytest.raises(KeyError, match="'relu': no such site was observed; the sites are 0/relu, 2/gelu"):
        scope.census()["relu"]
    assert "relu" not in scope.census()
    assert scope.census().get("relu") is None
    assert not scope.census("test")
    with pytest.raises(KeyError):
        scope.report()["relu"]


def test_a_scope_whose_model_never_ran_gives_an_empty_report():
    model = net()
    with ns.watch(model) as scope:
        pass
    report = scope.report()
    assert (report.neurons, report.dead) == (0, 0)
    assert np.isnan(report.dead_percent)
    assert {item.name for item in report.not_measured} == {"1", "3"}
    assert scope.census().steps == 0


# --- saved states
# ------------------------------------------------------------------------------------------------------


def saved() -> dict:
    model = net()
    with ns.watch(model) as scope:
        step(model, scope)
        with scope.phase("val"):
            model(torch.randn(2, 3))
        return scope.state_dict()


BAD_STATES = {
    "nothing": lambda state: None,
    "a list": lambda state: [],
    "empty": lambda state: {},
    "another version": lambda state: {**state, "version": 99},
    "no version": lambda state: {key: value for key, value in state.items() if key != "version"},
    "a step that is no number": lambda state: {**state, "step": "many"},
    "phases that are none": lambda state: {**state, "phases": 5},
    "a phase that is none": lambda state: {**state, "phases": {"train": None}},
    "a phase cut short": lambda state: {**state, "phases": {"train": {"open": state["phases"]["train"]["open"]}}},
    "a later phase that is bad": lambda state: {**state, "phases": {**state["phases"], "zzz": {}}},
    "steps that are none": lambda state: {
        **state,
        "phases": {"train": {**state["phases"]["train"], "open_steps": ["one"]}},
    },
    "a history that is none": lambda state: {**state, "phases": {"train": {**state["phases"]["train"], "history": 3}}},
    "a state of something else": lambda state: nn.Linear(2, 2).state_dict(),
}


@pytest.mark.parametrize("spoil", BAD_STATES.values(), ids=BAD_STATES)
def test_loading_an_invalid_state_keeps_the_counts(spoil):
    state = spoil(saved())
    model = net()
    with ns.watch(model) as scope:
        step(model, scope)
        before = scope.census()["0/relu"].zero_outputs.tolist(), scope.census()["0/relu"].positions
        with pytest.raises(StateError, match="Expected"):
            scope.load_state_dict(state)
        assert (scope.census()["0/relu"].zero_outputs.tolist(), scope.census()["0/relu"].positions) == before
        step(model, scope)
    assert scope.census()["0/relu"].positions == 10
    assert scope.global_step == 2


def test_a_state_of_a_changed_model_is_loaded_where_it_fits():
    """A layer of another width starts anew; the others go on; training goes on."""
    state = saved()
    model = nn.Sequential(nn.Linear(3, 9), nn.ReLU(), nn.Linear(9, 4), nn.GELU(), nn.Linear(4, 4), nn.Tanh())
    with ns.watch(model) as scope, warnings.catch_warnings():
        warnings.simplefilter("ignore", ns.NeuronscopeWarning)
        scope.load_state_dict(state)
        step(model, scope)
        assert scope.report().neurons == 9 + 4 + 4
    census = scope.census()
    assert (census["0/relu"].neurons, census["0/relu"].positions) == (9, 5)
    assert (census["2/gelu"].neurons, census["2/gelu"].positions) == (4, 10)
    assert census["4/tanh"].positions == 5


def test_loading_replaces_what_was_counted():
    state = saved()
    model = net()
    with ns.watch(model) as scope:
        step(model, scope)
        step(model, scope)
        scope.load_state_dict(state)
        assert scope.census()["0/relu"].positions == 5
        assert scope.global_step == 1
        step(model, scope)
    assert scope.census()["0/relu"].positions == 10
    assert scope.census().steps == 2


def test_a_saved_state_is_not_changed_when_counting_goes_on():
    model = net()
    with ns.watch(model) as scope:
        step(model, scope)
        state = scope.state_dict()
        kept = copy.deepcopy(state)
        step(model, scope)
    tally, old = (s["phases"]["train"]["open"]["tallies"]["0/relu"]["zero_outputs"] for s in (state, kept))
    assert tally.equal(old)


# --- a fault of our own
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["begin", "end", "gradient", "select"])
def test_a_fault_of_our_own_warns_once_detaches_and_lets_training_go_on(place, monkeypatch):
    runs = []
    for watching in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(inplace=True), nn.Linear(4, 4), nn.SiLU(), Doubled())
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        before = hook_tables(model)
        scope = ns.watch(model) if watching else None
        if watching:

            def fail(*args, **kwargs):
                raise RuntimeError("a fault of ours")

            monkeypatch.setattr(scope._hooks.recorder, place, fail)
        warned = []
        for _ in range(3):
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                model(torch.randn(5, 3)).sum().backward()
            warned.extend(caught)
            optimizer.step()
            optimizer.zero_grad()
            if watching:
                scope.step()
        assert hook_tables(model) == before
        assert torch.overrides._len_torch_function_stack() == 0
        runs.append(state_of(model))
    assert len(warned) == 1
    assert issubclass(warned[0].category, ns.NeuronscopeWarning)
    assert "a fault of ours" in str(warned[0].message)
    assert scope.detached
    scope.report()
    assert_bits(*runs)


class Doubled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x) * x.detach().exp()


# --- scan()
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("data", [[], iter(()), {}], ids=["list", "iterator", "mapping"])
def test_a_scan_of_empty_data_raises_a_clear_error(data):
    model = net()
    before = hook_tables(model)
    with pytest.raises(UsageError, match="`data` to yield at least one batch"):
        ns.scan(model, data)
    assert hook_tables(model) == before
    assert model.training


@pytest.mark.parametrize("data", [None, 5], ids=str)
def test_a_scan_of_what_is_not_data_raises_a_clear_error(data):
    model = net()
    before = hook_tables(model)
    with pytest.raises(UsageError, match="`data` to be an iterable of batches, but got"):
        ns.scan(model, data)
    assert hook_tables(model) == before
    assert model.training


def test_a_scan_of_a_model_that_fails_leaves_the_model_unchanged():
    model = net()
    model[0].bias.grad = torch.ones(4)
    before, tables = state_of(model), hook_tables(model)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        ns.scan(model, [torch.randn(2, 3), torch.randn(2, 7)], loss=lambda output, batch: output.sum())
    assert hook_tables(model) == tables
    assert model.training
    assert_bits(state_of(model), before)


def test_a_scan_keeps_flags_gradients_and_buffers():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Dropout(0.5), nn.Linear(4, 1))
    model[1].eval()
    model[4].weight.grad = torch.full((1, 4), 3.0)
    before, state = state_of(model), torch.get_rng_state()
    data = [(torch.randn(8, 3, generator=torch.Generator().manual_seed(i)), torch.zeros(8)) for i in range(3)]
    report = ns.scan(model, data, loss=lambda output, batch: (output[:, 0] - batch[1]).square().sum())
    assert report.phase == "scan"
    assert report["1/relu"].positions == report["1/relu"].gradient_positions == 24
    assert_bits(state_of(model), before)
    assert torch.get_rng_state().equal(state)
    assert [module.training for module in model] == [True, False, True, True, True]


@pytest.mark.parametrize(
    ("batch", "forward"),
    [
        (torch.ones(2, 3), None),
        ((torch.ones(2, 3), torch.ones(2)), None),
        ([torch.ones(2, 3)], None),
        ({"input": torch.ones(2, 3)}, None),
        ({"x": torch.ones(2, 3)}, lambda model, batch: model(batch["x"])),
    ],
    ids=["tensor", "tuple", "list", "mapping", "forward"],
)
def test_a_scan_passes_each_kind_of_batch_to_the_model(batch, forward):
    assert ns.scan(net(), [batch] * 2, forward=forward)["0/relu"].positions == 4


def test_a_scan_within_no_grad_has_gradients_when_requested():
    with torch.no_grad():
        report = ns.scan(net(), [torch.randn(4, 3)], loss=lambda output, batch: output.sum())
    assert report["0/relu"].gradient_positions == 4


@pytest.mark.parametrize("place", ["begin", "gradient", "select"])
def test_a_fault_of_ours_within_a_users_function_mode_is_handled(place, monkeypatch):
    """Torch takes a function mode off its stack while it handles a call: ours must not take off another's then."""

    class Users(torch.overrides.TorchFunctionMode):
        calls = 0

        def __torch_function__(self, func, types, args=(), kwargs=None):
            Users.calls += 1
            return func(*args, **(kwargs or {}))

    model = nn.Sequential(nn.Linear(3, 4), Doubled())
    before = hook_tables(model)
    with Users(), ns.watch(model) as scope:

        def fail(*args, **kwargs):
            raise RuntimeError("a fault of ours")

        monkeypatch.setattr(scope._hooks.recorder, place, fail)
        scope.open_step()
        with pytest.warns(ns.NeuronscopeWarning, match="a fault of ours"):
            model(torch.randn(5, 3)).sum().backward()
        model(torch.randn(5, 3)).sum().backward()
        scope.close_step()
        scope.step()
        assert hook_tables(model) == before
        assert [type(mode) for mode in torch.overrides._get_current_function_mode_stack()] == [Users]
        x, calls = torch.ones(1), Users.calls
        torch.relu(x)
        assert Users.calls == calls + 1
    assert torch.overrides._len_torch_function_stack() == 0
