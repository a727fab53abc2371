"""The Gram matrix of a layer's input: all that second-order methods know of the data.

    H = (2 / N) · Σ xᵀx        over the N rows that are not masked

Layers that read the same input share it. The state holds sums, so batches stream through it and shards add up.

Reference: GPTQ (Frantar et al., 2210.17323), 2: the Hessian of ‖WX − ŴX‖² in a row of W, the same for all rows.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jquant.core.errors import InputError, InputWarning
from jquant.core.symmetric import mirrored

_STRIPS, _WORTH_STRIPS = 4, 512  # at 576 strips take 0.73 of the time (one core); narrower products lose speed
_WIDE = 2048  # from here on the sums stay in the memory of the matrix: no second one has room beside it
_STRETCH = 256  # rows of an expert in one product
# Less than a row for so many inputs is worse than none. Measured: SmolLM2, whose widest layer has 1536, in int3:g64,
# perplexity of 6 × 512 tokens of WikiText-2: rounding 203; AWQ from 2 tokens 477, 6 (one for 256) 217, 18 (for 85) 154.
_INPUTS_PER_ROW = 128


_Strips = tuple[Array, ...]


class GramState(NamedTuple):
    """Sums so far, float32.

    Σ xᵀx on and above the diagonal, in strips of rows that begin at it: each an array of its own, as a CPU adds to a
    part of an array with one core. Of wide inputs it is one strip, the whole matrix; below the diagonal stands what
    costs nothing.
    """

    strips: tuple[Float[Array, "*experts strip from_diagonal"], ...]
    rows: Float[Array, "*experts"]


class Gram(NamedTuple):
    """The finished matrix and what it rests on."""

    matrix: Float[Array, "*batch in in"]
    rows: Float[Array, "*batch"]


class OrderedGram(NamedTuple):
    """A matrix whose columns have been put into an order, and of which half is left."""

    above: Float[Array, "*batch in in"]  # in the order; what stands on the diagonal and below may be anything
    diagonal: Float[Array, "*batch in"]  # by original column
    order: Int[Array, "*batch in"]  # the original columns


def init(dim: int, experts: int | None = None) -> GramState:
    """Nothing seen yet; with `experts` one matrix for each."""
    batch = () if experts is None else (experts,)
    strips = tuple(jnp.zeros((*batch, end - begin, dim - begin), jnp.float32) for begin, end in _strips(dim))
    return GramState(strips, jnp.zeros(batch, jnp.float32))


def _strips(dim: int) -> list[tuple[int, int]]:
    """Where each begins and ends."""
    tile = -(-dim // _STRIPS) if _WORTH_STRIPS <= dim < _WIDE else max(1, dim)
    return [(begin, min(begin + tile, dim)) for begin in range(0, dim, tile)]


def update(state: GramState, x: Float[Array, "*batch in"], mask: Bool[Array, "*batch"] | None = None) -> GramState:
    """Adds rows.

    Args:
        state: sums so far.
        x: float32 or bfloat16; products of the input's dtype are summed in float32.
        mask: True for the rows that count; padding is False.
    """
    rows = x.reshape(-1, x.shape[-1])
    count = jnp.float32(len(rows))
    if mask is not None:
        keep = mask.reshape(-1)
        rows, count = jnp.where(keep[:, None], rows, 0), jnp.sum(keep, dtype=jnp.float32)
    return GramState(_add_products(state.strips, rows), state.rows + count)


def update_grouped(state: GramState, x: Float[Array, "rows in"], counts: Int[Array, " experts"]) -> GramState:
    """Adds rows that are sorted by expert: the first counts[0] are of expert 0, and so on; what remains does not count.

    The rows of an expert are taken a stretch at a time, so the work is that of all rows and a part of a stretch each.
    """
    stretch = min(len(x), _STRETCH)
    padded = jnp.pad(x, ((0, stretch), (0, 0)))

    def one_expert(carry: None, expert: tuple[_Strips, Array, Array]) -> tuple[None, _Strips]:
        strips, begin, count = expert

        def one_stretch(index: Array, strips: _Strips) -> _Strips:
            rows = jax.lax.dynamic_slice_in_dim(padded, begin + index * stretch, stretch, axis=0)
            own = index * stretch + jnp.arange(stretch) < count
            return _add_products(strips, jnp.where(own[:, None], rows, 0))

        return carry, jax.lax.fori_loop(0, -(-count // stretch), one_stretch, strips)

    begins = jnp.cumsum(counts) - counts
    _, strips = jax.lax.scan(one_expert, None, (state.strips, begins, counts))
    return GramState(strips, state.rows + counts)


def _add_products(strips: _Strips, rows: Float[Array, "rows in"]) -> _Strips:
    """Adds xᵀx on and above the diagonal: in four strips 5/8 of the multiplications."""
    if rows.shape[1] >= _WIDE:
        return (jax.lax.platform_dependent(*strips, rows, cpu=_add_tiles, default=_add_in_place),)
    return jax.lax.platform_dependent(strips, rows, cpu=_add_on_cpu, default=_add_strips)


def _add_on_cpu(strips: _Strips, rows: Array) -> _Strips:
    """With xᵀ in memory where it is bfloat16: only of rows by columns has a CPU fast products of that (2.7 times those
    of columns)."""
    return _add_strips(strips, rows, jax.lax.optimization_barrier(rows.T) if rows.dtype == jnp.bfloat16 else None)


def _add_strips(strips: _Strips, rows: Array, turned: Array | None = None) -> _Strips:
    found: list[Array] = []
    for strip, (begin, end) in zip(strips, _strips(rows.shape[1]), strict=True):
        left = rows[:, begin:end] if turned is None else turned[begin:end]
        found.append(strip + _product(left, rows[:, begin:], "ri,rj->ij" if turned is None else "ir,rj->ij"))
    return tuple(found)


def _add_in_place(products: Array, rows: Array) -> Array:
    dim = rows.shape[1]
    tile = -(-dim // _STRIPS)
    for begin in range(0, dim, tile):
        strip = _product(rows[:, begin : begin + tile], rows[:, begin:])
        products = products.at[begin : begin + tile, begin:].add(strip)
    return products


def _add_tiles(products: Array, rows: Array) -> Array:
    """By tiles, one after another: the memory of one beside the sums, and the same bits."""
    dim = rows.shape[1]
    tile = -(-dim // _STRIPS)

    def one(products: Array, place: Array) -> tuple[Array, None]:
        begins = jnp.minimum(place * tile, dim - tile)  # the last may begin earlier, and leaves out what is another's
        left, right = (jax.lax.dynamic_slice_in_dim(rows, begin, tile, axis=1) for begin in begins)
        found = _product(left, right)
        row, column = (begins[:, None] + jnp.arange(tile) >= place[:, None] * tile)[:, :, None]
        found += jax.lax.dynamic_slice(products, begins, found.shape)
        found = jnp.where(row & column.T, found, jax.lax.dynamic_slice(products, begins, found.shape))
        return jax.lax.dynamic_update_slice(products, found, begins), None

    places = [(row, column) for row in range(_STRIPS) for column in range(row, _STRIPS)]
    return jax.lax.scan(one, products, jnp.asarray(places))[0]


def _product(left: Array, right: Array, equation: str = "ri,rj->ij") -> Array:
    return jnp.einsum(equation, left, right, precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32)


def merge(*states: GramState) -> GramState:
    """The sums of several states over the same input."""
    return jax.tree.map(lambda *sums: functools.reduce(jnp.add, sums), *states)


def finalize(state: GramState) -> Gram:
    """H; NaN where no row was seen, but 0 for an expert that no row reached."""
    rows = jnp.maximum(state.rows, 1) if state.rows.ndim else state.rows
    scaled = [strip * (2 / rows)[..., None, None] for strip in state.strips]
    if len(scaled) == 1:
        return Gram(mirrored(scaled[0]), state.rows)
    dim = scaled[0].shape[-1]
    matrix = jnp.zeros((*state.rows.shape, dim, dim), jnp.float32)
    for strip, (begin, end) in zip(scaled, _strips(dim), strict=True):
        matrix = matrix.at[..., begin:end, begin:].set(strip)
    return Gram(mirrored(matrix), state.rows)


def check(gram: Gram, what: str, *, learns: bool = True) -> None:
    """Raises InputError naming `what` where the data cannot serve: no rows, NaN or infinite, or all zero; or too few
    rows for a method that learns from the matrix."""
    finite, seen, live, enough = usable(gram)
    if not bool(finite):
        reason = "no rows were seen" if not bool(seen) else "activations hold a NaN or an infinity"
        raise InputError(f"{what}: {reason}; give calibration text that the model handles")
    if not bool(live):
        raise InputError(f"{what}: all activations are zero; no method can learn from them")
    if learns and not bool(enough):
        raise _too_few(what, int(jnp.sum(gram.rows)), gram.matrix.shape[-1])


def check_rows(inputs: Mapping[str, int], rows: int) -> None:
    """Raises InputError, before there is a matrix, where layers of these widths by path would see too few rows."""
    widest = max(inputs, key=lambda path: inputs[path], default="")
    if widest and rows * _INPUTS_PER_ROW < inputs[widest]:
        raise _too_few(f"layer {widest}", rows, inputs[widest])


def _too_few(what: str, rows: int, inputs: int) -> InputError:
    return InputError(
        f"{what}: calibration data of {rows} tokens for {inputs} inputs: too few to learn from; give at least "
        f"{-(-inputs // _INPUTS_PER_ROW)}, and better more than {inputs}"
    )


def warn_of_few(inputs: Mapping[str, int], rows: int) -> None:
    """InputWarning where layers of these widths by path will see fewer rows than they have inputs.

    Their Gram matrices are singular then: of directions that no row has, damping alone says that they matter.
    """
    widest = max(inputs, key=lambda path: inputs[path], default="")
    if widest and rows < inputs[widest]:
        warnings.warn(
            f"calibration data of {rows} tokens for the {inputs[widest]} inputs of layer {widest}: its Gram matrix is "
            f"singular, and methods may fit these few tokens alone; give more than {inputs[widest]}",
            InputWarning,
            stacklevel=2,
        )


@jax.jit
def usable(gram: Gram) -> tuple[Array, Array, Array, Array]:
    """Whether all is finite, rows were seen, an input was other than 0, and rows are enough: the program of `check`."""
    live = jnp.any(jnp.diagonal(gram.matrix, axis1=-2, axis2=-1) > 0)
    enough = jnp.sum(gram.rows) * _INPUTS_PER_ROW >= gram.matrix.shape[-1]  # of experts all together
    return jnp.all(jnp.isfinite(gram.matrix)), jnp.all(gram.rows > 0), live, enough
