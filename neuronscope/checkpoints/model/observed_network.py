"""Run a network on several inputs at once, and see what its activation sites were given and gave for each."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from neuronscope.attach.activations import Activation, Registry
from neuronscope.attach.hooks import HookManager
from neuronscope.attach.layer_names import LayerNames
from neuronscope.attach.recorder import SiteRecorder
from neuronscope.attach.site_finder import Call
from neuronscope.checkpoints.model.example_inputs import Example
from neuronscope.checkpoints.model.traced_graph import substitute
from neuronscope.checkpoints.user_code import user_code
from neuronscope.count.neuron_layout import NeuronLayout, neurons_first
from neuronscope.errors import UsageError

__all__ = ["ObservedNetwork", "SiteCall", "SiteCallHooks", "tensors_of"]


class SiteCallHooks(HookManager):
    """A hook manager whose sites have exactly the names that :func:`neuronscope.watch` gives them.

    Args:
        model: The model.
        keep_input: Returns what to keep of a site's input; it is called before an in-place activation overwrites it.
        note: ``note(call, kept, output)``, called at the end of each call of a site, and for each gated product with
            ``kept=None``.
    """

    def __init__(
        self, model: nn.Module, keep_input: Callable[[Tensor], Any], note: Callable[[Call, Any, Tensor], None]
    ) -> None:
        super().__init__(
            model,
            registry=Registry(),
            new_counters=_count_nothing,
            declared_axis=lambda *_: None,
            functional=True,
            tolerance=0.0,
        )
        scripted = self.recorder.unmeasured.reasons
        self.recorder: SiteRecorder = _CallRecorder(
            keep_input, note, names=LayerNames(model), examples=self._examples, masks=self._masks, fail=self.fail
        )
        self.recorder.unmeasured.reasons.update(scripted)


def _count_nothing(*_: Any) -> None:
    """Return no counters, so that nothing is counted."""


class _CallRecorder(SiteRecorder):
    """Passes on each call of a site, and counts nothing."""

    def __init__(
        self, keep_input: Callable[[Tensor], Any], note: Callable[[Call, Any, Tensor], None], **parts: Any
    ) -> None:
        self._begun: list[Any] = []  # what was kept of the calls that have begun, one inside another
        super().__init__(new_counters=_count_nothing, declared_axis=lambda *_: None, tolerance=0.0, **parts)
        self._keep_input = keep_input
        self._note = note

    def restart(self) -> None:
        super().restart()
        self._begun.clear()

    def begin(
        self, path: str, function: str, activation: Activation, x: Any, glu_dim: int | None, traced: bool = False
    ) -> Any:
        call = super().begin(path, function, activation, x, glu_dim, traced)
        if call is not None:
            self._begun.append(self._keep_input(x))
        return call

    def end(self, call: Call, x: Any, y: Any) -> None:
        super().end(call, x, y)
        kept = self._begun.pop()
        if isinstance(y, (tuple, list)) and y:
            y = y[0]
        if isinstance(y, Tensor):
            self._pass_on(call, kept, y)

    def select(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any], y: Any) -> None:
        selected = self.sites.selections.find(self.running_phase, function, args, kwargs, y)
        if selected is not None and selected.call.gate is not None:
            self._pass_on(selected.call, None, y)

    def _pass_on(self, call: Call, kept: Any, y: Tensor) -> None:
        layout = call.layout
        if y.dim() > layout.axis and (layout.dims is None or y.dim() == len(layout.dims)):
            self._note(call, kept, y)


def _named_tensors(tree: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of nested arguments in the order of :func:`substitute`, each named by its place."""
    if isinstance(tree, Tensor):
        yield name, tree
    elif isinstance(tree, (tuple, list, dict)):
        for key, part in tree.items() if isinstance(tree, dict) else enumerate(tree):
            yield from _named_tensors(part, f"{name}.{key}" if name else str(key))


def tensors_of(example: Example) -> dict[str, Tensor]:
    """Return the tensors of an example by the place of the argument.

    >>> list(tensors_of(Example((torch.zeros(1),), {"mask": [torch.zeros(1)]}, "given")))
    ['0', 'mask.0']
    """
    tree = (tuple(example.args), dict(example.kwargs))
    return {name: tensor.detach().cpu() for part in tree for name, tensor in _named_tensors(part)}


