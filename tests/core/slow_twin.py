"""The slow twin: counts the same things by brute force, without any of the code that counts in Neuronscope.

It runs the same training on its own copy of the network, keeps the whole output of every activation call that a torch
function mode sees, asks autograd for the gradient at every pre-activation, and counts with numpy at the very end.
Where the neurons lie it is told by the test. A training loop is written once and run three times: by :class:`Nobody`,
by :class:`Watched` and by :class:`Twin`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

import neuronscope as ns
from neuronscope.attach import activations

FUNCTIONS: dict[Callable[..., Any], str] = {
    F.relu: "relu",
    torch.relu: "relu",
    torch.relu_: "relu",
    Tensor.relu: "relu",
    Tensor.relu_: "relu",
    F.relu6: "relu6",
    F.hardtanh: "hardtanh",
    F.hardswish: "hardswish",
    F.threshold: "threshold",
    F.hardshrink: "hardshrink",
    F.softshrink: "softshrink",
    F.leaky_relu: "leaky_relu",
    F.prelu: "prelu",
    F.rrelu: "rrelu",
    F.gelu: "gelu",
    F.silu: "silu",
    F.mish: "mish",
    F.elu: "elu",
    F.selu: "selu",
    F.celu: "celu",
    F.softplus: "softplus",
    F.logsigmoid: "logsigmoid",
    F.tanhshrink: "tanhshrink",
    F.hardsigmoid: "hardsigmoid",
    F.softsign: "softsign",
    torch.sigmoid: "sigmoid",
    Tensor.sigmoid: "sigmoid",
    Tensor.sigmoid_: "sigmoid",
    torch.tanh: "tanh",
    Tensor.tanh: "tanh",
    Tensor.tanh_: "tanh",
    F.glu: "glu",
}
PRODUCTS = (torch.mul, Tensor.mul, Tensor.__mul__, Tensor.mul_)
NOT_ONE = (nn.MultiheadAttention, nn.Softmax, nn.Softmin, nn.LogSoftmax, nn.Softmax2d)


def known_functions() -> dict[Callable[..., Any], str]:
    """Return the names of all activation functions: the table above, and rows of the registry that it has no name of.

    So an activation that is added to the registry is known here too. The table is written out to check the registry.
    """
    added = (row for row in activations.ROWS if row.activation.name not in FUNCTIONS.values() and row.choose is None)
    return {**FUNCTIONS, **{function: row.activation.name for row in added for function in row.all_functions()}}


@dataclass
class Call:
    """One call of one site: its whole output, and every gradient that came back to its pre-activation."""

    name: str
    phase: str
    step: int
    axis: int
    examples: int
    output: Tensor
    edge: Any
    halved: int | None
    gradients: list[Tensor] = field(default_factory=list)
    gate: Call | None = None


class Nobody:
    """The run that nobody watches."""

    def attach(self, model: nn.Module) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext()

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def step(self) -> None:
        pass

    def phase(self, name: str) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext()

    def state(self) -> Any:
        """What a checkpoint would hold of what was counted."""
        return None

    def attach_anew(self, model: nn.Module, state: Any) -> None:
        """Another run begins, on this model or another, and goes on from a saved state."""

    def another(self, model: nn.Module) -> contextlib.AbstractContextManager[Nobody]:
        """A second watcher of the model, who counts the steps that it is told of."""
        return contextlib.nullcontext(Nobody())


class Watched(Nobody):
    """The run that Neuronscope watches."""

    def __init__(self, **options: Any) -> None:
        self.options = options

    def attach(self, model: nn.Module) -> contextlib.AbstractContextManager[Any]:
        self.scope = ns.watch(model, **self.options)
        return self

    def __enter__(self) -> Watched:
        return self

    def __exit__(self, *error: Any) -> None:
        self.scope.__exit__(*error)

    def state(self) -> Any:
        return self.scope.state_dict()

    def attach_anew(self, model: nn.Module, state: Any) -> None:
        self.scope.detach()
        self.attach(model)
        self.scope.load_state_dict(state)

    def another(self, model: nn.Module) -> contextlib.AbstractContextManager[Nobody]:
        self.second = Watched(**self.options)
        return self.second.attach(model)

    def step(self) -> None:
        self.scope.step()

    def phase(self, name: str) -> contextlib.AbstractContextManager[Any]:
        return self.scope.phase(name)


class Twin(Nobody):
    """The run that is counted slowly.

    Args:
        axis: The neurons' dimension, by site name; ``None`` stands for every site that is not named.
        every: As ``every_n_steps``.
    """

    def __init__(self, axis: dict[str | None, int], every: int = 1) -> None:
        self.axis = axis
        self.every = every
        self.functions = known_functions()
        self.calls: list[Call] = []
        self.pending: list[Call] = []
        self.counter = 0
        self.name = "train"
        self.handles: list[RemovableHandle] = []

    @contextlib.contextmanager
    def attach(self, model: nn.Module) -> Iterator[None]:
        self._hook(model)
        try:
            with _Eyes(self):
                yield
        finally:
            self._unhook()

    def _hook(self, model: nn.Module) -> None:
        self.stack: list[tuple[str, nn.Module]] = []
        self.numbers: dict[tuple[str, str], int] = {}
        self.mine = set(model.modules())
        for path, module in model.named_modules():
            self.handles.append(module.register_forward_pre_hook(self._enter(path), with_kwargs=True))
            self.handles.append(module.register_forward_hook(self._leave(), always_call=True))

    def _unhook(self) -> None:
        for handle in self.handles:
            handle.remove()
        self.handles = []

    def state(self) -> Any:
        return len(self.calls), self.counter

    def attach_anew(self, model: nn.Module, state: Any) -> None:
        """What was seen after the state was saved is lost, as it is where a run ends before its next checkpoint."""
        self._unhook()
        self._hook(model)
        kept, self.counter = state
        del self.calls[kept:]
        self.pending = []

    def _enter(self, path: str) -> Callable[..., None]:
        def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
            if module not in self.mine:
                return  # a deep copy
            if path == "":
                self.stack.clear()
                self.numbers.clear()
                tensor = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
                self.examples = len(tensor)
                self.graded = torch.is_grad_enabled()
            self.stack.append((path, module))

        return enter

    def _leave(self) -> Callable[..., None]:
        def leave(module: nn.Module, args: Any, output: Any) -> None:
            if module in self.mine:
                self.stack.pop()

        return leave  # a plain function, like the one above: a deep copy of a bound method would copy the twin

    def backward(self, loss: Tensor) -> None:
        asked = [call for call in self.pending if call.edge is not None]
        if asked:
            edges = [call.edge for call in asked]
            for call, gradient in zip(asked, torch.autograd.grad(loss, edges, retain_graph=True, allow_unused=True)):
                if gradient is not None:
                    if call.halved is not None:
                        gradient = gradient.chunk(2, call.halved)[1]
                    call.gradients.append(gradient.clone())
        self.pending = []
        loss.backward()

    def step(self) -> None:
        self.counter += 1

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        before, self.name = self.name, name
        try:
            yield
        finally:
            self.name = before

    def seen(self, func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Run an activation function and keep everything."""
        x = args[0] if args else kwargs["input"]
        path, module = self.stack[-1]
        own = type(module).__module__ == "torch.nn.modules.activation" and not isinstance(module, NOT_ONE)
        function = f"{self.functions[func]}()"
        base = path or "(root)" if own else f"{path}.{function}" if path else function
        number = self.numbers[base, ""] = self.numbers.get((base, ""), -1) + 1
        name = f"{base}#{number}" if number else base
        axis = self.axis[name if name in self.axis else None] % x.dim()
        edge = get_gradient_edge(x) if x.requires_grad and torch.is_grad_enabled() else None
        halved = None
        if func is F.glu:
            halved = (args[1] if len(args) > 1 else kwargs.get("dim", -1)) % x.dim()
        y = func(*args, **kwargs)
        phase = "inference" if self.name == "train" and not self.graded else self.name
        call = Call(name, phase, self.counter, axis, self.examples, y.detach().clone(), edge, halved)
        self.keep(call)
        return x, y, call

    def keep(self, call: Call) -> None:
        if call.phase in ("train", "inference") and self.counter % self.every:
            return
        self.calls.append(call)
        if call.edge is not None:
            self.pending.append(call)

    def tallies(self, phase: str = "train") -> dict[str, dict[str, Any]]:
        """Everything that was kept, counted: by site name, as a :class:`neuronscope.Tally` names it."""
        result: dict[str, dict[str, Any]] = {}
        for call in self.calls:
            if call.phase == phase:
                _add(result, call)
        return result


