"""Models: from what the user names to a network that holds the checkpoint's weights.

A network is named as an ``nn.Module``, as ``package.module:name`` (a function, an ``nn.Module`` class without
arguments, a LightningModule class whose hyperparameters lie in the checkpoint, or a module that is there already), or
as a Hugging Face folder with a ``config.json``. Wherever it can be, it is built without memory for its weights, and
the weights are read into it one at a time.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from neuronscope.attach.module_paths import walk
from neuronscope.checkpoints.checkpoint import Checkpoint, StoredTensor
from neuronscope.checkpoints.data.user_code import user_code
from neuronscope.checkpoints.formats.byte_range import read_json
from neuronscope.errors import CheckpointError, MissingExtraError, UsageError

__all__ = ["build_model", "load_named", "load_weights"]


def load_named(name: str, argument: str) -> Any:
    """What ``package.module:name`` names, looked for in the current folder too.

    Args:
        name: The name.
        argument: Of the argument that it was given as, for errors.

    Raises:
        UsageError: There is no such module, or no such name in it; or the module fails or exits when it is imported.

    >>> load_named("math:tau", "model")
    6.283185307179586
    """
    module_name, _, attribute = name.partition(":")
    if not module_name or not attribute:
        raise UsageError(f"Expected argument `{argument}` to be like `package.module:name`, but got {name!r}.")
    expected = f"Expected argument `{argument}` to name a module that can be imported"
    with _current_folder(), user_code(expected, subject=repr(module_name)):
        found = importlib.import_module(module_name)
        for part in attribute.split("."):
            if not hasattr(found, part):
                raise UsageError(
                    f"Expected argument `{argument}` to name something, but {module_name} has no {attribute!r}."
                )
            found = getattr(found, part)
    return found


@contextlib.contextmanager
def _current_folder() -> Iterator[None]:
    """The current folder can be imported from, as it can where Python is run with a script or ``-m``."""
    here = str(Path.cwd())
    known = here in sys.path or "" in sys.path
    if not known:
        sys.path.insert(0, here)
    try:
        yield
    finally:
        if not known and here in sys.path:
            sys.path.remove(here)


def build_model(model: nn.Module | str | Path | Callable[..., nn.Module], checkpoint: Checkpoint) -> nn.Module:
    """A network with the checkpoint's weights in it, in evaluation mode.

    Args:
        model: What the user names: see above. A class gets those of the checkpoint's hyperparameters that it takes,
            as by Lightning's ``load_from_checkpoint``.
        checkpoint: Where the weights are.

    Returns:
        The network. A module that was given is itself filled, and returned.

    Raises:
        UsageError: ``model`` names no network, or the network cannot be built.
        CheckpointError: The weights do not fit it.
        MissingExtraError: A Hugging Face folder, and transformers is not installed.
    """
    if isinstance(model, (str, Path)):
        named = str(model)
        if ":" in named and not Path(named).exists():
            model = load_named(named, "model")
        else:
            folder = Path(named)
            config = folder if folder.name == "config.json" else folder / "config.json"
            if not config.is_file():
                raise UsageError(
                    "Expected argument `model` to be `package.module:name`, a torch.nn.Module, or a folder with a "
                    f"`config.json`, but got {named!r}."
                )
            model = _hugging_face(read_json(config))
    if not isinstance(model, nn.Module):
        model = _called(model, checkpoint.hyperparameters)
    load_weights(model, checkpoint)
    return model.eval()


def _called(factory: Any, hyperparameters: Mapping[str, Any]) -> nn.Module:
    if not callable(factory):
        raise UsageError(
            f"Expected argument `model` to name a function or a class, but got a {type(factory).__name__}."
        )
    name = getattr(factory, "__qualname__", repr(factory))
    with user_code(f"Expected the arguments of `{name}` to be known"):
        arguments = _taken(factory, hyperparameters) if isinstance(factory, type) else {}
    built = _attempt(factory, arguments, name)
    if not isinstance(built, nn.Module):
        given = "None" if built is None else f"a {type(built).__name__}"
        raise UsageError(f"Expected `{name}` to give a torch.nn.Module, but it gave {given}.")
    return built


def _taken(factory: type, hyperparameters: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the hyperparameters that a class takes as arguments."""
    parameters = inspect.signature(factory).parameters.values()
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return dict(hyperparameters)
    return {each.name: hyperparameters[each.name] for each in parameters if each.name in hyperparameters}


def _attempt(factory: Callable[..., Any], arguments: dict[str, Any], name: str) -> Any:
    """Build without memory where that works: not where numbers are made that no checkpoint keeps, or computed with."""
    given = f" with the checkpoint's hyperparameters {sorted(arguments)}" if arguments else ""
    with user_code(f"Expected `{name}` to build a network{given}", "Name a function without arguments that builds it."):
        with contextlib.suppress(Exception), torch.device("meta"):
            built = factory(**arguments)
            if _is_saved_whole(built):
                return built
        return factory(**arguments)


