"""Inquest: opens a checkpoint, hears every examiner that there is something for, and brings it all to a report."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import neuronscope
from neuronscope.checkpoints.checkpoint import Checkpoint
from neuronscope.checkpoints.data.input_moments import InputMoments
from neuronscope.checkpoints.data.measure import contradictions, measure
from neuronscope.checkpoints.data.user_arguments import batches_of, example_of, first_of, loss_of
from neuronscope.checkpoints.data.user_code import user_code
from neuronscope.checkpoints.file.examine_file import examine
from neuronscope.checkpoints.file.layers import NEURON_KINDS, find_layers, normalised_layers, unexamined_types
from neuronscope.checkpoints.file.monitor_record import recorded_reports
from neuronscope.checkpoints.file.training_settings import dead_norms, decay_of, learning_rates
from neuronscope.checkpoints.formats.byte_range import quoted_list
from neuronscope.checkpoints.model.examine_model import Examination, examine_model
from neuronscope.checkpoints.model.load_model import build_model
from neuronscope.checkpoints.open_checkpoint import open_checkpoint
from neuronscope.checkpoints.postmortem_report import PostmortemReport
from neuronscope.checkpoints.progress import Progress, watched_batches, watched_reading
from neuronscope.checkpoints.verdict.combine import assemble, confirmations, tied
from neuronscope.checkpoints.verdict.diagnosis_inputs import facts_of
from neuronscope.checkpoints.verdict.evidence import Abstention, Evidence
from neuronscope.errors import UsageError
from neuronscope.judge.diagnosis import diagnose
from neuronscope.report.report import Report
from neuronscope.report.run_facts import is_normalised, observed_every

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
        example: An input to run the model on once, where it cannot be told from the model or the data: a tensor, a
            tuple of arguments, a mapping of named ones, or a function that makes one of these; or as text, a shape
            (``1x3x224x224``; several: ``1x3x224x224,1x7``; of another type: ``1x16:int64``) or the function's
            ``pkg.mod:name``. Needs ``model``.
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
    batches = batches_of(data)
    measure_loss = loss_of(loss)
    if network is not None:
        example = example_of(example, network)
    names = None if network is None else [name for name, _ in network.named_parameters()]
    evidence, abstentions = examine(checkpoint, parameter_names=names, earlier=before)
    layers = [layer for layer in find_layers(checkpoint.tensors) if layer.kind in NEURON_KINDS]
    widths = {layer.path: layer.width for layer in layers}
    sites: Mapping[str, str] = {}
    given = Examination((), (), {})
    notes = list(checkpoint.notes)
    for kind, names in unexamined_types(checkpoint.tensors).items():
        notes.append(f"Weights and biases of type {kind} are not examined: {quoted_list(names)}.")
    moments = InputMoments()
    if network is not None:
        first, batches = first_of(batches)
        given = examine_model(network, example=example, batch=first, box=box)
        sites = given.layer_sites
        if given.readers_known:  # then who reads which neuron is known, and need not be guessed from names
            evidence = [one for one in evidence if one.claim != "unread"]
        evidence = [*tied(evidence, sites), *given.evidence]
        abstentions += [*given.abstentions]
    if network is not None and batches is not None:
        measured, unmeasured = _measured(
            network, watched_batches(batches, "scanning", progress, moments.add), measure_loss
        )
        evidence, abstentions = [*evidence, *measured], [*abstentions, *unmeasured]
        notes += contradictions(evidence)
    said = assemble(evidence, _named(widths, sites, evidence))
    decay = decay_of(checkpoint)
    facts = facts_of(
        said,
        step=checkpoint.step,
        learning_rates=learning_rates(checkpoint),
        decay=decay,
        dead_norms=dead_norms(said, layers, sites, checkpoint) if decay > 0 else {},  # else not worth a second reading
        input_offset=moments.offset(),
        **_surroundings(checkpoint, given),
    )
    return PostmortemReport(
        path=str(path),
        format=checkpoint.format,
        global_step=checkpoint.step,
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


def _measured(
    network: nn.Module, batches: Iterable[Any], loss: Callable[[Any, Any], Tensor] | None
) -> tuple[Sequence[Evidence], Sequence[Abstention]]:
    with user_code("Expected the model to run over the data"):
        measured, unmeasured, _ = measure(network, batches, loss)
    return measured, unmeasured


def _surroundings(checkpoint: Checkpoint, given: Examination) -> dict[str, Any]:
    """What is known of the layers besides their neurons: by the model, by a monitor's record, by the file's layers."""
    records = [report for report in recorded_reports(checkpoint) if isinstance(report, Report)]
    recorded = [site for report in records for site in report.layers]
    normalised = {given.layer_sites.get(path, path) for path in normalised_layers(find_layers(checkpoint.tensors))}
    return {
        "kinds": {**{site.name: site.kind for site in recorded}, **given.kinds},
        "normalised": {*normalised, *(site.name for site in recorded if is_normalised(site)), *given.normalised},
        "observed_every": max(map(observed_every, records), default=1),
    }


def _named(widths: Mapping[str, int], sites: Mapping[str, str], evidence: Sequence[Evidence]) -> dict[str, int]:
    """Widths by the names that evidence is under: a tied layer's site, where the two are equally wide."""
    seen = {one.layer: one.width for one in evidence}
    found: dict[str, int] = {}
    for path, width in widths.items():
        site = sites.get(path, path)
        found[site if seen.get(site, width) == width else path] = width
    return found
