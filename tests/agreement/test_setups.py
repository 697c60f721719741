"""Every set-up of the table, counted by the census and by the slow twin: all integers are equal."""

from __future__ import annotations

import io
import subprocess
import sys
import textwrap
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor, nn

import neuronscope as ns
from tests.agreement.setups import SETUPS, Encoder, Mixed, Setup, adam, batches
from tests.agreement.slow_twin import Nobody, Twin, Watched, assert_bits, assert_same, hook_tables, state_of


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage")  # torch's own fast path
@pytest.mark.parametrize("setup", SETUPS, ids=lambda setup: setup.name)
def test_the_counts_of_every_setup_equal_the_twins(setup: Setup):
    watched, twin = Watched(**setup.options), Twin(setup.axis, setup.options.get("every_n_steps", 1))
    for watcher in (watched, twin):
        torch.manual_seed(0)
        model = setup.build(watcher is twin)
        with watcher.attach(model):
            setup.loop(model, watcher)
    assert set(watched.scope.phases) == set(setup.phases)
    for phase in setup.phases:
        truth = twin.tallies(phase)
        assert truth
        assert_same(watched.scope.census(phase), truth)


def feed(model: nn.Module, scope: ns.Scope, steps: int = 3, size: int = 4) -> None:
    optimizer = adam(model)
    for x, y in batches(steps, size):
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
        scope.step()


def integers(census: ns.Census) -> dict[str, tuple]:
    return {
        name: (
            tally.zero_outputs.tolist(),
            tally.zero_gradients.tolist(),
            tally.not_finite_outputs.tolist(),
            tally.positions,
            tally.gradient_positions,
            tally.examples,
        )
        for name, tally in census.items()
    }


def test_two_scopes_on_one_model_count_the_same_and_detach_in_any_order():
    model = Mixed()
    before = hook_tables(model)
    first = ns.watch(model)
    second = ns.watch(model)
    feed(model, first)
    second.step()
    first.detach()
    assert integers(first.census()) == integers(second.census())
    model(next(batches())[0])
    second.detach()
    # One forward of 4 examples more: 4 * 6 positions at the sites on maps.
    assert second.census()["norm/relu"].positions == first.census()["norm/relu"].positions + 24
    assert hook_tables(model) == before
    assert torch.overrides._len_torch_function_stack() == 0


def test_a_part_of_a_watched_model_may_be_watched_too():
    model = Mixed()
    with ns.watch(model) as whole, ns.watch(model.block) as part:
        feed(model, whole)
        part.step()
    assert integers(part.census()) == {
        name.removeprefix("block."): counts
        for name, counts in integers(whole.census()).items()
        if name.startswith("block.")
    }


@pytest.mark.parametrize("kind", [ValueError, KeyboardInterrupt])
def test_after_an_exception_no_hook_is_left(kind):
    model = Mixed()
    before = hook_tables(model)

    def fail(module, args):
        raise kind

    with pytest.raises(kind), ns.watch(model) as scope:
        feed(model, scope)
        model.block.drop.register_forward_pre_hook(fail)
        before["block.drop"]["_forward_pre_hooks"] = [id(fail)]
        model(next(batches())[0])
    assert hook_tables(model) == before
    assert torch.overrides._len_torch_function_stack() == 0
    assert scope.census()["norm/relu"].positions >= 3 * 24


def test_the_users_function_mode_survives_an_interrupt():
    """The stack of function modes is the user's: after an interrupted forward it is what it was."""
    model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))

    def interrupt(module, args):
        raise KeyboardInterrupt

    handle = model[2].register_forward_pre_hook(interrupt)
    with ns.watch(model) as scope:
        with pytest.raises(KeyboardInterrupt), torch.device("meta"):
            model(torch.randn(4, 2, device="cpu"))
        handle.remove()
        # No hook runs when an interrupt passes, so until the next forward our mode stands where the user's stood.
        model(torch.randn(4, 2, device="cpu")).sum().backward()
        scope.step()
        assert torch.zeros(1).device.type == "cpu"
    assert torch.zeros(1).device.type == "cpu"
    assert torch.overrides._len_torch_function_stack() == 0


