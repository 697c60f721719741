"""Names of tensors without what wrappers put in front of them, so that they are those of the network itself."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from neuronscope.attach.module_paths import named_sites_path

__all__ = ["escape_surrogates", "prefix_stripper"]


def escape_surrogates(name: object) -> str:
    r"""A name as text that can be written anywhere: a half of a surrogate pair, which is no character, is spelled out.

    >>> escape_surrogates("a\ud800b")
    'a\\ud800b'
    """
    return str(name).encode("utf-8", "backslashreplace").decode("utf-8")


def prefix_stripper(names: Iterable[str], *, wrapped: bool = True) -> Callable[[str], str]:
    """What takes wrappers' parts off the names of one network's tensors.

    ``_orig_mod``, ``_fsdp_wrapped_module`` and ``_checkpoint_wrapped_module`` go wherever they stand. A ``module`` in
    front goes where every name has it, as data parallel wrappers leave it. Where two names would become one, all stay.

    Args:
        names: All of them.
        wrapped: Whether a ``module`` in front may be a wrapper's. Lightning saves networks without such wrappers.

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
