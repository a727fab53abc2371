"""Diagnoses a model: sensitivities, outliers, faults, and the best recipe for a budget of bits.

Stands above the rooms, like the command line: it joins models, ptq and evaluation.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jquant import __version__
from jquant.core.errors import InputError
from jquant.core.formats import Int
from jquant.core.qtensor import QTensor, dequantize, stored_bytes
from jquant.core.scheme import Group, Scheme, scheme, with_group
from jquant.data.blocks import Windows, text_windows
from jquant.data.overlap import refuse_seen
from jquant.data.text import load_text
from jquant.evaluation import faults
from jquant.evaluation.allocate import Allocation, allocate, moves
from jquant.evaluation.diagnose_config import DiagnoseConfig
from jquant.evaluation.diagnosis import Diagnosis, Variant
from jquant.evaluation.diagnosis_report import to_html
from jquant.evaluation.faults import Finding
from jquant.evaluation.outliers import outliers
from jquant.evaluation.sensitivity import (
    FloatPass,
    LayerSensitivity,
    block_layers,
    float_pass,
    mixed,
    sensitivities,
    uniform,
)
from jquant.io.atomic import replacing
from jquant.io.json_file import as_text
from jquant.models.checkpoint import Checkpoint, open_checkpoint
from jquant.models.decoder import Decoder
from jquant.ptq.recipe import Recipe, Rule, Step, to_yaml

Listen = Callable[[str, int, int], None]
_PROBE = "In 1969, three people flew 384,400 km to the Moon; it's naïve to say that 12 others followed by 1972."


def run_diagnosis(config: DiagnoseConfig, listen: Listen = lambda stage, done, total: None) -> Diagnosis:
    """Measures a model; writes reports and the recipe where the config names files.

    Raises:
        InputError: the models do not fit each other, or a scheme does not fit a layer.
    """
    checkpoint = open_checkpoint(config.model)
    model = checkpoint.model(dtype=config.dtype)
    quantized = any(isinstance(layer.weight.get_value(), QTensor) for layer in faults.layers_of(model).values())
    if config.reference is None and quantized:
        raise InputError(
            f"{config.model} is quantized: give --reference, the float model that it was made from; or name that one "
            "as MODEL to see what quantizing it would cost"
        )
    windows = text_windows(load_text(config.text), checkpoint.tokenizer(), window=config.window, limit=config.windows)
    refuse_seen(checkpoint.provenance.get("calibration"), windows, config.model)
    if config.reference is None:
        found = _float_model(config, model, windows, listen)
    else:
        found = _quantized_model(config, checkpoint, model, windows, listen)
    found = dataclasses.replace(found, facts=_facts(config, checkpoint, windows))
    if found.allocation is not None and config.recipe_out is not None:
        text = to_yaml(recipe_of(found.allocation, method=config.method))
        with replacing(config.recipe_out) as file:
            file.write(text.encode())
    if config.out is not None:
        config.out.mkdir(parents=True, exist_ok=True)
        for name, text in (("diagnosis.json", as_text(found.as_json())), ("diagnosis.html", to_html(found))):
            with replacing(config.out / name) as file:
                file.write(text.encode())
    return found


def recipe_of(allocation: Allocation, *, method: str = "rtn") -> Recipe:
    """Rules that give each layer the scheme it was allotted."""
    by_scheme: dict[str, list[str]] = {}
    for path, spec in allocation.schemes.items():
        by_scheme.setdefault(spec, []).append(f"^{re.escape(path)}$")
    return Recipe(
        rules=tuple(
            Rule(layers=tuple(paths), scheme=spec, method=Step(method)) for spec, paths in sorted(by_scheme.items())
        )
    )


def _float_model(config: DiagnoseConfig, model: Decoder, windows: Windows, listen: Listen) -> Diagnosis:
    """What quantizing would cost."""
    base = scheme(config.scheme)
    candidates = [scheme(spec) for spec in config.schemes] if config.bits is not None else []
    wanted = list(dict.fromkeys([base, *candidates]))
    if config.bits is not None:
        _check_budget(model, candidates, config.bits)
    passed = float_pass(model, windows)
    seen = outliers(model, passed, progress=lambda done, total: listen("outliers, blocks", done, total))
    found = list(
        sensitivities(model, passed, wanted, progress=lambda done, total: listen("layers, one at a time", done, total))
    )
    of_base = tuple(each for each in found if each.scheme == str(base))
    allocation, measured = None, math.nan
    if config.bits is not None:
        names = {str(each) for each in candidates}
        allocation = allocate([each for each in found if each.scheme in names], config.bits)
        chosen = {path: scheme(spec) for path, spec in allocation.schemes.items()}
        measured, _ = mixed(model, passed, chosen)
    return Diagnosis(
        base=str(base),
        layers=of_base,
        outliers=tuple(seen),
        findings=tuple(faults.accuracy_findings(of_base, seen)),
        variants=tuple(_variants(model, passed, base, listen)),
        moves=tuple(moves(found, str(base))),
        allocation=allocation,
        measured_allocation=measured,
        facts={},
    )


def _check_budget(model: Decoder, candidates: list[Scheme], bits: float) -> None:
    """Before anything is measured: does the budget hold the smallest schemes, and do all schemes fit?"""
    nothing = {"kl": 0.0, "nll_increase": 0.0, "weight_error": 0.0}
    sizes = {path: tuple(layer.weight.get_value().shape) for path, layer in block_layers(model).items()}
    held = {(spec, shape): 8 * stored_bytes(spec, shape) for spec in candidates for shape in set(sizes.values())}
    allocate(
        [
            LayerSensitivity(path=path, scheme=str(spec), bits=held[spec, shape], weights=math.prod(shape), **nothing)
            for path, shape in sizes.items()
            for spec in candidates
        ],
        bits,
    )


def _variants(model: Decoder, passed: FloatPass, base: Scheme, listen: Listen) -> list[Variant]:
    """The base, and one step away from it in each of group size, zero point and bits: all layers at once."""
    steps = [base]
    if isinstance(base.granularity, Group):
        size = base.granularity.size
        if base.block is None:
            steps += [with_group(base, each) for each in (size // 2, 2 * size) if each >= 8]
    if isinstance(base.element, Int):
        steps.append(dataclasses.replace(base, zero_point="none" if base.zero_point == "integer" else "integer"))
        bits = (base.element.bits - 1, base.element.bits + 1)
        steps += [dataclasses.replace(base, element=Int(each)) for each in bits if 2 <= each <= 8]
    found: list[Variant] = []
    sizes = {path: layer.weight.get_value().shape for path, layer in block_layers(model).items()}
    for index, each in enumerate(steps):
        try:
            kl, _ = uniform(model, passed, each)
        except InputError:  # a group that does not fit the rows is no step that can be taken
            continue
        bits = _bits(each, sizes)
        gain, added = (found[0].kl - kl, bits - found[0].bits_per_weight) if found else (0.0, 0.0)
        per_bit = gain / added if added else math.inf if gain > 0 else -math.inf
        # A step that saves bits and loses is worth what it saves only as a step back: it counts as a loss.
        found.append(Variant(str(each), bits, kl, per_bit if added > 0 or gain > 0 else -abs(per_bit)))
        listen("schemes of all layers", index + 1, len(steps))
    return found


def _bits(spec: Scheme, shapes: Mapping[str, tuple[int, ...]]) -> float:
    held = sum(8 * stored_bytes(spec, tuple(shape)) for shape in shapes.values())
    return held / sum(math.prod(shape) for shape in shapes.values())


def _quantized_model(
    config: DiagnoseConfig, checkpoint: Checkpoint, model: Decoder, windows: Windows, listen: Listen
) -> Diagnosis:
    """What went wrong, and where this model loses."""
    assert config.reference is not None
    original = open_checkpoint(config.reference)
    reference = original.model(dtype=config.dtype)
    ours, theirs = checkpoint.tokenizer(), original.tokenizer()
    probe = ours.encode(_PROBE).tolist(), theirs.encode(_PROBE).tolist()
    findings: list[Finding] = faults.tokenizer_faults(ours.sha256, theirs.sha256, probe)
    findings += faults.packed_faults(model)
    transformed = _was_transformed(checkpoint)
    if not transformed:
        listed = {each.where for each in findings}
        found = faults.weight_faults(model, reference, head_dim=model.config.head_dim)
        findings += [each for each in found if each.where not in listed]
    passed = float_pass(reference, windows)
    findings += faults.block_faults(model, passed)
    seen = outliers(reference, passed, progress=lambda done, total: listen("outliers, blocks", done, total))
    layers = () if transformed else tuple(_own_losses(reference, model, passed, listen))
    findings += faults.accuracy_findings(layers, seen)
    findings += _speed(model, reference, passed)
    return Diagnosis(
        base="",
        layers=layers,
        outliers=tuple(seen),
        findings=tuple(findings),
        variants=(),
        moves=(),
        allocation=None,
        measured_allocation=math.nan,
        facts={},
    )


def _own_losses(reference: Decoder, model: Decoder, passed: FloatPass, listen: Listen) -> list[LayerSensitivity]:
    """Of each packed layer: the float model with that layer's decoded weight in it."""
    packed = {
        path: layer.weight.get_value()
        for path, layer in faults.layers_of(model).items()
        if isinstance(layer.weight.get_value(), QTensor)
    }
    found: list[LayerSensitivity] = []

    def decoded(path: str, weight: jax.Array, spec: Scheme) -> jax.Array:
        return dequantize(packed[path], jnp.float32).astype(weight.dtype)

    for index, (path, weight) in enumerate(packed.items()):
        found += sensitivities(reference, passed, [weight.scheme], layers=[path], rounded=decoded)
        listen("layers, one at a time", index + 1, len(packed))
    return [each for each in found if np.isfinite(each.kl)]


def _was_transformed(checkpoint: Checkpoint) -> bool:
    recipe: Any = checkpoint.provenance.get("recipe")
    rules = recipe.get("rules", []) if isinstance(recipe, Mapping) else []
    return any(isinstance(rule, Mapping) and rule.get("transforms") for rule in rules)


def _speed(model: Decoder, reference: Decoder, passed: FloatPass) -> list[Finding]:
    """One block, one token: packed, float, and the decoding alone."""
    x = passed.states[0][:1, :1]
    context = model.contexts(1)[0]
    packed, decode = faults.block_seconds(model.blocks[0], x, context)
    plain, _ = faults.block_seconds(reference.blocks[0], x, context)
    return faults.speed_findings(None, packed_seconds=packed, float_seconds=plain, decode_seconds=decode)


def _facts(config: DiagnoseConfig, checkpoint: Checkpoint, windows: Windows) -> dict[str, Any]:
    return {
        "model": {"name": checkpoint.name, "sha256": checkpoint.sha256(), "note": checkpoint.note},
        "reference": config.reference,
        "text": f"{windows.text_name}, {len(windows.tokens)} windows of {windows.window} tokens",
        "tokens sha256": windows.sha256,
        "jquant": __version__,
        "jax": jax.__version__,
    }
