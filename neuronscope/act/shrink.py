"""Take dead neurons out of a model: return a smaller one that computes the same, and check that it does."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from neuronscope.act.choose_groups import Choice
from neuronscope.act.column_ranges import ColumnRanges
from neuronscope.act.structure import Structure
from neuronscope.act.tied_groups import TiedGroups
from neuronscope.act.unit_groups import UnitGroups
from neuronscope.act.widths import fold_columns, leave_out, widths_of
from neuronscope.attach.compiling import is_compiled
from neuronscope.attach.dtensor import is_distributed
from neuronscope.attach.examples import all_tensors
from neuronscope.attach.neuron_flow import SHIFTED
from neuronscope.errors import UsageError
from neuronscope.options import WatchOptions
from neuronscope.report.report import Report, SiteReport
from neuronscope.running import as_float64, call_model, evaluated, in_float64, to_device_of
from neuronscope.scope import Scope, only_counted_by
from neuronscope.writers.formatting import count, plural

if TYPE_CHECKING:
    from neuronscope.checkpoints.postmortem_report import PostmortemReport

__all__ = ["Shrunk", "shrink"]

#: Labels and bases of neurons that can go: what is inferred or suspected stays.
_IDLE, _SURE = ("dead", "silent"), ("measured", "proved")
#: How far outputs may be apart, in units of their size and the rounding of the model's type: in float64 (where only
#: what the model itself computes in its own type is rounded so), and in the model's own type.
_ROUNDING_IN_FLOAT64, _ROUNDING = 64, 4096
#: An output is a fill value, as −10⁹ in masked places, if it is so many times the median of the different values …
_FILL = 10_000
#: … of at most so many outputs.
_SAMPLE = 2**20


class Difference(NamedTuple):
    """How far the outputs of two models are apart."""

    largest: float  # the largest absolute difference
    scale: float  # the largest absolute output, but for fill values, as −10⁹ in masked places
    relative: float  # the largest difference relative to that output of the same tensor, or to a fill value itself


@dataclass(frozen=True)
class Shrunk:
    """A smaller model, and what was done to get it.

    Attributes:
        model: The smaller model.
        removed: Neurons that were taken out, by the site's name.
        folded: Number of neurons among them whose constant effect was added to the biases of their readers.
        kept: Why idle neurons were kept, and how many.
        widths: Of each layer whose widths changed, by its path: the numbers that it keeps now, for
            :func:`~neuronscope.act.widths.set_widths`.
        parameters: Number of parameters before and after.
        batches: Number of batches on which both models ran; 0 if there was no data.
        difference: How far the outputs were apart there; ``None`` if there was no data.
        in_float64: The same on the first batch, with both models and the data in float64; ``None`` if they do not run
            so, or were equal bit for bit.
    """

    model: nn.Module
    removed: Mapping[str, tuple[int, ...]]
    folded: int
    kept: Mapping[str, int]
    widths: Mapping[str, Mapping[str, int | bool]]
    parameters: tuple[int, int]
    batches: int = 0
    difference: Difference | None = None
    in_float64: Difference | None = None

    @property
    def neurons(self) -> int:
        """Number of neurons that were taken out; a gate and its product are one."""
        found = ((site.rpartition("/")[0] or site, neuron) for site, own in self.removed.items() for neuron in own)
        return len(set(found))

    def __str__(self) -> str:
        before, after = self.parameters
        layers = {site.rpartition("/")[0] or site for site in self.removed}
        where = plural(len(layers), "layer")
        lines = [f"{plural(self.neurons, 'neuron')} taken out of {where}: {count(before)} → {count(after)} parameters."]
        if self.folded:
            lines.append(f"{count(self.folded)} of them had a constant effect, which the biases have now.")
        lines.append(self._checked())
        lines += [
            f"{plural(number, 'idle neuron')} {'stays' if number == 1 else 'stay'}: {reason}."
            for reason, number in self.kept.items()
        ]
        return "\n".join(lines)

    def _checked(self) -> str:
        data = f"{count(self.batches)} {'batch' if self.batches == 1 else 'batches'}"
        if self.difference is None:
            return "Not checked: no data was given to run both models on."
        if self.difference.largest == 0:
            return f"Both models gave the same outputs, bit for bit, on {data}."
        text = (
            f"Outputs on {data} differ by {self.difference.largest:.2g} at most, where the "
            f"largest output is {self.difference.scale:.2g}: rounding"
        )
        if self.in_float64 is not None:
            text += f", since in float64 they differ by {self.in_float64.largest:.2g} (first batch)"
        return f"{text}."


def shrink(
    model: nn.Module,
    report: Report | PostmortemReport,
    data: Iterable[Any] | None = None,
    *,
    forward: Callable[[nn.Module, Any], Any] | None = None,
    same_widths: bool = False,
) -> Shrunk:
    """Take dead neurons out of a copy of a model, and check that the copy computes the same.

    A neuron goes that the report calls dead or silent, by measurement or proof, if the weights that lead into it and
    those that read it are known exactly. With data, its effect must also be constant there: zero, or a constant that
    the biases of its readers can take over; and so do other neurons whose effect never changes on 299 examples or more.
    Then both models run on the data, and the copy is only returned if they agree. At least one neuron of a layer stays.

    Args:
        model: The model. It is not changed.
        report: What :func:`~neuronscope.scanning.scan` or another report says of it. One of
            :func:`~neuronscope.checkpoints.run.postmortem` needs ``data``.
        data: Batches as :func:`~neuronscope.scanning.scan` takes them. Without any, nothing is checked, and neurons are
            kept that another layer passes on, one by one.
        forward: A function ``forward(model, batch)`` that returns the output, if the model must be called differently.
        same_widths: Whether layers whose paths differ in numbers only, as those of a transformer's blocks, must stay
            equally wide: then as many neurons go from each as from the one with the fewest.

    Returns:
        The smaller model, what was taken out, and how far the outputs are apart.

    Raises:
        UsageError: There are idle neurons and all must stay; or the two models do not agree; or the smaller one does
            not run, since the model's code fixes a width. Nothing was changed then.

    >>> import neuronscope
    >>> model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    >>> _ = model[0].weight.data[1].zero_(), model[0].bias.data[1].fill_(-1)
    >>> data = [torch.randn(300, 4)]
    >>> shrunk = shrink(model, neuronscope.scan(model, data), data)
    >>> shrunk.removed["0/relu"], shrunk.model[0].out_features
    ((1,), 2)
    """
    _require_plain(model)
    call = forward or call_model
    batches = [data] if isinstance(data, Tensor) else list(data) if isinstance(data, Iterator) else data
    structure = Structure(model)
    idle = _idle(report)
    if batches is None:
        if not isinstance(report, Report):
            raise UsageError("Expected argument `data` with a post-mortem, which does not hold what reads a neuron.")
        choice = Choice(structure, None, idle)
        choice.add(_groups_of_report(structure, report).of(idle))
        return _without(model, _narrowed(choice, same_widths=same_widths))
    seen = _Seen(model, structure, batches, call)
    reached = {site.name: site for site in seen.report.layers}
    for name, neurons in idle.items() if not isinstance(report, Report) else ():
        _require_fit(name, max(neurons) < reached[name].neurons if name in reached else True)
    for site in report.layers if isinstance(report, Report) else ():
        _require_fit(site.name, site.name not in reached or site.neurons == reached[site.name].neurons)
    wanted = {site: neurons for site, neurons in idle.items() if site in reached}
    unreached = sum(map(len, idle.values())) - sum(map(len, wanted.values()))
    if seen.report.examples >= seen.report.examples_needed:
        wanted |= {name: range(site.neurons) for name, site in reached.items() if site.in_headlines}
    groups = list(seen.groups().of(wanted))
    tied = list(TiedGroups(model, structure, call, seen.first, seen.neurons_of_rows()).resolved(groups))
    while True:
        choice = Choice(structure, seen.ranges, idle)
        if unreached:
            choice.kept["the data does not reach them"] = unreached
        choice.add(tied)
        shrunk = _without(model, _narrowed(choice, same_widths=same_widths))
        try:
            return _checked(shrunk, model, batches, call)
        except UsageError:
            if tied == groups:
                raise
            tied = groups  # what reads a sum is not always known: then what it ties stays


def _narrowed(choice: Choice, *, same_widths: bool) -> Choice:
    """Return a choice after all that must stay was taken out of it. Raise if there are idle neurons, and all must."""
    choice.leave_one()
    if same_widths:
        choice.level()
    if choice.kept and not choice.chosen:
        reason, number = choice.kept.most_common(1)[0]
        every = f"all {count(number)}" if len(choice.kept) == 1 else f"{count(number)} of {count(choice.kept.total())}"
        raise UsageError(f"Expected idle neurons that can be taken out, but {every} must stay: {reason}.")
    return choice


def _require_fit(site: str, fits: bool) -> None:
    """Raise if a site of a report has other neurons in the model."""
    if not fits:
        raise UsageError(f"Expected a report on this model, but its neurons of `{site}` are not those of the model.")


def _require_plain(model: nn.Module) -> None:
    """Raise if a model cannot be followed and copied: a part is compiled or scripted, or its weights distributed."""
    if path := next((name for name, weight in model.named_parameters() if is_distributed(weight)), None):
        raise UsageError(f"Expected a model whose weights are whole, but `{path}` is distributed among ranks.")
    for name, module in model.named_modules():
        if is_compiled(module) or isinstance(module, torch.jit.ScriptModule):
            raise UsageError(
                f"Expected a model in plain PyTorch, but `{name or '(root)'}` is compiled or scripted: give the model "
                "that it was made from."
            )


def _idle(report: Report | PostmortemReport) -> dict[str, Sequence[int]]:
    """Return the neurons that a report calls dead or silent for sure, by the site's name."""
    found: dict[str, list[int]] = {}
    for verdict in report.verdicts():
        if verdict.label in _IDLE and verdict.basis in _SURE:
            found.setdefault(verdict.site, []).append(verdict.neuron)
    return dict(found)


