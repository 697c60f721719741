"""Pass the input and the output of every call of an activation site to a function, and count nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from neuronscope.attach.activations import Activation, Registry
from neuronscope.attach.hooks import HookManager
from neuronscope.attach.layer_names import LayerNames
from neuronscope.attach.recorder import SiteRecorder
from neuronscope.attach.site_finder import Call

__all__ = ["SiteCallHooks"]


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
