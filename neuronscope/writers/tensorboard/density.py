"""Gives TensorBoard a histogram of how often latents fire, for each sparse layer: ``neuronscope.log10_density/…``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from neuronscope.report.report import Report, SiteReport
from neuronscope.writers.tensorboard.tags import metric, safe

if TYPE_CHECKING:
    from tensorboard.compat.proto.summary_pb2 import Summary

__all__ = ["densities"]


def densities(report: Report) -> list[Summary]:
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
