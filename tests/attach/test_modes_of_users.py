"""A user's function mode, dispatch mode or tensor subclass sees the calls of the unwatched run, and none of ours."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import neuronscope as ns


def shapes(args: Any) -> list[Any]:
    """The shapes of the tensors of a call, as far as they are given by position."""
    with torch._C.DisableTorchFunction():
        return [tuple(arg.shape) for arg in args if isinstance(arg, Tensor) and not arg.is_nested]


class Functions(TorchFunctionMode):
    """Records each torch function, and draws a random number for it, as a fuzzer may."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.seen.append((getattr(func, "__name__", str(func)), shapes(args)))
        torch.rand(())
        return func(*args, **(kwargs or {}))


class Operators(TorchDispatchMode):
    """Records each operator, and draws a random number for it."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.seen.append((str(func), shapes(args)))
        torch.rand(())
        return func(*args, **(kwargs or {}))


class Recording(Tensor):
    """A tensor that records the functions that it is given to."""

    seen: list[Any] = []  # noqa: RUF012  # shared by all tensors of the class, and emptied by each run

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        cls.seen.append((getattr(func, "__name__", str(func)), shapes(args)))
        return super().__torch_function__(func, types, args, kwargs or {})


class Modules(nn.Module):
    """Activation modules: in place, behind a view, gated by a half, of unknown layers, time first."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.relu, self.norm = nn.Linear(4, 6), nn.ReLU(inplace=True), nn.BatchNorm1d(6)
        self.glu, self.gelu, self.drop = nn.GLU(), nn.GELU(), nn.Dropout(0.1)
        self.attention = nn.MultiheadAttention(6, 2)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        x = self.norm(self.relu(self.fc(x)).flatten(0, 1)).view(3, 5, 6)
        x = x + self.attention(x, x, x)[0]
        return self.glu(x).sum() + self.gelu(self.drop(x).sum(-1)).sum()


class Functional(nn.Module):
    """Functional activations, a gated product, a clamp, a softmax, and a loop over rows."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(6, 4)
        self.scale = nn.Parameter(torch.ones(6))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        h = F.silu(self.gate(x)) * self.up(x) * self.scale.clamp(min=0)
        first, second = self.down(h).chunk(2, -1)
        rows = [torch.tanh(row) for row in first.unbind(0)]
        return torch.stack(rows).softmax(-1).sum() + (second - 1).relu_().clamp(min=0).square().sum()


class Frozen(nn.Module):
    """A frozen encoder, and a part of the forward without gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 6)
        self.encoder = nn.TransformerEncoderLayer(6, 2, 8, batch_first=True).eval().requires_grad_(False)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        with torch.no_grad():
            goal = self.encoder(F.relu(self.fc(x)))
        return (F.relu(self.fc(x)) - goal).square().mean()


class Checkpointed(Functional):
    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.reentrant = reentrant

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return checkpoint(super().forward, x.requires_grad_(), use_reentrant=self.reentrant)


class WithMode(nn.Module):
    """Enters a mode inside its forward."""

    def __init__(self, mode: Any) -> None:
        super().__init__()
        self.inner, self.act, self.mode = Functional(), nn.ReLU(), mode

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        with self.mode:
            x = self.act(self.inner.gate(x))[..., :4]
            return self.inner(x, mask)


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "modules": Modules,
    "functions": Functional,
    "frozen": Frozen,
    "checkpointed": lambda: Checkpointed(False),
    "checkpointed, reentrant": lambda: Checkpointed(True),
}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "masked": {"mask": "mask"},
    "examples on another dimension": {"examples": 1},
    "every second step": {"every_n_steps": 2},
    "short windows": {"window_steps": 1, "policy": ns.Policy(max_rate=0.9)},
    "declared axes": {"axes": {"*": -1}},
    "a function that finds the mask": {"mask": lambda args, kwargs: kwargs["mask"]},
}


