"""Forwards that begin without gradients in a training are phase ``inference``, and never training.

The network is a row of gates: neuron i fires exactly where input i is positive, so that a test says who fires where.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import neuronscope as ns

WIDTH = 4
#: Two examples make a window sure.
SOON = ns.Policy(confidence=0.7, max_rate=0.5)


class Gates(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.act, self.out = nn.Linear(WIDTH, WIDTH, bias=False), nn.ReLU(), nn.Linear(WIDTH, 1)
        nn.init.eye_(self.fc.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.act(self.fc(x)))


def positions(scope: ns.Scope, phase: str) -> int:
    """Positions of the one site."""
    return sum(tally.positions for tally in scope.census(phase).values())


def examples(scope: ns.Scope, phase: str) -> int:
    return scope.census(phase).examples


def train(model: nn.Module, rows: int) -> None:
    model(torch.rand(rows, WIDTH).requires_grad_()).sum().backward()


@pytest.mark.parametrize("off", [torch.no_grad, torch.inference_mode, lambda: torch.set_grad_enabled(False)])
def test_a_forward_that_begins_without_gradients_in_training_is_inference(off: Callable[[], Any]) -> None:
    model = Gates()
    with ns.watch(model) as scope:
        with off():
            model(torch.rand(5, WIDTH))
        train(model, 3)
        scope.step()
        with off(), scope.phase("val"):
            model(torch.rand(7, WIDTH))
    counted = {phase: (positions(scope, phase), examples(scope, phase)) for phase in scope.phases}
    assert counted == {"train": (3, 3), "inference": (5, 5), "val": (7, 7)}
    (tally,) = scope.census("inference").values()
    assert tally.gradient_positions == 0


def test_a_part_that_runs_without_gradients_inside_a_training_forward_is_training() -> None:
    class Teaching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.teacher, self.student = Gates(), Gates()

        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                target = self.teacher(x)
            return self.student(x) - target

    model = Teaching()
    with ns.watch(model) as scope:
        train(model, 3)
        scope.step()
    assert scope.phases == ("train",)
    assert positions(scope, "train") == 6


def test_parts_of_the_model_called_without_gradients_are_inference() -> None:
    """A target network that is a part of the watched model, called by itself."""
    model = nn.ModuleDict({"policy": Gates(), "target": Gates()})
    with ns.watch(model) as scope:
        with torch.no_grad():
            value = model["target"](torch.rand(5, WIDTH))
        (model["policy"](torch.rand(5, WIDTH)) - value).square().mean().backward()
        scope.step()
    (trained,), (inferred,) = (scope.census(phase) for phase in ("train", "inference"))
    assert trained.startswith("policy")
    assert inferred.startswith("target")
    missing = {item.name: item.reason for item in scope.report("train").not_measured}
    assert any("without gradients only: see phase `inference`" in reason for reason in missing.values())


def test_activations_outside_of_every_module_without_gradients_are_inference() -> None:
    model = Gates()
    with ns.watch(model) as scope:
        scope.open_step()
        with torch.no_grad():
            for _ in range(3):
                model.act(model.fc(torch.rand(5, WIDTH)))
                F.relu(model.fc(torch.rand(5, WIDTH)))
        F.relu(model.fc(torch.rand(2, WIDTH))).sum().backward()
        scope.close_step()
        scope.step()
    assert (positions(scope, "train"), positions(scope, "inference")) == (2, 30)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("inside", [True, False], ids=["inside a forward", "outside of any forward"])
def test_the_first_run_of_a_checkpoint_is_training(reentrant: bool, inside: bool) -> None:
    class Saving(Gates):
        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(super().forward, x, use_reentrant=reentrant)

    model = Saving() if inside else Gates()
    x = torch.rand(3, WIDTH, requires_grad=True)
    with ns.watch(model) as scope:
        y = model(x) if inside else checkpoint(model, x, use_reentrant=reentrant)
        y.sum().backward()
        scope.step()
    (tally,) = scope.census("train").values()
    assert (tally.positions, tally.gradient_positions) == (3, 3)
    assert scope.phases == ("train",)


@pytest.mark.parametrize("inside", [True, False], ids=["inside a forward", "outside of any forward"])
def test_a_function_of_the_users_own_that_gives_gradients_is_training(inside: bool) -> None:
    """As DeepSpeed's checkpointing and adjoint solvers: torch turns gradients off while they run the model."""
    block = Gates()

    class Own(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.save_for_backward(x)
            return block(x)

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:
            with torch.enable_grad():
                x = ctx.saved_tensors[0].detach().requires_grad_()
                block(x).backward(gradient)
            return x.grad

    class Around(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = block

        def forward(self, x: Tensor) -> Tensor:
            return Own.apply(x)

    model = Around()
    with ns.watch(model) as scope:
        x = torch.rand(3, WIDTH, requires_grad=True)
        (model(x) if inside else Own.apply(x)).sum().backward()
        scope.step()
    assert scope.phases == ("train",)
    assert positions(scope, "train") == 3


class Shared(nn.Module):
    """Two layers share one activation, each in a segment that is run again in the backward pass if `save` is true."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.act = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), nn.ReLU()

    def forward(self, x: Tensor, save: bool = False) -> Tensor:
        for layer in (self.one, self.two):
            x = checkpoint(self.part, layer, x, use_reentrant=True) if save else self.part(layer, x)
        return x

    def part(self, layer: nn.Linear, x: Tensor) -> Tensor:
        return self.act(layer(x))


def test_a_reference_pass_between_a_checkpointed_forward_and_its_backward_disturbs_no_gradient() -> None:
    """The recomputed calls must still find which call each was."""

    def gradients(refer: bool) -> dict[str, list[int]]:
        torch.manual_seed(0)
        model = Shared()
        with ns.watch(model) as scope:
            y = model(torch.randn(6, WIDTH, requires_grad=True), save=True)
            if refer:
                with torch.no_grad():
                    model(torch.randn(6, WIDTH))
            y.sum().backward()
            scope.step()
        return {name: tally.zero_gradients.tolist() for name, tally in scope.census("train").items()}

    alone = gradients(False)
    assert len(alone) == 2
    assert gradients(True) == alone


@pytest.mark.parametrize("together", [False, True], ids=["one after another", "all forwards first"])
def test_gradients_of_several_checkpointed_batches_in_a_step_are_those_without_checkpoints(together: bool) -> None:
    def gradients(save: bool) -> dict[str, tuple[int, list[int]]]:
        torch.manual_seed(0)
        model = Shared()
        with ns.watch(model) as scope:
            for _ in range(2):
                losses = []
                for _ in range(3):
                    losses.append(model(torch.randn(4, WIDTH, requires_grad=True), save=save).sum())
                    if not together:
                        losses.pop().backward()
                for loss in losses:
                    loss.backward()
                scope.step()
        census = scope.census("train").items()
        return {name: (tally.gradient_positions, tally.zero_gradients.tolist()) for name, tally in census}

    plain = gradients(False)
    assert {positions for positions, _ in plain.values()} == {24}
    assert gradients(True) == plain


def test_resampling_batch_norm_and_generation_are_inference() -> None:
    model = nn.Sequential(nn.Linear(WIDTH, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 1))
    with ns.watch(model) as scope:
        train(model, 8)
        scope.step()
        torch.optim.swa_utils.update_bn([torch.randn(5, WIDTH)] * 2, model)
        scope.step()
    assert {phase: examples(scope, phase) for phase in scope.phases} == {"train": 8, "inference": 10}


def test_steps_that_are_not_observed_count_no_inference_either() -> None:
    model = Gates()
    with ns.watch(model, every_n_steps=3) as scope:
        for _ in range(6):
            with torch.no_grad():
                model(torch.rand(5, WIDTH))
            train(model, 2)
            scope.step()
    assert {phase: examples(scope, phase) for phase in scope.phases} == {"inference": 10, "train": 4}
    assert scope.census("inference").steps == 2


def test_windows_of_inference_close_with_those_of_training() -> None:
    model = Gates()
    with ns.watch(model, window_steps=2, policy=SOON) as scope:
        for number in range(6):
            if number < 4:
                with torch.no_grad():
                    model(torch.rand(number + 1, WIDTH))
            train(model, 2)
            assert scope.step() == (number % 2 == 1)
        # Inference of 3 + 4 rows in the second window, none in the third.
        last = {phase: scope.census(phase, "last") for phase in ("train", "inference")}
    assert (last["train"].first_step, last["train"].last_step, last["train"].examples) == (4, 5, 4)
    assert (last["inference"].first_step, last["inference"].last_step, last["inference"].examples) == (2, 3, 7)
    assert examples(scope, "inference") == 10


def test_deaths_hidden_by_a_reference_pass_show_in_training() -> None:
    """Neuron 0 fires in the reference pass only."""
    model, living = Gates(), torch.ones(2, WIDTH)
    dead = living * torch.tensor([-1.0, 1.0, 1.0, 1.0])
    with ns.watch(model, window_steps=2, policy=SOON) as scope:
        for _ in range(4):
            with torch.no_grad():
                model(living)
            model(dead).sum().backward()
            scope.step()
    assert [scope.report(phase).dead for phase in ("train", "inference")] == [1, 0]


def test_a_report_on_training_names_the_phase_of_what_it_leaves_out() -> None:
    model = Gates()
    with ns.watch(model) as scope:
        train(model, 2)
        scope.step()
        assert not any("inference" in note for note in scope.report("train").notes)
        with torch.no_grad():
            model(torch.rand(5, WIDTH))
    report = scope.report("train")
    assert report.phase == "train"
    assert any("phase `inference`" in note for note in report.notes)
    assert not any("phase `inference`" in note for note in scope.report("inference").notes)


def test_where_nothing_but_inference_was_seen_the_report_is_on_that_and_says_so() -> None:
    model = Gates()
    with ns.watch(model, window_steps=2, policy=SOON) as scope, torch.no_grad():
        assert [model(torch.rand(2, WIDTH)) is not None and scope.step() for _ in range(5)] == [0, 1, 0, 1, 0]
    report = scope.report()
    assert report.phase == "inference"
    assert report.neurons == WIDTH
    assert any("No forward with gradients was seen in training" in note for note in report.notes)
    assert (report.window.name, report.window.first_step, report.window.last_step) == ("last", 4, 4)
    assert "inference" in str(report)
    assert not scope.census("train")


def test_counts_of_inference_are_saved_and_continued() -> None:
    def run(scope: ns.Scope, model: nn.Module, steps: int) -> None:
        for _ in range(steps):
            with torch.no_grad():
                model(torch.rand(3, WIDTH))
            train(model, 2)
            scope.step()

    model, file = Gates(), io.BytesIO()
    with ns.watch(model) as scope:
        run(scope, model, 4)
        torch.save(scope.state_dict(), file)
    file.seek(0)
    with ns.watch(model) as scope:
        scope.load_state_dict(torch.load(file, weights_only=True))
        run(scope, model, 2)
    assert {phase: examples(scope, phase) for phase in scope.phases} == {"train": 12, "inference": 18}


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_forward_without_gradients_is_inference(backend: str) -> None:
    torch._dynamo.reset()
    model = Gates()
    with ns.watch(model) as scope:
        compiled = torch.compile(model, backend=backend)
        for _ in range(3):
            with torch.no_grad():
                compiled(torch.rand(5, WIDTH))
            compiled(torch.rand(2, WIDTH)).sum().backward()
            scope.step()
    counted = {phase: (examples(scope, phase), positions(scope, phase)) for phase in scope.phases}
    assert counted == {"train": (6, 6), "inference": (15, 15)}
