"""Turns a pydantic error about a sweep config into one line: got, allowed, where."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from difflib import SequenceMatcher
from typing import Any

from pydantic import BaseModel, ValidationError

from fffsweep.sweeps.yaml_source import Key, Source, dotted

_BOUNDS = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
_LIMITS = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}  # where pydantic leaves a bound out of the schema of a nullable field
_TYPES = {"integer": "an integer", "number": "a number", "boolean": "true or false", "string": "text", "object": "a mapping of settings"}


class Misfit(ValueError):
    """Raised by a validator that knows better than pydantic which value is at fault: its path follows the message."""

    def __init__(self, message: str, *path: str | int) -> None:
        super().__init__(message)
        self.path = path


def nearest_first(name: str, choices: Iterable[str], most: int = 8) -> str:
    """The choices as a list to read, those that look like `name` first, `most` of them at most."""
    ordered = sorted(choices, key=lambda choice: -SequenceMatcher(None, name.lower(), choice.lower()).ratio())
    return ", ".join(ordered[:most]) + (f" and {len(ordered) - most} more" if len(ordered) > most else "")


def explain(error: ValidationError, source: Source, model: type[BaseModel]) -> str:
    """One line for the first fault; unknown keys come first, since a misspelt key also makes another one missing."""
    faults = error.errors(include_url=False)
    fault = min(faults, key=lambda fault: (fault["type"] != "extra_forbidden", -_known_depth(fault["loc"], source.values)))
    schema = model.model_json_schema()
    key = _in_values(fault["loc"], source.values, keep_last=fault["type"] == "missing")
    reason = fault.get("ctx", {}).get("error")
    if isinstance(reason, Misfit):
        return f"{reason} ({source.origin((*key, *reason.path))})"
    if isinstance(reason, ValueError):
        return f"{_prefix(key, str(reason))}{reason} ({source.origin(_named(key, str(reason), source))})"
    if fault["type"] == "extra_forbidden":
        around = _choices(schema, _at(schema, key[:-1]))
        allowed = [name for choice in around for name in choice.get("properties", ())]
        return f"{dotted(key)}: unknown key; expected one of {nearest_first(str(key[-1]), allowed)} ({source.origin(key)})"
    expected = _describe(schema, _at(schema, fault["loc"]), _shown(fault["input"])) or fault["msg"][:1].lower() + fault["msg"][1:]
    expected += "".join(
        f" {sign} {fault['ctx'][name]}" for name, sign in _LIMITS.items() if name in fault.get("ctx", {}) and sign not in expected
    )
    if fault["type"] == "missing":
        return f"{dotted(key)}: missing; expected {expected} ({source.origin(key)})"
    return f"{dotted(key)}={_shown(fault['input'])}: expected {expected} ({source.origin(key)})"


def _named(key: Key, message: str, source: Source) -> Key:
    """The setting in the block at `key` that a message starts with, as "num_heads=5 with ..." does: its line says more than its block's."""
    word = (re.match(r"\w*", message) or [""])[0]
    return next(((*key, name) for name in (word, f"{word}s") if (*key, name) in source.origins), key)


def _in_values(loc: tuple[int | str, ...], values: Any, keep_last: bool) -> Key:
    """The part of a pydantic location that leads to a value; the names that it inserts for unions lead nowhere and are dropped."""
    key: list[int | str] = []
    for position, part in enumerate(loc):
        if isinstance(values, list) and isinstance(part, str):  # a validator of the list lost the index: the entry that has such a key
            index = next((i for i, entry in enumerate(values) if isinstance(entry, dict) and part in entry), None)
            values = values if index is None else values[index]
            key += [] if index is None else [index]
        if (isinstance(values, dict) and part in values) or (isinstance(values, list) and isinstance(part, int) and part < len(values)):
            values = values[part]  # type: ignore[index]
            key.append(part)
        elif keep_last and position == len(loc) - 1:
            key.append(part)
    return tuple(key)


def _known_depth(loc: tuple[int | str, ...], values: Any) -> int:
    return len(_in_values(loc, values, keep_last=False))


def _prefix(key: Key, message: str) -> str:
    """Path to put before a validator's own message, unless that names the setting itself."""
    return "" if not key or message.startswith((f"{key[-1]}=", f"{key[-1]} ", dotted(key))) else f"{dotted(key)}: "


def _shown(value: Any) -> str:
    if isinstance(value, str) and value.isprintable() and value.strip():
        text = value
    else:
        text = json.dumps(value, default=str, ensure_ascii=True)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _at(schema: dict[str, Any], loc: tuple[int | str, ...]) -> dict[str, Any]:
    """JSON schema of the value at a pydantic location; names that it inserts for unions are passed over."""
    here = schema
    for part in loc:
        inner = [_step(choice, part) for choice in _choices(schema, here)]
        here = next((found for found in inner if found), here)
    return _resolve(schema, here)


def _step(schema: dict[str, Any], part: str | int) -> dict[str, Any]:
    if isinstance(part, int):
        found = schema.get("items", {})
    else:
        found = schema.get("properties", {}).get(part) or schema.get("additionalProperties", {})
    return found if isinstance(found, dict) else {}


def _resolve(root: dict[str, Any], schema: dict[str, Any]) -> dict[str, Any]:
    while "$ref" in schema:
        schema = root["$defs"][schema["$ref"].rsplit("/", 1)[1]]
    return schema


def _choices(root: dict[str, Any], schema: dict[str, Any]) -> list[dict[str, Any]]:
    schema = _resolve(root, schema)
    choices = schema.get("anyOf") or schema.get("oneOf") or [schema]
    return [_resolve(root, choice) for choice in choices if choice.get("type") != "null"]


def _describe(root: dict[str, Any], schema: dict[str, Any], got: str) -> str:
    """What a JSON schema allows, in words; empty if it says nothing."""
    choices = _choices(root, schema)
    if len(choices) > 1:
        return " or ".join(dict.fromkeys(filter(None, (_describe(root, choice, got) for choice in choices))))
    schema = choices[0]
    if "enum" in schema:
        return f"one of {nearest_first(got, map(str, schema['enum']))}"
    if "const" in schema:
        return str(schema["const"])
    if schema.get("type") == "array":
        item = _describe(root, schema.get("items", {}), got)
        return (
            "a list" + (f" with at least {schema['minItems']} entry" if schema.get("minItems") else "") + (f", each {item}" if item else "")
        )
    bounds = " and ".join(f"{sign} {schema[bound]}" for bound, sign in _BOUNDS.items() if bound in schema)
    return " ".join(filter(None, (_TYPES.get(schema.get("type", ""), ""), bounds)))
