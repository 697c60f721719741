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

import torch
from torch import Tensor

from neuronscope.count.captured_graphs import StepClock, is_capturing, keep_for_graphs
from neuronscope.count.counter_tensors import CounterTensors, has_float64
from neuronscope.count.counters import SiteCounters
from neuronscope.count.neuron_layout import NeuronLayout
from neuronscope.count.pieces import Pieces, TensorToCount
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

    def count(self, counters: CounterTensors, what: TensorToCount) -> None:
        """Count one output or gradient: by the plain formula if the device has no kernels, or if they fail.

        Args:
            counters: The counters of the site, on the device of the tensor.
            what: The tensor.
        """
        if self.kernels is not None:
            try:
                self.kernels.count(counters, what)
            except Exception as error:  # noqa: BLE001  # the watch goes on
                self._give_up(error)
            else:
                return
        self._plain.count(counters, what)

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
            for tolerance in (0.0, None):
                each.count(counters, TensorToCount(y, NeuronLayout(1), 3, tolerance))
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
    return _add(counters, TensorToCount(y, layout, clock.step, tolerance, mask, examples=examples), clock)


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
    return _add(counters, TensorToCount(gradient, layout, clock.step, None, mask), clock)


def _add(counters: SiteCounters, what: TensorToCount, clock: StepClock) -> str:
    """Count a tensor and return ``""``, or return why it was not counted."""
    tensor = what.tensor
    positions = tensor.numel() // counters.neurons
    if not positions:
        return ""
    if is_capturing(tensor):
        if not _is_warm(what):
            return NOT_WARM
        now = clock.on(tensor.device)
        counters.enter_graph()
        clock.captured = True
        keep_for_graphs((*counters.tensors, now))  # what the graph writes to and reads
        tensors, what = counters.tensors, what._replace(clock=now, positions=positions)
    else:
        if what.tolerance is None:
            counters.gradient_positions += positions
        else:
            counters.positions += positions
            counters.examples += what.examples
        tensors, begin = _room_for(counters, what, clock, positions)
        what = what._replace(step=what.step - begin, examples=0)
    backend_for(tensor.device.type).count(tensors, what)
    return ""


def _is_warm(what: TensorToCount) -> bool:
    """Whether a tensor can be counted in a capture: nothing need be chosen, compiled or copied to the device for it."""
    backend = _used.get(what.tensor.device.type)
    if backend is None or (what.mask is not None and what.mask.device != what.tensor.device):
        return False
    return backend.kernels is None or backend.kernels.is_warm(what)


def _room_for(
    counters: SiteCounters, what: TensorToCount, clock: StepClock, positions: int
) -> tuple[CounterTensors, int]:
    """Return the tensors to which a tensor's counts are added, and the step from which they count steps.

    On CUDA they are 64 bits wide, and not those of a window: a capture may follow, whose replays nobody counts on the
    host, and in which nothing can be made. It needs the clock too.
    """
    if what.tensor.is_cuda:
        clock.on(what.tensor.device)
        return counters.tensors, 0
    if what.tolerance is None:
        return counters.room_for_gradients(positions), 0
    tensors, window = counters.room_for(positions, what.step, what.step)
    return tensors, 0 if window is None else window.first_step
