"""Weights of Flax layers seen as matrices W[out, in], and back.

Which axes of a weight are out and which in, by layer:

    nnx.Linear          kernel[in, out]
    nnx.LinearGeneral   kernel[batch…, in…, out…]
    nnx.Einsum          kernel[…]: in are the axes summed over, batch those that input and output have too
    nnx.Conv            kernel[space…, channels, out]; inputs in the order (channel, height, width, …)
    nnx.Embed           embedding[out, in]: a row a token

Batch axes and those in front of all others, which nnx.vmap and nnx.scan stack layers along, become a stack of matrices.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jquant.core.errors import InputError

FLAX_LAYERS = (nnx.Linear, nnx.LinearGeneral, nnx.Einsum, nnx.Embed, nnx.Conv)


class KernelAxes(NamedTuple):
    """Positions of a weight's axes, not counting those that stack layers."""

    stack: tuple[int, ...]
    out: tuple[int, ...]
    inner: tuple[int, ...]


def weight_name(layer: nnx.Module) -> str:
    """The attribute that holds the weight. Raises InputError where the layer is of no known kind."""
    if isinstance(layer, nnx.Embed):
        return "embedding"
    if isinstance(layer, FLAX_LAYERS):
        return "kernel"
    raise InputError(f"a {type(layer).__name__} is no layer with a weight matrix")


def kernel_axes(layer: nnx.Module) -> KernelAxes:
    """Raises InputError where the layer is of no known kind, or an einsum whose weight is no matrix."""
    match layer:
        case nnx.Linear():
            return KernelAxes((), (1,), (0,))
        case nnx.Embed():
            return KernelAxes((), (0,), (1,))
        case nnx.Conv():
            space = len(layer.kernel_size)  # pyright: ignore[reportArgumentType]
            return KernelAxes((), (space + 1,), (space, *range(space)))
        case nnx.LinearGeneral():
            batch, inner, out = len(layer.batch_axis), len(layer.in_features), len(layer.out_features)
            return KernelAxes(
                tuple(range(batch)),
                tuple(range(batch + inner, batch + inner + out)),
                tuple(range(batch, batch + inner)),
            )
        case nnx.Einsum():
            return _einsum_axes(layer.einsum_str)
    raise InputError(f"a {type(layer).__name__} is no layer with a weight matrix")


def to_matrix(layer: nnx.Module, kernel: Float[Array, "..."]) -> Float[Array, "*stack out in"]:
    """A weight of the layer's shape as a matrix."""
    axes = kernel_axes(layer)
    lead = kernel.ndim - sum(map(len, axes))
    moved = jnp.transpose(kernel, _order(axes, lead))
    stacked = lead + len(axes.stack)
    sizes = moved.shape[stacked:]
    return moved.reshape(*moved.shape[:stacked], math.prod(sizes[: len(axes.out)]), math.prod(sizes[len(axes.out) :]))


def inputs_first(layer: nnx.Module, kernel: Float[Array, "..."]) -> Float[Array, "*stack in out"] | None:
    """The weight as a matrix whose inputs come first, where it is one already and nothing has to be moved."""
    axes = kernel_axes(layer)
    lead = kernel.ndim - sum(map(len, axes))
    order = (*axes.stack, *axes.inner, *axes.out)
    if order != tuple(range(len(order))):
        return None
    sizes = kernel.shape[lead + len(axes.stack) :]
    inner = math.prod(sizes[: len(axes.inner)])
    return kernel.reshape(*kernel.shape[: lead + len(axes.stack)], inner, math.prod(sizes[len(axes.inner) :]))


def from_matrix(
    layer: nnx.Module, matrix: Float[Array, "*stack out in"], shape: tuple[int, ...]
) -> Float[Array, "..."]:
    """The inverse of `to_matrix`, to a weight of the shape given."""
    axes = kernel_axes(layer)
    order = _order(axes, len(shape) - sum(map(len, axes)))
    moved = matrix.reshape(tuple(shape[axis] for axis in order))
    return jnp.transpose(moved, tuple(order.index(axis) for axis in range(len(order))))


def _order(axes: KernelAxes, lead: int) -> tuple[int, ...]:
    return (*range(lead), *(lead + axis for part in axes for axis in part))


def _einsum_axes(equation: str) -> KernelAxes:
    inputs, output = equation.split("->")
    data, kernel = inputs.split(",")
    axes = KernelAxes(
        tuple(i for i, letter in enumerate(kernel) if letter in data and letter in output),
        tuple(i for i, letter in enumerate(kernel) if letter not in data and letter in output),
        tuple(i for i, letter in enumerate(kernel) if letter in data and letter not in output),
    )
    if "..." in kernel or sum(map(len, axes)) != len(kernel) or not axes.out or not axes.inner:
        raise InputError(f"einsum {equation}: its weight must have axes that are summed and axes that are kept")
    return axes
