"""Inquest: opens a checkpoint, hears every examiner that there is something for, and brings it all to a report."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import neuronscope
from neuronscope.diagnosis import diagnose
from neuronscope.errors import NeuronscopeError, UsageError
from neuronscope.postmortem.assembly import assemble, confirmations, tied
from neuronscope.postmortem.checkpoint import Checkpoint
from neuronscope.postmortem.confirm import contradictions, measure
from neuronscope.postmortem.evidence import Abstention, Evidence
from neuronscope.postmortem.examination import examine_model
from neuronscope.postmortem.facts import facts_of
from neuronscope.postmortem.file_alone import examine
from neuronscope.postmortem.inputs import InputMoments
from neuronscope.postmortem.layers import NEURON_KINDS, Layer, find_layers
from neuronscope.postmortem.models import build_model, load_named
from neuronscope.postmortem.progress import Progress, watched_batches, watched_reading
from neuronscope.postmortem.reading import open_checkpoint
from neuronscope.postmortem.report import PostmortemReport
from neuronscope.postmortem.verdicts import LayerReport

__all__ = ["postmortem"]


def postmortem(
    path: str | Path,
    model: nn.Module | str | Path | Callable[..., nn.Module] | None = None,
    data: Iterable[Any] | str | Callable[[], Iterable[Any]] | None = None,
    loss: Callable[[Any, Any], Tensor] | str | None = None,
    *,
    earlier: str | Path | None = None,
    box: tuple[float, float] | None = None,
    example: Any = None,
    trust: bool = False,
    progress: Progress | None = None,
) -> PostmortemReport:
    """Find out from a checkpoint which neurons are dead, since when, how sure that is, and why.

    Args:
        path: The checkpoint: a file or a folder.
        model: The network that it is of: a module (its weights are replaced by the checkpoint's), a function that makes
            one, ``pkg.mod:name`` of either, or a Hugging Face folder. Adds names of sites and what can be proved.
        data: Batches as :func:`neuronscope.scan` takes them, a function that makes them, or ``pkg.mod:name`` of either.
            Adds what is measured. Needs ``model``.
        loss: ``loss(output, batch)`` → scalar, or its ``pkg.mod:name``; adds gradients. Needs ``data``.
        earlier: An earlier checkpoint of the same run; sharpens since when.
        box: ``(low, high)``: between which numbers every element of the input lies. Proofs then hold there.
        example: An input to run the model on once, where it cannot be told from the model or the data.
        trust: Unpickle what names code, **which runs it**.
        progress: ``progress(what, done, total)``, called while reading and scanning.

    Returns:
        A report that can be printed and drawn.

    Raises:
        CheckpointError: The checkpoint cannot be read, or does not fit the model.
        UsageError: An argument is not what is expected, or a function of the user's fails.

    >>> import tempfile, torch
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.ReLU())
    >>> _ = model[0].bias.data.fill_(-1.0), model[0].weight.data[1].zero_()
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     torch.save(model.state_dict(), f"{folder}/model.pt")
    ...     report = postmortem(f"{folder}/model.pt", model)
    >>> [(verdict.site, verdict.neuron, verdict.label, verdict.basis) for verdict in report.verdicts()]
    [('1', 1, 'dead', 'proved')]
    """
    for name, value, needed, present in (
        ("data", data, "model", model is not None),
        ("loss", loss, "data", data is not None),
        ("box", box, "model", model is not None),
        ("example", example, "model", model is not None),
    ):
        if value is not None and not present:
            raise UsageError(f"Expected argument `{needed}` with `{name}`: without it there is nothing to use it on.")
    checkpoint = watched_reading(open_checkpoint(path, trust=trust), "reading", progress)
    before = None
    if earlier is not None:
        before = watched_reading(open_checkpoint(earlier, trust=trust), "reading the earlier one", progress)
    network = None if model is None else build_model(model, checkpoint)
    batches = _batches(data)
    names = None if network is None else [name for name, _ in network.named_parameters()]
    evidence, abstentions = examine(checkpoint, parameter_names=names, earlier=before)
    layers = [layer for layer in find_layers(checkpoint.tensors) if layer.kind in NEURON_KINDS]
    widths = {layer.path: layer.width for layer in layers}
    sites: Mapping[str, str] = {}
    notes = list(checkpoint.notes)
    moments = InputMoments()
    if network is not None:
        first, batches = _first(batches)
        given = examine_model(network, example=example, batch=first, box=box)
        sites = given.ties
        evidence = [*tied(evidence, sites), *given.evidence]
        abstentions += [*given.abstentions]
    if network is not None and batches is not None:
        measured, unmeasured = _measured(
            network, watched_batches(batches, "scanning", progress, moments.add), _loss(loss)
        )
        evidence, abstentions = [*evidence, *measured], [*abstentions, *unmeasured]
        notes += contradictions(evidence)
    said = assemble(evidence, _named(widths, sites, evidence))
    decay = _decay(checkpoint)
    facts = facts_of(
        said,
        step=checkpoint.step,
        learning_rates=[rate for rate, _ in _rates(checkpoint)],
        decay=decay,
        dead_norms=_dead_norms(said, layers, sites, checkpoint) if decay > 0 else {},  # else not worth a second reading
        input_offset=moments.offset(),
    )
    return PostmortemReport(
        path=str(path),
        format=checkpoint.format,
        step=checkpoint.step,
        level="file" if network is None else "model" if batches is None else "data",
        model="" if network is None else type(network).__name__,
        layers=said,
        abstentions=tuple(abstentions),
        diagnoses=diagnose(facts),
        confirmations=confirmations(said),
        notes=tuple(notes),
        versions={
            "neuronscope": neuronscope.__version__,
            "torch": torch.__version__,
            "numpy": np.__version__,
        },
    )


def _batches(data: Iterable[Any] | str | Callable[[], Iterable[Any]] | None) -> Iterable[Any] | None:
    """The user's batches, made where they are still to be made."""
    found: Any = load_named(data, "data") if isinstance(data, str) else data
    if callable(found) and not hasattr(found, "__iter__"):
        try:
            found = found()
        except Exception as error:
            raise UsageError(f"Expected `data` to make batches, but it gave {_told(error)}") from error
    if found is not None and not isinstance(found, Tensor) and not hasattr(found, "__iter__"):
        raise UsageError(f"Expected argument `data` to be an iterable of batches, but got {type(found).__name__}.")
    return (found,) if isinstance(found, Tensor) else found


