"""Result store: content-addressed artifacts and one manifest for each finished stage run.

`objects/<aa>/<sha256>` holds the bytes of an artifact, once; `manifests/<aa>/<key>.json` says which artifacts and metrics a key
has. A manifest appears whole or not at all, after all of its objects, and is never changed: whoever sees it may rely on it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote

from fffsweep.pipeline.stage import Metrics, StageRun

_KIND = "fffsweep.manifest/"
SCHEMA = f"{_KIND}1"
_SHA256 = re.compile(r"[0-9a-f]{64}")


class ForeignManifest(ValueError):
    """A manifest that another version of fffsweep wrote: it is left as it is."""


class DamagedArtifact(RuntimeError):
    """A manifest cannot be read, or an artifact's bytes are missing or differ from its checksum. `key` is the result it belongs to."""

    def __init__(self, message: str, key: str) -> None:
        super().__init__(message, key)
        self.message, self.key = message, key

    def __str__(self) -> str:
        return self.message


class AbsentArtifact(DamagedArtifact):
    """An artifact's bytes were left behind on purpose when its result was brought here from elsewhere."""


@dataclass(frozen=True)
class Artifact:
    """One file of a result. absent: its bytes were left behind where it was made."""

    sha256: str
    num_bytes: int
    absent: bool = False

    @staticmethod
    def from_json(name: str, value: dict[str, Any]) -> Artifact:
        """Raises ValueError unless the name and the checksum stay below the folders that they are appended to."""
        if not name or "\\" in name or "\0" in name or {"", ".", ".."} & set(name.split("/")):
            raise ValueError(f"artifact {name!r}: expected a relative path without empty parts, '.', '..', backslashes and null bytes")
        if not _SHA256.fullmatch(value["sha256"]):
            raise ValueError(f"checksum {value['sha256']!r} of artifact {name!r}: expected 64 lower-case hexadecimal digits")
        return Artifact(**value)


@dataclass(frozen=True)
class Manifest:
    """What one finished stage run left: everything that determined it, what it measured, and where it ran."""

    key: str
    run: StageRun
    metrics: Metrics
    artifacts: dict[str, Artifact]
    provenance: dict[str, Any]
    started_at: float
    duration_s: float
    schema: str = SCHEMA

    def to_json(self) -> dict[str, Any]:
        """Plain JSON, which shares what the manifest holds; `from_json` reads it back."""
        artifacts = {
            name: {"sha256": artifact.sha256, "num_bytes": artifact.num_bytes, **({"absent": True} if artifact.absent else {})}
            for name, artifact in self.artifacts.items()
        }
        return {**_members(self), "run": _members(self.run), "artifacts": artifacts}

    @staticmethod
    def from_json(value: dict[str, Any]) -> Manifest:
        """Raises ForeignManifest if the schema is of another version, and ValueError, TypeError, KeyError or AttributeError for what is
        no manifest: one of whose artifacts' names or checksums could lead out of the store is none."""
        schema = value["schema"]
        if schema != SCHEMA and str(schema).startswith(_KIND):
            raise ForeignManifest(
                f"manifest schema {schema!r} of {value.get('key')}: expected {SCHEMA!r}; "
                "written by another version of fffsweep: use that one, or a new results folder"
            )
        if schema != SCHEMA:
            raise ValueError(f"schema {schema!r}, expected {SCHEMA!r}")
        artifacts = {name: Artifact.from_json(name, entry) for name, entry in value["artifacts"].items()}
        return Manifest(**{**value, "run": StageRun(**value["run"]), "artifacts": artifacts})


