"""The table of names that a checkpoint's pickle may use, each with a function of ours that is called instead.

A tensor becomes a :class:`~neuronscope.checkpoints.formats.file_tensor.FileTensor`; objects that are known to be plain
data (a path, a random generator's state) become placeholders. Any other name is refused.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from neuronscope.checkpoints.formats.file_tensor import FileTensor, Storage, find_dtype, is_readable
from neuronscope.checkpoints.formats.restricted_pickle import Placeholder, SafeGlobal, UnsafeGlobalError, safe_key

__all__ = [
    "AttributesPlaceholder",
    "SkippedTensor",
    "StorageType",
    "UnknownType",
    "attributes_of",
    "find_safe_global",
    "not_built",
    "readable_type",
]


class SkippedTensor(Placeholder):
    """A tensor that is not read, with the reason, such as ``sparse``."""

    def __init__(self, reason: str) -> None:
        self.reason = reason


class AttributesPlaceholder(Placeholder):
    """Stands for an object of a class ``module.name``, with the attributes that the pickle gives it as ``state``."""

    def __init__(self, cls: str) -> None:
        self.cls = cls
        self.state: Any = {}

    def set_state(self, state: Any) -> None:
        """Keep the attributes."""
        self.state = state


class StorageType(Placeholder):
    """Stands for a class of storages, with the type of their numbers."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype


class UnknownType(Placeholder):
    """Stands for a dtype that the installed torch does not have, such as ``float4_e2m1fn_x2``."""

    def __init__(self, name: str) -> None:
        self.name = name


def readable_type(dtype: torch.dtype | UnknownType) -> torch.dtype | SkippedTensor:
    """Return the dtype, or a :class:`SkippedTensor` if its tensors cannot be read.

    >>> readable_type(torch.float16), readable_type(torch.bits8).reason
    (torch.float16, 'of type bits8')
    """
    if isinstance(dtype, UnknownType):
        return SkippedTensor(f"of type {dtype.name}")
    return dtype if is_readable(dtype) else SkippedTensor(f"of type {str(dtype).removeprefix('torch.')}")


class _NumpyType(Placeholder):
    """Stands for a dtype of numpy: its code, such as ``f8``."""

    def __init__(self, code: Any, *_: Any) -> None:
        self.code = code


def find_safe_global(module: str, name: str, more: Mapping[str, Any] | None = None) -> Any:
    """Return what stands for a name in a pickle; raise an :class:`UnsafeGlobalError` if it is not in the table.

    Args:
        module: Name of the module.
        name: The name in the module.
        more: Further names that one format uses, by ``module.name``.

    >>> find_safe_global("torch", "float16")
    torch.float16
    >>> find_safe_global("os", "system")
    Traceback (most recent call last):
        ...
    neuronscope.checkpoints.formats.restricted_pickle.UnsafeGlobalError: 'A pickle' names 'os.system', which would ...
    """
    full = f"{module}.{name}"
    found = (more or {}).get(full, _TABLE.get(_RENAMED.get(module, module) + "." + name))
    if found is None and module == "torch":
        found = find_dtype(name) or (UnknownType(name) if _NUMBER_TYPE.fullmatch(name) else None)
    if found is None:
        raise UnsafeGlobalError(full)
    return found


def _rebuild(
    storage: Any, offset: Any, size: Any, stride: Any, *_: Any, dtype: torch.dtype | UnknownType | None = None
) -> Any:
    if not isinstance(storage, Storage):
        raise ValueError("a tensor is made of something that is not a storage")
    known = readable_type(storage.dtype if dtype is None else dtype)
    if isinstance(known, SkippedTensor):
        return known
    tensor = FileTensor(storage, known, size, stride, offset)
    storage.views.append(tensor)
    return tensor


def _rebuild_typed(storage: Any, offset: Any, size: Any, stride: Any, _: Any, __: Any, dtype: Any, *___: Any) -> Any:
    if not isinstance(dtype, torch.dtype | UnknownType):
        raise ValueError("a tensor has something that is not a dtype as its dtype")
    return _rebuild(storage, offset, size, stride, dtype=dtype)


