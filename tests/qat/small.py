"""A net that trains in no time and has everything a training state can hold, and data for it."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jquant.nn.fake_quant import FakeQuantParam
from jquant.qat.batches import RowBatches
from jquant.qat.config import QATConfig


class Net(nnx.Module):
    """Two layers, a trained quantization parameter between them, statistics and a random stream."""

    def __init__(self, seed: int = 0, *, dropout: float = 0.1) -> None:
        rngs = nnx.Rngs(seed)
        self.first = nnx.Linear(8, 16, rngs=rngs)
        self.log_scale = FakeQuantParam(jnp.zeros((16,)))
        self.norm = nnx.BatchNorm(16, rngs=rngs)
        self.dropout = nnx.Dropout(dropout, rngs=rngs)
        self.second = nnx.Linear(16, 2, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        hidden = jnp.tanh(self.first(x)) * jnp.exp2(self.log_scale.get_value()).astype(x.dtype)
        return self.second(self.dropout(self.norm(hidden)))


def squared_error(model: Any, batch: Any) -> tuple[Any, dict[str, Any]]:
    """Of the net on {"x", "y"}."""
    error = jnp.mean((model(batch["x"]).astype(jnp.float32) - batch["y"]) ** 2)
    return error, {"mse": error}


def rows(count: int = 40) -> dict[str, np.ndarray]:
    """A function to learn, noise-free."""
    x = np.random.default_rng(0).normal(size=(count, 8)).astype(np.float32)
    return {"x": x, "y": np.stack([x[:, 0] * x[:, 1], x.sum(1)], axis=1).astype(np.float32)}


def batches(config: QATConfig, count: int = 40) -> RowBatches:
    """The rows, as the config cuts and orders them."""
    return RowBatches(rows(count), batch=config.rows_per_step, seed=config.seed)


def arrays(model: nnx.Module) -> list[np.ndarray]:
    """Everything a model holds."""
    leaves = jax.tree.leaves(nnx.state(model))
    keys = [jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) for leaf in leaves]
    return [
        np.asarray(jax.random.key_data(leaf) if is_key else leaf) for leaf, is_key in zip(leaves, keys, strict=True)
    ]
