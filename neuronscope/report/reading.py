"""Read a report back from its JSON, without torch.

A file may be damaged, from another program or from another version. Each field is checked, so that what is wrong in a
file is refused here and does not come out later as a count.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from neuronscope.errors import ReportError, UsageError
from neuronscope.judge.verdicts import LABELS, Judgement, Policy, is_tau_dormant
from neuronscope.report.acts import Act
from neuronscope.report.report import (
    SCHEMA_VERSION,
    FloatArray,
    IntArray,
    NotMeasured,
    Report,
    SiteHistory,
    SiteReport,
    WindowSpan,
)
from neuronscope.sites import IncomingRows, ReaderColumns

__all__ = ["read_report", "report_from_dict"]

_KINDS = ("relu-like", "smooth", "leaky", "saturating", "gated", "sparse")
#: No run counts so many; what is below fits int64.
_MOST = 2**60


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
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise ReportError(f"Cannot read {path}: {error.strerror or error}.") from error
    except UnicodeDecodeError as error:
        raise ReportError(f"Expected a report in JSON, but {path} is not text.") from error
    try:
        plain = json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise ReportError(f"Expected a report in JSON, but {path} is not JSON: {error}.") from error
    return report_from_dict(plain, str(path))


def report_from_dict(plain: Any, source: str = "the data") -> Report:
    """Return the report that :meth:`Report.to_dict` made plain data of.

    Args:
        plain: The plain data.
        source: Where it comes from, for messages.

    Raises:
        ReportError: It is damaged, is no report, or is from another version of Neuronscope.
    """
    if isinstance(plain, dict) and {"level", "diagnoses"} <= plain.keys():
        raise ReportError(
            f"Expected the report of a watched run or a scan, but {source} is a post-mortem, which is made anew from "
            "its checkpoint: `neuronscope postmortem`."
        )
    if not isinstance(plain, dict) or not {"schema_version", "phase", "layers", "policy"} <= plain.keys():
        raise ReportError(f"Expected a report in JSON, but {source} holds something else.")
    version = plain["schema_version"]
    if version != SCHEMA_VERSION:
        age = "an older" if isinstance(version, int) and version < SCHEMA_VERSION else "another"
        raise ReportError(
            f"Expected a report of schema version {SCHEMA_VERSION}, but {source} has {str(version)[:20]}: {age} "
            "version of Neuronscope wrote it."
        )
    try:
        return _report(_Fields(plain))
    except (_DamagedError, UsageError) as error:
        raise ReportError(f"Expected a whole report in JSON, but {source} is damaged: {error}.") from error


class _DamagedError(ValueError):
    """A field is missing, or is not what it can be."""


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON")


class _Fields:
    """Read the fields of one JSON object, and check each.

    Args:
        plain: The object.
        place: Where it is in the report, for messages.
    """

    def __init__(self, plain: Any, place: str = "") -> None:
        if not isinstance(plain, dict):
            raise _DamagedError(f"{place.rstrip('.') or 'the report'} is no object")
        self._plain, self._place = plain, place

    def _get(self, name: str, what: str, fits: Callable[[Any], bool]) -> Any:
        if name not in self._plain:
            raise _DamagedError(f"{self._place}{name} is missing")
        value = self._plain[name]
        if not fits(value):
            raise _DamagedError(f"{self._place}{name} is not {what}")
        return value

    def has(self, name: str) -> bool:
        return name in self._plain

    def text(self, name: str, among: Sequence[str] = ()) -> str:
        what = f"one of {', '.join(among)}" if among else "text"
        found: str = self._get(name, what, lambda value: isinstance(value, str) and (not among or value in among))
        return found

    def flag(self, name: str) -> bool:
        return self._get(name, "true or false", lambda value: isinstance(value, bool)) is True

    def integer(self, name: str, low: int = 0) -> int:
        return int(self._get(name, f"a whole number of at least {low}", lambda value: _is_integer(value, low)))

    def texts(self, name: str) -> tuple[str, ...]:
        return tuple(self._get(name, "a list of texts", lambda value: _each(value, lambda one: isinstance(one, str))))

    def items(self, name: str, length: int | None = None) -> list[Any]:
        what = "a list" if length is None else f"a list of {length}"
        found: list[Any] = self._get(name, what, lambda value: isinstance(value, list) and length in (None, len(value)))
        return found

    def object(self, name: str) -> _Fields:
        return _Fields(self._get(name, "an object", lambda value: isinstance(value, dict)), f"{self._place}{name}.")

    def members(self, name: str) -> dict[str, _Fields]:
        found = self.mapping(name, "objects", lambda value: isinstance(value, dict))
        return {key: _Fields(one, f"{self._place}{name}.{key}.") for key, one in found.items()}

    def objects(self, name: str) -> list[_Fields]:
        return [_Fields(one, f"{self._place}{name}[{index}].") for index, one in enumerate(self.items(name))]

    def integers(self, name: str, length: int | None = None, low: int = 0) -> IntArray:
        values = self.items(name, length)
        if not all(_is_integer(one, low) for one in values):
            raise _DamagedError(f"{self._place}{name} holds something else than whole numbers of at least {low}")
        return np.array(values, dtype=np.int64)

    def numbers(self, name: str, length: int, high: float = math.inf) -> FloatArray:
        """Return numbers from 0 to ``high``, float64; those that are ``null`` become NaN."""
        values = self.items(name, length)
        if not all(one is None or (_is_number(one) and 0 <= one <= high) for one in values):
            raise _DamagedError(f"{self._place}{name} holds something else than numbers from 0 to {high:g}")
        return np.array([math.nan if one is None else one for one in values], dtype=np.float64)

    def mapping(self, name: str, what: str, fits: Callable[[Any], bool]) -> dict[str, Any]:
        found = self._get(name, f"an object of {what}", lambda value: isinstance(value, dict))
        if not all(map(fits, found.values())):
            raise _DamagedError(f"{self._place}{name} is not an object of {what}")
        return dict(found)

    def fail(self, reason: str) -> NoReturn:
        raise _DamagedError(f"{self._place.rstrip('.')} {reason}")


def _is_number(value: Any) -> bool:
    """Whether a value is a number that float64 holds; JSON has no infinity, but ``1e999`` is read as one."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def _is_integer(value: Any, low: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= _MOST


