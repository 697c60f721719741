"""Pictures of report data, drawn with numpy and Pillow alone: arrays in, pixels out."""

from __future__ import annotations

from neuronscope.writers.pictures.heatmap import heatmap
from neuronscope.writers.pictures.overview import overview

__all__ = ["heatmap", "overview"]
