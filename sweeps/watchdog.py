"""Ends a stage run that takes too long or too much memory.

In a worker process of its own a run is watched by a small process beside it, which kills the worker: a stage that hangs inside
native code, or a stopped process, would never get to a check of its own. The reason is left in a file for the driver to read.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import psutil

from fffsweep.pipeline.stage import Resources

_CHECK_S = 0.25

# Started by its source, without site packages: it must cost little, and be there while the worker cannot do anything any more.
_GUARD = """
import json, os, select, signal, sys, time
pid, page, armed, buffer = int(sys.argv[1]), os.sysconf("SC_PAGESIZE"), None, b""
while os.getppid() == pid:
    ready, _, _ = select.select([0], [], [], 0.25 if armed else 30.0)
    if ready:
        data = os.read(0, 65536)
        if not data:
            break
        *lines, buffer = (buffer + data).split(b"\\n")
        if lines:
            armed = json.loads(lines[-1])
            begun = time.monotonic()
    if not armed:
        continue
    with open(f"/proc/{pid}/statm") as file:
        used = int(file.read().split()[1]) * page
    why = None
    if armed["timeout_s"] is not None and time.monotonic() - begun > armed["timeout_s"]:
        why = {"why": "timeout", "message": f"still running after its timeout of {armed['timeout_s']:g} s"}
    elif armed["memory_bytes"] is not None and used > armed["memory_bytes"]:
        why = {"why": "memory", "message": f"used {used / 1e6:.0f} MB of memory, its limit is {armed['memory_bytes'] / 1e6:.0f} MB"}
    if why:
        try:
            with open(armed["fate"], "w") as file:
                json.dump(why, file)
        finally:
            os.kill(pid, signal.SIGKILL)
"""
_guard: subprocess.Popen[bytes] | None = None


class TooMuchMemory(MemoryError):
    """The run used more memory than its limit."""


class TooLong(TimeoutError):
    """The run took longer than its timeout."""


@contextlib.contextmanager
def guarded(resources: Resources, fate: Path) -> Iterator[None]:
    """Have this process killed if what runs inside exceeds its limits; the reason is then in `fate`. Limits as in `Resources`."""
    if resources.timeout_s is None and resources.memory_bytes is None:
        yield
        return
    fate.parent.mkdir(parents=True, exist_ok=True)
    _tell({"timeout_s": resources.timeout_s, "memory_bytes": resources.memory_bytes, "fate": str(fate)})
    try:
        yield
    finally:
        _tell(None)


def _tell(order: dict[str, Any] | None) -> None:
    global _guard
    if _guard is None or _guard.poll() is not None:
        command = [sys.executable, "-I", "-S", "-c", _GUARD, str(os.getpid())]
        _guard = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd="/")
    assert _guard.stdin is not None
    _guard.stdin.write(json.dumps(order).encode() + b"\n")
    _guard.stdin.flush()


def leave_fate(fate: Path, why: str, message: str) -> None:
    """Say, for the driver, why this process is about to end. A file system that refuses leaves it untold."""
    with contextlib.suppress(OSError):
        fate.parent.mkdir(parents=True, exist_ok=True)
        fate.write_text(json.dumps({"why": why, "message": message}))


def take_fate(fate: Path) -> tuple[str, str] | None:
    """Why a worker ended, and in words; None if nobody said. Told once."""
    try:
        told = json.loads(fate.read_text())
        fate.unlink()
    except (OSError, ValueError):
        return None
    return str(told["why"]), str(told["message"])


@contextlib.contextmanager
def alarmed(resources: Resources) -> Iterator[None]:
    """Raise TooLong or TooMuchMemory in what runs inside, in this process's main thread, at the next Python instruction.

    Once: clearing up after it may take as long as it takes.
    """
    if resources.timeout_s is None and resources.memory_bytes is None:
        yield
        return
    begun, process = time.monotonic(), psutil.Process()

    def check(number: int, frame: FrameType | None) -> None:
        if resources.timeout_s is not None and time.monotonic() - begun > resources.timeout_s:
            signal.setitimer(signal.ITIMER_REAL, 0)
            raise TooLong(f"still running after its timeout of {resources.timeout_s:g} s")
        used = process.memory_info().rss
        if resources.memory_bytes is not None and used > resources.memory_bytes:
            signal.setitimer(signal.ITIMER_REAL, 0)
            raise TooMuchMemory(f"used {used / 1e6:.0f} MB of memory, its limit is {resources.memory_bytes / 1e6:.0f} MB")

    before = signal.signal(signal.SIGALRM, check)
    signal.setitimer(signal.ITIMER_REAL, _CHECK_S, _CHECK_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
