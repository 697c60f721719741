"""PostmortemReport: the verdicts on a checkpoint's neurons as plain data, with the evidence for and against each.

It has the same interface as :class:`neuronscope.report.report.Report`, but no counts: a checkpoint has no positions,
windows or activations. Each verdict names its basis: proved, measured, inferred or suspected. No torch here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from neuronscope.checkpoints.verdict.checkpoint_timeline import CheckpointTimeline
from neuronscope.checkpoints.verdict.evidence import Abstention
from neuronscope.checkpoints.verdict.layer_verdicts import FIRM, Confirmation, InBox, LayerReport, PostmortemVerdict
from neuronscope.checkpoints.verdict.waking_inputs import WakingInput, are_embedded, inputs_as_dicts, inputs_as_npz
from neuronscope.judge.diagnosis import Diagnosis
from neuronscope.output import write_file
from neuronscope.report.rendering import Renderable
from neuronscope.report.report import NotMeasured

__all__ = ["LEVELS", "SCHEMA_VERSION", "PostmortemReport"]

#: Version of what :meth:`PostmortemReport.to_dict` returns. It is raised when a field is renamed, moved or removed.
SCHEMA_VERSION = 2
#: What the post-mortem had to work with, by level.
LEVELS = {"file": "the checkpoint alone", "model": "the checkpoint and the model", "data": "the model over data"}


@dataclass(frozen=True, eq=False, repr=False)
class PostmortemReport(Renderable):
    """Which neurons of a checkpoint are dead, since when, how sure that is, and why.

    Printing it shows a table of the layers. :meth:`to_html`, :meth:`to_json` and :meth:`to_markdown` return it in
    other formats.

    Attributes:
        path: The checkpoint file or folder.
        format: Its format: ``Lightning checkpoint`` …
        global_step: Number of optimizer steps taken; ``None`` if the file does not hold it.
        level: What the post-mortem had to work with, a key of :data:`LEVELS`.
        model: Class name of the model; ``""`` if none was given.
        layers: One :class:`LayerReport` per layer; totals are over those that are :attr:`headline_layers`.
        abstentions: What could not be examined, and why.
        diagnoses: Symptoms that were found, with cause and remedy.
        confirmations: How often measurements agreed with claims that rest on something else.
        notes: Sentences that a reader should know.
        timeline: Who died and revived between several checkpoints, of which this report is on the last; ``None`` if
            there was one only.
        waking_inputs: Inputs of the box that make dead neurons fire; see ``LayerReport.woken``.
        versions: Versions of neuronscope, torch and numpy that made the report.
    """

    WRITERS: ClassVar[Mapping[str, str]] = {
        name: f"neuronscope.checkpoints.writers.postmortem_{name}"
        for name in ("terminal", "markdown", "html", "table", "figure")
    }

    path: str
    format: str
    global_step: int | None
    level: str
    model: str
    layers: tuple[LayerReport, ...]
    abstentions: tuple[Abstention, ...] = ()
    diagnoses: tuple[Diagnosis, ...] = ()
    confirmations: tuple[Confirmation, ...] = ()
    notes: tuple[str, ...] = ()
    timeline: CheckpointTimeline | None = None
    waking_inputs: tuple[WakingInput, ...] = ()
    versions: dict[str, str] = field(default_factory=dict)
    schema_version: int = SCHEMA_VERSION

    @property
    def headline_layers(self) -> tuple[LayerReport, ...]:
        """The layers that totals include; ``LayerReport.left_out`` says why others are left out."""
        return tuple(layer for layer in self.layers if layer.in_headlines)

    @property
    def neurons(self) -> int:
        """Number of neurons in the totals. Each unit of a layer is counted once."""
        return sum(layer.neurons for layer in self.headline_layers)

    @property
    def judged_neurons(self) -> int:
        """Number of neurons that ``dead_percent`` is a share of: all, unknown ones included."""
        return self.neurons

    @property
    def dead(self) -> int:
        """Number of neurons that are dead, never trained or without gradient (proved, measured or inferred).

        Suspected and idle neurons are not included.
        """
        return sum(layer.dead for layer in self.headline_layers)

    @property
    def suspected(self) -> int:
        """Number of neurons that may be dead; not included in any total or percentage."""
        return sum(layer.suspected for layer in self.headline_layers)

    @property
    def dead_percent(self) -> float:
        """``dead`` in percent of all neurons, unknown ones included, thus a lower bound; NaN without neurons."""
        return 100.0 * self.dead / self.neurons if self.neurons else float("nan")

    @property
    def not_finite(self) -> int:
        """Number of neurons with NaN or infinite weights or outputs, those of the network's outputs included."""
        return sum(layer.count("not finite") for layer in self.layers)

    @property
    def unknown(self) -> int:
        """Number of neurons without any valid evidence."""
        return self.count("unknown")

    @property
    def idle(self) -> int:
        """Number of neurons that get no gradient because their whole layer gets none; not counted as dead."""
        return sum(int(layer.idle.sum()) for layer in self.headline_layers)

    @property
    def collapsed(self) -> tuple[str, ...]:
        """Names of the layers in which every neuron is dead (proved, measured or inferred)."""
        return tuple(layer.name for layer in self.headline_layers if layer.collapse == "firm")

    @property
    def in_box(self) -> InBox | None:
        """How many dead neurons are proved dead, woken, or open for inputs of the box; ``None`` if not searched."""
        found = [one for layer in self.headline_layers if (one := layer.in_box) is not None]
        return InBox(*(sum(numbers) for numbers in zip(*found, strict=True))) if found else None

    @property
    def permanent(self) -> int:
        """Number of dead neurons of which it is proved that no training on the same data revives them."""
        return sum(int(layer.permanent.sum()) for layer in self.headline_layers)

    @property
    def contested(self) -> int:
        """Number of neurons for which there is evidence of both *alive* and its opposite."""
        return sum(int(layer.contested.sum()) for layer in self.headline_layers)

    @property
    def not_measured(self) -> tuple[NotMeasured, ...]:
        """The abstentions in the form that a report on a training run uses."""
        return tuple(NotMeasured(one.layer or one.source, f"{one.source}: {one.reason}") for one in self.abstentions)

    def count(self, label: str) -> int:
        """Return the number of neurons with a label (proved, measured or inferred)."""
        return sum(layer.count(label) for layer in self.headline_layers)

    def dead_by_basis(self) -> dict[str, int]:
        """Return the number of dead neurons by basis, the surest basis first."""
        return {basis: sum(layer.dead_by_basis()[basis] for layer in self.headline_layers) for basis in FIRM}

    def _in_short(self) -> str:
        collapsed = f"; {len(self.collapsed)} collapsed" if self.collapsed else ""
        broken = f"; {self.not_finite} NaN or infinite" if self.not_finite else ""
        return f"on {self.path!r}: {self.dead} of {self.neurons} neurons dead{collapsed}{broken}"

    def __getitem__(self, name: str) -> LayerReport:
        """Return the layer with this name, or the one whose neurons were seen at the site with this name.

        Raises:
            KeyError: There is no such layer or site.
        """
        for layer in self.layers:
            if name == layer.name or name in layer.sites:
                return layer
        raise KeyError(name)

    def verdicts(self) -> Iterator[PostmortemVerdict]:
        """Yield a verdict for every neuron that is neither alive nor unknown, and for every contested one."""
        for layer in self.layers:
            yield from map(layer.verdict, np.flatnonzero(layer.listed).tolist())

    def to_json(self, path: str | Path | None = None) -> str:
        """Return the report as JSON text, and write it to ``path`` if given.

        Large inputs that wake neurons are not in the text. They are written to a file beside it, for
        :func:`numpy.load`: ``report-inputs.npz`` beside ``report.json``.

        Raises:
            OSError: A file cannot be written; an existing file is then unchanged.
        """
        if path is not None and not are_embedded(self.waking_inputs):
            target = Path(path)
            if target.is_file() or not target.exists():  # nothing is beside a pipe or a device
                write_file(target.with_name(f"{target.stem}-inputs.npz"), inputs_as_npz(self.waking_inputs))
        return super().to_json(path)

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain data: dicts, lists, strings and numbers; ``None`` = not known."""
        return {
            "schema_version": self.schema_version,
            "path": self.path,
            "format": self.format,
            "global_step": self.global_step,
            "level": self.level,
            "model": self.model,
            "summary": {
                "layers": len(self.layers),
                "neurons": self.neurons,
                "dead": self.dead,
                "dead_percent": None if np.isnan(self.dead_percent) else self.dead_percent,
                "dead_by_basis": self.dead_by_basis(),
                "suspected": self.suspected,
                "idle": self.idle,
                "collapsed": list(self.collapsed),
                "contested": self.contested,
                "permanent": self.permanent,
                "in_box": None if self.in_box is None else self.in_box._asdict(),
                "not_finite": self.not_finite,
                "unknown": self.unknown,
            },
            "layers": [layer.to_dict() for layer in self.layers],
            "diagnoses": [one.to_dict() for one in self.diagnoses],
            "confirmations": [asdict(one) for one in self.confirmations],
            "abstentions": [asdict(one) for one in self.abstentions],
            "notes": list(self.notes),
            "timeline": None if self.timeline is None else self.timeline.to_dict(),
            "waking_inputs": inputs_as_dicts(self.waking_inputs),
            "versions": dict(self.versions),
        }
