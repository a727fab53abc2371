"""What the experiment on growth reckons with, where it is known otherwise."""

from __future__ import annotations

import pytest

from experiments.scaling import Sizes, estimates
from experiments.scaling_theory import STAGES, Load, held_bytes, parts
from jquant.models.published import find_published
from jquant.models.shape import model_shape


def test_exponents_of_theory() -> None:
    """Twice the layers is twice the work of the blocks; wide enough, twice the width is four times that of a pass."""
    one, two = (Sizes(layers=layers).shape() for layers in (4, 8))
    for stage in STAGES:
        few, many = (parts(stage, shape, Load(tokens=1024, cells=2)) for shape in (one, two))
        assert many["passes"].operations == pytest.approx(2 * few["passes"].operations)
    narrow, wide = (parts("evaluation", Sizes(width=width).shape(), Load(tokens=256)) for width in (4096, 8192))
    assert wide["passes"].operations / narrow["passes"].operations == pytest.approx(4, rel=0.02)


def test_a_published_model() -> None:
    """6·N·D of training, 2·N·D of a pass, and 2 bytes a parameter."""
    published = find_published("llama-3-70b")
    assert published is not None
    shape = model_shape(published.config, name="70b", source=published.source)
    training = sum(part.operations for part in parts("QAT", shape, Load(tokens=2048, window=2048)).values())
    assert training / (6 * published.parameters * 1e9 * 2048) == pytest.approx(1, rel=0.05)
    held = held_bytes("evaluation", shape, Load(tokens=2048, window=2048), float_bytes=2)
    assert held == pytest.approx(2 * published.parameters * 1e9, rel=0.02)
    rows = estimates(dict.fromkeys(STAGES, 1.0))
    assert len(rows) == 24
    assert all(row["hours"] >= row["least_hours"] > 0 for row in rows)
