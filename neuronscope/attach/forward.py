"""Track one forward pass: the stack of running modules, the examples that it was given, and what each tensor is.

A *forward* is one outermost call of a watched module, normally of the model. A training step may also apply activations
outside of every module call, as a Lightning ``training_step`` does that writes ``F.relu(self.fc(x))``. What is known of
tensors is kept until the model's own forward begins again, or the optimizer step is over.

``torch.compile`` can trace what keeps the stack of modules. What looks at tensors is run while it traces; see
:class:`neuronscope.attach.compiling.while_tracing`.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointFunction

from neuronscope.attach.compiling import comptime, has_real_tensors, in_backward, is_tracing, while_tracing
from neuronscope.attach.dtensor import local_tensor
from neuronscope.attach.layer_names import LayerNames
from neuronscope.attach.neuron_flow import NeuronFlow
from neuronscope.attach.origins import Origin

__all__ = ["ForwardContext", "Recomputation", "first_tensor", "gradients_on"]

Place = tuple[str, str]  # path of a module, and name of a function or ""

#: Number of calls of layers after which the flow is cleared at the next outermost call, whatever that is.
_MOST_CALLS = 10_000


class ForwardContext:
    """Tracks the forward that is running. One instance serves all forwards of a model, one after another.

    Args:
        names: The layers of the model's weights.

    Attributes:
        module_stack: Paths of the watched modules that are running, the innermost last.
        flow: What each tensor is.
        number: Number of the forward.
        examples: Number of examples that the forward was given.
        recomputing: Whether the forward runs again inside a backward pass.
        exporting: Whether the forward is recorded for export, so that its tensors hold no numbers.
        explicit_step: Whether :meth:`neuronscope.scope.Scope.open_step` marked where the training step begins.
        ran_root: Whether the model's own forward was seen.
        ran_parts: Whether parts of the model were called outside of its forward and of an explicit step.
        recomputation: Tells which call of the forward a recomputed call repeats.
    """

    def __init__(self, names: LayerNames) -> None:
        self.module_stack: list[str] = []
        self.flow = NeuronFlow(names)
        self.number = 0
        self.examples = 0
        self.recomputing = False
        self.exporting = False
        self.explicit_step = False
        self.ran_root = False
        self.ran_parts = False
        self.recomputation = Recomputation()
        self.graded = True
        self._ordinals: dict[tuple[Any, ...], int] = {}
        self._begin_while_tracing = while_tracing(self._begin, "path", "args", "kwargs")

    @property
    def current_path(self) -> str:
        """Path of the innermost watched module that is running; ``""`` for the root and outside of all modules."""
        return self.module_stack[-1] if self.module_stack else ""

    def enter(self, path: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
        """Note that a watched module begins to run.

        Args:
            path: Path of the module.
            args: Positional arguments of its forward.
            kwargs: Keyword arguments of its forward.

        Returns:
            Whether a forward begins with it.
        """
        outermost = not self.module_stack
        if outermost:
            self.recomputing = in_backward()
            self.exporting = not has_real_tensors()
            self.graded = gradients_on()
            if path == "":
                self.ran_root = True
            elif not self.explicit_step:
                self.ran_parts = True
            if not self.graded and not self.recomputing:
                self.recomputation.clear()  # no backward pass will come
            if is_tracing():
                comptime(self._begin_while_tracing)
            elif not self.recomputing:
                self._begin(path, args, kwargs)
            tensor = first_tensor((args, kwargs))
            self.examples = local_tensor(tensor).size(0) if tensor is not None and tensor.dim() > 0 else 1
        self.module_stack.append(path)
        return outermost

    def _begin(self, path: str, args: Any, kwargs: Any) -> None:
        """Forget the tensors of the last forward, and note the inputs of this one."""
        self.number += 1
        if (path == "" and not self.explicit_step) or len(self.flow.layers) > _MOST_CALLS:
            self.forget()
        self.flow.note_inputs((args, kwargs))

    def leave(self) -> bool:
        """Note that a watched module has ended or failed, and return whether the forward ended with it."""
        if self.module_stack:
            self.module_stack.pop()
        return not self.module_stack

    def ordinal(self, origin: Origin, activation: str) -> int:
        """Return the number of an activation among those of its name that the same units of one call are given to.

        Args:
            origin: What it is given.
            activation: Its name.
        """
        place = (origin.unit_set, activation)
        found = self._ordinals.get(place, 0)
        self._ordinals[place] = found + 1
        return found

    def forget(self) -> None:
        """Forget what is known of every tensor."""
        self.flow.clear()
        self._ordinals.clear()

    def restart(self) -> None:
        """Start again: an optimizer step is over, or a forward did not end."""
        self.module_stack.clear()
        self.recomputing = False
        self.exporting = False
        self.recomputation.clear()
        self.forget()


class Recomputation:
    """Finds the call that a recomputed call repeats: reentrant activation checkpointing runs its segments again.

    The last segment comes first. The first forward runs without gradients, so that only the recomputed calls can
    receive them. The calls of a module that several segments share are numbered from zero again in each recomputed
    segment. When the gradients of a segment arrive, all its calls have been made, and they are the last calls
    of the forward that were not yet repeated.

    >>> due = Recomputation()
    >>> for call in ("first", "second", "third"):
    ...     due.add(("relu", ""), call)
    >>> due.next_number(("relu", "")), due.next_number(("relu", ""))
    (0, 1)
    >>> due.forward_call(("relu", ""), 0), due.forward_call(("relu", ""), 1)
    ('second', 'third')
    >>> due.next_number(("relu", "")), due.forward_call(("relu", ""), 0)
    (0, 'first')
    """

    def __init__(self) -> None:
        self._due: dict[Place, list[Any]] = {}
        self._made: dict[Place, int] = {}
        self._fired = False

    def add(self, place: Place, call: Any) -> None:
        """Note a call that was made without gradients, inside a forward that has them.

        Args:
            place: Path and function of the site.
            call: The call; ``None`` if it is not counted.
        """
        self._due.setdefault(place, []).append(call)

    def next_number(self, place: Place) -> int:
        """Note a call that is made in a backward pass, and return its number within the recomputed segment."""
        if self._fired:  # gradients have arrived since: another segment begins
            for done, count in self._made.items():
                del self._due.get(done, [])[-count:]
            self._made.clear()
            self._fired = False
        number = self._made.get(place, 0)
        self._made[place] = number + 1
        return number

    def forward_call(self, place: Place, number: int) -> Any:
        """Return the call of the forward that a call of the recomputed segment repeats, or ``None``.

        It is asked for when the gradient of the call has arrived.

        Args:
            place: Path and function of the site.
            number: Number of the call within the segment.
        """
        self._fired = True
        due, made = self._due.get(place, []), self._made.get(place, 0)
        return due[number - made] if made <= len(due) and number < made else None

    def clear(self) -> None:
        """Forget all calls: an optimizer step is over."""
        self._due.clear()
        self._made.clear()
        self._fired = False


def gradients_on() -> bool:
    """Whether a forward that begins now is one of training: gradients are on, or a reentrant checkpoint runs it."""
    return torch.is_grad_enabled() or (not is_tracing() and _in_checkpoint(sys._getframe(1)))


def _in_checkpoint(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code is CheckpointFunction.forward.__code__:
            return True
        frame = frame.f_back
    return False


def first_tensor(values: Any) -> Tensor | None:
    """Return the first tensor in nested tuples, lists and mappings, or ``None``."""
    if isinstance(values, Tensor):
        return values
    if isinstance(values, Mapping):
        values = list(values.values())
    if isinstance(values, (tuple, list)):
        for value in values:
            found = first_tensor(value)
            if found is not None:
                return found
    return None
