"""jquant, the quantization lab for JAX: any number format × any granularity × any method, on any Flax model."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from jquant.benchmark_run import benchmark as benchmark
    from jquant.core.errors import InputError as InputError
    from jquant.core.formats import Codebook as Codebook
    from jquant.core.formats import Float as Float
    from jquant.core.formats import Int as Int
    from jquant.core.metrics import error_metrics as error_metrics
    from jquant.core.qtensor import QTensor as QTensor
    from jquant.core.qtensor import dequantize as dequantize
    from jquant.core.qtensor import quantize as quantize
    from jquant.core.scheme import Scheme as Scheme
    from jquant.core.scheme import scheme as scheme
    from jquant.core.ste import clipped_ste as clipped_ste
    from jquant.core.ste import fake_quantize as fake_quantize
    from jquant.core.ste import ste as ste
    from jquant.data.blocks import sample_blocks as sample_blocks
    from jquant.data.blocks import text_windows as text_windows
    from jquant.data.text import load_text as load_text
    from jquant.diagnosis_run import run_diagnosis as run_diagnosis
    from jquant.evaluation.divergence import divergence as divergence
    from jquant.evaluation.perplexity import perplexity as perplexity
    from jquant.evaluation.scoring import evaluate as evaluate
    from jquant.evaluation.scoring import prepare_reference as prepare_reference
    from jquant.evaluation.validate import validate as validate
    from jquant.models.checkpoint import load_model as load_model
    from jquant.models.checkpoint import load_tokenizer as load_tokenizer
    from jquant.models.checkpoint import open_checkpoint as open_checkpoint
    from jquant.models.export import export as export
    from jquant.models.generate import Sampling as Sampling
    from jquant.models.generate import generate as generate
    from jquant.models.save import save as save
    from jquant.nn.mesh import make_mesh as make_mesh
    from jquant.ptq.coverage import Coverage as Coverage
    from jquant.ptq.pipeline import quantize_model as quantize_model
    from jquant.ptq.presets import preset as preset
    from jquant.ptq.recipe import Recipe as Recipe
    from jquant.ptq.recipe import Rule as Rule
    from jquant.ptq.recipe import Step as Step
    from jquant.ptq.recipe import one_rule as one_rule
    from jquant.ptq.recipe import read_recipe as read_recipe
    from jquant.ptq.rtn import quantize_layers as quantize_layers
    from jquant.qat_run import train_checkpoint as train_checkpoint
    from jquant.quantization_run import quantize_checkpoint as quantize_checkpoint
    from jquant.sweep.config import SweepConfig as SweepConfig
    from jquant.sweep.run import run_sweep as run_sweep
    from jquant.validation_run import run_validation as run_validation

# Where each public name lives; it is imported when it is first used, so that `import jquant` costs nothing.
_HOME = {
    "benchmark": "benchmark_run",
    "run_diagnosis": "diagnosis_run",
    "run_validation": "validation_run",
    "validate": "evaluation.validate",
    "InputError": "core.errors",
    "Codebook": "core.formats",
    "Float": "core.formats",
    "Int": "core.formats",
    "error_metrics": "core.metrics",
    "QTensor": "core.qtensor",
    "dequantize": "core.qtensor",
    "quantize": "core.qtensor",
    "Scheme": "core.scheme",
    "scheme": "core.scheme",
    "clipped_ste": "core.ste",
    "fake_quantize": "core.ste",
    "ste": "core.ste",
    "sample_blocks": "data.blocks",
    "text_windows": "data.blocks",
    "load_text": "data.text",
    "divergence": "evaluation.divergence",
    "perplexity": "evaluation.perplexity",
    "evaluate": "evaluation.scoring",
    "prepare_reference": "evaluation.scoring",
    "load_model": "models.checkpoint",
    "load_tokenizer": "models.checkpoint",
    "open_checkpoint": "models.checkpoint",
    "export": "models.export",
    "Sampling": "models.generate",
    "generate": "models.generate",
    "save": "models.save",
    "make_mesh": "nn.mesh",
    "Coverage": "ptq.coverage",
    "quantize_model": "ptq.pipeline",
    "preset": "ptq.presets",
    "Recipe": "ptq.recipe",
    "Rule": "ptq.recipe",
    "Step": "ptq.recipe",
    "one_rule": "ptq.recipe",
    "read_recipe": "ptq.recipe",
    "quantize_layers": "ptq.rtn",
    "train_checkpoint": "qat_run",
    "quantize_checkpoint": "quantization_run",
    "SweepConfig": "sweep.config",
    "run_sweep": "sweep.run",
}

__all__ = ["__version__", *_HOME]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'jquant' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"jquant.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
