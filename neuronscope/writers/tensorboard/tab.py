"""Writes the report itself to the event file, for Neuronscope's own tab; other tabs ignore it.

There is one tag for each phase, ``neuronscope/report`` (``neuronscope/val_report``): a uint8 tensor that holds the
whole report as it is now, so that the newest of a run is all that TensorBoard must keep.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import numpy as np

from neuronscope.errors import MissingExtraError
from neuronscope.report.report import Report
from neuronscope.writers.report_bytes import to_bytes
from neuronscope.writers.tensorboard.tags import metric

if TYPE_CHECKING:
    from tensorboard.compat.proto.summary_pb2 import Summary

__all__ = ["PLUGIN_NAME", "TAG", "summary"]

PLUGIN_NAME = "neuronscope"
#: Last part of the tags, after a phase that is not training.
TAG = "report"


def summary(report: Report) -> Summary:
    """Return a report as one of TensorBoard's summaries.

    Raises:
        MissingExtraError: TensorBoard is not installed.
    """
    try:
        from tensorboard.compat.proto import summary_pb2
        from tensorboard.util.tensor_util import make_tensor_proto
    except ImportError as error:
        raise MissingExtraError(
            "Expected TensorBoard for writing its tab's data, but it is not installed: pip install tensorboard"
        ) from error
    content = json.dumps({"phase": report.phase}).encode("ascii")
    metadata = summary_pb2.SummaryMetadata(
        plugin_data=summary_pb2.SummaryMetadata.PluginData(plugin_name=PLUGIN_NAME, content=content),
        data_class=summary_pb2.DATA_CLASS_TENSOR,  # without it the run does not show at all
    )
    tensor = make_tensor_proto(np.frombuffer(to_bytes(report), np.uint8))
    tag = f"neuronscope/{metric(TAG, report.phase)}"
    return summary_pb2.Summary(value=[summary_pb2.Summary.Value(tag=tag, tensor=tensor, metadata=metadata)])
