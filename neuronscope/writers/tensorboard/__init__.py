"""Write reports to TensorBoard's own pages: scalars, pictures, text, and the report for Neuronscope's tab.

Every other logger can use :func:`scalars` too. Importing this loads neither torch nor TensorBoard nor Pillow.
"""

from __future__ import annotations

from neuronscope.writers.tensorboard.dashboard import Dashboard, EventWriter, append, write
from neuronscope.writers.tensorboard.diagnosis_text import diagnosis
from neuronscope.writers.tensorboard.event_file import (
    EVENT_FOLDER,
    EventFile,
    folder_of,
    require_room,
    require_room_in_file,
)
from neuronscope.writers.tensorboard.scalars import scalars

__all__ = [
    "EVENT_FOLDER",
    "Dashboard",
    "EventFile",
    "EventWriter",
    "append",
    "diagnosis",
    "folder_of",
    "require_room",
    "require_room_in_file",
    "scalars",
    "write",
]
