"""What a run is said to take."""

from __future__ import annotations

from jquant.ptq.preflight import estimate
from jquant.ptq.recipe import Rule, Step

SHAPES = {"embed": (1000, 64), "blocks.0.up": (256, 64), "blocks.0.down": (64, 256), "blocks.1.up": (256, 64)}
RULE = Rule(layers=("blocks",), scheme="int4:g32", method=Step("gptq"))
RULES = {path: RULE for path in SHAPES if path.startswith("blocks.")}


def test_memory_holds_two_blocks_and_the_embedding() -> None:
    found = estimate(RULES, SHAPES, tokens=4096)
    assert found.weight_bytes == 4 * (2 * 2 * 64 * 256 + 1000 * 64)
    assert found.activation_bytes == 4 * 4096 * (2 * 64 + 64 + 256)
    assert found.statistic_bytes > 1.5 * 4 * 256**2
    half = estimate(RULES, SHAPES, tokens=4096, itemsize=2)
    assert (half.weight_bytes, half.activation_bytes) == (found.weight_bytes / 2, found.activation_bytes / 2)
    assert half.statistic_bytes == found.statistic_bytes  # float32 whatever the model is


def test_what_needs_no_data_keeps_no_activations() -> None:
    rules = dict.fromkeys(RULES, Rule(layers=("blocks",), scheme="int4:g32"))
    found = estimate(rules, SHAPES, tokens=0)
    assert found.activation_bytes == 0
    assert found.operations < estimate(RULES, SHAPES, tokens=4096).operations