def test_a_saved_model_loads_where_neuronscope_is_not(tmp_path):
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(inplace=True), nn.GLU(), nn.Linear(2, 1))
    with ns.watch(model) as scope:
        model(torch.randn(5, 3)).sum().backward()
        scope.step()
        torch.save(model, tmp_path / "model.pt")
        expected = model(torch.ones(2, 3)).flatten().tolist()
    program = f"""
        import sys, torch
        sys.modules["neuronscope"] = None  # an import of it raises
        model = torch.load({str(tmp_path / "model.pt")!r}, weights_only=False)
        print(model(torch.ones(2, 3)).flatten().tolist())
    """
    run = [sys.executable, "-W", "error", "-c", textwrap.dedent(program)]
    printed = subprocess.run(run, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert printed.returncode == 0, printed.stderr
    assert printed.stdout.strip() == str(expected)


def test_tensors_of_a_watched_forward_are_saved_without_a_warning():
    """The logits that go into a sigmoid bear our gradient hook; saving them is the user's right."""
    model = nn.Sequential(nn.Linear(3, 4), nn.Identity())
    kept = []
    model[1].register_forward_hook(lambda module, args, output: kept.append(output))
    network = nn.Sequential(model, nn.Sigmoid())
    with ns.watch(network):
        network(torch.randn(2, 3)).sum().backward()
        file = io.BytesIO()
        torch.save(kept[0], file)  # warnings are errors here
    file.seek(0)
    assert torch.load(file).detach().equal(kept[0].detach())


def test_watching_keeps_no_tensor_alive():
    """After a forward whose results are dropped, no activation lives on."""
    import gc
    import weakref

    model = Mixed()
    kept = []
    for module in (model.relu, model.act, model.fc):
        module.register_forward_hook(lambda module, args, output: kept.append(weakref.ref(output)))
    with ns.watch(model) as scope:
        loss = model(next(batches())[0]).sum()
        loss.backward()
        del loss
        gc.collect()
        assert len(kept) == 3
        assert [reference() for reference in kept] == [None] * 3
        with torch.no_grad():
            model(next(batches())[0])
        gc.collect()
        assert [reference() for reference in kept] == [None] * 6
        scope.step()


def test_a_leaf_tensor_has_no_hook_after_the_step():
    """A pre-activation that is a leaf, as an input with a gradient is, bears no hook after the step."""
    model = nn.Sequential(nn.ReLU(), nn.Linear(3, 4))
    x = torch.randn(2, 3, requires_grad=True)
    with ns.watch(model) as scope:
        for _ in range(3):
            model(x).sum().backward()
            scope.step()
        assert not x._backward_hooks
        model(x).sum().backward()
        assert x._backward_hooks
    assert not x._backward_hooks
    (tally,) = scope.census().values()
    assert tally.positions == tally.gradient_positions == 4 * 2


def test_an_encoder_in_evaluation_is_unchanged_when_observed_and_when_paused():
    """Torch runs it in fused kernels, padded input on nested tensors: outputs are as unwatched, and not measured."""
    model = Encoder()
    model.eval()
    x = torch.randn(4, 6, 3)
    padding = torch.arange(6) >= torch.tensor([6, 5, 4, 2])[:, None]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own: nested tensors are a prototype
        with torch.no_grad():
            padded, whole = model(x, padding), model(x)
        with ns.watch(model, every_n_steps=2) as scope, torch.no_grad():
            for number in range(4):  # steps 0 and 2 are observed
                assert torch.equal(model(x, padding), padded)
                assert torch.equal(model(x), whole)
                if number != 1:
                    with scope.phase("val"):
                        assert torch.equal(model(x, padding), padded)
                with scope.paused():
                    assert torch.equal(model(x, padding), padded)
                scope.step()
    assert scope._hooks.failure is None
    assert not scope.census("inference")
    assert not scope.census("val")
    missing = [item.name for item in scope.report("val").not_measured if "fused" in item.reason]
    assert missing == ["encoder.layers.0.linear1/relu", "encoder.layers.1.linear1/relu"]


def test_nested_tensors_are_not_measured_and_do_no_harm():
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU())
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The PyTorch API of nested tensors", UserWarning)
        nested = torch.nested.nested_tensor([torch.randn(2, 3), torch.randn(5, 3)])
        jagged = torch.nested.nested_tensor([torch.randn(2, 3), torch.randn(5, 3)], layout=torch.jagged)
        with ns.watch(model) as scope:
            model(nested)
            model(jagged)
            model(torch.randn(6, 3)).sum().backward()
            scope.step()
    assert scope._hooks.failure is None
    assert scope.census()["0/relu"].positions == 6
    assert "1" in {item.name for item in scope.report().not_measured}


