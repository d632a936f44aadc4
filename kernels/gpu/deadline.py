"""An end to work that must not take longer than it is given, such as the check of a machine that is lent by the minute."""

from __future__ import annotations

import signal
import time
from types import FrameType


class OutOfTime(BaseException):
    """The time is up. Not an Exception, so that no handler of a baseline's errors takes it for one of them."""


class Deadline:
    """A context that may be entered again and again until `seconds` after it was made; then what runs in it is ended by OutOfTime.

    For the main thread of a process, and not within another one. What waits in a call of C is ended when that returns.
    """

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    def __enter__(self) -> None:
        left_s = self._end - time.monotonic()
        if left_s <= 0:
            raise OutOfTime
        self._before = signal.signal(signal.SIGALRM, _end)
        signal.setitimer(signal.ITIMER_REAL, left_s)

    def __exit__(self, *_: object) -> None:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, self._before)


def _end(number: int, frame: FrameType | None) -> None:
    raise OutOfTime
