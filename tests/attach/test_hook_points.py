"""Modules may look at their own hooks, as a library's hook points do: what needs no hook of ours gets none."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import neuronscope as ns
from tests.agreement.slow_twin import HOOK_TABLES, assert_bits, hook_tables


class Point(nn.Module):
    """Passes its input on; a library's users register hooks here. It rounds if there is any."""

    def forward(self, x: Tensor) -> Tensor:
        return x.half().float() if any(getattr(self, table) for table in HOOK_TABLES) else x


class KeepingPoint(Point, nn.Identity):
    """A subclass of torch's own module, with a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("steps", torch.zeros(()))


class Points(nn.Module):
    """Looks at the hooks of the points inside it, and at its own."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.after = Point(), Point()

    def forward(self, x: Tensor) -> Tensor:
        hooked = any(module._forward_hooks or module._forward_pre_hooks for module in self.modules())
        return self.after(self.before(x)).round() if hooked else x


class Swish(nn.Module):
    """An activation that is not registered, and behaves otherwise if it is hooked."""

    def forward(self, x: Tensor) -> Tensor:
        return x if self._forward_hooks else x * torch.sigmoid(x)


class Block(nn.Module):
    def __init__(self, point: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.fc, self.act, self.out = nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 6)
        self.hook_pre, self.hook_post = point(), point()

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.hook_post(self.act(self.hook_pre(self.fc(x)))))


class Loss(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x.square().sum(-1) - 0.1).mean()


@pytest.mark.parametrize("point", [Point, KeepingPoint, Points, Swish], ids=lambda point: point.__name__)
def test_hook_points_see_no_hook_and_the_weights_are_those_of_an_unwatched_run(point: Callable[[], nn.Module]) -> None:
    def train(watched: bool) -> dict[str, Tensor]:
        torch.manual_seed(0)
        model = nn.Sequential(Block(point), point(), Block(point), Loss())
        optimizer = torch.optim.Adam(model.parameters(), 0.01)
        scope = ns.watch(model) if watched else None
        for _ in range(5):
            optimizer.zero_grad()
            model(torch.randn(7, 6)).backward()
            optimizer.step()
            if scope is not None:
                scope.step()
        if scope is not None:
            assert scope._hooks.failure is None
            census = scope.census("train")
            assert {census[f"{block}.fc/relu"].positions for block in (0, 2)} == {35} or point is Swish
            for module in model.modules():
                assert not (
                    isinstance(module, (Point, Points, Swish, Loss))
                    and (module._forward_hooks or module._forward_pre_hooks)
                )
            scope.detach()
        return model.state_dict()

    assert_bits(train(False), train(True))


def test_a_function_in_a_module_without_parameters_is_named_by_the_module_around_it() -> None:
    class ReLU(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.relu(x)

    model = nn.Sequential(nn.Linear(4, 6), nn.Sequential(ReLU(), nn.Linear(6, 3)), Loss())
    with ns.watch(model) as scope:
        model(torch.randn(5, 4)).backward()
        scope.step()
        assert {name: tally.info.place for name, tally in scope.census().items()} == {"0/relu": "1.relu()"}
        assert scope.not_neurons() == {"relu()": "its input was computed from several units together"}


@pytest.mark.parametrize("every_n_steps", [1, 6])
@pytest.mark.parametrize(
    "tables", [("_forward_hooks",), ("_forward_pre_hooks",), ("_forward_hooks", "_forward_pre_hooks")]
)
def test_clearing_all_hooks_of_a_watched_model_does_no_harm(tables: tuple[str, ...], every_n_steps: int) -> None:
    """Libraries reset a model by clearing the tables of hooks on all of its modules."""

    def train(watched: bool) -> dict[str, Tensor]:
        torch.manual_seed(0)
        model = nn.Sequential(Block(Point), nn.Sequential(nn.Linear(6, 4), nn.GELU()))
        before = hook_tables(model)
        optimizer = torch.optim.Adam(model.parameters(), 0.01)
        scope = ns.watch(model, every_n_steps=every_n_steps) if watched else None
        for number in range(8):
            if number == 3:
                for module in model.modules():
                    for table in tables:
                        getattr(module, table).clear()
            optimizer.zero_grad()
            model(torch.randn(7, 6)).square().sum().backward()
            optimizer.step()
            if scope is not None:
                scope.step()
        if scope is not None:
            assert scope._hooks.failure is None
            scope.detach()
        assert hook_tables(model) == before
        assert torch.overrides._len_torch_function_stack() == 0
        return model.state_dict()

    assert_bits(train(False), train(True))
