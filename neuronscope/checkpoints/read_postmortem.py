"""Read a post-mortem back from its JSON, without torch.

The JSON holds all evidence, and the verdicts follow from it. So they are combined anew, and the file must say the same.
"""

from __future__ import annotations

import base64
import binascii
import dataclasses
import math
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from neuronscope.checkpoints.postmortem_report import LEVELS, SCHEMA_VERSION, PostmortemReport
from neuronscope.checkpoints.verdict.checkpoint_timeline import (
    CheckpointTimeline,
    LayerTimeline,
    LeftOut,
    TimelinePoint,
)
from neuronscope.checkpoints.verdict.combine import combine_evidence
from neuronscope.checkpoints.verdict.evidence import BASES, CLAIMS, Abstention, Evidence
from neuronscope.checkpoints.verdict.join_units import JoinedLayer
from neuronscope.checkpoints.verdict.layer_verdicts import Confirmation, LayerReport
from neuronscope.checkpoints.verdict.waking_inputs import WakingInput
from neuronscope.errors import ReportError, UsageError
from neuronscope.judge.diagnosis import Diagnosis
from neuronscope.report.json_fields import DamagedError, Fields, check_version, is_integer, read_json
from neuronscope.report.reading import is_postmortem, report_from_dict
from neuronscope.report.report import Report

__all__ = ["read_either", "read_postmortem"]

#: Most neurons of a layer: no network has so many, and a file that says so must not fill the memory.
_MOST_NEURONS = 2**24
_EVENTS = ("died", "revived")


def read_either(path: str | Path) -> Report | PostmortemReport:
    """Read a report or a post-mortem that was saved as JSON.

    Raises:
        ReportError: The file cannot be read, is damaged, is neither, or is from another version of Neuronscope.
    """
    plain = read_json(path)
    return _postmortem(plain, Path(path)) if is_postmortem(plain) else report_from_dict(plain, str(path))


def read_postmortem(path: str | Path) -> PostmortemReport:
    """Read a post-mortem that :meth:`PostmortemReport.to_json` wrote. This does not load torch.

    Args:
        path: The file. Large inputs that wake neurons are read from the file beside it; if that is missing, a note of
            the report says so.

    Returns:
        The post-mortem; each of its ``to_…`` methods gives what the one that was saved gave.

    Raises:
        ReportError: The file cannot be read, is damaged, is no post-mortem, or is from another version of Neuronscope.

    >>> read_postmortem("last.json")
    Traceback (most recent call last):
    neuronscope.errors.ReportError: Cannot read last.json: No such file or directory.
    """
    plain = read_json(path)
    if not is_postmortem(plain):
        raise ReportError(f"Expected a post-mortem in JSON, but {path} holds something else.")
    return _postmortem(plain, Path(path))


def _postmortem(plain: dict[str, Any], path: Path) -> PostmortemReport:
    check_version(plain.get("schema_version"), SCHEMA_VERSION, str(path))
    try:
        report = _report(Fields(plain))
        if (differing := _difference(report.to_dict(), plain)) is not None:
            raise DamagedError(f"{differing} does not fit the rest")
        inputs = _inputs(Fields(plain), path)
    except (DamagedError, UsageError) as error:
        raise ReportError(f"Expected a whole post-mortem in JSON, but {path} is damaged: {error}.") from error
    if inputs is None:
        why = f"{_beside(path).name} is missing, damaged or of another report"
        return replace(report, notes=(*report.notes, f"The inputs that wake neurons are not shown: {why}."))
    return replace(report, waking_inputs=inputs)


def _difference(made: dict[str, Any], plain: dict[str, Any]) -> str | None:
    """Return the first part of the file that differs from what its evidence gives; ``None`` if nothing does."""
    for name, value in made.items():
        if name == "waking_inputs" or value == plain.get(name):
            continue
        if name == "layers":
            return next(f"layer {one['name']}" for one, other in zip(value, plain[name], strict=True) if one != other)
        return name
    return None


def _report(fields: Fields) -> PostmortemReport:
    given = fields.objects("layers")
    evidence, layers = [], {}
    for one in given:
        name, width = one.text("name"), one.integer("neurons")
        if width > _MOST_NEURONS or name in layers:
            one.fail("is there twice" if name in layers else f"has more than {_MOST_NEURONS:,} neurons")
        layers[name] = JoinedLayer(width, one.texts("sites"), one.text_or_null("left_out"))
        evidence += [_evidence(each, name, width) for each in one.objects("evidence")]
    timeline = fields.object_or_null("timeline")
    return PostmortemReport(
        path=fields.text("path"),
        format=fields.text("format"),
        global_step=fields.integer_or_null("global_step"),
        level=fields.text("level", tuple(LEVELS)),
        model=fields.text("model"),
        layers=tuple(
            _with_woken(layer, one) for layer, one in zip(combine_evidence(evidence, layers), given, strict=True)
        ),
        abstentions=tuple(_filled(Abstention, one) for one in fields.objects("abstentions")),
        diagnoses=tuple(map(_diagnosis, fields.objects("diagnoses"))),
        confirmations=tuple(_filled(Confirmation, one) for one in fields.objects("confirmations")),
        notes=fields.texts("notes"),
        timeline=None if timeline is None else _timeline(timeline),
        versions=fields.mapping("versions", "texts", lambda value: isinstance(value, str)),
    )


