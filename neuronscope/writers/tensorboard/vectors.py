"""Vectors: one byte a neuron in the event file, which Neuronscope's own tab draws and no other tab minds.

A tag a site and phase, ``neuronscope.vectors/<site>`` (``neuronscope.val_vectors/<site>``), each a uint8 tensor
``(C, N)`` of the channels that :data:`CHANNELS` names. TensorBoard keeps the content of a tag's *first* summary only
and gives tags back unordered, so the content holds what does not change: the site, its place in the network, the codes.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from neuronscope.errors import MissingExtraError
from neuronscope.judge.verdicts import LABELS
from neuronscope.report.report import (
    LEVEL_CUT_OFF,
    LEVEL_DEAD,
    LEVEL_DORMANT,
    LEVEL_MAX,
    LEVEL_NOT_FINITE,
    LEVEL_UNSEEN,
    Report,
    SiteReport,
)
from neuronscope.writers.tensorboard.tags import metric, safe

if TYPE_CHECKING:
    from tensorboard.compat.proto.summary_pb2 import Summary

__all__ = ["CHANNELS", "CONTENT_VERSION", "PLUGIN_NAME", "codes", "summaries"]

PLUGIN_NAME = "neuronscope"
#: Version of the content and of the tensor's layout.
CONTENT_VERSION = 1
#: Rows of a tensor: the verdict or zero-output fraction, and the zero-gradient fraction.
CHANNELS = ("level", "zero_gradient")


def codes(site: SiteReport) -> npt.NDArray[np.uint8]:
    """What is known of a site's neurons in the report's window, a byte each.

    Both channels hold 0 … ``LEVEL_MAX`` for a fraction (0 is exactly 0, ``LEVEL_MAX`` exactly 1) and ``LEVEL_UNSEEN``;
    the first holds the other ``LEVEL_*`` verdicts as well.

    Returns:
        uint8 ``(2, N)``, in the order of :data:`CHANNELS`.
    """
    level = _fractions(site.zero_output_fraction)
    labels = site.judgement.labels()
    verdicts = {
        "unseen": LEVEL_UNSEEN,
        "not finite": LEVEL_NOT_FINITE,
        "dead": LEVEL_DEAD,
        "cut off": LEVEL_CUT_OFF,
        "dormant": LEVEL_DORMANT,
    }
    for label, code in verdicts.items():
        level[labels == LABELS.index(label)] = code
    return np.stack([level, _fractions(site.zero_gradient_fraction)])


def summaries(report: Report) -> list[Summary]:
    """One TensorBoard summary a site.

    Raises:
        MissingExtraError: TensorBoard is not installed.
    """
    try:
        from tensorboard.compat.proto import summary_pb2
        from tensorboard.util.tensor_util import make_tensor_proto
    except ImportError as error:
        raise MissingExtraError(
            "Expected TensorBoard for writing vectors, but it is not installed: pip install tensorboard"
        ) from error
    made = []
    for order, site in enumerate(report.layers):
        plugin = summary_pb2.SummaryMetadata.PluginData(
            plugin_name=PLUGIN_NAME, content=json.dumps(_content(report, site, order)).encode("ascii")
        )
        metadata = summary_pb2.SummaryMetadata(
            plugin_data=plugin,
            data_class=summary_pb2.DATA_CLASS_TENSOR,  # without it the run does not show at all
        )
        tag = f"neuronscope.{metric('vectors', report.phase)}/{safe(site.name)}"
        value = summary_pb2.Summary.Value(tag=tag, tensor=make_tensor_proto(codes(site)), metadata=metadata)
        made.append(summary_pb2.Summary(value=[value]))
    return made


def _content(report: Report, site: SiteReport, order: int) -> dict[str, Any]:
    return {
        "version": CONTENT_VERSION,
        "phase": report.phase,
        "site": site.name,
        "order": order,
        "neurons": site.neurons,
        "activation": site.activation,
        "kind": site.kind,
        "channels": list(CHANNELS),
        "levels": {
            "max": LEVEL_MAX,
            "unseen": LEVEL_UNSEEN,
            "dormant": LEVEL_DORMANT,
            "cut_off": LEVEL_CUT_OFF,
            "not_finite": LEVEL_NOT_FINITE,
            "dead": LEVEL_DEAD,
        },
    }


def _fractions(values: npt.NDArray[np.float64]) -> npt.NDArray[np.uint8]:
    """Fractions as bytes; only an exact 0 is 0 and only an exact 1 is ``LEVEL_MAX``."""
    inner = np.clip(np.rint(np.nan_to_num(values) * LEVEL_MAX), 1, LEVEL_MAX - 1)
    coded = np.where(values == 0.0, 0, np.where(values == 1.0, LEVEL_MAX, inner))
    return np.where(np.isnan(values), LEVEL_UNSEEN, coded).astype(np.uint8)