def test_nothing_is_counted_while_paused():
    model = Mixed()
    with ns.watch(model) as scope:
        with scope.paused():
            feed(model, scope)
            with scope.phase("val"):
                model(next(batches())[0])
        assert not scope.census("train")
        assert not scope.census("val")
        feed(model, scope, steps=1)
    assert scope.census()["norm/relu"].positions == 24


def test_phases_may_be_nested():
    model = Mixed()
    x, _ = next(batches())
    with ns.watch(model) as scope:
        with scope.phase("val"):
            model(x)
            with scope.phase("test"):
                model(x)
                model(x)
            model(x)
        with scope.phase("val"), scope.phase("train"):
            model(x)
            scope.step()
        assert scope.phases
        positions = {phase: scope.census(phase)["norm/relu"].positions for phase in ("train", "val", "test")}
    assert positions == {"train": 24, "val": 48, "test": 48}


def test_a_chunk_that_is_not_used_has_unseen_gradients():
    """Autograd hands a hook no gradient at all where only the sibling of a split tensor was used."""

    class Split(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, 8)

        def forward(self, x: Tensor) -> Tensor:
            gate, rest = self.fc(x).chunk(2, -1)
            self.shown = torch.sigmoid(gate).mean()  # for a log only
            return rest

    model = Split()
    with ns.watch(model) as scope:
        model(torch.randn(5, 3)).sum().backward()
        scope.step()
    assert scope._hooks.failure is None
    assert scope.census()["fc(0:4)/sigmoid"].positions == 5


@pytest.mark.parametrize("view", ["view", "transpose", "narrow"])
def test_an_in_place_activation_on_a_view_has_unseen_gradients(view):
    """Autograd rewrites a view that is changed in place, and its pre-activation gets no gradient of its own: the
    outputs are counted all the same, and the gradients are unseen, never zero."""

    class Viewed(nn.Module):
        def __init__(self, inplace: bool) -> None:
            super().__init__()
            self.fc = nn.Linear(3, 8)
            self.relu = nn.ReLU(inplace)

        def forward(self, x: Tensor) -> Tensor:
            x = self.fc(x)
            if view == "view":
                x = x.view(-1, 8)
            elif view == "transpose":
                x = x.transpose(0, 1)
            else:
                x = x.narrow(0, 0, 2)
            return self.relu(x).square()

    counts = []
    for inplace in (False, True):
        torch.manual_seed(0)
        model = Viewed(inplace)
        with ns.watch(model) as scope:
            for _ in range(2):
                model(torch.randn(4, 5, 3)).sum().backward()
                scope.step()
        counts.append(scope.census()["fc/relu"])
    np.testing.assert_array_equal(counts[0].zero_outputs, counts[1].zero_outputs)
    assert counts[0].gradient_positions == counts[0].positions == counts[1].positions
    assert counts[1].gradient_positions == 0
    assert np.isnan(counts[1].zero_gradient_fraction).all()


def test_a_gradient_penalty_with_double_backward_is_counted():
    """With ``create_graph`` the gradients themselves are differentiated; watching changes no bit of it."""
    runs = []
    for watching in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 8), nn.Softplus(), nn.Linear(8, 8), nn.SiLU(), nn.Linear(8, 1))
        watcher = Watched() if watching else Nobody()
        optimizer = adam(model)
        with watcher.attach(model):
            for _ in range(5):
                x = torch.randn(4, 3, requires_grad=True)
                out = model(x).sum()
                (gradient,) = torch.autograd.grad(out, x, create_graph=True)
                (out + gradient.square().sum()).backward()
                optimizer.step()
                optimizer.zero_grad()
                watcher.step()
        if watching:
            assert watcher.scope._hooks.failure is None
            assert watcher.scope.census()["0/softplus"].positions == 20
        runs.append(state_of(model))
    assert_bits(*runs)


