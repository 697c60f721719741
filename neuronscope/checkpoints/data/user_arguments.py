"""Resolve the arguments `data`, `loss` and `example` of a post-mortem, and check them with errors of one sentence."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from neuronscope.checkpoints.formats.file_tensor import find_dtype
from neuronscope.checkpoints.user_code import load_named, user_code
from neuronscope.errors import UsageError

__all__ = ["check_batches", "first_batch", "resolve_batches", "resolve_example", "resolve_loss"]

#: The two ways to write an example input as text, for messages.
_EXAMPLE_FORMATS = (
    "a shape such as `1x3x224x224` (several inputs: `1x3x224x224,1x7`; another dtype: `1x16:int64`), or the "
    "`package.module:name` of a function that returns the example"
)

_GIVES_BATCHES = "Expected `data` to give batches"
_END = object()
_SHAPE = re.compile(r"([1-9]\d*(?:x[1-9]\d*)*)(?::(\w+))?")


def resolve_batches(data: Iterable[Any] | str | Callable[[], Iterable[Any]] | None) -> Iterable[Any] | None:
    """Return the user's batches, from batches, a function that returns them, or ``pkg.mod:name`` of either.

    Raises:
        UsageError: ``data`` is none of these, or the function fails.

    >>> list(resolve_batches(lambda: [1, 2]))
    [1, 2]
    """
    if data is None:
        return None
    found: Any = load_named(data, "data") if isinstance(data, str) else data
    is_factory = callable(found) and not hasattr(found, "__iter__")
    if is_factory:
        with user_code(f"Expected {_named('data', data)} to make batches"):
            found = found()
    if isinstance(found, Tensor):
        return (found,)
    if isinstance(found, (str, bytes)) or not hasattr(found, "__iter__"):
        got = f"{'it returned' if is_factory else 'got'} {_describe(found)}"
        raise UsageError(
            f"Expected argument {_named('data', data)} to be batches or a function that returns them, but {got}."
        )
    batches: Iterable[Any] = found
    return batches


def check_batches(batches: Iterable[Any]) -> Iterator[Any]:
    """Yield the user's batches; raise a UsageError if an item is not a batch, or the user's code fails."""
    with user_code(_GIVES_BATCHES):
        iterator = iter(batches)
    while True:
        with user_code(_GIVES_BATCHES):
            batch = next(iterator, _END)
        if batch is _END:
            return
        if not _holds_input(batch[:1] if isinstance(batch, (tuple, list)) else batch):
            raise UsageError(
                "Expected each batch of `data` to be a tensor, a tuple or list that begins with the model's input, or "
                f"a mapping of the model's arguments, but got {_describe(batch)}."
            )
        yield batch


def first_batch(batches: Iterable[Any] | None) -> tuple[Any, Iterable[Any] | None]:
    """Return the first batch, and batches that still start with it even if they can be iterated only once.

    Without batches, both are ``None``.

    Raises:
        UsageError: There is no batch, the first item is not a batch, or the user's code fails.

    >>> first, every = first_batch(iter([torch.zeros(1), torch.ones(1)]))
    >>> first, list(every)
    (tensor([0.]), [tensor([0.]), tensor([1.])])
    """
    if batches is None:
        return None, None
    with user_code(_GIVES_BATCHES):
        iterator = iter(batches)
    first = next(check_batches(iterator), _END)
    if first is _END:
        raise UsageError("Expected argument `data` to yield at least one batch, but it gave none.")
    with user_code(_GIVES_BATCHES):
        return first, (batches if iter(batches) is not iterator else chain([first], iterator))


def resolve_loss(loss: Callable[[Any, Any], Tensor] | str | None) -> Callable[[Any, Any], Tensor] | None:
    """Return the user's loss function, or the one that ``pkg.mod:name`` names, with a check of what it returns."""
    if loss is None:
        return None
    name = _named("loss", loss)
    found: Any = load_named(loss, "loss") if isinstance(loss, str) else loss
    if not callable(found):
        raise UsageError(f"Expected argument {name} to be a function of (output, batch), but got {_describe(found)}.")

    def checked(output: Any, batch: Any) -> Tensor:
        with user_code(f"Expected {name} to compute a loss"):
            value = found(output, batch)
        if not isinstance(value, Tensor) or value.numel() != 1:
            raise UsageError(f"Expected {name} to return a tensor of one number, but it returned {_describe(value)}.")
        if not value.requires_grad:
            raise UsageError(
                f"Expected {name} to return a tensor that is computed from the output, but no gradient flows back from "
                "what it returned."
            )
        return value

    return checked


