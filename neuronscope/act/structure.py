"""Know the weights of each neuron as tensors of the model: rows that lead into it, and columns that read it.

Which layers these are comes from the flow of units, as :class:`~neuronscope.sites.IncomingRows` and
:class:`~neuronscope.sites.ReaderColumns`. Here a layer's path becomes parameters and buffers, each with the dimension
that rows or columns index.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor, nn

from neuronscope.attach.dtensor import is_distributed, is_tensor_parallel
from neuronscope.attach.module_paths import walk
from neuronscope.report.report import SiteReport
from neuronscope.sites import IncomingRows, ReaderColumns, SiteInfo
from neuronscope.tally.census import Tally

__all__ = ["LayerWeights", "Part", "SiteStructure", "Structure"]

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


class Part(NamedTuple):
    """A parameter or buffer, and the dimension that the rows or columns of its layer index."""

    name: str  # its name in the module
    tensor: Tensor
    dim: int

    def of(self, index: int) -> Tensor:
        """Return a view of what belongs to one row or column."""
        return self.tensor.select(self.dim, index)


class LayerWeights(NamedTuple):
    """The tensors of a layer."""

    path: str
    module: nn.Module  # its module; an empty one if it has none, as a bare parameter
    #: What has one entry for each unit that the layer gives: its weight, bias, running statistics.
    rows: tuple[Part, ...] = ()
    #: What has one entry for each unit that the layer reads: its weight, but for norms and depthwise convolutions,
    #: which take units one by one.
    columns: tuple[Part, ...] = ()
    one_by_one: bool = False  # whether unit ``i`` that it gives is made of unit ``i`` that it reads alone
    unknown: str = ""  # why its tensors are not known; ``""`` if they are

    @property
    def units(self) -> int:
        """Number of units that the layer gives."""
        return self.rows[0].tensor.shape[self.rows[0].dim] if self.rows else 0

    @property
    def inputs(self) -> int:
        """Number of units that the layer reads."""
        return self.columns[0].tensor.shape[self.columns[0].dim] if self.columns else self.units

    @classmethod
    def of(cls, path: str, module: nn.Module | None, *, whole_units: bool = True) -> LayerWeights:
        """Return the tensors of a layer; with the reason in ``unknown`` where its class is not known.

        Args:
            path: Path of the layer.
            module: The module at that path; ``None`` for a bare parameter.
            whole_units: Whether each rank computes all units of the layer, also where it holds a part of its weights.
        """
        if module is None and path.endswith(")"):
            reason = f"`{path}` is made of the weight of `{path.partition('(')[0]}`, which is used elsewhere too"
            return cls(path, nn.Module(), unknown=reason)
        if module is None:
            return cls(path, nn.Module(), unknown=f"`{path}` is a parameter that no layer of its own holds")
        kind = type(module)
        known = _known_forward(kind)
        if known is None or kind.forward is not known:
            return cls(path, module, unknown=f"`{path}` is of class {kind.__name__}, whose weights are not known")
        held = {name: each for name, each in (module._parameters | module._buffers).items() if each is not None}
        weight = held.get("weight")
        is_norm = isinstance(module, _NORMS)
        distributed = [each for each in held.values() if is_distributed(each)]
        if distributed and not whole_units:
            return cls(path, module, unknown=f"the units of `{path}` are split among ranks (tensor parallelism)")
        plain = all(type(each) in (nn.Parameter, Tensor) or is_distributed(each) for each in held.values())
        if not plain or "parametrizations" in module._modules or (weight is None and not is_norm):
            return cls(path, module, unknown=f"the weight of `{path}` is made of other tensors")
        is_turned = isinstance(module, _TRANSPOSED) or _is_conv1d(kind)  # its weight has a row for each input
        is_depthwise = False
        if isinstance(module, (*_CONVOLUTIONS, *_TRANSPOSED)) and module.groups > 1:
            is_depthwise = not is_turned and module.groups == module.in_channels == module.out_channels
            if not is_depthwise:
                return cls(path, module, unknown=f"`{path}` is a convolution in groups")
        rows = [Part(name, held[name], 0) for name in ("bias", "running_mean", "running_var") if name in held]
        if weight is None:
            return cls(path, module, tuple(rows), (), True)
        rows.insert(0, Part("weight", weight, int(is_turned)))
        if is_norm or is_depthwise:
            return cls(path, module, tuple(rows), (), True)
        return cls(path, module, tuple(rows), (Part("weight", weight, int(not is_turned)),))


@dataclass(frozen=True)
class SiteStructure:
    """The weights of the neurons of one site."""

    name: str
    neurons: int
    incoming: tuple[IncomingRows, ...]  # which rows of which layers lead into which neurons
    readers: tuple[ReaderColumns, ...]  # which columns of which layers read which neurons
    unknown: str  # why this is not known exactly, in words; ``""`` if it is. Then one must not act on the neurons
    layers: Mapping[str, LayerWeights]  # the tensors of these layers, by path

    @property
    def unknown_layers(self) -> str:
        """Why the tensors of one of these layers are not known; ``""`` if all are."""
        return next((layer.unknown for layer in self.layers.values() if layer.unknown), "")

    def rows(self, neuron: int) -> list[tuple[LayerWeights, int]]:
        """Return the rows that lead into a neuron: of each layer, its row."""
        found = [(self.layers[each.layer], each.of(neuron)) for each in self.incoming]
        return [(layer, row) for layer, row in found if row is not None]

    def columns(self, neuron: int) -> list[tuple[LayerWeights, list[int]]]:
        """Return the columns that read a neuron: of each layer, its columns."""
        found = [(self.layers[each.layer], each.of(neuron)) for each in self.readers]
        return [(layer, columns) for layer, columns in found if columns]


class Structure:
    """The weights of all sites of a model.

    Args:
        model: The model.

    >>> import neuronscope, torch
    >>> model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    >>> with neuronscope.watch(model) as scope:
    ...     _ = model(torch.randn(5, 4)), scope.step()
    >>> found = Structure(model).of("0/relu", scope.census()["0/relu"])
    >>> [(layer.path, row) for layer, row in found.rows(1)], [(layer.path, own) for layer, own in found.columns(1)]
    ([('0', 1)], [('2', [1])])
    """

    def __init__(self, model: nn.Module) -> None:
        self._modules = dict(walk(model))
        self._whole_units = not is_tensor_parallel(model)
        self._layers: dict[str, LayerWeights] = {}

    def layer(self, path: str) -> LayerWeights:
        """Return the tensors of a layer, by its path as sites and readers name it."""
        if path not in self._layers:
            module = self._modules.get("" if path == "(root)" else path)
            self._layers[path] = LayerWeights.of(path, module, whole_units=self._whole_units)
        return self._layers[path]

    def known(self) -> list[LayerWeights]:
        """Return all layers whose tensors are known."""
        found = [self.layer(path or "(root)") for path in self._modules]
        return [layer for layer in found if layer.rows]

    def of(self, name: str, site: SiteReport | Tally | SiteInfo) -> SiteStructure:
        """Return the weights of a site.

        Args:
            name: The site's name.
            site: What is known of it: its entry in a report or a census.
        """
        paths = [each.layer for each in site.incoming] + [each.layer for each in site.reader_columns]
        layers = {path: self.layer(path) for path in paths}
        reasons = filter(None, dict.fromkeys([site.weights_unknown, *(each.unknown for each in layers.values())]))
        neurons = site.neurons if isinstance(site, (SiteReport, Tally)) else 0
        return SiteStructure(name, neurons, site.incoming, site.reader_columns, "; ".join(reasons), layers)


def _is_conv1d(kind: type[nn.Module]) -> bool:
    """Whether a class is the linear layer of GPT-2 in transformers, whose weight has a row for each input."""
    return kind.__name__ == "Conv1D" and kind.__module__ == "transformers.pytorch_utils"


def _known_forward(kind: type[nn.Module]) -> object:
    """Return the ``forward`` of the known layer that a class is or extends; ``None`` for other classes."""
    for base in kind.__mro__:
        if base in (nn.Linear, *_CONVOLUTIONS, *_TRANSPOSED, *_NORMS) or _is_conv1d(base):
            return vars(base).get("forward", getattr(base, "forward", None))
    return None
