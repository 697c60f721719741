"""PostmortemReport: the verdicts on a checkpoint's neurons as plain data, with all that was said for and against each.

It has the face of :class:`neuronscope.report.report.Report`, yet holds no counts: a checkpoint has no positions,
windows or activations, and a verdict on it has one of four bases. No torch here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar

import numpy as np

from neuronscope.checkpoints.verdict.evidence import CLAIMS, Abstention
from neuronscope.checkpoints.verdict.layer_verdicts import FIRM, Confirmation, LayerReport, PostmortemVerdict
from neuronscope.judge.diagnosis import Diagnosis
from neuronscope.report.rendering import Renderable
from neuronscope.report.report import NotMeasured

__all__ = ["LEVELS", "SCHEMA_VERSION", "PostmortemReport"]

#: Version of the plain data that :meth:`PostmortemReport.to_dict` gives. Raised when a field is renamed or removed.
SCHEMA_VERSION = 2
#: What was at hand, by level.
LEVELS = {"file": "the checkpoint alone", "model": "the checkpoint and the model", "data": "the model over data"}


@dataclass(frozen=True, eq=False)
class PostmortemReport(Renderable):
    """What a checkpoint says of the neurons of its network: which are dead, since when, how sure that is, and why.

    Printing it gives a table by layer. :meth:`to_html`, :meth:`to_json` and :meth:`to_markdown` draw it elsewhere.

    Attributes:
        path: Where the checkpoint is.
        format: What it is: ``Lightning checkpoint`` …
        global_step: Optimizer steps that had been taken; ``None`` = the file does not say.
        level: What was at hand, a key of :data:`LEVELS`.
        model: Class name of the model; ``""`` where none was given.
        layers: One :class:`LayerReport` a layer.
        abstentions: Sources that could say nothing, and why.
        diagnoses: Signs that were found, with cause and remedy.
        confirmations: How what was not measured fared where it was.
        notes: Sentences that a reader should know.
        versions: Versions of neuronscope, torch and numpy that made it.
    """

    WRITERS: ClassVar[Mapping[str, str]] = {
        **{name: f"neuronscope.checkpoints.writers.postmortem_{name}" for name in ("terminal", "markdown", "html")},
        "json": "neuronscope.writers.json",
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
    versions: dict[str, str] = field(default_factory=dict)
    schema_version: int = SCHEMA_VERSION

    @property
    def neurons(self) -> int:
        """Neurons of all layers."""
        return sum(layer.neurons for layer in self.layers)

    @property
    def dead(self) -> int:
        """Neurons that are dead, never trained or without gradient: proved, measured or inferred; idle ones are not."""
        return sum(layer.dead for layer in self.layers)

    @property
    def suspected(self) -> int:
        """Neurons that are only suspected to be so; in no total and no share."""
        return sum(layer.suspected for layer in self.layers)

    @property
    def dead_percent(self) -> float:
        """``dead`` in percent of all neurons, unknown ones too: at least so many; NaN where there are none."""
        return 100.0 * self.dead / self.neurons if self.neurons else float("nan")

    @property
    def not_finite(self) -> int:
        """Neurons with NaN or infinite weights or outputs."""
        return self.count("not finite")

    @property
    def unknown(self) -> int:
        """Neurons of which nothing that stands was said."""
        return self.count("unknown")

    @property
    def idle(self) -> int:
        """Neurons that get no gradient because their whole layer gets none; not counted as dead."""
        return sum(int(layer.idle.sum()) for layer in self.layers)

    @property
    def collapsed(self) -> tuple[str, ...]:
        """Names of layers of which no neuron is left, on firm ground."""
        return tuple(layer.name for layer in self.layers if layer.collapse == "firm")

    @property
    def contested(self) -> int:
        """Neurons of which both *alive* and its opposite were said."""
        return sum(int(layer.contested.sum()) for layer in self.layers)

    @property
    def not_measured(self) -> tuple[NotMeasured, ...]:
        """The abstentions, as in a report of a watched run."""
        return tuple(NotMeasured(one.layer or one.source, f"{one.source}: {one.reason}") for one in self.abstentions)

    def count(self, label: str) -> int:
        """Neurons that bear a label on firm ground."""
        return sum(layer.count(label) for layer in self.layers)

    def dead_by_basis(self) -> dict[str, int]:
        """``dead`` by its basis, surest first."""
        return {basis: sum(layer.dead_by_basis()[basis] for layer in self.layers) for basis in FIRM}

    def __getitem__(self, name: str) -> LayerReport:
        """The layer called ``name``."""
        for layer in self.layers:
            if layer.name == name:
                return layer
        raise KeyError(name)

    def verdicts(self) -> Iterator[PostmortemVerdict]:
        """Every neuron that is not plainly alive or unknown, and every contested one, layer by layer."""
        for layer in self.layers:
            for neuron in np.flatnonzero(layer.contested | (layer.labels < CLAIMS.index("alive"))).tolist():
                yield layer.verdict(neuron)

    def to_dict(self) -> dict[str, Any]:
        """The whole report as plain data: dicts, lists, strings and numbers; what is not known is ``None``."""
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
                "not_finite": self.not_finite,
                "unknown": self.unknown,
            },
            "layers": [layer.to_dict() for layer in self.layers],
            "diagnoses": [one.to_dict() for one in self.diagnoses],
            "confirmations": [asdict(one) for one in self.confirmations],
            "abstentions": [asdict(one) for one in self.abstentions],
            "notes": list(self.notes),
            "versions": dict(self.versions),
        }