def train(model: nn.Module, mode: Any, options: dict[str, Any] | None, x: Tensor, watch_inside: bool = True) -> Tensor:
    """Watch, train for two steps and evaluate, all of it under a mode; return the random numbers that are left."""
    mask = torch.arange(5) < torch.tensor([5, 3, 4])[:, None]
    outside = None if options is None or watch_inside else ns.watch(model, **options)
    torch.manual_seed(1)
    with mode:
        scope = outside if options is None or outside is not None else ns.watch(model, **options)
        for _ in range(2):
            model(x, mask=mask).backward()
            if scope is not None:
                scope.step()
        with torch.no_grad(), contextlib.nullcontext() if scope is None else scope.phase("val"):
            model(x, mask=mask)
        if scope is not None:
            scope.census("train")
            scope.report()
            scope.detach()
    if scope is not None:
        assert scope._hooks.failure is None
        assert any(tally.positions for tally in scope.census("train").values())
    return torch.get_rng_state()


def same_run(build: Callable[[], nn.Module], mode: Callable[[nn.Module], Any], options: dict[str, Any]) -> None:
    """Assert that a mode sees the same calls, and leaves the same random numbers, watched or not."""
    found = []
    for given, inside in ((None, True), (options, True), (options, False)):
        torch.manual_seed(0)
        model, x = build(), torch.randn(3, 5, 4)
        around = mode(model)
        numbers = train(model, around, given, x, inside)
        found.append((getattr(model, "mode", around).seen, numbers))
    (seen, numbers), *others = found
    assert len(seen) > 20
    for seen_when_watched, numbers_when_watched in others:
        assert seen_when_watched == seen
        assert torch.equal(numbers_when_watched, numbers)


@pytest.mark.parametrize("mode", [Functions, Operators])
@pytest.mark.parametrize("name", NETWORKS)
def test_a_mode_around_the_training_sees_the_calls_of_an_unwatched_run(name: str, mode: Callable[[], Any]) -> None:
    same_run(NETWORKS[name], lambda model: mode(), {})


@pytest.mark.parametrize("mode", [Functions, Operators])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("name", ["modules", "functions"])
def test_a_mode_sees_no_call_that_an_option_makes(name: str, options: str, mode: Callable[[], Any]) -> None:
    same_run(NETWORKS[name], lambda model: mode(), OPTIONS[options])


@pytest.mark.parametrize("mode", [Functions, Operators])
def test_a_mode_inside_the_forward_sees_the_calls_of_an_unwatched_run(mode: Callable[[], Any]) -> None:
    same_run(lambda: WithMode(mode()), lambda model: contextlib.nullcontext(), {})


@pytest.mark.parametrize("name", ["modules", "functions", "checkpointed"])
@pytest.mark.parametrize("options", ["plain", "masked", "examples on another dimension"])
def test_a_tensor_subclass_sees_the_calls_of_an_unwatched_run(name: str, options: str) -> None:
    found = []
    for given in (None, OPTIONS[options]):
        torch.manual_seed(0)
        model, x = NETWORKS[name](), torch.randn(3, 5, 4).as_subclass(Recording)
        Recording.seen.clear()
        numbers = train(model, contextlib.nullcontext(), given, x)
        found.append(([*Recording.seen], numbers))
    assert len(found[0][0]) > 10
    assert found[0][0] == found[1][0]
    assert torch.equal(found[0][1], found[1][1])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["modules", "functions"])
def test_a_mode_around_a_compiled_model_sees_the_calls_of_an_unwatched_run(name: str) -> None:
    found = []
    for watched in (False, True):
        torch._dynamo.reset()
        torch.manual_seed(0)
        model, x = NETWORKS[name]().eval(), torch.randn(3, 5, 4)
        with ns.watch(model) if watched else contextlib.nullcontext():
            compiled = torch.compile(model, backend="aot_eager")
            compiled(x)
            with Operators() as mode:
                found.append((compiled(x).detach(), torch.get_rng_state()))
        found[-1] = (*found[-1], mode.seen)
    assert torch.equal(found[0][0], found[1][0])
    assert found[0][2] == found[1][2]
