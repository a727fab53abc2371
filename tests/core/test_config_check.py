"""Options that are misspelt, or of another kind, are errors that say what there is."""

from __future__ import annotations

import math
from typing import Any

import pytest

from jquant.core.errors import InputError
from jquant.ptq.awq import AWQConfig
from jquant.ptq.gptq import GPTQConfig
from jquant.ptq.hqq import HQQConfig
from jquant.ptq.rtn import RTNConfig
from jquant.ptq.smoothquant import SmoothQuantConfig


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (GPTQConfig, {"act_order": "dynamc"}, "GPTQ act_order 'dynamc': it must be none, static or dynamic"),
        (GPTQConfig, {"range": "mseee"}, "GPTQ range 'mseee': it must be minmax, mse or output"),
        (GPTQConfig, {"damping": "0.1"}, "GPTQ damping '0.1': it must be a number"),
        (GPTQConfig, {"damping": math.inf}, "GPTQ damping inf: it must be a number"),
        (GPTQConfig, {"block": 64.5}, "GPTQ block 64.5: it must be an integer"),
        (GPTQConfig, {"block": True}, "GPTQ block True: it must be an integer"),
        (RTNConfig, {"range": "mze"}, "rtn range 'mze': it must be minmax or mse"),
        (HQQConfig, {"turns": math.nan}, "HQQ turns nan: it must be an integer"),
        (SmoothQuantConfig, {"places": "nroms"}, "SmoothQuant places 'nroms': it must be norms or all"),
        (SmoothQuantConfig, {"alpha": "serch"}, "SmoothQuant alpha 'serch': it must be a number or 'search'"),
        (AWQConfig, {"clip": "al"}, "AWQ clip 'al': it must be rounded, all or none"),
        (AWQConfig, {"duo_scaling": 1}, "AWQ duo_scaling 1: it must be true or false"),
    ],
)
def test_what_is_refused(make: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as error:
        make(**options)
    assert str(error.value) == message


def test_what_is_taken() -> None:
    assert GPTQConfig(damping=1, act_order="none").damping == 1
    assert SmoothQuantConfig(alpha="search").alpha == "search"
    assert AWQConfig(duo_scaling=False, max_shrink=0.25).max_shrink == 0.25