_T = TypeVar("_T")
_READERS: dict[Any, Callable[[Fields, str], Any]] = {
    "str": Fields.text,
    "int": Fields.integer,
    "bool": Fields.flag,
    "tuple[str, ...]": Fields.texts,
}


def _filled(cls: type[_T], fields: Fields, **others: Any) -> _T:
    """Return an object of a dataclass, filled with the fields of its attributes' names; ``others`` are given."""
    found: Any = cls
    names = {one.name: one.type for one in dataclasses.fields(found) if one.name not in others}
    return cls(**{name: _READERS[kind](fields, name) for name, kind in names.items()}, **others)


def _evidence(fields: Fields, layer: str, width: int) -> Evidence:
    neurons = fields.integers("neuron")
    return _filled(
        Evidence,
        fields,
        layer=layer,
        width=width,
        claim=fields.text("claim", CLAIMS),
        basis=fields.text("basis", BASES),
        neurons=neurons,
        numbers=fields.numbers("number", len(neurons), low=-math.inf),
        since=None if fields.is_null("since") else fields.integers("since", len(neurons), -(2**60)),
        site=fields.text_or_null("site"),
    )


def _with_woken(layer: LayerReport, fields: Fields) -> LayerReport:
    found = fields.object_or_null("woken")
    if found is None:
        return layer
    neurons = found.integers("neuron")
    if (neurons >= layer.neurons).any():
        found.fail("has neurons that the layer does not have")
    woken = np.full(layer.neurons, -1, dtype=np.int64)
    woken[neurons] = found.integers("input", len(neurons))
    return replace(layer, woken=woken)


def _diagnosis(fields: Fields) -> Diagnosis:
    steps = None if fields.is_null("steps") else tuple(fields.integers("steps", 2, -1).tolist())
    return _filled(Diagnosis, fields, steps=steps)


def _timeline(fields: Fields) -> CheckpointTimeline:
    points = tuple(_filled(TimelinePoint, one) for one in fields.objects("checkpoints"))
    if not points:
        fields.fail("has no checkpoint")
    left_out = tuple(_filled(LeftOut, one) for one in fields.objects("left_out"))
    return CheckpointTimeline(points, tuple(_layer(one, len(points)) for one in fields.objects("layers")), left_out)


def _layer(fields: Fields, checkpoints: int) -> LayerTimeline:
    dead = fields.items("dead", checkpoints)
    if not all(one is None or is_integer(one, 0) for one in dead):
        fields.fail("has dead neurons that are no whole numbers")
    events = fields.object("events")
    neuron = events.integers("neuron")
    checkpoint = events.integers("checkpoint", len(neuron))
    if (checkpoint >= checkpoints).any():
        events.fail("has checkpoints that the timeline does not have")
    kinds, bases = events.texts("event"), events.texts("basis")
    if not (len(kinds) == len(bases) == len(neuron) and {*kinds} <= {*_EVENTS} and {*bases} <= {*BASES}):
        events.fail("has other events than it can have")
    return _filled(
        LayerTimeline,
        fields,
        dead=np.array([-1 if one is None else one for one in dead], dtype=np.int64),
        unknown=fields.integers("unknown", checkpoints),
        neuron=neuron,
        kind=np.array([_EVENTS.index(kind) for kind in kinds], dtype=np.uint8),
        checkpoint=checkpoint,
        earliest=events.integers("earliest", len(neuron), -(2**60)),
        latest=events.integers("latest", len(neuron), -(2**60)),
        basis=np.array([BASES.index(basis) for basis in bases], dtype=np.uint8),
    )


def _beside(path: Path) -> Path:
    return path.with_name(f"{path.stem}-inputs.npz")


def _inputs(fields: Fields, path: Path) -> tuple[WakingInput, ...] | None:
    """Return the inputs that wake neurons; ``None`` if they are in a file that is missing, or that does not fit."""
    given = [one.objects("tensors") for one in fields.objects("waking_inputs")]
    if all(not one.is_null("base64") for tensors in given for one in tensors):
        return tuple({one.text("name"): _array(one) for one in tensors} for tensors in given)
    try:
        with _beside(path).open("rb") as file, np.load(file, allow_pickle=False) as stored:
            found = [
                {name: stored[f"{index}.{name}"] for name in (part.text("name") for part in one)}
                for index, one in enumerate(given)
            ]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None
    fits = all(
        array.dtype.name == one.text("dtype") and list(array.shape) == one.items("shape")
        for arrays, tensors in zip(found, given, strict=True)
        for array, one in zip(arrays.values(), tensors, strict=True)
    )
    return tuple(found) if fits else None


def _array(fields: Fields) -> npt.NDArray[Any]:
    try:
        dtype = np.dtype(fields.text("dtype"))
        values = np.frombuffer(base64.b64decode(fields.text("base64"), validate=True), dtype.newbyteorder("<"))
        return values.astype(dtype).reshape(fields.integers("shape").tolist())
    except (TypeError, ValueError, binascii.Error):
        fields.fail("is no tensor")
