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


def test_the_rate_rises_and_falls() -> None:
    config = QATConfig(steps=104, warmup_steps=4, final_rate=0.1).with_steps(None)
    rates = np.asarray(schedule(config, 2.0)(jnp.arange(104)))
    np.testing.assert_allclose(rates[:5], [0.5, 1.0, 1.5, 2.0, 2.0])
    np.testing.assert_allclose(rates[54], 1.1, rtol=1e-6)
    assert 0.2 < rates[-1] < 0.21
    assert (np.diff(rates[4:]) <= 0).all()
