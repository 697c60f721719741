"""How right the optimizer's clock is: networks that die for real reasons, counted, beside what their state says.

    python -m scripts.optimizer_clock [--seeds 3]        # writes the tables of docs/optimizer-clock.md

Each network trains on scikit-learn's digits with an ordinary loop. After every backward pass the script notes which
rows of each layer got a gradient that is not zero; at the end it reads the clock off the optimizer's state and
compares.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from neuronscope.checkpoints.checkpoint import Checkpoint
from neuronscope.checkpoints.file.examine_file import examine_file
from neuronscope.checkpoints.file.optimizer_clocks import SILENT_STEPS, SURE_STEPS
from neuronscope.demo.digits import Digits, load_digits
from scripts.dying_networks import CASES, Case, Ints, Truth, as_checkpoint, train

PAGE = Path(__file__).resolve().parent.parent / "docs" / "optimizer-clock.md"
#: Bounds of which the second table says how many living rows are above: those from which silence is suspected and
#: inferred, and others.
LIMITS = (SILENT_STEPS, 120, 200, SURE_STEPS)
#: The first line of each table.
HEADS = (
    "| network | rows | silent | found | never trained | found | living | false alarms | bound broken | error |",
    f"| network | living | bound > {' | > '.join(map(str, LIMITS))} |",
    "| network | silent in between | found | trained in between | false alarms | died in between | found |",
)

# --- the comparison -------------------------------------------------------------------------------------------------


@dataclass
class Rows:
    """What clock and count say of many rows, side by side.

    Attributes:
        silence: Steps since the last gradient, counted; rows that never got one: all steps.
        never: Whether a row never got one.
        said: What the clock says at most (or about): infinite where it has run out, NaN where it says nothing.
        claim: ``alive``, ``no gradient``, ``never trained`` or ``""``.
        whole: Whether it was said of the whole layer, not of the neuron.
    """

    silence: Ints
    never: npt.NDArray[np.bool_]
    said: npt.NDArray[np.float64]
    claim: npt.NDArray[np.str_]
    whole: npt.NDArray[np.bool_]


def compare(checkpoint: Checkpoint, truth: Truth, paths: tuple[str, ...] = ()) -> Rows:
    """The clock of a checkpoint beside the truth, row by row."""
    evidence, _ = examine_file(checkpoint)
    parts = []
    for path in paths or tuple(truth.last):
        last = truth.last[path]
        said, claim, whole = np.full(len(last), np.nan), np.full(len(last), "", dtype="<U16"), np.zeros(len(last), bool)
        for piece in evidence:
            if piece.layer == path and piece.source.startswith(("adam state", "sgd state")):
                claim[piece.neurons] = piece.claim
                whole[piece.neurons] = piece.source.endswith("whole layer")
                said[piece.neurons] = np.inf if "or more" in piece.measure else piece.numbers
        parts.append(Rows(truth.steps - last, last == 0, said, claim, whole))
    return joined(parts)


def joined(parts: list[Rows]) -> Rows:
    """Rows of several networks together."""
    return Rows(**{name: np.concatenate([getattr(part, name) for part in parts]) for name in Rows.__dataclass_fields__})


@dataclass(frozen=True)
class Score:
    """One line of the table; counts are of rows."""

    rows: int
    silent: int
    found: int
    never: int
    never_found: int
    living: int
    false_alarms: int
    violations: int
    errors: npt.NDArray[np.float64]


def score(rows: Rows, exact: bool = True) -> Score:
    """Count hits and misses.

    *Silent*: no gradient for 100 steps or more, and one before. *Living*: one within the last 45 steps, an epoch. A
    violation is a bound below the truth. Errors are of what was found and dated: said minus counted.
    """
    silent = ~rows.never & (rows.silence >= 100)
    living = ~rows.never & (rows.silence < 45)
    found = silent & (rows.claim == "no gradient")
    dated = found & np.isfinite(rows.said)
    bounded = np.isfinite(rows.said) & ~rows.never
    return Score(
        rows=len(rows.silence),
        silent=int(silent.sum()),
        found=int(found.sum()),
        never=int(rows.never.sum()),
        never_found=int((rows.never & (rows.claim == "never trained")).sum()),
        living=int(living.sum()),
        false_alarms=int((living & np.isin(rows.claim, ["no gradient", "never trained"])).sum()),
        violations=int((rows.said[bounded] < rows.silence[bounded]).sum()) if exact else 0,
        errors=rows.said[dated] - rows.silence[dated],
    )


@dataclass(frozen=True)
class Between:
    """One line of the second table: rows, by two checkpoints."""

    silent: int
    found: int
    trained: int
    false_alarms: int
    died: int
    died_found: int


def compare_two(earlier: Checkpoint, later: Checkpoint, truth: Truth, paths: tuple[str, ...] = ()) -> Between:
    """What two checkpoints say beside the truth.

    *Silent*: a gradient before the earlier one and none between the two. *Trained*: one in between. *Died*: one in
    between and none for 100 steps or more.
    """
    evidence, _ = examine_file(later, earlier=earlier)
    counts = dict.fromkeys(Between.__dataclass_fields__, 0)
    first = earlier.step or 0
    for path in paths or tuple(truth.last):
        last = truth.last[path]
        kept, fell = np.zeros(len(last), dtype=bool), np.zeros(len(last), dtype=bool)
        for piece in evidence:
            if piece.layer == path and piece.source.startswith("two checkpoints") and piece.claim == "no gradient":
                (kept if piece.measure.endswith("at least") else fell)[piece.neurons] = True
        silent, trained = (last > 0) & (last <= first), last > first
        died = trained & (truth.steps - last >= 100)
        for name, mask in (
            ("silent", silent),
            ("found", silent & kept),
            ("trained", trained),
            ("false_alarms", trained & kept),
            ("died", died),
            ("died_found", died & fell),
        ):
            counts[name] += int(mask.sum())
    return Between(**counts)


def _measure(case: Case, seeds: int, digits: Digits) -> tuple[Rows, Between]:
    """Train a case's networks; a first checkpoint is taken after epoch 6, in the middle of the spike."""
    parts, between = [], []
    for seed in range(seeds):
        kept: list[Checkpoint] = []

        def keep(
            model: nn.Module, optimizer: torch.optim.Optimizer, truth: Truth, kept: list[Checkpoint] = kept
        ) -> None:
            if truth.steps == 6 * 45:
                kept.append(as_checkpoint(model, optimizer, step=truth.steps))

        model, optimizer, truth = train(case, seed, digits, keep)
        last = as_checkpoint(model, optimizer, step=truth.steps)
        parts.append(compare(last, truth, case.layers))
        between.append(compare_two(kept[0], last, truth, case.layers))
    names = Between.__dataclass_fields__
    return joined(parts), Between(**{name: sum(getattr(one, name) for one in between) for name in names})


