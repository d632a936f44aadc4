"""Addresses with passwords come from the environment or from files, and are shown with the passwords masked."""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from urllib.parse import unquote

MASK = "***"
_IN_ADDRESS = re.compile(r"(?P<before>[a-z][a-z0-9+.-]*://[^/\s:@]*:)[^/\s@]+(?=@)", re.IGNORECASE)
_IN_QUERY = re.compile(r"(?P<before>(?:password|passwd|secret_key|secret|session_token|access_key|token)=)[^&\s'\"]+", re.IGNORECASE)
_VARIABLES = (
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "PGPASSWORD",
    "MLFLOW_TRACKING_PASSWORD",
    "MLFLOW_TRACKING_TOKEN",
    "RAY_AUTH_TOKEN",
)
_ADDRESSES = ("FFFSWEEP_MLFLOW_URI", "FFFSWEEP_OPTUNA_URL", "FFFSWEEP_STORE")
_SHORTEST = 6  # a shorter secret would mask innocent words


def setting(name: str) -> str | None:
    """Value of an environment variable, or the content of the file that `<name>_FILE` names; None if neither is set.

    Raises ValueError if both are set, or the file cannot be read.
    """
    value, file = os.environ.get(name), os.environ.get(f"{name}_FILE")
    if value and file:
        raise ValueError(f"{name} and {name}_FILE are both set: expected one of them")
    if not file:
        return value or None
    try:
        return Path(file).read_text().strip() or None
    except OSError as error:
        raise ValueError(f"{name}_FILE={file}: cannot be read ({error.strerror})") from None


def mask(text: str) -> str:
    """`text` without the passwords of addresses, and without the secrets that the environment holds."""
    return mask_all({"": text})[""]


def mask_all(texts: Mapping[str, str]) -> dict[str, str]:
    """`mask` of every value."""
    secrets = _known(*(os.environ.get(name, "") for name in (*_VARIABLES, *_ADDRESSES)))
    return {name: _without(text, secrets) for name, text in texts.items()}


def _without(text: str, secrets: Iterable[str]) -> str:
    for secret in secrets:
        text = text.replace(secret, MASK)
    if "@" in text:  # most texts hold neither, and there are many
        text = _IN_ADDRESS.sub(rf"\g<before>{MASK}", text)
    return _IN_QUERY.sub(rf"\g<before>{MASK}", text) if "=" in text else text


@functools.lru_cache(maxsize=1)
def _known(*values: str) -> list[str]:
    """Secrets in the values of `_VARIABLES` and `_ADDRESSES`, longest first."""
    found = list(values[: len(_VARIABLES)])
    for address in values[len(_VARIABLES) :]:
        match = re.match(r"[a-z][a-z0-9+.-]*://[^/\s:@]*:([^/\s@]+)@", address, re.IGNORECASE)
        if match:
            found += [match[1], unquote(match[1])]
    return sorted({secret for secret in found if len(secret) >= _SHORTEST}, key=len, reverse=True)
