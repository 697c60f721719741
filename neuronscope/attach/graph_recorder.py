"""Record the calls of sites in the graphs that ``torch.compile`` traces.

What a call leads to is found once, while the compiler traces: which site it is of, its counters, and where the neurons
of its tensor lie. These are constants of the graph. The operators that count are part of it, so that the back end fuses
them with the network's own.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass, replace
from types import CodeType
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from neuronscope.attach.activations import Activation
from neuronscope.attach.compiled_parts import PartGraph
from neuronscope.attach.compiling import (
    TracedEnd,
    comptime,
    enters_graph,
    in_autograd_function,
    in_backward,
    is_in_graph,
    is_quantized_in_graph,
    operator_around,
    original_code,
    set_integer,
    set_variable,
    trace_attempt,
    while_tracing,
)
from neuronscope.attach.dtensor import local_tensor
from neuronscope.attach.origins import LOST
from neuronscope.attach.selections import SELECTING
from neuronscope.attach.site_finder import Call
from neuronscope.attach.units import resized
from neuronscope.attach.unmeasured import place_of
from neuronscope.attach.unsupported import IN_OPERATOR
from neuronscope.count.compiled_graphs import add_outputs_in_graph, leave_out, once_a_forward, register_gradient_hook
from neuronscope.count.counters import SiteCounters
from neuronscope.count.expert_counters import (
    ExpertCounters,
    add_expert_outputs_in_graph,
    register_expert_gradient_hook,
)
from neuronscope.count.neuron_layout import neurons_first
from neuronscope.count.positions import blank_positions
from neuronscope.sites import SiteKey

if TYPE_CHECKING:
    from neuronscope.attach.recorder import SiteRecorder

__all__ = ["GraphRecorder"]

#: The traced code, the phase, the path of a module, the name of a function or "", and that of the activation.
_CallPlace = tuple[CodeType | None, str, str, str, str]
#: In the metadata of a node of autograd's graph: the sites whose gradients are counted at its results.
_HOOKED = "neuronscope"


@dataclass(slots=True)
class _TracedCall:
    """A call in a graph.

    Attributes:
        call: The call.
        adds_examples: Whether it adds to the examples of its site.
        in_part: Whether its graph is of a part of the model.
        owners: For a layer of experts: which expert each row is of.
        is_given: Whether its pre-activation enters the graph.
        pre_activation: Of a selection, if there is one.
    """

    call: Call
    adds_examples: bool
    in_part: bool
    owners: weakref.ref[Tensor] | None = None
    is_given: bool = False
    pre_activation: weakref.ref[Tensor] | None = None


class GraphRecorder:
    """Records the calls of sites in graphs. A call is a number in the code that the compiler traces.

    Args:
        recorder: Records the calls of the same watch in eager mode.
        tolerance: See :class:`neuronscope.judge.verdicts.Policy`.

    Attributes:
        trace_error: An error of our own while the compiler traced, if there was one.
        own_code: The model's own forward.
        is_part: Returns whether an object is a module inside the model.
    """

    def __init__(self, recorder: SiteRecorder, tolerance: float) -> None:
        self.recorder = recorder
        self.forward = recorder.forward
        self.trace_error: Exception | None = None
        self.own_code: CodeType | None = None
        self.is_part: Callable[[Any], bool] = lambda _: False
        self._code: CodeType | None = None  # what is traced
        self._first_of_graph = 0  # the number of its first call
        self._numbers: Counter[_CallPlace] = Counter()  # of the calls in it
        self._forward_calls: dict[tuple[_CallPlace, int], dict[tuple[SiteKey | None, bool], Call | None]] = {}
        self._calls: list[_TracedCall] = []
        self._found: list[int] = []  # holds the number of the last call, if it is counted

        # torch.compile runs these while it traces.
        self._find_while_tracing = while_tracing(
            self._find, "phase", "path", "function", "activation", "x", "glu_dim", listener=self
        )
        self._end_while_tracing = while_tracing(self._end, "call", "x", "y")
        self._load_mask_while_tracing = while_tracing(self._load_mask, "tensor", "experts")
        self._load_examples_while_tracing = while_tracing(lambda: set_integer("examples", "forward", "examples"))
        self._load_owners_while_tracing = while_tracing(self._load_owners, "call")
        self._load_pre_activation_while_tracing = while_tracing(self._load_pre_activation, "number")
        self._unreadable_while_tracing = while_tracing(self._unreadable, "call")
        self._select_while_tracing = while_tracing(self._select, "phase", "function", "args", "kwargs", "y")
        self._carry_while_tracing = while_tracing(recorder.carry_origin, "x", "y")
        self._uncountable_while_tracing = while_tracing(self._uncountable, "path", "function", "x", listener=self)

        # And these are constants of the graph.
        calls, found = self._calls, self._found

        def last_found() -> int | None:
            return found.pop() if found else None

        def counters_of(call: int) -> SiteCounters | None:
            counters = calls[call].call.counters
            return counters if isinstance(counters, SiteCounters) else None

        def experts_of(call: int) -> ExpertCounters | None:
            counters = calls[call].call.counters
            return counters if isinstance(counters, ExpertCounters) else None

        def layout_of(call: int) -> tuple[Any, ...]:
            return tuple(calls[call].call.layout)

        def adds_examples(call: int) -> bool:
            return calls[call].adds_examples

        def is_in_part(call: int) -> bool:
            return calls[call].in_part

        def is_given(call: int) -> bool:
            return calls[call].is_given

        # With `dynamic=True` an attribute would be an input of the graph, which torch cannot give to two checkpoints.
        self._tolerance = torch.compiler.assume_constant_result(lambda: tolerance)
        self._last_found = torch.compiler.assume_constant_result(last_found)
        self._counters_of = torch.compiler.assume_constant_result(counters_of)
        self._experts_of = torch.compiler.assume_constant_result(experts_of)
        self._layout_of = torch.compiler.assume_constant_result(layout_of)
        self._adds_examples = torch.compiler.assume_constant_result(adds_examples)
        self._is_in_part = torch.compiler.assume_constant_result(is_in_part)
        self._is_given = torch.compiler.assume_constant_result(is_given)

    def begin_graph(self, code: CodeType, owner: Any, given: Iterable[Tensor]) -> Hashable:
        """Note that a graph begins to be traced, and return for what of ours it is made.

        Args:
            code: See :class:`~neuronscope.attach.compiling.GraphListener`.
            owner: See there.
            given: See there.
        """
        forward, recorder = self.forward, self.recorder
        recorder.note_compiled()
        running = forward.module_stack  # by hooks that ran in eager code, and were not traced
        if running:
            is_model = running[-1] == "" and original_code(code) == self.own_code and not self.is_part(owner)
        else:
            is_model = not (forward.explicit_step and self.is_part(owner))
        # In an explicit step a function that is compiled by itself may be given the units of any layer.
        guarded = bool(running) or not is_model or forward.explicit_step
        outside = forward.training and not running and not torch.is_grad_enabled()
        in_function = in_autograd_function() if outside else None
        self._code, self._first_of_graph = code, len(self._calls)
        self._numbers.clear()
        facts = forward.parts.begin_graph(given, is_model=is_model, guarded=guarded, in_function=in_function)
        return id(self), recorder.running_phase, facts, in_backward(False), in_function, *running

    def end_graph(self, end: TracedEnd | None) -> PartGraph | None:
        """Note that a graph was traced, and return what is to be done around each of its runs.

        Args:
            end: See :class:`~neuronscope.attach.compiling.GraphListener`.
        """
        counters = {id(each.call.counters): each.call.counters for each in self._calls[self._first_of_graph :]}
        counts = [
            tensor
            for each in counters.values()
            if isinstance(each, (SiteCounters, ExpertCounters))
            for tensor in each.of_outputs
        ]
        return self.forward.parts.end_graph(end, counts)

    def begin(  # `comptime` reads its arguments and variables
        self,
        path: str,  # noqa: ARG002
        function: str,  # noqa: ARG002
        activation: Activation,  # noqa: ARG002
        x: Tensor,
        glu_dim: int | None,
    ) -> int | None:
        """Begin a call of a site: see :meth:`neuronscope.attach.recorder.SiteRecorder.begin`.

        Args:
            path: See there.
            function: See there.
            activation: See there.
            x: See there.
            glu_dim: See there.

        Returns:
            The number of the call; ``None`` if it is not counted.
        """
        phase = self.recorder.running_phase  # noqa: F841
        comptime(self._find_while_tracing)
        call: int | None = self._last_found()
        if call is None:
            return None
        self._count_gradient(call, x, glu_dim)
        return call

    def note_uncountable(self, path: str, function: str, x: Tensor) -> None:  # noqa: ARG002, as in `carry`
        """Note that an activation function was applied to a single number, or to a tensor of an unusual type.

        Args:
            path: As in :meth:`begin`.
            function: As in :meth:`begin`.
            x: As in :meth:`begin`.
        """
        comptime(self._uncountable_while_tracing)

    def end(self, call: int, x: Any, y: Any) -> None:  # noqa: ARG002, `comptime` reads its arguments
        """End a call of a site: count its output.

        Args:
            call: What :meth:`begin` returned.
            x: The pre-activation ``(…, N, …)``.
            y: The output ``(…, N, …)``.
        """
        if isinstance(y, Tensor):
            comptime(self._end_while_tracing)
            self._count(call, y)
        else:
            comptime(self._unreadable_while_tracing)

    def carry(self, x: Tensor, y: Tensor) -> None:  # noqa: ARG002, `comptime` reads its arguments
        """Note what an activation module returned whose call is not counted: what it was given.

        Args:
            x: Its input.
            y: Its output.
        """
        comptime(self._carry_while_tracing)

    def select(
        self,
        phase: str,  # noqa: ARG002, `comptime` reads its arguments
        function: Any,  # noqa: ARG002
        args: tuple[Any, ...],  # noqa: ARG002
        kwargs: dict[str, Any],  # noqa: ARG002
        y: Any,
    ) -> None:
        """Count what a function leaves of a site: see :meth:`neuronscope.attach.recorder.SiteRecorder.select`.

        Args:
            phase: The phase of the forward that is running.
            function: See there.
            args: See there.
            kwargs: See there.
            y: See there.
        """
        comptime(self._select_while_tracing)
        number = self._last_found()
        if number is not None:
            x: Any = None
            comptime(self._load_pre_activation_while_tracing)
            if x is not None:
                self._count_gradient(number, x, None)
            self._count(number, y)

    def find_named(self, call: Call | None, x: Any) -> None:
        """Note the call of a tensor that the user names; is not traced.

        Args:
            call: The call, or ``None``.
            x: Its pre-activation.
        """
        self._found.clear()
        if call is not None:
            self._note_given(self._note_traced(call), x)

    def count_named(self, y: Any, x: Any) -> None:
        """Count the tensor whose call was noted last.

        Args:
            y: The tensor ``(…, N, …)``.
            x: Its pre-activation.
        """
        call = self._last_found()
        if call is not None:
            self._count_gradient(call, x, None)
            self._count(call, y)

    # What finds a call; is not traced.

    def _find(
        self, phase: str, path: str, function: str, activation: Activation, x: Tensor, glu_dim: int | None
    ) -> None:
        self._found.clear()
        if self._is_inside(phase, path, function, x):
            return
        place = (self._code, phase, path, function, activation.name)
        known = self._forward_calls.setdefault((place, self._numbers[place]), {})
        self._numbers[place] += 1
        again = in_backward(False)
        call = self._call_again(known, x, glu_dim) if again else None
        if call is None:
            call = self.recorder.sites.find(phase, path, function, activation, x, glu_dim, traced=True)
        if not again:
            known[None if call is None else call.key, torch.is_grad_enabled()] = call
        if call is not None:
            self._note_given(self._note_traced(call), x)

    def _is_inside(self, phase: str, path: str, function: str, x: Tensor) -> bool:
        """Whether a call is made inside a transform or operator, or of a quantised tensor, after noting that."""
        unmeasured = self.recorder.unmeasured
        if torch._C._functorch.maybe_current_level() is not None:
            unmeasured.note_transformed(phase, path, function, x)
        elif operator := operator_around():
            unmeasured.note_inside(operator, phase, path, function, x)
        elif is_quantized_in_graph(x):
            unmeasured.note_quantized(phase, path, function, x)
        else:
            return False
        return True

    def _uncountable(self, path: str, function: str, x: Tensor) -> None:
        units = x.is_floating_point() and self._is_inside(self.recorder.running_phase, path, function, x)
        if not (units or in_backward(False)):
            self.recorder.unmeasured.note_uncountable(self.forward.flow.origin(x), place_of(path, function), x)

    def _call_again(
        self, known: Mapping[tuple[SiteKey | None, bool], Call | None], x: Tensor, glu_dim: int | None
    ) -> Call | None:
        """Return the call that a graph makes again in a backward pass; ``None`` if the flow is to say what it is.

        Activation checkpointing may give the graph tensors of which the flow knows nothing, or nothing any more. The
        graph needs the same operators as the first one, also where the call may be of several sites. Then it counts
        for none.

        Args:
            known: The calls in the same place of graphs that ran in no backward pass, by site and by whether they had
                gradients; ``None`` for one of no site.
            x: The pre-activation.
            glu_dim: See :meth:`begin`.
        """
        units = self.forward.flow.origin(x).units
        calls: dict[SiteKey, tuple[Call, SiteCounters]] = {}
        sure = True  # that it is one of these
        for call in known.values():
            if call is None or not isinstance(call.counters, SiteCounters):
                sure = units is not None
            elif (units is None or units.layer == call.key.layer) and _may_be_given(call, call.counters, x, glu_dim):
                calls[call.key] = call, call.counters
        if not calls or (len(calls) > 1 and units is not None):
            return None
        call, counters = next(iter(calls.values()))
        if len(calls) == 1 and sure:
            return call
        if not all(graded for _, graded in known):
            for key, (_, each) in calls.items():
                each.unreadable = True
                self.recorder.unmeasured.note(
                    key.name,
                    "its gradients are not counted: a compiled graph applies its activation to other tensors too, and "
                    "reentrant activation checkpointing does not say to which one, where the graph runs again",
                )
        nobody = SiteCounters(counters.neurons, counters.traced.device)
        return replace(call, counters=nobody, hook=None, after=call.after.without_units(LOST))

    def _select(self, phase: str, function: Any, args: Any, kwargs: Any, y: Any) -> None:
        self._found.clear()
        if function not in SELECTING:
            return
        if operator := operator_around():
            data = [each for each in args if isinstance(each, Tensor)]
            origins = [self.forward.flow.origin(each) for each in data]
            if len(data) != 1 and any(origin.site is not None for origin in origins):  # it may be a gated product
                place = place_of(self.forward.current_path, function.__name__)
                self.recorder.unmeasured.note(place, IN_OPERATOR.format(operator))
            return
        selected = self.recorder.sites.selections.find(phase, function, args, kwargs, y, traced=True)
        if selected is not None:
            call, x = selected
            traced = self._note_traced(call)
            if x is not None and is_in_graph(x):
                traced.pre_activation = weakref.ref(x)
                self._note_given(traced, x)

    def _note_traced(self, call: Call) -> _TracedCall:
        counters = call.counters if isinstance(call.counters, (SiteCounters, ExpertCounters)) else None
        if counters is not None:
            counters.enter_graph()
            counters.clock = self.recorder.clock.on(counters.tensors.traced.device)
        in_part = self.forward.parts.tracing
        first = in_part or (counters is not None and counters.is_first_call(self.forward.number, trace_attempt()))
        traced = _TracedCall(call, first, in_part)
        if isinstance(call.owners, Tensor):  # the compiler keeps it as long as it traces the graph
            traced.call, traced.owners = replace(call, owners=None), weakref.ref(call.owners)
        self._found.append(len(self._calls))
        self._calls.append(traced)
        return traced

    def _note_given(self, traced: _TracedCall, x: Tensor) -> None:
        """Note that the pre-activation of a call enters the graph, if it does."""
        if enters_graph(x) and x.requires_grad and torch.is_grad_enabled():
            traced.is_given = True
            self.forward.parts.note_given(x, traced.call.key, _PreActivationOfCall(self.recorder, traced.call))

    def _end(self, call: int, x: Any, y: Tensor) -> None:
        self.forward.flow.row_masks.pass_on(x, y)
        self.recorder.note_output(self._calls[call].call, y)

    def _unreadable(self, call: int) -> None:
        self.recorder.note_unreadable(self._calls[call].call, None)

    # What adds the operators that count; is traced.

    def _count(self, call: int, y: Tensor) -> None:
        experts = self._experts_of(call)
        if experts is not None:
            self._count_rows(call, y, experts)
            return
        counters = self._counters_of(call)
        if counters is None:
            return
        axis, dims = self._layout_of(call)
        plain, axis = neurons_first(y, axis, dims)
        left_out = None
        if dims is None:
            plain, left_out = blank_positions(plain, axis, self._mask(y, False))
        examples: int | Tensor = 0
        if self._adds_examples(call):
            positions = plain.numel() // plain.shape[axis]
            examples = min(positions, self._examples())
            if self._is_in_part(call):
                examples = once_a_forward(examples, self.forward.number_tensor, counters.last_forward)
        add_outputs_in_graph(counters, plain, axis, examples, self._tolerance())
        if left_out is not None:
            leave_out(counters, left_out)

    def _count_rows(self, call: int, y: Tensor, experts: ExpertCounters) -> None:
        """Count an output whose rows are of several experts."""
        _, dims = self._layout_of(call)
        forward = self.forward
        number = forward.number_tensor if self._is_in_part(call) else None
        first = self._adds_examples(call)
        add_expert_outputs_in_graph(
            y,
            dims,
            self._owners(call),
            self._mask(y, True),
            self._examples(),
            number,
            first,
            experts.clock,
            self._tolerance(),
            *experts.tensors,
            *experts.pace,
        )

    def _count_gradient(self, call: int, x: Tensor, glu_dim: int | None) -> None:
        if self._is_given(call) or not x.requires_grad or not torch.is_grad_enabled():
            return
        axis, dims = self._layout_of(call)
        experts = self._experts_of(call)
        if experts is not None:
            tensors = experts.tensors
            register_expert_gradient_hook(
                x,
                dims,
                glu_dim,
                self._owners(call),
                self._mask(x, True),
                tensors.zero_gradients,
                tensors.traced_gradients,
            )
            return
        counters = self._counters_of(call)
        if counters is not None:
            register_gradient_hook(x, axis, dims, glu_dim, counters, self._mask(x, False))

    # What loads a variable of a graph into traced code: the first method is traced, the second sets its variable.

    def _owners(self, call: int) -> Any:  # noqa: ARG002, `comptime` reads it
        """Return which expert each row is of, int64 ``(R,)``."""
        owners = None
        comptime(self._load_owners_while_tracing)
        if owners is None:  # eager code made the rows
            owners = self.forward.flow.expert_rows.last_owners
        return owners

    def _load_owners(self, call: int) -> None:
        reference = self._calls[call].owners
        owners = None if reference is None else reference()
        if owners is not None and is_in_graph(owners):
            set_variable("owners", owners)

    def _mask(self, tensor: Tensor, experts: bool) -> Tensor | None:  # noqa: ARG002, `comptime` reads them
        """Return which positions of a tensor are counted; ``None`` = all.

        Args:
            tensor: An activation or a pre-activation.
            experts: Whether its rows are of several experts, which the mask of the forward does not fit.
        """
        mask = self.forward.mask
        if mask is None:
            return None
        if experts:
            mask = None
        comptime(self._load_mask_while_tracing)
        return mask

    def _load_mask(self, tensor: Tensor, experts: bool) -> None:
        own = self.forward.flow.row_masks.of(tensor)
        if own is not None and is_in_graph(own):
            set_variable("mask", own)
        elif experts:
            self.recorder.ignored_mask = True

    def _examples(self) -> int:
        """Return the number of examples of a forward, as a number that may change."""
        forward, examples = self.forward, None
        comptime(self._load_examples_while_tracing)
        return forward.examples if examples is None else examples

    def _load_pre_activation(self, number: int) -> None:
        """Set the variable ``x`` of :meth:`select` to the pre-activation of a selection, if there is one."""
        reference = self._calls[number].pre_activation
        found = None if reference is None else reference()
        if found is not None:
            set_variable("x", found)


class _PreActivationOfCall(NamedTuple):
    """See :class:`~neuronscope.attach.compiled_parts.GivenPreActivation`."""

    recorder: SiteRecorder
    call: Call

    def register(self, x: Tensor, again: bool) -> None:
        if not x.requires_grad:
            return
        if x.grad_fn is not None:  # its hooks are there: plain checkpointing gives the graph another tensor of it
            metadata: Any = x.grad_fn.metadata
            hooked = metadata.setdefault(_HOOKED, set())
            place = (id(self.recorder), self.call.key, x.output_nr)
            if again and place in hooked:
                return
            hooked.add(place)
        call, units = self.call, self.recorder.forward.flow.given(x).units
        self.recorder.hook_call(x, call if units is None else self.recorder.sites.with_owners(call, units))

    def give_up(self) -> None:
        if self.call.counters is not None:
            self.call.counters.unreadable = True
            self.recorder.unmeasured.note(
                self.call.key.name,
                "its gradients are not counted: its pre-activation enters a compiled graph from code that may use it "
                "too, such as code before a graph break, and a graph sees the gradient of its own uses alone",
            )


def _may_be_given(call: Call, counters: SiteCounters, x: Tensor, glu_dim: int | None) -> bool:
    """Whether a tensor has the shape of the pre-activation of a call.

    Args:
        call: The call.
        counters: Its counters.
        x: The tensor.
        glu_dim: The dimension along which it is split in two halves (GLU), otherwise ``None``.
    """
    if x.is_nested:
        return False
    shape, (axis, dims) = [*local_tensor(x).shape], call.layout
    if glu_dim is not None:
        shape[glu_dim] //= 2
    if dims is None:
        return len(shape) > axis and int(shape[axis]) == counters.neurons
    return len(dims) == len(shape) and resized(dims, shape) is not None
