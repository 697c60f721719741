"""Interrupts: which modules still run, although no hook was told that others ended.

Torch calls a module's forward hooks when its forward ends, and where they ask for it when an ``Exception`` ended it.
``KeyboardInterrupt``, ``SystemExit`` and their like end it without a word. So the Python frame that called a module's
first hook is kept until its last one: while that frame is on the thread's stack, the module runs.
"""

from __future__ import annotations

from types import FrameType

__all__ = ["CallStack"]


class CallStack:
    """The frames that run modules, one inside another.

    A module that ``torch.compile`` traced has no frame here. It counts as running as long as those around it do.

    >>> import sys
    >>> def forward(stack: CallStack) -> int:
    ...     stack.begin(0, sys._getframe())
    ...     return stack.depth(1, sys._getframe())
    >>> stack = CallStack()
    >>> forward(stack), stack.depth(1, sys._getframe())
    (1, 0)
    """

    def __init__(self) -> None:
        self._frames: list[tuple[int, FrameType]] = []  # each with the number of modules around it

    def __bool__(self) -> bool:
        return bool(self._frames)

    def begin(self, depth: int, frame: FrameType) -> None:
        """A module begins to run.

        Args:
            depth: How many modules run around it.
            frame: The frame that calls its hooks and its forward.
        """
        self.cut(depth)
        self._frames.append((depth, frame))

    def cut(self, depth: int) -> None:
        """Forget the frames of all but the ``depth`` outermost modules: the others have ended."""
        while self._frames and self._frames[-1][0] >= depth:
            self._frames.pop()

    def depth(self, depth: int, frame: FrameType | None) -> int:
        """Return how many modules still run, and forget the frames of the others.

        Args:
            depth: How many ran when last heard of.
            frame: A frame that is running in their thread, called by the innermost of them if that still runs.
        """
        self.cut(depth)
        if not self._frames:
            return depth
        innermost, above = self._frames[-1][1], frame
        while above is not None:
            if above is innermost:
                return depth
            above = above.f_back
        running = set()
        while frame is not None:
            running.add(frame)
            frame = frame.f_back
        while self._frames and self._frames[-1][1] not in running:
            depth = self._frames.pop()[0]
        return depth
