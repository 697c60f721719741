"""Record the calls of all sites: register hooks for gradients, and update the counters of the sites.

The hooks and the function mode pass the tensors in: see :mod:`neuronscope.attach.hooks`. Which site a call is of, is
found by :mod:`neuronscope.attach.site_finder`. Where ``torch.compile`` traces a call, it is handed on to
:mod:`neuronscope.attach.graph_recorder`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from neuronscope.attach.activations import Activation
from neuronscope.attach.compiling import has_real_tensors, in_backward, is_tracing, unwatched
from neuronscope.attach.dtensor import is_partial, local_tensor, sharded_dims
from neuronscope.attach.examples import ExampleCounter
from neuronscope.attach.forward import ForwardContext
from neuronscope.attach.gradient_hooks import CountedGradient, Counters, GradientHook, RecomputedGradient, register
from neuronscope.attach.graph_recorder import GraphRecorder
from neuronscope.attach.layer_names import LayerNames
from neuronscope.attach.masks import PositionMask
from neuronscope.attach.origins import LOST
from neuronscope.attach.row_owners import Owners
from neuronscope.attach.site_finder import Call, CountersFactory, DeclaredAxis, SiteFinder, neurons_in
from neuronscope.attach.unmeasured import place_of
from neuronscope.attach.unsupported import BATCHED_GRADIENT, CAPTURED, describe_input, in_transform
from neuronscope.count.backends import add_gradients_on_device, add_outputs_on_device
from neuronscope.count.captured_graphs import StepClock, is_capturing
from neuronscope.count.compiled_graphs import gate_half, once_a_forward
from neuronscope.count.counters import SiteCounters, add_gradients, add_outputs
from neuronscope.count.cpu_kernels import ScratchBuffers
from neuronscope.count.expert_counters import (
    ExpertCounters,
    JoinedCounters,
    add_expert_gradients,
    add_expert_outputs,
    leave_out_rows,
)
from neuronscope.count.neuron_layout import NeuronLayout, neurons_first, rows_kept
from neuronscope.count.positions import keep_positions
from neuronscope.sites import INFERENCE, SiteKey

__all__ = ["SiteRecorder"]


class SiteRecorder:
    """Records the calls of all sites of a model.

    Args:
        names: The layers of the model's weights.
        examples: Counts the examples that a forward is given.
        masks: Finds the mask of positions that a forward is given.
        new_counters: Returns the counters of a site; called once for each site and phase.
        declared_axis: Returns the declared axis of a site by its names.
        tolerance: See :class:`neuronscope.judge.verdicts.Policy`.
        fail: Called with an error of our own code in a backward pass.

    Attributes:
        phase: The phase that is counted. In ``train``, what runs without gradients is counted as ``inference``.
        step: The optimizer step that is counted.
        clock: The same on each device, for graphs.
        compiled: Whether ``torch.compile`` traced any part of the model.
        graphs: Records the calls that ``torch.compile`` traces.
        forward: The forward that is running.
        sites: Finds the sites.
        unmeasured: What is not measured.
        lock: Held while counts are changed or read, because gradients arrive in whatever thread runs the backward pass.
        got_gradients: Whether a gradient has arrived.
        ignored_mask: Whether rows of several experts were counted in a forward with a mask, which does not reach them.
    """

    #: What each call reads; see :class:`~neuronscope.attach.neuron_flow.NeuronFlow`.
    __slots__ = (
        *("_scratch", "_tolerance", "compiled", "forward", "got_gradients", "lock", "phase", "sampler", "sites"),
        *("step", "unmeasured", "__dict__"),
    )

    def __init__(
        self,
        *,
        names: LayerNames,
        examples: ExampleCounter,
        masks: PositionMask,
        new_counters: CountersFactory,
        declared_axis: DeclaredAxis,
        tolerance: float,
        fail: Callable[[Exception], None],
    ) -> None:
        self.phase = ""
        self.compiled = False
        self.step = 0
        self.clock = StepClock()
        self._asked_at = -1  # number of the forward when `was_not_called` was last asked
        self.forward = ForwardContext(names, examples, masks)
        self.sites = SiteFinder(self.forward, self, new_counters, declared_axis)
        self.unmeasured = self.sites.unmeasured
        self.fail = fail
        self.lock = threading.RLock()
        self.got_gradients = False
        self.ignored_mask = False
        #: Called with each output that is counted, if somebody wants more of it than counts.
        self.sampler: Callable[[SiteCounters, Tensor, NeuronLayout], None] | None = None
        self._tolerance = tolerance
        self._scratch = ScratchBuffers()
        self._leaf_handles: list[RemovableHandle] = []  # a leaf outlives the step, and its hook must not
        self.graphs = GraphRecorder(self, tolerance)

    def set_phase(self, phase: str, step: int) -> None:
        """Count for this phase and this optimizer step from now on.

        Args:
            phase: Name of the phase.
            step: Number of the optimizer step.
        """
        self.phase = phase
        self.forward.training = phase == "train"
        self.step = self.clock.step = step
        if self.compiled or self.clock.devices:
            with unwatched():
                self.clock.set(step)

    def note_compiled(self) -> None:
        """Note that ``torch.compile`` traces a part of the model."""
        if not self.compiled:
            self.compiled = True
            with torch._C.DisableTorchFunction():
                self.clock.set(self.step)

    def was_not_called(self) -> bool:
        """Whether no forward began since this was last asked, on a device on which a CUDA graph may have run it."""
        before, self._asked_at = self._asked_at, self.forward.begun
        return bool(before == self._asked_at and self.clock.devices) and not (self.clock.captured or self.compiled)

    def forget_phase(self, phase: str) -> set[SiteKey]:
        """Forget the counters of a phase, so that they are made anew if it runs again.

        Args:
            phase: Name of the phase.

        Returns:
            The sites whose counters were forgotten. A compiled graph holds the others.
        """
        with self.lock:
            return self.sites.forget_phase(phase)

    @property
    def running_phase(self) -> str:
        """The phase of the forward that is running."""
        return INFERENCE if self.forward.training and self.forward.inference else self.phase

    def restart(self) -> None:
        """Forget an unfinished forward, and remove the hooks on tensors that outlive their step."""
        self.forward.restart()
        for handle in self._leaf_handles:
            handle.remove()
        self._leaf_handles = []

    def close(self) -> None:
        """Stop counting, also the gradients of graphs that are still alive."""
        self.restart()
        for counters in self.sites.all_counters():
            counters.open = False

    def begin(
        self, path: str, function: str, activation: Activation, x: Any, glu_dim: int | None, traced: bool = False
    ) -> Any:
        """Begin a call of a site: find its neurons, and register a hook for the gradient of its input.

        Args:
            path: Path of the activation module, or of the module that calls the activation function.
            function: Name of the function for an activation function, otherwise ``""``.
            activation: The activation that is applied.
            x: The pre-activation ``(…, N, …)``.
            glu_dim: The dimension along which ``x`` is split in two halves (GLU), otherwise ``None``.
            traced: Whether ``torch.compile`` traces it.

        Returns:
            The call, for :meth:`end`, or its number while ``torch.compile`` traces; ``None`` if it is not counted.
        """
        forward = self.forward
        if forward.exporting:
            return None
        if not isinstance(x, Tensor) or not x.is_floating_point() or x.dim() == 0:
            if not function:
                if not traced:
                    self.unmeasured.note(path or "(root)", f"it ran on {describe_input(x)}, which cannot be counted")
            elif isinstance(x, Tensor):
                if traced:
                    self.graphs.note_uncountable(path, function, x)
                elif forward.module_stack and not forward.recomputing:
                    self._note_uncountable(path, function, x)
            return None
        recomputing = forward.recomputing
        if not forward.module_stack:
            forward.ran = True
            if not forward.explicit_step:
                forward.ran_parts = forward.ran_alone = True
            if not has_real_tensors():
                return None
            recomputing = in_backward()
        if traced:
            return self.graphs.begin(path, function, activation, x, glu_dim)
        phase = self.phase  # see `running_phase`
        if forward.training:
            plain = forward.module_stack and not forward.step_is_forward
            if forward.began_inference if plain else forward.inference:
                phase = INFERENCE
        if in_transform(x):
            if not recomputing:
                self.unmeasured.note_transformed(phase, path, function, x)
            return None
        if recomputing:
            self._register_recomputed(x, path, function, activation.name, glu_dim)
            return None
        call = self.sites.find(phase, path, function, activation, x, glu_dim)
        if not torch.is_grad_enabled():
            if forward.may_be_recomputed:
                forward.recomputation.add((path, function), call)
        elif call is not None and call.hook is not None and x.requires_grad:
            self.hook_call(x, call)
        return call

    def _note_uncountable(self, path: str, function: str, x: Tensor) -> None:
        """Note that an activation function was applied to a single number, or to a tensor of an unusual type."""
        if not in_transform(x):
            self.unmeasured.note_uncountable(self.forward.flow.origin(x), place_of(path, function), x)
        elif x.is_floating_point():
            self.unmeasured.note_transformed(self.running_phase, path, function, x)

    def hook_call(self, x: Tensor, call: Call) -> None:
        """Register a hook that counts the gradient of the pre-activation of a call.

        Args:
            x: The pre-activation.
            call: The call.
        """
        hook, mask = call.hook, self.forward.mask
        if hook is None or (self.compiled and any(known.counters is call.counters for known in _counted_gradients(x))):
            return  # a compiled part was expected to apply the activation, and is not compiled any more
        if call.owners is not None:
            hook = hook.with_owners(call.owners, self.forward.flow.row_masks.of(x))
        elif mask is not None:
            hook = hook.with_mask(self._mask_of(x, mask))
        handle = register(x, hook)
        if handle is not None:
            self._keep(x, handle)

    def _mask_of(self, tensor: Tensor, mask: Tensor) -> Tensor:
        """Return which positions of a tensor are counted: by its own mask, if data picked its rows from a batch.

        Args:
            tensor: An activation or a pre-activation.
            mask: The mask of the forward.
        """
        own = self.forward.flow.row_masks.of(tensor)
        return mask if own is None else own

    def end(self, call: Any, x: Any, y: Any) -> None:
        """End a call of a site: count its output.

        Args:
            call: What :meth:`begin` returned.
            x: The pre-activation ``(…, N, …)``.
            y: The output ``(…, N, …)``.
        """
        if isinstance(call, int):
            self.graphs.end(call, x, _first_output(y))
            return
        if y is None:
            self.unmeasured.failed.add(call.key.name)
            return
        if self.unmeasured.failed:
            self.unmeasured.failed.discard(call.key.name)
        given = y
        if type(y) is not Tensor:
            y = _first_output(y)
        if self.forward.mask is not None:
            self.forward.flow.row_masks.pass_on(x, y)
        if call.shape is not None and type(y) is Tensor and y.shape == call.shape:
            if call.counters is not None:
                self._count(call.counters, y, call.layout, call.owners)
            self.forward.flow.put(y, call.after)
            return
        if not isinstance(y, Tensor) or y.dim() <= call.layout.axis:
            self.note_unreadable(call, given)
            return
        if call.counters is not None:
            neurons = neurons_in(local_tensor(y).shape, call.layout)
            if neurons == call.counters.neurons and (not isinstance(x, Tensor) or sharded_dims(x) == sharded_dims(y)):
                self._count(call.counters, y, call.layout, call.owners)
            else:
                self.unmeasured.note(
                    call.key.name,
                    f"its output has {neurons} neurons where {call.counters.neurons} were expected",
                )
        self.note_output(call, y)

    def note_unreadable(self, call: Call, given: Any) -> None:
        """Note that what an activation gave cannot be counted, so that its gradients are not either.

        Args:
            call: The call.
            given: What it gave; ``None`` if that is not known.
        """
        what = f"shape {tuple(given.shape)}" if isinstance(given, Tensor) else type(given).__name__
        what = "" if given is None else f" ({what})"
        self.unmeasured.note(call.key.name, f"its output{what} cannot be counted")
        if call.counters is not None:
            call.counters.unreadable = True

    def note_output(self, call: Call, y: Tensor) -> None:
        """Note what the output of a call is.

        Args:
            call: The call.
            y: Its output ``(…, N, …)``.
        """
        units = call.after.units
        if units is None or len(units.dims) == y.dim():
            self.forward.flow.put(y, call.after)

    def carry(self, _: None, x: Any, y: Any) -> None:
        """Note what an activation module returned whose call is not counted: what it was given.

        Args:
            _: Its call, of which :meth:`begin` returned nothing.
            x: Its input.
            y: Its output.
        """
        if not isinstance(x, Tensor) or not isinstance(y, Tensor):
            return
        if is_tracing():
            self.graphs.carry(x, y)
        elif has_real_tensors():
            self.carry_origin(x, y)

    def carry_origin(self, x: Tensor, y: Tensor) -> None:
        """Note that what a tensor is, is carried to another one by an activation that is not counted.

        Args:
            x: The pre-activation.
            y: The output.
        """
        origin = self.forward.flow.origin(x)
        if x.is_nested or y.is_nested or x.shape != y.shape:
            origin = origin.without_units(LOST)
        self.forward.flow.note_activation(origin, None, "an activation that is not counted")
        self.forward.flow.put(y, origin.after("").but(site=None, carries=()))

    def select(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any], y: Any) -> None:
        """Count what a function leaves of a site: a gated product, or what was selected by data.

        Args:
            function: One of :data:`neuronscope.attach.selections.SELECTING`.
            args: The positional arguments of its call.
            kwargs: The keyword arguments.
            y: What it returned.
        """
        phase = self.running_phase
        if is_tracing():
            self.graphs.select(phase, function, args, kwargs, y)
            return
        selected = self.sites.selections.find(phase, function, args, kwargs, y)
        if selected is None:
            return
        call, before = selected
        if call.counters is not None and not (self.forward.recomputing or in_backward()):  # counted before
            self._count(call.counters, y, call.layout, call.owners)
        if before is not None and before.requires_grad:
            self.hook_call(before, call)

    def _count_rows(self, counters: JoinedCounters, y: Tensor, layout: NeuronLayout, owners: Owners | None) -> None:
        """Count an output whose rows are of several experts.

        Args:
            counters: The counters of the experts.
            y: The output.
            layout: Where rows and units lie.
            owners: Which expert each row is of.
        """
        dims, forward = layout.dims, self.forward
        if dims is None or owners is None or not y.numel():
            return
        if is_capturing(y):
            self.unmeasured.note(self.sites.name_of(counters), CAPTURED)
            return
        kept = None if forward.mask is None else forward.flow.row_masks.of(y)
        self.ignored_mask = self.ignored_mask or (forward.mask is not None and kept is None)
        rows, kept = rows_kept(y.detach(), dims, kept)
        with self.lock:
            if isinstance(counters, ExpertCounters) and isinstance(owners, Tensor):
                rows, owners = leave_out_rows(rows, owners, kept, len(counters.members))
                add_expert_outputs(counters, rows, owners, forward.examples, forward.number, self.step, self._tolerance)
                return
            for own, part, keep in _parts_of(counters, rows, kept, owners):
                plain, axis = keep_positions(part, 2, keep) if part.is_cpu else (part, 2)
                if not plain.numel():
                    continue
                examples = own.new_examples(forward.number, forward.examples, plain.numel() // own.neurons)
                if plain.is_cpu:
                    add_outputs(own, plain, axis, examples, self.step, self._scratch, self._tolerance)
                else:
                    add_outputs_on_device(own, plain, NeuronLayout(2), keep, examples, self.clock, self._tolerance)

    def _count(self, counters: Counters, y: Tensor, layout: NeuronLayout, owners: Owners | None) -> None:
        if isinstance(counters, JoinedCounters):
            self._count_rows(counters, y, layout, owners)
            return
        if self.sampler is not None:
            self.sampler(counters, y, layout)
        forward, axis = self.forward, layout.axis
        mask = None if forward.mask is None else self._mask_of(y, forward.mask)
        plain = y.detach() if y.requires_grad else y
        if type(y) is not Tensor:
            plain = local_tensor(plain)
        here = plain.is_cpu
        if here and (layout.dims is not None or mask is not None):
            plain, axis = _arranged(plain, layout, mask)
            if not plain.numel():
                return
        with self.lock:
            examples = counters.new_examples(forward.number, forward.examples, plain.numel() // counters.neurons)
            if counters.in_graph and forward.parts.exist:  # a graph may have counted some of this forward
                new = once_a_forward(examples, forward.number_tensor, counters.last_forward)
                counters.traced[1].add_(new)
                examples = 0
            if here:
                add_outputs(counters, plain, axis, examples, self.step, self._scratch, self._tolerance)
            elif reason := add_outputs_on_device(counters, plain, layout, mask, examples, self.clock, self._tolerance):
                self.unmeasured.note(self.sites.name_of(counters), reason)

    def count_named(self, call_of: Callable[[str], Call | None], place: tuple[str, str], y: Tensor, x: Tensor) -> None:
        """Count a tensor that the user names, and register a hook for the gradient at its pre-activation.

        Args:
            call_of: Returns the call of its site in a phase, or ``None`` if it is not counted.
            place: Its name, and the function that counts it.
            y: The tensor ``(…, N, …)``.
            x: Its pre-activation, of the same shape; it may be the tensor itself.
        """
        forward = self.forward
        if forward.recomputing or in_backward():
            self._register_recomputed(x, *place, "", None)
            return
        forward.begin_outside(y)
        call = call_of(self.running_phase)
        if not torch.is_grad_enabled():
            if forward.may_be_recomputed:
                forward.recomputation.add(place, call)
        elif call is not None and x.requires_grad:
            self.hook_call(x, call)
        if call is not None and call.counters is not None:
            self._count(call.counters, y, call.layout, call.owners)

    def _register_recomputed(self, x: Tensor, path: str, function: str, activation: str, glu_dim: int | None) -> None:
        """Register a gradient hook for a recomputed call: activation checkpointing runs a site again in backward.

        Its output was counted before. Its gradient may arrive only now.
        """
        place = (path, function)
        if (
            not x.requires_grad
            or not torch.is_grad_enabled()
            or self._is_registered(x, (place_of(path, function), activation))
        ):
            return
        recomputation = self.forward.recomputation
        number = recomputation.next_number(place)

        def site() -> tuple[Counters | None, NeuronLayout, Owners | None]:
            call = recomputation.forward_call(place, number)
            return (None, NeuronLayout(0), None) if call is None else (call.counters, call.layout, call.owners)

        handle = register(x, RecomputedGradient(self, (place_of(path, function), activation), glu_dim, site))
        if handle is not None:
            self._keep(x, handle)

    def _is_registered(self, x: Tensor, place: tuple[str, str]) -> bool:
        """Whether the tensor has a hook of this site: non-reentrant checkpointing runs the site on it again."""
        hooks = (x._backward_hooks or {}).values()
        return any(isinstance(hook, GradientHook) and (hook.recorder, hook.place) == (self, place) for hook in hooks)

    def _keep(self, x: Tensor, handle: RemovableHandle) -> None:
        """Keep the handle of a hook until the step is over, if the tensor may outlive it."""
        if x.is_leaf:
            self._leaf_handles.append(handle)

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
        if in_transform(gradient):
            self._note_gradient(counters, BATCHED_GRADIENT)
        elif type(gradient) is not Tensor and (is_partial(gradient) or sharded_dims(gradient) != counters.sharded_dims):
            self._note_gradient(counters, "its gradient is spread over the ranks in another way than its output")
        else:
            plain = gradient.detach() if gradient.requires_grad else gradient
            if type(plain) is not Tensor or glu_dim is not None:
                plain = gate_half(local_tensor(plain), glu_dim)
            if isinstance(counters, JoinedCounters):
                self._count_gradient_rows(counters, plain, layout, owners, mask)
                return
            axis, here = layout.axis, plain.is_cpu
            if here and (layout.dims is not None or mask is not None):
                plain, axis = _arranged(plain, layout, mask)
                if not plain.numel():
                    return
            with self.lock:
                self.got_gradients = True
                if here:
                    add_gradients(counters, plain, axis, self._scratch)
                elif reason := add_gradients_on_device(counters, plain, layout, mask, self.clock):
                    self._note_gradient(counters, reason)

    def _count_gradient_rows(
        self,
        counters: JoinedCounters,
        gradient: Tensor,
        layout: NeuronLayout,
        owners: Owners | None,
        mask: Tensor | None,
    ) -> None:
        """Count a gradient whose rows are of several experts; see :meth:`_count_rows`."""
        dims = layout.dims
        if dims is None or owners is None or not gradient.numel() or is_capturing(gradient):
            return
        rows, kept = rows_kept(gradient, dims, mask)
        with self.lock:
            self.got_gradients = True
            if isinstance(counters, ExpertCounters) and isinstance(owners, Tensor):
                add_expert_gradients(counters, *leave_out_rows(rows, owners, kept, len(counters.members)))
                return
            for own, part, keep in _parts_of(counters, rows, kept, owners):
                if part.is_cpu:
                    plain, axis = keep_positions(part, 2, keep)
                    if plain.numel():
                        add_gradients(own, plain, axis, self._scratch)
                else:
                    add_gradients_on_device(own, part, NeuronLayout(2), keep, self.clock)

    def _note_gradient(self, counters: Counters, reason: str) -> None:
        self.unmeasured.note(self.sites.name_of(counters), reason)


def _parts_of(
    counters: JoinedCounters, rows: Tensor, kept: Tensor | None, owners: Owners
) -> Iterator[tuple[SiteCounters, Tensor, Tensor | None]]:
    """Yield the counters of each layer's site, its rows ``(K, P, N)`` and which positions of them are counted.

    Args:
        counters: The counters of the layers.
        rows: An output or a gradient, ``(R, P, N)``.
        kept: Which positions are counted, bool ``(R, P)``; ``None`` = all.
        owners: How many rows each part has, and of which layer it is.
    """
    start = 0
    for number, size in owners:
        own = counters.members[number]
        if own is not None:
            place = slice(start, start + size)
            yield own, rows[place], None if kept is None else kept[place]
        start += size


def _counted_gradients(x: Tensor) -> list[CountedGradient]:
    return [hook for hook in (x._backward_hooks or {}).values() if isinstance(hook, CountedGradient)]


def _first_output(y: Any) -> Any:
    """Return the first of several outputs: a spiking neuron gives its spikes, and then its state."""
    if isinstance(y, dict):
        y = [*y.values()]
    return y[0] if isinstance(y, (tuple, list)) and len(y) > 0 else y


def _arranged(tensor: Tensor, layout: NeuronLayout, mask: Tensor | None) -> tuple[Tensor, int]:
    """Return what to count of a tensor on the CPU, and its neuron axis.

    Args:
        tensor: Output or gradient ``(…, N, …)``.
        layout: Where its neurons lie. A mask applies only if one dimension indexes them.
        mask: Which positions are counted, bool ``(B, T)``; ``None`` = all.
    """
    return keep_positions(tensor, layout.axis, mask) if layout.dims is None else neurons_first(tensor, *layout)
