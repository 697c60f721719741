"""Hold exact int64 counts that add up over micro-batches, windows, ranks and resumes.

A :class:`Tally` has the counts of one site. A :class:`Census` has the tallies of all sites for one phase over one
window. Merging is associative and commutative in every count, so the result does not depend on which rank counted
what, or in which order counts are added.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from neuronscope.arrays import FloatArray, IntArray
from neuronscope.count.counter_tensors import NEVER
from neuronscope.errors import StateError
from neuronscope.judge.distinct import DistinctNeurons
from neuronscope.sites import IncomingRows, ReaderColumns, SiteInfo
from neuronscope.tally.check_state import MOST, array, integer, mapping, reading

__all__ = ["Census", "Tally"]


@dataclass(frozen=True, eq=False, kw_only=True)
class Tally(SiteInfo):
    """Describe one site as :class:`~neuronscope.sites.SiteInfo` does, and hold the exact counts of its ``N`` neurons.

    Attributes:
        zero_outputs: Positions with zero output, int64 ``(N,)``.
        zero_gradients: Positions with zero gradient at the pre-activation, int64 ``(N,)``.
        not_finite_outputs: Positions with NaN or infinite output, int64 ``(N,)``.
        abs_sum: Sum of ``|y|`` over finite outputs, float64 ``(N,)``.
        last_active_step: Last optimizer step at which the neuron fired, int64 ``(N,)``; −1 = never.
        first_active_step: First optimizer step at which the neuron fired, int64 ``(N,)``; ``2**62`` = never.
        positions: Number of positions at which each neuron's output was observed.
        gradient_positions: Number of positions at which each neuron's gradient was observed.
        examples: Number of independent examples in the counts; 0 if that is not known, so that no bound is claimed.
        idle_positions: Positions in the steps after the last one in which the neuron fired, int64 ``(N,)``: all of them
            if it never did. ``None`` if that is not kept; it is for sites of kind ``sparse``.
        step_positions: Of running counts: each step, with the positions up to its end.
    """

    zero_outputs: IntArray
    zero_gradients: IntArray
    not_finite_outputs: IntArray
    abs_sum: FloatArray
    last_active_step: IntArray
    first_active_step: IntArray
    positions: int
    gradient_positions: int
    examples: int
    idle_positions: IntArray | None = None
    step_positions: tuple[tuple[int, int], ...] = ()

    __eq__, __hash__ = object.__eq__, object.__hash__  # those of the description do not look at counts

    @classmethod
    def empty(cls, info: SiteInfo, neurons: int) -> Tally:
        """Return the counts of a site that was not observed.

        Args:
            info: Description of the site.
            neurons: ``N``.
        """
        return cls(
            **vars(info),
            zero_outputs=np.zeros(neurons, dtype=np.int64),
            zero_gradients=np.zeros(neurons, dtype=np.int64),
            not_finite_outputs=np.zeros(neurons, dtype=np.int64),
            abs_sum=np.zeros(neurons, dtype=np.float64),
            last_active_step=np.full(neurons, -1, dtype=np.int64),
            first_active_step=np.full(neurons, NEVER, dtype=np.int64),
            positions=0,
            gradient_positions=0,
            examples=0,
            idle_positions=np.zeros(neurons, dtype=np.int64) if info.kind == "sparse" else None,
        )

    @property
    def neurons(self) -> int:
        """Number of neurons, ``N``."""
        return len(self.zero_outputs)

    @property
    def info(self) -> SiteInfo:
        """The description of the site, without counts."""
        return SiteInfo(**{each.name: getattr(self, each.name) for each in fields(SiteInfo)})

    @property
    def not_finite(self) -> int:
        """Number of NaN and infinite outputs of all neurons."""
        return int(self.not_finite_outputs.sum())

    @property
    def zero_output_fraction(self) -> FloatArray:
        """Zero outputs ÷ positions, float64 ``(N,)``; NaN if unseen."""
        return _fraction(self.zero_outputs, self.positions)

    @property
    def zero_gradient_fraction(self) -> FloatArray:
        """Zero gradients ÷ gradient positions, float64 ``(N,)``; NaN if no gradient was seen."""
        return _fraction(self.zero_gradients, self.gradient_positions)

    @property
    def mean_abs_output(self) -> FloatArray:
        """Mean of ``|y|`` over positions, float64 ``(N,)``; non-finite outputs add 0; NaN if unseen."""
        return _fraction(self.abs_sum, self.positions)

    def idle_since(self, last_active_step: IntArray) -> IntArray:
        """Return how many positions of running counts are in the steps after some other ones.

        Args:
            last_active_step: A step for each neuron, int64 ``(N,)``; −1 = before all of them.

        Returns:
            int64 ``(N,)``. What was counted since the newest step that was noted belongs to the step after it.
        """
        steps = np.array([step for step, _ in self.step_positions], dtype=np.int64)
        until = np.array([0, *(positions for _, positions in self.step_positions)], dtype=np.int64)
        idle: IntArray = self.positions - until[np.searchsorted(steps, last_active_step, side="right")]
        idle[last_active_step > (steps[-1] if len(steps) else -1)] = 0
        return idle

    def with_idle(self) -> Tally:
        """Return this tally of running counts with the positions since each neuron last fired, if these are kept."""
        if self.idle_positions is None:
            return self
        return replace(self, idle_positions=self.idle_since(self.last_active_step))

    def _idle_after(self, other: Tally) -> IntArray | None:
        if self.idle_positions is None and other.idle_positions is None:
            return None
        none = np.zeros(self.neurons, dtype=np.int64)
        before, later = (none if each.idle_positions is None else each.idle_positions for each in (self, other))
        return np.where(other.last_active_step >= 0, later, before + other.positions)

    def merge(self, other: Tally) -> Tally:
        """Return the sum of this tally and a later one, equal to counting everything in one.

        Raises:
            StateError: The tallies have different numbers of neurons.
        """
        if self.neurons != other.neurons:
            raise StateError(f"Expected tallies of {self.neurons} neurons to merge, but got {other.neurons}.")
        return replace(
            self,
            **vars(other.info),
            zero_outputs=self.zero_outputs + other.zero_outputs,
            zero_gradients=self.zero_gradients + other.zero_gradients,
            not_finite_outputs=self.not_finite_outputs + other.not_finite_outputs,
            abs_sum=self.abs_sum + other.abs_sum,
            last_active_step=np.maximum(self.last_active_step, other.last_active_step),
            first_active_step=np.minimum(self.first_active_step, other.first_active_step),
            positions=self.positions + other.positions,
            gradient_positions=self.gradient_positions + other.gradient_positions,
            examples=self.examples + other.examples,
            idle_positions=self._idle_after(other),
            step_positions=(),
        )

    def state_dict(self) -> dict[str, Any]:
        """Return the tally as tensors and primitives."""
        state: dict[str, Any] = {"info": {name: _with_lists(value) for name, value in vars(self.info).items()}}
        for name in _SAVED:
            value = getattr(self, name)
            if value is not None:
                state[name] = torch.from_numpy(value.copy()) if isinstance(value, np.ndarray) else value
        return state

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Tally:
        """Return the tally that :meth:`state_dict` saved.

        Raises:
            StateError: A part of the state is missing, unknown or of a wrong type or shape.
        """
        try:
            unknown = sorted(set(state) - {"info", *_SAVED}, key=str)
            if unknown:
                raise ValueError(f"it has {unknown[0]!r}, which is unknown")
            neurons = len(state["zero_outputs"])
            positions, gradients, examples = (
                integer(state, name) for name in ("positions", "gradient_positions", "examples")
            )

            def counts(name: str, low: int, high: int) -> IntArray:
                return array(state, name, torch.int64, (neurons,), low, high)

            last = counts("last_active_step", -1, MOST - 1)
            first = counts("first_active_step", 0, NEVER)
            if not np.array_equal(first == NEVER, last < 0) or (first > last)[last >= 0].any():
                raise ValueError("first_active_step does not fit last_active_step")
            return cls(
                **vars(_read_info(mapping(state, "info"))),
                zero_outputs=counts("zero_outputs", 0, positions),
                zero_gradients=counts("zero_gradients", 0, gradients),
                not_finite_outputs=counts("not_finite_outputs", 0, positions),
                abs_sum=array(state, "abs_sum", torch.float64, (neurons,), 0, np.inf),
                last_active_step=last,
                first_active_step=first,
                positions=positions,
                gradient_positions=gradients,
                examples=examples,
                idle_positions=counts("idle_positions", 0, positions) if "idle_positions" in state else None,
            )
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            given = sorted(state, key=str) if isinstance(state, Mapping) else type(state).__name__
            raise StateError(f"Expected the saved state of a tally, but got {given}: {error}.") from error


#: The counts of a saved tally, beside its description.
_SAVED = [each.name for each in fields(Tally)[len(fields(SiteInfo)) :] if each.name != "step_positions"]


class Census(Mapping[str, Tally]):
    """Map site names to tallies, in the order in which the sites first ran.

    Args:
        tallies: Tallies by site name.
        first_step: First optimizer step observed; −1 if none was.
        last_step: Last optimizer step observed; −1 if none was.
        steps: Number of optimizer steps observed.
    """

    def __init__(
        self, tallies: Mapping[str, Tally] | None = None, *, first_step: int = -1, last_step: int = -1, steps: int = 0
    ) -> None:
        self._tallies = dict(tallies or {})
        self.first_step = first_step
        self.last_step = last_step
        self.steps = steps

    def __getitem__(self, name: str) -> Tally:
        if name not in self._tallies:
            known = ", ".join(list(self._tallies)[:8]) or "none"
            raise KeyError(f"{name!r}: no such site was observed; the sites are {known}")
        return self._tallies[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tallies)

    def __len__(self) -> int:
        return len(self._tallies)

    def __repr__(self) -> str:
        return f"Census({len(self)} sites, {self.neurons} neurons, {self.examples} examples)"

    @property
    def neurons(self) -> int:
        """Number of neurons: each unit of a layer once, without sites whose axis is assumed and without outputs."""
        return DistinctNeurons(list(self.values())).neurons

    @property
    def examples(self) -> int:
        """Number of independent examples at the site that saw the most."""
        return max((tally.examples for tally in self.values()), default=0)

    def merge(self, other: Census) -> Census:
        """Return the sum of this census and a later one."""
        tallies = dict(self._tallies)
        for name, tally in other.items():
            tallies[name] = tallies[name].merge(tally) if name in tallies else tally
        first_steps = [step for step in (self.first_step, other.first_step) if step >= 0]
        return Census(
            tallies,
            first_step=min(first_steps, default=-1),
            last_step=max(self.last_step, other.last_step),
            steps=self.steps + other.steps,
        )

    def without(self, *names: str) -> Census:
        """Return this census without the named sites."""
        kept = {name: tally for name, tally in self.items() if name not in names}
        return Census(kept, first_step=self.first_step, last_step=self.last_step, steps=self.steps)

    def state_dict(self) -> dict[str, Any]:
        """Return the census as tensors and primitives, which any checkpoint can hold."""
        return {
            "tallies": {name: tally.state_dict() for name, tally in self.items()},
            "first_step": self.first_step,
            "last_step": self.last_step,
            "steps": self.steps,
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Census:
        """Return the census that :meth:`state_dict` saved.

        Raises:
            StateError: The state is not that of a census.
        """
        with reading("state of a census", state):
            tallies = {name: Tally.from_state(tally) for name, tally in mapping(state, "tallies").items()}
            last = integer(state, "last_step", -1)
            first = integer(state, "first_step", min(last, 0), last)
            return cls(tallies, first_step=first, last_step=last, steps=integer(state, "steps"))


def _read_info(state: Mapping[str, Any]) -> SiteInfo:
    """Return the description of a site that :meth:`Tally.state_dict` saved; raise an error if it is invalid."""
    units = tuple((str(layer), int(start), int(stop), int(step)) for layer, start, stop, step in state.get("units", ()))
    if any(step == 0 or min(start, stop) < -1 for _, start, stop, step in units):
        raise ValueError("a run of units is not (layer, start, stop, step)")
    readers, notes = (tuple(map(str, state.get(name, ()))) for name in ("readers", "reader_notes"))
    columns = tuple(
        ReaderColumns(str(layer), *map(int, numbers)) for layer, *numbers in state.get("reader_columns", ())
    )
    incoming = tuple(IncomingRows(str(layer), *map(int, numbers)) for layer, *numbers in state.get("incoming", ()))
    listed = {"units": units, "readers": readers, "reader_columns": columns, "reader_notes": notes}
    listed |= {"incoming": incoming, "incoming_notes": tuple(map(str, state.get("incoming_notes", ())))}
    info = SiteInfo(**{**state, **listed})
    types = {"str": str, "bool": bool}
    for field in fields(info):
        value = getattr(info, field.name)
        if field.type == "int":
            integer({field.name: value}, field.name, -1)
        elif not isinstance(value, types.get(str(field.type), tuple)):
            raise ValueError(f"{field.name} is {type(value).__name__}")
    return info


def _with_lists(value: Any) -> Any:
    """Return a value with lists in the place of tuples, also inside of others."""
    return [_with_lists(each) for each in value] if isinstance(value, tuple) else value


def _fraction(part: npt.NDArray[Any], whole: int) -> FloatArray:
    if whole == 0:
        return np.full(part.shape, np.nan, dtype=np.float64)
    return (part / whole).astype(np.float64)
