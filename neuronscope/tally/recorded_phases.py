"""Keep the record of each phase of a watch: close windows, join the counts of ranks, forget the oldest phases."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

from neuronscope.errors import UsageError, warn_user
from neuronscope.judge.verdicts import Policy
from neuronscope.sites import INFERENCE, SiteInfo, SiteKey
from neuronscope.tally.distributed.sync import RankSync
from neuronscope.tally.phase_record import Lacking, PhaseRecord

__all__ = ["RecordedPhases"]

#: Phases that a report can be asked for before anything of them was observed.
_USUAL = ("train", "val", "test", INFERENCE)
#: Maximal number of phases whose counts are kept, without `train` and `inference`, and of those that keep the buffers
#: that they count with. The phases that ended last are kept.
_MOST_PHASES, _MOST_COUNTING = 64, 8


class RecordedPhases(Mapping[str, PhaseRecord]):
    """Map the name of each phase that ran to its record.

    Args:
        policy: The thresholds.
        ranks: Joins the counts of ranks.
        lock: Held while counts are read and set back.
        describe: Returns the newest description of a site, given its key and the description that it had.
        release: Forgets the counters of a phase, and returns the sites whose counters were forgotten.
        forget: Forgets in which phases modules ran, given a phase.
    """

    def __init__(
        self,
        policy: Policy,
        ranks: RankSync,
        *,
        lock: AbstractContextManager[Any],
        describe: Callable[[SiteKey, SiteInfo], SiteInfo],
        release: Callable[[str], Collection[SiteKey]],
        forget: Callable[[str], None],
    ) -> None:
        self._policy = policy
        self._ranks = ranks
        self._lock = lock
        self._describe = describe
        self._release = release
        self._forget = forget
        self._records: dict[str, PhaseRecord] = {}
        self._ended: dict[str, bool] = {}  # phases, the one that ended last is the last; whether each has its buffers
        self._forgotten = 0  # number of phases whose counts are no longer kept

    def __getitem__(self, phase: str) -> PhaseRecord:
        return self._records[phase]

    def __iter__(self) -> Iterator[str]:
        return iter(list(self._records))

    def __len__(self) -> int:
        return len(self._records)

    def record(self, phase: str) -> PhaseRecord:
        """Return the record of a phase; a new one if it has none."""
        if phase not in self._records:
            self._records[phase] = PhaseRecord(self._policy, self._lock)
        return self._records[phase]

    @property
    def inference(self) -> PhaseRecord | None:
        """The record of inference; ``None`` if it has none."""
        return self._records.get(INFERENCE)

    def observed(self, phase: str) -> PhaseRecord:
        """Return the record of a phase with the newest descriptions of its sites; an empty one of a usual phase.

        Raises:
            UsageError: No such phase was observed.
        """
        if phase not in self._records and phase not in _USUAL:
            known = ", ".join(self._records) or "none"
            gone = f" The counts of {self._forgotten} older phases are no longer kept." if self._forgotten else ""
            raise UsageError(
                f"Expected argument `phase` to be one that was observed ({known}), but got {phase!r}.{gone}"
            )
        record = self._records.get(phase) or PhaseRecord(self._policy)
        record.describe_sites(self._describe)
        return record

    def next_observed(self, every_n_steps: int) -> int:
        """Return the first step of training that is to be observed after the last one that was.

        The step count may jump over the multiple itself, if the caller counts the steps.
        """
        record = self._records.get("train")
        last = -1 if record is None else record.last_observed_step
        return 0 if last < 0 else (last // every_n_steps + 1) * every_n_steps

    def flush(self, phase: str, *, join: bool = True, done: bool = False) -> PhaseRecord:
        """Flush a phase, and inference with training, in which it ran; return the record of the phase.

        Where any rank has counts of inference, all ranks join them, also those that have none or are in another phase.

        Args:
            phase: Name of the phase.
            join: Whether the counts of all ranks are joined.
            done: Whether this rank counts no more.
        """
        record, inference = self.record(phase), self.inference
        record.describe_sites(self._describe)
        more = phase == "train" and inference is not None and not inference.empty
        record.flush(partial(self._ranks.join, phase=phase, done=done, more=more) if join else None)
        if self._ranks.more if join else more:
            self.record(INFERENCE).flush(partial(self._ranks.join, phase=INFERENCE, done=done) if join else None)
        return record

    def are_windows_due(self, step: int, window_steps: int) -> bool:
        """Return whether the open windows of training and inference are to be closed now.

        Args:
            step: The step.
            window_steps: Least number of steps in a window.
        """
        train, inference = self.record("train"), self.inference
        window_steps <<= self._ranks.missed
        due = train.is_due(step, window_steps, lambda: self._ranks.alone)
        if not due and inference is not None and train.empty and self._ranks.alone:
            due = inference.is_due(step, window_steps, lambda: True)
        return due and self._ranks.ready()

    def close_windows(self, *, final: bool = False) -> bool:
        """Close the window of training if it has enough examples, and that of inference with it.

        Return whether one was closed. If nothing of training was ever seen, inference has windows by the same rule.
        ``final``: no rank will see more.
        """
        train, inference = self.record("train"), self.inference
        closed = train.has_enough_examples(final=final) and train.close()
        if inference is None:
            return closed
        if closed or (not train.counted and inference.has_enough_examples(final=final)):
            closed = inference.close() or closed
        return closed

    def finish(self, *, join: bool, before_flush: Callable[[], None]) -> None:
        """Flush and close what is open, because this rank counts no more.

        Args:
            join: Whether the counts of all ranks are joined: then until all are done, also where this rank saw nothing.
            before_flush: Called before each flush.
        """
        joining = True
        while joining:
            before_flush()
            self.flush("train", join=join, done=True)
            joining = join and not self._ranks.all_done
            self.close_windows(final=not joining)
        for phase, census in self._ranks.pop_late().items():
            self.record(phase).add_joined(census)
            self.record(phase).close()

    def load(self, phases: Mapping[str, Mapping[str, Any]], lacking: Lacking, running: Collection[str]) -> None:
        """Continue with saved records.

        Args:
            phases: The saved records by phase.
            lacking: Returns those of some layers that the model does not have.
            running: The phases that threads are in.
        """
        for name, saved in phases.items():
            self.record(name).load_state_dict(saved, lacking)
        self.note_ended(*(name for name in self._records if name not in ("train", INFERENCE)), running=running)

    def note_ended(self, *ended: str, running: Collection[str]) -> None:
        """Forget the phases that ended first, if there are too many, so that memory does not grow with their number.

        Args:
            ended: Phases that have just ended.
            running: The phases that threads are in.
        """
        for name in ended:
            self._ended.pop(name, None)
            self._ended[name] = True
        closed = [name for name in self._ended if name not in running]
        for name in closed[:-_MOST_COUNTING]:
            if self._ended[name]:
                self._ended[name] = False
                self.record(name).release(self._release(name))
        for name in closed[:-_MOST_PHASES]:
            del self._ended[name], self._records[name]
            self._forget(name)
            self._forgotten += 1
            if self._forgotten == 1:
                warn_user(
                    f"More than {_MOST_PHASES} phases were counted: from now on the counts of the oldest are "
                    f"forgotten, {name!r} first. Use one name, such as 'val', for all passes of a kind: each pass is "
                    "a window of its own."
                )
