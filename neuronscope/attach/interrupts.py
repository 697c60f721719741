"""Interrupts: which modules still run, although no hook was told that others ended.

Torch calls a module's forward hooks when its forward ends, and where they ask for it when an ``Exception`` ended it.
``KeyboardInterrupt``, ``SystemExit`` and their like end it without a word. So the Python frame that called a module's
first hook is kept until its last one: while that frame is on the thread's stack, the module runs.
"""

from __future__ import annotations

import sys
from types import FrameType

__all__ = ["CallStack", "is_on_stack"]


class CallStack:
    """The frames that run modules, one inside another.

    A module that ``torch.compile`` traced has no frame here. It counts as running as long as those around it do.

    Attributes:
        innermost: The frame of the innermost module; ``None`` where there is none.

    >>> import sys
    >>> def forward(stack: CallStack) -> tuple[bool, int]:
    ...     stack.begin(0, sys._getframe())
    ...     return stack.runs(0), stack.running(1, sys._getframe())
    >>> stack = CallStack()
    >>> forward(stack), stack.runs(0), stack.running(1, sys._getframe())
    ((True, 1), False, 0)
    """

    MOST_PLACES = 4096

    def __init__(self) -> None:
        self.innermost: FrameType | None = None
        self._distances: dict[int, int] = {}  # of each place that asked, how many frames above it the innermost was
        self._frames: list[tuple[int, FrameType]] = []  # each with the number of modules around it

    def begin(self, depth: int, frame: FrameType) -> None:
        """A module begins to run.

        Args:
            depth: How many modules run around it.
            frame: The frame that calls its hooks and its forward.
        """
        if self._frames and self._frames[-1][0] >= depth:
            self.cut(depth)
        self._frames.append((depth, frame))
        self.innermost = frame

    def cut(self, depth: int) -> None:
        """Forget the frames of all but the ``depth`` outermost modules: the others have ended."""
        frames = self._frames
        while frames and frames[-1][0] >= depth:
            frames.pop()
        self.innermost = frames[-1][1] if frames else None

    def runs(self, place: int) -> bool:
        """Return whether the innermost module runs, around the function that calls this.

        Python makes an object of each frame that is looked at. So the one is looked at first that was right last time.

        Args:
            place: Who asks: a number that is the same where the distance from the innermost module is likely to be.
        """
        innermost = self.innermost
        try:
            if sys._getframe(self._distances.get(place, 1)) is innermost:
                return True
        except ValueError:  # so many frames there are not
            pass
        if innermost is None:
            return False
        distance, frame = 1, sys._getframe(1)
        while frame is not innermost:
            if frame.f_back is None:
                return False
            distance, frame = distance + 1, frame.f_back
        if len(self._distances) >= self.MOST_PLACES:
            self._distances.clear()
        self._distances[place] = distance
        return True

    def running(self, depth: int, frame: FrameType) -> int:
        """Return how many modules still run, and forget the frames of the others.

        Args:
            depth: How many ran when last heard of.
            frame: A frame that runs in their thread, and inside the innermost of them that does.
        """
        self.cut(depth)
        while self.innermost is not None and not is_on_stack(self.innermost, frame):
            depth = self._frames[-1][0]
            self.cut(depth)
        return depth


def is_on_stack(sought: FrameType, frame: FrameType) -> bool:
    """Return whether a frame still runs: whether another one that runs is it, or was called by it.

    Args:
        sought: The frame that may have ended.
        frame: One that runs.
    """
    above: FrameType | None = frame
    while above is not None and above is not sought:
        above = above.f_back
    return above is not None
