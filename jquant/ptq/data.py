"""The calibration batches as the block at hand sees them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import jax

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
