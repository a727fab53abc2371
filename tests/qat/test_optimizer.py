"""Groups by path and rates by step."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from jquant.qat.config import QATConfig
from jquant.qat.optimizer import make_optimizer, schedule
from jquant.qat.state import split
from tests.qat.small import Net


def test_groups_go_by_path() -> None:
    groups = split(Net()).groups
    assert groups == {
        "first.kernel": "matrices",
        "first.bias": "vectors",
        "log_scale": "quantization",
        "norm.scale": "vectors",
        "norm.bias": "vectors",
        "second.kernel": "matrices",
        "second.bias": "vectors",
    }


def test_only_matrices_decay() -> None:
    config = QATConfig(steps=10, learning_rate=0.1, weight_decay=0.5, warmup_steps=0).with_steps(None)
    groups = {"w": "matrices", "b": "vectors", "s": "quantization"}
    optimizer = make_optimizer(config, groups)
    params = {name: jnp.ones((2, 2)) for name in groups}
    nothing = {name: jnp.zeros((2, 2)) for name in groups}
    updates, _ = optimizer.update(nothing, optimizer.init(params), params)
    found = {name: float(np.asarray(update)[0, 0]) for name, update in updates.items()}  # type: ignore[union-attr]
    np.testing.assert_allclose([found["w"], found["b"], found["s"]], [-0.05, 0, 0], atol=1e-7)


def test_gradients_are_clipped_together() -> None:
    """Adam forgets a factor, but not from step to step: the second gradient, of norm 50, counts as one of norm 1."""
    config = QATConfig(steps=10, learning_rate=0.1, warmup_steps=0, max_grad_norm=1.0, final_rate=1.0).with_steps(None)
    groups = {"w": "matrices", "b": "vectors"}
    optimizer = make_optimizer(config, groups)
    params = {name: jnp.zeros((1, 1)) for name in groups}
    state = optimizer.init(params)
    for scale in (0.1, 10.0):
        gradient = {"w": jnp.full((1, 1), 3 * scale), "b": jnp.full((1, 1), 4 * scale)}
        updates, state = optimizer.update(gradient, state, params)
    for name, first, second in (("w", 0.3, 0.6), ("b", 0.4, 0.8)):
        mean = (0.9 * 0.1 * first + 0.1 * second) / (1 - 0.9**2)
        square = (0.999 * 0.001 * first**2 + 0.001 * second**2) / (1 - 0.999**2)
        np.testing.assert_allclose(updates[name], -0.1 * mean / (square**0.5 + 1e-8), rtol=1e-4)  # type: ignore[index]


def test_the_rate_rises_and_falls() -> None:
    config = QATConfig(steps=104, warmup_steps=4, final_rate=0.1).with_steps(None)
    rates = np.asarray(schedule(config, 2.0)(jnp.arange(104)))
    np.testing.assert_allclose(rates[:5], [0.5, 1.0, 1.5, 2.0, 2.0])
    np.testing.assert_allclose(rates[54], 1.1, rtol=1e-6)
    assert 0.2 < rates[-1] < 0.21
    assert (np.diff(rates[4:]) <= 0).all()
