"""Hold what was done to neurons, as plain data: which ones, when, by which rule."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

__all__ = ["Act", "acts_note"]


@dataclass(frozen=True)
class Act:
    """Describe one revival of neurons at one site.

    Attributes:
        step: Number of optimizer steps taken when it was done.
        site: The site's name.
        neurons: Their numbers in the site, ascending.
        rule: The rule that chose them, with its numbers: ``Dead()``, ``ReDo(tau=0.1)``.
        first_step: First optimizer step observed in the window that the rule judged.
        last_step: Last optimizer step observed in it.
    """

    step: int
    site: str
    neurons: tuple[int, ...]
    rule: str
    first_step: int
    last_step: int

    def to_dict(self) -> dict[str, Any]:
        """Return the act as plain data."""
        return {**asdict(self), "neurons": list(self.neurons)}


def acts_note(acts: Sequence[Act]) -> str:
    """Return a sentence on all acts, oldest first; ``""`` if there are none.

    >>> acts_note([Act(100, "fc/relu", (0, 3), "Dead()", 0, 99), Act(200, "fc/relu", (3,), "Dead()", 100, 199)])
    'Revived so far: 3 neurons at 2 steps (fc/relu 3), last 1 at step 200 by Dead(). Counts from before are of the old \
weights.'
    """
    if not acts:
        return ""
    by_site: Counter[str] = Counter()
    for act in acts:
        by_site[act.site] += len(act.neurons)
    most = ", ".join(f"{site} {count}" for site, count in by_site.most_common(3))
    more = f" and {len(by_site) - 3} more layers" if len(by_site) > 3 else ""
    steps, newest = {act.step for act in acts}, acts[-1].step
    last = sum(len(act.neurons) for act in acts if act.step == newest)
    total = by_site.total()
    return (
        f"Revived so far: {total} neuron{'s' * (total != 1)} at {len(steps)} step{'s' * (len(steps) != 1)} "
        f"({most}{more}), last {last} at step {newest} by {acts[-1].rule}. Counts from before are of the old weights."
    )
