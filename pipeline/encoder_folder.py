"""What planning must know of an existing encoder: its sizes, its vocabulary and which one it is. Torch-free."""

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
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+@[\w.-]+")
_SIZES = {  # by the names that encoders give them, DistilBERT's behind those of all others
    "hidden_size": ("hidden_size", "dim"),
    "num_layers": ("num_hidden_layers", "n_layers"),
    "num_heads": ("num_attention_heads", "n_heads"),
    "feedforward": ("intermediate_size", "hidden_dim"),
    "longest_sequence": ("max_position_embeddings",),
}


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
    found = {}
    for field, names in {"model_type": ("model_type",), **_SIZES}.items():
        there = [config[name] for name in names if name in config]
        if not there:
            raise ValueError(f"encoder: {encoder}: config.json has no {' or '.join(names)}; expected an encoder as transformers saves it")
        found[field] = there[0]
    return EncoderSizes(found.pop("model_type"), **{field: int(value) for field, value in found.items()})


def check_as_it_is(encoder: str, model_type: str) -> None:
    """Raise ValueError, one line, unless transformers has a classifier for encoders of this type, whose layers are left as they are."""
    if model_type in CONVERTIBLE:
        return
    # slow to import, and needed for these types alone
    from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES

    if model_type not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES:
        raise ValueError(
            f"encoder: {encoder}: model type {model_type}: transformers has no classifier of it (AutoModelForSequenceClassification); "
            "expected an encoder such as BERT, DistilBERT or ELECTRA"
        )


def fingerprint(encoder: str) -> str:
    """Hash of a folder's config and weights; of a hub's encoder its name and revision."""
    folder = Path(encoder).expanduser()
    if not folder.is_dir():
        return hashlib.sha256(encoder.encode()).hexdigest()
    files = [folder / "config.json", *sorted(path for pattern in _WEIGHTS for path in folder.glob(pattern))]
    return hashlib.sha256("".join(f"{path.name}={content_hash(path)}\n" for path in files).encode()).hexdigest()


def vocabulary_of(encoder: str) -> str | None:
    """What prepare's `vocabulary_file` is to say to get an encoder's WordPiece vocabulary; None if it has none.

    The file in its folder, or the hub's name itself: every machine fetches its own. Raises ValueError if a hub does not answer.
    """
    found = _vocabulary(encoder)
    return None if found is None else encoder if _is_hub_name(encoder) else str(found)


def vocabulary_path(vocabulary_file: str) -> Path:
    """The file that `vocabulary_file` names, fetched if it is the name of a hub's encoder. Raises ValueError if that has none."""
    if not _is_hub_name(vocabulary_file):
        return Path(vocabulary_file).expanduser()
    check_tokenizer(vocabulary_file)
    found = _vocabulary(vocabulary_file)
    assert found is not None  # it was checked
    return found


def check_tokenizer(encoder: str) -> None:
    """Raise ValueError, one line, unless `prepare` can cut text into pieces as an encoder's own tokenizer does."""
    if _vocabulary(encoder) is None:
        tokenizer = _json(encoder, "tokenizer.json").get("model", {}).get("type", "none found")
        raise ValueError(
            f"encoder: {encoder}: no WordPiece vocabulary (tokenizer: {tokenizer}); expected vocab.txt, or tokenizer.json with one, as "
            "BERT, DistilBERT and ELECTRA have them; BPE and SentencePiece, as RoBERTa and DeBERTa have them, are not supported"
        )
    stated = _normaliser(encoder)
    lowercase = stated.get("lowercase")
    for name, allowed in (("strip_accents", (None, lowercase)), ("handle_chinese_chars", (None, True))):
        if stated.get(name) not in allowed:
            raise ValueError(
                f"encoder: {encoder}: its tokenizer has {name}={stated[name]} with lower-casing {lowercase}; expected BERT's own way: "
                "accents are stripped where text is lower-cased, Chinese characters are set apart"
            )


def casing_of(encoder: str) -> bool | None:
    """Whether an encoder reads lower-cased text, by tokenizer_config.json, else by tokenizer.json; None if neither says."""
    found: bool | None = _normaliser(encoder).get("lowercase")
    return found


def _normaliser(encoder: str) -> dict[str, Any]:
    """Settings of BERT's normaliser that the encoder's files state."""
    found = {name: value for name, value in (_json(encoder, "tokenizer.json").get("normalizer") or {}).items() if name != "type"}
    config = _json(encoder, "tokenizer_config.json")
    theirs = {"lowercase": "do_lower_case", "strip_accents": "strip_accents", "handle_chinese_chars": "tokenize_chinese_chars"}
    return found | {ours: config[name] for ours, name in theirs.items() if config.get(name) is not None}


def _vocabulary(encoder: str) -> Path | None:
    path = _file(encoder, "vocab.txt")
    if path is not None or _json(encoder, "tokenizer.json").get("model", {}).get("type") != "WordPiece":
        return path
    return _file(encoder, "tokenizer.json")


def _config(encoder: str) -> dict[str, Any]:
    folder = Path(encoder).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file() or not any(True for pattern in _WEIGHTS for _ in folder.glob(pattern)):
            raise ValueError(f"encoder: {encoder}: expected config.json and weights in that folder, as transformers saves them")
    elif not _is_hub_name(encoder):
        raise ValueError(
            f"encoder: {encoder}: there is no such folder; expected a folder as transformers saves it, or owner/name@revision of a hub"
        )
    config = _json(encoder, "config.json")
    if not config:
        raise ValueError(f"encoder: {encoder}: no config.json; expected an encoder as transformers saves it")
    return config


def _is_hub_name(encoder: str) -> bool:
    return not Path(encoder).expanduser().exists() and _HUB_NAME.fullmatch(encoder) is not None


def _json(encoder: str, name: str) -> dict[str, Any]:
    """Content of one of an encoder's files, empty if it is not there."""
    path = _file(encoder, name)
    try:
        found = {} if path is None else json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise ValueError(f"encoder: {encoder}: {name} is no JSON object; expected an encoder as transformers saves it")
    return found


def _file(encoder: str, name: str) -> Path | None:
    """One of an encoder's files, fetched if it is a hub's; None if the encoder does not have it."""
    if not _is_hub_name(encoder):
        path = Path(encoder).expanduser() / name
        return path if path.is_file() else None
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import RemoteEntryNotFoundError

    owner_and_name, _, revision = encoder.partition("@")
    try:
        return Path(hf_hub_download(owner_and_name, name, revision=revision))
    except RemoteEntryNotFoundError:
        return None
    except (OSError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"encoder: {encoder}: not read ({reason}); check name, revision and network") from None
