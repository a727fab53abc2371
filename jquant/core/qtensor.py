"""`QTensor`, the one quantized array, and the two functions between it and floats."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Float32, Integer, UInt8

from jquant.core import packing
from jquant.core.division import exact_divide, exact_ratio, whole_ratio
from jquant.core.errors import InputError
from jquant.core.formats import Element, GGMLBlock, Int
from jquant.core.ggml_rows import block_scales, decode_rows, encode_rows
from jquant.core.scales import IN_BLOCKS, NestedScale, StoredScale, encoding_scale
from jquant.core.scheme import Group, Scheme
from jquant.core.tiles import from_tiles, over_tile, spread, to_tiles


@partial(
    jax.tree_util.register_dataclass,
    data_fields=("planes", "stored", "zero_planes", "groups"),
    meta_fields=("scheme", "matrix_shape", "dtype"),
)
@dataclass(frozen=True, kw_only=True)
class QTensor:
    """A quantized array [..., out, in]: packed codes, scales, zero points; a pytree.

    Leading axes belong to its arrays, so vmap, scan and stacking act on it as on a plain array. The bytes it holds are
    the bytes it reports.
    """

    planes: packing.Planes  # codes, packed along the input axis; of ggml's types one: the blocks [..., out, bytes]
    stored: StoredScale  # scales [..., row tiles, column tiles] in the scheme's format
    zero_planes: packing.Planes | None  # zero points [..., column tiles, row tiles], packed along the rows
    scheme: Scheme
    matrix_shape: tuple[int, int]
    dtype: np.dtype  # of the array it was made from
    groups: Array | None = None  # int32 [..., in], the column tile of each input; None where neighbours share one

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.planes[0].shape[:-2], *self.matrix_shape)

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays it holds."""
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(self))

    @property
    def bits_per_weight(self) -> float:
        return self.nbytes * 8 / self.size

    def codes(self) -> UInt8[Array, "*batch out in"]:
        """Unpacked codes, the element's bit patterns. Raises InputError where whole blocks are stored."""
        if self.scheme.block is not None:
            raise InputError(f"{self.scheme} stores whole blocks, not single codes: take planes[0], or dequantize")
        return packing.unpack(self.planes, self.scheme.element.bits, self.matrix_shape[1])

    def scales(self) -> Float32[Array, "*batch row_tiles column_tiles"]:
        """Scales as the decoder multiplies with them; of a ggml type all floats in its blocks, minima among them."""
        if self.scheme.block is not None:
            return block_scales(self.planes[0], self.scheme.block)
        return self.scheme.scale.load(self.stored)

    def zero_points(self) -> UInt8[Array, "*batch row_tiles column_tiles"] | None:
        """The code that stands for zero in each tile; None where the scheme has none."""
        if self.zero_planes is None:
            return None
        row_tiles = self.stored.scale.shape[-2]
        return packing.unpack(self.zero_planes, self.scheme.element.bits, row_tiles).swapaxes(-1, -2)

    def __repr__(self) -> str:
        # Tree maps put anything where the arrays are; printing must work all the same.
        batch = getattr(self.planes[0], "shape", ())[:-2]
        return f"QTensor({self.scheme}, shape={(*batch, *self.matrix_shape)}, dtype={self.dtype})"


class TileRange(NamedTuple):
    """The range of each tile, one entry a tile."""

    high: Array  # the largest value, at least 0; without zero points the largest magnitude
    low: Array | None  # the smallest value, at most 0; None without zero points


class Parameters(NamedTuple):
    """Scales and zero points of one array: as stored, and as the encoder uses them, one entry a tile."""

    stored: StoredScale
    scale: Array
    zero_point: Array | None  # float32 whole numbers
    target: Array  # the scale before it was rounded to the scheme's format; 0 for a tile of zeros


