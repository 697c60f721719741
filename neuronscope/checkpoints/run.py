"""Run a post-mortem: open a checkpoint, examine it in every way that the arguments allow, and report the verdicts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import count
from operator import length_hint
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import neuronscope
from neuronscope.checkpoints.checkpoint import Checkpoint, ComputedTensor, StoredTensor
from neuronscope.checkpoints.data.fixed_data import FixedData
from neuronscope.checkpoints.data.measure import InputMoments, contradictions, measure
from neuronscope.checkpoints.data.user_arguments import (
    check_batches,
    first_batch,
    resolve_batches,
    resolve_example,
    resolve_loss,
)
from neuronscope.checkpoints.diagnosis_inputs import (
    dead_norm_ratios,
    learning_rates,
    postmortem_facts,
    weight_decay_per_step,
)
from neuronscope.checkpoints.file.compare_checkpoints import GradientsBetween
from neuronscope.checkpoints.file.examine_file import examine_file
from neuronscope.checkpoints.file.layers import (
    NEURON_KINDS,
    find_layers,
    find_projections,
    normalised_layers,
    unexamined_types,
)
from neuronscope.checkpoints.file.monitor_record import recorded_reports
from neuronscope.checkpoints.formats.byte_range import quoted_list
from neuronscope.checkpoints.model.examine_model import Examination, examine_model
from neuronscope.checkpoints.model.load_model import (
    as_loaded,
    build_model,
    configured_parameters,
    list_parameters,
    path_in_model,
)
from neuronscope.checkpoints.model.wake_search import WakeOptions, Woken, wake_dead_neurons
from neuronscope.checkpoints.open_checkpoint import open_checkpoint
from neuronscope.checkpoints.postmortem_report import PostmortemReport
from neuronscope.checkpoints.select_checkpoints import Selection, find_checkpoints, select_checkpoints
from neuronscope.checkpoints.user_code import user_code
from neuronscope.checkpoints.verdict.checkpoint_timeline import GradientMasks, LeftOut, TimelineBuilder
from neuronscope.checkpoints.verdict.combine import combine_evidence, confirmations
from neuronscope.checkpoints.verdict.evidence import Evidence
from neuronscope.checkpoints.verdict.join_units import NamedSite, as_in_file, join_units, renamed
from neuronscope.checkpoints.verdict.layer_verdicts import LayerReport
from neuronscope.checkpoints.verdict.waking_inputs import places_of_sites
from neuronscope.errors import CheckpointError, UsageError
from neuronscope.judge.diagnosis import diagnose
from neuronscope.report.report import Report
from neuronscope.report.run_facts import observed_every

__all__ = ["Progress", "postmortem"]

#: ``progress(what, done, total)``: the task, how many of its items are done, and of how many (``None`` = not known).
Progress = Callable[[str, int, "int | None"], None]


def postmortem(
    path: str | Path | Sequence[str | Path],
    model: nn.Module | str | Path | Callable[..., nn.Module] | None = None,
    data: Iterable[Any] | str | Callable[[], Iterable[Any]] | None = None,
    loss: Callable[[Any, Any], Tensor] | str | None = None,
    *,
    optimizer: str | Path | None = None,
    step: int | None = None,
    earlier: str | Path | None = None,
    fixed_data: bool = False,
    box: tuple[float, float] | None = None,
    wake_seconds: float | None = None,
    seed: int = 0,
    example: Any = None,
    trust: bool = False,
    progress: Progress | None = None,
) -> PostmortemReport:
    """Report which neurons of a checkpoint are dead, since when, how sure that is, and why.

    The checkpoint alone is enough: its weights, its optimizer state and the records of Neuronscope's monitor are
    examined. A model adds proofs and the names of sites; data adds exact counts.

    Args:
        path: The checkpoint: a file or a folder. Or several of one run, or a folder of them: then the report is on the
            one with the most steps, and its ``timeline`` says who died and revived between them. All are examined in
            the same way, so data is gone through once for each.
        model: The network of the checkpoint: a module (its weights are replaced by the checkpoint's), a function that
            returns one, ``pkg.mod:name`` of either, or a Hugging Face folder. Adds the names of sites and proofs.
        data: Batches as :func:`neuronscope.scan` takes them, a function that returns them, or ``pkg.mod:name`` of
            either. Adds measurements. Needs ``model``.
        loss: ``loss(output, batch)`` → scalar tensor, or its ``pkg.mod:name``. Adds gradients. Needs ``data``.
        optimizer: A file or folder with the optimizer's state, if it lies apart from the weights.
        step: Number of optimizer steps taken, if the files do not say it, or count something else.
        earlier: An earlier checkpoint of the same run. It narrows down when neurons died.
        fixed_data: Whether ``data`` is the whole training set, the same in each epoch. Then dead neurons that no
            training on it revives are proved to be permanent. Needs ``data``, which is read twice.
        box: ``(low, high)``: bounds of every element of the input. Proofs then hold for inputs within these bounds.
            Needs ``model``.
        wake_seconds: How long to search the box at most for inputs that make dead neurons fire; 10 if there is a box,
            0 = do not search. Needs ``box``.
        seed: Seed of that search.
        example: An input for one forward pass, if neither the model nor the data shows what an input looks like: a
            tensor, a tuple of positional arguments, a mapping of named arguments, or a function that returns one of
            these. As text: a shape (``1x3x224x224``; several inputs: ``1x3x224x224,1x7``; another dtype:
            ``1x16:int64``) or the function's ``pkg.mod:name``. Needs ``model``.
        trust: Allow full unpickling. **This runs code in the file**, so only for files that you trust.
        progress: ``progress(what, done, total)``, called while tensors are read and batches are scanned.

    Returns:
        The report. It can be printed and written as HTML, JSON and Markdown.

    Raises:
        CheckpointError: The checkpoint cannot be read, or does not fit the model.
        UsageError: An argument has the wrong type or value, or a function of the user fails.

    >>> import tempfile, torch
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.ReLU())
    >>> _ = model[0].bias.data.fill_(-1.0), model[0].weight.data[1].zero_()
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     torch.save(model.state_dict(), f"{folder}/model.pt")
    ...     report = postmortem(f"{folder}/model.pt", model)
    >>> [(verdict.site, verdict.neuron, verdict.label, verdict.basis) for verdict in report.verdicts()]
    [('0', 1, 'dead', 'proved')]
    """
    for name, value, needed, present in (
        ("data", data, "model", model is not None),
        ("loss", loss, "data", data is not None),
        ("fixed_data", fixed_data or None, "data", data is not None),
        ("box", box, "model", model is not None),
        ("wake_seconds", wake_seconds, "box", box is not None),
        ("example", example, "model", model is not None),
    ):
        if value is not None and not present:
            raise UsageError(f"Expected argument `{needed}` with `{name}`: `{name}` is used only together with it.")

    if step is not None and (isinstance(step, bool) or not isinstance(step, int) or step < 0):
        raise UsageError(f"Expected argument `step` to be a number of steps, 0 or more, but got {step!r}.")
    given = _Given(
        model=model,
        data=data,
        loss=resolve_loss(loss),
        fixed_data=fixed_data,
        box=box,
        wake=WakeOptions.of(box, wake_seconds, seed),
        example=example,
        progress=progress,
    )
    named = [path] if isinstance(path, str) or not isinstance(path, Iterable) else list(path)
    if not named or not all(isinstance(one, (str, Path)) for one in named):
        raise UsageError(f"Expected argument `path` to name at least one checkpoint, but got {path!r}.")
    paths, left_out = find_checkpoints([Path(one) for one in named])
    if len(paths) == 1:
        checkpoint = open_checkpoint(paths[0], optimizer=optimizer, step=step, trust=trust)
        before = None if earlier is None else open_checkpoint(earlier, trust=trust)
        report = _examine(checkpoint, before, given)[0]
        return replace(report, notes=(*report.notes, *_left_out(left_out)))
    for name, value in (("optimizer", optimizer), ("step", step), ("earlier", earlier)):
        if value is not None:
            raise UsageError(
                f"Expected one checkpoint with argument `{name}`, but got {len(paths)}. Several are put in the order "
                "of the steps that they hold, and each is compared with the one before it."
            )
    return _examine_in_order(select_checkpoints(paths, left_out, trust=trust), given, trust=trust)


@dataclass(frozen=True)
class _Given:
    """What is given beside the checkpoints; see the arguments of :func:`postmortem`."""

    model: nn.Module | str | Path | Callable[..., nn.Module] | None
    data: Iterable[Any] | str | Callable[[], Iterable[Any]] | None
    loss: Callable[[Any, Any], Tensor] | None
    fixed_data: bool
    box: tuple[float, float] | None
    wake: WakeOptions | None
    example: Any
    progress: Progress | None
    steps: tuple[int, ...] = ()  # of the earlier checkpoints


def _examine_in_order(selection: Selection, given: _Given, *, trust: bool) -> PostmortemReport:
    """Examine the checkpoints of a run one after another, and return the report on the last one, with the timeline.

    At most two are open at a time.
    """
    if isinstance(given.data, Iterator) and len(selection.chosen) > 1:
        raise UsageError(
            "Expected argument `data` to be a list, a loader or a function that returns batches, since it is gone "
            f"through once for each of {len(selection.chosen)} checkpoints, but got an iterator."
        )
    timeline = TimelineBuilder()
    left_out = list(selection.left_out)
    before, report = None, None
    for number, chosen in enumerate(selection.chosen, start=1):
        if given.progress is not None:
            given.progress("checkpoints", number - 1, len(selection.chosen))
        is_last = number == len(selection.chosen)
        try:
            checkpoint = open_checkpoint(chosen.path, trust=trust)
            here = given if is_last else replace(given, wake=None, fixed_data=False)
            here = replace(here, steps=tuple(one.step for one in selection.chosen[: number - 1]))
            report, gradients = _examine(checkpoint, before, here)
        except CheckpointError as error:
            left_out.append(LeftOut(str(chosen.path), str(error), True))
            continue
        timeline.add(report.path, chosen.step, report.layers, gradients, chosen.renamed)
        before = checkpoint
    if report is None:
        raise CheckpointError("; ".join(f"{one.path}: {one.reason}" for one in left_out[:3]))
    notes = (*report.notes, *selection.notes, *_left_out(left_out))
    return replace(report, timeline=timeline.build(tuple(left_out)), notes=notes)


def _left_out(checkpoints: Iterable[LeftOut]) -> Iterator[str]:
    """Yield a note on each checkpoint that the report leaves out."""
    return (f"Left out: {one.path}: {one.reason}" for one in checkpoints)


def _examine(
    opened: Checkpoint, before: Checkpoint | None, given: _Given
) -> tuple[PostmortemReport, dict[str, GradientMasks]]:
    """Return the report on one checkpoint, and by layer which neurons got a gradient since the one before."""
    progress = given.progress
    checkpoint = _track_reading(opened, "reading", progress)
    if before is not None:
        before = _track_reading(before, "reading the earlier one", progress)
    network = None if given.model is None else build_model(given.model, checkpoint)
    if network is not None:
        checkpoint = as_loaded(network, checkpoint)
    first, batches = first_batch(resolve_batches(given.data))
    example = None if network is None else resolve_example(given.example, network)
    notes = list(checkpoint.notes)

    # Examine the model: its sites, which neurons provably never fire, and which ones nothing reads.
    path_of: Callable[[str], str] = str
    examination = Examination((), ())
    if network is not None:
        examination = examine_model(network, example=example, batch=first, box=given.box, training_step=checkpoint.step)
        path_of = path_in_model(network, checkpoint)

    # Examine the file: the weights, the optimizer state, the records of a monitor.
    layers = find_layers(checkpoint.tensors)
    of_neurons = [layer for layer in layers if layer.kind in NEURON_KINDS]
    parameter_names = None if network is None else list_parameters(network, checkpoint)
    if parameter_names is None and checkpoint.optimizers and not checkpoint.is_ordered:
        parameter_names = configured_parameters(checkpoint)
    compared: list[GradientsBetween] = []
    evidence, abstentions = examine_file(
        checkpoint,
        parameter_names=parameter_names,
        earlier=before,
        on_compared=compared.append,
        linear=[layer.path for layer in of_neurons if path_of(layer.path) in examination.linear],
    )
    records = [report for report in recorded_reports(checkpoint) if isinstance(report, Report)]
    recorded = [site for report in records for site in report.layers]
    evidence, recorded = as_in_file(evidence, recorded, {layer.path: layer.width for layer in of_neurons})
    for dtype, names in unexamined_types(checkpoint.tensors).items():
        notes.append(f"Weights and biases of type {dtype} are not examined: {quoted_list(names)}.")

    # Join what both say, by the model's paths.
    if network is not None:
        if examination.readers_known:  # the trace shows what reads each neuron; names only let it be guessed
            evidence = [one for one in evidence if one.claim != "unread"]
        if examination.sites:  # the activation behind a norm is known: bounds prove it if its constant gives zero
            evidence = [one for one in evidence if one.source != "weights" or one.claim != "dead"]
        evidence, recorded = renamed(evidence, recorded, path_of)
        evidence += examination.evidence
        abstentions += examination.abstentions
    sites: list[NamedSite] = [*recorded, *examination.sites]

    # Measure: run the network over the data.
    moments = InputMoments()
    if network is not None and batches is not None:
        fixed = FixedData(network, batches, first, checkpoint, parameter_names) if given.fixed_data else None
        on_batch = (moments.add,) if fixed is None else (moments.add, fixed.add)
        with user_code("Expected the model to run over the data"):
            measured, unmeasured, scanned = measure(
                network, _track_batches(batches, "scanning", progress, *on_batch), given.loss
            )
        evidence += measured
        abstentions += unmeasured
        sites += scanned.layers
        for one in () if fixed is None else fixed.evidence():
            if isinstance(one, Evidence):
                evidence.append(one)
            else:
                abstentions.append(one)

    # Join all evidence on one unit of a layer, combine it into one verdict, and check that no proof is contradicted.
    projections = find_projections(layers, checkpoint.networks, is_ordered=checkpoint.is_ordered)
    left_out = dict.fromkeys(examination.layers, "no activation") or {
        path_of(path): kind for path, kind in projections.items()
    }
    widths = {path_of(layer.path): layer.width for layer in of_neurons}
    evidence, joined = join_units(evidence, sites, widths, left_out)
    verdicts = combine_evidence(evidence, joined.layers)
    notes += contradictions(evidence)

    # Search the box for inputs that make dead neurons fire.
    woken = Woken(verdicts)
    if network is not None and given.wake is not None:
        places = places_of_sites(examination.sites, joined)
        woken = wake_dead_neurons(network, examination, verdicts, places, given.wake, batch=first, progress=progress)
    verdicts = woken.layers

    # Look for the causes of death.
    name_by_path = {layer.path: joined.name_of(path_of(layer.path)) for layer in layers}
    decay = weight_decay_per_step(checkpoint)
    behind_norms = {*examination.normalised, *(site.name for site in recorded if site.is_norm)}
    facts = postmortem_facts(
        verdicts,
        step=checkpoint.step,
        learning_rates=tuple(learning_rates(checkpoint)),
        decay=decay,
        # Reads each weight once more, which only weight decay makes worth while.
        dead_norm_ratios=dead_norm_ratios(verdicts, of_neurons, name_by_path, checkpoint) if decay > 0 else {},
        input_offset=moments.offset(),
        kinds=_kinds(verdicts, sites),
        normalised={
            *(name_by_path[path] for path in normalised_layers(layers)),
            *(layer.name for layer in verdicts if behind_norms.intersection(layer.sites)),
        },
        observed_every=max(map(observed_every, records), default=1),
        checkpoints=tuple(sorted({*given.steps, *(saved for report in records for saved in report.checkpoints)})),
    )
    report = PostmortemReport(
        path=str(checkpoint.path),
        format=checkpoint.format,
        global_step=checkpoint.step,
        level="file" if network is None else "model" if batches is None else "data",
        model="" if network is None else type(network).__name__,
        layers=verdicts,
        abstentions=(*abstentions, *woken.abstentions),
        diagnoses=diagnose(facts),
        confirmations=confirmations(verdicts),
        notes=(*notes, *woken.notes),
        waking_inputs=woken.inputs,
        versions={"neuronscope": neuronscope.__version__, "torch": torch.__version__, "numpy": np.__version__},
    )
    gradients = {
        name_by_path[one.layer]: GradientMasks((one.none & (not one.whole_layer)).numpy(), one.some.numpy())
        for one in compared
    }
    return report, gradients


def _kinds(verdicts: Sequence[LayerReport], sites: Iterable[NamedSite]) -> dict[str, str]:
    """Return the kind of each layer's activation; of a gated product if there is one."""
    kind_of = {site.name: site.kind for site in sites}
    kinds = {layer.name: [kind_of[name] for name in layer.sites] for layer in verdicts}
    return {name: "gated" if "gated" in of_layer else of_layer[0] for name, of_layer in kinds.items() if of_layer}


