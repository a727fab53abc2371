"""Surgery for quantization-aware training: float layers at the paths that rules name become fake-quantized ones."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import jax
from flax import nnx
from jaxtyping import PRNGKeyArray

from jquant.core.errors import InputError
from jquant.core.scheme import scheme as parse_scheme
from jquant.nn.fake_quant import FakeQuantModule, InputQuantizer, WeightQuantizer
from jquant.nn.kernel_matrix import FLAX_LAYERS, to_matrix, weight_name
from jquant.nn.linear import ExpertLinear, Linear
from jquant.nn.qat_layers import QATExpertLinear, QATLayer, QATLinear, QATTable
from jquant.nn.surgery import Path, named_modules, replace
from jquant.qat.rules import Recipe, Rule, assign
from jquant.qat.second_level import share_levels

_LAYERS = (Linear, ExpertLinear, *FLAX_LAYERS)


@dataclass(frozen=True)
class Report:
    """What `prepare` did: every layer's rule by its path, and the kinds of layers."""

    rules: dict[Path, Rule]
    kinds: dict[Path, str]
    uncalibrated: tuple[Path, ...]  # layers whose trained input scales wait for `calibrate`

    def __str__(self) -> str:
        lines = []
        for rule in dict.fromkeys(self.rules.values()):
            paths = [path for path, given in self.rules.items() if given == rule]
            kinds = ", ".join(f"{n} {kind}" for kind, n in Counter(self.kinds[path] for path in paths).items())
            weight = f"weights {rule.scheme} by {rule.gradient}"
            if rule.rounding == "stochastic":
                weight += ", rounded stochastically"
            inputs = "as they are" if rule.activation is None else f"{rule.activation} by {rule.activation_gradient}"
            lines.append(f"{', '.join(rule.layers)}: {kinds}; {weight}; inputs {inputs}")
        if self.uncalibrated:
            lines.append(f"input scales of {len(self.uncalibrated)} layers wait for jquant.qat.calibrate")
        return "\n".join(lines)


def prepare(
    model: nnx.Module,
    recipe: Recipe,
    *,
    key: PRNGKeyArray | None = None,
    announce: Callable[[str], None] = print,
) -> Report:
    """Replaces float layers by fake-quantized ones, in place. Make the optimizer afterwards, or it never sees scales.

    Layers are nnx.Linear, LinearGeneral (with them nnx.MultiHeadAttention's projections), Einsum, Embed, Conv, and the
    decoder's own; `embed` is its table of embeddings. Their parameters stay the same variables.

    Args:
        model: any NNX module of float layers.
        recipe: what happens to which layers.
        key: for stochastic rounding.
        announce: hears what was done, a line a rule.

    Raises:
        InputError: a pattern matches nothing, a scheme does not fit a layer, or the model is prepared already; then
            nothing was replaced.
    """
    prepared = next((path for path, module in nnx.iter_graph(model) if isinstance(module, FakeQuantModule)), None)
    if prepared is not None:
        raise InputError(f"{'.'.join(map(str, prepared))} is fake-quantized already: prepare a model once")
    layers: dict[Path, nnx.Module] = dict(named_modules(model, _LAYERS))
    embed = getattr(model, "embed", None)
    table = getattr(embed, "weight", None)
    paths = [*layers, *(["embed"] if isinstance(table, nnx.Param) else [])]
    if not paths:
        raise InputError("the model has no float layers: start from the float model")
    rules = assign(recipe, paths)
    rngs = None if key is None else nnx.Rngs(key)
    made = {path: _made(path, layers.get(path, table), rule, rngs) for path, rule in rules.items()}
    if "embed" in made:
        assert embed is not None
        embed.weight = made.pop("embed")
    replace(model, made)
    share_levels(model)
    kinds = {path: type(layers.get(path, embed)).__name__ for path in rules}
    waiting = tuple(
        path for path, rule in rules.items() if rule.activation and rule.activation_gradient in ("lsq", "pact")
    )
    report = Report(rules, kinds, waiting)
    announce(str(report))
    return report


def _made(path: Path, layer: object, rule: Rule, rngs: nnx.Rngs | None) -> nnx.Module:
    """The layer that takes this one's place. Raises InputError naming the path."""
    assert rule.scheme is not None
    try:
        matrix = _matrix(layer)
        weight = WeightQuantizer(
            matrix,
            parse_scheme(rule.scheme),
            gradient=rule.gradient,
            start=rule.start,
            rounding=rule.rounding,
            rngs=rngs,
        )
        if isinstance(layer, nnx.Embed | nnx.Param) and rule.activation is not None:
            raise InputError("the input of an embedding is tokens: leave `activation` out")
        inputs = None
        if rule.activation is not None:
            inputs = InputQuantizer(parse_scheme(rule.activation), gradient=rule.activation_gradient)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    match layer:
        case Linear():
            return QATLinear(layer, weight, inputs)
        case ExpertLinear():
            return QATExpertLinear(layer, weight, inputs)
        case nnx.Param():
            return QATTable(layer, weight)
    assert isinstance(layer, nnx.Module)
    return QATLayer(layer, weight, inputs)


def _matrix(layer: object) -> jax.Array:
    match layer:
        case Linear() | ExpertLinear():
            return layer.weight.get_value()
        case nnx.Param():
            return layer.get_value()
    assert isinstance(layer, nnx.Module)
    return to_matrix(layer, getattr(layer, weight_name(layer)).get_value())
