"""The tiny model of tests/ptq/places.py, made once for all tests of transforms; they leave it as it is."""

from __future__ import annotations

from typing import Any

import pytest

from jquant.models.decoder import Decoder
from tests.ptq.places import captured, model_with_outliers


@pytest.fixture(scope="session")
def model() -> Decoder:
    return model_with_outliers()


@pytest.fixture(scope="session")
def inputs(model: Decoder) -> dict[str, list[Any]]:
    return captured(model)