def _rebuild_wrapper(cls: Any, *_: Any) -> SkippedTensor:
    """Leave out a tensor whose class decides what its numbers are."""
    if not isinstance(cls, SafeGlobal):
        raise ValueError("a tensor is made by something that does not make tensors")
    return SkippedTensor(f"of the type {cls.name.rpartition('.')[2]} of {cls.name.partition('.')[0]}")


def _rebuild_subclass(function: Any, cls: Any, arguments: Any, *_: Any) -> Any:
    """Read an instance of a tensor subclass as the plain tensor inside; subclasses of others are not in the table."""
    if not isinstance(function, SafeGlobal) or not isinstance(cls, SafeGlobal) or not isinstance(arguments, tuple):
        raise ValueError("a tensor is made by something that does not make tensors")
    return function.make(*arguments)


def _first(value: Any, *_: Any) -> Any:
    return value


def _pairs(*arguments: Any) -> dict[Any, Any]:
    """Return a dictionary, empty or from pairs."""
    (pairs,) = arguments if arguments else ((),)
    pairs = pairs.items() if isinstance(pairs, dict) else pairs
    return {safe_key(key): value for key, value in pairs}


def _as_set(items: Any = ()) -> set[Any]:
    return {safe_key(item) for item in items}


def _encoded(text: Any, encoding: Any = "latin1") -> bytes:
    """Return bytes that a pickle of protocol 2 stores as text."""
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
        raise ValueError("bytes are written in an unknown encoding")
    return text.encode("latin-1")


def _bytes(content: Any = b"", *_: Any) -> bytes:
    if not isinstance(content, bytes | bytearray):
        raise ValueError("bytes are made of something that is not bytes")
    return bytes(content)


def _numpy_scalar(kind: Any, content: Any = b"") -> Any:
    """Return a scalar of numpy as a plain number."""
    code = kind.code if isinstance(kind, _NumpyType) else None
    if not isinstance(code, str) or not isinstance(content, bytes) or not _PLAIN_CODE.fullmatch(code):
        return Placeholder()
    return np.frombuffer(content, dtype=np.dtype(code), count=1)[0].item()


# The form of names of dtypes in torch.
_NUMBER_TYPE = re.compile(r"(q?u?int|b?float|complex|bits)\d{1,3}(_?[a-z\d]{1,16}){0,3}")
_PLAIN_CODE = re.compile(r"[<>|=]?(b1|[iuf][1248])")


def _skipped(reason: str) -> Callable[..., SkippedTensor]:
    return lambda *_: SkippedTensor(reason)


def attributes_of(path: str) -> SafeGlobal:
    """Return what stands for a class of which the attributes of objects are needed, and its name as ``module.name``."""
    return SafeGlobal(path, lambda *_: AttributesPlaceholder(path))


def not_built(path: str) -> SafeGlobal:
    """Return what stands for a class or function whose objects are not looked at."""
    return SafeGlobal(path, lambda *_: Placeholder())


_RENAMED = {
    "__builtin__": "builtins",
    "numpy._core.multiarray": "numpy.core.multiarray",
    "numpy._core.numeric": "numpy.core.numeric",
    "torch.cuda": "torch",
    "pathlib._local": "pathlib",
}

# Settings as omegaconf and Hydra store them: containers and nodes that hold plain data, and what describes their types.
_OMEGACONF = (
    *("omegaconf.dictconfig.DictConfig", "omegaconf.listconfig.ListConfig"),
    *("omegaconf.base.ContainerMetadata", "omegaconf.base.Metadata"),
    *(
        f"omegaconf.nodes.{kind}Node"
        for kind in ("Any", "Integer", "Float", "Boolean", "String", "Bytes", "Path", "Enum")
    ),
)