def test_a_scope_made_in_inference_mode_counts_outside_of_it():
    model = Mixed()
    with torch.inference_mode():
        scope = ns.watch(model)
    with scope:
        feed(model, scope)
    assert scope._hooks.failure is None
    assert scope.census()["norm/relu"].positions == 3 * 24


def test_a_scope_made_under_another_default_device_and_dtype_counts():
    model = Mixed()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            scope = ns.watch(model)
    finally:
        torch.set_default_dtype(torch.float32)
    with scope:
        feed(model, scope)
    assert scope._hooks.failure is None
    assert scope.census()["norm/relu"].positions == 3 * 24


def test_layers_may_be_added_and_removed_while_watched():
    """A layer that is added while watched is functional to us or unseen, never a crash; one that goes stays counted."""
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU())
    with ns.watch(model) as scope:
        model(torch.randn(4, 3)).sum().backward()
        scope.step()
        model.append(nn.Linear(4, 5))
        model.append(nn.ReLU())
        del model[1]
        model(torch.randn(4, 3)).sum().backward()
        scope.step()
    census = scope.census()
    assert {name: tally.positions for name, tally in census.items()} == {"0/relu": 4, "2/relu": 8, "3/relu": 4}


def test_a_module_may_change_its_width_while_watched():
    """The first count stays, the site is listed as not measured since, and training goes on."""

    class Wide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.relu = nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            return self.relu(x)

    model = Wide()
    with ns.watch(model) as scope:
        model(torch.randn(4, 3))
        model(torch.randn(4, 5))
        model(torch.randn(4, 3))
        scope.step()
    assert scope.census()["relu"].positions == 8
    assert "relu" in {item.name for item in scope.report().not_measured}


def test_a_root_module_that_calls_itself_is_counted():
    class Tree(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x: Tensor, depth: int = 0) -> Tensor:
            if depth == 2:
                return F.relu(self.fc(x))
            return F.relu(self(x, depth + 1) + self.fc(x))

    model = Tree()
    with ns.watch(model) as scope:
        for _ in range(2):
            model(torch.randn(6, 4)).sum().backward()
            scope.step()
    assert sum(tally.positions for tally in scope.census().values()) == 2 * 3 * 6


def test_parts_called_without_the_whole_model_do_not_multiply_their_sites():
    """An activation called from the loop, again and again without a step: its sites do not multiply without end."""
    model = nn.ModuleDict({"fc": nn.Linear(3, 4), "act": nn.ReLU()})
    with ns.watch(model) as scope:
        with scope.phase("val"), torch.no_grad():
            for _ in range(50):
                model["act"](model["fc"](torch.randn(2, 3)))
        for _ in range(5):
            model["act"](model["fc"](torch.randn(2, 3))).sum().backward()
            scope.step()
    assert [tally.positions for tally in scope.census("train").values()] == [10]
    assert [tally.positions for tally in scope.census("val").values()] == [100]


def test_a_watched_model_works_under_vmap_and_grad():
    """Inside ``torch.func`` nothing is counted, said so, and nothing breaks."""
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 1))
    with ns.watch(model) as scope:
        parameters = dict(model.named_parameters())

        def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
            return torch.func.functional_call(model, parameters, (x,)).sum()

        torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, torch.randn(5, 3))
        model(torch.randn(7, 3)).sum().backward()
        scope.step()
    assert scope._hooks.failure is None
    assert scope.census()["0/relu"].positions == 7


def test_a_watched_model_can_be_traced_and_exported():
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 1))
    x = torch.randn(5, 3)
    with ns.watch(model) as scope, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(model, x, check_trace=False)  # the check runs the model itself
        exported = torch.export.export(model, (x,))
        torch.testing.assert_close(traced(x), model(x))
        scope.step()
    torch.testing.assert_close(exported.module()(x), model(x))
    assert scope._hooks.failure is None
    assert scope.census()["0/relu"].positions == 5


