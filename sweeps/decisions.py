"""What a search has decided so far, one line a decision, each on disk before it is acted on: a restarted sweep goes on from it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

FILE = "decisions.jsonl"


class Decisions:
    """The decisions of the study in `folder`. One driver writes, whoever likes reads.

    insist: calls a function until it is no longer refused; by default a refusal is raised, and the decision may be written again.
    """

    def __init__(self, folder: Path, insist: Callable[[Callable[[], None]], None] = lambda call: call()) -> None:
        self._path, self._insist = folder / FILE, insist
        self._num_bytes: int | None = None  # of whole lines; what lies behind them was never acted on

    def read(self) -> Iterator[dict[str, Any]]:
        """All of them, in order. A last line that a killed driver left unfinished was never acted on and is left out."""
        if self._path.exists():
            for line in self._path.read_text().split("\n")[:-1]:
                yield json.loads(line)

    def write(self, **decision: Any) -> None:
        """Append one decision and wait until it is on disk."""
        self._insist(lambda: self._append(f"{json.dumps(decision)}\n".encode()))

    def _append(self, line: bytes) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._path.touch()
        if self._num_bytes is None:
            self._num_bytes = self._path.read_bytes().rfind(b"\n") + 1
        with self._path.open("r+b") as file:
            file.truncate(self._num_bytes)
            file.seek(self._num_bytes)
            file.write(line)
            file.flush()
            os.fsync(file.fileno())
        self._num_bytes += len(line)
