"""Check a model for layers that act as one linear map, on data."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from neuronscope.attach.compiling import is_compiled, unwatched
from neuronscope.attach.examples import all_tensors
from neuronscope.attach.layer_names import LayerNames
from neuronscope.attach.module_paths import model_name, walk
from neuronscope.attach.tensor_map import nested_tensors
from neuronscope.errors import UsageError, warn_user
from neuronscope.linear.affine_flow import AffineFlow, Stretch
from neuronscope.linear.affine_functions import Kind, kind_of_call
from neuronscope.linear.collapsed_map import CollapsedMap, collapsed_map
from neuronscope.linear.linear_report import LinearLayers, LinearReport
from neuronscope.linear.slopes import Slopes
from neuronscope.running import call_model, evaluated, in_float64, to_device_of
from neuronscope.writers.formatting import listed

__all__ = ["LinearLayersOfForward", "check_linear"]


def check_linear(
    model: nn.Module, data: Iterable[Any], *, forward: Callable[[nn.Module, Any], Any] | None = None
) -> LinearReport:
    """Find the layers of a trained model between which no nonlinearity lies, or none that bends on this data.

    Such layers compute one affine map: depth buys nothing there. The model runs in evaluation mode; its state is
    restored afterwards. It runs once over the data, and a few times more on the first batch; the maps are computed on
    a copy in float64.

    Args:
        model: The model.
        data: An iterable of batches, or one tensor as the only batch, ``(B, …)``; as for
            :func:`~neuronscope.scanning.scan`.
        forward: A function ``forward(model, batch)`` that returns the output, if the model must be called differently.

    Returns:
        The stretches of layers, each with the map that it collapses to, and how sure that is.

    Raises:
        UsageError: ``data`` has no batch.

    >>> net = nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 2))
    >>> found = check_linear(net, torch.randn(32, 8))
    >>> found.stretches[0].layers, found.stretches[0].rank
    (('0', '1'), 4)
    """
    call = forward or call_model
    slopes: dict[str, Slopes] = {}
    first, examples, reads_out = None, 0, False
    everywhere: set[tuple[str, ...]] | None = None  # the layers of the stretches that each batch has
    with evaluated(model):
        for batch in (data,) if isinstance(data, Tensor) else data:
            batch = to_device_of(model, batch)
            first = batch if first is None else first
            examples += next((len(tensor) for tensor in all_tensors(batch) if tensor.dim()), 1)
            flow = AffineFlow(model)
            here = {stretch.layers for stretch in _followed(flow, model, call, batch, slopes)}
            everywhere = here if everywhere is None else everywhere & here
            reads_out = reads_out or flow.reads_out
        if everywhere is None:
            raise UsageError(
                f"Expected argument `data` to yield at least one batch, but {type(data).__name__} gave none."
            )
        linear = {name for name, each in slopes.items() if each.act_linear}
        found = _followed(AffineFlow(model, linear), model, call, first)
        found = [stretch for stretch in found if stretch.activations or stretch.layers in everywhere]
    maps = _maps(model, call, first, found)
    return LinearReport(
        model=model_name(model),
        examples=examples,
        reads_out=reads_out,
        stretches=tuple(
            _described(model, stretch, each, proved=not (stretch.activations or reads_out))
            for stretch, each in zip(found, maps, strict=True)
        ),
        acting_linear={name: (len(slopes[name]), slopes[name].constant()) for name in sorted(linear)},
    )


class LinearLayersOfForward:
    """Finds the layers of one forward between which no nonlinearity lies."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._found: list[Stretch] = []

    def of(self, call: Callable[[nn.Module, Any], Any], batch: Any) -> Any:
        """Run the model on a batch, and return its output.

        Args:
            call: Runs the model on a batch.
            batch: The batch.
        """
        if any(is_compiled(module) for module in self._model.modules()):  # the compiler would trace the mode
            return call(self._model, batch)
        flow = AffineFlow(self._model)
        following = _Following(flow, None, keep_going=True)
        with following.guarded(), unwatched():
            flow.begin(batch)
        with following:
            output = call(self._model, batch)
        if not following.failed:
            with following.guarded(), unwatched():
                self._found = flow.end(output)
        return output

    def notes(self) -> list[str]:
        """Return what a report says of the layers found: nothing of attention and norms, which are meant so."""
        found = [each.layers for each in self._found if not each.only_folds and each.affine.mixing < 0]
        names = listed([" → ".join(layers) for layers in found])
        note = f"No nonlinearity lies between {names}: they are one linear map (see `neuronscope.check_linear`)."
        return [note] if found else []


