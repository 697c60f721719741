"""Register all hooks on a model, pass tensors on to the recorder, and remove every hook at the end.

A forward pre-hook on an activation module receives the pre-activation before an in-place function overwrites it, and
registers a hook for its gradient; a forward hook receives the output. A function mode receives functional activations
and gated products; it is entered only for a forward of an observed step. No output is replaced, and nothing is kept
alive or drawn at random. An error in our own code removes the hooks and lets the training go on.
"""

from __future__ import annotations

import contextlib
import sys
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping
from threading import get_ident
from types import CodeType, FrameType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from neuronscope.attach.activations import Activation, Registry
from neuronscope.attach.call_arguments import CallArguments
from neuronscope.attach.compiling import (
    code_of_forward,
    count_compilations,
    forget_watch,
    in_operator,
    is_compiled,
    is_tracing,
    refuse_earlier_graphs,
    seen_by_modes,
    skip_when_hooked,
    stop_skipping,
    unwatched,
)
from neuronscope.attach.dtensor import is_tensor_parallel, sharded_dims
from neuronscope.attach.examples import ExampleCounter, is_time_first
from neuronscope.attach.function_mode import ActivationFunctionMode
from neuronscope.attach.fused_calls import (
    FUSABLE,
    REASON,
    HiddenHooks,
    TracedLayers,
    hidden_activation,
    last_weight,
    runs_fused,
)
from neuronscope.attach.hook_handles import HookHandles, is_ours
from neuronscope.attach.interrupts import CallStack, is_on_stack
from neuronscope.attach.layer_names import LayerNames
from neuronscope.attach.masks import PositionMask
from neuronscope.attach.module_hooks import (
    AfterActivation,
    BeforeActivation,
    EnterFusable,
    EnterModule,
    LabelOutput,
    LeaveModule,
    NoteLayout,
    ResumeInside,
    SuspendInside,
)
from neuronscope.attach.module_paths import walk
from neuronscope.attach.named_tensors import NamedTensors
from neuronscope.attach.recorder import SiteRecorder
from neuronscope.attach.scripting import allow_scripting, stop_allowing_scripting
from neuronscope.attach.single_thread import CountedThread, EnteredMode, Turns, enclosing_modules
from neuronscope.attach.site_finder import CountersFactory, DeclaredAxis
from neuronscope.errors import NeuronscopeWarning
from neuronscope.options import Examples, Mask

__all__ = ["HookManager"]

#: Packages whose modules measure a network: the functions that they call are not activations of the network.
_METRIC_PACKAGES = frozenset({"torchmetrics"})
#: Fewest unobserved steps for which it pays to take the hooks off the model and put them back.
_FEWEST_UNOBSERVED = 4
#: So often in succession they may be put back sooner, as by a validation after each step, before they stay on.
_MOST_EARLY_RETURNS = 3
_FUSED = (nn.RNNBase, nn.RNNCellBase)


