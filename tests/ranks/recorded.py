"""The slow twin of a distributed run: each rank keeps its activations and gradients, and counts with numpy at the end.

It sees them by hooks of its own, in a run that Neuronscope does not watch, and shares no line of code with it.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

NUMBERS = ("positions", "gradient_positions", "examples")
ARRAYS = ("zero_outputs", "zero_gradients", "last_active_step", "first_active_step")
NEVER = 2**62
#: In the paths of modules that torch's wrappers for checkpointing and for FSDP hold.
WRAPPED = re.compile(r"_checkpoint_wrapped_module\.|_fsdp_wrapped_module\.")


class Recorder:
    """Keeps what some modules are given and give, in training and in evaluation; the neurons lie on the last axis.

    Args:
        model: The model.
        gates: By site name, the module whose output is counted, and the one whose pre-activation has the gradient.
    """

    def __init__(self, model: nn.Module, sites: dict[str, tuple[str, str]]) -> None:
        self.sites = sites
        self.step = 0
        self.outputs: dict[tuple[str, bool], list[tuple[int, Tensor]]] = {}  # by path, and whether it trains
        self.gradients: dict[str, list[Tensor]] = {}
        modules = {WRAPPED.sub("", path): module for path, module in model.named_modules()}
        self.handles: list[Any] = []
        for path in {path for paths in sites.values() for path in paths}:
            self.handles.append(modules[path].register_forward_pre_hook(self._before(path)))
            self.handles.append(modules[path].register_forward_hook(self._after(path)))

    def stop(self) -> None:
        """Keep nothing more."""
        for handle in self.handles:
            handle.remove()

    def _before(self, path: str) -> Any:
        def hook(module: nn.Module, args: Any) -> None:
            if args[0].requires_grad and torch.is_grad_enabled() and not _again():
                args[0].register_hook(lambda grad: self.gradients.setdefault(path, []).append(_own(grad)))

        return hook

    def _after(self, path: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Tensor) -> None:
            if not _again():
                self.outputs.setdefault((path, module.training), []).append((self.step, _own(output)))

        return hook

    def next_step(self) -> None:
        self.step += 1

    def counts(self, phase: str = "train") -> dict[str, dict[str, Any]]:
        """By site, of ``train``, or of ``val``: of what ran in evaluation mode."""
        trains = phase == "train"
        return {
            name: self._count(self.outputs[output, trains], self.gradients.get(gradient, []) if trains else [])
            for name, (output, gradient) in self.sites.items()
            if (output, trains) in self.outputs
        }

    def _count(self, outputs: list[tuple[int, Tensor]], grads: list[Tensor]) -> dict[str, Any]:
        pairs = [(step, _rows(y)) for step, y in outputs]
        gradients = [_rows(grad) for grad in grads]
        neurons = pairs[0][1].shape[1]
        last, first = np.full(neurons, -1), np.full(neurons, NEVER)
        for step, rows in pairs:
            fired = (rows != 0).any(0)
            last[fired] = step
            first[fired & (first == NEVER)] = step
        return {
            "zero_outputs": sum((rows == 0).sum(0) for _, rows in pairs),
            "zero_gradients": sum(((rows == 0).sum(0) for rows in gradients), np.zeros(neurons, dtype=np.int64)),
            "last_active_step": last,
            "first_active_step": first,
            "positions": sum(len(rows) for _, rows in pairs),
            "gradient_positions": sum(len(rows) for rows in gradients),
            "examples": sum(len(y) for _, y in outputs),
        }


def _again() -> bool:
    """Whether a checkpoint runs its segment again."""
    return torch._C._current_graph_task_id() != -1


def _own(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return (tensor.to_local() if hasattr(tensor, "to_local") else tensor).clone()


def _rows(tensor: Tensor) -> Any:
    return tensor.reshape(-1, tensor.shape[-1]).cpu().double().numpy()


def union(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """The counts of one site over ranks that hold the same neurons and other data."""
    return {
        **{name: sum(part[name] for part in parts) for name in ("zero_outputs", "zero_gradients", *NUMBERS)},
        "last_active_step": np.max([part["last_active_step"] for part in parts], axis=0),
        "first_active_step": np.min([part["first_active_step"] for part in parts], axis=0),
    }


def side_by_side(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """The counts of one site over ranks that hold other neurons and the same data."""
    return {
        **{name: np.concatenate([part[name] for part in parts]) for name in ARRAYS},
        **{name: parts[0][name] for name in NUMBERS},
    }
