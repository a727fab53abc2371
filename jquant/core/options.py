"""Kinds of command-line options that several configs share."""

from __future__ import annotations

from typing import Annotated

import tyro

Names = Annotated[
    tuple[str, ...],
    tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="A,B,…",
        instance_from_str=lambda words: tuple(word.strip() for word in words[0].split(",") if word.strip()),
        is_instance=lambda value: isinstance(value, tuple) and all(isinstance(item, str) for item in value),
        str_from_instance=lambda value: [",".join(value)],
    ),
]
Sizes = Annotated[
    tuple[int, ...],
    tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="N,M,…",
        instance_from_str=lambda words: tuple(int(word) for word in words[0].split(",") if word.strip()),
        is_instance=lambda value: isinstance(value, tuple) and all(isinstance(item, int) for item in value),
        str_from_instance=lambda value: [",".join(map(str, value))],
    ),
]
