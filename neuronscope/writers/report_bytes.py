"""Pack a report as the bytes from which TensorBoard's tab draws its page, and read them back.

A run writes its report again at each drawing, so the bytes hold what the page shows and no more: every verdict, every
date, and the history as finely as a budget allows. What was left out is said in a note of the report.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from neuronscope.arrays import ByteArray, IntArray
from neuronscope.errors import ReportError
from neuronscope.judge.verdicts import LABELS, Judgement, is_tau_dormant
from neuronscope.report.reading import report_from_dict
from neuronscope.report.report import LEVEL_MAX, LEVEL_UNSEEN, SITE_COUNTS, Report, SiteHistory, SiteReport
from neuronscope.writers.formatting import count
from neuronscope.writers.packing import coarse_levels, fraction_levels, spread_windows

__all__ = ["BUDGET", "from_bytes", "to_bytes"]


#: Bytes that the history may take, before it is thinned. Verdicts and dates come on top: two or three bytes a neuron.
BUDGET = 250_000
#: Most bytes that are unpacked: more is no report of ours.
MOST_BYTES = 1 << 30
#: Version of the layout of the bytes. What is in them has the version of the report's own plain data.
_VERSION = 1
_BEGIN = b"neuronscope report\0"

_STEPS = ("died_step", "revived_step", "deaths", "revivals")
#: What is held of each neuron, with the type in the bytes: levels and labels are single bytes.
_FIELDS = {"label": "u1", "level": "u1", "mean": "<f4", "last_active_step": "<i8", **dict.fromkeys(_STEPS, "<i8")}


class _Rung(NamedTuple):
    """How finely histories are kept."""

    windows: int  # most windows
    shades: int  # steps between "never zero" and "always zero"; 0 keeps one for each neuron: its mean over the windows
    bits: float  # bits that a neuron takes in a window, about


#: Shades where there is no room for all.
_FEW = 25
_LADDER = (_Rung(256, LEVEL_MAX, 8), _Rung(64, LEVEL_MAX, 8), _Rung(64, _FEW, 5), _Rung(64, 0, 0.3), _Rung(16, 0, 0.3))


def to_bytes(report: Report) -> bytes:
    """Pack a report: at most some 250 kB for the history, and two or three bytes a neuron."""
    rung = next((rung for rung in _LADDER if _size(report, rung) <= BUDGET), _LADDER[-1])
    histories = [_thinned(site.history, rung) for site in report.layers]
    notes = [*report.notes, *_left_out(report, histories, rung)]
    header = {
        "version": _VERSION,
        "report": {**replace(report, layers=()).to_dict(), "notes": notes},
        "layers": [_facts(site, steps) for site, (steps, _) in zip(report.layers, histories, strict=True)],
    }
    text = json.dumps(header, allow_nan=False, separators=(",", ":")).encode()
    fields = [_fields(site, rung.shades or _FEW) for site in report.layers]
    planes = [
        np.concatenate([np.zeros(0, kind), *(field[name] for field in fields)]).astype(kind)
        for name, kind in _FIELDS.items()
    ]
    levels = [levels.T for _, levels in histories]  # neuron by neuron: what stays the same deflates to nothing
    pieces = [*(plane.view(np.uint8).reshape(plane.size, plane.itemsize).T for plane in planes), *levels]
    raw = b"".join([struct.pack("<I", len(text)), text, *(np.ascontiguousarray(piece).tobytes() for piece in pieces)])
    return _BEGIN + zlib.compress(raw, 6)


def from_bytes(data: bytes, source: str = "the data") -> Report:
    """Return the report that was packed. Of zero-gradient fractions nothing is known, nor of the outputs of the living.

    Args:
        data: What :func:`to_bytes` returned.
        source: Where it comes from, for messages.

    Raises:
        ReportError: It is damaged, is no report, or is from another version of Neuronscope.
    """
    if not data.startswith(_BEGIN):
        raise ReportError(f"Expected a report's bytes, but {source} holds something else.")
    try:
        unpacker = zlib.decompressobj()
        raw = unpacker.decompress(data[len(_BEGIN) :], MOST_BYTES)
        if not unpacker.eof:
            raise ValueError("it is cut short or too long")
        (length,) = struct.unpack_from("<I", raw)
        header = json.loads(raw[4 : 4 + length])
        if header["version"] != _VERSION:
            raise ReportError(f"Expected a report's bytes, but {source} is from another version of Neuronscope.")
        report_from_dict({**header["report"], "layers": []}, source)  # another schema may have other layers
        plain = _with_neurons(header, np.frombuffer(raw, np.uint8, offset=4 + length))
    except (ArithmeticError, LookupError, TypeError, ValueError, RecursionError, struct.error, zlib.error) as error:
        raise ReportError(f"Expected a report's bytes, but {source} is damaged: {error}.") from error
    return report_from_dict(plain, source)


def _size(report: Report, rung: _Rung) -> float:
    return sum(min(len(site.history.steps), rung.windows) * site.neurons for site in report.layers) * rung.bits / 8


def _thinned(history: SiteHistory, rung: _Rung) -> tuple[IntArray, ByteArray]:
    """Return the steps of the windows that are kept, int64 ``(W,)``, and their levels, uint8 ``(W, N)``."""
    picked = spread_windows(len(history.steps), rung.windows)
    levels = history.levels[picked]
    if not rung.shades and levels.size:
        lives = levels < LEVEL_MAX
        total, windows = np.where(lives, levels, 0).sum(axis=0, dtype=np.int64), np.maximum(lives.sum(axis=0), 1)
        mean = np.where(total > 0, np.clip(np.rint(total / windows), 1, LEVEL_MAX - 1), 0)
        levels = np.where(lives, coarse_levels(mean.astype(np.uint8), _FEW), levels)
    elif rung.shades:
        levels = coarse_levels(levels, rung.shades)
    return history.steps[picked], levels


def _left_out(report: Report, histories: Sequence[tuple[IntArray, ByteArray]], rung: _Rung) -> list[str]:
    """Say in a sentence what is missing of the history."""
    windows = [site.history.steps for site in report.layers], [steps for steps, _ in histories]
    had, kept = (max(map(len, steps), default=0) for steps in windows)
    lost = [f"it has {count(kept)} of {count(had)} windows"] if kept < had else []
    if 0 < rung.shades < LEVEL_MAX:
        lost.append(f"fractions of zeros in it are rounded to {rung.shades} steps")
    elif not rung.shades:
        lost.append("a neuron that works has one shade, its mean over time")
    return [f"To keep TensorBoard's files small, the history is thinned: {'; '.join(lost)}."] if lost else []


def _facts(site: SiteReport, steps: IntArray) -> dict[str, Any]:
    """Return what is known of a layer beside its neurons, as in its plain data."""
    none: npt.NDArray[Any] = np.zeros(0, np.int64)
    masks = dict.fromkeys(Judgement.__dataclass_fields__, np.zeros(0, np.bool_))
    history = dict.fromkeys(SiteHistory.__dataclass_fields__, none) | {"levels": np.zeros((0, 0), np.uint8)}
    bare = replace(
        site,
        neurons=0,
        zero_output_fraction=none,
        zero_gradient_fraction=none,
        mean_abs_output=none,
        last_active_step=none,
        judgement=Judgement(**masks),
        history=SiteHistory(**history),
    )
    counts = {name: getattr(site, name) for name in SITE_COUNTS}
    return {**bare.to_dict(), **counts, "neurons": site.neurons, "history": {"steps": steps.tolist()}}


def _fields(site: SiteReport, shades: int) -> dict[str, npt.NDArray[Any]]:
    """Return what is held of each neuron of a layer, its fraction of zeros rounded to so many steps."""
    labels = site.judgement.labels()
    with np.errstate(over="ignore"):  # the means only put the worst neurons in order
        means = site.mean_abs_output.astype(np.float32)
    return {
        "label": labels,
        "level": coarse_levels(fraction_levels(site.zero_output_fraction), shades),
        "mean": np.where(labels < LABELS.index("linear"), means, np.float32(0)),
        "last_active_step": site.last_active_step,
        **{name: getattr(site.history, name) for name in _STEPS},
    }


def _with_neurons(header: dict[str, Any], data: ByteArray) -> dict[str, Any]:
    """Return the plain data of a report, with what the bytes after its header hold of each neuron."""
    sizes = [(int(layer["neurons"]), len(layer["history"]["steps"])) for layer in header["layers"]]
    neurons = sum(size for size, _ in sizes)
    wanted = sum(neurons * np.dtype(kind).itemsize for kind in _FIELDS.values()) + sum(size * w for size, w in sizes)
    if min([0, *(size for size, _ in sizes)]) < 0 or data.size != wanted:
        raise ValueError(f"it has {data.size} bytes of neurons where {wanted} are expected")
    held, place = {}, 0
    for name, kind in _FIELDS.items():
        item = np.dtype(kind).itemsize
        planes = data[place : place + neurons * item].reshape(item, neurons)
        held[name], place = np.ascontiguousarray(planes.T).view(kind).reshape(neurons), place + planes.size
    layers, first = [], 0
    tau = header["report"]["policy"]["dormant_tau"]
    for layer, (size, windows) in zip(header["layers"], sizes, strict=True):
        own = {name: values[first : first + size] for name, values in held.items()}
        levels = data[place : place + size * windows].reshape(size, windows).T
        layers.append({**layer, **_neurons(own, tau), "history": _history(layer["history"]["steps"], levels, own)})
        first, place = first + size, place + size * windows
    return {**header["report"], "layers": layers}


def _neurons(own: dict[str, npt.NDArray[Any]], tau: float) -> dict[str, Any]:
    labels, means = own["label"], own["mean"].astype(np.float64)
    broken, unseen = (labels == LABELS.index(label) for label in ("not finite", "unseen"))
    means[~np.isfinite(means)] = np.nan
    return {
        "labels": [LABELS[code] for code in labels],
        "zero_output_fraction": [
            None if level == LEVEL_UNSEEN else level / LEVEL_MAX for level in own["level"].tolist()
        ],
        "zero_gradient_fraction": [None] * len(labels),
        "mean_abs_output": [None if mean != mean else mean for mean in means.tolist()],
        "last_active_step": own["last_active_step"].tolist(),
        "tau_dormant": 0 if unseen.all() else int(is_tau_dormant(means, broken, tau).sum()),
    }


def _history(steps: list[int], levels: ByteArray, own: dict[str, npt.NDArray[Any]]) -> dict[str, Any]:
    return SiteHistory(steps=np.asarray(steps), levels=levels, **{name: own[name] for name in _STEPS}).to_dict()