def _each(value: Any, fits: Callable[[Any], bool]) -> bool:
    return isinstance(value, list) and all(map(fits, value))


def _report(fields: _Fields) -> Report:
    window, policy = fields.object("window"), fields.mapping("policy", "numbers", _is_number)
    if policy.keys() != Policy().to_dict().keys():
        raise _DamagedError("policy has other thresholds than it can have")
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


def _act(fields: _Fields) -> Act:
    return Act(
        step=fields.integer("step"),
        site=fields.text("site"),
        neurons=tuple(fields.integers("neurons").tolist()),
        rule=fields.text("rule"),
        first_step=fields.integer("first_step", -1),
        last_step=fields.integer("last_step", -1),
    )


def _points(fields: _Fields) -> tuple[tuple[int, float], ...]:
    steps = fields.integers("steps").tolist()
    values = fields.items("values", len(steps))
    if not all(one is None or _is_number(one) for one in values):
        fields.fail("holds values that are no numbers")
    return tuple(zip(steps, (math.nan if one is None else float(one) for one in values), strict=True))


def _site(fields: _Fields, policy: Policy) -> SiteReport:
    neurons = fields.integer("neurons")
    means = fields.numbers("mean_abs_output", neurons)
    site = SiteReport(
        name=fields.text("name"),
        activation=fields.text("activation"),
        kind=fields.text("kind", _KINDS),
        neurons=neurons,
        axis=fields.integer("axis"),
        axis_source=fields.text("axis_source"),
        positions=fields.integer("positions"),
        gradient_positions=fields.integer("gradient_positions"),
        examples=fields.integer("examples"),
        not_finite=fields.integer("not_finite"),
        zero_output_fraction=fields.numbers("zero_output_fraction", neurons, 1),
        zero_gradient_fraction=fields.numbers("zero_gradient_fraction", neurons, 1),
        mean_abs_output=means,
        last_active_step=fields.integers("last_active_step", neurons, -1),
        judgement=_judgement(fields, means, policy),
        history=_history(fields.object("history"), neurons),
        layer=fields.text("layer"),
        units=tuple(_run(fields, run) for run in fields.items("units")),
        output=fields.flag("output"),
        readers=fields.texts("readers"),
        reader_columns=tuple(_columns(one) for one in fields.objects("reader_columns")),
        reader_notes=fields.texts("reader_notes"),
        incoming=tuple(_rows(one) for one in fields.objects("incoming")),
        incoming_notes=fields.texts("incoming_notes"),
        is_norm=fields.flag("is_norm"),
        normalises=fields.text("normalises"),
        idle_positions=fields.integers("idle_positions", neurons) if fields.has("idle_positions") else None,
    )
    for name in ("dead", "born_dead", "silent", "dormant", "tau_dormant", "cut_off", "linear", "unseen"):
        if fields.integer(name) != getattr(site, name):
            fields.fail(f"has {fields.integer(name)} as {name}, but its neurons' labels give {getattr(site, name)}")
    return site