def _tables(seeds: int) -> list[list[str]]:
    """Return the lines of each table."""
    digits = load_digits()
    tables = [[head, "| --- |" + " ---: |" * (head.count("|") - 2)] for head in HEADS]
    first, second, third = tables
    for case in CASES:
        print(f"… {case.label}", file=sys.stderr, flush=True)
        rows, between = _measure(case, seeds, digits)
        exact = "SGD" not in case.label
        got = score(rows, exact)
        error = ", ".join(f"{at:+.0f}" for at in np.percentile(got.errors, [1, 50, 99])) if got.errors.size else "none"
        first.append(
            f"| {case.label} | {got.rows} | {got.silent} | {got.found} | {got.never} | {got.never_found} | "
            f"{got.living} | {got.false_alarms} | {got.violations if exact else 'no bound'} | "
            f"{error} |"
        )
        said = rows.said[~rows.never & (rows.silence < 45)]
        shares = " | ".join(f"{(said > limit).mean():.1%}" for limit in LIMITS)
        second.append(f"| {case.label} | {got.living} | {shares} |")
        third.append(f"| {case.label} | {' | '.join(str(getattr(between, name)) for name in vars(between))} |")
    return tables


def with_tables(page: str, tables: Sequence[Sequence[str]]) -> str:
    """Return a page with these tables in place of those that begin alike.

    Args:
        page: The page, in Markdown.
        tables: The lines of each table, the first column of whose head is its name.

    Raises:
        ValueError: The page does not have as many such tables.
    """
    found = list(re.finditer(r"^\| network \|.*\n(\|.*\n)*", page, re.MULTILINE))
    if len(found) != len(tables):
        raise ValueError(f"the page has {len(found)} tables of networks, and not {len(tables)}")
    for old, new in reversed(list(zip(found, tables, strict=True))):
        page = page[: old.start()] + "".join(f"{line}\n" for line in new) + page[old.end() :]
    return page


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    torch.set_num_threads(1)
    PAGE.write_text(with_tables(PAGE.read_text(), _tables(parser.parse_args().seeds)))
