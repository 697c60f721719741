"""Hooks on pre-activations, asked for their gradients; and what becomes of any hook of ours in a copied model."""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, Protocol

from torch import Tensor
from torch.utils.hooks import RemovableHandle

from neuronscope.attach.compiling import unwatched
from neuronscope.count.counters import SiteCounters

__all__ = ["CountedGradient", "GradientHook", "Gradients", "InertHook", "RecomputedGradient", "register"]


class Gradients(Protocol):
    """Where gradients go: a :class:`neuronscope.attach.recorder.SiteRecorder`."""

    fail: Callable[[Exception], None]

    def gradient(self, gradient: Tensor, counters: SiteCounters, axis: int, glu_dim: int | None) -> None:
        """The gradient at a pre-activation has come."""


class InertHook:
    """A hook that a copied or pickled model carries only as a function of the standard library that does nothing."""

    def __deepcopy__(self, memo: Any) -> Any:
        return contextlib.nullcontext().__exit__

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (contextlib.nullcontext(), "__exit__")


class GradientHook(InertHook):
    """Asked of a pre-activation: counts the gradient that comes to it."""

    __torch_unserializable__ = True  # a tensor that bears this hook may be saved without it, and without a warning

    def __init__(self, recorder: Gradients, place: tuple[str, str], glu_dim: int | None) -> None:
        self.recorder = recorder
        self.place = place
        self.glu_dim = glu_dim

    def site(self) -> tuple[SiteCounters | None, int]:
        """Where to count, and the neurons' dimension."""
        raise NotImplementedError

    def __call__(self, gradient: Tensor | None) -> None:
        """The gradient has come."""
        # No gradient comes where only another part of a split tensor was used.
        if gradient is None:
            return
        counters, axis = self.site()
        if counters is not None and counters.open:
            try:
                with unwatched():
                    self.recorder.gradient(gradient, counters, axis, self.glu_dim)
            except Exception as error:
                self.recorder.fail(error)


class CountedGradient(GradientHook):
    """Of a call that was numbered when it was made: one hook for all such calls."""

    def __init__(
        self, recorder: Gradients, place: tuple[str, str], glu_dim: int | None, counters: SiteCounters, axis: int
    ) -> None:
        super().__init__(recorder, place, glu_dim)
        self.counters = counters
        self._site = (counters, axis)

    def site(self) -> tuple[SiteCounters | None, int]:
        """As it was when the call was made."""
        return self._site


class RecomputedGradient(GradientHook):
    """Of a call that is made again in a backward pass: which one it is, is known when its gradient comes."""

    def __init__(
        self,
        recorder: Gradients,
        place: tuple[str, str],
        glu_dim: int | None,
        site: Callable[[], tuple[SiteCounters | None, int]],
    ) -> None:
        super().__init__(recorder, place, glu_dim)
        self._find = site

    def site(self) -> tuple[SiteCounters | None, int]:
        """As it is found now."""
        return self._find()


def register(x: Tensor, hook: GradientHook) -> RemovableHandle | None:
    """Put a hook on a tensor that requires a gradient, as ``x.register_hook`` does, but quicker.

    Most of that method's time goes into a handle, which is of no use where the tensor dies with its step. The order
    matters: a view whose base was changed in place is given a new node when it is asked for one, without the hooks that
    it had by then. Torch 2.13's own method asks last, and crashes.

    Returns:
        The handle, where it was made: of a leaf, which outlives its step, and of a tensor that bears hooks already.

    >>> seen: list[Tensor] = []
    >>> class Note(GradientHook):
    ...     def __call__(self, gradient: Tensor | None) -> None:
    ...         seen.append(gradient)
    >>> x = torch.ones(2, requires_grad=True) * 1
    >>> register(x, Note(None, ("relu", ""), None))
    >>> (3 * x).sum().backward()
    >>> seen
    [tensor([3., 3.])]
    """
    node = x.grad_fn  # before anything else
    if node is None or x._backward_hooks is not None:
        handle: RemovableHandle = x.register_hook(hook)
        return handle
    hooks: OrderedDict[Any, Any] = OrderedDict()
    x._backward_hooks = hooks
    node._register_hook_dict(x)
    hooks[hook] = hook  # the keys of handles are numbers: none of them is this one
    return None
