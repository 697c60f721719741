"""Import and run code of the user, and turn what it raises into an error of one sentence."""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from neuronscope.errors import NeuronscopeError, UsageError
from neuronscope.writers.formatting import visible

__all__ = ["describe_exception", "exits_refused", "load_named", "user_code"]

_LONGEST = 500


@contextlib.contextmanager
def user_code(expected: str, advice: str = "", subject: str = "it") -> Iterator[None]:
    """Context manager that turns any exception of the user's code into one error that says what was expected.

    This includes ``sys.exit``: the user's function must not end the command with a success code. Ctrl-C and
    Neuronscope's own errors pass unchanged.

    Args:
        expected: The beginning of the sentence: what was expected.
        advice: A further sentence that says what to do.
        subject: What raised the exception.

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
    except BaseException as error:
        raise UsageError(f"{expected}, but {subject} {describe_exception(error)}{advice and f'. {advice}'}") from error


@contextlib.contextmanager
def exits_refused() -> Iterator[None]:
    """Context manager that turns ``sys.exit`` in the user's model or data, wherever it is, into a usage error."""
    try:
        yield
    except SystemExit as error:
        raise UsageError(
            f"Expected the model and the data to be usable, but their code {describe_exception(error)}"
        ) from error


def describe_exception(error: BaseException) -> str:
    """Describe an exception in one line that follows a subject.

    >>> describe_exception(KeyError("labels")), describe_exception(SystemExit("bye"))
    ("gave KeyError: 'labels'", "called sys.exit('bye')")
    """
    if isinstance(error, SystemExit):
        return f"called sys.exit({'' if error.code is None else repr(error.code)})"
    text = visible(" ".join(str(error).split())) or "no message"
    return f"gave {type(error).__name__}: {text if len(text) <= _LONGEST else text[:_LONGEST] + '…'}"


def load_named(name: str, argument: str) -> Any:
    """Return the object that ``package.module:name`` names. Modules in the current folder are found too.

    Args:
        name: The name.
        argument: Name of the argument that it was given for, for errors.

    Raises:
        UsageError: There is no such module, or no such name in it; or importing the module fails or exits.

    >>> load_named("math:tau", "model")
    6.283185307179586
    """
    module_name, _, attribute = name.partition(":")
    if not module_name or not attribute:
        raise UsageError(f"Expected argument `{argument}` to be like `package.module:name`, but got {name!r}.")
    expected = f"Expected argument `{argument}` to name a module that can be imported"
    with _current_folder(), user_code(expected, subject=repr(module_name)):
        found = importlib.import_module(module_name)
        for part in attribute.split("."):
            if not hasattr(found, part):
                raise UsageError(
                    f"Expected argument `{argument}` to name something, but {module_name} has no {attribute!r}."
                )
            found = getattr(found, part)
    return found


@contextlib.contextmanager
def _current_folder() -> Iterator[None]:
    """Make modules in the current folder importable inside the block, as they are with ``python -m``."""
    folder = str(Path.cwd())
    known = folder in sys.path or "" in sys.path
    if not known:
        sys.path.insert(0, folder)
    try:
        yield
    finally:
        if not known and folder in sys.path:
            sys.path.remove(folder)
