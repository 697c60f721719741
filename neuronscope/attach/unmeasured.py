"""Collect what is not measured, and what are no neurons, each with the reason."""

from __future__ import annotations

from torch import Tensor

from neuronscope.attach.neuron_flow import NeuronFlow
from neuronscope.attach.origins import CONSTANT, ENDED, RAW, ROWS, WEIGHT, Origin
from neuronscope.attach.unsupported import IN_TRANSFORM

__all__ = ["Unmeasured", "place_of"]


class Unmeasured:
    """What is not measured of a model.

    Args:
        flow: What each tensor of a forward is.

    Attributes:
        reasons: Maps a site, a layer or a module to the reason why it, or a part of its calls, is not measured.
        not_neurons: Maps the place of an activation to the reason why what it is applied to are no neurons.
        ran: Phases, and paths of the activation modules that ran in them.
    """

    def __init__(self, flow: NeuronFlow) -> None:
        self.reasons: dict[str, str] = {}
        self.not_neurons: dict[str, str] = {}
        self.ran: set[tuple[str, str]] = set()
        self._flow = flow
        self._unclear: dict[str, tuple[str, tuple[str, ...]]] = {}  # functions without known neurons: reason, layers
        self._transformed: set[str] = set()  # layers whose activations ran inside a function transform

    def note(self, name: str, reason: str) -> None:
        """Note why something is not measured, unless a reason is known already.

        Args:
            name: Name of a site, a layer or a module.
            reason: Why.
        """
        self.reasons.setdefault(name, reason)

    def modules_that_ran(self, phase: str) -> set[str]:
        """Return the paths of the activation modules that ran in a phase."""
        return {path for name, path in list(self.ran) if name == phase}

    def forget_ran(self, phase: str) -> None:
        """Forget which activation modules ran in a phase."""
        self.ran.difference_update([each for each in list(self.ran) if each[0] == phase])

    def note_transformed(self, phase: str, path: str, function: str, x: Tensor) -> None:
        """Note that an activation ran inside a function transform.

        Args:
            phase: The phase.
            path: Path of the activation module, or of the module that calls the activation function.
            function: Name of the function, or ``""``.
            x: The pre-activation.
        """
        if not function:
            self.ran.add((phase, path))
        self.note(place_of(path, function), IN_TRANSFORM)
        units = self._flow.origin(x).units
        if units is not None:
            self._transformed.add(units.layer)

    def may_be_neurons(self, origin: Origin, place: str, is_module: bool) -> bool:
        """Return whether an activation of a tensor without known units is counted; if not, note the reason.

        Args:
            origin: What the tensor is.
            place: Where the activation is applied.
            is_module: Whether the activation is a module, and no function.
        """
        state = origin.state
        if state == ROWS:
            self.note(
                place,
                "its rows are units of several layers (experts), so that one index is a neuron of each of them; "
                "declare its axis to count those together",
            )
            return False
        if state == ENDED and origin.layer:
            self.note(
                origin.layer, f"data picked some of its units before the activation at {place}, so that they are mixed"
            )
            return False
        if state in (ENDED, WEIGHT):
            what = "parameters alone" if state == WEIGHT else "several units together"
            self.not_neurons.setdefault(place, f"its input was computed from {what}")
            return False
        if is_module:
            return True
        if state in (RAW, CONSTANT):
            self.not_neurons.setdefault(place, "no layer came before it")
            return False
        self._unclear.setdefault(
            place,
            (
                f"which dimension of its input holds neurons is not known: declare it, as in `axes={{{place!r}: 1}}`",
                self._flow.last_layers(origin),
            ),
        )
        return False

    def with_layers(self, measured: set[str]) -> dict[str, str]:
        """Return all reasons, with those of layers that reach no known activation.

        Args:
            measured: Paths of the layers that have a site.
        """
        not_measured = dict(self.reasons)
        flow = self._flow
        for place, (reason, layers) in list(self._unclear.items()):
            if not layers or not all(flow.gives_outputs(layer) for layer in layers):
                not_measured.setdefault(place, reason)
        for layer, function in list(flow.bent.items()):
            if layer in self._transformed:
                continue
            if measured.intersection(layer.split("+")):
                if function == "mul":
                    not_measured.setdefault(
                        layer,
                        "another layer read its product with a function of itself, which is an activation that is "
                        "written out: only the function is measured, and not the product. Register what it is part "
                        "of: `activations={...}`",
                    )
            else:
                not_measured.setdefault(
                    layer,
                    f"`{function}` was applied to it, which is not known as an activation, and then another layer read "
                    "it. Register what it is part of: `activations={...}`",
                )
        return not_measured


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
