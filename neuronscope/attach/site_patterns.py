"""Select sites, and declare axes, by glob patterns on the names of sites, layers and activations."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from neuronscope.errors import UsageError
from neuronscope.options import Patterns

__all__ = ["SitePatterns"]


class SitePatterns:
    """The patterns of a user, and which of them have matched no site yet.

    Args:
        sites: Patterns of the sites to count; ``None`` stands for all.
        exclude: Patterns of the sites not to count.
        axes: Maps a pattern to the dimension of the neurons.

    Raises:
        UsageError: A pattern is not a string or is empty, or an axis is not an integer.

    >>> patterns = SitePatterns("layer1.*", None, {"*.mixer": -1})
    >>> patterns.register("layer1.fc/relu", "layer1.fc", "layer1.act"), patterns.register("fc/relu", "fc", "act")
    (True, False)
    >>> next(patterns.unmatched_warnings("Net"))
    "Expected pattern '*.mixer' to match a site, but it matched none of those seen: layer1.fc/relu, fc/relu."
    >>> patterns.wants("layer1.fc/relu"), patterns.wants("fc/relu"), patterns.axis("layer1.mixer")
    (True, False, -1)
    """

    def __init__(self, sites: Patterns, exclude: Patterns, axes: Mapping[str, int] | None) -> None:
        self._sites = _patterns("sites", sites)
        self._exclude = _patterns("exclude", exclude)
        self._axes = _axes(axes)
        self._unmatched = {*(self._sites or ()), *(self._exclude or ()), *self._axes}
        self._registered: dict[str, None] = {}  # names, in the order of their first call

    def register(self, *names: str) -> bool:
        """Note that a site ran, and return whether to count it.

        Args:
            names: The site's name, and then the others that patterns may match: see :meth:`wants`.
        """
        self._registered[names[0]] = None
        return self.wants(*names)

    def unmatched_warnings(self, model: str, most: int = 8, *, ran: bool = True) -> Iterator[str]:
        """Yield a warning for each pattern that matched no site, and one if the model has no site at all.

        Args:
            model: Name of the model.
            most: Maximal number of sites to name.
            ran: Whether the model was seen to run.
        """
        seen = ", ".join([*self._registered][:most]) or "none"
        for pattern in sorted(self._unmatched):
            yield f"Expected pattern {pattern!r} to match a site, but it matched none of those seen: {seen}."
        if not ran:
            yield (
                f"No call of {model} was seen in the steps observed so far: nothing is measured. Call the model "
                "itself, or `scope.open_step()` before each step and `scope.close_step()` after it."
            )
        elif not self._registered:
            yield (
                f"No activation of {model} was seen in the first observed step in which it ran: nothing is measured so "
                "far. `scope.report().not_measured` says what was seen and not counted."
            )

    def wants(self, *names: str) -> bool:
        """Whether to count a site.

        Args:
            names: Names of which a pattern may match any: that of the site, the path of its layer, and the place of
                its activation.
        """
        included = self._sites is None or self._match(self._sites, names)
        return included and not (self._exclude is not None and self._match(self._exclude, names))

    def axis(self, *names: str) -> int | None:
        """Return the declared axis of a site, or ``None``.

        Args:
            names: As of :meth:`wants`.
        """
        for pattern, axis in self._axes.items():
            if self._match((pattern,), names):
                return axis
        return None

    def _match(self, patterns: Sequence[str], names: Sequence[str]) -> bool:
        matched = [pattern for pattern in patterns if any(fnmatchcase(name, pattern) for name in names)]
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
