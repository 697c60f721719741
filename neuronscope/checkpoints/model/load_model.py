"""Build the network that the user names, and load a checkpoint's weights into it.

A network is given as an ``nn.Module``, as ``package.module:name`` (a function, an ``nn.Module`` class without
arguments, a LightningModule class whose hyperparameters are in the checkpoint, or an existing module), or as a Hugging
Face folder with a ``config.json``. If possible, it is built on the meta device, without memory for its weights, and the
weights are then read into it one at a time.
"""

from __future__ import annotations

import contextlib
import inspect
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import is_parametrized
from torch.overrides import TorchFunctionMode

from neuronscope.attach.module_paths import walk
from neuronscope.checkpoints.checkpoint import Checkpoint, ComputedTensor, StoredTensor
from neuronscope.checkpoints.file.merged_weights import holds_only_adapters, plain_tensors
from neuronscope.checkpoints.formats.byte_range import read_json
from neuronscope.checkpoints.formats.parameter_names import COUNTERS
from neuronscope.checkpoints.user_code import load_named, user_code
from neuronscope.errors import CheckpointError, MissingExtraError, UsageError

__all__ = [
    "HeldTensor",
    "as_loaded",
    "build_model",
    "configured_parameters",
    "held_tensors",
    "list_parameters",
    "load_trained",
    "path_in_model",
    "stored_names",
]


def load_trained(name: str) -> nn.Module:
    """Return the trained network that ``package.module:name`` names: a module, or a function that returns one.

    Raises:
        UsageError: It names no network, or its code fails.
    """
    found = load_named(name, "model")
    if not isinstance(found, nn.Module) and callable(found):
        with user_code(f"Expected `model` ({name}) to return a network"):
            found = found()
    if not isinstance(found, nn.Module):
        raise UsageError(f"Expected `model` ({name}) to be a torch.nn.Module, but got {type(found).__name__}.")
    return found


def build_model(model: nn.Module | str | Path | Callable[..., nn.Module], checkpoint: Checkpoint) -> nn.Module:
    """Build a network with the checkpoint's weights, in evaluation mode; a given module is changed and returned.

    Args:
        model: The network, in one of the forms above. A class is called with those of the checkpoint's hyperparameters
            that it accepts, as in Lightning's ``load_from_checkpoint``.
        checkpoint: The checkpoint with the weights.

    Raises:
        UsageError: ``model`` does not name a network, or the network cannot be built.
        CheckpointError: The weights do not fit the network.
        MissingExtraError: ``model`` is a Hugging Face folder, and transformers is not installed.
    """
    if isinstance(model, (str, Path)):
        name = str(model)
        if ":" in name and not Path(name).exists():
            model = load_named(name, "model")
        else:
            folder = Path(name)
            config = folder if folder.name == "config.json" else folder / "config.json"
            if not config.is_file():
                raise UsageError(
                    "Expected argument `model` to be `package.module:name`, a torch.nn.Module, or a folder with a "
                    f"`config.json`, but got {name!r}."
                )
            if holds_only_adapters(checkpoint):
                raise UsageError(
                    f"Expected argument `model` to be a network with weights, since {checkpoint.path} holds only "
                    "adapters, which change them: name a function that returns it, as `package.module:name`."
                )
            model = _hugging_face(read_json(config))
    if not isinstance(model, nn.Module):
        model = _call_factory(model, checkpoint)
    _load_weights(model, checkpoint)
    return model.eval()


def _call_factory(factory: Any, checkpoint: Checkpoint) -> nn.Module:
    if not callable(factory):
        raise UsageError(
            f"Expected argument `model` to name a function or a class, but got a {type(factory).__name__}."
        )
    name = getattr(factory, "__qualname__", repr(factory))
    with user_code(f"Expected the arguments of `{name}` to be known"):
        arguments = _accepted_arguments(factory, checkpoint.hyperparameters) if isinstance(factory, type) else {}
    built = _build(factory, arguments, name, real=holds_only_adapters(checkpoint))
    if not isinstance(built, nn.Module):
        result = "None" if built is None else f"a {type(built).__name__}"
        raise UsageError(f"Expected `{name}` to give a torch.nn.Module, but it gave {result}.")
    return built


