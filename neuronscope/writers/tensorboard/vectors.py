"""Writes one byte per neuron to the event file, for Neuronscope's own tab; other tabs ignore it.

There is one tag for each layer and phase, ``neuronscope.vectors/<layer>`` (``neuronscope.val_vectors/<layer>``): a
uint8 tensor ``(C, N)`` of the channels in :data:`CHANNELS`. TensorBoard keeps the content of a tag's *first* summary
only and returns tags in no order, so the content holds what does not change: the layer, its place in the network, the
codes.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from neuronscope.errors import MissingExtraError
from neuronscope.report.report import (
    LEVEL_CUT_OFF,
    LEVEL_DEAD,
    LEVEL_DORMANT,
    LEVEL_MAX,
    LEVEL_NOT_FINITE,
    LEVEL_SILENT,
    LEVEL_UNSEEN,
    Report,
    SiteReport,
)
from neuronscope.writers.packing import fraction_levels, verdict_levels
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
    """Return what is known of a layer's neurons in the report's window, one byte each.

    Both channels hold 0 … ``LEVEL_MAX`` for a fraction (0 is exactly 0, ``LEVEL_MAX`` exactly 1) and ``LEVEL_UNSEEN``;
    the first holds the other ``LEVEL_*`` verdicts as well. A zero-output fraction of exactly 1 is always a verdict;
    where it is that of no other label, the neuron is silent, so ``LEVEL_SILENT`` is ``LEVEL_MAX``.

    Returns:
        uint8 ``(2, N)``, in the order of :data:`CHANNELS`.
    """
    return np.stack([verdict_levels(site), fraction_levels(site.zero_gradient_fraction)])


def summaries(report: Report) -> list[Summary]:
    """Return one TensorBoard summary for each layer.

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
        "in_headlines": site.in_headlines,
        "channels": list(CHANNELS),
        "levels": {
            "max": LEVEL_MAX,
            "unseen": LEVEL_UNSEEN,
            "silent": LEVEL_SILENT,
            "dormant": LEVEL_DORMANT,
            "cut_off": LEVEL_CUT_OFF,
            "not_finite": LEVEL_NOT_FINITE,
            "dead": LEVEL_DEAD,
        },
    }
