"""Stages of training: floats first, bits that fall, ranges that freeze; seen from the evaluations of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from jquant import qat
from jquant.qat.config import QATConfig
from jquant.qat.metrics import StepRecord
from jquant.qat.schedule import FINAL, Stage, stage_at
from jquant.qat.trainer import TrainResult, train
from tests.qat.small import Net, arrays, batches, squared_error

CONFIG = QATConfig(
    steps=8,
    batch=8,
    learning_rate=1e-2,
    warmup_steps=1,
    start_quantizing_at=2,
    gradual_bits=((3, 8), (5, 4)),
    freeze_observers_at=6,
)


def _net(**choices: Any) -> Net:
    net = Net()
    qat.prepare(net, qat.one_rule("int2:channel", layers=("first", "second"), **choices), announce=lambda said: None)
    return net


def _run(net: Net, config: QATConfig = CONFIG, **options: Any) -> TrainResult:
    return train(net, squared_error, batches(config), config, **options)


def test_the_stage_of_a_step() -> None:
    config = CONFIG.with_steps(None)
    assert [stage_at(config, step) for step in range(8)] == [
        Stage(enabled=False, observing=True, bits=8),
        Stage(enabled=False, observing=True, bits=8),
        Stage(enabled=True, observing=True, bits=8),
        Stage(enabled=True, observing=True, bits=4),
        Stage(enabled=True, observing=True, bits=4),
        Stage(enabled=True, observing=True, bits=None),
        FINAL,
        FINAL,
    ]


def test_a_run_goes_through_them() -> None:
    net, seen = _net(activation="int8:tensor"), []

    def look(model: Any) -> dict[str, float]:
        weight, inputs = model.second.weight_quantizer, model.second.input_quantizer
        seen.append((weight.enabled, str(weight.scheme), float(inputs.seen.get_value()[1])))
        return {"score": 0.0}

    _run(net, QATConfig(**{**CONFIG.as_json(), "eval_every": 1}), eval_fn=look)
    assert [enabled for enabled, _, _ in seen] == [False, False] + [True] * 6
    assert [spec for _, spec, _ in seen] == ["int8:channel"] * 3 + ["int4:channel"] * 2 + ["int2:channel"] * 3
    ranges = [high for _, _, high in seen]
    assert len(set(ranges[:6])) == 6
    assert ranges[5] == ranges[6] == ranges[7]
    qat.convert(net)


@pytest.mark.slow
def test_it_resumes_to_the_same_bits_across_stages(tmp_path: Path) -> None:
    class Stop(Exception):
        pass

    config = QATConfig(steps=5, batch=8, learning_rate=1e-2, gradual_bits=((3, 4),), checkpoint_every=1)
    choices: dict[str, Any] = {"gradient": "lsq", "activation": "int8:tensor"}
    whole = _net(**choices)
    _run(whole, config, folder=tmp_path / "whole")
    for stopped_at in (3, 4):

        def stop(record: StepRecord, stopped_at: int = stopped_at) -> None:
            if record.step == stopped_at:
                raise Stop

        with pytest.raises(Stop):
            _run(_net(**choices), config, folder=tmp_path / "cut", listen=stop)
    cut = _net(**choices)
    assert _run(cut, config, folder=tmp_path / "cut").resumed_from == 4
    for one, other in zip(arrays(whole), arrays(cut), strict=True):
        np.testing.assert_array_equal(one, other)


def test_only_what_the_recipe_asks_for_can_be_the_best(tmp_path: Path) -> None:
    """Before step 5 the weights have more bits: such figures are better at no merit."""
    figures = iter([0.1, 0.2, 0.3, 0.4, 0.5, 4.0, 3.0, 5.0])
    config = QATConfig(**{**CONFIG.as_json(), "eval_every": 1, "best": "score"})
    result = _run(_net(), config, folder=tmp_path, eval_fn=lambda model: {"score": next(figures)})
    assert (result.best_step, result.best) == (7, 3.0)


def test_what_is_rounded_stochastically_is_evaluated_to_nearest() -> None:
    net = Net()
    recipe = qat.one_rule("int2:channel", layers=("second",), rounding="stochastic")
    qat.prepare(net, recipe, key=jax.random.key(0), announce=lambda said: None)
    x = np.ones((4, 16), np.float32)
    outputs: list[np.ndarray] = []

    def look(model: Any) -> dict[str, float]:
        outputs.extend(np.asarray(model.second(x)) for _ in range(2))
        return {"score": 0.0}

    _run(net, QATConfig(steps=2, batch=8, warmup_steps=0), eval_fn=look)
    np.testing.assert_array_equal(outputs[0], outputs[1])
    assert not np.array_equal(np.asarray(net.second(x)), np.asarray(net.second(x)))  # pyright: ignore[reportArgumentType]
    qat.convert(net)
    np.testing.assert_array_equal(np.asarray(net.second(x)), outputs[0])  # pyright: ignore[reportArgumentType]
