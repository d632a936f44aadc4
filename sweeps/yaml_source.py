"""Reads a sweep config as YAML that remembers where every value was written, and lays `--set` overrides and `scale:` over it."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

Key = tuple[str | int, ...]

_MAX_VALUES = 100_000  # aliases of aliases can make a short file endless
_DEEPEST = 50
_TAGS = {name: f"tag:yaml.org,2002:{name}" for name in ("str", "int", "float", "bool", "null", "map", "seq")}


class ConfigError(ValueError):
    """A user's mistake in a config; its text is the one line to show."""


class _Loader(yaml.SafeLoader):
    """Scalars of YAML 1.2: `1e6` is a number, and `0x5`, `no`, `1:30` and dates stay the text that they are."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012 - declared by the base


for _tag, _pattern, _first in (
    (_TAGS["null"], r"~|null|Null|NULL|", "~nN"),
    (_TAGS["bool"], r"true|True|TRUE|false|False|FALSE", "tTfF"),
    (_TAGS["int"], r"[-+]?[0-9][0-9_]*", "-+0123456789"),
    (_TAGS["float"], r"[-+]?(?:[0-9][0-9_]*\.?[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?", "-+.0123456789"),
):
    _Loader.add_implicit_resolver(_tag, re.compile(rf"(?:{_pattern})\Z"), [*_first, ""] if _tag == _TAGS["null"] else list(_first))


class _FastLoader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """The same in C, where PyYAML has it; what it says of mistakes is less clear."""

    yaml_implicit_resolvers = _Loader.yaml_implicit_resolvers


@dataclass
class Source:
    """Plain values of a config, and for each path in them the words that say where it was written."""

    label: str
    values: dict[str, Any] = field(default_factory=dict)
    origins: dict[Key, str] = field(default_factory=dict)

    def origin(self, key: Key) -> str:
        """Where the value at `key`, or else the nearest one around it, was written."""
        while key and key not in self.origins:
            key = key[:-1]
        return self.origins.get(key, self.label)

    def get(self, key: Key) -> Any:
        """Value at `key`, None if there is none."""
        value: Any = self.values
        for part in key:
            value = value.get(part) if isinstance(value, dict) else None
        return value

    def put(self, key: Key, value: Any, origin: str) -> None:
        """Set the value at `key`, creating mappings on the way. Raises ConfigError if `key` leads through a scalar or past a list's end."""
        holder: Any = self.values
        for position, part in enumerate(key):
            here, last = dotted(key[:position]) or "the config", position == len(key) - 1
            if isinstance(part, int):
                if not isinstance(holder, list):
                    raise ConfigError(f"{here} is no list, so it has no item {part} ({origin})")
                if part > len(holder):
                    raise ConfigError(f"{here} has {len(holder)} items: expected an index from 0 to {len(holder)} ({origin})")
                if part == len(holder):
                    holder.append(None)
            elif not isinstance(holder, dict):
                raise ConfigError(f"{here} is no mapping, so it has no key {part} ({origin})")
            if last:
                holder[part] = value
            elif isinstance(part, str) and holder.get(part) is None:
                holder[part] = {}
                self.origins[key[: position + 1]] = origin
            holder = holder[part]
        for known in [known for known in self.origins if known[: len(key)] == key]:
            del self.origins[known]
        self.origins[key] = origin


