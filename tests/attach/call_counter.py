"""A function mode of a user's that counts the torch functions that it sees."""

from __future__ import annotations

from typing import Any

from torch.overrides import TorchFunctionMode


class CallCounter(TorchFunctionMode):
    """Counts the calls of torch functions, and passes them on."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += 1
        return func(*args, **(kwargs or {}))
