"""Quantization-aware training: preparation, learned scales, trainer, conversion."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jquant.qat.batches import RowBatches as RowBatches
    from jquant.qat.config import QATConfig as QATConfig
    from jquant.qat.convert import convert as convert
    from jquant.qat.convert import unwrap as unwrap
    from jquant.qat.lora import ALL_BUT_ADAPTERS as ALL_BUT_ADAPTERS
    from jquant.qat.lora import add_adapters as add_adapters
    from jquant.qat.lora import merge as merge
    from jquant.qat.lora import requantize as requantize
    from jquant.qat.losses import distillation_loss as distillation_loss
    from jquant.qat.losses import next_token_loss as next_token_loss
    from jquant.qat.prepare import Report as Report
    from jquant.qat.prepare import prepare as prepare
    from jquant.qat.rules import PRESETS as PRESETS
    from jquant.qat.rules import Recipe as Recipe
    from jquant.qat.rules import Rule as Rule
    from jquant.qat.rules import find_recipe as find_recipe
    from jquant.qat.rules import one_rule as one_rule
    from jquant.qat.rules import read_recipe as read_recipe
    from jquant.qat.second_level import share_levels as share_levels
    from jquant.qat.stage import calibrate as calibrate
    from jquant.qat.stage import set_bits as set_bits
    from jquant.qat.stage import set_enabled as set_enabled
    from jquant.qat.stage import set_observing as set_observing
    from jquant.qat.trainer import train as train

# Where each public name lives; it is imported when it is first used: the command line reads configs without jax.
_HOME = {
    "RowBatches": "batches",
    "QATConfig": "config",
    "convert": "convert",
    "unwrap": "convert",
    "ALL_BUT_ADAPTERS": "lora",
    "add_adapters": "lora",
    "merge": "lora",
    "requantize": "lora",
    "distillation_loss": "losses",
    "next_token_loss": "losses",
    "Report": "prepare",
    "prepare": "prepare",
    "PRESETS": "rules",
    "Recipe": "rules",
    "Rule": "rules",
    "find_recipe": "rules",
    "one_rule": "rules",
    "read_recipe": "rules",
    "share_levels": "second_level",
    "calibrate": "stage",
    "set_bits": "stage",
    "set_enabled": "stage",
    "set_observing": "stage",
    "train": "trainer",
}

__all__ = [*_HOME]  # pyright: ignore[reportUnsupportedDunderAll]


class _Room(ModuleType):
    """`prepare` and `convert` are modules and functions in them: the functions' names are not given to the modules."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _HOME and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Room


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'jquant.qat' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"jquant.qat.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