def _track_reading(checkpoint: Checkpoint, what: str, progress: Progress | None) -> Checkpoint:
    """Return the checkpoint with tensors that report to ``progress`` when they are read for the first time."""
    if progress is None:
        return checkpoint
    numbers = count()
    was_read: set[int] = set()

    def read(tensor: StoredTensor, number: int) -> Tensor:
        values = tensor.read()
        if number not in was_read:
            was_read.add(number)
            progress(what, len(was_read), total)
        return values

    def track(tensor: StoredTensor) -> StoredTensor:
        return ComputedTensor(tensor.shape, tensor.torch_dtype, partial(read, tensor, next(numbers)))

    def track_slots(slots: Mapping[str, StoredTensor | float]) -> dict[str, StoredTensor | float]:
        return {name: value if isinstance(value, (int, float)) else track(value) for name, value in slots.items()}

    tracked = replace(
        checkpoint,
        tensors={name: track(tensor) for name, tensor in checkpoint.tensors.items()},
        optimizers=tuple(
            replace(optimizer, slots={key: track_slots(slots) for key, slots in optimizer.slots.items()})
            for optimizer in checkpoint.optimizers
        ),
    )
    total = next(numbers)
    progress(what, 0, total)
    return tracked


def _track_batches(
    data: Iterable[Any], what: str, progress: Progress | None, *on_batch: Callable[[Any], None]
) -> Iterator[Any]:
    """Yield batches, with which functions are called first, and report each one to ``progress`` after it was used."""
    total = length_hint(data, -1) if progress is not None else -1
    for done, batch in enumerate(check_batches(data), start=1):
        for function in on_batch:
            function(batch)
        yield batch
        if progress is not None:
            progress(what, done, total if total >= 0 else None)