def _groups_of_report(structure: Structure, report: Report) -> UnitGroups:
    """Return what goes together, as far as a report alone says it."""
    groups = UnitGroups(structure)
    for site in report.layers:
        blocked = structure.of(site.name, site).unknown or _own_widths(site)
        for row in site.incoming:
            layer = structure.layer(row.layer)
            _require_fit(site.name, bool(layer.unknown) or row.row + (row.neurons - 1) * row.step < layer.units)
        for each in site.reader_columns:
            if structure.layer(each.layer).one_by_one:
                blocked = blocked or f"`{each.layer}` passes them on, and to what shows only with data"
        groups.add_site(site.name, site.neurons, site.incoming, site.reader_columns, blocked)
    return groups


def _own_widths(site: SiteReport) -> str:
    """Return why an activation keeps neurons from going; ``""`` if it does not."""
    return "PReLU may have a parameter for each of them" if site.activation == "prelu" else ""


class _Seen:
    """What a forward over data shows of a model: what goes together, and what each layer reads."""

    def __init__(
        self, model: nn.Module, structure: Structure, batches: Iterable[Any], call: Callable[[nn.Module, Any], Any]
    ) -> None:
        self._structure = structure
        self.ranges = ColumnRanges(structure.known())
        self._scope = Scope(model, WatchOptions(join_ranks=False))
        self.first: Any = None
        seen = False
        alone = only_counted_by(self._scope, model)
        with evaluated(model), self._scope, alone, self._scope.phase("scan"), self.ranges.measured():
            for batch in batches:
                batch = to_device_of(model, batch)
                self.first, seen = self.first if seen else batch, True
                call(model, batch)
        if not seen:
            raise UsageError("Expected argument `data` to yield at least one batch, but it gave none.")
        self.report = self._scope.report("scan")

    def neurons_of_rows(self) -> dict[tuple[str, int], list[tuple[str, int]]]:
        """Return which neurons each row of each layer leads into."""
        found: dict[tuple[str, int], list[tuple[str, int]]] = {}
        for site in self.report.layers:
            for each in site.incoming:
                for place in range(each.neurons):
                    key = each.layer, each.row + place * each.step
                    found.setdefault(key, []).append((site.name, each.neuron + place))
        return found

    def groups(self) -> UnitGroups:
        """Return what goes together."""
        groups = UnitGroups(self._structure)
        for site in self.report.layers:
            blocked = [*site.incoming_notes, *_that_block(site.reader_notes)]
            blocked += [self._structure.of(site.name, site).unknown_layers, _own_widths(site)]
            blocked.append("its axis is only assumed" if site.assumed else "")
            groups.add_site(
                site.name, site.neurons, site.incoming, site.reader_columns, "; ".join(filter(None, blocked))
            )
        for layer in self._structure.known():
            columns, notes = self._scope.layer_readers(layer.path)
            groups.add_layer(layer, columns, "; ".join(f"`{layer.path}`: {each}" for each in _that_block(notes)))
        groups.block_unread()
        return groups


