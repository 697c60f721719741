"""Collect what is not measured, and what are no neurons, each with the reason."""

from __future__ import annotations

from torch import Tensor

from neuronscope.attach.activations import ROWS as ACTIVATION_ROWS
from neuronscope.attach.neuron_flow import UNSEEN, NeuronFlow
from neuronscope.attach.origins import CONSTANT, ENDED, RAW, ROWS, UNITS, WEIGHT, Origin
from neuronscope.attach.unsupported import IN_OPERATOR, IN_TRANSFORM, describe_input

__all__ = ["PICKED", "Unmeasured", "place_of"]

#: Begins the reason why an activation of units that data picked is not measured.
PICKED = "data picked some of its units"
_SEVERAL = "several units together"
#: Names of functions every call of which applies a known activation.
_ACTIVATIONS = frozenset(
    getattr(function, "__name__", "")
    for row in ACTIVATION_ROWS
    if row.choose is None
    for function in row.all_functions()
)
_MOST_KEYS = 20_000  # of one place, if the layers before it differ from step to step


class Unmeasured:
    """What is not measured of a model.

    Args:
        flow: What each tensor of a forward is.

    Attributes:
        reasons: Maps a site, a layer or a module to the reason why it, or a part of its calls, is not measured.
        phases_of_modules: Maps the path of each activation module that ran to the phases in which it did.
        failed: Sites whose last call gave no output.
        idle_experts: Places of activations of experts whose sites are known although they may not have run.
    """

    def __init__(self, flow: NeuronFlow) -> None:
        self.reasons: dict[str, str] = {}
        self._no_units: dict[str, str] = {}  # places of activations of what are no neurons: reason
        self._ended: dict[str, set[tuple[int, str]]] = {}  # such places, of several units together: see `Origin.acted`
        self.phases_of_modules: dict[str, dict[str, None]] = {}
        self.failed: set[str] = set()
        self.idle_experts: set[str] = set()
        self._flow = flow
        self._unclear: dict[str, tuple[str, tuple[str, ...]]] = {}  # functions without known neurons: reason, layers
        self._switched: dict[str, str] = {}  # see `note_unless_measured`
        self._transformed: set[str] = set()  # layers whose activations ran inside a function transform

    def note(self, name: str, reason: str) -> None:
        """Note why something is not measured, unless a reason is known already.

        Args:
            name: Name of a site, a layer or a module.
            reason: Why.
        """
        self.reasons.setdefault(name, reason)

    def note_unless_measured(self, layer: str, reason: str) -> None:
        """Note why a layer is not measured, which holds if it has no site.

        Args:
            layer: Path of the layer.
            reason: Why.
        """
        self._switched.setdefault(layer, reason)

    def withdraw(self, name: str, beginning: str) -> None:
        """Forget the reason why something is not measured, if it begins so.

        Args:
            name: Name of a layer.
            beginning: How the reason begins.
        """
        if self.reasons.get(name, "").startswith(beginning):
            del self.reasons[name]

    def note_ran(self, path: str, phase: str) -> None:
        """Note that an activation module ran.

        Args:
            path: Path of the module.
            phase: The phase in which it ran.
        """
        self.phases_of_modules.setdefault(path, {})[phase] = None

    def forget_ran(self, phase: str) -> None:
        """Forget which activation modules ran in a phase."""
        for phases in list(self.phases_of_modules.values()):
            phases.pop(phase, None)

    def note_transformed(self, phase: str, path: str, function: str, x: Tensor) -> None:
        """Note that an activation ran inside a function transform.

        Args:
            phase: The phase.
            path: Path of the activation module, or of the module that calls the activation function.
            function: Name of the function, or ``""``.
            x: The pre-activation.
        """
        self._note_inside(IN_TRANSFORM, phase, path, function, x)

    def note_inside(self, operator: str, phase: str, path: str, function: str, x: Tensor) -> None:
        """Note that an activation ran inside an operator that runs functions as often as data says.

        Args:
            operator: The operator.
            phase: As in :meth:`note_transformed`, and so are the others.
            path: Path of a module.
            function: Name of the function, or ``""``.
            x: The pre-activation.
        """
        self._note_inside(IN_OPERATOR.format(operator), phase, path, function, x)

    def note_quantized(self, phase: str, path: str, function: str, x: Tensor) -> None:
        """Note that a compiled graph applies an activation to a quantised tensor.

        Args:
            phase: As in :meth:`note_transformed`, and so are the others.
            path: Path of a module.
            function: Name of the function, or ``""``.
            x: The pre-activation.
        """
        self._note_inside("it ran on quantised tensors, which cannot be counted", phase, path, function, x)

    def _note_inside(self, reason: str, phase: str, path: str, function: str, x: Tensor) -> None:
        if not function:
            self.note_ran(path, phase)
        self.note(place_of(path, function), reason)
        origin = self._flow.origin(x)
        self._flow.read |= origin.upstream  # nothing tells what comes of it, so that none of its layers gives outputs
        if origin.units is not None:
            self._transformed.add(origin.units.layer)

    def may_be_neurons(self, origin: Origin, place: str, function: str) -> bool:
        """Return whether an activation of a tensor without known units is counted; if not, note the reason.

        Args:
            origin: What the tensor is.
            place: Where the activation is applied.
            function: Name of the activation if it is a function, ``""`` if it is a module.
        """
        state = origin.state
        if state == ROWS:
            self.note(
                place,
                "its rows are, or may be, units of several layers (experts), so that one index is a neuron of each of "
                "them; declare its axis to count those together",
            )
            return False
        if state == ENDED and origin.layer:
            self.note(
                origin.layer,
                f"{PICKED} before the activation at {place}, so that one index is now this unit "
                "and now that one. Register the module that picks them and puts them back: `activations={...}`",
            )
            return False
        if state == ENDED:
            keys = self._ended.setdefault(place, set())
            if len(keys) < _MOST_KEYS:
                keys.add((origin.upstream, function))
            self._no_units.setdefault(place, f"its input was computed from {_SEVERAL}")
            return False
        if state == WEIGHT and not origin.picked:
            self._no_units.setdefault(place, "its input was computed from parameters alone")
            return False
        if not function:
            return True
        if state == RAW or (state == CONSTANT and not self._flow.left):
            self._no_units.setdefault(place, "no layer came before it")
            return False
        self._note_unclear(
            origin,
            place,
            f"which dimension of its input holds neurons is not known: declare it, as in `axes={{{place!r}: 1}}`",
        )
        return False

    def _note_unclear(self, origin: Origin, place: str, reason: str) -> None:
        """Note why an activation is not measured, which does not matter if it is applied to outputs of the network."""
        self._unclear.setdefault(place, (reason, self._flow.last_layers(origin)))

    def note_uncountable(self, origin: Origin, place: str, x: Tensor) -> None:
        """Note that an activation function was applied to a single number, or to a tensor of an unusual type.

        Integers are counts and indices, unless they are units of a layer.

        Args:
            origin: What the tensor is.
            place: Where the activation is applied.
            x: The tensor.
        """
        if origin.state == UNITS:
            self._note_unclear(origin, place, f"it ran on {describe_input(x)}, which cannot be counted")
        elif not x.dim():
            self._no_units.setdefault(place, "its input is a single number, and no unit of a layer")
        elif x.is_complex() or x.is_quantized:
            self.may_be_neurons(origin, place, "a function")

    def not_neurons(self) -> dict[str, str]:
        """Return where activations are applied to what are no neurons, each with the reason."""
        read = self._places_read()
        found = {place: reason for place, reason in list(self._no_units.items()) if place not in read}
        for place, (_, layers) in list(self._unclear.items()):
            if self._are_outputs(layers):
                found.setdefault(place, "it is applied to what the network gives, which no layer reads")
        return found

    def _places_read(self) -> list[str]:
        """Return the places of activations of several units together whose results a layer reads."""
        return [place for place, keys in list(self._ended.items()) if not keys.isdisjoint(self._flow.acted)]

    def _are_outputs(self, layers: tuple[str, ...]) -> bool:
        return bool(layers) and all(self._flow.gives_outputs(layer) for layer in layers)

    def with_layers(self, measured: set[str], *, all_seen: bool) -> dict[str, str]:
        """Return all reasons, with those of layers that reach no known activation.

        Args:
            measured: Paths of the layers that have a site.
            all_seen: Whether all that the model does was seen: it was not compiled, and not called in parts.
        """
        not_measured = dict(self.reasons)
        flow = self._flow
        for place, (reason, layers) in list(self._unclear.items()):
            if not self._are_outputs(layers):
                not_measured.setdefault(place, reason)
        for place in self._places_read():
            not_measured.setdefault(
                place,
                f"its input was computed from {_SEVERAL}, and a layer reads the result: these may be the neurons of a "
                f"layer that was not recognised. If they are, declare their axis, as in `axes={{{place!r}: 1}}`",
            )
        for layer, reason in list(self._switched.items()):
            if measured.isdisjoint(layer.split("+")):
                not_measured.setdefault(layer, reason)
        said = {place.rpartition(".")[2] for place in [*self._unclear, *self.reasons]}
        for layer, functions in list(flow.bent.items()):
            function = next((name for name in list(functions) if f"{name}()" not in said), "")
            if layer not in self._transformed and function:
                reason = _why_bent(function, "mul" in functions, bool(measured.intersection(layer.split("+"))))
                if reason:
                    not_measured.setdefault(layer, reason)
        for layer, function in list(flow.hidden.items()):
            inside = any(layer.startswith(f"{path}.") for path in list(self.reasons))  # of a scripted module
            known = any(each == layer or each.startswith(f"{layer}.") for each in measured | flow.called)
            if not known and not inside:
                not_measured.setdefault(
                    layer,
                    f"its weight was given to `{function}`, which is not known as a layer, so that its units are not "
                    "followed. Declare the axis of the activation behind it: `axes={...}`",
                )
        if all_seen:
            for layer in sorted(flow.lost_layers() - measured - self._transformed):
                not_measured.setdefault(
                    layer,
                    "its output reached no activation, no layer and no output of the model: what reads it is no "
                    "function of torch, or nothing does. Register the module that reads it: `activations={...}`",
                )
        for name in list(self.failed):
            not_measured.setdefault(
                name,
                "its last call gave no output, because it failed or returns nothing: that call was not counted",
            )
        return not_measured


