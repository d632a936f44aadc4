"""A result store on S3 or any other file system that pyarrow knows, with a folder of this machine as its cache.

What lies on the remote counts. Objects are uploaded before the manifest that names them, and a manifest only where there is none yet;
pyarrow cannot make that last step conditional, so that two drivers of different machines need the study's lease (a results folder that
both see) to keep apart. Checkpoints are uploaded too, so that another machine goes on from them.
"""

from __future__ import annotations

import contextlib
import shutil
import uuid
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fffsweep.pipeline.secrets import mask, setting
from fffsweep.pipeline.store import Artifact, Manifest, Store, parsed, sha256_of

if TYPE_CHECKING:
    from pyarrow.fs import FileSystem

VARIABLE = "FFFSWEEP_STORE"
_CHUNK = 2**20


def open_store(root: Path) -> Store:
    """The store in `root`, or the one at the address in FFFSWEEP_STORE with `root` as its cache.

    Such as `s3://bucket/folder?endpoint_override=host:9000&scheme=http`; keys to S3 come from AWS_ACCESS_KEY_ID and the like.
    Raises ValueError if the address is not one that pyarrow knows.
    """
    address = setting(VARIABLE)
    return RemoteStore(root, address) if address else Store(root)


class StoreUnreachable(ConnectionError):
    """A remote store refuses: it is gone, overloaded, or denies access. The message names it without its secrets."""


class RemoteStore(Store):
    """`Store` with its truth elsewhere. May be pickled. Every method raises StoreUnreachable if that refuses."""

    def __init__(self, root: Path, address: str) -> None:
        super().__init__(root)
        self.address = address
        _ = self._remote

    def __reduce__(self) -> tuple[Any, ...]:
        return RemoteStore, (self.root, self.address)

    def resolved(self) -> RemoteStore:
        return RemoteStore(self.root.resolve(), self.address)

    @cached_property
    def _remote(self) -> FileSystem:
        import pyarrow
        from pyarrow import fs

        try:
            files, path = fs.FileSystem.from_uri(self.address)
        except (pyarrow.ArrowInvalid, pyarrow.ArrowNotImplementedError, ValueError) as error:
            message = mask(str(error).splitlines()[0])
            raise ValueError(f"{VARIABLE}={mask(self.address)}: {message}; expected such as s3://bucket/folder") from None
        return fs.SubTreeFileSystem(path, files)

    @contextlib.contextmanager
    def _reaching(self) -> Iterator[None]:
        """Around whatever goes to the remote. Of a network, a server or a right pyarrow raises an OSError whose number says nothing."""
        try:
            yield
        except (FileNotFoundError, StoreUnreachable):
            raise
        except OSError as error:
            raise StoreUnreachable(mask(f"{VARIABLE}={self.address}: {error}")) from error

    def has(self, key: str) -> bool:
        with self._reaching():
            return bool(self._remote.get_file_info(_manifest(key)).is_file)

    def get(self, key: str) -> Manifest:
        try:
            content = b"".join(self._chunks(_manifest(key)))
        except FileNotFoundError:
            self.manifest_path(key).unlink(missing_ok=True)
            raise KeyError(key) from None
        return parsed(content, key, _manifest(key))

    def keys(self) -> Iterator[str]:
        from pyarrow import fs

        selector = fs.FileSelector("manifests", allow_not_found=True, recursive=True)
        with self._reaching():
            names = [info.base_name for info in self._remote.get_file_info(selector) if info.is_file]
        yield from sorted(name.removesuffix(".json") for name in names if name.endswith(".json") and not name.startswith("."))

    def read(self, manifest: Manifest, name: str) -> Path:
        artifact = manifest.artifacts[name]
        path = self.object_path(artifact.sha256)
        if not artifact.absent and not (path.exists() and sha256_of(path) == artifact.sha256):
            path.unlink(missing_ok=True)
            with contextlib.suppress(FileNotFoundError):
                self._download(_object(artifact.sha256), path)
        return super().read(manifest, name)

    def forget(self, key: str) -> None:
        with contextlib.suppress(FileNotFoundError), self._reaching():
            self._remote.delete_file(_manifest(key))
        super().forget(key)

    def fetch_work(self, key: str) -> None:
        folder = self.work_path(key) / "checkpoints"
        here = {path.name for path in folder.glob("*") if not path.name.startswith(".")}
        there = self._saved(key)
        if here and _newest(there) <= _newest(here):
            return
        for name in there - here:
            self._download(f"work/{key}/{name}", folder / name)

    def save_work(self, key: str) -> None:
        folder = self.work_path(key) / "checkpoints"
        here = {path.name: path for path in folder.glob("*") if path.is_file() and not path.name.startswith(".")}
        there = self._saved(key)
        for name in sorted(here.keys() - there):
            with contextlib.suppress(FileNotFoundError):  # the stage has removed it meanwhile: a newer one is there
                self._upload(here[name], f"work/{key}/{name}")
        for name in there - here.keys():
            with self._reaching():
                self._remote.delete_file(f"work/{key}/{name}")

    def drop_work(self, key: str) -> None:
        with contextlib.suppress(FileNotFoundError), self._reaching():
            self._remote.delete_dir(f"work/{key}")

    def _saved(self, key: str) -> set[str]:
        """Names of the checkpoints that the remote has of a run."""
        from pyarrow import fs

        with self._reaching():
            found = self._remote.get_file_info(fs.FileSelector(f"work/{key}", allow_not_found=True))
        return {info.base_name for info in found if info.is_file}

    def _put_object(self, source: Path) -> Artifact:
        artifact = super()._put_object(source)
        self._upload(self.object_path(artifact.sha256), _object(artifact.sha256))  # what is there may be damaged: reading it costs as much
        return artifact

    def _put_manifest(self, manifest: Manifest) -> None:
        if not self.has(manifest.key):
            self.manifest_path(manifest.key).unlink(missing_ok=True)  # of a result that another machine has withdrawn
            super()._put_manifest(manifest)
            self._upload(self.manifest_path(manifest.key), _manifest(manifest.key))

    def _upload(self, source: Path, target: str) -> None:
        """The file appears whole: S3 shows an object when its upload is complete, elsewhere a rename does it."""
        aside = target if self.address.startswith("s3:") else f"{target}.{uuid.uuid4().hex}"
        with source.open("rb") as file, self._reaching():
            self._remote.create_dir(target.rpartition("/")[0], recursive=True)
            with self._remote.open_output_stream(aside) as stream:
                shutil.copyfileobj(file, stream, _CHUNK)
            if aside != target:
                self._remote.move(aside, target)

    def _download(self, source: str, target: Path) -> None:
        target.parent.mkdir(parents=True, exist_ok=True)
        aside = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
        try:
            with aside.open("wb") as file:
                file.writelines(self._chunks(source))
            aside.replace(target)
        finally:
            aside.unlink(missing_ok=True)

    def _chunks(self, source: str) -> Iterator[bytes]:
        """Bytes of a remote file; an error of whoever takes them is left as it is, such as a full disk here."""
        with self._reaching():
            stream = self._remote.open_input_stream(source)
        with stream:
            while True:
                with self._reaching():
                    chunk = stream.read(_CHUNK)
                if not chunk:
                    return
                yield chunk


def _newest(names: set[str]) -> str:
    """The checkpoint of the latest step, by which their names are ordered; empty if there is none."""
    return max((name for name in names if name.startswith("step-")), default="")


def _manifest(key: str) -> str:
    return f"manifests/{key[:2]}/{key}.json"


def _object(sha256: str) -> str:
    return f"objects/{sha256[:2]}/{sha256}"