def _judgement(fields: _Fields, means: FloatArray, policy: Policy) -> Judgement:
    labels = fields.items("labels", len(means))
    if not all(isinstance(label, str) and label in LABELS for label in labels):
        fields.fail("has a label that no neuron can have")
    codes = np.array([LABELS.index(label) for label in labels], dtype=np.uint8)
    masks = {label.replace(" ", "_"): codes == code for code, label in enumerate(LABELS[:-1])}
    if masks["unseen"].all() or fields.text("kind", _KINDS) == "sparse":
        return Judgement(**masks, tau_dormant=np.zeros(codes.shape, dtype=np.bool_))
    return Judgement(**masks, tau_dormant=is_tau_dormant(means, masks["not_finite"], policy.dormant_tau))


def _history(fields: _Fields, neurons: int) -> SiteHistory:
    steps = fields.integers("steps", low=-1)
    windows = len(steps)
    rows = fields.items("levels", windows)
    if not all(_each(row, lambda one: _is_integer(one, 0) and one <= 255) and len(row) == neurons for row in rows):
        fields.fail(f"has levels that are not {windows} rows of {neurons} bytes")
    if (np.diff(steps) < 0).any():
        fields.fail("has steps that do not ascend")
    return SiteHistory(
        steps=steps,
        **{name: fields.integers(name, windows) for name in ("dead", "silent", "dormant", "cut_off")},
        levels=np.array(rows, dtype=np.uint8).reshape(windows, neurons),
        **{name: fields.integers(name, neurons, -1) for name in ("died_step", "revived_step")},
        **{name: fields.integers(name, neurons) for name in ("deaths", "revivals")},
    )


def _run(fields: _Fields, run: Any) -> tuple[str, int, int, int]:
    if not (isinstance(run, list) and len(run) == 4 and isinstance(run[0], str)) or run[3] == 0:
        fields.fail("has units that are not a layer, start, stop and step")
    if not all(_is_integer(one, -_MOST) for one in run[1:]):
        fields.fail("has units that are not a layer, start, stop and step")
    return run[0], run[1], run[2], run[3]


def _rows(fields: _Fields) -> IncomingRows:
    layer, *numbers = IncomingRows._fields
    return IncomingRows(fields.text(layer), *(fields.integer(name, -_MOST) for name in numbers))


def _columns(fields: _Fields) -> ReaderColumns:
    layer, *numbers = ReaderColumns._fields
    return ReaderColumns(fields.text(layer), *(fields.integer(name, -_MOST) for name in numbers))
