"""JSON Schema of a sweep config as it is written in YAML, for editors and validators."""

from __future__ import annotations

import json
from typing import Any

from fffsweep.sweeps.config import SweepConfig

_COUNT = r"^[+-]?[0-9][0-9_]*(\.[0-9]*)?([eE][+-]?[0-9]+)?[kMGB]?$"


def sweep_schema() -> dict[str, Any]:
    """Schema of the file: `name` may be left out, counts may be texts such as 1M, and `scale` takes any part of the config."""
    schema = SweepConfig.model_json_schema()
    definitions = schema.pop("$defs")
    parts = {f"Part{name}": _part(definition) for name, definition in definitions.items()}
    whole = {name: value for name, value in schema.items() if name != "required"}
    schema["required"].remove("name")
    schema["properties"]["scale"] = {
        "description": "Laid over the rest of the config; without it the config is the full-size experiment.",
        "anyOf": [{"$ref": "#/$defs/Scale"}, {"type": "null"}],
    }
    definitions = {**definitions, **parts, "Scale": _part(whole)}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **_counts({**schema, "$defs": definitions})}


def _part(definition: dict[str, Any]) -> dict[str, Any]:
    """The same with nothing required, at any depth."""
    text = json.dumps({name: value for name, value in definition.items() if name != "required"})
    part: dict[str, Any] = json.loads(text.replace("#/$defs/", "#/$defs/Part"))
    return part


def _counts(schema: Any) -> Any:
    """Let every integer be written as a text that counts, such as 1M; bounds go on for numbers."""
    if isinstance(schema, list):
        return [_counts(entry) for entry in schema]
    if not isinstance(schema, dict):
        return schema
    widened = {name: _counts(value) for name, value in schema.items()}
    return {**widened, "type": ["integer", "string"], "pattern": _COUNT} if schema.get("type") == "integer" else widened
