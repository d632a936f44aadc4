"""Checkpoints of a training run: written whole or not at all, verified when read."""

from __future__ import annotations

import hashlib
import logging
import os
import re
import time
import uuid
from pathlib import Path
from typing import Any

import torch

KEPT = 2  # the newest one, and the one before it in case that is damaged
log = logging.getLogger(__name__)


class Checkpoints:
    """Numbered checkpoints in `folder`, which one process at a time may use; `due` says when `every_s` seconds have gone by.

    A file's name carries its step and the beginning of its SHA-256, so a torn or altered file is known as such.
    """

    def __init__(self, folder: Path, every_s: float) -> None:
        self.folder, self.every_s = folder, every_s
        self._last = time.monotonic()

    def due(self) -> bool:
        """Whether the last save, or the start, is long enough ago."""
        return time.monotonic() - self._last >= self.every_s

    def save(self, step: int, state: dict[str, Any]) -> Path:
        """Write `state`, tensors and plain values alone, as the checkpoint of `step`; older ones but one are removed."""
        aside = self.folder / f".{uuid.uuid4().hex}"
        with aside.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        target = self.folder / f"step-{step:012d}-{_digest(aside)}.pt"
        aside.replace(target)
        for old in self._files()[KEPT:]:
            old.unlink(missing_ok=True)
        self._last = time.monotonic()
        return target

    def load(self) -> dict[str, Any] | None:
        """State of the newest checkpoint that is sound, None if there is none; damaged ones are reported and left out."""
        for path in self._files():
            try:
                if not path.stem.endswith(_digest(path)):
                    raise ValueError("its bytes are not the ones written")
                state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
            except Exception as error:
                log.warning("checkpoint %s cannot be used (%s): going on from the one before it, or from the beginning", path.name, error)
                continue
            return state
        return None

    def _files(self) -> list[Path]:
        found = [path for path in self.folder.iterdir() if re.fullmatch(r"step-[0-9]{12}-[0-9a-f]{16}\.pt", path.name)]
        return sorted(found, reverse=True)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]
