"""Losses of a language model against plain formulas; stretches and recomputation change nothing."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jquant.core.errors import InputError
from jquant.qat.losses import distillation_loss, next_token_loss
from tests.tiny_checkpoint import tiny_model

TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 257, (3, 14)), jnp.int32)


@pytest.fixture(scope="module")
def models() -> tuple[Any, Any]:
    return tiny_model(0), tiny_model(1)


def _log_softmax(logits: Any) -> np.ndarray:
    wide = np.asarray(logits, np.float64)
    wide = wide - wide.max(-1, keepdims=True)
    return wide - np.log(np.exp(wide).sum(-1, keepdims=True))


def test_against_the_formulas(models: tuple[Any, Any]) -> None:
    student, teacher = models
    log_q, log_p = _log_softmax(student(TOKENS)[:, :-1]), _log_softmax(teacher(TOKENS)[:, :-1])
    ce = -np.take_along_axis(log_q, np.asarray(TOKENS)[:, 1:, None], -1).mean()
    kl = (np.exp(log_p) * (log_p - log_q)).sum(-1).mean()
    loss, metrics = next_token_loss()(student, TOKENS)
    np.testing.assert_allclose([loss, metrics["ce"]], ce, rtol=1e-5)
    loss, metrics = distillation_loss(weight=0.25)(student, TOKENS, teacher)
    np.testing.assert_allclose(metrics["kl"], kl, rtol=1e-4)
    np.testing.assert_allclose(loss, 0.25 * kl + 0.75 * ce, rtol=1e-4)
    soft_q, soft_p = _log_softmax(student(TOKENS)[:, :-1] / 3), _log_softmax(teacher(TOKENS)[:, :-1] / 3)
    loss, _ = distillation_loss(temperature=3.0)(student, TOKENS, teacher)
    np.testing.assert_allclose(loss, 9 * (np.exp(soft_p) * (soft_p - soft_q)).sum(-1).mean(), rtol=1e-4)


def test_a_model_is_no_distance_from_itself(models: tuple[Any, Any]) -> None:
    loss, metrics = distillation_loss(hidden_weight=1.0)(models[0], TOKENS, models[0])
    assert abs(float(loss)) < 1e-6
    assert float(metrics["hidden"]) == 0
    assert float(distillation_loss(hidden_weight=1.0)(models[0], TOKENS, models[1])[1]["hidden"]) > 0.1


@pytest.mark.parametrize("options", [{"logit_rows": 12}, {"logit_rows": 1}, {"remat": True}])
def test_stretches_and_recomputation_change_nothing(models: tuple[Any, Any], options: dict[str, Any]) -> None:
    graphdef, params, rest = nnx.split(models[0], nnx.Param, ...)

    def gradient(**options: Any) -> Any:
        loss = distillation_loss(weight=0.5, **options)

        def of(params: Any) -> Any:
            return loss(nnx.merge(graphdef, params, rest), TOKENS, models[1])[0]

        return jax.jit(jax.value_and_grad(of))(params)

    plain, cut = gradient(), gradient(**options)
    for one, other in zip(jax.tree.leaves(plain), jax.tree.leaves(cut), strict=True):
        np.testing.assert_allclose(other, one, rtol=1e-4, atol=1e-6)


def test_no_array_of_all_logits_exists(models: tuple[Any, Any]) -> None:
    student, teacher = models
    graphdef, state = nnx.split(student)

    def loss(state: Any) -> Any:
        model = nnx.merge(graphdef, state)
        return distillation_loss(logit_rows=6)(model, TOKENS, teacher)[0]

    text = jax.jit(jax.grad(loss)).lower(state).as_text()
    assert "3x2x257xf32" in text
    assert "3x13x257xf32" not in text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weight": 1.5}, "distillation weight 1.5"),
        ({"temperature": 0.0}, "temperature 0.0"),
        ({"hidden_weight": -1.0}, "hidden states -1.0"),
    ],
)
def test_numbers_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        distillation_loss(**options)
