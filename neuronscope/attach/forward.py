"""Track one forward pass: the stack of running modules, the examples that it was given, and what each tensor is.

A *forward* is one outermost call of a watched module, normally of the model. A training step may also apply activations
outside of every module call, as a Lightning ``training_step`` does that writes ``F.relu(self.fc(x))``. What is known of
tensors is kept until the model's own forward begins again, or the optimizer step is over.

In the phase ``train``, a forward that begins without gradients is *inference*: a reference pass, a target network, a
rollout, generation. What a forward with gradients runs under ``no_grad`` is a part of it.

``torch.compile`` can trace what keeps the stack of modules. What looks at tensors is run while it traces; see
:class:`neuronscope.attach.compiling.while_tracing`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from neuronscope.attach.compiled_parts import CompiledParts
from neuronscope.attach.compiling import (
    comptime,
    has_real_tensors,
    in_autograd_function,
    in_backward,
    in_body,
    is_tracing,
    unwatched,
    while_tracing,
)
from neuronscope.attach.examples import ExampleCounter
from neuronscope.attach.layer_names import LayerNames
from neuronscope.attach.masks import PositionMask
from neuronscope.attach.neuron_flow import NeuronFlow
from neuronscope.attach.ordinals import Ordinals

__all__ = ["ForwardContext", "Recomputation"]

Place = tuple[str, str]  # path of a module, and name of a function or ""

#: Number of calls of layers after which the flow is cleared at the next outermost call, whatever that is.
_MOST_CALLS = 10_000


class ForwardContext:
    """Tracks the forward that is running. One instance serves all forwards of a model, one after another.

    Args:
        names: The layers of the model's weights.
        counter: Counts the examples that a forward is given.
        masks: Finds the mask of positions that a forward is given.

    Attributes:
        module_stack: Paths of the watched modules that are running, the innermost last.
        flow: What each tensor is.
        ordinals: The numbers of the activations.
        parts: The compiled parts of the model.
        begun: How many forwards began so far, and passes that count as one.
        number: Number of the forward.
        number_tensor: The same as a tensor, for graphs of parts of the model: int64, without dimensions.
        examples: Number of examples that the forward was given.
        mask: Which positions are counted, bool ``(B, T)``; ``None`` = all.
        recomputing: Whether the forward runs again inside a backward pass.
        exporting: Whether the forward is recorded for export, so that its tensors hold no numbers.
        explicit_step: Whether :meth:`neuronscope.scope.Scope.open_step` marked where the training step begins.
        training: Whether the phase is ``train``, in which forwards without gradients are inference.
        step_is_forward: Whether the training step runs inside the forward of the root, as Lightning's does under DDP.
            The forwards that the step makes are then one level deeper.
        ran: Whether the model, a part of it or an activation was seen to run.
        ran_root: Whether the model's own forward was seen.
        ran_parts: Whether parts of the model were called outside of its forward and of an explicit step.
        restarts_at_parts: Whether a part of the model that runs again begins a new pass.
        ran_alone: Whether an activation was called outside of all other modules, and of an explicit step.
        began_inference: Whether the forward that runs is inference, if a training step does not run inside the root's.
        recomputation: Tells which call of the forward a recomputed call repeats.
    """

    def __init__(self, names: LayerNames, counter: ExampleCounter, masks: PositionMask) -> None:
        self._counter = counter
        self._masks = masks
        self.mask: Tensor | None = None
        self.module_stack: list[str] = []
        self.flow = NeuronFlow(names)
        self.begun = self.number = 0
        with torch.inference_mode(False):
            self.number_tensor = torch.zeros((), dtype=torch.int64, device="cpu")
        self.examples = 0
        self.recomputing = False
        self.exporting = False
        self.explicit_step = False
        self.training = False
        self.step_is_forward = False
        self.ran = False
        self.ran_root = False
        self.ran_parts = False
        self.ran_alone = False
        self.restarts_at_parts = False
        self._ran: list[str] = []  # paths of the outermost modules of this pass, if parts that run again begin passes
        self.recomputation = Recomputation()
        self._graded = True
        self.began_inference = False
        self._examples_of_step = 0
        self._step: tuple[int, int] | None = None  # number and examples of a training step that says what it was given
        self.ordinals = Ordinals()
        self.parts = CompiledParts(self.flow, self.ordinals)
        self._note_outputs_while_tracing = while_tracing(self.flow.note_outputs, "output")
        self._begin_while_tracing = while_tracing(self._begin, "path", "args", "kwargs")

    @property
    def current_path(self) -> str:
        """Path of the innermost watched module that is running; ``""`` for the root and outside of all modules."""
        return self.module_stack[-1] if self.module_stack else ""

    def enter(self, path: str, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
        """Note that a watched module begins to run.

        Args:
            path: Path of the module.
            module: The module.
            args: Positional arguments of its forward.
            kwargs: Keyword arguments of its forward.

        Returns:
            Whether a forward begins with it.
        """
        outermost = not self.module_stack
        if outermost:
            traced = is_tracing()
            self.recomputing = in_backward(traced)
            self.exporting = not has_real_tensors(traced)
            self._graded = torch.is_grad_enabled()
            self.ran = True
            if path == "":
                self.ran_root = True
            elif not self.explicit_step:
                self.ran_parts = True
            self.began_inference = not self._graded and self._begins_inference()
            if self.exporting and not traced:  # torch.jit.trace would record what we ask of tensors
                self.module_stack.append(path)
                return True
            if not self._graded and not self.recomputing and not self.training:
                self.recomputation.clear()  # no backward pass will come
            if traced:
                comptime(self._begin_while_tracing)
            elif not self.recomputing:
                self._begin(path, args, kwargs)
            mask = self._masks.find(module, args, kwargs)
            if traced or mask is not None or self.mask is not None or self.flow.row_masks.mask is not None:
                self._set_mask(mask)
            if self._step is not None and not self.began_inference and not traced:
                self._take_step(self._step)
            else:
                self.examples = self._counter.count(module, args, kwargs) or 0
        elif self._runs_only_step:
            self._set_mask(self._masks.find(module, args, kwargs))
            if self._begins_inference():
                self.began_inference = True
                self._examples_of_step, self.examples = self.examples, self._counter.count(module, args, kwargs) or 0
        self.module_stack.append(path)
        return outermost

    def _set_mask(self, mask: Tensor | None) -> None:
        self.mask = mask
        if not is_tracing():
            self.flow.row_masks.mask = mask

    def begin_outside(self, x: Tensor) -> None:
        """Note that a tensor is counted; outside of every forward and step its rows are the examples.

        Args:
            x: The tensor.
        """
        if self.module_stack or self._step is not None:
            return
        self.begun += 1
        self._set_number(self.begun)
        self.examples = self._counter.count_step((x,)) or 0
        if not self.explicit_step:
            self._set_mask(None)

    def begin_step(self, inputs: tuple[Any, ...]) -> None:
        """Note what a training step is given that stands for the forward of the model.

        Its examples count once at each site, whichever modules the step calls, as if it were the model's own forward.

        Args:
            inputs: What the step is given, such as its batch; ``()`` if that is not known.
        """
        self.share_examples(self._counter.count_step(inputs) if inputs else None)
        self.flow.note_inputs(inputs)

    def share_examples(self, examples: int | None) -> None:
        """Say that the forwards of training until the next call are given the same examples, which count once a site.

        Args:
            examples: Their number; ``None`` = each forward has its own, as at first.
        """
        self._step = None
        if examples is not None:
            self.begun += 1
            self._step = self.begun, examples
            self._take_step(self._step)

    def end_step(self) -> None:
        """Note that a training step has ended."""
        self._step = None

    @property
    def _runs_only_step(self) -> bool:
        """Whether a training step runs inside the forward of the root, and no forward that the step makes."""
        return self.step_is_forward and self.module_stack == [""]

    @property
    def inference(self) -> bool:
        """Whether what runs now is inference: the phase is ``train``, and its forward began without gradients."""
        if self.module_stack and not (self.step_is_forward and self._runs_only_step):  # most often without a call
            return self.began_inference
        return self._begins_inference()

    @property
    def may_be_recomputed(self) -> bool:
        """Whether a call without gradients may be made again, with them, by reentrant checkpointing."""
        if self.module_stack:  # a checkpoint around a part of the model begins without gradients, and is no inference
            return self._graded or (self.training and not self.began_inference)
        return not self.inference

    def _begins_inference(self) -> bool:
        if not self.training or torch.is_grad_enabled() or in_backward():
            return False
        return not in_autograd_function()

    def _begin(self, path: str, args: Any, kwargs: Any) -> None:
        """Forget the tensors of the last forward, and note the inputs of this one.

        A forward that is given what the model returned the last time, such as a recurrent network's state, has the
        number of the last one: a site has no more examples in both than in one, and a site that only one of them runs
        has those of that one.
        """
        self.begun += 1
        if path != "" or not self.flow.gave(args, kwargs):
            self._set_number(self.begun)
        again = self.restarts_at_parts and any(_overlap(path, each) for each in self._ran)
        if again or (path == "" and not self.explicit_step) or len(self.flow.layers) > _MOST_CALLS:
            self.forget()
        if self.restarts_at_parts:
            self._ran.append(path)
        self.flow.note_inputs(args)
        if kwargs:
            self.flow.note_inputs(kwargs)

    def note_outputs(self, output: Any) -> None:
        """Note what the model returns.

        Args:
            output: A tensor, or tensors in tuples, lists and mappings.
        """
        if is_tracing():
            comptime(self._note_outputs_while_tracing)
        else:
            self.flow.note_outputs(output)

    def leave(self) -> bool:
        """Note that a watched module has ended or failed, and return whether the forward ended with it."""
        if self.module_stack:
            self.module_stack.pop()
        if self.module_stack and self.began_inference and self._runs_only_step:
            self.began_inference, self.examples = False, self._examples_of_step
        if self.module_stack:
            return False
        if self.mask is not None and not self.explicit_step:
            self._set_mask(None)
        if self._step is not None:
            self._take_step(self._step)
        elif is_tracing() and in_body():
            self.examples = 0  # a number that the compiler cannot return from a checkpoint around the forward
        return True

    def _take_step(self, step: tuple[int, int]) -> None:
        self._set_number(step[0])
        self.examples = step[1]

    def _set_number(self, number: int) -> None:
        self.number = number
        if self.parts.exist:
            with unwatched():
                self.number_tensor.fill_(number)

    def forget(self) -> None:
        """Forget what is known of every tensor."""
        self.flow.clear()
        self.ordinals.clear()
        self._ran.clear()
        if self.mask is not None or self.flow.row_masks.mask is not None:
            self._set_mask(None)

    def restart(self) -> None:
        """Start again: an optimizer step is over, or a forward did not end."""
        self.module_stack.clear()
        self.recomputing = False
        self.exporting = False
        self.recomputation.clear()
        self.forget()


def _overlap(one: str, other: str) -> bool:
    """Whether two modules are the same, or one is inside the other, by their paths."""
    return not (one and other) or f"{one}.".startswith(f"{other}.") or other.startswith(f"{one}.")


class Recomputation:
    """Finds the call that a recomputed call repeats: reentrant activation checkpointing runs its segments again.

    The last segment comes first. The first forward runs without gradients, so that only the recomputed calls can
    receive them. The calls of a module that several segments share are numbered from zero again in each recomputed
    segment. When the gradients of a segment arrive, all its calls have been made, and they are the last calls
    of the forward that were not yet repeated.

    There may be more repeated calls than calls: an adjoint solver takes other steps backward, and a graph that is
    retained gives gradients again. Then they belong to the site that was called there, if it was one only.

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
        self._only: dict[Place, Any] = {}  # the call of each place; ``None`` if calls of several sites were made there
        self._made: dict[Place, int] = {}
        self._fired = False

    def add(self, place: Place, call: Any) -> None:
        """Note a call that was made without gradients, inside a forward that has them.

        Args:
            place: Path and function of the site.
            call: The call; ``None`` if it is not counted.
        """
        self._drop_repeated()
        self._due.setdefault(place, []).append(call)
        only = self._only.setdefault(place, call)
        if only != call:
            self._only[place] = None

    def next_number(self, place: Place) -> int:
        """Note a call that is made in a backward pass, and return its number within the recomputed segment."""
        self._drop_repeated()
        number = self._made.get(place, 0)
        self._made[place] = number + 1
        return number

    def _drop_repeated(self) -> None:
        """Forget the calls of the last segment if its gradients have arrived: another segment, or forward, begins."""
        if self._fired:
            for done, count in self._made.items():
                del self._due.get(done, [])[-count:]
            self._made.clear()
            self._fired = False

    def forward_call(self, place: Place, number: int) -> Any:
        """Return the call of the forward that a call of the recomputed segment repeats, or ``None``.

        It is asked for when the gradient of the call has arrived.

        Args:
            place: Path and function of the site.
            number: Number of the call within the segment.
        """
        self._fired = True
        due, made = self._due.get(place, []), self._made.get(place, 0)
        return due[number - made] if made <= len(due) and number < made else self._only.get(place)

    def clear(self) -> None:
        """Forget all calls: an optimizer step is over."""
        self._due.clear()
        self._only.clear()
        self._made.clear()
        self._fired = False
