"""Quantization-aware training: preparation, learned scales, trainer, conversion."""

from jquant.qat.convert import convert as convert
from jquant.qat.convert import unwrap as unwrap
from jquant.qat.prepare import Report as Report
from jquant.qat.prepare import prepare as prepare
from jquant.qat.rules import PRESETS as PRESETS
from jquant.qat.rules import Recipe as Recipe
from jquant.qat.rules import Rule as Rule
from jquant.qat.rules import find_recipe as find_recipe
from jquant.qat.rules import one_rule as one_rule
from jquant.qat.rules import read_recipe as read_recipe
from jquant.qat.stage import calibrate as calibrate
from jquant.qat.stage import set_bits as set_bits
from jquant.qat.stage import set_enabled as set_enabled
from jquant.qat.stage import set_observing as set_observing
