"""The cells of a sweep, in order: each scheme, or each scheme with each group size."""

from __future__ import annotations

from collections.abc import Sequence

from jquant.core.errors import InputError
from jquant.core.scheme import Scheme, scheme, with_group


def grid(schemes: Sequence[str], groups: Sequence[int] = ()) -> tuple[Scheme, ...]:
    """Parsed schemes, every one combined with every group size where sizes are given; repeats dropped.

    Raises:
        InputError: a spec is malformed.
    """
    parsed = [scheme(spec) for spec in schemes]
    combined = [with_group(spec, size) for spec in parsed for size in groups] if groups else parsed
    if not combined:
        raise InputError("the grid is empty: give at least one scheme")
    return tuple(dict.fromkeys(combined))
