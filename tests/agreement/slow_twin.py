"""The slow twin: counts the same things by brute force, without any of the code that counts in Neuronscope.

It runs the same training on its own copy of the network, keeps the whole output of every activation call that a torch
function mode sees, asks autograd for the gradient at every pre-activation, and counts with numpy at the very end.
Where the neurons lie it is told by the test; whose units they are it finds in autograd's graph, see
:mod:`tests.agreement.producers`. A forward of which autograd may make no graph runs on a copy of the network first.
A training loop is written once and run three times: by :class:`Nobody`, by :class:`Watched` and by :class:`Twin`.
"""

from __future__ import annotations

import contextlib
import copy
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
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
from tests.agreement.producers import Namer, Site

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

    site: Site
    phase: str
    step: int
    axes: tuple[int, ...]
    forward: int
    examples: int
    output: Tensor
    edge: Any
    halved: int | None
    gradients: list[Tensor] = field(default_factory=list)

    @property
    def name(self) -> str:
        return self.site.name

    def part(self, tensor: Tensor) -> Tensor:
        """The part of an output or a gradient that is counted."""
        return tensor


class Nobody:
    """The run that nobody watches."""

    def attach(self, model: nn.Module) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext()

    def backward(self, loss: Tensor, *, again: bool = False) -> None:
        """Run a backward pass.

        Args:
            loss: Where it begins.
            again: Whether another pass over the same graph follows.
        """
        loss.backward(retain_graph=again)

    def grad(self, output: Tensor, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Return the gradients of an output, which can be differentiated.

        Args:
            output: Any tensor without dimensions.
            inputs: Tensors before the first activation.
        """
        return torch.autograd.grad(output, list(inputs), create_graph=True)

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
        axis: The neurons' dimension, or dimensions, by where the activation is applied: the path of its module, or
            ``block.relu()``, with the number of the call in the forward if it is not the first (``relu#1``); ``None``
            stands for every one that is not named.
        every: As ``every_n_steps``.
    """

    def __init__(self, axis: dict[str | None, int | tuple[int, ...]], every: int = 1) -> None:
        self.axis = axis
        self.every = every
        self.functions = known_functions()
        self.registry = activations.Registry()
        self.calls: list[Call] = []
        self.gates: dict[str, str] = {}  # gated product → the site of its gate
        self.pending: list[Call] = []
        self.counter = 0
        self.forward = 0
        self.name = "train"
        self.handles: list[RemovableHandle] = []

    @contextlib.contextmanager
    def attach(self, model: nn.Module) -> Iterator[None]:
        self._hook(model)
        try:
            with CalledFunctions(self):
                yield
        finally:
            self._unhook()

    def _hook(self, model: nn.Module) -> None:
        self.stack: list[tuple[str, nn.Module]] = []
        self.numbers: dict[str, int] = {}
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
                self.begin_forward(module, args, kwargs)
            self.stack.append((path, module))

        return enter

    def begin_forward(self, model: nn.Module, args: Any, kwargs: Any) -> None:
        """The model's own forward is about to run.

        Args:
            model: The model.
            args: Of its forward.
            kwargs: Of its forward.
        """
        self.numbers.clear()
        self.examples = len(next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)))
        self.forward += 1
        self.graded = torch.is_grad_enabled()
        self.namer: Any = _Names(_rehearse(self, model, args, kwargs))

    def _leave(self) -> Callable[..., None]:
        def leave(module: nn.Module, args: Any, output: Any) -> None:
            if module in self.mine:
                self.stack.pop()

        return leave  # a plain function, like the one above: a deep copy of a bound method would copy the twin

    def backward(self, loss: Tensor, *, again: bool = False) -> None:
        self._look(loss)
        if not again:
            self.pending = []
        loss.backward(retain_graph=again)

    def grad(self, output: Tensor, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        self._look(output)
        return super().grad(output, inputs)

    def _look(self, loss: Tensor) -> None:
        """Keep the gradients of all pre-activations in one pass from a loss."""
        asked = [call for call in self.pending if call.edge is not None]
        if asked:
            edges = [call.edge for call in asked]
            for call, gradient in zip(asked, torch.autograd.grad(loss, edges, retain_graph=True, allow_unused=True)):
                if gradient is not None:
                    if call.halved is not None:
                        gradient = gradient.chunk(2, call.halved)[1]
                    call.gradients.append(call.part(gradient).clone())

    def step(self) -> None:
        self.counter += 1

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        before, self.name = self.name, name
        try:
            yield
        finally:
            self.name = before

    @property
    def running_phase(self) -> str:
        """The phase of the forward that runs: one of training that began without gradients is ``inference``."""
        return self.name if self.name != "train" or self.graded else "inference"

    def axes_of(self, place: str, x: Tensor) -> tuple[int, ...]:
        """Return the dimensions of a pre-activation that hold neurons.

        Args:
            place: Where the activation is applied.
            x: The pre-activation.
        """
        number = self.numbers[place] = self.numbers.get(place, -1) + 1
        name = f"{place}#{number}" if number else place
        given = self.axis[name if name in self.axis else None]
        return tuple(axis % x.dim() for axis in ((given,) if isinstance(given, int) else given))

    def begin(self, place: str, activation: str, x: Tensor, halved: int | None, *, is_module: bool) -> Call | None:
        """An activation is about to be applied: return its call, but for the output, which is yet to come.

        Args:
            place: Where it is applied.
            activation: Its name.
            x: The pre-activation.
            halved: The dimension of which one half gates the other.
            is_module: Whether it is a module.

        Returns:
            The call; ``None`` if what it is applied to are no neurons.
        """
        axes = self.axes_of(place, x)
        site = self.name_site(place, activation, x, axes, is_module=is_module)
        if site is None:
            return None
        edge = get_gradient_edge(x) if x.requires_grad and torch.is_grad_enabled() else None
        phase = self.running_phase
        return Call(site, phase, self.counter, axes, self.forward, self.examples, x.detach(), edge, halved)

    def name_site(self, *facts: Any, is_module: bool) -> Site | None:
        """Name the site of an activation; see :meth:`tests.agreement.producers.Namer.site`."""
        return self.namer.site(*facts, is_module=is_module)

    def looks(self) -> bool:
        """Return whether a function that is called now may be an activation: the network runs."""
        return bool(self.stack)

    def seen(self, func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Run an activation function and keep everything; return its input, its output and the call.

        Args:
            func: The function.
            args: Its arguments.
            kwargs: Its named arguments.
        """
        x = args[0] if args else kwargs["input"]
        path, module = self.stack[-1]
        own = type(module).__module__ == "torch.nn.modules.activation" and not isinstance(module, NOT_ONE)
        name = self.registry.of_module(module).name if own else self.functions[func]
        place = path or "(root)" if own else f"{path}.{name}()" if path else f"{name}()"
        dimension = args[1] if len(args) > 1 and isinstance(args[1], int) else kwargs.get("dim", -1)
        call = self.begin(place, name, x, dimension % x.dim() if func is F.glu else None, is_module=own)
        y = func(*args, **kwargs)
        if call is not None:
            self.end(call, y)
        return x, y, call

    def end(self, call: Call, y: Tensor) -> None:
        """An activation was applied.

        Args:
            call: What :meth:`begin` returned.
            y: Its output.
        """
        call.output = y.detach().clone()
        self.keep(call)

    def multiply(self, gate: Call, other: Tensor, output: Tensor) -> Call | None:
        """Keep a product, if it is a gated one or a SiLU that is written out; return the latter.

        Args:
            gate: The call whose output is a factor.
            other: The other factor.
            output: The product.
        """
        name = self.namer.product(gate.site, other, output, gate.axes)
        if name is not None:
            self.gates[name] = gate.name
            site = Site(name, "", (), ())
            kept = output.detach().clone()
            self.keep(Call(site, gate.phase, gate.step, gate.axes, gate.forward, gate.examples, kept, None, None))

    def keep(self, call: Call) -> None:
        if self.name == "train" and self.counter % self.every:
            return
        self.calls.append(call)
        if call.edge is not None:
            self.pending.append(call)

    def tallies(self, phase: str = "train") -> dict[str, dict[str, Any]]:
        """Everything that was kept, counted: by site name, as a :class:`neuronscope.Tally` names it."""
        result: dict[str, dict[str, Any]] = {}
        positions: dict[tuple[str, int], tuple[int, int]] = {}  # of a site in a forward: examples, positions
        for call in self.calls:
            if call.phase == phase:
                count = _add(result, call)
                before = positions.get((call.name, call.forward), (0, 0))[1]
                positions[call.name, call.forward] = call.examples, before + count
        for (name, _), (examples, count) in positions.items():
            result[name]["examples"] += min(examples, count)  # a forward has no more examples than positions
        for name in result.keys() & self.gates.keys():
            for part in ("zero_gradients", "gradient_positions"):
                result[name][part] = result[self.gates[name]][part]
        return result


class _Names:
    """The names that a rehearsal gave, one after another."""

    def __init__(self, given: Sequence[Any]) -> None:
        self.given = deque(given)

    def site(self, *facts: Any, is_module: bool) -> Any:
        return self.given.popleft()

    def product(self, *facts: Any) -> Any:
        return self.given.popleft()


class _Rehearsal(Twin):
    """A forward on a copy of the network, with a graph of all of it, to name the sites."""

    def __init__(self, twin: Twin, model: nn.Module) -> None:
        super().__init__(twin.axis)
        self.real = Namer(model)
        self.given: list[Any] = []

    def begin_forward(self, model: nn.Module, args: Any, kwargs: Any) -> None:
        self.numbers.clear()
        self.examples = 0
        self.graded = True
        self.namer = self

    def site(self, *facts: Any, is_module: bool) -> Site | None:
        """Name a site, and remember the name."""
        self.given.append(self.real.site(*facts, is_module=is_module))
        return self.given[-1]

    def product(self, *facts: Any) -> str | None:
        """Name a product, and remember the name."""
        self.given.append(self.real.product(*facts))
        return self.given[-1]


def _computed(model: nn.Module) -> dict[int, Any]:
    """Return copies of the weights that are computed, which cannot be copied otherwise, by their ``id``."""
    copies: dict[int, Any] = {}
    for module in model.modules():
        for held, kind in ((vars(module), torch.clone), (module._parameters, nn.Parameter)):
            for value in held.values():
                if isinstance(value, Tensor) and not value.is_leaf:
                    copies[id(value)] = kind(value.detach().clone())
    return copies


def _rehearse(twin: Twin, model: nn.Module, args: Any, kwargs: Any) -> list[Any]:
    """Return the names of all sites and products of a forward, in their order.

    Args:
        twin: Who will count the forward.
        model: The model.
        args: Of its forward.
        kwargs: Of its forward.
    """
    before = torch.get_rng_state()
    with torch.inference_mode(False), torch.enable_grad():
        model = copy.deepcopy(model, _computed(model)).requires_grad_(True)
        for parameter in model.parameters():
            if not parameter.isfinite().all():
                nn.init.normal_(parameter)
        rehearsal = _Rehearsal(twin, model)
        args, kwargs = torch.utils._pytree.tree_map_only(Tensor, lambda each: each.detach().clone(), (args, kwargs))
        rehearsal.handles.extend(rehearsal.real.hook())
        with rehearsal.attach(model), contextlib.suppress(Exception, KeyboardInterrupt):
            model(*args, **kwargs)
    torch.set_rng_state(before)
    return rehearsal.given


def _rows(tensor: Tensor, axes: Sequence[int]) -> np.ndarray:
    """``(neurons, positions)`` in float64."""
    array = np.moveaxis(tensor.detach().cpu().to(torch.float64).numpy(), axes, range(len(axes)))
    neurons = int(np.prod(array.shape[: len(axes)]))
    return array.reshape(neurons, int(np.prod(array.shape[len(axes) :], dtype=np.int64)))


def _add(result: dict[str, dict[str, Any]], call: Call) -> int:
    """Add a call to its site, and return the number of its positions."""
    rows = _rows(call.output, call.axes)
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
            "axis": call.axes[-1],
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
    for gradient in call.gradients:
        rows = _rows(gradient, call.axes)
        tally["zero_gradients"] += (rows == 0).sum(1)
        tally["gradient_positions"] += rows.shape[1]
    return positions


class CalledFunctions(TorchFunctionMode):
    """Shows the twin every torch function that is called while its network runs.

    Args:
        twin: The twin.
    """

    def __init__(self, twin: Twin) -> None:
        super().__init__()
        self.twin = twin
        #: Pre-activation, output and call of each activation of the forward.
        self.outputs: list[tuple[Tensor, Tensor, Call]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        twin = self.twin
        if not twin.stack:
            self.outputs.clear()
        if not twin.looks():
            return func(*args, **kwargs)
        if func in twin.functions:
            x, y, call = twin.seen(func, args, kwargs)
            if call is not None:
                self.outputs.append((x, y, call))
            return y
        output = func(*args, **kwargs)
        if func in PRODUCTS and len(args) == 2 and all(isinstance(arg, Tensor) for arg in args):
            written_out = find_gated(twin, self.outputs, args, output)
            if written_out is not None:
                self.outputs.append(written_out)
        return output


def find_gated(
    twin: Twin, outputs: list[tuple[Tensor, Tensor, Call]], factors: Any, product: Tensor
) -> tuple[Tensor, Tensor, Call] | None:
    """Keep a product of an activation's output and another tensor; return it if it is an activation itself.

    Args:
        twin: Who counts.
        outputs: Pre-activation, output and call of each activation of the forward.
        factors: The two factors.
        product: The product.
    """
    for factor, other in (factors, factors[::-1]):
        for x, y, call in reversed(outputs):
            if factor is y and other is not x and other is not y and other.shape == y.shape == product.shape:
                written_out = twin.multiply(call, other, product)
                return None if written_out is None else (other, product, written_out)
    return None


def assert_same(census: Mapping[str, ns.Tally], truth: dict[str, dict[str, Any]]) -> None:
    """Every integer of a census equals the twin's, site by site, and the sites come in the order in which they ran."""
    assert [*census] == [*truth]
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
