"""Training configs: what is refused, and what follows from the number of steps."""

from __future__ import annotations

from typing import Any

import pytest

from jquant.core.errors import InputError
from jquant.qat.config import QATConfig


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch": 0}, "batch is 0"),
        ({"steps": 0}, "steps is 0"),
        ({"learning_rate": float("nan")}, "learning_rate is nan"),
        ({"learning_rate": 0.0}, "learning_rate is 0.0; it must be above 0"),
        ({"scale_learning_rate": -1.0}, "scale_learning_rate is -1.0"),
        ({"final_rate": 2.0}, "final_rate is 2.0; it must be 0 to 1"),
        ({"adam_b2": 1.0}, "adam_b2 is 1.0"),
        ({"keep": 0}, "keep is 0"),
        ({"gradual_bits": ((5, 8), (5, 4))}, "steps must rise"),
        ({"gradual_bits": ((5, 10),)}, "bits must be 2 to 8"),
    ],
)
def test_values_out_of_range_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        QATConfig(**changes)


def test_what_follows_from_the_data() -> None:
    config = QATConfig(num_epochs=3, batch=4, gradient_accumulation=2).with_steps(100)
    assert (config.steps, config.warmup_steps, config.freeze_observers_at) == (37, 3, 18)
    assert QATConfig(steps=5000).with_steps(None).warmup_steps == 100
    assert (config.checkpoint_every, QATConfig(steps=5000).with_steps(None).checkpoint_every) == (10, 500)
    with pytest.raises(InputError, match="give steps"):
        QATConfig().with_steps(None)
    with pytest.raises(InputError, match="7 rows of data, and a step takes 8"):
        QATConfig().with_steps(7)
    with pytest.raises(InputError, match="warmup_steps reaches to step 10 of 10"):
        QATConfig(steps=10, warmup_steps=10).with_steps(None)
    with pytest.raises(InputError, match="gradual_bits reaches to step 20 of 10"):
        QATConfig(steps=10, gradual_bits=((20, 4),)).with_steps(None)


def test_only_what_decides_bits_is_compared_on_resume() -> None:
    one, other = QATConfig(keep=1, eval_every=5), QATConfig(keep=9, tensorboard=True)
    assert one.decisive() == other.decisive()
    assert QATConfig(seed=1).decisive() != one.decisive()
