"""Make what a ``SummaryWriter`` has no method for: the report for Neuronscope's own tab, and density histograms.

The tab has one tag for each phase, ``neuronscope/report`` (``neuronscope/val_report``): a uint8 tensor that holds the
whole report as it is now, so that the newest of a run is all that TensorBoard must keep. Other tabs ignore it.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import numpy as np

from neuronscope.errors import MissingExtraError
from neuronscope.report.report import Report, SiteReport
from neuronscope.writers.report_bytes import to_bytes
from neuronscope.writers.tensorboard.tags import metric, safe

if TYPE_CHECKING:
    from tensorboard.compat.proto.summary_pb2 import Summary

__all__ = ["PLUGIN_NAME", "TAG", "density_histograms", "tab_summary"]

PLUGIN_NAME = "neuronscope"
#: Last part of the tags, after a phase that is not training.
TAG = "report"


def tab_summary(report: Report) -> Summary:
    """Return a report as the summary that the tab reads.

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


def density_histograms(report: Report) -> list[Summary]:
    """Return a histogram of log10 firing densities for each sparse layer of which any latent fired.

    Latents that never fired are in no bin. A network without sparse layers needs no TensorBoard for this.
    """
    return [
        _histogram(site, f"neuronscope.{metric('log10_density', report.phase)}/{safe(site.name)}")
        for site in report.layers
        if site.kind == "sparse" and np.isfinite(site.log10_density).any()
    ]


def _histogram(site: SiteReport, tag: str) -> Summary:
    from tensorboard.compat.proto import summary_pb2

    counts, edges = site.density_histogram(bins_per_decade=5)
    values = site.log10_density[np.isfinite(site.log10_density)]
    histogram = summary_pb2.HistogramProto(
        min=values.min(),
        max=values.max(),
        num=values.size,
        sum=values.sum(),
        sum_squares=np.square(values).sum(),
        bucket_limit=edges.tolist(),
        bucket=[0.0, *counts.astype(float).tolist()],
    )
    return summary_pb2.Summary(value=[summary_pb2.Summary.Value(tag=tag, histo=histogram)])
