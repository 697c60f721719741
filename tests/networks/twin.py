"""The slow twin for networks of others: it knows activation modules by their class, and finds who made their input.

A module whose class is defined where a library keeps its activations is one site, whatever it calls inside. What
produced a pre-activation is read off autograd's graph, which Neuronscope does not look at: the last convolution, linear
layer, norm or product before it says how many neurons there must be.
"""

from __future__ import annotations

import contextlib
import fnmatch
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.overrides import TorchFunctionMode

from tests.core.slow_twin import NOT_ONE, PRODUCTS, Call, Twin

HOMES = ("torch.nn.modules.activation", "transformers.activations", "timm.layers.activations")
UNITS = ("BloomGelu",)  # activations that a model's own file defines
NO_ACTIVATIONS = ("LinearActivation", "Identity")


class Width(NamedTuple):
    """What produced a pre-activation.

    Attributes:
        features: Its output features.
        split: The pre-activation may be a part of them, as in ``chunk(2)``.
        heads: The pre-activation may be several of them joined, as an attention's heads are.
    """

    features: int
    split: bool
    heads: bool

    def fits(self, neurons: int) -> bool:
        """Whether an activation of that many neurons can come from here."""
        return (
            neurons == self.features
            or (self.split and self.features % neurons == 0)
            or (self.heads and neurons % self.features == 0)
        )


def _features(node: Any) -> int | None:
    """Output features of a weighted node of autograd's graph; ``None`` for any other node."""
    name = node.name()
    if name == "ConvolutionBackward0":
        weight = node._saved_weight
        return weight.shape[1] * node._saved_groups if node._saved_transposed else weight.shape[0]
    if name in ("AddmmBackward0", "MmBackward0"):
        return node._saved_mat2_sym_sizes[1]
    if name == "BmmBackward0":
        return node._saved_mat2.shape[-1] if node._saved_mat2 is not None else None
    if name in ("NativeLayerNormBackward0", "FusedRmsNormBackward0"):
        return node._saved_normalized_shape[-1]
    if name == "NativeBatchNormBackward0":
        return node._saved_input.shape[1]
    if name == "NativeGroupNormBackward0":
        return node._saved_C
    return None


def width_of(x: Tensor) -> Width | None:
    """The nearest weighted call before ``x``, breadth first; ``None`` where there is none."""
    queue, seen = deque([(x.grad_fn, False)]), set()
    while queue:
        node, split = queue.popleft()
        if node is None or node in seen:
            continue
        seen.add(node)
        features = _features(node)
        if features is not None:
            return Width(features, split, node.name() == "BmmBackward0")
        split = split or node.name().startswith(("Split", "Slice", "Select", "Unbind"))
        queue.extend((source, split) for source, _ in node.next_functions)
    return None


class Axes(dict[str | None, int]):
    """The neurons' dimension by pattern on the site's name; the first that matches."""

    def __init__(self, patterns: Mapping[str, int]) -> None:
        super().__init__()
        self.patterns = patterns

    def of(self, name: str) -> int:
        return next(axis for pattern, axis in self.patterns.items() if fnmatch.fnmatchcase(name, pattern))


class NetworkTwin(Twin):
    """The run of a whole network that is counted slowly.

    Args:
        axes: The neurons' dimension by pattern on the site's name.
    """

    def __init__(self, axes: Mapping[str, int]) -> None:
        super().__init__({})
        self.axes = Axes(axes)
        self.widths: dict[str, Width | None] = {}
        self.unit: list[tuple[nn.Module, Tensor, Call]] = []  # the activation module that is running, if one is

    @contextlib.contextmanager
    def attach(self, model: nn.Module) -> Iterator[None]:
        self.stack = []
        self.numbers = {}
        handles = []
        eyes = _Eyes(self)
        for path, module in model.named_modules():
            handles.append(module.register_forward_pre_hook(self._enter(path), with_kwargs=True))
            handles.append(module.register_forward_hook(self._close(eyes)))
        try:
            with eyes:
                yield
        finally:
            for handle in handles:
                handle.remove()

    def _enter(self, path: str) -> Callable[..., None]:
        def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
            if path == "":
                self.numbers.clear()
                self.examples = next(len(value) for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
            self.stack.append((path, module))
            kind = type(module)
            own = kind.__name__ in UNITS or (kind.__module__.startswith(HOMES) and kind.__name__ not in NO_ACTIVATIONS)
            if own and not isinstance(module, NOT_ONE) and not self.unit:
                self.unit.append((module, *self.begin(path or "(root)", args[0], getattr(module, "dim", -1), kind)))

        return enter

    def _close(self, eyes: _Eyes) -> Callable[..., None]:
        def close(module: nn.Module, args: Any, output: Any) -> None:
            self.stack.pop()
            if self.unit and self.unit[0][0] is module:
                _, x, call = self.unit.pop()
                self.end(call, output)
                eyes.outputs.append((x, output, call))

        return close

    def begin(self, base: str, x: Tensor, dimension: int, kind: Any) -> tuple[Tensor, Call]:
        """A site is about to run: remember all but its output, which is yet to come."""
        number = self.numbers[base, ""] = self.numbers.get((base, ""), -1) + 1
        name = f"{base}#{number}" if number else base
        halved = dimension % x.dim() if kind in (nn.GLU, torch.nn.functional.glu) else None
        graded = x.requires_grad and torch.is_grad_enabled()
        if graded and name not in self.widths:
            self.widths[name] = width_of(x)
            if halved is not None and self.widths[name] is not None:
                self.widths[name] = self.widths[name]._replace(split=True)
        edge = get_gradient_edge(x) if graded else None
        axis = self.axes.of(name) % x.dim()
        return x, Call(name, self.name, self.counter, axis, self.examples, x.detach(), edge, halved)

    def end(self, call: Call, y: Tensor) -> None:
        """A site has run."""
        call.output = y.detach().clone()
        self.keep(call)


class _Eyes(TorchFunctionMode):
    """Sees every torch function that is called while the network runs, outside of its activation modules."""

    def __init__(self, twin: NetworkTwin) -> None:
        super().__init__()
        self.twin = twin
        self.outputs: list[tuple[Tensor, Tensor, Call]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        twin = self.twin
        if not twin.stack:
            self.outputs.clear()
        if not twin.stack or twin.unit:
            return func(*args, **kwargs)
        name = twin.functions.get(func)
        if name is not None:
            path = twin.stack[-1][0]
            dimension = args[1] if len(args) > 1 and isinstance(args[1], int) else kwargs.get("dim", -1)
            x, call = twin.begin(
                f"{path}.{name}()" if path else f"{name}()", args[0] if args else kwargs["input"], dimension, func
            )
            y = func(*args, **kwargs)
            twin.end(call, y)
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
                    kept = output.detach().clone()
                    name = f"{call.name}.gated"
                    product = Call(name, call.phase, call.step, call.axis, call.examples, kept, None, None, gate=call)
                    self.twin.keep(product)
                    return