def resolve_example(example: Any, model: nn.Module) -> Any:
    """Return the user's example input; create it if the user gave a shape or a function.

    Args:
        example: A tensor, a tuple of positional arguments, a mapping of named arguments, a function that returns one
            of these, text (``1x3x224x224``, ``1x16:int64``, ``pkg.mod:name``), or ``None``.
        model: The network. Tensors that are created from a shape get the dtype of its parameters.

    Raises:
        UsageError: ``example`` is none of these, or the function fails.

    >>> [tensor.dtype for tensor in resolve_example("1x3,2x5x5:int64", nn.Linear(3, 1))]
    [torch.float32, torch.int64]
    """
    if example is None:
        return None
    found = example
    if isinstance(found, str):
        if ":" not in found or found[:1].isdigit():
            return _zeros(found, model)
        found = load_named(found, "example")
    if callable(found):
        with user_code(f"Expected {_named('example', example)} to make an example input"):
            found = found()
    if not _holds_input(found):
        raise UsageError(
            f"Expected argument {_named('example', example)} to give a tensor, a tuple of arguments or a mapping of "
            f"named ones, but it gave {_describe(found)}. As text, it is {_EXAMPLE_FORMATS}."
        )
    return found


def _named(argument: str, value: Any) -> str:
    """Return the name of an argument, with the name of its value if that has one."""
    name = value if isinstance(value, str) else getattr(value, "__qualname__", None)
    return f"`{argument}` ({name})" if isinstance(name, str) else f"`{argument}`"


def _holds_input(value: Any) -> bool:
    """Whether a model could take the value: it contains a non-empty tensor, or an object of an unknown type."""
    if isinstance(value, Tensor):
        return value.dim() > 0 and value.numel() > 0
    if isinstance(value, Mapping):
        return any(map(_holds_input, value.values()))
    if isinstance(value, (tuple, list)):
        return any(map(_holds_input, value))
    return not isinstance(value, (str, bytes, int, float, complex, type(None), type, nn.Module))


def _describe(value: Any) -> str:
    """Describe a value in a few words, for messages."""
    if value is None:
        return "None"
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    if isinstance(value, (tuple, list, Mapping)) and not value:
        return f"an empty {type(value).__name__}"
    begins = f" that begins with {_describe(value[0])}" if isinstance(value, (tuple, list)) else ""
    return f"{type(value).__name__}{begins}"


def _zeros(text: str, model: nn.Module) -> tuple[Tensor, ...]:
    """Return zeros of the shapes and dtypes that a text names, such as ``1x3,1x16:int64``."""
    default = next((one.dtype for one in model.parameters() if one.is_floating_point()), torch.get_default_dtype())
    tensors = []
    for part in text.split(","):
        match = _SHAPE.fullmatch(part.strip())
        dtype = default if match is None or match[2] is None else find_dtype(match[2])
        if match is None or dtype is None:
            raise UsageError(f"Expected argument `example` to be {_EXAMPLE_FORMATS}, but got {text!r}.")
        try:
            tensors.append(torch.zeros([int(size) for size in match[1].split("x")], dtype=dtype))
        except (RuntimeError, TypeError, OverflowError) as error:
            first = str(error).partition("\n")[0]
            raise UsageError(
                f"Expected argument `example` to be {_EXAMPLE_FORMATS}, but torch cannot create {text!r}: {first}"
            ) from error
    return tuple(tensors)