def _accepted_arguments(factory: type, hyperparameters: Mapping[str, Any]) -> dict[str, Any]:
    """Return the hyperparameters that a class accepts as arguments."""
    parameters = inspect.signature(factory).parameters.values()
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return dict(hyperparameters)
    return {each.name: hyperparameters[each.name] for each in parameters if each.name in hyperparameters}


def _build(factory: Callable[..., Any], arguments: dict[str, Any], name: str, *, real: bool = False) -> Any:
    """Call a factory: on the meta device, if a checkpoint holds all tensors of its network, and not ``real``."""
    described = f" with the checkpoint's hyperparameters {sorted(arguments)}" if arguments else ""
    with user_code(
        f"Expected `{name}` to build a network{described}", "Name a function without arguments that builds it."
    ):
        with contextlib.suppress(Exception), torch.device("meta"), _NewTensors() as made:
            built = factory(**arguments)
            if not real and isinstance(built, nn.Module) and _is_saved_completely(built, made):
                return built
        return factory(**arguments)


class _NewTensors(TorchFunctionMode):
    """Remembers the tensors that torch's functions return, for as long as something else keeps them."""

    def __init__(self) -> None:
        super().__init__()
        self._made: list[weakref.ref[Tensor]] = []

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        if isinstance(output, Tensor):
            self._made.append(weakref.ref(output))
        return output

    def kept(self) -> Iterator[Tensor]:
        """Yield those that still exist."""
        return (tensor for made in self._made if (tensor := made()) is not None)


def _is_saved_completely(built: nn.Module, made: _NewTensors) -> bool:
    """Whether a checkpoint holds all tensors of a network: nothing keeps others, such as a list or a closure.

    A parametrization may decide by the numbers which buffers it registers, so it needs real numbers. So does a module
    that changes what is loaded into it.
    """
    if _changes_loading(built) or any(
        module._non_persistent_buffers_set or is_parametrized(module) for module in built.modules()
    ):
        return False
    saved = {id(tensor) for tensor in (*built.parameters(), *built.buffers())}
    return all(id(tensor) in saved for tensor in made.kept())


def _hugging_face(config: Any) -> nn.Module:
    """Build the network that a Hugging Face ``config.json`` describes."""
    try:
        import transformers
    except ImportError as error:
        raise MissingExtraError(
            "A Hugging Face folder needs transformers: `pip install transformers`. Or name a function that builds the "
            "network, as `--model package.module:name`."
        ) from error
    architectures = config.get("architectures") if isinstance(config, dict) else None
    names = [name for name in architectures or () if isinstance(name, str)]
    classes = [getattr(transformers, name, None) for name in names]
    found = next((cls for cls in classes if isinstance(cls, type) and issubclass(cls, nn.Module)), None)
    if found is None:
        raise UsageError(
            f"Expected `config.json` to name a network of transformers under `architectures`, but got {names}. "
            "Name a function that builds it, as `--model package.module:name`."
        )
    network: Any = found
    built: nn.Module = _build(lambda: network(network.config_class.from_dict(config)), {}, network.__name__)
    return built


def _changes_loading(model: nn.Module) -> bool:
    """Whether a module of a network changes what is loaded into it: old names, or state of its own."""
    for module in model.modules():
        for name in ("_load_from_state_dict", "set_extra_state"):
            home = next(base.__module__ for base in type(module).__mro__ if name in vars(base))
            if module._load_state_dict_pre_hooks or home.partition(".")[0] != "torch":
                return True
    return False


def _load_as_torch(model: nn.Module, tensors: Mapping[str, StoredTensor]) -> bool:
    """Load a checkpoint's tensors as torch does, with the network's own changes; return whether they fit."""
    before = [(held.tensor, held.tensor.clone()) for _, held in held_tensors(model) if not is_lazy(held.tensor)]
    try:
        model.load_state_dict({name: stored.read() for name, stored in tensors.items() if name not in COUNTERS})
    except RuntimeError:
        with torch.no_grad():
            for tensor, kept in before:
                tensor.copy_(kept)
        return False
    return True


