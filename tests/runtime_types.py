"""What tests/conftest.py holds annotations to: the shapes and dtypes of arrays, by beartype, and nothing else.

Other annotations are pyright's business: at run time they would get in the way of protocols, of tests that pass a
wrong type on purpose, and of jax, which rebuilds a pytree with anything in the place of its arrays.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, get_args

from beartype import beartype
from jaxtyping import AbstractArray


def shapes_checked(function: Callable) -> Callable:
    """`function`, refusing arrays that its annotations do not describe."""
    hints = {name: hint if _has_shape(hint) else Any for name, hint in inspect.get_annotations(function).items()}
    if all(hint is Any for hint in hints.values()):
        return function
    function.__annotations__ = hints
    return beartype(function)


def _has_shape(hint: Any) -> bool:
    if inspect.isclass(hint) and issubclass(hint, AbstractArray):
        return True
    return any(_has_shape(part) for part in get_args(hint))
