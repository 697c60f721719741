"""Draws reports on TensorBoard's own pages: scalars, pictures, text, and a byte a neuron for Neuronscope's tab.

:func:`scalars` serves every other logger too. Importing this loads neither torch nor TensorBoard nor Pillow.
"""

from __future__ import annotations

from neuronscope.writers.tensorboard.dashboard import Dashboard, EventWriter, write
from neuronscope.writers.tensorboard.diagnosis_text import diagnosis
from neuronscope.writers.tensorboard.scalars import scalars

__all__ = ["Dashboard", "EventWriter", "diagnosis", "scalars", "write"]
