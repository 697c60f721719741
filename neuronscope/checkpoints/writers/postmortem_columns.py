"""The columns of a post-mortem's tables as text, after the first, which holds a name."""

from __future__ import annotations

from neuronscope.writers.console import Column

__all__ = ["CHECKPOINT_COLUMNS", "COLUMNS", "TIMELINE_COLUMNS"]

#: Those of a layer, fields of :class:`LayerCells`.
COLUMNS = (
    Column("neurons", "neurons", narrowest=70),
    Column("dead", "dead"),
    Column("%", "dead_share"),
    Column("how sure", "sure", right=False, narrowest=60, wraps=True),
    Column("woken", "woken", narrowest=80, optional=True),
    Column("since", "since", right=False, wraps=True),
    Column("suspected", "suspected", narrowest=100, optional=True),
    Column("other", "other", right=False, narrowest=100, wraps=True, optional=True),
    Column("contested", "contested", narrowest=110, optional=True),
    Column("unknown", "unknown", narrowest=120, optional=True),
)
#: Those of a checkpoint's row, fields of :class:`CheckpointRow`.
CHECKPOINT_COLUMNS = (
    Column("dead", "dead"),
    Column("died", "died"),
    Column("revived", "revived", optional=True),
    Column("unknown", "unknown", narrowest=70, optional=True),
    Column("died in", "where", right=False, narrowest=60, wraps=True),
    Column("file", "file", right=False, narrowest=100, wraps=True),
)
#: Those of a layer over several checkpoints, fields of :class:`TimelineRow`.
TIMELINE_COLUMNS = (
    Column("neurons", "neurons", narrowest=100),
    Column("dead at\nfirst", "first"),
    Column("died", "died"),
    Column("revived", "revived", optional=True),
    Column("dead at\nlast", "last"),
    Column("died when", "when", right=False, wraps=True),
    Column("revived when", "back", right=False, narrowest=80, wraps=True, optional=True),
    Column("how sure", "basis", right=False, narrowest=110, wraps=True),
)
