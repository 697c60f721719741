"""Find out how many independent examples a forward was given.

The number is the sample size of every dead verdict, so it may be too small, and never too large. Where two readings of
the input are possible, the smaller number is taken, because it holds in both. Where no number holds, none is claimed.

- A tensor has as many examples as rows: its dimension 0. The first tensor in the order of the forward's parameters
  counts, also inside lists, tuples, mappings, dataclasses and other objects.
- A list (or tuple) of tensors is either a list of examples or a list of inputs. Tensors with three dimensions are
  images, and tensors of one rank with different lengths are sequences: each is one example. Tensors of different ranks
  with one length are several inputs of the same rows. For all other lists, the smaller of the number of members and the
  number of rows is taken.
- A batch of graphs has as many examples as its ``num_graphs`` says; a packed sequence as many as it has sequences.
- A forward that continues earlier ones, with a key-value cache or with the last tokens and one more, adds none. One
  that is given a state which the model returned the last time is one forward with the last; see `forward`.
- A model with a module that takes its time dimension first (``batch_first=False``, torch's default) may be given its
  examples on dimension 1. So the smaller of both dimensions is taken, until such a module was seen to get the rows of
  the model's input on its dimension 1.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Iterable, Mapping
from types import FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.utils.rnn import PackedSequence

from neuronscope.attach.call_arguments import CACHE_NAMES, CACHES, STARTS, CallArguments, inputs_only
from neuronscope.attach.compiling import is_tracing, seen_by_modes, unwatched
from neuronscope.attach.dtensor import local_tensor
from neuronscope.attach.generation import Generation
from neuronscope.attach.unsupported import in_transform
from neuronscope.errors import NeuronscopeWarning
from neuronscope.options import Examples

__all__ = ["ExampleCounter", "all_tensors", "continues_earlier", "count_examples", "first_tensor", "is_time_first"]

#: How deep, and in how many containers, tensors are looked for in what a forward was given.
_DEEPEST = 8
_MOST_CONTAINERS = 1000
#: Objects of these classes are no containers, whatever their attributes are.
_NO_CONTAINERS = (str, bytes, int, float, type, nn.Module, FunctionType, MethodType, ModuleType)


class ExampleCounter:
    """Counts the independent examples that each forward of a model is given.

    Args:
        option: The option ``examples`` of :func:`neuronscope.watch`.
        model: The model.
        arguments: Names the arguments of its modules' forwards.
    """

    def __init__(self, option: Examples, model: nn.Module, arguments: CallArguments) -> None:
        self._option = option
        self._eager_option = torch.compiler.disable(option) if callable(option) else None
        self._arguments = arguments
        self._time_first = option == "auto" and any(is_time_first(module) for module in model.modules())
        self._takes_rows = option == "auto" and not self._time_first
        self._rows_confirmed = False  # a time-first module was given the rows of the input on its dimension 1
        self._rows_refuted = False  # a time-first module was given them on its dimension 0
        self._rows = 0  # of the forward that runs
        self._generation = Generation()
        self._warned = False
        self._takes_batch: dict[type, bool] = {}  # of classes of modules: whether their first argument is no cache

    def count(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int | None:
        """Return the number of examples that a forward adds. Call it once when an outermost forward begins.

        While ``torch.compile`` traces, only the shapes of tensors are used, and the number may be a ``SymInt``.

        Args:
            module: The outermost module that is called.
            args: Positional arguments of its forward.
            kwargs: Keyword arguments of its forward.

        Returns:
            The number of examples, ≥ 0; ``None`` if no number is claimed.
        """
        option = self._option
        if option is None:
            return None
        if callable(option):
            return self._ask(option, args, kwargs)
        traced = is_tracing()
        alone = len(args) == 1 and type(args[0]) is Tensor and not (kwargs or traced or seen_by_modes())
        if alone and self._takes_rows and self._is_batch(module, args[0]):
            return int(args[0].size(0))  # a nested tensor has no shape
        with unwatched(traced):
            return self._count(option, module, self._arguments.named(module, args, kwargs))

    def count_step(self, inputs: tuple[Any, ...]) -> int | None:
        """Return the number of examples that a training step is given; ``None`` if its forwards must be asked.

        Args:
            inputs: What the step is given, such as its batch.
        """
        if not isinstance(self._option, (int, str)):
            return None
        with unwatched():
            return self._rows_of(self._option, list(inputs), first_tensor(inputs))

    def _is_batch(self, module: nn.Module, x: Tensor) -> bool:
        """Whether the only input of a module is a batch beyond doubt: most forwards are spared the longer search."""
        if x.dim() == 0 or not (torch.is_grad_enabled() or x.is_floating_point()):  # tokens: see `generation`
            return False
        self._generation.forget()
        kind = type(module)
        if kind not in self._takes_batch:
            self._takes_batch[kind] = CACHE_NAMES.isdisjoint(self._arguments.names(module)[:1])
        return self._takes_batch[kind]

    def _count(self, option: int | str, module: nn.Module, named: Mapping[str, Any]) -> int | None:
        if continues_earlier(named):
            return 0
        inputs = list(inputs_only(named).values())
        tensor = first_tensor(inputs)
        if not is_tracing():
            if torch.is_grad_enabled() or (tensor is not None and not _has_numbers(tensor)):
                self._generation.forget()
            elif self._generation.goes_on(module, all_tensors(inputs)):
                return 0
        return self._rows_of(option, inputs, tensor)

    def _rows_of(self, option: int | str, inputs: list[Any], tensor: Tensor | None) -> int | None:
        if isinstance(option, int):
            fits = tensor is not None and -tensor.dim() <= option < tensor.dim()
            return _size(tensor, option) if tensor is not None and fits else None
        examples = count_examples(inputs)
        if not self._time_first or examples is None or tensor is None:
            return examples
        if not is_tracing():
            self._rows = examples
        sure = self._rows_confirmed and not self._rows_refuted
        if not sure and tensor.dim() > 1 and _size(tensor, 0) == examples:
            examples = min(examples, _size(tensor, 1))
        return examples

    def note_layout(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Learn from the input ``(time, batch, feature)`` of a time-first module which dimension holds the examples.

        Call it when a module begins for which :func:`is_time_first` holds. It does nothing while ``torch.compile``
        traces: the number then stays the smaller one.

        Args:
            module: The module.
            args: Positional arguments of its forward.
            kwargs: Keyword arguments of its forward.
        """
        if is_tracing() or not self._time_first:
            return
        with unwatched():
            tensor = first_tensor(list(self._arguments.named(module, args, kwargs).values()))
            if tensor is None or tensor.dim() != 3:
                return
            time, batch = _size(tensor, 0), _size(tensor, 1)
        if time != batch:
            self._rows_confirmed |= batch == self._rows
            self._rows_refuted |= time == self._rows

    def _ask(self, option: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int | None:
        """Return what the user's function says; ``None`` with one warning if that is no number of examples."""
        if is_tracing():
            answer = option(args, kwargs)
            return answer if isinstance(answer, (int, torch.SymInt)) else None  # type: ignore[return-value]
        try:
            answer = self._eager_option(args, kwargs) if self._eager_option else None
            problem = f"it returned {answer!r}"
        except Exception as error:  # noqa: BLE001  # the training goes on
            answer, problem = -1, f"it raised {error!r}"
        if answer is None or (isinstance(answer, int) and not isinstance(answer, bool) and answer >= 0):
            return answer
        if not self._warned:
            self._warned = True
            warnings.warn(
                "Expected the function of argument `examples` to return a number of examples of at least 0, or None, "
                f"but {problem}: no bound is claimed for this forward.",
                NeuronscopeWarning,
                stacklevel=2,
            )
        return None


def is_time_first(module: nn.Module) -> bool:
    """Whether a module takes ``(time, batch, feature)``, as torch's recurrent layers and attention do by default.

    >>> is_time_first(nn.LSTM(2, 3)), is_time_first(nn.LSTM(2, 3, batch_first=True)), is_time_first(nn.Linear(2, 3))
    (True, False, False)
    """
    return getattr(module, "batch_first", None) is False


def continues_earlier(named: Mapping[str, Any]) -> bool:
    """Whether a forward continues earlier ones: it is given a cache that is not empty, or a position behind the first.

    A position is looked at without gradients only. It is a number above zero, or a tensor that holds one. On a device,
    which would have to be waited for, any tensor with one number is taken for a position behind the first. A cache that
    requires gradients does not count: it is a trained prefix (prefix tuning). A cache object counts while
    ``torch.compile`` traces, whatever it holds, because the tracer cannot look into it.

    Args:
        named: The arguments of the forward by name.

    >>> continues_earlier({"x": torch.ones(2, 1), "past": [torch.ones(2, 4, 8)]})
    True
    >>> continues_earlier({"x": torch.ones(2, 5), "past": None})
    False
    >>> with torch.no_grad():
    ...     continues_earlier({"tokens": torch.ones(2, 1), "start_pos": 5})
    True
    """
    if not torch.is_grad_enabled():  # with gradients a text may begin anywhere
        for name in STARTS:
            if name in named and _is_later(named[name]):
                return True
    if not is_tracing() and CACHE_NAMES.isdisjoint(named):
        return False
    for name in CACHES:  # noqa: SIM110  # no generator: see `call_arguments`
        if name in named and _holds_states(named[name]):
            return True
    return False


def _is_later(start: Any) -> bool:
    """Whether the position at which a forward's tokens begin is behind the first; see :func:`continues_earlier`."""
    if isinstance(start, Tensor):
        return start.numel() == 1 and (not start.is_cpu or not _has_numbers(start) or bool(start > 0))
    return not is_tracing() and isinstance(start, int) and start > 0


def _has_numbers(tensor: Tensor) -> bool:
    """Whether the numbers of a tensor can be read: not while it is traced, nor in a transform, nor if it is a fake."""
    return not is_tracing() and not in_transform(tensor) and not isinstance(tensor, FakeTensor)


def _holds_states(cache: Any) -> bool:
    if cache is None:
        return False
    if is_tracing() and not isinstance(cache, (Tensor, tuple, list, Mapping)):
        return True
    return _search(cache, _is_state, _DEEPEST, set()) is not None


def count_examples(values: Iterable[Any]) -> int | None:
    """Return the number of examples in the first of some values that holds a tensor.

    The module's docstring has the rules. A tensor without dimensions is no batch, and is passed over.

    Args:
        values: What a forward was given, in the order of its parameters.

    Returns:
        The number of examples; ``None`` if there is no tensor with a dimension.

    >>> count_examples([torch.ones(4, 2), torch.ones(3)])
    4
    >>> count_examples([[torch.ones(3, 8, 8), torch.ones(3, 8, 8)]]), count_examples([[torch.ones(9, 2)]])
    (2, 1)
    >>> count_examples([{"x": torch.ones(5, 2)}]), count_examples(["text"])
    (5, None)
    """
    for value in values:
        found = _count(value, _DEEPEST, set())
        if found is not None:
            return found
    return None


def first_tensor(value: Any) -> Tensor | None:
    """Return the first tensor with a dimension in nested lists, tuples, mappings, dataclasses and other objects.

    Returns:
        The tensor, of any shape; ``None`` if no tensor was found.
    """
    return _search(value, _has_rows, _DEEPEST, set())


def all_tensors(value: Any) -> list[Tensor]:
    """Return every tensor in nested lists, tuples, mappings, dataclasses and other objects."""
    found: list[Tensor] = []
    _collect(value, found, _DEEPEST, set())
    return found


def _collect(value: Any, found: list[Tensor], depth: int, seen: set[int]) -> None:
    """Add every tensor in a value to a list; the other arguments are those of :func:`_search`."""
    if isinstance(value, Tensor):
        found.append(value)
    elif _may_hold_tensors(value, depth, seen):
        for member in _members(value):
            _collect(member, found, depth - 1, seen)


def _has_rows(tensor: Tensor) -> bool:
    return tensor.dim() > 0


def _is_state(tensor: Tensor) -> bool:
    return tensor.numel() > 0 and not tensor.requires_grad


def _count(value: Any, depth: int, seen: set[int]) -> int | None:
    if isinstance(value, Tensor):
        return _size(value, 0) if value.dim() > 0 else None
    if not _may_hold_tensors(value, depth, seen):
        return None
    if isinstance(value, PackedSequence):
        return None if is_tracing() else int(value.batch_sizes[0])  # these are always on the CPU
    graphs = _number_of_graphs(value)
    if graphs is not None:
        return graphs
    if isinstance(value, (list, tuple)) and not hasattr(value, "_fields"):
        return _count_members(value, depth - 1, seen)
    for member in _members(value):
        found = _count(member, depth - 1, seen)
        if found is not None:
            return found
    return None


def _count_members(members: list[Any] | tuple[Any, ...], depth: int, seen: set[int]) -> int | None:
    """Return the number of examples in a list: see the module's docstring."""
    first = rows = None
    number, one_rank, one_length = 0, True, True
    for member in members:
        tensor = _search(member, _has_rows, depth, set())
        if tensor is None:
            continue
        number += 1
        if first is None:
            first, rows = tensor, _count(member, depth, seen)
        one_rank = one_rank and tensor.dim() == first.dim()
        one_length = one_length and _size(tensor, 0) == _size(first, 0)
    if first is None or rows is None:
        return None
    if one_rank and (first.dim() == 3 or not one_length):
        return number
    return rows if one_length and not one_rank else min(number, rows)


def _number_of_graphs(value: Any) -> int | None:
    """Return ``num_graphs`` of a batch of graphs; ``None`` for everything else."""
    if is_tracing() or isinstance(value, (list, tuple, dict)):
        return None
    try:
        graphs = getattr(value, "num_graphs", None)
    except Exception:  # noqa: BLE001  # whatever a property of the user's class does
        return None
    return graphs if isinstance(graphs, int) and not isinstance(graphs, bool) else None


def _search(value: Any, wanted: Callable[[Tensor], bool], depth: int, seen: set[int]) -> Tensor | None:
    """Return the first tensor in a value that is wanted.

    Args:
        value: What to look into.
        wanted: A function that returns whether a tensor is wanted.
        depth: How many containers deep to look.
        seen: The ``id`` of every container that was looked into; this adds to it.
    """
    if isinstance(value, Tensor):
        return value if wanted(value) else None
    if not _may_hold_tensors(value, depth, seen):
        return None
    for member in _members(value):
        found = _search(member, wanted, depth - 1, seen)
        if found is not None:
            return found
    return None


def _may_hold_tensors(value: Any, depth: int, seen: set[int]) -> bool:
    """Whether to look into a value, which is then seen. Objects may refer to each other, and to half of a program."""
    if value is None or depth == 0 or isinstance(value, _NO_CONTAINERS):
        return False
    if is_tracing():
        return True
    if id(value) in seen or len(seen) >= _MOST_CONTAINERS:
        return False
    seen.add(id(value))
    return True


def _members(value: Any) -> list[Any]:
    """Return what a container holds. Objects are looked into in eager mode only: the tracer may not know them."""
    if isinstance(value, Mapping):
        return list(value.values())
    if isinstance(value, (list, tuple)):
        return list(value)
    if is_tracing():
        return []
    if dataclasses.is_dataclass(value):
        values = []
        for field in dataclasses.fields(value):
            values.append(getattr(value, field.name, None))  # noqa: PERF401  # no comprehension: see `call_arguments`
        return values
    return list(getattr(value, "__dict__", {}).values())


def _size(tensor: Tensor, dim: int) -> int:
    return local_tensor(tensor).size(dim)
