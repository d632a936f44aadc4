"""A training state as files that are safe to read from anybody: tensors as safetensors, the rest as JSON. Nothing is unpickled."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

_TENSORS, _TREE = "tensors.safetensors", "state.json"


def save_state(state: Any, folder: Path) -> None:
    """Write nested dicts, lists and tuples of tensors and plain values as `folder`, which appears whole or not at all."""
    aside = folder.with_name(f".{folder.name}.aside")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    tensors: dict[str, Tensor] = {}
    tree = _taken_apart(state, tensors)
    save_file(tensors, aside / _TENSORS)
    (aside / _TREE).write_text(json.dumps(tree))
    for path in aside.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
    aside.replace(folder)


def load_state(folder: Path) -> Any:
    """What `save_state` wrote, tuples as lists, tensors on the CPU."""
    return _put_together(json.loads((folder / _TREE).read_text()), load_file(folder / _TENSORS))


def _taken_apart(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, Tensor):
        name = f"{len(tensors):06d}"
        tensors[name] = value.detach().cpu().clone().contiguous()  # tied weights share memory, which the format refuses
        return {"tensor": name}
    if isinstance(value, dict):  # keys may be numbers, which JSON objects cannot have
        return {"dict": [[key, _taken_apart(entry, tensors)] for key, entry in value.items()]}
    if isinstance(value, list | tuple):
        return {"list": [_taken_apart(entry, tensors) for entry in value]}
    return {"value": value}


def _put_together(tree: dict[str, Any], tensors: dict[str, Tensor]) -> Any:
    ((kind, content),) = tree.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "dict":
        return {key: _put_together(entry, tensors) for key, entry in content}
    if kind == "list":
        return [_put_together(entry, tensors) for entry in content]
    return content
