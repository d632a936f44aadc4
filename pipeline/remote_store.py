"""A result store on S3 or any other file system that pyarrow knows, with a folder of this machine as its cache.

What lies on the remote counts. Objects are uploaded before the manifest that names them, and a manifest only where there is none yet;
pyarrow cannot make that last step conditional, so that two drivers of different machines need the study's lease (a results folder that
both see) to keep apart. Checkpoints are uploaded too, so that another machine goes on from them.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import uuid
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fffsweep.pipeline.secrets import mask, setting
from fffsweep.pipeline.store import Artifact, Manifest, Store, sha256_of

if TYPE_CHECKING:
    from pyarrow.fs import FileSystem

VARIABLE = "FFFSWEEP_STORE"


def open_store(root: Path) -> Store:
    """The store in `root`, or the one at the address in FFFSWEEP_STORE with `root` as its cache.

    Such as `s3://bucket/folder?endpoint_override=host:9000&scheme=http`; keys to S3 come from AWS_ACCESS_KEY_ID and the like.
    Raises ValueError if the address is not one that pyarrow knows.
    """
    address = setting(VARIABLE)
    return RemoteStore(root, address) if address else Store(root)


class RemoteStore(Store):
    """`Store` with its truth elsewhere. May be pickled."""

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

    def has(self, key: str) -> bool:
        return self._exists(_manifest(key))

    def get(self, key: str) -> Manifest:
        try:
            with self._remote.open_input_stream(_manifest(key)) as stream:
                content = stream.read()
        except FileNotFoundError:
            self.manifest_path(key).unlink(missing_ok=True)
            raise KeyError(key) from None
        return Manifest.from_json(json.loads(content))

    def keys(self) -> Iterator[str]:
        from pyarrow import fs

        selector = fs.FileSelector("manifests", allow_not_found=True, recursive=True)
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
        with contextlib.suppress(FileNotFoundError):
            self._remote.delete_file(_manifest(key))
        super().forget(key)

    def fetch_work(self, key: str) -> None:
        from pyarrow import fs

        folder = self.work_path(key) / "checkpoints"
        if folder.exists() and any(folder.iterdir()):
            return
        for info in self._remote.get_file_info(fs.FileSelector(f"work/{key}", allow_not_found=True)):
            if info.is_file:
                self._download(info.path, folder / info.base_name)

    def save_work(self, key: str) -> None:
        from pyarrow import fs

        folder = self.work_path(key) / "checkpoints"
        here = {path.name: path for path in folder.glob("*") if path.is_file() and not path.name.startswith(".")}
        there = {
            info.base_name for info in self._remote.get_file_info(fs.FileSelector(f"work/{key}", allow_not_found=True)) if info.is_file
        }
        for name in sorted(here.keys() - there):
            with contextlib.suppress(FileNotFoundError):  # the stage has removed it meanwhile: a newer one is there
                self._upload(here[name], f"work/{key}/{name}")
        for name in there - here.keys():
            self._remote.delete_file(f"work/{key}/{name}")

    def drop_work(self, key: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            self._remote.delete_dir(f"work/{key}")

    def _put_object(self, source: Path) -> Artifact:
        artifact = super()._put_object(source)
        target = _object(artifact.sha256)
        if self._remote.get_file_info(target).size != artifact.num_bytes:
            self._upload(self.object_path(artifact.sha256), target)
        return artifact

    def _put_manifest(self, manifest: Manifest) -> None:
        super()._put_manifest(manifest)
        if not self.has(manifest.key):
            self._upload(self.manifest_path(manifest.key), _manifest(manifest.key))

    def _exists(self, path: str) -> bool:
        return bool(self._remote.get_file_info(path).is_file)

    def _upload(self, source: Path, target: str) -> None:
        """The file appears whole: S3 shows an object when its upload is complete, elsewhere a rename does it."""
        aside = target if self.address.startswith("s3:") else f"{target}.{uuid.uuid4().hex}"
        self._remote.create_dir(target.rpartition("/")[0], recursive=True)
        with source.open("rb") as file, self._remote.open_output_stream(aside) as stream:
            shutil.copyfileobj(file, stream, 2**20)
        if aside != target:
            self._remote.move(aside, target)

    def _download(self, source: str, target: Path) -> None:
        target.parent.mkdir(parents=True, exist_ok=True)
        aside = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
        try:
            with self._remote.open_input_stream(source) as stream, aside.open("wb") as file:
                shutil.copyfileobj(stream, file, 2**20)
            aside.replace(target)
        finally:
            aside.unlink(missing_ok=True)


def _manifest(key: str) -> str:
    return f"manifests/{key[:2]}/{key}.json"


def _object(sha256: str) -> str:
    return f"objects/{sha256[:2]}/{sha256}"
