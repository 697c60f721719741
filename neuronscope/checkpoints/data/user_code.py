"""User code: what the user's own functions raise becomes one sentence, also where they end the program."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from neuronscope.errors import NeuronscopeError, UsageError
from neuronscope.writers.formatting import visible

__all__ = ["told", "user_code"]

_LONGEST = 500


@contextlib.contextmanager
def user_code(expected: str, advice: str = "", subject: str = "it") -> Iterator[None]:
    """Turn whatever code of the user's raises inside into one error that says what was expected of it.

    ``sys.exit`` is among that: a script's own function must not end the command as if all were well. Ctrl-C and errors
    of Neuronscope's go through as they are.

    Args:
        expected: How the sentence begins: what was expected, and of what.
        advice: A further sentence: what to do.
        subject: What raised.

    Raises:
        UsageError: Something was raised.

    >>> with user_code("Expected `data` to make batches"):
    ...     raise SystemExit(0)
    Traceback (most recent call last):
        ...
    neuronscope.errors.UsageError: Expected `data` to make batches, but it called sys.exit(0)
    """
    try:
        yield
    except (KeyboardInterrupt, GeneratorExit, NeuronscopeError):
        raise
    except BaseException as came:
        raise UsageError(f"{expected}, but {subject} {told(came)}{advice and f'. {advice}'}") from came


def told(error: BaseException) -> str:
    """Say in one line what code did that raised an error.

    Args:
        error: What was raised.

    >>> told(KeyError("labels")), told(SystemExit("bye"))
    ("gave KeyError: 'labels'", "called sys.exit('bye')")
    """
    if isinstance(error, SystemExit):
        return f"called sys.exit({'' if error.code is None else repr(error.code)})"
    text = visible(" ".join(str(error).split())) or "no message"
    return f"gave {type(error).__name__}: {text if len(text) <= _LONGEST else text[:_LONGEST] + '…'}"
