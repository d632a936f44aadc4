"""The right to do something alone, among processes of one host or of many that share a folder.

File locks are not enough: on many network file systems they hold on one host only. A lease is a numbered file that at most one
process can create, `epoch-<n>.json`; the highest number is the holder's. Taking over from a dead holder creates the next number, so
whoever was thought dead and lives on finds a higher one and knows that it lost: the numbers are fencing tokens.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import threading
import time
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

TTL_S = 30.0  # a holder on another host that gave no sign of life for so long is dead
_CHECK_S = 1.0


class LeaseHeld(RuntimeError):
    """Someone else holds the lease and is alive. The message says who."""


class LeaseLost(RuntimeError):
    """The lease was held and has been taken over by another process, which took this one for dead."""


@dataclass(frozen=True)
class Claim:
    """In whose name a lease is asked for. Within one name a higher rank takes over from a lower one at once."""

    name: str = ""
    rank: int = 0


class Lease:
    """A held lease; its constructor acquires it or raises LeaseHeld. A daemon thread gives signs of life until `release`.

    Within one host a holder is alive as long as its process is; across hosts as long as it touched its file within `ttl_s`, by the clock
    of the file system that both see.
    """

    def __init__(self, folder: Path, claim: Claim | None = None, ttl_s: float = TTL_S) -> None:
        self.token = uuid.uuid4().hex
        self._folder, self._claim, self._ttl_s = folder, claim or Claim(), ttl_s
        self._lost = False
        self._checked_at = 0.0
        self._ended = threading.Event()
        self.epoch = self._acquire()
        self._path = self._file(self.epoch)
        threading.Thread(target=self._live, name=f"lease {folder.name}", daemon=True).start()

    def held(self, now: bool = False) -> bool:
        """Whether the lease is still ours; looked up at most once a second unless `now`."""
        if not self._lost and (now or time.monotonic() - self._checked_at >= _CHECK_S):
            self._checked_at = time.monotonic()
            newest = self._newest()
            self._lost = newest is None or newest[0] != self.epoch or _read(newest[1]).get("token") != self.token
        return not self._lost

    def require(self, now: bool = False) -> None:
        """Raise LeaseLost if another process took the lease over."""
        if not self.held(now):
            newest = self._newest()
            raise LeaseLost(f"{self._folder} was taken over by {_describe(_read(newest[1])) if newest else 'another process'}")

    def release(self) -> None:
        """Give the lease back; the epoch stays on record, so that numbers only grow."""
        self._ended.set()
        with contextlib.suppress(OSError):
            if self.held(now=True):
                aside = self._aside(released=True)
                aside.replace(self._path)

    def _acquire(self) -> int:
        while True:
            self._folder.mkdir(parents=True, exist_ok=True)
            with contextlib.suppress(FileExistsError, FileNotFoundError):  # someone was quicker, or removed the whole folder: look again
                return self._create()

    def _create(self) -> int:
        aside = self._aside()
        try:
            newest = self._newest()
            if newest is not None:
                self._judge(newest[1], aside.stat().st_mtime)
            epoch = newest[0] + 1 if newest else 1
            os.link(aside, self._file(epoch))
        finally:
            aside.unlink(missing_ok=True)
        for path in self._folder.glob("epoch-*.json"):
            if int(path.stem.removeprefix("epoch-")) < epoch:
                path.unlink(missing_ok=True)
        return epoch

    def _judge(self, path: Path, now: float) -> None:
        """Raises LeaseHeld unless the holder gave the lease back, is dead, or has a lower rank in the same name."""
        holder, seen = _read(path), _mtime(path)
        if seen is None or holder.get("released"):
            return
        claim = Claim(holder.get("claim", ""), holder.get("rank", 0))
        if self._claim.name and claim.name == self._claim.name and claim.rank < self._claim.rank:
            return
        if _same_host(holder):
            alive = _lives(holder)
        else:
            alive = abs(now - seen) <= self._ttl_s  # a clock may be set back; whoever lives touches its file by the new one soon
        if alive:
            raise LeaseHeld(f"{_describe(holder)} (last sign of life {max(0.0, now - seen):.0f} s ago)")

    def _live(self) -> None:
        while not self._ended.wait(self._ttl_s / 6):
            try:
                if not self.held(now=True):
                    return
                os.utime(self._path)
            except FileNotFoundError:
                self._lost = True
                return
            except OSError:  # a file system that refuses for a while: the next beat tries again
                continue

    def _aside(self, released: bool = False) -> Path:
        content = {**_here(), "claim": self._claim.name, "rank": self._claim.rank, "token": self.token, "released": released}
        path = self._folder / f".{uuid.uuid4().hex}"
        path.write_text(json.dumps(content))
        return path

    def _file(self, epoch: int) -> Path:
        return self._folder / f"epoch-{epoch:08d}.json"

    def _newest(self) -> tuple[int, Path] | None:
        try:
            found = [path for path in self._folder.iterdir() if path.name.startswith("epoch-")]
        except FileNotFoundError:
            return None
        newest = max(found, default=None, key=lambda path: path.name)
        return None if newest is None else (int(newest.stem.removeprefix("epoch-")), newest)


def holder_of(folder: Path) -> str | None:
    """Who holds the lease in `folder` by its record, alive or not; None if nobody does. For people to read."""
    found = sorted(folder.glob("epoch-*.json"))
    holder = _read(found[-1]) if found else {"released": True}
    return None if holder.get("released") else _describe(holder)


def _here() -> dict[str, Any]:
    boot, pids = _kernel()
    return {"host": os.uname().nodename, "boot": boot, "pids": pids, "pid": os.getpid(), "started": _started(os.getpid())}


@functools.cache
def _started(pid: int) -> float:
    """When this process began; a fork of it has another number."""
    return _begun(pid)


def _begun(pid: int) -> float:
    """When a process began, in ticks since this boot where the system counts them: those stay as they are when the clock is set."""
    try:
        return float(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    except OSError:
        return psutil.Process(pid).create_time()


@functools.cache
def _kernel() -> tuple[str, str]:
    """This boot and this process namespace: where both are equal, process numbers mean the same."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip(), str(Path("/proc/self/ns/pid").readlink())
    except OSError:
        return os.uname().nodename, ""


def _same_host(holder: dict[str, Any]) -> bool:
    return (holder.get("boot"), holder.get("pids")) == _kernel()


def _lives(holder: dict[str, Any]) -> bool:
    try:
        process = psutil.Process(int(holder["pid"]))
        return _begun(process.pid) == float(holder["started"]) and process.status() != psutil.STATUS_ZOMBIE
    except (psutil.Error, KeyError, ValueError):
        return False


def _describe(holder: dict[str, Any]) -> str:
    return f"process {holder.get('pid', '?')} on {holder.get('host', 'an unknown host')}"


def _read(path: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(path.read_text())
    except FileNotFoundError:
        return {"released": True}
    except ValueError:
        return {}
    return content


def _mtime(path: Path) -> float | None:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return None