def _rows(tensor: Tensor, axis: int) -> np.ndarray:
    """``(neurons, positions)`` in float64."""
    array = np.moveaxis(tensor.detach().cpu().to(torch.float64).numpy(), axis, 0)
    return array.reshape(array.shape[0], int(np.prod(array.shape[1:], dtype=np.int64)))


def _add(result: dict[str, dict[str, Any]], call: Call) -> None:
    rows = _rows(call.output, call.axis)
    neurons, positions = rows.shape
    zeros = np.zeros(neurons, dtype=np.int64)
    tally = result.setdefault(
        call.name,
        {
            "zero_outputs": zeros.copy(),
            "zero_gradients": zeros.copy(),
            "not_finite_outputs": zeros.copy(),
            "last_active_step": zeros - 1,
            "positions": 0,
            "gradient_positions": 0,
            "examples": 0,
            "axis": call.axis,
            "abs_sum": np.zeros(neurons),
        },
    )
    finite = np.isfinite(rows)
    tally["zero_outputs"] += (rows == 0).sum(1)
    tally["not_finite_outputs"] += (~finite).sum(1)
    tally["abs_sum"] += np.abs(np.where(finite, rows, 0)).sum(1)
    fired = (finite & (rows != 0)).any(1)
    tally["last_active_step"] = np.where(fired, call.step, tally["last_active_step"])
    tally["positions"] += positions
    tally["examples"] += call.examples
    for gradient in (call.gate or call).gradients:
        rows = _rows(gradient, call.axis)
        tally["zero_gradients"] += (rows == 0).sum(1)
        tally["gradient_positions"] += rows.shape[1]


