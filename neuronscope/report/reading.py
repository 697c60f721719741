"""Read a report back from its JSON, without torch.

A file may be damaged, from another program or from another version. Each field is checked, so that what is wrong in a
file is refused here and does not come out later as a count.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from neuronscope.arrays import FloatArray
from neuronscope.errors import ReportError, UsageError
from neuronscope.judge.verdicts import LABELS, Judgement, Policy, is_tau_dormant
from neuronscope.report.acts import Act
from neuronscope.report.json_fields import (
    MOST,
    DamagedError,
    Fields,
    check_version,
    each,
    is_integer,
    is_number,
    read_json,
)
from neuronscope.report.report import (
    HISTORY_COUNTS,
    POSITIONS,
    SCHEMA_VERSION,
    SITE_COUNTS,
    NotMeasured,
    Report,
    SiteHistory,
    SiteReport,
    WindowSpan,
)
from neuronscope.sites import IncomingRows, ReaderColumns

__all__ = ["is_postmortem", "read_report", "report_from_dict"]

LinesT = TypeVar("LinesT", IncomingRows, ReaderColumns)

_KINDS = ("relu-like", "smooth", "leaky", "saturating", "gated", "sparse")


def read_report(path: str | Path) -> Report:
    """Read a report that :meth:`Report.to_json` wrote. This does not load torch.

    Args:
        path: The file.

    Returns:
        The report; each of its ``to_…`` methods gives what the report that was saved gave.

    Raises:
        ReportError: The file cannot be read, is damaged, is no report, or is from another version of Neuronscope.

    >>> read_report("loss.csv")
    Traceback (most recent call last):
    neuronscope.errors.ReportError: Cannot read loss.csv: No such file or directory.
    """
    return report_from_dict(read_json(path), str(path))


def report_from_dict(plain: Any, source: str = "the data") -> Report:
    """Return the report that :meth:`Report.to_dict` made plain data of.

    Args:
        plain: The plain data.
        source: Where it comes from, for messages.

    Raises:
        ReportError: It is damaged, is no report, or is from another version of Neuronscope.
    """
    if is_postmortem(plain):
        raise ReportError(
            f"Expected the report of a watched run or a scan, but {source} is a post-mortem: "
            "`neuronscope.read_postmortem` reads it."
        )
    if not isinstance(plain, dict) or not {"schema_version", "phase", "layers", "policy"} <= plain.keys():
        raise ReportError(f"Expected a report in JSON, but {source} holds something else.")
    check_version(plain["schema_version"], SCHEMA_VERSION, source)
    try:
        return _report(Fields(plain))
    except (DamagedError, UsageError) as error:
        raise ReportError(f"Expected a whole report in JSON, but {source} is damaged: {error}.") from error


def is_postmortem(plain: Any) -> bool:
    """Whether plain data looks like a post-mortem's."""
    return isinstance(plain, dict) and {"level", "diagnoses"} <= plain.keys()


def _report(fields: Fields) -> Report:
    window, policy = fields.object("window"), fields.mapping("policy", "numbers", is_number)
    if policy.keys() != Policy().to_dict().keys():
        raise DamagedError("policy has other thresholds than it can have")
    thresholds = Policy(**policy)
    return Report(
        model=fields.text("model"),
        phase=fields.text("phase"),
        global_step=fields.integer("global_step"),
        window=WindowSpan(
            name=window.text("name", ("last", "all")),
            first_step=window.integer("first_step", -1),
            last_step=window.integer("last_step", -1),
            steps=window.integer("steps"),
            long_enough=window.flag("long_enough"),
        ),
        policy=policy,
        layers=tuple(_site(one, thresholds) for one in fields.objects("layers")),
        not_measured=tuple(NotMeasured(one.text("name"), one.text("reason")) for one in fields.objects("not_measured")),
        notes=fields.texts("notes"),
        fault=fields.text("fault"),
        series={name: _points(one) for name, one in fields.members("series").items()},
        checkpoints=tuple(fields.integers("checkpoints").tolist()),
        versions=fields.mapping("versions", "texts", lambda value: isinstance(value, str)),
        acts=tuple(_act(one) for one in fields.objects("acts")),
    )


def _act(fields: Fields) -> Act:
    return Act(
        step=fields.integer("step"),
        site=fields.text("site"),
        neurons=tuple(fields.integers("neurons").tolist()),
        rule=fields.text("rule"),
        first_step=fields.integer("first_step", -1),
        last_step=fields.integer("last_step", -1),
    )


