"""Read JSON that a report was saved as, and check each field of it."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from neuronscope.arrays import FloatArray, IntArray
from neuronscope.errors import ReportError

__all__ = ["MOST", "DamagedError", "Fields", "check_version", "each", "is_integer", "is_number", "read_json"]

#: No run counts so many; what is below fits int64.
MOST = 2**60


def read_json(path: str | Path) -> Any:
    """Return what a JSON file holds.

    Raises:
        ReportError: The file cannot be read, or is not JSON.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise ReportError(f"Cannot read {path}: {error.strerror or error}.") from error
    except UnicodeDecodeError as error:
        raise ReportError(f"Expected a report in JSON, but {path} is not text.") from error
    try:
        return json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise ReportError(f"Expected a report in JSON, but {path} is not JSON: {error}.") from error


def check_version(version: Any, expected: int, source: str) -> None:
    """Raise ReportError if the version of a schema is not the expected one.

    Args:
        version: That of the file.
        expected: The one that can be read.
        source: Where it comes from, for messages.
    """
    if version != expected:
        age = "an older" if isinstance(version, int) and version < expected else "another"
        raise ReportError(
            f"Expected a report of schema version {expected}, but {source} has {str(version)[:20]}: {age} "
            "version of Neuronscope wrote it."
        )


class DamagedError(ValueError):
    """A field is missing, or is not what it can be."""


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON")


class Fields:
    """Read the fields of one JSON object, and check each.

    Args:
        plain: The object.
        place: Where it is in the report, for messages.
    """

    def __init__(self, plain: Any, place: str = "") -> None:
        if not isinstance(plain, dict):
            raise DamagedError(f"{place.rstrip('.') or 'the report'} is no object")
        self._plain, self._place = plain, place

    def _get(self, name: str, what: str, fits: Callable[[Any], bool]) -> Any:
        if name not in self._plain:
            raise DamagedError(f"{self._place}{name} is missing")
        value = self._plain[name]
        if not fits(value):
            raise DamagedError(f"{self._place}{name} is not {what}")
        return value

    def has(self, name: str) -> bool:
        """Return whether the object has a field."""
        return name in self._plain

    def text(self, name: str, among: Sequence[str] = ()) -> str:
        """Return a text.

        Args:
            name: The field's name.
            among: The texts that it can be; empty = any.
        """
        what = f"one of {', '.join(among)}" if among else "text"
        found: str = self._get(name, what, lambda value: isinstance(value, str) and (not among or value in among))
        return found

    def text_or_null(self, name: str) -> str:
        """Return a text; ``""`` for ``null``."""
        return self._get(name, "text or null", lambda value: value is None or isinstance(value, str)) or ""

    def is_null(self, name: str) -> bool:
        """Return whether a field is ``null``."""
        return self._get(name, "there", lambda _: True) is None

    def integer_or_null(self, name: str) -> int | None:
        """Return a whole number of at least 0; ``None`` for ``null``."""
        return None if self.is_null(name) else self.integer(name)

    def object_or_null(self, name: str) -> Fields | None:
        """Return the fields of an object; ``None`` for ``null``."""
        return None if self.is_null(name) else self.object(name)

    def flag(self, name: str) -> bool:
        """Return a truth value."""
        return self._get(name, "true or false", lambda value: isinstance(value, bool)) is True

    def integer(self, name: str, low: int = 0) -> int:
        """Return a whole number.

        Args:
            name: The field's name.
            low: The least that it can be.
        """
        return int(self._get(name, f"a whole number of at least {low}", lambda value: is_integer(value, low)))

    def texts(self, name: str) -> tuple[str, ...]:
        """Return a list of texts."""
        return tuple(self._get(name, "a list of texts", lambda value: each(value, lambda one: isinstance(one, str))))

    def items(self, name: str, length: int | None = None) -> list[Any]:
        """Return a list of anything.

        Args:
            name: The field's name.
            length: Its length; ``None`` = any.
        """
        what = "a list" if length is None else f"a list of {length}"
        found: list[Any] = self._get(name, what, lambda value: isinstance(value, list) and length in (None, len(value)))
        return found

    def object(self, name: str) -> Fields:
        """Return the fields of an object."""
        return Fields(self._get(name, "an object", lambda value: isinstance(value, dict)), f"{self._place}{name}.")

    def members(self, name: str) -> dict[str, Fields]:
        """Return the fields of each object of an object, by key."""
        found = self.mapping(name, "objects", lambda value: isinstance(value, dict))
        return {key: Fields(one, f"{self._place}{name}.{key}.") for key, one in found.items()}

    def objects(self, name: str) -> list[Fields]:
        """Return the fields of each object of a list."""
        return [Fields(one, f"{self._place}{name}[{index}].") for index, one in enumerate(self.items(name))]

    def integers(self, name: str, length: int | None = None, low: int = 0) -> IntArray:
        """Return whole numbers, int64 ``(K,)``.

        Args:
            name: The field's name.
            length: ``K``; ``None`` = any.
            low: The least that each can be.
        """
        values = self.items(name, length)
        if not all(is_integer(one, low) for one in values):
            raise DamagedError(f"{self._place}{name} holds something else than whole numbers of at least {low}")
        return np.array(values, dtype=np.int64)

    def numbers(self, name: str, length: int, high: float = math.inf, low: float = 0.0) -> FloatArray:
        """Return numbers, float64 ``(K,)``; those that are ``null`` become NaN.

        Args:
            name: The field's name.
            length: ``K``.
            high: The most that each can be.
            low: The least.
        """
        values = self.items(name, length)
        if not all(one is None or (is_number(one) and low <= one <= high) for one in values):
            raise DamagedError(f"{self._place}{name} holds something else than numbers from {low:g} to {high:g}")
        return np.array([math.nan if one is None else one for one in values], dtype=np.float64)

    def mapping(self, name: str, what: str, fits: Callable[[Any], bool]) -> dict[str, Any]:
        """Return an object of values of one kind.

        Args:
            name: The field's name.
            what: The kind, for messages.
            fits: Whether a value is of it.
        """
        found = self._get(name, f"an object of {what}", lambda value: isinstance(value, dict))
        if not all(map(fits, found.values())):
            raise DamagedError(f"{self._place}{name} is not an object of {what}")
        return dict(found)

    def fail(self, reason: str) -> NoReturn:
        """Refuse the object with a reason."""
        raise DamagedError(f"{self._place.rstrip('.')} {reason}")


def is_number(value: Any) -> bool:
    """Whether a value is a number that float64 holds; JSON has no infinity, but ``1e999`` is read as one."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def is_integer(value: Any, low: int) -> bool:
    """Return whether a value is a whole number.

    Args:
        value: The value.
        low: The least that it can be.
    """
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= MOST


def each(value: Any, fits: Callable[[Any], bool]) -> bool:
    """Return whether a value is a list whose items all fit.

    Args:
        value: The value.
        fits: Whether an item fits.
    """
    return isinstance(value, list) and all(map(fits, value))
