"""One forward at a time: who is running, the how-manieth call this is, and what each tensor is.

A *frame* is one outermost call of a watched module, normally the model's forward. Calls of a reused module are numbered
within a frame. Activations that a training step applies outside any module call (a Lightning ``training_step`` that
writes ``F.relu(self.fc(x))``) are *loose*: they are numbered from one optimizer step or backward pass to the next.

Everything here can be traced by ``torch.compile``; what changes within a forward is kept in lists and dicts, which the
compiler follows more faithfully than attributes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from neuronscope.attach.compiling import has_real_tensors, in_backward, is_tracing
from neuronscope.attach.dtensor import local_tensor
from neuronscope.attach.neuron_flow import NeuronFlow
from neuronscope.attach.recomputation import Recomputation
from neuronscope.attach.tensor_map import TensorMap
from neuronscope.sites import SiteKey

__all__ = ["ForwardContext", "first_tensor"]


class ForwardContext:
    """State of the forward that is running; one instance serves all forwards of a tap, one after another."""

    def __init__(self) -> None:
        self.module_stack: list[str] = []
        self.flow = NeuronFlow()
        self.roles: TensorMap[tuple[Any, ...]] = TensorMap("role")
        self.examples = 0
        self.recomputing = False
        self.exporting = False
        self.explicit_step = False
        self.ran_root = False  # whether the model's own forward was seen
        self.ran_parts = False  # whether parts of it were called without it, outside of a step that is bounded
        self.recomputation = Recomputation()
        self._graded = True
        self._keys: dict[tuple[str, str], list[SiteKey]] = {}  # by place, in the order of calls; made once
        self._calls: dict[tuple[str, str], int] = {}
        self._outside_calls: dict[tuple[str, str], int] = {}

    @property
    def current_path(self) -> str:
        """Path of the innermost watched module that is running; ``""`` for the root, and outside any."""
        return self.module_stack[-1] if self.module_stack else ""

    def enter(self, path: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
        """A watched module begins to run; says whether that began a frame."""
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
            if not self._graded and not self.recomputing:
                self.recomputation.clear()  # no backward pass will come
            tensor = first_tensor((args, kwargs))
            self.examples = local_tensor(tensor).size(0) if tensor is not None and tensor.dim() > 0 else 1
        self.module_stack.append(path)
        return outermost

    def leave(self) -> bool:
        """A watched module is done, or failed; says whether that ended the frame."""
        if self.module_stack:
            self.module_stack.pop()
        if self.module_stack:
            return False
        self.forget()
        return True

    def number(self, path: str, function: str) -> SiteKey:
        """The key of the call that begins now."""
        place = (path, function)
        if not self.module_stack and not self.explicit_step and not torch.is_grad_enabled():
            return self._key(place, 0)  # neither a step nor a backward pass will part one forward from another
        calls = self._calls if self.module_stack else self._outside_calls
        call = calls.get(place, 0)
        calls[place] = call + 1
        if self.module_stack and self._graded and not torch.is_grad_enabled():
            self.recomputation.add(place, call)
        return self._key(place, call)

    def _key(self, place: tuple[str, str], call: int) -> SiteKey:
        if is_tracing():
            return SiteKey(*place, call, False)
        keys = self._keys.setdefault(place, [])
        while len(keys) <= call:
            keys.append(SiteKey(*place, len(keys), False))
        return keys[call]

    def forget(self) -> None:
        """Forget every tensor."""
        self.flow.clear()
        self.roles.clear()

    def restart(self) -> None:
        """An optimizer step is over, or a forward never ended: number and remember from scratch."""
        self.module_stack.clear()
        self._calls.clear()
        self._outside_calls.clear()
        self.recomputing = False
        self.exporting = False
        self.recomputation.clear()
        self.forget()

    def restart_outside_calls(self) -> None:
        """A backward pass ran: what is loose from now on belongs to another forward."""
        self._outside_calls.clear()


def first_tensor(values: Any) -> Tensor | None:
    """The first tensor in nested tuples, lists and mappings, or ``None``."""
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
