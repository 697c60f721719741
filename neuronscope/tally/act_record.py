"""Record the revivals of a watch: each act, and what was counted of each neuron before its newest one."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch

from neuronscope.arrays import IntArray
from neuronscope.report.acts import Act
from neuronscope.tally.census import Tally
from neuronscope.tally.check_state import array, integer, integers, mapping, reading

__all__ = ["ActRecord", "Before"]


class Before(NamedTuple):
    """What belongs to the old weights of each of a site's ``N`` neurons: counts up to its newest revival."""

    zero_outputs: IntArray  # zero outputs until then, int64 ``(N,)``
    positions: IntArray  # positions until then, int64 ``(N,)``
    step: IntArray  # the step of the revival; 0 for a neuron that was never revived. int64 ``(N,)``


class ActRecord:
    """Hold all acts of a watch, oldest first, in some bytes for each neuron that was revived."""

    def __init__(self) -> None:
        self.acts: list[Act] = []
        self._before: dict[str, Before] = {}

    @property
    def last_window(self) -> int:
        """Last step of the newest window that was acted on; −1 before the first act."""
        return self.acts[-1].last_step if self.acts else -1

    def revived(self, site: str) -> int:
        """Return how many neurons of a site were revived, each as often as it was."""
        return sum(len(act.neurons) for act in self.acts if act.site == site)

    def before(self, site: str, neurons: int) -> Before:
        """Return what was counted of each neuron before its newest revival.

        Args:
            site: The site's name.
            neurons: ``N``; if the network was changed since, nothing is known of the neurons of other numbers.
        """
        known = self._before.get(site)
        if known is None or len(known.step) != neurons:
            return Before(*(np.zeros(neurons, dtype=np.int64) for _ in Before._fields))
        return known

    def note(self, act: Act, counted: Tally) -> None:
        """Add an act.

        Args:
            act: The act.
            counted: All closed windows of the site.
        """
        self.acts.append(act)
        before = Before(*(each.copy() for each in self.before(act.site, counted.neurons)))
        revived = list(act.neurons)
        before.zero_outputs[revived] = counted.zero_outputs[revived]
        before.positions[revived] = counted.positions
        before.step[revived] = act.step
        self._before[act.site] = before

    def state_dict(self) -> dict[str, Any]:
        """Return the record as tensors and primitives."""
        return {
            "acts": [act.to_dict() for act in self.acts],
            "before": {
                site: {name: torch.from_numpy(each.copy()) for name, each in before._asdict().items()}
                for site, before in self._before.items()
            },
        }

    @classmethod
    def from_state(cls, state: Any) -> ActRecord:
        """Return the record that :meth:`state_dict` saved; an empty one for ``None``.

        Raises:
            StateError: It is anything else.
        """
        record = cls()
        if state is None:
            return record
        with reading("acts of a scope", state):
            for saved in state["acts"]:
                steps = {name: integer(saved, name, -1) for name in ("step", "first_step", "last_step")}
                site, rule, neurons = saved["site"], saved["rule"], integers(saved, "neurons")
                if not isinstance(site, str) or not isinstance(rule, str):
                    raise ValueError("the site or the rule of an act is no text")
                record.acts.append(Act(site=site, neurons=tuple(neurons), rule=rule, **steps))
            for site, saved in mapping(state, "before").items():
                shape = (len(saved["step"]),)
                before = Before(*(array(saved, name, torch.int64, shape) for name in Before._fields))
                if (before.zero_outputs > before.positions).any():
                    raise ValueError(f"{site} has more zero outputs than positions")
                record._before[site] = before
        return record

    def __bool__(self) -> bool:
        """Whether there was any act."""
        return bool(self.acts)
