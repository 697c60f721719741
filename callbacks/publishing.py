"""Publish reports: numbers to every log, pictures to TensorBoard's folder, totals to the other callbacks.

A log never gets a lower step of a phase than before, and drawing never takes more of the run's time than was allowed.
Numbers are written at once, in the thread of the training, which is the only one that loggers expect. Pictures, text
and tab are drawn in another thread, into an event file of our own: what does not fit on the disk fails there, and
not in the training.
"""

from __future__ import annotations

import io
import math
import shutil
import tempfile
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from neuronscope.callbacks.attachments import attach_files
from neuronscope.callbacks.background import BackgroundDrawer
from neuronscope.callbacks.logs import Log
from neuronscope.callbacks.suppress_errors import SuppressErrors
from neuronscope.errors import UsageError
from neuronscope.output import write_file
from neuronscope.report.report import Report
from neuronscope.tally.check_state import integer, mapping, reading
from neuronscope.writers.formatting import percent
from neuronscope.writers.html import render
from neuronscope.writers.pictures import overview
from neuronscope.writers.tensorboard import EventFile, append, require_room, require_room_in_file, scalars
from neuronscope.writers.tensorboard.tags import network_tag
from neuronscope.writers.wording import anything_seen

__all__ = ["Publisher", "summary", "totals"]

_TOTALS = ("dead_pct", "worst_layer_dead_pct", "collapsed_layers", "dormant_pct", "not_finite_pct")
#: Totals of training, which has gradients and a history.
_TOTALS_OF_TRAINING = (*_TOTALS, "deaths_total", "silent_pct")
#: Final numbers in TensorBoard's HParams tab.
_FINAL_TAGS = (
    *(network_tag(name, "train") for name in ("dead_pct", "worst_layer_dead_pct", "deaths_total", "dormant_pct")),
    network_tag("dead_pct", "val"),
)
#: Assumed seconds of a drawing before the first was made: as long as most take on one core of 2026.
_USUAL_DRAWING_S = 0.4


def totals(report: Report | None, phase: str) -> dict[str, float]:
    """Return the network's totals by tag, ``neuronscope/dead_pct`` and the like; NaN for what is not known.

    They are those numbers of :func:`neuronscope.writers.tensorboard.scalars` that an alarm can be set on.

    Args:
        report: The phase's report; ``None`` if nothing is watched.
        phase: The phase. In tags of phases other than ``train`` its name stands before the metric's, and there is
            neither ``deaths_total`` nor ``silent_pct``: no neuron dies in an evaluation, and without gradients none
            is known to be silent.

    >>> list(totals(None, "val"))[:3]
    ['neuronscope/val_dead_pct', 'neuronscope/val_worst_layer_dead_pct', 'neuronscope.more/val_collapsed_layers']
    """
    known = {} if report is None else scalars(report, per_site=False)
    tags = [network_tag(name, phase) for name in (_TOTALS_OF_TRAINING if phase == "train" else _TOTALS)]
    return {tag: known.get(tag, float("nan")) for tag in tags}


def summary(report: Report) -> str:
    """Return a report as one line for a log."""
    if report.fault:
        return f"{report.fault} {summary(replace(report, fault=''))}"
    if not report.observed_neurons:
        seen = anything_seen(report)
        return f"Neuronscope: {'no observed neuron is in the totals' if seen else 'no activation was observed'}."
    labels = ((report.silent, "silent"), (report.dormant, "dormant"), (report.cut_off, "cut off"))
    more = [f"{count} {label}" for count, label in labels if count]
    if report.not_finite:
        more.append("NaN or infinite outputs were seen")
    if report.provisional:
        known = f"from {report.examples} of {report.examples_needed} examples"
        more.append(f"provisional, {known if report.examples_known else 'from an unknown number of examples'}")
    dead = f"{report.dead} of {report.observed_neurons} neurons dead ({percent(report.dead_percent)})"
    return f"Neuronscope: {', '.join([dead, *more])}, at step {report.global_step}."


@dataclass
class _Published:
    """What a log got last of a phase: at which step, the report's own step, and whether it was drawn."""

    step: int
    report_step: int
    drawn: bool