class Store:
    """A results folder's store. Any number of processes may read and publish at once; nothing is ever overwritten."""

    def __init__(self, root: Path) -> None:
        self.root = Path(root)

    def resolved(self) -> Store:
        """The same store by an absolute path, for processes with another working directory."""
        return Store(self.root.resolve())

    def manifest_path(self, key: str) -> Path:
        return self.root / "manifests" / key[:2] / f"{key}.json"

    def object_path(self, sha256: str) -> Path:
        return self.root / "objects" / sha256[:2] / sha256

    def work_path(self, key: str) -> Path:
        """Folder of an unfinished run; it outlives a killed attempt."""
        return self.root / "work" / key

    def has(self, key: str) -> bool:
        return self.manifest_path(key).exists()

    def get(self, key: str) -> Manifest:
        """Manifest of a finished run.

        Raises KeyError if `key` has none, DamagedArtifact if it cannot be read, ForeignManifest if another version wrote it.
        """
        try:
            content = self.manifest_path(key).read_bytes()
        except FileNotFoundError:
            raise KeyError(key) from None
        return parsed(content, key, self.manifest_path(key))

    def find(self, key: str) -> Manifest | None:
        """As `get` for whoever only looks: None if there is none, or none that can be read here by this version."""
        try:
            return self.get(key)
        except (KeyError, DamagedArtifact, ForeignManifest, OSError):
            return None

    def keys(self) -> Iterator[str]:
        """Keys of all finished runs."""
        for path in sorted((self.root / "manifests").glob("*/*.json")):
            yield path.stem

    def read(self, manifest: Manifest, name: str) -> Path:
        """Path of an artifact's bytes, checksum verified. Raises DamagedArtifact, AbsentArtifact if they were left behind elsewhere."""
        artifact = manifest.artifacts[name]
        if artifact.absent:
            raise AbsentArtifact(
                f"artifact {name!r} of {manifest.run.stage} {manifest.key} was left behind where it was made; import it with its weights",
                manifest.key,
            )
        path = self.object_path(artifact.sha256)
        if not path.exists() or sha256_of(path) != artifact.sha256:
            state = "damaged" if path.exists() else "missing"
            raise DamagedArtifact(f"artifact {name!r} of {manifest.run.stage} {manifest.key} is {state}: {path}", manifest.key)
        return path

    def checkout(self, manifest: Manifest, folder: Path) -> Path:
        """Give a result's artifacts their names again, as links below `folder`, checksums verified; absent ones get none.

        Raises DamagedArtifact.
        """
        folder.mkdir(parents=True, exist_ok=True)
        for name in (name for name, artifact in manifest.artifacts.items() if not artifact.absent):
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.unlink(missing_ok=True)
            target.symlink_to(self.read(manifest, name).resolve())
        return folder

    def publish(
        self, run: StageRun, metrics: Metrics, output: Path, provenance: dict[str, Any], started_at: float, duration_s: float
    ) -> Manifest:
        """Store every file below `output`, then the manifest. If the key is already there, that manifest stands and is returned."""
        artifacts: dict[str, Artifact] = {}
        for path in sorted(p for p in output.rglob("*") if p.is_file()):
            artifacts[path.relative_to(output).as_posix()] = self._put_object(path)
        self._put_manifest(Manifest(run.key, run, metrics, artifacts, provenance, started_at, duration_s))
        return self.get(run.key)

    def adopt(self, manifest: Manifest, files: Mapping[str, Path]) -> None:
        """Store a result that was made elsewhere. `files`: checksum -> its bytes, for every artifact that is not absent.

        Raises DamagedArtifact if a file is not what its checksum says.
        """
        for name, artifact in manifest.artifacts.items():
            if not artifact.absent and self._put_object(files[artifact.sha256]).sha256 != artifact.sha256:
                raise DamagedArtifact(f"artifact {name!r} of {manifest.run.stage} {manifest.key} is damaged", manifest.key)
        self._put_manifest(manifest)

    def forget(self, key: str) -> None:
        """Withdraw the manifest of a result whose artifacts are damaged, so that it is made again."""
        self.manifest_path(key).unlink(missing_ok=True)

    def fetch_work(self, key: str) -> None:
        """Bring the checkpoints of an unfinished run here, if another machine left some that are newer than those here."""

    def save_work(self, key: str) -> None:
        """Put the checkpoints of an unfinished run where other machines find them."""

    def drop_work(self, key: str) -> None:
        """Remove what `save_work` put elsewhere."""

    def tidy(self) -> None:
        """Remove the work folders of finished runs: a process may be killed between publishing its result and clearing up."""
        for work in (self.root / "work").glob("*"):
            if self.has(work.name):
                shutil.rmtree(work, ignore_errors=True)

    def _put_manifest(self, manifest: Manifest) -> None:
        """Add a manifest, all of whose objects are there, unless its key has one."""
        create_whole(self.manifest_path(manifest.key), partial(Path.write_bytes, data=_plain(manifest)))

    def _put_object(self, source: Path) -> Artifact:
        sha256, num_bytes = sha256_of(source), source.stat().st_size
        target = self.object_path(sha256)
        if not (target.exists() and target.stat().st_size == num_bytes and sha256_of(target) == sha256):
            target.parent.mkdir(parents=True, exist_ok=True)
            aside = target.with_name(f".{sha256}.{uuid.uuid4().hex}")
            shutil.copyfile(source, aside)
            _sync(aside)
            aside.replace(target)
            _sync(target.parent)
        return Artifact(sha256, num_bytes)


def is_weight(name: str) -> bool:
    """Whether an artifact is what makes a result large: tensors, recorded activations among them, or prepared text."""
    return name.endswith((".safetensors", ".pt", ".arrow", ".npy"))


def parsed(content: bytes, key: str, where: Path | str) -> Manifest:
    """The manifest in a file's content. Raises DamagedArtifact if it is none, ForeignManifest if it is another version's."""
    try:
        return Manifest.from_json(json.loads(content))
    except ForeignManifest:
        raise
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        is_ours = isinstance(error, ValueError) and not isinstance(error, json.JSONDecodeError | UnicodeDecodeError)
        raise DamagedArtifact(f"manifest {where} is damaged: {error if is_ours else 'it is not a manifest'}", key) from None


def _plain(manifest: Manifest) -> bytes:
    """JSON with a line for each member: to be read by people, without the cost of full indentation."""
    members = sorted(manifest.to_json().items())
    lines = (f"{json.dumps(name)}: {json.dumps(value, sort_keys=True, allow_nan=False)}" for name, value in members)
    return ("{\n" + ",\n".join(lines) + "\n}\n").encode()


def _members(value: Manifest | StageRun) -> dict[str, Any]:
    """What `asdict` gives, without a copy of everything inside."""
    return {member.name: getattr(value, member.name) for member in fields(value)}


def one_component(name: str) -> str:
    """A name as one component of a path: whatever it holds, it stays below the folder that it is appended to."""
    component = quote(name, safe="")
    return f"%2E{component[1:]}" if component.startswith(".") else component


def create_whole(target: Path, make: Callable[[Path], object]) -> None:
    """Create `target` by `make`, whole or not at all, or leave the one that is there: a hard link fails where a rename would overwrite."""
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
    try:
        make(aside)
        _sync(aside)
        with contextlib.suppress(FileExistsError):
            os.link(aside, target)
    finally:
        aside.unlink(missing_ok=True)
    _sync(target.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_of(path: Path) -> str:
    """Checksum of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
