"""Givens: what the user hands over to be called or gone through, made ready; its faults told in one sentence."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from neuronscope.checkpoints.data.user_code import user_code
from neuronscope.checkpoints.formats.lazy_tensor import find_dtype
from neuronscope.checkpoints.model.load_model import load_named
from neuronscope.errors import UsageError

__all__ = ["EXAMPLE_SPELLINGS", "batches_of", "checked_batches", "example_of", "first_of", "loss_of"]

#: The two ways to write an example as text, for messages.
EXAMPLE_SPELLINGS = (
    "a shape, as `1x3x224x224` (several inputs: `1x3x224x224,1x7`; of another type: `1x16:int64`), or the "
    "`package.module:name` of a function that makes the example"
)

_GIVES_BATCHES = "Expected `data` to give batches"
_END = object()
_SHAPE = re.compile(r"([1-9]\d*(?:x[1-9]\d*)*)(?::(\w+))?")


def batches_of(data: Iterable[Any] | str | Callable[[], Iterable[Any]] | None) -> Iterable[Any] | None:
    """The user's batches, made where they are still to be made.

    Args:
        data: Batches, a function that makes them, ``pkg.mod:name`` of either, or ``None``.

    Raises:
        UsageError: It is nothing of the kind, or the function fails.

    >>> list(batches_of(lambda: [1, 2]))
    [1, 2]
    """
    if data is None:
        return None
    found: Any = load_named(data, "data") if isinstance(data, str) else data
    made = callable(found) and not hasattr(found, "__iter__")
    if made:
        with user_code(f"Expected {_named('data', data)} to make batches"):
            found = found()
    if isinstance(found, Tensor):
        return (found,)
    if isinstance(found, (str, bytes)) or not hasattr(found, "__iter__"):
        came = f"{'it returned' if made else 'got'} {_described(found)}"
        raise UsageError(
            f"Expected argument {_named('data', data)} to be batches or a function that returns them, but {came}."
        )
    batches: Iterable[Any] = found
    return batches


def checked_batches(batches: Iterable[Any]) -> Iterator[Any]:
    """Go through the user's batches, each of which must be one.

    Args:
        batches: Any batches.

    Raises:
        UsageError: One is no batch, or making one fails.
    """
    with user_code(_GIVES_BATCHES):
        iterator = iter(batches)
    while (batch := _next_of(iterator)) is not _END:
        yield batch


def first_of(batches: Iterable[Any] | None) -> tuple[Any, Iterable[Any] | None]:
    """The first batch, and batches that still begin with it, also where they can be gone through but once.

    Args:
        batches: Any batches; where there are none at all (``None``), there is no first one.

    Raises:
        UsageError: There is none in them, or the first one fails or is no batch.

    >>> first, every = first_of(iter([torch.zeros(1), torch.ones(1)]))
    >>> first, list(every)
    (tensor([0.]), [tensor([0.]), tensor([1.])])
    """
    if batches is None:
        return None, None
    with user_code(_GIVES_BATCHES):
        iterator = iter(batches)
    first = _next_of(iterator)
    if first is _END:
        raise UsageError("Expected argument `data` to yield at least one batch, but it gave none.")
    with user_code(_GIVES_BATCHES):
        return first, (batches if iter(batches) is not iterator else chain([first], iterator))


def loss_of(loss: Callable[[Any, Any], Tensor] | str | None) -> Callable[[Any, Any], Tensor] | None:
    """The user's loss, looked up where it is named; it raises where it gives no loss.

    Args:
        loss: The function, its ``pkg.mod:name``, or ``None``.

    Raises:
        UsageError: It cannot be called.
    """
    if loss is None:
        return None
    name = _named("loss", loss)
    found: Any = load_named(loss, "loss") if isinstance(loss, str) else loss
    if not callable(found):
        raise UsageError(f"Expected argument {name} to be called with (output, batch), but got {_described(found)}.")

    def checked(output: Any, batch: Any) -> Tensor:
        with user_code(f"Expected {name} to compute a loss"):
            value = found(output, batch)
        if not isinstance(value, Tensor) or value.numel() != 1:
            raise UsageError(f"Expected {name} to return a tensor of one number, but it returned {_described(value)}.")
        if not value.requires_grad:
            raise UsageError(
                f"Expected {name} to return a tensor that is computed from the output, but it returned one that no "
                "gradient flows back from."
            )
        return value

    return checked


def example_of(example: Any, model: nn.Module) -> Any:
    """The user's example input, made where it is still to be made.

    Args:
        example: A tensor, a tuple of arguments, a mapping of named ones, a function that makes one of these, or text:
            see :data:`EXAMPLE_SPELLINGS`; or ``None``.
        model: The network that it is for; tensors made from a shape are of its parameters' type.

    Raises:
        UsageError: It is nothing of the kind, or the function fails.

    >>> [tensor.dtype for tensor in example_of("1x3,2x5x5:int64", nn.Linear(3, 1))]
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
            f"named ones, but it gave {_described(found)}. As text it is {EXAMPLE_SPELLINGS}."
        )
    return found


def _next_of(iterator: Iterator[Any]) -> Any:
    """The next batch; ``_END`` behind the last."""
    with user_code(_GIVES_BATCHES):
        batch = next(iterator, _END)
    given = batch[:1] if isinstance(batch, (tuple, list)) else batch
    if batch is not _END and not _holds_input(given):
        raise UsageError(
            "Expected each batch of `data` to be a tensor, a tuple or list that begins with the model's input, or a "
            f"mapping of the model's arguments, but got {_described(batch)}."
        )
    return batch


def _named(argument: str, given: Any) -> str:
    """The argument with what the user gave for it, where that has a name."""
    name = given if isinstance(given, str) else getattr(given, "__qualname__", None)
    return f"`{argument}` ({name})" if isinstance(name, str) else f"`{argument}`"


def _holds_input(value: Any) -> bool:
    """Whether a model could be run on it: it has a tensor with numbers for examples, or something not known here."""
    if isinstance(value, Tensor):
        return value.dim() > 0 and value.numel() > 0
    if isinstance(value, Mapping):
        return any(map(_holds_input, value.values()))
    if isinstance(value, (tuple, list)):
        return any(map(_holds_input, value))
    return not isinstance(value, (str, bytes, int, float, complex, type(None), type, nn.Module))


def _described(value: Any) -> str:
    """What it is, in a few words."""
    if value is None:
        return "None"
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    if isinstance(value, (tuple, list, Mapping)) and not value:
        return f"an empty {type(value).__name__}"
    begins = f" that begins with {_described(value[0])}" if isinstance(value, (tuple, list)) else ""
    return f"{type(value).__name__}{begins}"


def _zeros(text: str, model: nn.Module) -> tuple[Tensor, ...]:
    """Zeros of the shapes and types that a text names."""
    own = next((one.dtype for one in model.parameters() if one.is_floating_point()), torch.get_default_dtype())
    tensors = []
    for part in text.split(","):
        read = _SHAPE.fullmatch(part.strip())
        dtype = own if read is None or read[2] is None else find_dtype(read[2])
        if read is None or dtype is None:
            raise UsageError(f"Expected argument `example` to be {EXAMPLE_SPELLINGS}, but got {text!r}.")
        try:
            tensors.append(torch.zeros([int(size) for size in read[1].split("x")], dtype=dtype))
        except (RuntimeError, TypeError, OverflowError) as error:
            first = str(error).partition("\n")[0]
            raise UsageError(
                f"Expected argument `example` to be {EXAMPLE_SPELLINGS}, but torch cannot make {text!r}: {first}"
            ) from error
    return tuple(tensors)