class _Eyes(TorchFunctionMode):
    """Sees every torch function that is called while the twin's network runs."""

    def __init__(self, twin: Twin) -> None:
        super().__init__()
        self.twin = twin
        self.outputs: list[tuple[Tensor, Tensor, Call]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        twin = self.twin
        if not twin.stack:
            self.outputs.clear()
            return func(*args, **kwargs)
        if func in twin.functions:
            x, y, call = twin.seen(func, args, kwargs)
            self.outputs.append((x, y, call))
            return y
        output = func(*args, **kwargs)
        if func in PRODUCTS and len(args) == 2 and all(isinstance(arg, Tensor) for arg in args):
            self.gated(args, output)
        return output

    def gated(self, args: Any, output: Tensor) -> None:
        for factor, other in (args, args[::-1]):
            for x, y, call in reversed(self.outputs):
                if factor is y and other is not x and other is not y and other.shape == y.shape == output.shape:
                    product = Call(
                        f"{call.name}.gated",
                        call.phase,
                        call.step,
                        call.axis,
                        call.examples,
                        output.detach().clone(),
                        None,
                        None,
                        gate=call,
                    )
                    self.twin.keep(product)
                    return


def assert_same(census: ns.Census, truth: dict[str, dict[str, Any]]) -> None:
    """Every integer of a census equals the twin's, site by site, and the sites come in the order in which they ran."""
    assert list(census) == list(truth)
    for name, expected in truth.items():
        tally = census[name]
        for part, value in expected.items():
            if part == "abs_sum":
                np.testing.assert_allclose(tally.abs_sum, value, rtol=1e-5, atol=1e-30, err_msg=f"{name}: {part}")
            else:
                np.testing.assert_array_equal(getattr(tally, part), value, err_msg=f"{name}: {part}")
        assert tally.zero_outputs.dtype == tally.zero_gradients.dtype == np.int64


def state_of(model: nn.Module) -> dict[str, Tensor]:
    """Parameters, buffers and gradients, copied."""
    state = {name: value.detach().clone() for name, value in model.state_dict().items()}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            state[f"{name}.grad"] = parameter.grad.clone()
    return state


def assert_bits(one: dict[str, Tensor], two: dict[str, Tensor]) -> None:
    """Two states are equal bit for bit, NaN included."""
    assert one.keys() == two.keys()
    for name, value in one.items():
        assert value.dtype == two[name].dtype
        assert value.contiguous().view(-1).view(torch.uint8).equal(two[name].contiguous().view(-1).view(torch.uint8)), (
            name
        )


HOOK_TABLES = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)


def hook_tables(model: nn.Module) -> dict[str, dict[str, list[int]]]:
    """What hooks every module bears, by path, by table, by identity."""
    return {
        path: {table: [id(hook) for hook in getattr(module, table).values()] for table in HOOK_TABLES}
        for path, module in model.named_modules()
    }
