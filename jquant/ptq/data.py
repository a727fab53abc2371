"""The calibration batches as the block at hand sees them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax
import numpy as np

from jquant.core.errors import InputError
from jquant.nn.capture import Arguments
from jquant.nn.surgery import Path
from jquant.ptq.activations import Store

Products = Literal["float32", "bfloat16"]  # what the factors of products are rounded to


@dataclass(frozen=True, kw_only=True)
class Data:
    """The calibration batches as they enter a block; `store` keeps what layers inside read, under their paths."""

    count: int
    arguments: Callable[[int], Arguments]
    mask: Callable[[int], jax.Array | None]  # True for positions that count; None: all do
    store: Store
    narrow: tuple[Path, ...] = ()  # layers whose factors are rounded to bfloat16 (nn/capture.py), and their statistics

    @property
    def products(self) -> Products:
        """What factors of statistics and reports are rounded to."""
        return "bfloat16" if self.narrow else "float32"


def check_tokens(batches: Sequence[Any], vocabulary: int) -> None:
    """Raises InputError where batches are not token ids int [batch, time], all of one shape and in the vocabulary."""
    shapes = [tuple(np.shape(batch)) for batch in batches]
    for index, batch in enumerate(batches):
        kind = getattr(batch, "dtype", None)
        if len(shapes[index]) != 2 or kind is None or not np.issubdtype(kind, np.integer):
            kind = type(batch).__name__ if kind is None else kind
            raise InputError(f"calibration batch {index} is {kind}{list(shapes[index])}: give token ids [batch, time]")
        if shapes[index] != shapes[0]:
            raise InputError(
                f"calibration batch {index} is {list(shapes[index])}, the first {list(shapes[0])}: give batches of one "
                "shape, shorter ones padded, with masks"
            )
        if getattr(batch, "is_fully_addressable", True) and not 0 <= np.min(batch) <= np.max(batch) < vocabulary:
            raise InputError(f"calibration batch {index} holds token ids outside of 0 … {vocabulary - 1}")


def check_masks(masks: Sequence[Any] | None, shapes: Sequence[tuple[int, ...]]) -> None:
    """Raises InputError where there is not one mask a batch, of its rows: `shapes`, of which some axes may be left out
    at the end."""
    if masks is None:
        return
    if len(masks) != len(shapes):
        raise InputError(f"{len(masks)} masks for {len(shapes)} calibration batches: give one a batch")
    for index, (mask, shape) in enumerate(zip(masks, shapes, strict=True)):
        found = tuple(np.shape(mask))
        if not found or found != shape[: len(found)]:
            raise InputError(
                f"mask {index} is {list(found)} for a calibration batch of {list(shape)}: it must have an entry a row"
            )
