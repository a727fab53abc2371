"""A config dataclass from YAML: the same fields as on the command line, checked by name and kind."""

from __future__ import annotations

import dataclasses
import types
import typing
from pathlib import Path
from typing import Any, Literal

from jquant.core.errors import InputError


def read_config_file(path: str | Path, config_type: type) -> dict[str, Any]:
    """Field values of `config_type` from a YAML mapping; names may be written with - or _, without those of groups.

    Raises:
        InputError: the file cannot be read or is no mapping, a field is unknown, or a value is of the wrong kind.
    """
    import yaml

    path = Path(path)
    try:
        record = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read: {error}") from error
    except yaml.YAMLError as error:
        raise InputError(f"{path}: is no YAML: {' '.join(str(error).split())}") from error
    if not isinstance(record, dict):
        raise InputError(f"{path}: must be a mapping of option: value")
    kinds = typing.get_type_hints(config_type)
    groups: dict[str, Any] = {name: kind for name, kind in kinds.items() if dataclasses.is_dataclass(kind)}
    home = {inner: group for group, kind in groups.items() for inner in _names(kind)}
    kinds |= {inner: typing.get_type_hints(groups[group])[inner] for inner, group in home.items()}
    grouped: dict[str, dict[str, Any]] = {}
    values = {}
    for key, value in record.items():
        name = str(key).replace("-", "_")
        if name not in kinds or name in groups:
            names = [name for name in (*_names(config_type), *home) if name not in groups]
            raise InputError(f"{path}: unknown field {key!r}; there are {', '.join(names)}")
        place = grouped.setdefault(home[name], {}) if name in home else values
        place[name] = _convert(value, kinds[name], f"{path}: {key}")
    return values | {name: groups[name](**inner) for name, inner in grouped.items()}


def _names(config_type: type) -> list[str]:
    return [field.name for field in dataclasses.fields(config_type)]


def _convert(value: Any, kind: Any, what: str) -> Any:
    """The value as the field's type has it."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in arguments:
            return None
        (kind,) = [argument for argument in arguments if argument is not type(None)]
        return _convert(value, kind, what)
    if origin is Literal:
        if value not in arguments:
            raise InputError(f"{what}: is {value!r}; allowed are {', '.join(map(str, arguments))}")
        return value
    if origin is tuple:
        items = [item.strip() for item in value.split(",")] if isinstance(value, str) else value
        if not isinstance(items, list):
            items = [items]
        return tuple(_convert(item, arguments[0], what) for item in items)
    if kind is Path and isinstance(value, str):
        return Path(value)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if kind is int and isinstance(value, str) and value.strip().lstrip("-").isdigit():
        return int(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise InputError(f"{what}: is {value!r}, it must be {'text' if kind is str else kind.__name__}")
    return value