class _Following(TorchFunctionMode):
    """Passes the calls of a forward on to a flow, and measures the slopes of activations, if there is a place for them.

    An error of our own is raised; or, with ``keep_going``, it gives a warning, and no more calls are followed.
    """

    def __init__(self, flow: AffineFlow, slopes: dict[str, Slopes] | None, *, keep_going: bool = False) -> None:
        super().__init__()
        self._flow = flow
        self._slopes = slopes
        self._keep_going = keep_going
        self.failed = False

    @contextlib.contextmanager
    def guarded(self) -> Iterator[None]:
        """Keep going after an error inside, if that is wanted."""
        try:
            yield
        except Exception as error:
            if not self._keep_going:
                raise
            if not self.failed:
                warn_user(f"Layers between which no nonlinearity lies were not looked for: {error!r}.")
            self.failed = True

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        site = ""
        with self.guarded():
            with unwatched():
                self._flow.note_writes((args, kwargs))
                site = self._site(func, args, kwargs)
            if site and self._slopes is not None:
                given = next(iter(nested_tensors((args, dict(kwargs)))))
                slopes = self._slopes.setdefault(site, Slopes())
                slopes.add(func, given, args, kwargs, self._flow.neurons.origin(given))
        result = func(*args, **kwargs)
        if not self.failed:
            with self.guarded(), unwatched():
                self._flow.follow(func, args, kwargs, result, site)
        return result

    def _site(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str:
        """Return the name of the activation that a call is; ``""`` if it is none."""
        if kind_of_call(func, args, kwargs) != Kind.ACTIVATION:
            return ""
        given = next(iter(nested_tensors((args, dict(kwargs)))))
        return self._flow.name_of(func, given) if self._flow.depends_on_input(given) else ""


def _followed(
    flow: AffineFlow,
    model: nn.Module,
    call: Callable[[nn.Module, Any], Any],
    batch: Any,
    slopes: dict[str, Slopes] | None = None,
) -> list[Stretch]:
    """Run one batch, and return the stretches."""
    flow.begin(batch)
    with _Following(flow, slopes):
        output = call(model, batch)
    return flow.end(output)


def _maps(
    model: nn.Module, call: Callable[[nn.Module, Any], Any], batch: Any, stretches: list[Stretch]
) -> list[CollapsedMap | None]:
    """Return the map of each stretch, ``None`` where none could be computed."""
    exact, inputs = in_float64(model, call, batch) or (model, batch)

    def run(inputs: Any) -> Any:
        return call(exact, inputs)

    with evaluated(exact):
        return [None if stretch.only_folds else _map(run, inputs, stretch) for stretch in stretches]


def _map(run: Callable[[Any], Any], inputs: Any, stretch: Stretch) -> CollapsedMap | None:
    try:
        with torch.enable_grad():
            return collapsed_map(run, inputs, stretch, proved=not stretch.activations)
    except (RuntimeError, ValueError, IndexError):  # no gradient passes, or the code does otherwise in float64
        return None


def _described(model: nn.Module, stretch: Stretch, found: CollapsedMap | None, *, proved: bool) -> LinearLayers:
    names, known = LayerNames(model), found or CollapsedMap(-1, -1)
    own = {name.partition("(")[0] for name in stretch.layers}
    held = {
        id(parameter): parameter.numel()  # one that several modules share is one
        for path, module in walk(model)
        for parameter in module.parameters(recurse=False)
        if path in own or (names.of(parameter) or ("", False))[0] in own
    }
    return LinearLayers(
        layers=stretch.layers,
        through=stretch.activations,
        source=stretch.source_name,
        only_folds=stretch.only_folds,
        through_attention=stretch.affine.mixing >= 0,
        basis="proved" if proved else "measured",
        parameters=sum(held.values()),
        parameters_of_one=known.parameters if found else -1,
        **{**known._asdict(), "matrix": _plain(known.matrix), "offset": _plain(known.offset)},
    )


def _plain(tensor: Tensor | None) -> npt.NDArray[np.floating[Any]] | None:
    return None if tensor is None else tensor.detach().cpu().numpy()
