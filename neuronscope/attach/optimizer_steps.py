"""Tell when an optimizer has taken a step, by a hook on the optimizer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from neuronscope.errors import UsageError

__all__ = ["OptimizerSteps", "Optimizers", "every_optimizer"]

#: One optimizer, or several.
Optimizers = Optimizer | Sequence[Optimizer]


class OptimizerSteps:
    """Calls a function after each step of an optimizer.

    A step that ``GradScaler`` skips calls nothing. A fused optimizer skips by itself, without telling: its step counts.

    Args:
        optimizer: The optimizer, also one in the wrapper of a framework (Accelerate, Lightning). Of several, the steps
            of the first count. ``None``: nothing is called.

    Raises:
        UsageError: ``optimizer`` is something else.

    >>> import torch
    >>> steps = []
    >>> optimizer = torch.optim.SGD(torch.nn.Linear(1, 1).parameters(), lr=0.1)
    >>> hook = OptimizerSteps(optimizer)
    >>> hook.attach(lambda: steps.append("a step"), fail=print)
    >>> optimizer.step()
    >>> hook.remove()
    >>> optimizer.step()
    >>> steps
    ['a step']
    """

    def __init__(self, optimizer: Optimizers | None) -> None:
        self._optimizer = None if optimizer is None else every_optimizer(optimizer)[0]
        self._handle: RemovableHandle | None = None

    def attach(self, count: Callable[[], Any], *, fail: Callable[[Exception], None]) -> None:
        """Put the hook on the optimizer, if there is one.

        Args:
            count: Called after each step.
            fail: Called with an error of ours, which must not reach the training.
        """

        def after_step(*_: Any) -> None:
            try:
                count()
            except Exception as error:
                fail(error)

        if self._optimizer is not None:
            self._handle = self._optimizer.register_step_post_hook(after_step)

    def __bool__(self) -> bool:
        """Whether the steps of an optimizer are counted."""
        return self._optimizer is not None

    def remove(self) -> None:
        """Take the hook off. Removing it twice is harmless."""
        if self._handle is not None:
            self._handle.remove()


def every_optimizer(optimizer: Any) -> list[Optimizer]:
    """Return one or several optimizers as a list, without the wrappers of frameworks.

    Args:
        optimizer: The optimizer, or a list of them.

    Raises:
        UsageError: It is something else, or an empty list.
    """
    several = [_unwrapped(each) for each in (optimizer if isinstance(optimizer, (list, tuple)) else [optimizer])]
    wrong = [type(each).__name__ for each in several if not isinstance(each, Optimizer)]
    if wrong or not several:
        raise UsageError(
            "Expected argument `optimizer` to be a torch.optim.Optimizer or a list of them, but got "
            f"{wrong[0] if wrong else 'an empty list'}."
        )
    return several


def _unwrapped(optimizer: Any) -> Any:
    while isinstance(getattr(optimizer, "optimizer", None), Optimizer):
        optimizer = optimizer.optimizer
    return optimizer
