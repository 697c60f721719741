"""Which sites are wanted, and which axes are declared, by glob patterns on site names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from neuronscope.errors import UsageError
from neuronscope.options import Patterns

__all__ = ["SitePatterns"]


class SitePatterns:
    """A user's patterns, and which of them have matched nothing yet.

    Args:
        sites: Only these sites are wanted; ``None`` = all.
        exclude: These are not.
        axes: Pattern → the neurons' dimension.

    Raises:
        UsageError: A pattern is no non-empty string, or an axis no integer.

    >>> selection = SitePatterns("layer1.*", None, {"*.mixer": -1})
    >>> selection.register("layer1.relu"), selection.register("fc.relu")
    (True, False)
    >>> next(selection.unmatched_warnings("Net"))
    "Expected pattern '*.mixer' to match a site, but it matched none of those seen: layer1.relu, fc.relu."
    >>> selection.wants("layer1.relu"), selection.wants("fc.relu"), selection.axis("layer1.mixer")
    (True, False, -1)
    """

    def __init__(self, sites: Patterns, exclude: Patterns, axes: Mapping[str, int] | None) -> None:
        self._sites = _patterns("sites", sites)
        self._exclude = _patterns("exclude", exclude)
        self._axes = _axes(axes)
        self._unmatched = {*(self._sites or ()), *(self._exclude or ()), *self._axes}
        self._met: dict[str, None] = {}  # names in the order in which they were met

    def register(self, name: str) -> bool:
        """A site of this name ran: says whether it is to be counted."""
        self._met[name] = None
        return self.wants(name)

    def unmatched_warnings(self, model: str, most: int = 8) -> Iterator[str]:
        """What is to be said once the model has run: patterns that match none of its sites, or that it has none.

        Args:
            model: The model's name.
            most: Sites named at most.
        """
        seen = ", ".join([*self._met][:most]) or "none"
        for pattern in sorted(self._unmatched):
            yield f"Expected pattern {pattern!r} to match a site, but it matched none of those seen: {seen}."
        if not self._met:
            yield f"No activation of {model} was seen in the first observed step; nothing is being measured."

    def wants(self, name: str) -> bool:
        """Whether the site of this name is to be counted."""
        included = self._sites is None or self._match(self._sites, name)
        return included and not (self._exclude is not None and self._match(self._exclude, name))

    def axis(self, name: str) -> int | None:
        """The declared axis of the site of this name, or ``None``."""
        for pattern, axis in self._axes.items():
            if self._match((pattern,), name):
                return axis
        return None

    def _match(self, patterns: Sequence[str], name: str) -> bool:
        matched = [pattern for pattern in patterns if fnmatchcase(name, pattern)]
        self._unmatched.difference_update(matched)
        return bool(matched)


def _patterns(name: str, value: Any) -> tuple[str, ...] | None:
    if value is None:
        return None
    patterns = (value,) if isinstance(value, str) else tuple(value) if isinstance(value, Sequence) else ()
    if not patterns or not all(isinstance(pattern, str) and pattern for pattern in patterns):
        raise UsageError(f"Expected argument `{name}` to be a glob pattern or a list of them, but got {value!r}.")
    return patterns


def _axes(value: Any) -> dict[str, int]:
    if value is None:
        return {}
    if not isinstance(value, Mapping) or not all(
        isinstance(pattern, str) and isinstance(axis, int) and not isinstance(axis, bool)
        for pattern, axis in value.items()
    ):
        raise UsageError(f"Expected argument `axes` to map glob patterns to integer dimensions, but got {value!r}.")
    return dict(value)
