"""Draw pictures of reports with numpy and Pillow alone."""

from __future__ import annotations

from neuronscope.writers.pictures.heatmap import heatmap
from neuronscope.writers.pictures.overview import overview

__all__ = ["heatmap", "overview"]
