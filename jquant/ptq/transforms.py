"""The transforms by name: each rewrites a float block into an equivalent one that quantizes better."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jquant.core.errors import InputError


@dataclass(frozen=True)
class Transform:
    """What rewrites a block in place (see ptq/block.py), and the config that its name stands for."""

    apply: Callable[..., Sequence[Any]]
    config: Any


TRANSFORMS: dict[str, Transform] = {}


def configured(registry: Mapping[str, Any], name: str, options: Sequence[tuple[str, Any]]) -> Any:
    """The config of a solver or transform with options changed.

    Raises:
        InputError: name or option is unknown, or a value is refused; the message lists what there is.
    """
    if name not in registry:
        raise InputError(f"method {name!r}: unknown; there are {', '.join(registry)}")
    config = registry[name].config
    fields = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    for option, value in options:
        if option not in fields:
            there = f"there are {', '.join(fields)}" if fields else "it has none"
            raise InputError(f"method {name}: unknown option {option!r}; {there}")
        kind = type(fields[option])
        if isinstance(fields[option], bool) != isinstance(value, bool) or (
            isinstance(fields[option], int | float) and not isinstance(value, int | float | str)
        ):
            raise InputError(
                f"method {name}: {option} is {value!r}; it must be as its default, {fields[option]!r} ({kind.__name__})"
            )
    try:
        return dataclasses.replace(config, **dict(options))
    except (TypeError, ValueError) as error:
        raise error if isinstance(error, InputError) else InputError(f"method {name}: {error}") from error
