"""What of a results folder can go: files that no result holds, and what is left of stage runs that have ended or that nobody wants.

Kept are all results, and of every unfinished stage run of a study its checkpoints: the stages keep the last two and those of rungs.
"""

from __future__ import annotations

import contextlib
import re
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

from fffsweep.pipeline.store import DamagedArtifact, ForeignManifest, Store
from fffsweep.sweeps.config import ConfigError
from fffsweep.sweeps.record import Lease, load

_YOUNG_S = 3600.0  # what is younger may belong to a result that is just being published
_KEY = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class Garbage:
    """One thing that can go, and why."""

    path: Path
    num_bytes: int
    why: str


def find(results: Path, unused: bool = False, young_s: float = _YOUNG_S) -> list[Garbage]:
    """What can go, the largest first; with `unused` also the results that no study refers to. Deletes nothing.

    Raises ConfigError if a manifest cannot be read: what it holds would pass for garbage.
    """
    store = Store(results / "store")
    wanted: dict[str, bool] = {}  # key -> whether its stage run is still to be done
    for record in sorted((results / "studies").glob("*/study.json")):
        stored = load(record.parent) or {"trials": []}
        for trial in stored["trials"]:
            for stage in trial["stages"]:
                wanted[stage["key"]] = stage["state"] not in ("complete", "reused", "failed")
    found: list[tuple[Path, str]] = []
    held: set[str] = set()
    for key in list(store.keys()):
        if unused and key not in wanted:
            found.append((store.manifest_path(key), "result of no study"))
        else:
            try:
                held |= {artifact.sha256 for artifact in store.get(key).artifacts.values()}
            except KeyError:  # withdrawn meanwhile
                continue
            except DamagedArtifact as error:
                raise ConfigError(
                    f"{error}; nothing is known of the files that it holds: fffsweep verify STUDY --repair withdraws it; "
                    "delete it if it is of no study"
                ) from None
            except ForeignManifest as error:
                raise ConfigError(str(error)) from None
    for path in (store.root / "objects").glob("*/*"):
        if path.name not in held:
            why = "left of an interrupted write" if path.name.startswith(".") else "held by no result"
            found.append((path, why))
    found += [(path, "left of an interrupted write") for path in (store.root / "manifests").glob("*/.*")]
    found += [(path, "left of a killed process") for path in results.glob(".mlflow.db.*")]
    for path in (store.root / "work").glob("*"):
        key = path.name.removesuffix(".lock")
        if not _KEY.fullmatch(key):
            continue
        if store.has(key):
            found.append((path, "work of a finished stage run"))
        elif key not in wanted:
            found.append((path, "work of a stage run of no study"))
        elif path.is_dir():
            attempts = path.glob("attempt-*")  # inputs and outputs of an attempt that was killed; its checkpoints lie beside them
            found += [(attempt, "left of a killed attempt") for attempt in attempts]
    old, there = time.time() - young_s, []
    for path, why in found:
        with contextlib.suppress(FileNotFoundError):  # a driver that is at work has cleared it up, or given it its name
            if path.lstat().st_mtime <= old:
                there.append(Garbage(path, _size(path), why))
    return sorted(there, key=lambda entry: -entry.num_bytes)


def collect(results: Path, unused: bool = False, young_s: float = _YOUNG_S) -> list[Garbage]:
    """Delete what `find` finds, and return it. Raises ConfigError if a driver is at work on a study of this folder."""
    leases = []
    try:
        for record in sorted((results / "studies").glob("*/study.json")):
            try:
                leases.append(Lease(record.parent))
            except ConfigError as error:
                raise ConfigError(f"{error}; nothing was deleted") from None
        found = find(results, unused, young_s)
        for entry in found:
            if entry.path.is_dir():
                shutil.rmtree(entry.path, ignore_errors=True)
            else:
                entry.path.unlink(missing_ok=True)
    finally:
        for lease in leases:
            lease.release()
    return found


def _size(path: Path) -> int:
    if path.is_dir():
        return sum(each.lstat().st_size for each in path.rglob("*") if each.is_file() and not each.is_symlink())
    return path.stat().st_size