class Publisher:
    """Writes reports to logs; the arguments are those of :class:`neuronscope.callbacks.Monitor`.

    The share of the run's time is for each phase by itself: a run of some seconds is drawn at its end only. With 1
    every report is drawn, and training waits if drawing cannot keep up.

    Raises:
        UsageError: ``drawing_share`` is not in (0, 1].
    """

    def __init__(self, *, images: bool, text: bool, tab: bool, html: bool, drawing_share: float) -> None:
        if not 0 < drawing_share <= 1:
            raise UsageError(
                f"Expected argument `drawing_share` to lie above 0 and up to 1, but got {drawing_share!r}."
            )
        self._parts = {"images": images, "text": text, "tab": tab}
        self._html = html
        self._share = drawing_share
        self._next_drawing_at: dict[str, float] = {}  # by phase
        self._first_drawing_at = 0.0
        self._published: dict[str, _Published] = {}  # by phase and key of the log
        self._files: dict[str, EventFile] = {}  # by folder of the log
        self._pages: dict[Path, int] = {}  # step of the page that was written last, by its path
        self._training: Report | None = None  # the newest report on training, with which the other phases are compared
        self._attachments: list[tuple[Any, list[Path]]] = []  # a log whose tracker takes files, and the files
        self._scratch: str | None = None  # a folder for what trackers get, where the run has none
        self._suppress_errors = SuppressErrors("write to a logger")
        self._drawer = BackgroundDrawer()

    def begin(self) -> None:
        """Start the clock of a run: drawing gets a share of the time from here on."""
        self._next_drawing_at.clear()
        self._pages.clear()
        self._training = None
        self._first_drawing_at = time.monotonic() + self._pause_after(_USUAL_DRAWING_S)

    def publish(
        self, report: Report, logs: Sequence[Log], step: int, *, folder: str | None = None, final: bool = False
    ) -> None:
        """Write a report to every log that has nothing of its phase at this step or a later one, and as a page.

        Args:
            report: The report.
            logs: The run's logs.
            step: The trainer's step.
            folder: Where the page is written if no log has a folder; ``None`` = nowhere.
            final: Whether this is the phase's last report: it is drawn, whatever share of the time that takes.
        """
        next_drawing_at = self._next_drawing_at.get(report.phase, self._first_drawing_at)
        draws = final or time.monotonic() >= next_drawing_at
        numbers = lru_cache(partial(scalars, report))  # the same for all logs of a run
        for log in logs:
            with self._suppress_errors:
                self._write(report, log, step, numbers, draws=draws and any(self._parts.values()))
        if self._html and draws:
            with self._suppress_errors:
                folders = {found for log in logs if (found := log.event_folder()) is not None}
                takers = [log for log in logs if getattr(log, "tracker", None) is not None] if final else []
                if takers and not folders and folder is None:
                    folder = self._scratch = self._scratch or tempfile.mkdtemp(prefix="neuronscope")
                if not folders and folder is not None:
                    Path(folder).mkdir(parents=True, exist_ok=True)  # some loggers make theirs with their first number
                    folders.add(folder)
                written = self._write_pages(report, folders, picture=bool(takers))
                self._attachments += [(log, written[:2]) for log in takers if written]
        if report.phase == "train":
            self._training = report

    def _write_pages(self, report: Report, folders: Collection[str], *, picture: bool) -> list[Path]:
        """Write the report as a page, and the overview if wanted, into the folder ``neuronscope`` of each folder.

        Return the paths of all that is there when drawing is finished.
        """
        written = []
        for folder in folders:
            path = Path(folder) / "neuronscope" / f"{report.phase}.html"
            if self._pages.get(path) != report.global_step:
                self._pages[path] = report.global_step
                against = None if report.phase == "train" else self._training
                self._queue(report, partial(_write_page, report, against, path))
            written.append(path)
            if picture:
                self._queue(report, partial(_write_picture, report, path.with_suffix(".png")))
                written.append(path.with_suffix(".png"))
        return written

    def _write(
        self, report: Report, log: Log, step: int, numbers: Callable[..., dict[str, float]], *, draws: bool
    ) -> None:
        key = f"{report.phase}:{log.key}"
        folder = log.event_folder()
        if folder is not None:
            # A number that cannot be written would break the Trainer's own writer: its next call would raise.
            require_room(folder)
        last = self._published.get(key)
        if last is None or step > last.step:
            since = None if last is None else last.report_step
            last = self._published[key] = _Published(step, report.global_step, drawn=False)
            found = dict(numbers(since=since))
            if folder is not None:
                require_room_in_file(folder, len(found))
            log.log_metrics(found, step)
        if folder is not None and draws and not last.drawn:
            last.drawn = True
            file = self._files.setdefault(folder, EventFile(folder))
            self._queue(report, partial(append, report, file, last.step, **self._parts))

    def _queue(self, report: Report, job: Callable[[], None]) -> None:
        """Have something drawn in the drawer's thread, so that the end of the program cannot lose it."""
        if self._share < 1.0:
            self._next_drawing_at[report.phase] = math.inf  # until this one is drawn
        self._drawer.draw(partial(self._draw, report.phase, job))

    def _draw(self, phase: str, job: Callable[[], None]) -> None:
        began = time.monotonic()
        try:
            job()
        finally:
            ended = time.monotonic()
            until = self._next_drawing_at.get(phase, ended)  # later than now if another drawing was just made
            waits_from = ended if math.isinf(until) else max(until, ended)
            self._next_drawing_at[phase] = waits_from + self._pause_after(ended - began)

    def _pause_after(self, drawing_s: float) -> float:
        """Seconds to wait after a drawing that took ``drawing_s``, so that drawing keeps to its share."""
        return drawing_s * (1.0 / self._share - 1.0)

    def list_hyperparameters(self, logs: Sequence[Log], hyperparameters: Mapping[str, Any], *, at_start: bool) -> None:
        """List the run in TensorBoard's HParams tab, with its final numbers.

        Args:
            logs: The run's logs. One that can list runs has a method of this name.
            hyperparameters: Values by name; if there are none, nothing is listed.
            at_start: Whether the run begins; otherwise it ends.
        """
        for log in logs if hyperparameters else ():
            with self._suppress_errors:
                listed = getattr(log, "list_hyperparameters", None)
                folder = log.event_folder()
                if listed is not None and folder is not None:
                    require_room(folder)
                    require_room_in_file(folder, len(hyperparameters) + len(_FINAL_TAGS))
                    listed(hyperparameters, _FINAL_TAGS, at_start=at_start)

    def finish(self) -> None:
        """Wait until everything is drawn. Call this before the loggers are closed."""
        with self._suppress_errors:
            self._drawer.finish()
        for log, files in self._attachments:
            with self._suppress_errors:
                attach_files(log.tracker, [file for file in files if file.exists()])
        self._attachments.clear()
        if self._scratch is not None:
            shutil.rmtree(self._scratch, ignore_errors=True)
            self._scratch = None

    def state_dict(self) -> dict[str, dict[str, int]]:
        """Return what was written last, as plain data for a checkpoint."""
        return {key: {"step": last.step, "report_step": last.report_step} for key, last in self._published.items()}

    def load_state_dict(self, state: Mapping[str, Mapping[str, int]]) -> None:
        """Continue where a saved run stopped; see :func:`check_published`."""
        self._published = {
            key: _Published(saved["step"], saved["report_step"], drawn=True) for key, saved in state.items()
        }


def _write_page(report: Report, against: Report | None, path: Path) -> None:
    path.parent.mkdir(exist_ok=True)  # a log's folder that is gone is not made anew: its own writer must notice
    write_file(path, render(report, against))


def _write_picture(report: Report, path: Path) -> None:
    from PIL import Image

    picture = io.BytesIO()
    Image.fromarray(overview(report)).save(picture, format="PNG")
    write_file(path, picture.getvalue())


def check_published(state: Any) -> Mapping[str, Mapping[str, int]]:
    """Return what :meth:`Publisher.state_dict` returned, unchanged.

    Raises:
        StateError: It is anything else.
    """
    with reading("steps of a run's logs", state):
        for saved in mapping({"published": state}, "published").values():
            integer(saved, "step")
            integer(saved, "report_step")
    checked: Mapping[str, Mapping[str, int]] = state
    return checked
