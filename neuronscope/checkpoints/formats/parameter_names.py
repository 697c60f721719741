"""Remove what wrappers add to the names of tensors, so that they are the names of the network itself."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from neuronscope.attach.module_paths import named_sites_path

__all__ = ["escape_surrogates", "prefix_stripper"]


def escape_surrogates(name: object) -> str:
    r"""Return a name as valid Unicode: half of a surrogate pair, which is not a character, is written as an escape.

    >>> escape_surrogates("a\ud800b")
    'a\\ud800b'
    """
    return str(name).encode("utf-8", "backslashreplace").decode("utf-8")


def prefix_stripper(names: Iterable[str], *, wrapped: bool = True) -> Callable[[str], str]:
    """Return a function that removes what wrappers add to the names of one network's tensors.

    ``_orig_mod``, ``_fsdp_wrapped_module`` and ``_checkpoint_wrapped_module`` are removed anywhere in a name. A leading
    ``module``, which data parallel wrappers add, is removed if every name has it. If two names would become the same,
    all names stay as they are.

    Args:
        names: The names of all tensors of the network.
        wrapped: Whether a leading ``module`` may come from a wrapper. Lightning saves networks without such wrappers.

    >>> strip = prefix_stripper(["module.fc.weight", "module._orig_mod.fc.bias"])
    >>> strip("module._orig_mod.fc.bias")
    'fc.bias'
    >>> prefix_stripper(["module.fc.weight", "head.weight"])("module.fc.weight")
    'module.fc.weight'
    """
    before = set(names)
    depth = 0
    bare = {named_sites_path(name) for name in before}
    while wrapped and bare and all(name.startswith("module.") for name in bare):
        bare = {name.removeprefix("module.") for name in bare}
        depth += 1
    if len(bare) < len(before):
        return escape_surrogates

    def strip(name: str) -> str:
        name = named_sites_path(escape_surrogates(name))
        for _ in range(depth):
            name = name.removeprefix("module.")
        return name

    return strip
