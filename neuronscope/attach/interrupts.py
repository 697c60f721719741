"""Find out which modules still run after an interrupt, when no hook reports which ones have ended.

Torch calls a module's forward hooks when its forward ends, and those with ``always_call`` also when an ``Exception``
ended it. After ``KeyboardInterrupt``, ``SystemExit`` and the like it calls none. So the Python frame that called a
module's first hook is kept until its last hook: the module runs as long as that frame is on the thread's stack.
"""

from __future__ import annotations

import sys
from types import FrameType

__all__ = ["CallStack", "is_on_stack"]


class CallStack:
    """The frames that run modules, one inside another.

    A module that ``torch.compile`` traced has no frame here. It counts as running as long as the modules around it do.

    Attributes:
        innermost: The frame of the innermost module; ``None`` if no module runs.

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
        self._distances: dict[int, int] = {}  # of each place: how many frames above it the innermost was
        self._frames: list[tuple[int, FrameType]] = []  # each with the number of modules around it

    def begin(self, depth: int, frame: FrameType) -> None:
        """Note that a module begins to run.

        Args:
            depth: Number of modules that run around it.
            frame: The frame that calls its hooks and its forward.
        """
        if self._frames and self._frames[-1][0] >= depth:
            self.cut(depth)
        self._frames.append((depth, frame))
        self.innermost = frame

    def cut(self, depth: int) -> None:
        """Forget the frames of all but the ``depth`` outermost modules, because the others have ended."""
        frames = self._frames
        while frames and frames[-1][0] >= depth:
            frames.pop()
        self.innermost = frames[-1][1] if frames else None

    def runs(self, place: int) -> bool:
        """Return whether the innermost module runs, around the function that calls this.

        Python creates an object for each frame that is looked at. So the frame that was right last time is tried first.

        Args:
            place: A number that identifies the caller. Callers with the same number are likely to be at the same
                distance from the innermost module.
        """
        innermost = self.innermost
        try:
            if sys._getframe(self._distances.get(place, 1)) is innermost:
                return True
        except ValueError:  # there are fewer frames
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
            depth: Number of modules that ran before.
            frame: A running frame of the same thread, inside the innermost module that still runs.
        """
        self.cut(depth)
        while self.innermost is not None and not is_on_stack(self.innermost, frame):
            depth = self._frames[-1][0]
            self.cut(depth)
        return depth


def is_on_stack(sought: FrameType, frame: FrameType) -> bool:
    """Return whether a frame still runs: whether a running frame is that frame, or was called from it.

    Args:
        sought: The frame that may have ended.
        frame: A frame that runs.
    """
    above: FrameType | None = frame
    while above is not None and above is not sought:
        above = above.f_back
    return above is not None
