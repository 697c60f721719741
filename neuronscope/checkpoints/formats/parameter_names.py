"""Remove what wrappers add to the names of tensors, so that they are the names of the network itself."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from neuronscope.attach.module_paths import named_sites_path

__all__ = ["COUNTERS", "escape_surrogates", "prefix_stripper"]

#: Names of numbers that wrappers keep beside the tensors of the network (``AveragedModel``).
COUNTERS = ("n_averaged",)

# Parts that wrappers add before all names.
_LEADING = ("module.", "_module.", "base_model.model.")


def escape_surrogates(name: object) -> str:
    r"""Return a name as valid Unicode: half of a surrogate pair, which is not a character, is written as an escape.

    >>> escape_surrogates("a\ud800b")
    'a\\ud800b'
    """
    return str(name).encode("utf-8", "backslashreplace").decode("utf-8")


def prefix_stripper(names: Iterable[str], *, wrapped: bool = True) -> Callable[[str], str]:
    """Return a function that removes what wrappers add to the names of one network's tensors.

    ``_orig_mod``, ``_fsdp_wrapped_module``, ``_checkpoint_wrapped_module`` and ``_forward_module`` go anywhere in a
    name; a leading ``module`` (data parallel), ``_module`` (Opacus) or ``base_model.model`` (PEFT) if every name but a
    wrapper's counter has it. If two names would become the same, all stay as they are.

    Args:
        names: The names of all tensors of the network.
        wrapped: Whether such a leading part may come from a wrapper. Lightning saves networks without such wrappers.

    >>> strip = prefix_stripper(["module.fc.weight", "module._orig_mod.fc.bias"])
    >>> strip("module._orig_mod.fc.bias")
    'fc.bias'
    >>> prefix_stripper(["module.fc.weight", "head.weight"])("module.fc.weight")
    'module.fc.weight'
    >>> prefix_stripper(["n_averaged", "module.fc.weight"])("module.fc.weight")
    'fc.weight'
    """
    before = set(names).difference(COUNTERS)
    removed: list[str] = []
    bare = {named_sites_path(name) for name in before}
    while wrapped and bare:
        prefix = next((one for one in _LEADING if all(name.startswith(one) for name in bare)), None)
        if prefix is None:
            break
        bare = {name.removeprefix(prefix) for name in bare}
        removed.append(prefix)
    if len(bare) < len(before):
        return escape_surrogates

    def strip(name: str) -> str:
        name = named_sites_path(escape_surrogates(name))
        for prefix in removed:
            name = name.removeprefix(prefix)
        return name

    return strip
