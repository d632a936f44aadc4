"""Base of every config model: frozen, unknown keys refused, counts that read as people write them."""

from __future__ import annotations

import json
import re
from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, BeforeValidator, ConfigDict

_SUFFIXES = {"k": 10**3, "M": 10**6, "G": 10**9, "B": 10**9}


class Settings(BaseModel):
    """A config block. Two equal blocks have equal canonical JSON, whatever order their keys were written in."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
    locations: ClassVar[frozenset[str]] = frozenset()  # fields that say where something lies, not what it is

    def resolved(self) -> dict[str, Any]:
        """Every field, defaults included, as plain JSON values."""
        return self.model_dump(mode="json")

    def identity(self) -> dict[str, Any]:
        """`resolved` without `locations`, in nested blocks too: what can determine a result. Keys hash this."""
        found: dict[str, Any] = _identity(self, self.resolved())
        return found


def _identity(value: Any, plain: Any) -> Any:
    """`plain` is what `value` resolves to."""
    if isinstance(value, Settings):
        return {name: _identity(getattr(value, name), plain[name]) for name in plain if name not in value.locations}
    if isinstance(value, tuple | list):
        return [_identity(*pair) for pair in zip(value, plain, strict=True)]
    return plain


def parse_count(value: Any) -> Any:
    """Whole number from 1e6, "1e6", "1_000_000" or "1M"; anything else is returned for pydantic to judge.

    PyYAML reads `1e6` as a string. Suffixes: k 10^3, M 10^6, G and B 10^9. Raises ValueError if the number is not whole.
    """
    if isinstance(value, str):
        match = re.fullmatch(r"\s*([+-]?[0-9][0-9_]*(?:\.[0-9]*)?(?:[eE][+-]?[0-9]+)?)\s*([kMGB]?)\s*", value)
        if not match:
            return value
        value = (
            float(match[1].replace("_", "")) * _SUFFIXES.get(match[2], 1) if re.search(r"[.eE]", match[1]) or match[2] else int(match[1])
        )
    if isinstance(value, float):
        if not value.is_integer():
            raise ValueError(f"{value}: expected a whole number, such as 1000000, 1e6 or 1M")
        return int(value)
    return value


def parse_number(value: Any) -> Any:
    """Float from what PyYAML leaves a string, such as `1e-3`; anything else is returned for pydantic to judge."""
    if isinstance(value, str):
        try:
            return float(value.replace("_", ""))
        except ValueError:
            return value
    return value


Count = Annotated[int, BeforeValidator(parse_count)]
Number = Annotated[float, BeforeValidator(parse_number)]


_CANONICAL = json.JSONEncoder(sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def canonical_json(value: Any) -> str:
    """The one text of a JSON value that hashes are taken of: sorted keys, no spaces, no NaN."""
    return _CANONICAL.encode(value)
