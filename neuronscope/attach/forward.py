"""Track one forward pass: the stack of running modules, the number of each call, and what is known of each tensor.

A *forward* is one outermost call of a watched module, normally of the model. Calls of a reused module are numbered
within a forward. A training step may also apply activations outside of every module call, as a Lightning
``training_step`` does that writes ``F.relu(self.fc(x))``. Those calls are numbered from one optimizer step or backward
pass to the next.

In the phase ``train``, a forward that begins without gradients is *inference*: a reference pass, a target network, a
rollout, generation. What a forward with gradients runs under ``no_grad`` is a part of it.

``torch.compile`` can trace everything here. What changes within a forward is kept in lists and dicts, because the
compiler tracks these more reliably than attributes.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction

from neuronscope.attach.compiling import has_real_tensors, in_backward, is_tracing
from neuronscope.attach.dtensor import local_tensor
from neuronscope.attach.neuron_flow import NeuronFlow
from neuronscope.attach.tensor_map import TensorMap
from neuronscope.sites import SiteKey

__all__ = ["INFERENCE", "ForwardContext", "Recomputation", "first_tensor"]

#: The phase of forwards that begin without gradients while the phase is ``train``.
INFERENCE = "inference"

Place = tuple[str, str]  # path of a module, and name of a function or ""


class ForwardContext:
    """Tracks the forward that is running. One instance serves all forwards of a model, one after another.

    Attributes:
        module_stack: Paths of the watched modules that are running, the innermost last.
        flow: Where the neurons of each tensor lie.
        roles: Which tensors are the input or the output of a site.
        examples: Number of examples that the forward was given.
        recomputing: Whether the forward runs again inside a backward pass.
        exporting: Whether the forward is recorded for export, so that its tensors hold no numbers.
        explicit_step: Whether :meth:`neuronscope.scope.Scope.open_step` marked where the training step begins.
        training: Whether the phase is ``train``, in which forwards without gradients are inference.
        step_is_forward: Whether the training step runs inside the forward of the root, as Lightning's does under DDP.
            The forwards that the step makes are then one level deeper.
        ran_root: Whether the model's own forward was seen.
        ran_parts: Whether parts of the model were called outside of its forward and of an explicit step.
        recomputation: Tells which call of the forward a recomputed call repeats.
    """

    def __init__(self) -> None:
        self.module_stack: list[str] = []
        self.flow = NeuronFlow()
        self.roles: TensorMap[tuple[Any, ...]] = TensorMap("role")
        self.examples = 0
        self.recomputing = False
        self.exporting = False
        self.explicit_step = False
        self.training = False
        self.step_is_forward = False
        self.ran_root = False
        self.ran_parts = False
        self.recomputation = Recomputation()
        self._graded = True
        self._inference = False
        self._examples_of_step = 0
        self._keys: dict[Place, list[SiteKey]] = {}  # of each place, in the order of the calls
        self._calls: dict[Place, int] = {}
        self._outside_calls: dict[Place, int] = {}

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
            self.forget()
            self._calls.clear()
            self.recomputing = in_backward()
            self.exporting = not has_real_tensors()
            self._graded = torch.is_grad_enabled()
            if path == "":
                self.ran_root = True
            elif not self.explicit_step:
                self.ran_parts = True
            self._inference = self._begins_inference()
            if not self._graded and not self.recomputing and not self._inference:
                self.recomputation.clear()  # no backward pass will come
            self.examples = _examples((args, kwargs))
        elif self._runs_only_step and self._begins_inference():
            self._inference = True
            self._examples_of_step, self.examples = self.examples, _examples((args, kwargs))
        self.module_stack.append(path)
        return outermost

    @property
    def _runs_only_step(self) -> bool:
        """Whether a training step runs inside the forward of the root, and no forward that the step makes."""
        return self.step_is_forward and self.module_stack == [""]

    @property
    def inference(self) -> bool:
        """Whether what runs now is inference: the phase is ``train``, and its forward began without gradients."""
        if self.module_stack and not self._runs_only_step:
            return self._inference
        return self._begins_inference()

    def _begins_inference(self) -> bool:
        if not self.training or torch.is_grad_enabled() or in_backward():
            return False
        return is_tracing() or not _in_autograd_function()

    def leave(self) -> bool:
        """Note that a watched module has ended or failed, and return whether the forward ended with it."""
        if self.module_stack:
            self.module_stack.pop()
        if self.module_stack:
            if self._inference and self._runs_only_step:
                self._inference, self.examples = False, self._examples_of_step
            return False
        self.forget()
        return True

    def number(self, path: str, function: str) -> SiteKey:
        """Return the key of the call that begins now.

        Args:
            path: Path of the module that applies the activation.
            function: Name of the function for a functional site, otherwise ``""``.
        """
        place = (path, function)
        if not self.module_stack and not torch.is_grad_enabled() and (not self.explicit_step or self.inference):
            return self._key(place, 0)  # no step and no backward pass will tell one forward from the next
        calls = self._calls if self.module_stack else self._outside_calls
        call = calls.get(place, 0)
        calls[place] = call + 1
        if self.module_stack and self._graded and not torch.is_grad_enabled():
            self.recomputation.add(place, call)
        return self._key(place, call)

    def _key(self, place: Place, call: int) -> SiteKey:
        if is_tracing():
            return SiteKey(*place, call, False)
        keys = self._keys.setdefault(place, [])
        while len(keys) <= call:
            keys.append(SiteKey(*place, len(keys), False))
        return keys[call]

    def forget(self) -> None:
        """Forget what is known of every tensor."""
        self.flow.clear()
        self.roles.clear()

    def restart(self) -> None:
        """Start again: an optimizer step is over, or a forward did not end."""
        self.module_stack.clear()
        self._calls.clear()
        self._outside_calls.clear()
        self.recomputing = False
        self.exporting = False
        self.recomputation.clear()
        self.forget()

    def restart_outside_calls(self) -> None:
        """Number the calls outside of modules from zero: a backward pass has ended the forward they belong to."""
        self._outside_calls.clear()


class Recomputation:
    """Finds the call that a recomputed call repeats: reentrant activation checkpointing runs its segments again.

    The last segment comes first. The first forward runs without gradients, so that only the recomputed calls can
    receive them. The calls of a module that several segments share are numbered from zero again in each recomputed
    segment. When the gradients of a segment arrive, all its calls have been made, and they are the last calls
    of the forward that were not yet repeated.

    >>> due = Recomputation()
    >>> for call in (0, 1, 2):
    ...     due.add(("relu", ""), call)
    >>> due.next_number(("relu", "")), due.next_number(("relu", ""))
    (0, 1)
    >>> due.forward_call(("relu", ""), 0), due.forward_call(("relu", ""), 1)
    (1, 2)
    >>> due.next_number(("relu", "")), due.forward_call(("relu", ""), 0)
    (0, 0)
    """

    def __init__(self) -> None:
        self._due: dict[Place, list[int]] = {}
        self._made: dict[Place, int] = {}
        self._fired = False

    def add(self, place: Place, call: int) -> None:
        """Note a call that was made without gradients, inside a forward that has them.

        Args:
            place: Path and function of the site.
            call: Number of the call in the forward.
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

    def forward_call(self, place: Place, number: int) -> int:
        """Return the number in the forward of a call of the recomputed segment; called when its gradient has arrived.

        Args:
            place: Path and function of the site.
            number: Number of the call within the segment.
        """
        self._fired = True
        due, made = self._due.get(place, []), self._made.get(place, 0)
        return due[number - made] if made <= len(due) and number < made else number

    def clear(self) -> None:
        """Forget all calls: an optimizer step is over."""
        self._due.clear()
        self._made.clear()
        self._fired = False


def _in_autograd_function() -> bool:
    """Whether the ``forward`` of an ``autograd.Function`` runs, such as the first run of reentrant checkpointing.

    Torch turns gradients off in it, and they arrive nevertheless.
    """
    frame = sys._getframe(1).f_back
    while frame is not None:
        code = frame.f_code
        named = code.co_name == "forward" and code.co_argcount > 0 and code.co_varnames[0] != "self"
        if named and isinstance(frame.f_locals.get(code.co_varnames[0]), BackwardCFunction):
            return True
        frame = frame.f_back
    return False


def _examples(values: Any) -> int:
    """Return the length of the first tensor in nested tuples, lists and mappings; 1 if there is none."""
    tensor = first_tensor(values)
    return local_tensor(tensor).size(0) if tensor is not None and tensor.dim() > 0 else 1


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
