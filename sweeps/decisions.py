"""What a search has decided so far, one line a decision, each on disk before it is acted on: a restarted sweep goes on from it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

FILE = "decisions.jsonl"


class Decisions:
    """The decisions of the study in `folder`. One driver writes, whoever likes reads."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / FILE
        self._is_whole = False

    def read(self) -> Iterator[dict[str, Any]]:
        """All of them, in order. A last line that a killed driver left unfinished was never acted on and is left out."""
        if self._path.exists():
            for line in self._path.read_text().split("\n")[:-1]:
                yield json.loads(line)

    def write(self, **decision: Any) -> None:
        """Append one decision and wait until it is on disk."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        if not self._is_whole:
            self._drop_unfinished()
        with self._path.open("a") as file:
            file.write(json.dumps(decision) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def _drop_unfinished(self) -> None:
        self._is_whole = True
        if self._path.exists():
            content = self._path.read_bytes()
            with self._path.open("r+b") as file:
                file.truncate(content.rfind(b"\n") + 1)