def _why_bent(function: str, times: bool, measured: bool) -> str:
    """Return why a layer is not measured that another one reads after a function which is no known activation.

    Args:
        function: Name of the function.
        times: Whether the layer was multiplied by a function of itself.
        measured: Whether the layer has a site; then ``""`` is returned, unless its product is another activation.
    """
    if measured and not times:
        return ""
    if measured:
        return (
            "another layer read its product with a function of itself, which is an activation that is written out: "
            "only the function is measured, not the product. Register the module that applies both: `activations={...}`"
        )
    if function.startswith(UNSEEN):
        return (
            f"a function was applied to it whose call was not seen (`{function.removeprefix(UNSEEN)}` in autograd's "
            "graph), and then another layer read it. Torch does not report it, or it was called outside of the model's "
            "forward: register the module that calls it (`activations={...}`), or call `scope.open_step()` before each "
            "step and `scope.close_step()` after it"
        )
    if function in _ACTIVATIONS:
        return (
            f"`{function}` was applied to it where functions are not watched, and then another layer read it: outside "
            "of the model's forward, or with `functional=False`. Call the model itself, or `scope.open_step()` before "
            "each step and `scope.close_step()` after it; or apply the activation in a module of its own"
        )
    return (
        f"`{function}` was applied to it, which is not known as an activation, and then another layer read it. "
        "If it is an activation, register it, or the module that applies it: `activations={...}`"
    )


def place_of(path: str, function: str) -> str:
    """Return the place of an activation: the path of its module, or the function in the module that calls it.

    Args:
        path: Path of the activation module, or of the module that calls the activation function.
        function: Name of the function, or ``""``.

    >>> place_of("act", ""), place_of("block", "relu"), place_of("", "relu")
    ('act', 'block.relu()', 'relu()')
    """
    if not function:
        return path or "(root)"
    return f"{path}.{function}()" if path else f"{function}()"