def _that_block(notes: Iterable[str]) -> list[str]:
    """Return those notes on readers that data does not answer: what a layer reads of a neuron is measured."""
    return [each for each in notes if not each.startswith(SHIFTED)]


def _without(model: nn.Module, choice: Choice) -> Shrunk:
    """Return a copy of a model without what was chosen."""
    try:
        small = copy.deepcopy(model)
    except Exception as error:
        raise UsageError(f"Expected a model that can be copied, but `copy.deepcopy` gave {error!r}.") from error
    structure = Structure(small)
    rows: dict[str, set[int]] = {}
    columns: dict[str, set[int]] = {}
    removed: dict[str, list[int]] = {}
    for group, constants in choice.chosen:
        for held, own in ((rows, group.rows), (columns, group.columns)):
            for path, indices in own.items():
                held.setdefault(path, set()).update(indices)
        for site, neurons in group.neurons.items():
            removed.setdefault(site, []).extend(neurons)
        for path, values in constants.items():
            fold_columns(structure.layer(path), group.columns[path], values)
    changed = sorted({*rows, *columns})
    for path in changed:
        leave_out(structure.layer(path), rows.get(path, ()), columns.get(path, ()))
    return Shrunk(
        model=small,
        removed={site: tuple(sorted(neurons)) for site, neurons in removed.items()},
        folded=sum(bool(constants) for _, constants in choice.chosen),
        kept=dict(choice.kept),
        widths={path: widths_of(structure.layer(path).module) for path in changed},
        parameters=(_parameters(model), _parameters(small)),
    )