# Tensors of torchao, in which an optimizer keeps its means in 4 or 8 bits.
_TORCHAO = (
    f"torchao.{folder}.subclass_{kind}"
    for folder in ("optim", "prototype.low_bit_optim")
    for kind in ("4bit.OptimState4bit", "8bit.OptimState8bit", "fp8.OptimStateFp8")
)


_MAKERS: dict[str, Callable[..., Any]] = {
    "builtins.set": _as_set,
    "builtins.frozenset": lambda items=(): frozenset(_as_set(items)),
    "builtins.bytearray": _bytes,
    "builtins.bytes": _bytes,
    "builtins.complex": lambda real=0.0, imag=0.0: complex(float(real), float(imag)),
    "_codecs.encode": _encoded,
    "collections.OrderedDict": _pairs,
    "collections.Counter": _pairs,
    "collections.defaultdict": lambda _=None, *pairs: _pairs(*pairs),
    # torch
    "torch._utils._rebuild_tensor": _rebuild,
    "torch._utils._rebuild_tensor_v2": _rebuild,
    "torch._utils._rebuild_tensor_v3": _rebuild_typed,
    "torch._utils._rebuild_parameter": _first,
    "torch._utils._rebuild_parameter_with_state": _first,
    "torch._utils._rebuild_sparse_tensor": _skipped("sparse"),
    "torch._utils._rebuild_sparse_csr_tensor": _skipped("sparse"),
    "torch._utils._rebuild_qtensor": _skipped("quantised"),
    "torch._utils._rebuild_nested_tensor": _skipped("nested"),
    "torch._utils._rebuild_meta_tensor_no_storage": _skipped("without numbers (of the meta device)"),
    "torch._tensor._rebuild_from_type_v2": _rebuild_subclass,
    "torch._utils._rebuild_wrapper_subclass": _rebuild_wrapper,
    "torch.Size": lambda sizes=(): tuple(sizes),
    "torch.device": lambda *parts: ":".join(str(part) for part in parts if isinstance(part, str | int)),
    # numpy, in saved metrics and in the states of random generators
    "numpy.dtype": _NumpyType,
    "numpy.core.multiarray.scalar": _numpy_scalar,
}

# Classes and functions whose objects are not looked at: of torch, of numpy's generators, and settings that runs store.
_NOT_BUILT = (
    *("builtins.slice", "builtins.range", "datetime.datetime", "datetime.timedelta"),
    *("torch.Tensor", "torch.nn.parameter.Parameter", "torch.nn.parameter.Buffer", "torch.serialization._get_layout"),
    *("numpy.core.multiarray._reconstruct", "numpy.core.numeric._frombuffer", "numpy.ndarray"),
    *(f"pathlib.{kind}" for kind in ("PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath", "Path")),
)

_STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "ComplexFloatStorage": torch.complex64,
    "ComplexDoubleStorage": torch.complex128,
    **{f"{kind}Storage": torch.uint8 for kind in ("QUInt8", "QUInt4x2", "QUInt2x4")},
    "QInt8Storage": torch.int8,
    "QInt32Storage": torch.int32,
}

_TABLE: dict[str, Any] = {
    **{name: SafeGlobal(name, make) for name, make in _MAKERS.items()},
    **{name: attributes_of(name) for name in ("argparse.Namespace", *_OMEGACONF, *_TORCHAO)},
    **{name: not_built(name) for name in _NOT_BUILT},
    **{f"torch.{name}": StorageType(dtype) for name, dtype in _STORAGES.items()},
    "torch.storage.UntypedStorage": StorageType(torch.uint8),
    **{f"torch.{name}": Placeholder() for name in ("contiguous_format", "preserve_format", "channels_last", "strided")},
    **{f"typing.{name}": Placeholder() for name in ("Any", "Dict", "List", "Tuple", "Optional", "Union")},
    **{f"builtins.{kind.__name__}": Placeholder() for kind in (dict, list, tuple, str, int, float, bool, object)},
    **{f"torch.per_{name}": Placeholder() for name in ("tensor_affine", "tensor_symmetric", "channel_affine")},
}
