"""Hooks on pre-activations that count their gradients, and what becomes of our hooks in a copied model."""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, Protocol

from torch import Tensor
from torch.utils.hooks import RemovableHandle

from neuronscope.attach.compiling import is_tracing, seen_by_modes, unwatched
from neuronscope.attach.row_owners import Owners
from neuronscope.count.counters import SiteCounters
from neuronscope.count.expert_counters import JoinedCounters
from neuronscope.count.neuron_layout import NeuronLayout

#: The counters of one site, or those of the sites of a layer of experts.
Counters = SiteCounters | JoinedCounters
#: Counters, where the neurons lie, and which experts the rows are of.
CountedSite = tuple[Counters | None, NeuronLayout, Owners | None]

__all__ = ["CountedGradient", "Counters", "GradientHook", "Gradients", "InertHook", "RecomputedGradient", "register"]


class Gradients(Protocol):
    """Receives gradients; see :class:`neuronscope.attach.recorder.SiteRecorder`."""

    fail: Callable[[Exception], None]

    def gradient(
        self,
        gradient: Tensor,
        counters: Counters,
        layout: NeuronLayout,
        glu_dim: int | None,
        mask: Tensor | None = None,
        owners: Owners | None = None,
    ) -> None:
        """Count a gradient at a pre-activation.

        Args:
            gradient: Gradient ``(…, N, …)``.
            counters: The counters of the site.
            layout: Where the neurons lie.
            glu_dim: The dimension along which the input is split in two halves (GLU), otherwise ``None``.
            mask: Which positions are counted, bool ``(B, T)``; ``None`` = all.
            owners: Which expert each row is of, if the layer is one of experts.
        """


class InertHook:
    """A hook that copying and pickling replace by a function of the standard library that does nothing."""

    def __deepcopy__(self, memo: Any) -> Any:
        return contextlib.nullcontext().__exit__

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (contextlib.nullcontext(), "__exit__")


class GradientHook(InertHook):
    """A hook on a pre-activation that counts the gradient that arrives there.

    Args:
        recorder: Receives the gradient.
        place: Where the activation is applied: the path of a module, and the function or ``""``.
        glu_dim: The dimension along which the input is split in two halves (GLU), otherwise ``None``.
    """

    __torch_unserializable__ = True  # torch saves a tensor without this hook, and does not warn

    def __init__(self, recorder: Gradients, place: tuple[str, str], glu_dim: int | None) -> None:
        self.recorder = recorder
        self.place = place
        self.glu_dim = glu_dim
        self.mask: Tensor | None = None
        self.site: CountedSite | None = None  # if it is known

    def find_site(self) -> CountedSite:
        """Return the site if it was not known when the hook was made."""
        raise NotImplementedError

    def __call__(self, gradient: Tensor | None) -> None:
        """Count the gradient; it is ``None`` if only another part of a split tensor was used."""
        if gradient is None:
            return
        counters, layout, owners = self.site or self.find_site()
        if counters is not None and counters.open:
            try:
                traced = is_tracing()
                if type(gradient) is Tensor and not (traced or seen_by_modes()):
                    self.recorder.gradient(gradient, counters, layout, self.glu_dim, self.mask, owners)
                    return
                with unwatched(traced):
                    self.recorder.gradient(gradient, counters, layout, self.glu_dim, self.mask, owners)
            except Exception as error:
                self.recorder.fail(error)


class CountedGradient(GradientHook):
    """The hook for a call whose site was known when the call was made; one hook serves all calls of the site."""

    def __init__(
        self,
        recorder: Gradients,
        place: tuple[str, str],
        glu_dim: int | None,
        counters: Counters,
        layout: NeuronLayout,
    ) -> None:
        super().__init__(recorder, place, glu_dim)
        self.counters, self.layout = counters, layout
        self.site = counters, layout, None

    def with_mask(self, mask: Tensor) -> CountedGradient:
        """Return a hook for a call of a forward that was given a mask.

        Args:
            mask: Which positions are counted, bool ``(B, T)``.
        """
        hook = CountedGradient(self.recorder, self.place, self.glu_dim, self.counters, self.layout)
        hook.mask = mask
        return hook

    def with_owners(self, owners: Owners, mask: Tensor | None) -> CountedGradient:
        """Return a hook for a call of a layer of experts.

        Args:
            owners: Which expert each row is of.
            mask: Which rows are counted, bool ``(R, 1)``; ``None`` = all.
        """
        hook = CountedGradient(self.recorder, self.place, self.glu_dim, self.counters, self.layout)
        hook.site, hook.mask = (self.counters, self.layout, owners), mask
        return hook


class RecomputedGradient(GradientHook):
    """The hook for a call that is made again in a backward pass; its site is known only when its gradient arrives."""

    def __init__(
        self,
        recorder: Gradients,
        place: tuple[str, str],
        glu_dim: int | None,
        site: Callable[[], CountedSite],
    ) -> None:
        super().__init__(recorder, place, glu_dim)
        self._find = site

    def find_site(self) -> CountedSite:
        """Return what is known now."""
        return self._find()


def register(x: Tensor, hook: GradientHook) -> RemovableHandle | None:
    """Register a hook on a tensor that requires a gradient, as ``x.register_hook`` does, but quicker.

    ``x.register_hook`` spends most of its time on a handle, which is not needed if the tensor does not outlive its
    step. The order matters. If the base of a view was changed in place, reading ``grad_fn`` gives the view a new node,
    which has none of the hooks that were registered before. Torch 2.13's own method reads it last, and crashes.

    Args:
        x: The tensor.
        hook: The hook.

    Returns:
        The handle of a leaf, which outlives its step, or of a tensor that had hooks already; otherwise ``None``.

    >>> import torch
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
    hooks[hook] = hook  # handles use numbers as keys, so this key is free
    return None
