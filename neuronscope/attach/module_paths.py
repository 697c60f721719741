"""Return the paths of modules without the parts that wrappers add (DDP, FSDP, ``torch.compile``), and model names."""

from __future__ import annotations

from collections.abc import Collection, Iterator

from torch import nn

__all__ = ["model_name", "named_sites_path", "own_class", "walk"]

# Wrappers keep the wrapped model in an attribute of one of these names, which must not appear in a site's name.
_WRAPPER_PARTS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module"})
# Wrappers whose attribute has a name that other modules use too, by the name of their class or of a base class.
_WRAPPED_AS = {
    **dict.fromkeys(("DistributedDataParallel", "DataParallel", "FullyShardedDataParallel"), "module"),
    **dict.fromkeys(("DeepSpeedEngine", "AveragedModel"), "module"),
    "GradSampleModule": "_module",  # Opacus
    "PeftModel": "base_model",
    "BaseTuner": "model",  # the tuner inside a PeftModel
}


def named_sites_path(path: str, wrapped: Collection[str] = ()) -> str:
    """Return a module path without the parts that wrappers add.

    Args:
        path: A path as in ``named_modules()``.
        wrapped: Paths of wrapped models whose last part is a wrapper's attribute.

    >>> named_sites_path("module._orig_mod.layer1.0.relu", {"module"})
    'layer1.0.relu'
    >>> named_sites_path("experts.module.act")
    'experts.module.act'
    """
    kept: list[str] = []
    so_far = ""
    for part in path.split(".") if path else ():
        so_far = f"{so_far}.{part}" if so_far else part
        if part not in _WRAPPER_PARTS and so_far not in wrapped:
            kept.append(part)
    return ".".join(kept)


def walk(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield every module once, with the path that names its site."""
    modules = list(model.named_modules())
    wrapped = set()
    for path, module in modules:
        attribute = next((_WRAPPED_AS[cls.__name__] for cls in type(module).__mro__ if cls.__name__ in _WRAPPED_AS), "")
        if attribute:
            wrapped.add(f"{path}.{attribute}" if path else attribute)
    for path, module in modules:
        yield named_sites_path(path, wrapped), module


def model_name(model: nn.Module) -> str:
    """Return the class name of the model inside its wrappers."""
    return [own_class(module).__name__ for path, module in walk(model) if path == ""][-1]


def own_class(module: nn.Module) -> type:
    """Return the class of a module as its author wrote it: ``fully_shard`` replaces it by a derived class."""
    derived = type(module).__mro__
    return derived[2] if derived[1].__name__ == "FSDPModule" else derived[0]
