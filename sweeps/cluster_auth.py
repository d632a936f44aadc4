"""The token that Ray clusters ask for: made when a cluster is started, used whenever one is spoken to."""

from __future__ import annotations

import os
import secrets
from pathlib import Path


def token_path() -> Path:
    """File of the token, as Ray looks for it."""
    return Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")


def use_token() -> None:
    """Have Ray authenticate with the token that the environment or the file holds, unless `RAY_AUTH_MODE` says otherwise.

    Must run before ray is imported. A cluster that runs open ignores the token.
    """
    if os.environ.get("RAY_AUTH_TOKEN") or token_path().exists():
        os.environ.setdefault("RAY_AUTH_MODE", "token")


def make_token() -> None:
    """Make a token, readable by its owner alone, unless there is one; and use it."""
    path = token_path()
    if not os.environ.get("RAY_AUTH_TOKEN") and not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(secrets.token_hex(32))
    use_token()
