"""What a frozen dataclass of options says of its own fields, held when it is made."""

from __future__ import annotations

import dataclasses
import math
import numbers
from functools import cache
from typing import Any, Literal, get_args, get_origin, get_type_hints

from jquant.core.errors import InputError


def check_fields(config: Any, name: str) -> None:
    """Raises InputError where a field is not what its annotation says: one of the words of a Literal, a bool, a whole
    number, or a finite one; of a union any of these. `name` is whose options they are.
    """
    for field, kind in _hints(type(config)).items():
        value = getattr(config, field)
        kinds = get_args(kind) if get_origin(kind) not in (None, Literal) else (kind,)
        if not any(_is(value, each) for each in kinds):
            raise InputError(f"{name} {field} {value!r}: it must be {' or '.join(map(_words, kinds))}")


@cache
def _hints(kind: type) -> dict[str, Any]:
    hints = get_type_hints(kind)
    return {field.name: hints[field.name] for field in dataclasses.fields(kind)}


def _is(value: Any, kind: Any) -> bool:
    if get_origin(kind) is Literal:
        return isinstance(value, str) and value in get_args(kind)
    if kind is bool or isinstance(value, bool):
        return kind is bool and isinstance(value, bool)
    if kind is int:
        return isinstance(value, numbers.Integral)
    return isinstance(value, numbers.Real) and math.isfinite(value)


def _words(kind: Any) -> str:
    if get_origin(kind) is Literal:
        *others, last = get_args(kind)
        return f"{', '.join(others)} or {last}" if others else repr(last)
    return {bool: "true or false", int: "an integer"}.get(kind, "a number")