def test_every_n_steps_works_with_step_numbers_from_the_caller():
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU())
    with ns.watch(model, every_n_steps=5) as scope:
        for step in range(1, 21):
            model(torch.randn(2, 3)).sum().backward()
            scope.step(step)
    # Steps 0, 5, 10 and 15 of the 20 are observed.
    assert scope.census()["0/relu"].positions == 4 * 2
    assert scope.census().steps == 4
    assert (scope.census().first_step, scope.census().last_step) == (0, 15)


def test_a_second_watch_of_one_model_continues_from_a_loaded_state():
    """A second watch of the same model counts afresh; states carry on."""
    model = Mixed()
    with ns.watch(model) as first:
        feed(model, first)
    with ns.watch(model) as second:
        second.load_state_dict(first.state_dict())
        feed(model, second)
    assert second.global_step == 6
    assert second.census()["norm/relu"].positions == 6 * 24
    assert second.census().steps == 6
    np.testing.assert_array_equal(
        second.census()["norm/relu"].first_active_step, np.minimum(second.census()["norm/relu"].first_active_step, 2)
    )


class ByFunction(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x)


@pytest.mark.parametrize("act", [F.relu, ByFunction()], ids=["function", "module without parameters"])
def test_a_bare_function_under_a_reentrant_checkpoint_has_unseen_gradients_and_no_wrong_ones(act):
    """It is recomputed inside a backward pass, outside every module with hooks: none can tell that it runs."""

    class Bare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, 4)
            self.up = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            x = torch.utils.checkpoint.checkpoint(lambda x: act(self.up(x)), self.fc(x), use_reentrant=True)
            return F.relu(x - 0.1)

    model = Bare()
    with ns.watch(model) as scope:
        for _ in range(3):
            model(torch.randn(5, 3)).sum().backward()
            scope.step()
    census = scope.census()
    assert [(name, tally.positions, tally.gradient_positions) for name, tally in census.items()] == [
        ("up/relu", 15, 0),
        ("up/relu#1", 15, 15),
    ]
    assert any("No gradients were seen at 1 of 2 layers" in note for note in scope.report().notes)


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpointed_part_that_begins_with_an_activation_is_counted(reentrant):
    """A checkpoint that is not reentrant runs again on the very tensor: its gradient is counted once all the same."""

    class Begins(nn.Module):
        def __init__(self, checkpointing: bool) -> None:
            super().__init__()
            self.conv = nn.Conv1d(3, 6, 1)
            self.block = nn.Sequential(nn.ReLU(), nn.Conv1d(6, 6, 1), nn.ReLU())
            self.checkpointing = checkpointing

        def forward(self, x: Tensor) -> Tensor:
            x = self.conv(x)
            if not self.checkpointing:
                return self.block(x)
            return torch.utils.checkpoint.checkpoint(self.block, x, use_reentrant=reentrant)

    watched, twin = Watched(), Twin({None: 1})
    for watcher in (watched, twin):
        torch.manual_seed(0)
        model = Begins(watcher is watched)
        with watcher.attach(model):
            for _ in range(3):
                watcher.backward(model(torch.randn(4, 3, 6)).square().sum())  # as many channels as places
                watcher.step()
    assert_same(watched.scope.census(), twin.tallies())


def test_checkpoint_sequential_called_from_the_loop_is_counted():
    """The segments' modules are called without the model. A layer is known where autograd's graph shows it."""
    watched, twin = Watched(), Twin({None: 1})
    for watcher in (watched, twin):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 6), nn.GELU(), nn.Linear(6, 6), nn.ReLU())
        with watcher.attach(model):
            for _ in range(3):
                x = torch.randn(4, 3, requires_grad=True)
                if watcher is watched:
                    out = torch.utils.checkpoint.checkpoint_sequential(model, 2, x, use_reentrant=True)
                else:
                    out = model(x)
                watcher.backward(out.square().sum())
                watcher.step()
    census = watched.scope.census()
    assert {name: tally.info.assumed for name, tally in census.items()} == {"1": True, "3": True, "4/relu": False}
    truth = dict(zip(census, twin.tallies().values(), strict=True))
    for tally in truth.values():
        tally["examples"] = 0  # parts do not say how many examples the whole was given
    assert_same(census, truth)