def quantize(
    x: Float[Array, "*batch out in"],
    scheme: Scheme,
    *,
    scale: Float[Array, "*batch row_tiles column_tiles"] | None = None,
    zero_point: Array | None = None,
    importance: Float[Array, " in"] | None = None,
    groups: Integer[Array, "*batch in"] | None = None,
    outer: Float[Array, "*batch 1 1"] | None = None,
) -> QTensor:
    """Nearest codes: clip(round(x / s) + z) for integers, the nearest level of x / s for the others.

    Args:
        x: any float dtype, [..., out, in]; computed in float32.
        scheme: what to quantize to.
        scale: scales to use instead of those from the range of x; positive, one a tile.
        zero_point: codes of zero to use, one a tile, rounded and clipped to codes; only with `scale` and an
            asymmetric scheme.
        importance: weights ≥ 0 of the columns' squared errors, for those types of ggml that search their scales.
        groups: which group each input belongs to, where groups are not of neighbours: as many 0 as a group has columns,
            as many 1, …, the last perhaps fewer, in any order. Of other counts the result makes no sense.
        outer: the second level of a nested scale, where x shares it with other matrices; by default that of x.

    Returns:
        The packed tensor; its `dtype` is x's.

    Raises:
        InputError: x is not a float matrix, a group or block exceeds it, or scales of another shape are given.

    An infinity makes its tile NaN or infinite. What a NaN does to its tile is not defined (maxima on CPU may skip it):
    loaders and `quantize_layers` refuse weights that are not finite, by name.
    """
    _check_input(x, scheme)
    if scheme.block is not None:
        if groups is not None:
            raise InputError(f"{scheme} with groups: a block holds neighbours only; leave them out")
        return _quantize_rows(x, scheme, scheme.block, scale, zero_point, importance)
    if groups is not None and groups.shape != (*x.shape[:-2], x.shape[-1]):
        raise InputError(f"groups of shape {groups.shape} for {x.shape}: they must be {(*x.shape[:-2], x.shape[-1])}")
    if importance is not None:
        raise InputError(f"{scheme} takes no importance: only ggml's block types search their scales; leave it out")
    wide = x.astype(jnp.float32)
    order = None if groups is None else jnp.argsort(groups, axis=-1, stable=True)
    tiles = to_tiles(wide if order is None else _take_columns(wide, order), scheme)
    if scale is None:
        parameters = choose_parameters(tiles, scheme, outer=outer)
    else:
        parameters = given_parameters(x, scheme, scale, zero_point, outer=outer)
    return _encode(x, tiles, scheme, parameters, groups, order)


def quantize_with(x: Float[Array, "*batch out in"], scheme: Scheme, parameters: Parameters) -> QTensor:
    """`quantize` with scales and zero points that were found for x otherwise than from its range."""
    _check_input(x, scheme)
    return _encode(x, to_tiles(x.astype(jnp.float32), scheme), scheme, parameters, None, None)


