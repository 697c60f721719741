"""Pictures of report data, drawn with numpy and Pillow alone: arrays in, pixels out."""

from __future__ import annotations

from neuronscope.writers.pictures.canvas import encode_png
from neuronscope.writers.pictures.comparison import Curve, Spike, comparison
from neuronscope.writers.pictures.heatmap import heatmap
from neuronscope.writers.pictures.overview import overview

__all__ = ["Curve", "Spike", "comparison", "encode_png", "heatmap", "overview"]