def _is_saved_whole(built: Any) -> bool:
    """Whether a checkpoint keeps all tensors of a network: no other buffers, and none that are mere attributes.

    A parametrization may register buffers according to the numbers that it finds, so it must find some.
    """
    return isinstance(built, nn.Module) and not any(
        module._non_persistent_buffers_set
        or is_parametrized(module)
        or any(isinstance(value, Tensor) for value in vars(module).values())
        for module in built.modules()
    )


def _hugging_face(config: Any) -> nn.Module:
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
    built: nn.Module = _attempt(lambda: network(network.config_class.from_dict(config)), {}, network.__name__)
    return built


def load_weights(model: nn.Module, checkpoint: Checkpoint) -> None:
    """Read a checkpoint's tensors into a network, one at a time.

    Names may differ by a prefix that all share (``model.``, as where a LightningModule holds the network). On a
    network without memory the tensors themselves become its weights, else they are copied into those that are there.

    Args:
        model: The network.
        checkpoint: Where the weights are.

    Raises:
        CheckpointError: Tensors are missing, left over, or of another shape.
    """
    wanted = dict(_slots(model))
    names = _matched(wanted, checkpoint.tensors)
    problems = []
    tied = {id(tensor): name for name, (_, _, tensor) in wanted.items() if name in names}
    missing = [name for name, (_, _, tensor) in wanted.items() if name not in names and id(tensor) not in tied]
    taken = set(names.values())
    surplus = [name for name in checkpoint.tensors if name not in taken]
    wrong = [
        f"{name} {tuple(wanted[name][2].shape)} ≠ {tuple(checkpoint.tensors[stored].shape)}"
        for name, stored in names.items()
        if tuple(wanted[name][2].shape) != tuple(checkpoint.tensors[stored].shape)
    ]
    lossy = [
        name
        for name, stored in names.items()
        if "complex" in checkpoint.tensors[stored].dtype and not wanted[name][2].is_complex()
    ]
    for what, found in (
        ("missing", missing),
        ("unexpected", surplus),
        ("of another shape", wrong),
        ("complex, where real numbers are wanted", lossy),
    ):
        if found:
            problems.append(f"{len(found)} {what} ({_few(found)})")
    if problems:
        raise CheckpointError(
            f"Expected the weights of {checkpoint.path} to fit {type(model).__name__}, but there are "
            f"{'; '.join(problems)}. Is it the network that this checkpoint was saved from? "
            f"{' '.join(checkpoint.notes)}".rstrip()
        )
    _fill(wanted, names, checkpoint.tensors)
    _require_memory(model, checkpoint)


def _slots(model: nn.Module) -> Iterator[tuple[str, tuple[nn.Module, str, Tensor]]]:
    """Every parameter and every buffer that is saved, with the module and the name it is kept under."""
    for path, module in walk(model):
        for table in (module._parameters, module._buffers):
            for name, tensor in table.items():
                if tensor is not None and name not in module._non_persistent_buffers_set:
                    yield f"{path}.{name}" if path else name, (module, name, tensor)


def _matched(wanted: Iterable[str], stored: Iterable[str]) -> dict[str, str]:
    """The network's names → the checkpoint's: equal, or equal but for a prefix that one side has throughout."""
    ours, theirs = list(wanted), set(stored)
    prefixes = {""} | {name[: -len(own)] for own in ours[:1] for name in theirs if name.endswith(f".{own}")}
    best: dict[str, str] = {}
    for prefix in sorted(prefixes, key=len):
        added = {own: prefix + own for own in ours if prefix + own in theirs}
        best = max(best, added, key=len)
    for head in {own.partition(".")[0] + "." for own in ours}:
        taken = {
            own: own.removeprefix(head) for own in ours if own.startswith(head) and own.removeprefix(head) in theirs
        }
        best = max(best, taken, key=len)
    return best


def _fill(
    wanted: Mapping[str, tuple[nn.Module, str, Tensor]], names: Mapping[str, str], stored: Mapping[str, StoredTensor]
) -> None:
    made: dict[int, Tensor] = {}  # weights that two modules share are read once
    with torch.no_grad():
        for name, (module, slot, tensor) in sorted(wanted.items(), key=lambda item: item[0] not in names):
            if id(tensor) in made:
                new = made[id(tensor)]
            elif name in names:
                read = stored[names[name]].read()
                if tensor.device.type != "meta":
                    tensor.copy_(read)
                    continue
                new = read if read.dtype == tensor.dtype else read.to(tensor.dtype)
                new = nn.Parameter(new, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else new
                made[id(tensor)] = new
            else:
                continue
            table: dict[str, Any] = module._parameters if slot in module._parameters else module._buffers
            table[slot] = new


def _require_memory(model: nn.Module, checkpoint: Checkpoint) -> None:
    """What a checkpoint does not keep (non-persistent buffers) must not be left without memory."""
    left = [
        name for name, tensor in (*model.named_parameters(), *model.named_buffers()) if tensor.device.type == "meta"
    ]
    if left:
        raise CheckpointError(
            f"Expected the weights of {checkpoint.path} to fill {type(model).__name__}, but {len(left)} tensors are "
            f"left without numbers ({_few(left)})."
        )


def _few(names: list[str], count: int = 3) -> str:
    return ", ".join(names[:count]) + (" …" if len(names) > count else "")
