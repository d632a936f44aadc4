"""What planning must know of an existing encoder: its sizes and which one it is. Torch-free."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fffsweep.pipeline.data.tables import content_hash

CONVERTIBLE = ("bert",)
_WEIGHTS = ("*.safetensors", "*.bin")


@dataclass(frozen=True)
class EncoderSizes:
    """Sizes by the encoder's config.json; `feedforward` is the width of its feedforward layers."""

    model_type: str
    hidden_size: int
    num_layers: int
    num_heads: int
    feedforward: int
    longest_sequence: int


def encoder_sizes(encoder: str) -> EncoderSizes:
    """Sizes of the encoder in a folder, or of `owner/name@revision`, whose config is then fetched. Raises ValueError, one line."""
    config = _config(encoder)
    names = {
        "hidden_size": "hidden_size",
        "num_layers": "num_hidden_layers",
        "num_heads": "num_attention_heads",
        "feedforward": "intermediate_size",
        "longest_sequence": "max_position_embeddings",
    }
    for name in ("model_type", *names.values()):
        if name not in config:
            raise ValueError(f"encoder: {encoder}: config.json has no {name}; expected an encoder as transformers saves it")
    return EncoderSizes(config["model_type"], **{field: int(config[name]) for field, name in names.items()})


def fingerprint(encoder: str) -> str:
    """Hash of a folder's config and weights; of a hub's encoder its name and revision."""
    folder = Path(encoder).expanduser()
    if not folder.is_dir():
        return hashlib.sha256(encoder.encode()).hexdigest()
    files = [folder / "config.json", *sorted(path for pattern in _WEIGHTS for path in folder.glob(pattern))]
    return hashlib.sha256("".join(f"{path.name}={content_hash(path)}\n" for path in files).encode()).hexdigest()


def vocabulary_of(encoder: str) -> Path | None:
    """The vocab.txt in an encoder's folder, None if there is none."""
    path = Path(encoder).expanduser() / "vocab.txt"
    return path if path.is_file() else None


def _config(encoder: str) -> dict[str, Any]:
    folder = Path(encoder).expanduser()
    if folder.is_dir():
        path = folder / "config.json"
        if not path.is_file() or not any(True for pattern in _WEIGHTS for _ in folder.glob(pattern)):
            raise ValueError(f"encoder: {encoder}: expected config.json and weights in that folder, as transformers saves them")
    elif re.fullmatch(r"[\w.-]+/[\w.-]+@[\w.-]+", encoder):
        path = _fetched(encoder)
    else:
        raise ValueError(
            f"encoder: {encoder}: there is no such folder; expected a folder as transformers saves it, or owner/name@revision of a hub"
        )
    try:
        config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        raise ValueError(f"encoder: {encoder}: config.json is no JSON; expected an encoder as transformers saves it") from None
    return config


def _fetched(encoder: str) -> Path:
    from huggingface_hub import hf_hub_download

    name, _, revision = encoder.partition("@")
    try:
        return Path(hf_hub_download(name, "config.json", revision=revision))
    except (OSError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"encoder: {encoder}: not read ({reason}); check name, revision and network") from None