def _loss(loss: Callable[[Any, Any], Tensor] | str | None) -> Callable[[Any, Any], Tensor] | None:
    found: Any = load_named(loss, "loss") if isinstance(loss, str) else loss
    if found is not None and not callable(found):
        raise UsageError(f"Expected argument `loss` to be called with (output, batch), but got {type(found).__name__}.")
    checked: Callable[[Any, Any], Tensor] | None = found
    return checked


def _first(batches: Iterable[Any] | None) -> tuple[Any, Iterable[Any] | None]:
    """The first batch, and batches that still begin with it, also where they can be gone through but once."""
    if batches is None:
        return None, None
    try:
        iterator = iter(batches)
        first = next(iterator)
    except StopIteration:
        raise UsageError("Expected argument `data` to yield at least one batch, but it gave none.") from None
    except Exception as error:
        raise UsageError(f"Expected `data` to give batches, but it gave {_told(error)}") from error
    return first, (batches if iter(batches) is not iterator else chain([first], iterator))


def _measured(
    network: nn.Module, batches: Iterable[Any], loss: Callable[[Any, Any], Tensor] | None
) -> tuple[Sequence[Evidence], Sequence[Abstention]]:
    try:
        measured, unmeasured, _ = measure(network, batches, loss)
    except NeuronscopeError:
        raise
    except Exception as error:
        raise UsageError(f"Running the model over the data failed with {_told(error)}") from error
    return measured, unmeasured


def _told(error: Exception) -> str:
    """A user's error in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split()) or 'no message'}"


def _named(widths: Mapping[str, int], sites: Mapping[str, str], evidence: Sequence[Evidence]) -> dict[str, int]:
    """Widths by the names that evidence is under: a tied layer's site, where the two are equally wide."""
    seen = {one.layer: one.width for one in evidence}
    found: dict[str, int] = {}
    for path, width in widths.items():
        site = sites.get(path, path)
        found[site if seen.get(site, width) == width else path] = width
    return found


def _rates(checkpoint: Checkpoint) -> list[tuple[float, float]]:
    """Learning rate and weight decay of each of the optimizers' groups that has a rate."""
    groups = [group for state in checkpoint.optimizers for group in state.groups]
    return [
        (_number(group.get("lr")), _number(group.get("weight_decay"), 0.0))
        for group in groups
        if not math.isnan(_number(group.get("lr")))
    ]


def _number(value: Any, otherwise: float = math.nan) -> float:
    """A hyperparameter as a number, if it is one; tensors of one number are (``capturable`` optimizers keep such)."""
    if isinstance(value, Tensor) and value.numel() == 1:
        value = value.item()
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else otherwise


def _decay(checkpoint: Checkpoint) -> float:
    """By what share weight decay shrinks weights a step, at most."""
    return max((rate * decay for rate, decay in _rates(checkpoint)), default=0.0)


def _dead_norms(
    said: Sequence[LayerReport], layers: Sequence[Layer], sites: Mapping[str, str], checkpoint: Checkpoint
) -> dict[str, float]:
    """By layer, the middle norm of the dead neurons' incoming weights over that of the others."""
    reports = {layer.name: layer for layer in said}
    found = {}
    for layer in layers:
        report = reports.get(sites.get(layer.path, layer.path))
        if report is None or report.neurons != layer.width or not 0 < report.dead < report.neurons:
            continue
        norms = torch.linalg.vector_norm(layer.rows(checkpoint.tensors[layer.weight].read()).double(), dim=1)
        dead = torch.from_numpy(report.dead_mask)
        middle = float(norms[~dead].median())
        if middle > 0:
            found[report.name] = float(norms[dead].median()) / middle
    return found
