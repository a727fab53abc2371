"""Which layer a diverged step points at."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jquant.nn.surgery import Path


@jax.jit
def largest(trained: Mapping[Path, Array]) -> dict[Path, Float[Array, ""]]:
    """max |x| of each parameter; NaN where it holds one."""
    return {name: jnp.max(jnp.abs(array)) for name, array in trained.items()}


def culprit(
    names: Sequence[Path],
    start: Mapping[Path, float],
    now: Mapping[Path, float],
    gradients: Float[np.ndarray, " parameters"],
) -> str:
    """Says which parameter blew up: one that is not finite, else the one that has grown most, else by its gradient.

    Args:
        names: of the parameters, in the model's order.
        start: the largest |value| of each when training began.
        now: the same before the step that failed.
        gradients: norms of their gradients in that step.

    Returns:
        A clause for an error message.
    """
    for name in names:
        if not np.isfinite(now[name]):
            return f"{name} holds a value that is not finite"
    growth = {name: _growth(name, start[name], now[name]) for name in names}
    grown = max(names, key=growth.__getitem__)
    if growth[grown] >= 2:
        return f"{grown} has grown most: its largest value is {now[grown]:.4g}, {start[grown]:.4g} at the start"
    finite = np.isfinite(gradients)
    if finite.any() and not finite.all():
        first = next(name for name, good in zip(names, finite, strict=True) if not good)
        return f"the gradient of {first} is the first that is not finite"
    if finite.all():
        steepest = names[int(np.argmax(gradients))]
        return f"the gradient of {steepest} is the largest: its norm is {gradients.max():.4g}"
    return "no parameter has grown, and no gradient is finite: look at the data and the loss function"


def _growth(name: Path, start: float, now: float) -> float:
    """By what factor: a trained scale is kept as its logarithm; what begins at 0 is measured against 1."""
    if name.rpartition(".")[2] == "log_scale":
        return 2.0 ** min(float(now) - float(start), 1000.0)
    return float(now) / (float(start) or 1.0)