def dotted(key: Iterable[str | int]) -> str:
    """A path as users write it: stages.benchmark_cpu.points[0].tokens."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in key).removeprefix(".")


def read_source(path: Path, overrides: Iterable[str] = ()) -> Source:
    """The config file at `path` with its `scale:` block and the overrides laid over it.

    An override is `path=value`, the value in YAML. Those of the scale block come before it is applied, the others after.
    Raises ConfigError, which names file and line, or the override.
    """
    source = _read_file(path)
    parsed = [_parse_override(text) for text in overrides]
    for key, value, origin in parsed:
        if key[0] == "scale":
            source.put(key, value, origin)
    scale = source.values.pop("scale", None)
    if scale is not None and not isinstance(scale, dict):
        raise ConfigError(f"scale: expected a mapping of settings to lay over the config ({source.origin(('scale',))})")
    for key, value in _leaves(scale or {}):
        source.put(key, value, source.origin(("scale", *key)))
    for key, value, origin in parsed:
        if key[0] != "scale":
            source.put(key, value, origin)
    return source


def parse_yaml(text: str, label: str) -> tuple[Any, dict[Key, str]]:
    """Value of a YAML text and the place of everything in it. Raises ConfigError for whatever is no plain, single YAML document."""
    try:
        node = _compose(text)
        origins: dict[Key, str] = {}
        return _convert(node, (), label, origins), origins
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise ConfigError(f"not YAML: {error.problem or error.context} ({_place(label, mark)})") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"not YAML: {' '.join(str(error).split())} ({label})") from None
    except RecursionError:
        raise ConfigError(f"not a config: nested without end ({label})") from None


def _compose(text: str) -> yaml.Node | None:
    loader: Any = _Loader if _is_odd(text) else _FastLoader
    node: yaml.Node | None = yaml.compose(text, Loader=loader)
    return node


def _is_odd(text: str) -> bool:
    """Whether a text is better read in Python: its words about mistakes are clearer, and nesting without end would crash the other."""
    depth = 0
    try:
        for event in yaml.parse(text, Loader=_FastLoader):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > _DEEPEST or isinstance(event, yaml.AliasEvent):
                return True
    except yaml.YAMLError:
        return True
    return False


def _read_file(path: Path) -> Source:
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not a text file (byte {error.start} is no UTF-8); expected a sweep config in YAML") from None
    except FileNotFoundError:
        others = sorted(str(other) for other in path.parent.glob("*.yaml")) if path.parent.is_dir() else []
        raise ConfigError(
            f"{path}: no such file; " + (f"there are {', '.join(others)}" if others else "give the path of a sweep config")
        ) from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); expected a sweep config in YAML") from None
    values, origins = parse_yaml(text, str(path))
    if not isinstance(values, dict):
        raise ConfigError(
            f"{path}: expected a mapping of settings such as `layouts: [1x11]`, got {'nothing' if values is None else 'something else'}"
        )
    return Source(str(path), values, origins)


def _parse_override(text: str) -> tuple[Key, Any, str]:
    origin = f"--set {text}"
    path, equals, value = text.partition("=")
    if not equals or not re.fullmatch(r"[^.\[\]\s]+(?:\.[^.\[\]\s]+|\[[0-9]+\])*", path.strip()):
        raise ConfigError(f"{origin}: expected path=value, such as stages.pretrain.tokens=1e6 or controls[0]=none")
    parts = re.findall(r"\[([0-9]+)\]|([^.\[\]\s]+)", path)
    key: Key = tuple(int(index) if index else name for index, name in parts)
    return key, parse_yaml(value, origin)[0], origin


def _leaves(values: dict[str, Any], prefix: Key = ()) -> Iterable[tuple[Key, Any]]:
    """Everything in nested mappings that is no mapping with something in it."""
    for name, value in values.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, (*prefix, name))
        else:
            yield (*prefix, name), value


def _convert(node: yaml.Node | None, key: Key, label: str, origins: dict[Key, str]) -> Any:
    if node is None:
        return None
    origins.setdefault(key, _place(label, node.start_mark))
    if len(origins) > _MAX_VALUES:
        raise ConfigError(f"more than {_MAX_VALUES} values ({label})")
    if node.tag not in _TAGS.values():
        raise ConfigError(f"tag {node.tag}: expected plain YAML without tags or merge keys ({origins[key]})")
    if isinstance(node, yaml.MappingNode):
        values: dict[str, Any] = {}
        for name_node, value_node in node.value:
            place = _place(label, name_node.start_mark)
            if not isinstance(name_node, yaml.ScalarNode):
                raise ConfigError(f"a key is no text ({place})")
            name = name_node.value
            if name in values:
                raise ConfigError(f"{dotted((*key, name))}: given twice, first at {origins[(*key, name)]}; keep one ({place})")
            origins[(*key, name)] = place
            values[name] = _convert(value_node, (*key, name), label, origins)
        return values
    if isinstance(node, yaml.SequenceNode):
        return [_convert(item, (*key, index), label, origins) for index, item in enumerate(node.value)]
    return _scalar(node.tag, str(node.value), origins[key])


def _scalar(tag: str, text: str, origin: str) -> Any:
    try:
        if tag == _TAGS["int"]:
            return int(text.replace("_", ""))
        if tag == _TAGS["float"]:
            return float(text.replace("_", ""))
    except ValueError:
        raise ConfigError(f"{text[:40]}...: not a number that can be held ({origin})") from None
    if tag == _TAGS["bool"]:
        return text.lower() == "true"
    return None if tag == _TAGS["null"] else text


def _place(label: str, mark: yaml.Mark | None) -> str:
    return label if mark is None or label.startswith("--set ") else f"{label}, line {mark.line + 1}"
