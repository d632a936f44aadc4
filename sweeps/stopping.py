"""How a driver is asked to stop: by signals, and by a flag in the study's folder that running stages poll too."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

ATTEMPT = "FFFSWEEP_ATTEMPT"  # variable that tells a job's driver which attempt it is


def stop_flag(folder: Path, attempt: str | None) -> Path:
    """Flag that asks a driver to stop: of one attempt on a cluster, before or after it has begun, or of whoever drives the study now."""
    return folder / (f"stop-{attempt}" if attempt else "stop")


def clear_flags(folder: Path, attempt: str | None) -> None:
    """Remove what earlier drivers and their nodes were asked. A flag that names this attempt stays: it came before its driver."""
    kept = stop_flag(folder, attempt) if attempt else None
    for pattern in ("stop", "stop-*", "yield-*"):
        for flag in folder.glob(pattern):
            if flag != kept:
                flag.unlink(missing_ok=True)


@contextlib.contextmanager
def catching_signals(stop: Callable[[], None], is_stopping: Callable[[], bool]) -> Iterator[None]:
    """On SIGINT or SIGTERM stages save themselves and the sweep ends resumable; a second signal ends it at once."""

    def caught(number: int, frame: FrameType | None) -> None:
        if is_stopping():
            raise KeyboardInterrupt
        stop()

    before = {number: signal.signal(number, caught) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
