"""Paths of modules without what wrappers put into them (DDP, FSDP, ``torch.compile``), and names of models."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

__all__ = ["model_name", "named_sites_path", "own_class", "walk"]

# Wrappers keep the wrapped model under one attribute, which is no part of a site's name.
_WRAPPER_PARTS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
_WRAPPER_CLASSES = frozenset(
    {"DistributedDataParallel", "DataParallel", "FullyShardedDataParallel", "DeepSpeedEngine", "AveragedModel"}
)


def named_sites_path(path: str, wrapped: frozenset[str] = frozenset()) -> str:
    """A module path without the parts that wrappers put in.

    Args:
        path: A path as in ``named_modules()``.
        wrapped: Paths of wrappers whose child ``module`` is the wrapped model.

    >>> named_sites_path("module._orig_mod.layer1.0.relu", frozenset({""}))
    'layer1.0.relu'
    >>> named_sites_path("experts.module.act")
    'experts.module.act'
    """
    kept: list[str] = []
    so_far = ""
    for part in path.split(".") if path else ():
        wrapper = part in _WRAPPER_PARTS or (part == "module" and so_far in wrapped)
        so_far = f"{so_far}.{part}" if so_far else part
        if not wrapper:
            kept.append(part)
    return ".".join(kept)


def walk(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every module once, with its path as sites are named by it."""
    modules = list(model.named_modules())
    wrapped = frozenset(path for path, module in modules if type(module).__name__ in _WRAPPER_CLASSES)
    for path, module in modules:
        yield named_sites_path(path, wrapped), module


def model_name(model: nn.Module) -> str:
    """Class name of the model itself, inside its wrappers."""
    return [own_class(module).__name__ for path, module in walk(model) if path == ""][-1]


def own_class(module: nn.Module) -> type:
    """The class of a module as its author wrote it: ``fully_shard`` gives it another, derived from it."""
    derived = type(module).__mro__
    return derived[2] if derived[1].__name__ == "FSDPModule" else derived[0]
