"""Publishing: a report's numbers to every log, its pictures to TensorBoard's, its totals to whoever asks.

Never a lower step for a phase than before, and never more of the run's time for drawing than was allowed. Numbers are
given at once, in the training's own thread, which is the only one that loggers expect. Pictures, text and vectors are
drawn in another, into an event file of our own: what does not fit on the disk fails there, and not in the training.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

from neuronscope.callbacks.background import BackgroundDrawer
from neuronscope.callbacks.suppress_errors import SuppressErrors
from neuronscope.errors import UsageError
from neuronscope.report.report import Report
from neuronscope.writers.tensorboard import EventFile, append, require_room, scalars
from neuronscope.writers.tensorboard.tags import metric

__all__ = ["Log", "Publisher", "summary", "totals"]

_TOTALS = ("dead_pct", "dormant_pct", "not_finite_pct")
#: What a drawing is taken to last until one was made: as long as most do on one core of 2026.
_USUAL_DRAWING_S = 0.4


class Log(Protocol):
    """Where a framework writes a run's numbers: what each callback makes of its own framework's loggers."""

    @property
    def key(self) -> str:
        """Tells it from the run's other logs, in a resumed run too."""

    def log_metrics(self, metrics: dict[str, float], step: int) -> Any:
        """Write numbers by tag."""

    def event_folder(self) -> str | None:
        """Return the folder of its event files, for pictures; ``None`` where it is not TensorBoard's."""


def totals(report: Report | None, phase: str) -> dict[str, float]:
    """The network's totals by tag, ``neuronscope/dead_pct`` and the like; NaN where there is no telling.

    Args:
        report: The phase's report; ``None`` where nothing is watched.
        phase: The phase; others than ``train`` have their name before the metric's.
    """
    known = {} if report is None else scalars(report, per_site=False)
    tags = [f"neuronscope/{metric(name, phase)}" for name in _TOTALS]
    return {tag: known.get(tag, float("nan")) for tag in tags}


def summary(report: Report) -> str:
    """One line for a log."""
    if report.fault:
        return f"{report.fault} {summary(replace(report, fault=''))}"
    if not report.observed_neurons:
        return "Neuronscope: no activation was observed."
    more = [f"{count} {what}" for count, what in ((report.dormant, "dormant"), (report.cut_off, "cut off")) if count]
    if report.not_finite:
        more.append("NaN or infinite outputs were seen")
    if report.provisional:
        more.append(f"provisional, from {report.examples} of {report.examples_needed} examples")
    share = f"{report.dead} of {report.observed_neurons} neurons dead ({report.dead_percent:.1f} %)"
    return f"Neuronscope: {', '.join([share, *more])}, at step {report.global_step}."


@dataclass
class _Mark:
    """What a log was given last for a phase: at which step, of which of the report's, and whether that is drawn."""

    step: int
    report_step: int
    drawn: bool


class Publisher:
    """Hands reports to logs.

    Args:
        images: Whether TensorBoard gets pictures.
        text: Whether TensorBoard gets the diagnosis.
        vectors: Whether TensorBoard gets a byte a neuron.
        drawing_share: Largest share of the run's time that these three may take, each phase for itself: a run of some
            seconds is drawn at its end only. At 1 every report is drawn, and training waits where drawing cannot keep
            up.

    Raises:
        UsageError: The share is none.
    """

    def __init__(self, *, images: bool, text: bool, vectors: bool, drawing_share: float) -> None:
        if not 0 < drawing_share <= 1:
            raise UsageError(
                f"Expected argument `drawing_share` to lie above 0 and up to 1, but got {drawing_share!r}."
            )
        self._drawn = {"images": images, "text": text, "vectors": vectors}
        self._share = drawing_share
        self._rests_until: dict[str, float] = {}
        self._first_drawing = 0.0
        self._marks: dict[str, _Mark] = {}
        self._files: dict[str, EventFile] = {}  # by the folder of a log
        self._faults = SuppressErrors("write to a logger")
        self._drawer = BackgroundDrawer()

    def begin(self) -> None:
        """A run begins: its time is what drawing gets a share of."""
        self._rests_until.clear()
        self._first_drawing = time.monotonic() + self._rest(_USUAL_DRAWING_S)

    def publish(self, report: Report, logs: Sequence[Log], step: int, *, final: bool = False) -> None:
        """Give a report to every log that was not given this step, or a later one, of its phase.

        Args:
            report: The report.
            logs: The run's logs.
            step: The trainer's step.
            final: Whether no other report of this phase is to be expected: then it is drawn, whatever the time.
        """
        rests_until = self._rests_until.get(report.phase, self._first_drawing)
        draws = any(self._drawn.values()) and (final or time.monotonic() >= rests_until)
        for log in logs:
            with self._faults:
                self._give(report, log, step, f"{report.phase}:{log.key}", draws=draws)

    def _give(self, report: Report, log: Log, step: int, key: str, *, draws: bool) -> None:
        folder = log.event_folder()
        if folder is not None:
            # A number that cannot be written would break the Trainer's own writer: its next call would raise.
            require_room(folder)
        mark = self._marks.get(key)
        if mark is None or step > mark.step:
            since = None if mark is None else mark.report_step
            mark = self._marks[key] = _Mark(step, report.global_step, drawn=False)
            log.log_metrics(scalars(report, since=since), step)
        if folder is not None and draws and not mark.drawn:
            mark.drawn = True
            file = self._files.setdefault(folder, EventFile(folder))
            if self._share < 1.0:
                self._rests_until[report.phase] = math.inf  # until this one is drawn
            self._drawer.draw(partial(self._draw, report, file, mark.step))

    def _draw(self, report: Report, file: EventFile, step: int) -> None:
        """Draw a report, in the drawer's thread, and see it on the disk: whatever ends the program cannot lose it."""
        began = time.monotonic()
        try:
            append(report, file, step, **self._drawn)
        finally:
            ended = time.monotonic()
            self._rests_until[report.phase] = ended + self._rest(ended - began)

    def _rest(self, drawing: float) -> float:
        """Seconds without a drawing that make one of so many seconds no more than its share."""
        return drawing * (1.0 / self._share - 1.0)

    def finish(self) -> None:
        """Wait until all that was given is drawn: before loggers are closed."""
        with self._faults:
            self._drawer.finish()

    def state_dict(self) -> dict[str, dict[str, int]]:
        """What was given last: plain data for a checkpoint."""
        return {key: {"step": mark.step, "report_step": mark.report_step} for key, mark in self._marks.items()}

    def load_state_dict(self, state: Mapping[str, Mapping[str, int]]) -> None:
        """Go on where a saved run stopped."""
        self._marks = {key: _Mark(int(saved["step"]), int(saved["report_step"]), True) for key, saved in state.items()}