class SiteCall(NamedTuple):
    """What one call of a site was given and gave for ``R`` inputs."""

    name: str  # name of the site
    before: Tensor  # its pre-activation, ``(R, P, N)``; of a product, that of its gate
    after: Tensor  # its output, ``(R, P, N)``
    rises: bool  # whether a higher pre-activation is the only way to an output that is not zero


class ObservedNetwork:
    """Runs a network on several inputs at once, and returns what its sites were given and gave.

    ``example`` has the tensors of one input, by name; those of ``R`` inputs are ``(R, *shape)`` each. ``batched`` says
    whether several inputs can be joined along the first dimension of their own; else ``R`` must be 1.
    """

    def __init__(self, model: nn.Module, example: Example) -> None:
        self._model = model
        self._arguments = (tuple(example.args), dict(example.kwargs))
        self._calls: list[tuple[Call, Tensor | None, Tensor]] = []
        self._hooks = SiteCallHooks(model, Tensor.clone, lambda *call: self._calls.append(call))
        self._hooks.recorder.set_phase("search", 0)
        whole = tensors_of(example)
        sizes = {tensor.shape[:1] for tensor in whole.values()}
        self.batched = len(sizes) == 1 and () not in sizes
        self.example = {name: tensor[:1] for name, tensor in whole.items()} if self.batched else whole
        try:
            if self.batched:
                with torch.no_grad():
                    self.run([tensor.expand(3, *tensor.shape) for tensor in self.example.values()])
        except UsageError:
            self.batched, self.example = False, whole

    def close(self) -> None:
        """Take the hooks off the network."""
        self._hooks.detach()

    def run(self, tensors: Sequence[Tensor]) -> list[SiteCall]:
        """Run the network on inputs; an output of which the inputs' parts cannot be told apart is left out."""
        self._calls.clear()
        self._hooks.set_observing(True)
        # Cloned, since the network may change them in place.
        parts = (tensor.flatten(0, 1).clone() if self.batched else tensor[0].clone() for tensor in tensors)
        args, kwargs = substitute(self._arguments, lambda leaf: next(parts) if isinstance(leaf, Tensor) else leaf)
        with user_code("Expected the model to run on an input of the box"):
            self._model(*args, **kwargs)
        if self._hooks.failure is not None:
            raise self._hooks.failure
        found = (self._site_call(*call, len(tensors[0])) for call in self._calls)
        return [call for call in found if call is not None]

    def _site_call(self, call: Call, before: Tensor | None, after: Tensor, rows: int) -> SiteCall | None:
        if before is None and call.gate is not None:
            earlier = (kept for gate, kept, _ in reversed(self._calls) if gate.key == call.gate)
            before = next(earlier, None)
        if before is None or before.shape != after.shape:  # such as GLU, whose input has two halves
            before = after.abs()
        given, gave = (_by_input(tensor, call.layout, rows) for tensor in (before, after))
        if given is None or gave is None:
            return None
        return SiteCall(call.key.name, given, gave, rises=call.activation.name.startswith("relu"))

    def unreliable(self) -> str:
        """Return why the network's outputs do not follow from its input, or ``""``."""
        state = torch.get_rng_state()
        first, second = (self.run([tensor[None] for tensor in self.example.values()]) for _ in range(2))
        pairs = zip(first, second, strict=False)
        same = len(first) == len(second) and all(torch.equal(one.after, other.after) for one, other in pairs)
        if same and torch.equal(state, torch.get_rng_state()):
            return ""
        return "the network gives other outputs when it runs on the same input again"


def _by_input(tensor: Tensor, layout: NeuronLayout, rows: int) -> Tensor | None:
    """Return what each input gave, ``(rows, positions, N)``; ``None`` if that cannot be told."""
    tensor, axis = neurons_first(tensor, *layout)
    tensor = tensor.movedim(axis, -1)
    sizes = tensor.shape[:-1]
    if rows in sizes:
        tensor = tensor.movedim(sizes.index(rows), 0)
    if tensor.numel() == 0 or tensor[..., 0].numel() % rows:
        return None
    return tensor.reshape(rows, -1, tensor.shape[-1])
