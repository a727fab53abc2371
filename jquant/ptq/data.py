"""The calibration batches: what is asked of those given, and those that the block at hand sees."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jquant.core.errors import InputError
from jquant.nn.capture import Arguments
from jquant.nn.placement import fetched
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


def check_arrays(batches: Sequence[tuple[Any, ...]]) -> None:
    """Raises InputError where a module of its own would be called with what is no array."""
    for index, batch in enumerate(batches):
        for each in batch:
            if not isinstance(each, np.ndarray | jax.Array):
                raise InputError(
                    f"calibration batch {index} is a {type(each).__name__}: give the array that the module is called "
                    "with, or a tuple of arrays"
                )


def check_tokens(batches: Sequence[Any], masks: Sequence[Any] | None, vocabulary: int | None) -> None:
    """Raises InputError where a batch is no array of token ids, of another shape or outside the vocabulary, or a mask
    does not fit it.

    Args:
        batches: token ids, int32 [batch, time].
        masks: True for the positions that count, bool [batch, time]; None where all do.
        vocabulary: how many tokens the model knows; None where that is unknown.
    """
    _check_sequence("calibration batches", batches)
    for index, batch in enumerate(batches):
        what = f"calibration batch {index}"
        if not _is_array(batch, jnp.integer) or batch.ndim != 2:
            raise InputError(f"{what} is {_described(batch)}: give token ids as integer arrays [batch, time]")
        if batch.shape != batches[0].shape:
            raise InputError(f"{what} is {batch.shape}, batch 0 {batches[0].shape}: give all in one shape")
    if len(batches) == 0 or batches[0].shape[0] < 1 or batches[0].shape[1] < 2:
        raise InputError("the recipe's methods learn from data: give calibration batches of at least 2 tokens")
    for index, batch in enumerate(batches):
        ids = fetched(batch)
        for worst in (int(ids.min()), int(ids.max())):
            if worst < 0 or (vocabulary is not None and worst >= vocabulary):
                raise InputError(
                    f"calibration batch {index} holds token id {worst}, outside the model's vocabulary of "
                    f"{vocabulary}: use its own tokenizer"
                )
    check_masks(masks, len(batches), batches[0].shape)


def check_masks(masks: Sequence[Any] | None, count: int, shape: tuple[int, ...] | None = None) -> None:
    """Raises InputError unless there is a boolean array, of that shape, for each of so many batches, or no mask at
    all."""
    if masks is None:
        return
    _check_sequence("masks", masks)
    if len(masks) != count:
        raise InputError(f"{len(masks)} masks for {count} calibration batches: give one a batch")
    for index, mask in enumerate(masks):
        if not _is_array(mask, jnp.bool_):
            raise InputError(f"mask {index} is {_described(mask)}: give boolean arrays, True for positions that count")
        if shape is not None and mask.shape != shape:
            raise InputError(f"mask {index} is {mask.shape}, its batch {shape}: give one entry a token")


def _check_sequence(name: str, given: Any) -> None:
    if not (hasattr(given, "__len__") and hasattr(given, "__getitem__")):
        raise InputError(f"{name} are a {type(given).__name__}: every block reads them, so give a list")


def _is_array(value: Any, kind: Any) -> bool:
    return isinstance(value, np.ndarray | jax.Array) and jnp.issubdtype(value.dtype, kind)


def _described(value: Any) -> str:
    return f"{value.dtype}{list(value.shape)}" if _is_array(value, jnp.generic) else f"a {type(value).__name__}"