def _points(fields: Fields) -> tuple[tuple[int, float], ...]:
    steps = fields.integers("steps").tolist()
    values = fields.items("values", len(steps))
    if not all(one is None or is_number(one) for one in values):
        fields.fail("holds values that are no numbers")
    return tuple(zip(steps, (math.nan if one is None else float(one) for one in values), strict=True))


def _site(fields: Fields, policy: Policy) -> SiteReport:
    neurons = fields.integer("neurons")
    means = fields.numbers("mean_abs_output", neurons)
    plain: dict[str, Any] = {
        **{name: fields.text(name) for name in ("name", "activation", "axis_source", "layer", "normalises")},
        **{name: fields.texts(name) for name in ("readers", "reader_notes", "incoming_notes")},
        **{name: fields.flag(name) for name in ("output", "is_norm")},
        **{name: fields.integer(name) for name in ("axis", "not_finite", *POSITIONS)},
        **{name: fields.numbers(name, neurons, 1) for name in ("zero_output_fraction", "zero_gradient_fraction")},
    }
    site = SiteReport(
        **plain,
        kind=fields.text("kind", _KINDS),
        neurons=neurons,
        mean_abs_output=means,
        last_active_step=fields.integers("last_active_step", neurons, -1),
        judgement=_judgement(fields, means, policy),
        history=_history(fields.object("history"), neurons),
        units=tuple(_run(fields, run) for run in fields.items("units")),
        reader_columns=tuple(_lines(one, ReaderColumns) for one in fields.objects("reader_columns")),
        incoming=tuple(_lines(one, IncomingRows) for one in fields.objects("incoming")),
        idle_positions=fields.integers("idle_positions", neurons) if fields.has("idle_positions") else None,
    )
    for name in SITE_COUNTS:
        if fields.integer(name) != getattr(site, name):
            fields.fail(f"has {fields.integer(name)} as {name}, but its neurons' labels give {getattr(site, name)}")
    return site


def _judgement(fields: Fields, means: FloatArray, policy: Policy) -> Judgement:
    labels = fields.items("labels", len(means))
    if not all(isinstance(label, str) and label in LABELS for label in labels):
        fields.fail("has a label that no neuron can have")
    codes = np.array([LABELS.index(label) for label in labels], dtype=np.uint8)
    masks = {label.replace(" ", "_"): codes == code for code, label in enumerate(LABELS[:-1])}
    if masks["unseen"].all() or fields.text("kind", _KINDS) == "sparse":
        return Judgement(**masks, tau_dormant=np.zeros(codes.shape, dtype=np.bool_))
    return Judgement(**masks, tau_dormant=is_tau_dormant(means, masks["not_finite"], policy.dormant_tau))


def _history(fields: Fields, neurons: int) -> SiteHistory:
    steps = fields.integers("steps", low=-1)
    windows = len(steps)
    rows = fields.items("levels", windows)
    if not all(each(row, lambda one: is_integer(one, 0) and one <= 255) and len(row) == neurons for row in rows):
        fields.fail(f"has levels that are not {windows} rows of {neurons} bytes")
    if (np.diff(steps) < 0).any():
        fields.fail("has steps that do not ascend")
    history = SiteHistory(
        steps=steps,
        levels=np.array(rows, dtype=np.uint8).reshape(windows, neurons),
        **{name: fields.integers(name, neurons, -1) for name in ("died_step", "revived_step")},
        **{name: fields.integers(name, neurons) for name in ("deaths", "revivals")},
    )
    for name in HISTORY_COUNTS:
        if not np.array_equal(fields.integers(name, windows), getattr(history, name)):
            fields.fail(f"has other numbers as {name} than its levels give")
    return history


def _run(fields: Fields, run: Any) -> tuple[str, int, int, int]:
    is_run = isinstance(run, list) and len(run) == 4 and isinstance(run[0], str) and run[3] != 0
    if not is_run or not all(is_integer(one, -MOST) for one in run[1:]):
        fields.fail("has units that are not a layer, start, stop and step")
    return run[0], run[1], run[2], run[3]


def _lines(fields: Fields, kind: type[LinesT]) -> LinesT:
    """Return rows or columns of a layer: its path, and whole numbers."""
    layer, *numbers = kind._fields
    return kind(fields.text(layer), *(fields.integer(name, -MOST) for name in numbers))