def _load_weights(model: nn.Module, checkpoint: Checkpoint) -> None:
    """Read a checkpoint's tensors into a network, one at a time.

    Where they do not fit, masks, adapters (LoRA) and norms of weights are merged into the weights, or the network's own
    code changes what is loaded. Names may differ by a prefix that all share. On the meta device, what is read becomes
    the weights; elsewhere it is copied into them. A lazy module takes its sizes from the checkpoint.
    """
    slots = _slots(model)
    tensors = checkpoint.tensors
    for name, stored in _match_names(slots, tensors).items():
        if is_lazy(slots[name].tensor):
            cast("Any", slots[name].tensor).materialize(tensors[stored].shape)
    problems = _problems(slots, tensors)
    if problems and _changes_loading(model):
        with user_code(f"Expected {type(model).__name__} to load the weights of {checkpoint.path}"):
            if _load_as_torch(model, tensors):
                return
    if problems:
        base = {name: held.tensor for name, held in slots.items() if held.tensor.device.type != "meta"}
        plain = plain_tensors(checkpoint, base)
        wanted = slots
        if holds_only_adapters(checkpoint):  # what they do not change is in the network already
            wanted = {name: held for name, held in slots.items() if name in plain}
        if plain.keys() != tensors.keys() and not _problems(wanted, plain):
            tensors, problems = plain, []
    if problems:
        raise CheckpointError(
            f"Expected the weights of {checkpoint.path} to fit {type(model).__name__}, but there are "
            f"{'; '.join(problems)}. Is it the network that this checkpoint was saved from? "
            f"{' '.join(checkpoint.notes)}".rstrip()
        )
    _fill(slots, _match_names(slots, tensors), tensors)
    filled = (*model.named_parameters(), *model.named_buffers())
    if left := [name for name, tensor in filled if tensor.device.type == "meta"]:  # non-persistent buffers
        raise CheckpointError(
            f"Expected the weights of {checkpoint.path} to fill {type(model).__name__}, but {len(left)} tensors are "
            f"left without numbers ({_few(left)})."
        )


class HeldTensor(NamedTuple):
    """A parameter or buffer of a network."""

    module: nn.Module  # the module that holds it
    leaf: str  # its name there
    tensor: Tensor  # the tensor


def held_tensors(model: nn.Module) -> Iterator[tuple[str, HeldTensor]]:
    """Yield every parameter and buffer of a network, with its full name."""
    for path, module in walk(model):
        for leaf, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None:
                yield f"{path}.{leaf}" if path else leaf, HeldTensor(module, leaf, tensor)


def _slots(model: nn.Module) -> dict[str, HeldTensor]:
    """Return every parameter and saved buffer by its full name."""
    return {
        name: held for name, held in held_tensors(model) if held.leaf not in held.module._non_persistent_buffers_set
    }


def _problems(slots: Mapping[str, HeldTensor], tensors: Mapping[str, StoredTensor]) -> list[str]:
    """Return why a checkpoint's tensors do not fit a network."""
    names = _match_names(slots, tensors)
    found, used = {id(slots[name].tensor) for name in names}, set(names.values())
    pairs = [(name, slots[name].tensor, tensors[stored]) for name, stored in names.items()]
    wrong = {
        "missing": [name for name, held in slots.items() if name not in names and id(held.tensor) not in found],
        "unexpected": [name for name in tensors if name not in used and name not in COUNTERS],
        "of another shape": [
            f"{name} {tuple(tensor.shape)} ≠ {tuple(stored.shape)}"
            for name, tensor, stored in pairs
            if tuple(tensor.shape) != tuple(stored.shape)
        ],
        "complex, where real numbers are wanted": [
            name for name, tensor, stored in pairs if "complex" in stored.dtype and not tensor.is_complex()
        ],
    }
    return [f"{len(names)} {problem} ({_few(names)})" for problem, names in wrong.items() if names]


def as_loaded(model: nn.Module, checkpoint: Checkpoint) -> Checkpoint:
    """Return a checkpoint with a network's own tensors, if what it holds was changed to fit the network.

    Args:
        model: The network, with the checkpoint's weights.
        checkpoint: The checkpoint.
    """
    slots = _slots(model)
    if not _problems(slots, checkpoint.tensors):
        return checkpoint
    tensors = {name: ComputedTensor.of(held.tensor) for name, held in slots.items()}
    note = (
        "The file's tensors were changed to fit the network: its own code does so when it loads them, or masks, "
        "adapters or norms of weights were merged into the weights."
    )
    return replace(checkpoint, tensors=tensors, notes=(*checkpoint.notes, note))


