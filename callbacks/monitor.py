"""Monitor: what a training callback is in any framework: its options, what it has watched, what it says of it.

A framework's own callback is a subclass that adds when: when hooks go on and off, which batches count as which phase,
and where the run logs.
"""

from __future__ import annotations

import warnings
from abc import abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar

from torch import nn

from neuronscope.callbacks.publishing import Publisher
from neuronscope.callbacks.runs import Runs
from neuronscope.callbacks.suppress_errors import SuppressErrors
from neuronscope.callbacks.threshold import DeadThreshold
from neuronscope.errors import NeuronscopeWarning, NothingToWatchError, UsageError
from neuronscope.options import WatchArguments, WatchOptions
from neuronscope.report.report import Report
from neuronscope.scope import Scope
from neuronscope.tally.census import Census

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["DEFAULT_EVERY_N_STEPS", "Monitor"]

#: Optimizer steps from one observed step to the next, unless the user says otherwise. An observed step of an ordinary
#: network costs 3 to 4 % more and the others next to nothing (``benchmarks/steps.py``): under 1 % at every 20th. Where
#: a whole step takes a millisecond, the fixed cost of hooks shows: half as much again where observed.
DEFAULT_EVERY_N_STEPS = 20


class Monitor:
    """Watches a run for a framework's callback; made by making one of those."""

    #: See :class:`neuronscope.callbacks.phase_gate.Gate`.
    step_is_model: ClassVar[bool]
    #: How a user gives this callback to the framework, for an error.
    used_like: ClassVar[str]

    def __init__(
        self,
        *,
        on_dead: str = "log",
        threshold: float = 50.0,
        images: bool = True,
        text: bool = True,
        vectors: bool = True,
        drawing_share: float = 0.01,
        **options: Unpack[WatchArguments],
    ) -> None:
        """Set what is watched, and what is made of it.

        Args:
            on_dead: What to do when, in a window of training that is long enough to be sure, ``threshold`` percent of
                the neurons are dead or give NaN: ``log`` nothing more than always, ``warn`` as well, or ``stop`` the
                training cleanly through the framework.
            threshold: Percent of all observed neurons.
            images: Whether TensorBoard gets pictures.
            text: Whether TensorBoard gets the diagnosis.
            vectors: Whether TensorBoard gets a byte a neuron and window, for Neuronscope's own tab.
            drawing_share: Largest share of the run's time that pictures, diagnosis and vectors may take, in a thread of
                their own: by default the first come after some 40 seconds. 1 draws them whenever a window closes, and
                lets training wait where drawing cannot keep up. The end of a run is always drawn, and is on the disk
                before the run returns.
            **options: As for :func:`neuronscope.watch`; here ``every_n_steps`` is 20 unless it is given.

        Raises:
            UsageError: An argument is not what is expected.
        """
        super().__init__()
        options.setdefault("every_n_steps", DEFAULT_EVERY_N_STEPS)
        watched = WatchOptions(**options)
        self._runs = Runs(watched, step_is_model=self.step_is_model)
        self._alarm = DeadThreshold(on_dead, threshold)
        self._publisher = Publisher(images=images, text=text, vectors=vectors, drawing_share=drawing_share)
        self._faults = SuppressErrors("watch this run any longer", self._runs.give_up)
        # Computed once: Lightning asks for it six times a step.
        self._state_key = (
            f"{type(self).__qualname__}({watched}, on_dead={on_dead!r}, threshold={self._alarm.threshold})"
        )
        self._window_steps = watched.window_steps

    # --- what was seen ---------------------------------------------------------------------------------------------

    @property
    def scope(self) -> Scope | None:
        """What watches the model, or watched it last; ``None`` before anything ran."""
        return self._runs.scope

    def report(self, phase: str = "train") -> Report:
        """What is known of one phase: ``train``, ``val`` or ``test``.

        Raises:
            UsageError: Nothing was watched yet.
        """
        return self._watched().report(phase)

    def census(self, phase: str = "train", window: str = "all") -> Census:
        """The exact counts of one phase over one window; see :meth:`neuronscope.Scope.census`.

        Raises:
            UsageError: Nothing was watched yet.
        """
        return self._watched().census(phase, window)

    def _watched(self) -> Scope:
        if self._runs.scope is None:
            raise UsageError(f"Expected a monitor that has watched a run, but this one has not: {self.used_like}.")
        return self._runs.scope

    # --- saving ----------------------------------------------------------------------------------------------------

    @property
    def state_key(self) -> str:
        """Tells callbacks of different options apart in a checkpoint."""
        return self._state_key

    def state_dict(self, *, join: bool = False) -> dict[str, Any]:
        """Everything counted so far, as tensors and primitives; empty before anything ran.

        Args:
            join: Every rank of a distributed run calls this: see :meth:`neuronscope.Scope.state_dict`.
        """
        counted = self._runs.state_dict(join=join)
        return {**counted, "published": self._publisher.state_dict()} if counted else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue what was counted: at once in a training that runs, else when one begins."""
        with SuppressErrors("take up what was saved"):
            self._runs.load_state_dict(state_dict)
            self._publisher.load_state_dict(state_dict["published"])

    # --- a run -----------------------------------------------------------------------------------------------------

    @abstractmethod
    def _tell(self, run: Any, phase: str, *, final: bool = False) -> Report:
        """Give a phase's report to the run's logs, and its totals to whoever asks for them."""

    @abstractmethod
    def _stop_training(self, run: Any, alarm: str) -> None:
        """End the training cleanly, and say why."""

    def _begin_training(self, model: nn.Module, step: int) -> None:
        self._publisher.begin()
        with self._faults:
            try:
                self._runs.begin_fit(model, step)
            except NothingToWatchError as error:
                warnings.warn(str(error), NeuronscopeWarning, stacklevel=2)

    def _move_to(self, step: int) -> None:
        """Take over the framework's step, where counting begins in the middle of a run."""
        gate = self._runs.gate
        if gate is not None and gate.scope.global_step != step:
            with self._faults:
                gate.end_training_batch(step)

    def _end_training_batch(self, run: Any, step: int) -> None:
        """A batch of training is over; a report is due when that closed a window, and an alarm may be."""
        gate = self._runs.gate
        alarm = None
        if gate is not None:
            with self._faults:
                if gate.end_training_batch(step):
                    alarm = self._alarm.hear(self._tell(run, "train"))
        if alarm is not None and self._alarm.action == "warn":
            warnings.warn(alarm, NeuronscopeWarning, stacklevel=3)
        elif alarm is not None and self._alarm.action == "stop":
            self._stop_training(run, alarm)

    def _end_training(self, run: Any) -> Report | None:
        """Detach, which closes the last window if it is sure, and say how it ended; gives the report of training."""
        report = None
        with self._faults:
            if self._runs.gate is None:
                return None
            self._runs.detach()
            for phase in ("val", "train"):
                if phase in self._watched().phases:
                    report = self._tell(run, phase, final=True)
        self._publisher.finish()  # logs may be closed next
        return report if report is not None and report.phase == "train" else None