def from_codes(
    codes: UInt8[Array, "*batch out in"],
    scheme: Scheme,
    stored: StoredScale,
    *,
    zero_points: UInt8[Array, "*batch row_tiles column_tiles"] | None = None,
    dtype: DTypeLike = jnp.float32,
    groups: Integer[Array, "*batch in"] | None = None,
) -> QTensor:
    """The tensor of codes, scales and zero points that exist already; `codes`, `zero_points` and `stored` of it.

    Raises:
        InputError: the scales are not one a tile, or zero points are given exactly where the scheme has none.
    """
    rows, columns = codes.shape[-2:]
    tile_rows, tile_columns = scheme.tile(rows, columns)
    tiles = (*codes.shape[:-2], -(-rows // tile_rows), -(-columns // tile_columns))
    if stored.scale.shape != tiles:
        raise InputError(f"scales of shape {stored.scale.shape} for {scheme} on {codes.shape}: they must be {tiles}")
    if (zero_points is None) == (scheme.zero_point == "integer"):
        need = "needs" if zero_points is None else "has no"
        raise InputError(f"{scheme} {need} zero points: give them exactly where the scheme is asymmetric")
    if zero_points is not None and zero_points.shape != tiles:
        raise InputError(f"zero points of shape {zero_points.shape} for {scheme}: they must be {tiles}")
    bits = scheme.element.bits
    return QTensor(
        planes=packing.pack(codes, bits),
        stored=stored,
        zero_planes=None if zero_points is None else packing.pack(zero_points.swapaxes(-1, -2), bits),
        scheme=scheme,
        matrix_shape=(rows, columns),
        dtype=np.dtype(dtype),
        groups=None if groups is None else groups.astype(jnp.int32),
    )


def in_blocks(
    blocks: UInt8[Array, "*batch out bytes"], block: GGMLBlock, *, columns: int, dtype: DTypeLike = jnp.float32
) -> QTensor:
    """The tensor of rows of blocks of ggml, the last perhaps padded.

    Raises:
        InputError: a row's bytes are not those of `columns` weights.
    """
    if blocks.shape[-1] != -(-columns // block.elements) * block.nbytes:
        raise InputError(
            f"rows of {blocks.shape[-1]} bytes for {columns} weights in {block.name}: {block.nbytes} bytes hold "
            f"{block.elements}"
        )
    return QTensor(
        planes=(blocks,),
        stored=IN_BLOCKS,
        zero_planes=None,
        scheme=Scheme(element=block, granularity=Group(block.elements)),
        matrix_shape=(blocks.shape[-2], columns),
        dtype=np.dtype(dtype),
    )


def _encode(
    x: Array, tiles: Array, scheme: Scheme, parameters: Parameters, groups: Array | None, order: Array | None
) -> QTensor:
    y, zero = ratio_to_round(tiles, scheme, parameters), parameters.zero_point
    if zero is None:
        codes, zero_planes = scheme.element.encode(y), None
    else:
        codes = _integer(scheme.element).encode(y, spread(zero))
        zero_planes = packing.pack(zero.astype(jnp.uint8).swapaxes(-1, -2), scheme.element.bits)
    rows, columns = x.shape[-2:]
    codes = from_tiles(codes, (rows, columns))
    if order is not None:
        codes = _take_columns(codes, jnp.argsort(order, axis=-1))
    return QTensor(
        planes=packing.pack(codes, scheme.element.bits),
        stored=parameters.stored,
        zero_planes=zero_planes,
        scheme=scheme,
        matrix_shape=(rows, columns),
        dtype=np.dtype(x.dtype),
        groups=None if groups is None else groups.astype(jnp.int32),
    )


def ratio_to_round(tiles: Float32[Array, "*batch r tr c tc"], scheme: Scheme, parameters: Parameters) -> Array:
    """Tiles over their scale, as the element rounds them: whole already where it is an integer."""
    divide = whole_ratio if isinstance(scheme.element, Int) else exact_ratio
    return divide(tiles, spread(parameters.scale))


def dequantize(q: QTensor, dtype: DTypeLike | None = None) -> Float[Array, "*batch out in"]:
    """The values of the codes: (code − z) · s for integers, level · s for the others.

    Args:
        q: a packed tensor.
        dtype: of the result; by default that of the array q was made from. The product is rounded to it once.
    """
    if q.scheme.block is not None:
        values = decode_rows(q.planes[0], q.scheme.block, q.matrix_shape[1])
        return values.astype(q.dtype if dtype is None else dtype)
    dtype = q.dtype if dtype is None else dtype
    zero = q.zero_points()
    if q.groups is not None:
        return _dequantize_by_column(q, q.groups, zero).astype(dtype)
    tiles = to_tiles(q.codes(), q.scheme)
    if zero is None:
        levels = q.scheme.element.decode(tiles)
    else:
        levels = _integer(q.scheme.element).decode(tiles, spread(zero.astype(jnp.float32)))
    return from_tiles(levels * spread(q.scales()), q.matrix_shape).astype(dtype)


def _dequantize_by_column(q: QTensor, groups: Array, zero: Array | None) -> Array:
    """Where the groups are not of neighbours: every column looks its scale up."""
    rows, columns = q.matrix_shape
    tile_rows = q.scheme.tile(rows, columns)[0]

    def of_columns(per_tile: Array) -> Array:
        return jnp.repeat(_take_columns(per_tile, groups), tile_rows, axis=-2)[..., :rows, :]

    if zero is None:
        return q.scheme.element.decode(q.codes()) * of_columns(q.scales())
    return _integer(q.scheme.element).decode(q.codes(), of_columns(zero.astype(jnp.float32))) * of_columns(q.scales())


def _take_columns(x: Array, order: Array) -> Array:
    """x[..., rows, order[...]]."""
    return jnp.take_along_axis(x, order[..., None, :], axis=-1)


def choose_parameters(
    tiles: Float32[Array, "*batch r tr c tc"], scheme: Scheme, *, outer: Array | None = None
) -> Parameters:
    """Scales and zero points from the range of each tile (SPEC 1 and 2).

    `outer` is the second level of a nested scale where the tiles are a part of a matrix; by default they are all of it.
    """
    return parameters_of_range(tile_range(tiles, scheme), scheme, outer=outer)


def tile_range(tiles: Float32[Array, "*batch r tr c tc"], scheme: Scheme) -> TileRange:
    """What of each tile its scale depends on."""
    if scheme.zero_point == "integer":
        highest, lowest = over_tile(jnp.max, tiles), over_tile(jnp.min, tiles)
        return TileRange(jnp.maximum(highest, 0.0), jnp.minimum(lowest, 0.0))
    return TileRange(over_tile(_largest_magnitude, tiles), None)


def parameters_of_range(span: TileRange, scheme: Scheme, *, outer: Array | None = None) -> Parameters:
    """Scales and zero points that spread the codes over `span`; `outer` as in `choose_parameters`."""
    if span.low is not None:
        codes = _integer(scheme.element).highest_code
        target = exact_divide(span.high - span.low, codes)
        stored = scheme.scale.store(target, None, scheme.element)
        scale = scheme.scale.load(stored)
        zero = jnp.clip(jnp.round(exact_ratio(-span.low, scale)), 0, codes)
        return _once_a_tile(Parameters(stored, scale, zero, target))
    target = scheme.scale.target(span.high, scheme.element)
    if isinstance(scheme.scale, NestedScale):
        stored = scheme.scale.store(target, span.high, scheme.element, outer=outer)
    else:
        stored = scheme.scale.store(target, span.high, scheme.element)
    return _once_a_tile(Parameters(stored, encoding_scale(scheme.scale, target, stored), None, target))


def _once_a_tile(parameters: Parameters) -> Parameters:
    """Keeps a GPU from fusing this into what reads it, where it would be computed once an element."""
    return jax.lax.platform_dependent(parameters, cpu=lambda same: same, default=jax.lax.optimization_barrier)


def tile_mean_magnitude(x: Float32[Array, "*batch out in"], scheme: Scheme) -> Float32[Array, "*batch r c"]:
    """mean|x| of each tile; of a ragged one, of the values it has."""
    total = jnp.sum(jnp.abs(to_tiles(x, scheme)), axis=(-3, -1))
    return total / jnp.sum(to_tiles(jnp.ones(x.shape[-2:], jnp.float32), scheme), axis=(-3, -1))


def _largest_magnitude(x: Array, axis: tuple[int, ...]) -> Array:
    """max |x|. XLA's own reductions only: others cannot be put together across devices."""
    return jax.lax.platform_dependent(
        x,
        # On CPU a maximum of |x| takes ten times as long as one of x.
        cpu=lambda x: jnp.maximum(jnp.max(x, axis=axis), -jnp.min(x, axis=axis)),
        default=lambda x: jnp.max(jnp.abs(x), axis=axis),
    )


def stored_bytes(scheme: Scheme, shape: tuple[int, ...]) -> int:
    """Bytes that an array of this shape takes when quantized; nothing is computed."""
    q = jax.eval_shape(partial(quantize, scheme=scheme), jax.ShapeDtypeStruct(shape, jnp.float32))
    return q.nbytes


def _quantize_rows(
    x: Array, scheme: Scheme, block: GGMLBlock, scale: Array | None, zero_point: Array | None, importance: Array | None
) -> QTensor:
    if scale is not None or zero_point is not None:
        raise InputError(f"{scheme} finds the scales inside its blocks itself: give neither scale nor zero point")
    return in_blocks(encode_rows(x.astype(jnp.float32), block, importance), block, columns=x.shape[-1], dtype=x.dtype)


def given_parameters(
    x: Array, scheme: Scheme, scale: Array, zero_point: Array | None, *, outer: Array | None = None
) -> Parameters:
    """Scales and zero points that were given for x, rounded as they are stored; `outer` as in `choose_parameters`.

    Raises:
        InputError: they have another shape.
    """
    tile_rows, tile_columns = scheme.granularity.tile(*x.shape[-2:])
    expected = (*x.shape[:-2], -(-x.shape[-2] // tile_rows), -(-x.shape[-1] // tile_columns))
    if scale.shape != expected:
        raise InputError(f"scales of shape {scale.shape} for {scheme} on {x.shape}: they must be {expected}")
    if (zero_point is None) == (scheme.zero_point == "integer"):
        need = "needs a" if zero_point is None else "has no"
        raise InputError(f"{scheme} {need} zero point: give one exactly where the scheme is asymmetric")
    if zero_point is not None and zero_point.shape != expected:
        raise InputError(f"zero points of shape {zero_point.shape} for {scheme} on {x.shape}: they must be {expected}")
    target = jnp.asarray(scale, jnp.float32)
    if isinstance(scheme.scale, NestedScale):
        stored = scheme.scale.store(target, None, scheme.element, outer=outer)
    else:
        stored = scheme.scale.store(target, None, scheme.element)
    zero = None
    if zero_point is not None:
        zero = jnp.clip(jnp.round(jnp.asarray(zero_point, jnp.float32)), 0, _integer(scheme.element).highest_code)
    return _once_a_tile(Parameters(stored, encoding_scale(scheme.scale, target, stored), zero, target))


def _check_input(x: Array, scheme: Scheme) -> None:
    if not isinstance(scheme, Scheme):
        raise InputError(f"scheme {scheme!r} is a {type(scheme).__name__}: parse it first, jquant.scheme({scheme!r})")
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise InputError(f"array of dtype {x.dtype}: only floats can be quantized; cast it first")
    if x.ndim < 2 or 0 in x.shape:
        raise InputError(f"array of shape {x.shape}: quantization needs a non-empty [..., out, in]; add an axis")


def _integer(element: Element) -> Int:
    assert isinstance(element, Int), "Scheme refuses zero points elsewhere"
    return element