def _match_names(wanted: Iterable[str], stored: Iterable[str]) -> dict[str, str]:
    """Map names of the network to names of the checkpoint: equal, or equal except for a prefix of all names of one."""
    ours, theirs = list(wanted), set(stored)
    prefixes = {""} | {name[: -len(own)] for own in ours[:1] for name in theirs if name.endswith(f".{own}")}
    best: dict[str, str] = {}
    for prefix in sorted(prefixes, key=len):
        added = {own: prefix + own for own in ours if prefix + own in theirs}
        best = max(best, added, key=len)
    by_first_name: dict[str, dict[str, str]] = {}
    for own in ours:
        first, _, rest = own.partition(".")
        if rest in theirs:
            by_first_name.setdefault(first, {})[own] = rest
    best = max([best, *by_first_name.values()], key=len)
    return best | {name: name for name in COUNTERS if name in ours and name in theirs}


def _fill(slots: Mapping[str, HeldTensor], stored_names: Mapping[str, str], stored: Mapping[str, StoredTensor]) -> None:
    """Read the stored tensors into the network: copy them, or put them in place of tensors on the meta device."""
    loaded: dict[int, Tensor] = {}  # a weight that two modules share is read once
    with torch.no_grad():
        for name, (module, attribute, tensor) in sorted(slots.items(), key=lambda slot: slot[0] not in stored_names):
            if name in stored_names and id(tensor) not in loaded:
                read = stored[stored_names[name]].read()
                if tensor.device.type != "meta":
                    tensor.copy_(read)
                    continue
                new = read.to(tensor.dtype)
                if isinstance(tensor, nn.Parameter):
                    new = nn.Parameter(new, tensor.requires_grad)
                loaded[id(tensor)] = new
            if id(tensor) in loaded:
                table: dict[str, Any] = module._parameters if attribute in module._parameters else module._buffers
                table[attribute] = loaded[id(tensor)]


def _few(names: list[str]) -> str:
    return ", ".join(names[:3]) + (" …" if len(names) > 3 else "")


def list_parameters(model: nn.Module, checkpoint: Checkpoint) -> list[str]:
    """Return the names that a model's parameters have in a checkpoint, in the model's order, each parameter once.

    Args:
        model: The model.
        checkpoint: The checkpoint.
    """
    stored = stored_names(model, checkpoint)
    names: dict[int, str] = {}
    for name, held in held_tensors(model):
        if held.leaf in held.module._parameters:
            names.setdefault(id(held.tensor), name)
    return [stored.get(name, name) for name in names.values()]


def stored_names(model: nn.Module, checkpoint: Checkpoint) -> dict[str, str]:
    """Return the name in a checkpoint of each parameter and buffer of a model that it holds.

    Args:
        model: The model.
        checkpoint: The checkpoint.
    """
    return _match_names(_slots(model), checkpoint.tensors)


def configured_parameters(checkpoint: Checkpoint) -> list[str] | None:
    """Return the same for the network of a Hugging Face folder's own ``config.json``; ``None`` if none can be built."""
    if not checkpoint.config.get("architectures"):
        return None
    with contextlib.suppress(Exception), torch.device("meta"):  # a convenience: nobody asked for this network
        names = list_parameters(_hugging_face(checkpoint.config), checkpoint)
        if any(name in checkpoint.tensors for name in names):
            return names
    return None


def path_in_model(model: nn.Module, checkpoint: Checkpoint) -> Callable[[str], str]:
    """Return a function that gives the path in the model for one in the checkpoint: they may differ by a shared prefix.

    Args:
        model: The network.
        checkpoint: The checkpoint.
    """
    pairs = stored_names(model, checkpoint).items()
    own, stored = next(((own, stored) for own, stored in pairs if own != stored), ("", ""))
    surplus = stored.removesuffix(own) if stored.endswith(f".{own}") else ""
    missing = own.removesuffix(stored) if own.endswith(f".{stored}") else ""

    def path(stored_path: str) -> str:
        if missing:
            return missing.removesuffix(".") if stored_path == "(root)" else missing + stored_path
        return "(root)" if surplus == f"{stored_path}." else stored_path.removeprefix(surplus)

    return path