class HookManager:
    """Owns all hooks on one model.

    Args:
        model: The model to watch.
        registry: Says which modules and functions are activations.
        new_counters: Returns the counters of a site; called once for each site and phase.
        declared_axis: Returns the declared axis of a site by its name.
        functional: Whether functional activations and gated products are watched.
        tolerance: See :class:`neuronscope.judge.verdicts.Policy`.
        examples: The option ``examples`` of :func:`neuronscope.watch`.
        mask: The option ``mask``.
        observe: Called to set the phase, the step and whether they are observed, for the counted thread.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        registry: Registry,
        new_counters: CountersFactory,
        declared_axis: DeclaredAxis,
        functional: bool,
        tolerance: float,
        examples: Examples = "auto",
        mask: Mask = None,
        observe: Callable[[], None] = lambda: None,
    ) -> None:
        self.observing = False
        self.registry = registry
        self.functional = functional
        arguments = CallArguments(model)
        self._examples = ExampleCounter(examples, model, arguments)
        self._masks = PositionMask(mask, arguments)
        self.recorder = SiteRecorder(
            names=LayerNames(model),
            examples=self._examples,
            masks=self._masks,
            new_counters=new_counters,
            declared_axis=declared_axis,
            tolerance=tolerance,
            fail=self.fail,
        )
        self.running: list[Any] = []  # the activation modules that are running, one inside another
        self.module_sites: list[str] = []
        self.failure: Exception | None = None
        self._mode = ActivationFunctionMode(self)
        self.entered = EnteredMode(self._mode)
        self.thread = CountedThread()
        self.observe = observe
        self._turns = Turns(self, self.recorder, self.thread)
        self.change = self._turns.change  # has the phase and the step set, now or when the next forward begins
        self.callers = CallStack()  # of the modules in ``observer.frame.owners``
        self._activation: FrameType | None = None  # the caller of the outermost of the `running` modules
        #: Calls that torch fuses: how many modules run around each, the module, its input.
        self._fused_calls: list[tuple[int, nn.Module, Any]] = []
        self._hidden = HiddenHooks(self._leave_fused)
        self.traced_layers = TracedLayers()
        self._step_open = False  # in the counted thread
        self._ends = False  # whether the watch has ended, or is about to
        self._backward_at: int | None = None  # how many modules run around a backward pass that runs inside of them
        self._handles = HookHandles()
        self._off_since = 0  # the step at which they were taken off last
        self._back_at = -1  # the step at which they were put back last
        self._early_returns = 0  # how often in succession they were put back before that had paid
        self._skipped: list[CodeType] = []  # see `skip_when_hooked`
        self._model = weakref.ref(model)
        self._shares: weakref.WeakKeyDictionary[nn.Module, bool] = weakref.WeakKeyDictionary()
        self.note_weights: Callable[[], None] | None = None  # called when the model's own forward begins
        self.recorder.graphs.own_code = code_of_forward([module for path, module in walk(model) if path == ""][-1])
        self.recorder.graphs.is_part = self._is_part
        self.recorder.forward.parts.is_here = lambda: self.thread.in_forward in (None, get_ident())
        self.recorder.sites.is_tensor_parallel = lambda: is_tensor_parallel(self._model())
        self.recorder.sites.paths = self._paths
        self.named = NamedTensors(self)
        self._compilations = count_compilations()
        self._compiles = False  # whether the model was or will be compiled, as far as is known
        self._attach(model)
        refuse_earlier_graphs(self)

    def _attach(self, model: nn.Module) -> None:
        allow_scripting(self)
        hidden: list[str] = []  # modules below these paths get no hooks
        for path, module in walk(model):
            if any(path.startswith(f"{parent}.") for parent in hidden):
                continue
            if isinstance(module, torch.jit.ScriptModule):
                self.recorder.unmeasured.note(
                    path or "(root)",
                    "a scripted or traced module hides its activations from hooks: watch the module it was made of",
                )
                hidden.append(path)
                continue
            if isinstance(module, _FUSED) and type(module).forward.__module__ == _FUSED[0].__module__:
                self.recorder.unmeasured.reasons[path or "(root)"] = (
                    f"{type(module).__name__} applies its activations inside a fused kernel"
                )
            if any(sharded_dims(weight) for weight in module.parameters(recurse=False)):
                self._handles.add_after(module, LabelOutput(self, path))
            if type(module).__module__.partition(".")[0] in _METRIC_PACKAGES:
                self._handles.add_before(module, SuspendInside(self))
                self._handles.add_after(module, ResumeInside(self))
                hidden.append(path)
                continue
            activation = self.registry.of_module(module)
            self._hook(module, path, activation)
            if is_time_first(module):
                self._handles.add_before(module, NoteLayout(self, self._examples))
            if activation is not None:
                self.module_sites.append(path)
                hidden.append(path)

    def _is_part(self, owner: Any) -> bool:
        """Whether an object is a module of the model, and neither the model itself nor a wrapper of it."""
        model = self._model()
        return model is not None and any(module is owner and path != "" for path, module in walk(model))

    def shares_modules(self, module: nn.Module) -> bool:
        """Whether a module, or one inside it, belongs to the model, as far as the first call for this module shows."""
        shares = self._shares.get(module)
        if shares is None:
            model = self._model()
            shares = model is not None and not {*model.modules()}.isdisjoint(module.modules())
            self._shares[module] = shares
        return shares

    def _paths(self) -> set[str]:
        model = self._model()
        return set() if model is None else {path for path, _ in walk(model)}

    def end_outside(self) -> None:
        """Note that what was counted outside of every module has ended."""
        if not self.running and not self.recorder.forward.module_stack:
            self.thread.in_forward = None

    def _hook(self, module: nn.Module, path: str, activation: Activation | None) -> None:
        """Put hooks on a module, if it needs any."""
        is_root = path == ""
        if activation is None and not is_root and not _names_places(module):
            return
        code = skip_when_hooked(module)
        if code is not None:
            self._skipped.append(code)
        if activation is None or is_root:
            enter = EnterFusable if isinstance(module, FUSABLE) else EnterModule
            self._handles.add_before(module, enter(self, path))
        if activation is not None:
            self._handles.add_before(module, BeforeActivation(self, path, activation))
            self._handles.add_after(module, AfterActivation(self), with_kwargs=True)
        if activation is None or is_root:
            self._handles.add_after(module, LeaveModule(self, path))

    def detach(self) -> None:
        """Remove every hook; does nothing if it was done before."""
        self._ends = True
        self.set_observing(False)
        self._handles.remove(self._model())
        forget_watch(self)
        stop_allowing_scripting(self)
        stop_skipping(self._skipped)
        self._skipped = []
        self.recorder.close()

    def pause(self, step: int, steps: int) -> None:
        """Take the hooks off, because nothing is observed for some steps; not if the model may be compiled.

        They stay on if something else than training, time and again, had them put back too soon.

        The compiler traces hooks with the model, and does not look at them again. So the hooks stay on until the model
        has run. After that they stay on if anything was traced since the watch began, or if the model is marked to be
        compiled.

        Args:
            step: Steps of training so far.
            steps: Number of steps for which nothing is observed.
        """
        if steps < _FEWEST_UNOBSERVED or self._early_returns == _MOST_EARLY_RETURNS:
            return
        ran, model = self.recorder.forward.ran, self._model()
        self._compiles |= self.recorder.compiled or self._compilations != count_compilations()
        if ran and model is not None and not self._compiles and not self._handles.off:
            self._compiles = any(is_compiled(module) for module in model.modules())
            if not self._compiles:
                self._handles.take_off()
                self._off_since = step

    def put_back(self, step: int) -> None:
        """Put the hooks back that :meth:`pause` took off.

        Args:
            step: Steps of training so far.
        """
        if not self._handles.off:
            return
        if step != self._back_at:  # several evaluations in a row count as one
            early = step - self._off_since < _FEWEST_UNOBSERVED
            self._early_returns = self._early_returns + 1 if early else 0
            self._back_at = step
        self._handles.put_back()
        if self._compilations != count_compilations():
            self._compiles = True
            self.recorder.sites.expect_missed_sites()

    def detach_when_idle(self) -> None:
        """Detach after an error, unless a forward or the function mode is still active."""
        if self._handles and not self._mode.handling and not self.recorder.forward.module_stack:
            self.detach()

    def set_observing(self, observing: bool) -> None:
        """Start or stop counting, and forget what is left of an interrupted forward."""
        if observing and self._handles.off:
            self.put_back(self.recorder.step)
        self.recorder.restart()
        if self._step_open:
            self.entered.leave(handling=self._mode.handling)
        self.end()
        self.observing = observing
        if observing and self._step_open:
            self.entered.enter(handling=self._mode.handling)

    def open_step(self, inputs: tuple[Any, ...] = (), *, in_forward: bool = False) -> None:
        """Note that a training step begins, so that its own functional calls are watched too.

        Args:
            in_forward: Whether the step runs in place of the model's forward.
            inputs: What the step is given; see :meth:`neuronscope.attach.forward.ForwardContext.begin_step`.
        """
        with self.recorder.lock:
            if not self._turns.take_for_step():
                return
            self._step_open = True
        self._set_explicit_step(True)
        self.recorder.forward.step_is_forward = in_forward
        if self.observing:
            self.recorder.forward.begin_step(inputs)
            self.entered.enter(handling=self._mode.handling)

    def close_step(self) -> None:
        """Note that the training step is over."""
        if self.thread.elsewhere() is not None:
            return
        if not (self._step_open or self.observing or self.failure):  # most often: no step was open
            self.recorder.forward.end_step()
            return
        self._step_open = False
        self._set_explicit_step(False)
        self.recorder.forward.step_is_forward = False
        self.recorder.forward.end_step()
        self.entered.leave(handling=self._mode.handling)
        if self.failure is not None:
            self.detach_when_idle()

    def _set_explicit_step(self, explicit_step: bool) -> None:
        self.recorder.forward.explicit_step = explicit_step
        self.recorder.forward.forget()

    def watches_here(self, traced: bool, begins: bool = False) -> bool:
        """Whether to count what runs in this thread.

        Args:
            traced: Whether ``torch.compile`` traces it.
            begins: Whether a forward may begin here. Then this is noted, and the thread may become the counted one.
        """
        if traced:  # in one thread
            return self.observing and not in_operator()
        here, thread = get_ident(), self.thread
        if thread.in_forward == here:
            return self.observing
        if thread.claimed is None:
            if thread.here == here:
                return begins and self.observing and self._turns.begin(sys._getframe(2))
            if not begins:
                return False
        return self._turns.take(sys._getframe(2), begins)

    def is_counted_here(self) -> bool:
        """Whether this thread is the counted one, in a forward or not."""
        return self.observing and (not in_operator() if is_tracing() else self.thread.here == get_ident())

    def is_attached(self) -> bool:
        """Return whether hooks are on the model, and no error of our own has ended the watch."""
        return bool(self._handles) and self.failure is None

    def is_busy(self) -> bool:
        """Whether the counted thread runs a forward, or is in an explicit step."""
        frame = self._activation or self.callers.innermost
        running = self.thread.in_forward is not None or self.thread.claimed is not None
        return self._step_open or (running and (frame is None or self.thread.runs(frame)))  # or it was interrupted

    def is_inside(self, caller: FrameType) -> bool:
        """Whether a module that calls its hooks runs inside another one of the model.

        Args:
            caller: The frame that calls a hook of the module.
        """
        for module in enclosing_modules(caller)[1:]:
            for hook in list(module._forward_pre_hooks.values()):
                if isinstance(hook, EnterModule) and hook.manager is self:
                    return True
        return False

    def runs(self, caller: FrameType) -> bool:
        """Return whether anything that is watched runs in this thread, and forget what an interrupt ended.

        Args:
            caller: The frame that called a hook or a torch function.
        """
        module_stack = self.recorder.forward.module_stack
        if module_stack and self.thread.is_here():
            del module_stack[self.callers.running(len(module_stack), caller) :]
            if not module_stack:
                self.end()
        if self._activation is not None and not is_on_stack(self._activation, caller):
            self._activation = None
            self.running.clear()
            self.entered.resume()
        return bool(module_stack) or self._step_open

    def end(self) -> None:
        """Reset the state of a forward that has ended, and leave the function mode unless a step is open."""
        if self.callers.innermost is not None:
            self.callers.cut(0)
        self._activation = None
        self.running.clear()
        self._fused_calls.clear()
        self._hidden.put_back()
        self._leave_mode()
        self.thread.in_forward = None

    def _leave_mode(self) -> None:
        """Leave the function mode, if it was entered and no step is open."""
        if self.entered.threads and (self._backward_at is not None or not self._step_open):
            self.entered.leave(handling=self._mode.handling)

    @contextlib.contextmanager
    def in_backward_pass(self) -> Iterator[None]:
        """Return a context in which a forward, or an explicit step, runs a backward pass.

        Torch has taken the mode off for it. Modules that activation checkpointing runs again enter and leave the mode.
        """
        here, forward = get_ident(), self.recorder.forward
        if here not in self.entered.threads:  # an interrupt has ended what ran
            yield
            return
        before, again = self._backward_at, forward.recomputing
        self.entered.threads.remove(here)
        self._backward_at = len(forward.module_stack)
        forward.recomputing = again or bool(forward.module_stack)
        try:
            yield
        finally:
            self._backward_at, forward.recomputing = before, again
            self.entered.leave(handling=False)  # an interrupt may have ended a module
            if (self._step_open or forward.module_stack) and self.is_attached():
                self.entered.threads.append(here)
            else:  # torch puts the mode back after the call
                self.entered.take_off_next()

    def fail(self, error: Exception) -> None:
        """Handle an error in our own code: warn once, detach, and let the training go on."""
        if self.failure is None and not self._ends:  # another thread may detach, while this one is counting
            self.failure = error
            if self._mode.handling:
                self.observing = False  # torch puts the mode back after the call; the end of the forward takes it off
            else:
                self.detach()
            warnings.warn(
                f"Neuronscope met a fault of its own and stopped watching; training goes on. {error!r}",
                NeuronscopeWarning,
                stacklevel=2,
            )

    def enter(
        self, path: str, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], caller: FrameType | None
    ) -> None:
        """Note that a watched module begins to run.

        Args:
            path: Path of the module.
            module: The module.
            args: Positional arguments of its forward.
            kwargs: Keyword arguments of its forward.
            caller: The frame that calls the module; ``None`` while ``torch.compile`` traces.
        """
        module_stack = self.recorder.forward.module_stack
        if caller is not None:
            # An interrupt ended a call if a hook is called from a place where that call does not run.
            if self._activation is not None or (module_stack and not self.callers.runs(id(module))):
                self.runs(caller)
            if path == "" and module_stack and self.callers.innermost is None:
                self.set_observing(True)  # a compiled forward failed, and its state is left
            if self.thread.in_forward != get_ident() and not self._turns.begin(caller):
                return  # it ended an interrupted forward, and another thread was quicker
            self.callers.begin(len(module_stack), caller)
        if path == "" and caller is not None and self.note_weights is not None:
            self.note_weights()
        begins = self.recorder.forward.enter(path, module, args, kwargs) or len(module_stack) - 1 == self._backward_at
        if begins and not self.recorder.forward.exporting:
            self.entered.enter(handling=self._mode.handling)

    def enter_fused_while_tracing(self, path: str, module: Any, args: Any, kwargs: Any) -> None:
        """Take the hooks off an encoder layer while ``torch.compile`` traces it, if it goes its fast path in the graph.

        Args:
            path: Path of the layer.
            module: The layer.
            args: Positional arguments of its forward.
            kwargs: Keyword arguments of its forward.
        """
        if runs_fused(module, args, kwargs, is_ours, compiled=True):
            self.traced_layers.take_off(module)
            if self.observing:
                self._note_fused(path, module)

    def end_fused_while_tracing(self, args: Any, output: Any) -> None:
        """Put the hooks back, because the fused kernel of the layer is in the graph, and follow what it returned.

        Args:
            args: Positional arguments of the kernel.
            output: What it returned.
        """
        layer = self.traced_layers.layer
        self.traced_layers.put_back()
        if layer is not None:
            self._follow_fused(layer, args[0], output)

    def enter_fused(self, path: str, module: nn.Module, x: Any) -> None:
        """Stand aside during a call that torch runs in a fused kernel.

        Args:
            path: Path of the module.
            module: The module.
            x: Its input ``(B, T, D)``.
        """
        self._fused_calls.append((len(self.recorder.forward.module_stack) - 1, module, x))
        self.entered.leave(handling=self._mode.handling)
        if isinstance(module, nn.TransformerEncoderLayer):
            self._note_fused(path, module)

    def _note_fused(self, path: str, layer: nn.TransformerEncoderLayer) -> None:
        prefix = f"{path}." if path else ""
        self.recorder.unmeasured.note_ran(f"{prefix}activation", self.recorder.running_phase)
        self.recorder.unmeasured.note(f"{prefix}linear1/{hidden_activation(layer)}", REASON)

    def hide_hooks(self, module: nn.Module) -> None:
        """Take all hooks off a module and what is inside it while it runs, if torch looks for hooks there."""
        if isinstance(module, nn.TransformerEncoderLayer):
            self._hidden.take_off(module)

    def _leave_fused(self, module: nn.Module, output: Any) -> None:
        """Leave a module whose hooks were off when it ended; if it failed, torch calls them now."""
        if output is not None and self._fused_calls and self._fused_calls[-1][1] is module and self.watches_here(False):
            try:
                self.leave(self.recorder.forward.current_path, module, output)
            except Exception as error:
                self.fail(error)

    def leave(self, path: str, module: nn.Module, output: Any) -> None:
        """Note that a watched module has ended or failed.

        Args:
            path: Path of the module.
            module: The module.
            output: What it returned; ``None`` if it failed.
        """
        if self._fused_calls:
            self._end_fused(output)
        if self.recorder.graphs.trace_error is not None and not is_tracing():
            raise self.recorder.graphs.trace_error
        forward = self.recorder.forward
        ended = forward.leave()
        if ended or len(forward.module_stack) == self._backward_at:
            self._leave_mode()
        if path == "":
            forward.note_outputs(output)  # before another thread may begin a forward
        if ended:
            self.end()
        else:
            self.callers.cut(len(forward.module_stack))

    def _end_fused(self, output: Any) -> None:
        """If the module that ends was run in a fused kernel, watch again, and note what it returned."""
        depth, found = len(self.recorder.forward.module_stack) - 1, None
        while self._fused_calls and self._fused_calls[-1][0] >= depth:
            found = self._fused_calls.pop()
        if found is None or self._fused_calls:
            return
        self.entered.enter(handling=self._mode.handling)
        _, module, x = found
        with unwatched():
            self._follow_fused(module, x, output[0] if isinstance(output, tuple) else output)

    def _follow_fused(self, module: nn.Module, x: Any, y: Any) -> None:
        weight = last_weight(module)
        if isinstance(y, Tensor) and weight is not None:
            self.recorder.forward.flow.follow(F.linear, (x, weight), {}, y)

    def begin_activation(self, call: Any, caller: FrameType | None) -> None:
        """Note that a module runs whose inner calls are not watched.

        Args:
            call: The call that was begun for it, or ``None``.
            caller: The frame that calls the module; ``None`` while ``torch.compile`` traces.
        """
        if not self.running:
            self._activation = caller
        self.running.append(call)

    def before(self, path: str, activation: Activation, module: nn.Module, x: Any, caller: FrameType | None) -> None:
        """Begin the call of an activation module.

        Args:
            path: Path of the module.
            activation: The activation that it applies.
            module: The module.
            x: Its input, the pre-activation.
            caller: The frame that calls the module; ``None`` while ``torch.compile`` traces.
        """
        call, traced = None, caller is None
        if caller is not None:
            module_stack = self.recorder.forward.module_stack
            if self._activation is not None or (module_stack and not self.callers.runs(id(module))):
                self.runs(caller)  # see `enter`
            if self.thread.in_forward != get_ident() and not self._turns.begin(caller):
                return
        if not self.running:
            glu_dim = getattr(module, "dim", -1) if activation.halves else None
            if not traced:
                self.entered.suspend()  # its inner calls are not watched
            if traced or (type(x) is Tensor and not seen_by_modes()):
                call = self.recorder.begin(path, "", activation, x, glu_dim, traced)
            else:
                with unwatched(False):
                    call = self.recorder.begin(path, "", activation, x, glu_dim)
            self._activation = caller
        self.running.append(call)

    def after(self, x: Any, y: Any, traced: bool) -> None:
        """End the call of an activation module.

        Args:
            x: The pre-activation.
            y: The output; ``None`` if the module failed.
            traced: Whether ``torch.compile`` traces it.
        """
        if not self.running:
            return  # the hook was moved to a module whose begin was not seen
        call = self.running.pop()
        if self.running:
            return
        self._activation = None
        end = self.recorder.carry if call is None else self.recorder.end
        try:
            if traced or (type(x) is Tensor and type(y) is Tensor and not seen_by_modes()):
                end(call, x, y)
            else:
                with unwatched(False):
                    end(call, x, y)
        finally:  # an interrupt may come while the output is counted
            if not traced:
                self.entered.resume()
        if not self.recorder.forward.module_stack:
            self.end_outside()


def _names_places(module: nn.Module) -> bool:
    """Whether the place of an activation function that is called in a module is named by its path.

    Torch's own leaf modules call none. A module without parameters, such as a point at which a library lets hooks in,
    is a part of the module around it: it may look at its own hooks, so it gets none.
    """
    if type(module) in (nn.ModuleList, nn.ModuleDict) or next(module.parameters(), None) is None:
        return False
    return not type(module).__module__.startswith("torch.nn.modules.") or next(module.children(), None) is not None