def _parameters(model: nn.Module) -> int:
    return sum(each.numel() for each in model.parameters())


def _checked(shrunk: Shrunk, model: nn.Module, batches: Iterable[Any], call: Callable[[nn.Module, Any], Any]) -> Shrunk:
    """Run both models on the data, and return the record with how far their outputs are apart. Raise if that is far."""
    number, own = _compare(model, shrunk.model, batches, call)
    floats = [each.dtype for each in model.parameters() if each.is_floating_point()]
    step = max((torch.finfo(dtype).eps for dtype in floats), default=0.0)
    wrong = own if not own.relative <= _ROUNDING * step else None
    exact = None
    if own.largest > 0 and step > torch.finfo(torch.float64).eps:
        first = [as_float64(to_device_of(model, batch)) for batch in itertools.islice(batches, 1)]
        if in_float64(model, call, first[0]) is not None:
            _, exact = _compare(copy.deepcopy(model).double(), copy.deepcopy(shrunk.model).double(), first, call)
            wrong = exact if not exact.relative <= _ROUNDING_IN_FLOAT64 * step else wrong
    if wrong is not None:
        raise UsageError(
            f"Expected the smaller model to compute the same, but its outputs differ by {wrong.largest:.3g}, where "
            f"the largest output is {wrong.scale:.3g}: it is not returned, and nothing was changed."
        )
    return replace(shrunk, batches=number, difference=own, in_float64=exact)


def _compare(
    model: nn.Module, small: nn.Module, batches: Iterable[Any], call: Callable[[nn.Module, Any], Any]
) -> tuple[int, Difference]:
    """Run two models on the same batches; return the number of batches, and how far the outputs are apart."""
    largest, scale, relative, number = 0.0, 0.0, 0.0, 0
    with evaluated(model), evaluated(small), torch.random.fork_rng():
        for batch in batches:
            number += 1
            batch = to_device_of(model, batch)
            state = torch.random.get_rng_state()
            outputs = all_tensors(call(model, batch))
            torch.random.set_rng_state(state)  # what a model draws, the other one draws too
            try:
                others = all_tensors(call(small, batch))
            except Exception as error:
                raise UsageError(
                    "Expected the smaller model to run as the original, but its code seems to fix a width: "
                    f"{type(error).__name__}: {' '.join(str(error).split())[:200]}. Nothing was changed."
                ) from error
            if [each.shape for each in outputs] != [each.shape for each in others]:
                raise UsageError(
                    "Expected the smaller model to return tensors of the same shapes, but it returned others: nothing "
                    "was changed."
                )
            for one, other in zip(outputs, others, strict=True):
                size, values = _size(one)
                scale = max(scale, size)
                if not torch.equal(one, other):
                    apart = (one.double() - other.double()).abs().nan_to_num(nan=torch.inf)
                    apart[one.isnan() & other.isnan() | (one == other)] = 0
                    largest = max(largest, float(apart.max()))
                    relative = max(relative, float((apart / values.clamp(min=size)).nan_to_num(nan=0.0).max()))
    return number, Difference(largest, scale, relative)


def _size(output: Tensor) -> tuple[float, Tensor]:
    """Return the largest absolute value of an output that is no fill value, and all absolute values, float64."""
    values = output.double().abs().nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
    sample = values.flatten()[:: max(values.numel() // _SAMPLE, 1)]
    different = sample[sample > 0].unique()
    if not len(different):
        return 0.0, values
    ordinary = values[values <= _FILL * different.median()]
    return float(ordinary.max()), values
