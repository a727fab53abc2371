"""GPTQ's rounding errors as sums of two bfloat16 matrices, laid out as products on tensor cores want them.

    S·E ≈ S_low·E_high + S_high·E_low + S_high·E_high = [S_low S_high S_high]·[E_high; E_low; E_high]

What XLA calls BF16_BF16_F32_X3, 3e-5 off (2e-6 with TF32's parts), but as one matrix product, which takes all three
through memory once. What earlier blocks lost stands as the right side from the start, so it is never put together.

Reference: none; 2210.17323 has the products in float32.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, BFloat16, Float32


class Parts(NamedTuple):
    """A float32 matrix as the sum of two of bfloat16, 16 of its 24 bits: as products want it."""

    high: BFloat16[Array, "n rows"]
    low: BFloat16[Array, "n rows"]

    @classmethod
    def of(cls, x: Float32[Array, "n rows"]) -> Parts:
        """In XLA's programs."""
        # Not by a cast to bfloat16 and back, which XLA leaves out: the low part would be 0.
        high = jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)
        return cls(high.astype(jnp.bfloat16), (x - high).astype(jnp.bfloat16))

    @classmethod
    def inside(cls, x: Float32[Array, "n rows"]) -> Parts:
        """In kernels, whose compilers keep a cast, and do not know `reduce_precision`."""
        high = x.astype(jnp.bfloat16)
        return cls(high, (x - high.astype(jnp.float32)).astype(jnp.bfloat16))

    def times(self, other: Parts) -> Float32[Array, "n m"]:
        """The product without that of the two low parts."""
        product = partial(jnp.matmul, preferred_element_type=jnp.float32)
        return product(self.low, other.high) + product(self.high, other.low) + product(self.high, other.high)


class Errors(NamedTuple):
    """w − q of several blocks, as the right side of a product has them: of each block the high parts, the low ones, and
    the high ones again."""

    whole: BFloat16[Array, "thrice rows"] | None  # None until a block has been rounded
    blocks: int
    done: int = 0  # of the blocks

    def parts(self, n: int) -> Parts:
        """Of the first block, of n columns."""
        assert self.whole is not None
        return Parts(self.whole[:n], self.whole[n : 2 * n])

    def added(self, parts: Parts | Float32[Array, "n rows"]) -> Errors:
        """With those of the next block."""
        high, low = parts if isinstance(parts, Parts) else Parts.of(parts)
        n, rows = high.shape
        whole = jnp.zeros((3 * self.blocks * n, rows), jnp.bfloat16) if self.whole is None else self.whole
        here = jnp.concatenate([high, low, high])
        whole = jax.lax.dynamic_update_slice_in_dim(whole, here, 3 * self.done * n, axis=0)
        return Errors(whole, self.blocks, self.done + 1)


def left_side(shares: Float32[Array, "m columns"], n: int) -> BFloat16[Array, "m thrice"]:
    """What `Errors` of blocks of n columns are multiplied by: shares · (w − q), but for the product of low parts."""
    high, low = (each.reshape(len(shares), -1, 1, n) for each in Parts.of(shares))
    return jnp.concatenate([low, high, high], axis=2).reshape(len(shares), -1)
