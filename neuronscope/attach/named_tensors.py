"""Count tensors that the user names: ``scope.count("latents", tensor)``, in eager code and in compiled graphs.

Such a tensor is a site whatever gave it: a function that is not known as an activation, or one that was called outside
of every module's forward.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from neuronscope.attach.activations import KINDS
from neuronscope.attach.compiling import (
    comptime,
    has_real_tensors,
    is_tracing,
    operator_around,
    unwatched,
    while_tracing,
)
from neuronscope.attach.unsupported import IN_OPERATOR, IN_TRANSFORM, describe_input, in_transform
from neuronscope.errors import UsageError, warn_user
from neuronscope.sites import NAMED_TENSOR

if TYPE_CHECKING:
    from neuronscope.attach.hooks import HookManager
    from neuronscope.attach.site_finder import Call

__all__ = ["NamedTensor", "NamedTensors"]


class NamedTensor(NamedTuple):
    """What the user says of a tensor.

    Attributes:
        name: Its name, which is that of the site.
        axis: The dimension that indexes its neurons; negative ones count from the end.
        kind: One of :data:`neuronscope.attach.activations.KINDS`.

    Raises:
        UsageError: See :meth:`check`.
    """

    name: str
    axis: int
    kind: str

    def check(self) -> None:
        """Check the arguments.

        Raises:
            UsageError: One has a wrong type or value.
        """
        if not isinstance(self.name, str) or not self.name:
            raise UsageError(f"Expected argument `name` of a tensor to be a non-empty string, but got {self.name!r}.")
        if not isinstance(self.axis, int) or isinstance(self.axis, bool):
            raise UsageError(f"Expected argument `axis` to be the dimension of the neurons, but got {self.axis!r}.")
        if self.kind not in KINDS:
            raise UsageError(f"Expected argument `kind` to be one of {', '.join(KINDS)}, but got {self.kind!r}.")


class NamedTensors:
    """Counts the tensors that the user names.

    Args:
        manager: The hooks of the watched model.
    """

    def __init__(self, manager: HookManager) -> None:
        self._manager = manager
        self._recorder = manager.recorder
        self._refused: set[str] = set()
        self._find_while_tracing = while_tracing(
            self._find_traced, "phase", "named", "y", "pre", listener=manager.recorder.graphs
        )

    def count(self, named: NamedTensor, y: Any, pre: Any) -> None:
        """Count a tensor, and the gradient that will arrive at its pre-activation.

        Args:
            named: What the user says of it.
            y: The tensor ``(…, N, …)``.
            pre: Its pre-activation, of the same shape; ``None`` = the tensor itself.
        """
        manager = self._manager
        if is_tracing():
            if manager.observing:
                self._count_in_graph(named, y, pre)
            return
        named.check()
        if not manager.is_attached() or not (manager.observing or manager.thread.here != threading.get_ident()):
            return
        if not manager.watches_here(False, begins=True):
            return
        try:
            with unwatched():
                self._count(named, y, pre)
        except Exception as error:  # noqa: BLE001  # the training goes on
            manager.fail(error)
        finally:
            manager.end_outside()

    def _count(self, named: NamedTensor, y: Any, pre: Any) -> None:
        recorder = self._recorder
        if recorder.forward.exporting or not has_real_tensors() or self._is_refused(named, y, pre):
            return
        if in_transform(y):
            recorder.unmeasured.note(named.name, IN_TRANSFORM)
            return
        recorder.count_named(
            lambda phase: self._find(phase, named, y, traced=False),
            (named.name, NAMED_TENSOR),
            y,
            y if pre is None else pre,
        )

    def _count_in_graph(  # `comptime` reads its arguments and variables
        self,
        named: NamedTensor,  # noqa: ARG002
        y: Any,
        pre: Any,
    ) -> None:
        phase = self._recorder.running_phase  # noqa: F841
        comptime(self._find_while_tracing)
        self._recorder.graphs.count_named(y, y if pre is None else pre)

    def _find_traced(self, phase: str, named: Any, y: Any, pre: Any) -> None:
        named = NamedTensor(*named)
        pre = pre if isinstance(pre, Tensor) else None
        call = None
        if torch._C._functorch.maybe_current_level() is not None:
            self._recorder.unmeasured.note(named.name, IN_TRANSFORM)
        elif operator := operator_around():
            self._recorder.unmeasured.note(named.name, IN_OPERATOR.format(operator))
        elif not self._is_refused(named, y, pre):
            call = self._find(phase, named, y, traced=True)
        self._recorder.graphs.find_named(call, y if pre is None else pre)

    def _find(self, phase: str, named: NamedTensor, y: Tensor, *, traced: bool) -> Call | None:
        axis = named.axis % y.dim()
        call, reason = self._recorder.sites.find_named(phase, named.name, axis, named.kind, y, traced=traced)
        if reason:
            self._refuse(named.name, reason)
        return call

    def _is_refused(self, named: NamedTensor, y: Any, pre: Any) -> bool:
        """Whether the tensor cannot be counted, after saying why."""
        reason = ""
        if not isinstance(y, Tensor) or not y.is_floating_point() or y.dim() == 0:
            reason = f"expected a tensor of floating-point numbers with dimensions, but got {describe_input(y)}"
        elif not -y.dim() <= named.axis < y.dim():
            reason = f"expected `axis` to be a dimension of the tensor, but got {named.axis} for shape {tuple(y.shape)}"
        elif pre is not None and (not isinstance(pre, Tensor) or pre.shape != y.shape):
            given = f"shape {tuple(pre.shape)}" if isinstance(pre, Tensor) else describe_input(pre)
            reason = f"expected `pre` to be a tensor of shape {tuple(y.shape)}, but got {given}"
        if reason:
            self._refuse(named.name, reason)
        return bool(reason)

    def _refuse(self, name: str, reason: str) -> None:
        """Note why a tensor is not counted, and warn once for each name; the training goes on."""
        self._recorder.unmeasured.note(name, reason)
        if name not in self._refused:
            self._refused.add(name)
            warn_user(f"`scope.count({name!r}, …)` counts nothing: {reason}. Training goes on.")
