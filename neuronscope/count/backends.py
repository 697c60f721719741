"""Choose how tensors of a device are counted, once for each type of device, and count them so.

| device | counted by |
| --- | --- |
| cpu | :mod:`neuronscope.count.cpu_kernels`; its tensors do not come here in eager mode |
| cuda (ROCm too), xpu | :mod:`neuronscope.count.triton_counting`, if triton is there and counts a sample right |
| all others, and where those fail | :mod:`neuronscope.count.pieces` |

A compiler that fails, or counts the sample wrong, is one warning, a note in the report, and the plain formula from then
on; never the end of a watch.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable

import torch
from torch import Tensor

from neuronscope.count.captured_graphs import StepClock, is_capturing, keep_for_graphs
from neuronscope.count.counter_tensors import CounterTensors, has_float64
from neuronscope.count.counters import SiteCounters
from neuronscope.count.neuron_layout import NeuronLayout
from neuronscope.count.pieces import CountedAt, Pieces
from neuronscope.count.triton_counting import TritonKernels
from neuronscope.errors import warn_user

__all__ = [
    "NOT_WARM",
    "Backend",
    "add_gradients_on_device",
    "add_outputs_on_device",
    "backend_for",
    "backend_notes",
]

#: Types of devices for which Triton compiles.
_TRITON = ("cuda", "xpu")
#: Why a tensor of a capture was not counted.
NOT_WARM = (
    "it was captured in a CUDA graph before a tensor of this shape was counted without one: run a step that is watched "
    "and observed before the capture"
)


class Backend:
    """Counts the tensors of one type of device. Waits for no device.

    Args:
        device_type: The type.
        kernels: The kernels of this device; ``None`` = the plain formula in pieces.
        reason: Why it is not the kernels that this device should have; ``""`` if it is, or if it has none.
    """

    def __init__(self, device_type: str, kernels: TritonKernels | None = None, reason: str = "") -> None:
        self.device_type = device_type
        self.kernels = kernels
        self.reason = reason
        self._plain = Pieces()

    def add_outputs(
        self,
        counters: CounterTensors,
        y: Tensor,
        layout: NeuronLayout,
        mask: Tensor | None,
        moment: CountedAt,
        tolerance: float,
    ) -> None:
        """Count one output tensor.

        Args:
            counters: As in :meth:`neuronscope.count.pieces.Pieces.add_outputs`, and so are the others.
            y: Output ``(…, N, …)``, detached.
            layout: Where its neurons lie.
            mask: Which positions are counted.
            moment: When.
            tolerance: ``|y| <= tolerance`` counts as zero.
        """
        self._count(lambda counting: counting.add_outputs(counters, y, layout, mask, moment, tolerance))

    def add_gradients(
        self, counters: CounterTensors, gradient: Tensor, layout: NeuronLayout, mask: Tensor | None, moment: CountedAt
    ) -> None:
        """Count one gradient.

        Args:
            counters: As in :meth:`neuronscope.count.pieces.Pieces.add_gradients`, and so are the others.
            gradient: Gradient ``(…, N, …)``, detached.
            layout: Where its neurons lie.
            mask: Which positions are counted.
            moment: When.
        """
        self._count(lambda counting: counting.add_gradients(counters, gradient, layout, mask, moment))

    def _count(self, count: Callable[[TritonKernels | Pieces], None]) -> None:
        """Count by the kernels; by the plain formula if the device has no kernels, or if they fail."""
        if self.kernels is not None:
            try:
                count(self.kernels)
            except Exception as error:  # noqa: BLE001  # the watch goes on
                self._give_up(error)
            else:
                return
        count(self._plain)

    def _give_up(self, error: Exception) -> None:
        """Use the plain formula from now on. The counters are as they were: no kernel has changed them."""
        self.kernels, self.reason = None, f"a kernel failed ({_first_line(error)})"
        warn_user(f"{_sentence(self)} Counts stay exact.")


_used: dict[str, Backend] = {}


def backend_for(device_type: str) -> Backend:
    """Return how tensors of a type of device are counted. The first call for a GPU waits for it, once.

    Args:
        device_type: As of ``torch.device.type``.

    >>> backend_for("mps").kernels is None, backend_for("mps").reason
    (True, '')
    """
    found = _used.get(device_type)
    if found is None:
        found = _used[device_type] = _choose(device_type)
    return found


def _choose(device_type: str) -> Backend:
    if device_type not in _TRITON:
        return Backend(device_type)
    if not has_float64(device_type):
        return Backend(device_type, reason="it has no float64")
    if importlib.util.find_spec("triton") is None:
        return Backend(device_type, reason="triton is not installed")
    try:
        kernels = TritonKernels()
        wrong = _disagreement(kernels, device_type)
    except Exception as error:  # noqa: BLE001  # the watch goes on
        kernels, wrong = None, f"triton failed ({_first_line(error)})"
    if not wrong:
        return Backend(device_type, kernels)
    found = Backend(device_type, reason=wrong)
    warn_user(f"{_sentence(found)} Counts stay exact.")
    return found


def backend_notes() -> list[str]:
    """Return a sentence for each type of device whose tensors were counted in another way than they should be."""
    return [_sentence(each) for each in _used.values() if each.reason]


def _sentence(backend: Backend) -> str:
    return (
        f"Tensors on {backend.device_type} are counted by the plain formula in pieces, which takes longer than kernels "
        f"would: {backend.reason}."
    )


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]


def _disagreement(kernels: TritonKernels, device_type: str) -> str:
    """Count a sample by the kernels and by the plain formula, and say where they differ; ``""`` if nowhere."""
    with torch.inference_mode(False), torch.no_grad():
        sample = torch.arange(-60.0, 180.0, device="cpu").div_(7).relu_().reshape(10, 24)
        sample[0, 3], sample[1, 4], sample[2, 5], sample[9, 6] = math.nan, math.inf, -math.inf, -0.0
        y = sample.to(device_type)
        counted = []
        for each in (kernels, Pieces()):
            counters = SiteCounters(24, y.device).tensors
            each.add_outputs(counters, y, NeuronLayout(1), None, CountedAt(3), 0.0)
            each.add_gradients(counters, y, NeuronLayout(1), None, CountedAt(3))
            counted.append([counter.cpu().double() for counter in counters])
    same = all(torch.allclose(one, other, rtol=1e-5, atol=0) for one, other in zip(*counted, strict=True))
    return "" if same else "triton counted a sample wrong"


def add_outputs_on_device(
    counters: SiteCounters,
    y: Tensor,
    layout: NeuronLayout,
    mask: Tensor | None,
    examples: int,
    clock: StepClock,
    tolerance: float,
) -> str:
    """Count one output tensor that is not on the CPU.

    Args:
        counters: The counters of the site.
        y: Output ``(…, N, …)``, detached.
        layout: Where its neurons lie.
        mask: Which positions are counted, bool ``(B, T)``; ``None`` = all.
        examples: Number of independent examples in the output.
        clock: The optimizer step.
        tolerance: See :class:`neuronscope.judge.verdicts.Policy`.

    Returns:
        Why it was not counted; ``""`` if it was.
    """
    positions = y.numel() // counters.neurons
    if not positions:
        return ""
    if not is_capturing(y):
        counters.positions += positions
        counters.examples += examples
        tensors, begin = _room_for(counters, y, clock, positions)
        moment = CountedAt(clock.step - begin)
    elif _is_warm(y, layout, mask, tolerance):
        moment = _captured(counters, y, clock, positions, examples)
        tensors = counters.tensors
    else:
        return NOT_WARM
    backend_for(y.device.type).add_outputs(tensors, y, layout, mask, moment, tolerance)
    return ""


def add_gradients_on_device(
    counters: SiteCounters, gradient: Tensor, layout: NeuronLayout, mask: Tensor | None, clock: StepClock
) -> str:
    """Count one gradient that is not on the CPU.

    Args:
        counters: As in :func:`add_outputs_on_device`, and so are the others.
        gradient: Gradient ``(…, N, …)``, detached.
        layout: Where its neurons lie.
        mask: Which positions are counted.
        clock: The optimizer step.

    Returns:
        Why it was not counted; ``""`` if it was.
    """
    positions = gradient.numel() // counters.neurons
    if not positions:
        return ""
    if not is_capturing(gradient):
        counters.gradient_positions += positions
        zeros = counters.tensors.zero_gradients if gradient.is_cuda else counters.room_for_gradients(positions)
        moment = CountedAt(clock.step)
    elif _is_warm(gradient, layout, mask, None):
        moment = _captured(counters, gradient, clock, positions, 0)
        zeros = counters.tensors.zero_gradients
    else:
        return NOT_WARM
    backend_for(gradient.device.type).add_gradients(_gradients(counters, zeros), gradient, layout, mask, moment)
    return ""


def _is_warm(tensor: Tensor, layout: NeuronLayout, mask: Tensor | None, tolerance: float | None) -> bool:
    """Whether a tensor can be counted in a capture: nothing need be chosen, compiled or copied to the device for it."""
    backend = _used.get(tensor.device.type)
    if backend is None or (mask is not None and mask.device != tensor.device):
        return False
    return backend.kernels is None or backend.kernels.is_warm(tensor, layout, mask, tolerance)


def _room_for(counters: SiteCounters, y: Tensor, clock: StepClock, positions: int) -> tuple[CounterTensors, int]:
    """Return the tensors to which an output is added, and the step from which they count steps.

    On CUDA they are 64 bits wide, and not those of a window: a capture may follow, whose replays nobody counts on the
    host, and in which nothing can be made. It needs the clock too.
    """
    if y.is_cuda:
        clock.on(y.device)
        return counters.tensors, 0
    tensors, window = counters.room_for(positions, clock.step, clock.step)
    return tensors, 0 if window is None else window.first_step


def _gradients(counters: SiteCounters, zeros: Tensor) -> CounterTensors:
    """Return counters whose zeros of gradients are these; the kernels touch no other one but ``traced_gradients``."""
    window = counters.window
    held = counters.tensors if window is None or counters.wide is not None else window.tensors
    return held._replace(zero_gradients=zeros)


def _captured(counters: SiteCounters, tensor: Tensor, clock: StepClock, positions: int, examples: int) -> CountedAt:
    """Return when a captured tensor is counted, and keep what the graph writes to and reads."""
    now = clock.on(tensor.device)
    counters.enter_graph()
    clock.captured = True
    keep_for_graphs((*counters.tensors, now))
    return CountedAt(clock.step, now, positions, examples)
