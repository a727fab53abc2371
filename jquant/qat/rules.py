"""A recipe of quantization-aware training: ordered rules that say which layers are quantized in training, and how.

    rules:
      - layers: ['head\\.lm_head$']       # a layer takes the first rule that matches its path
        scheme: null                      # left alone
      - layers: ['^blocks\\.']
        scheme: int4:g64                  # of the weight
        gradient: lsq                     # scales are trained; clipped_ste and ste follow the range
        start: mse                        # where trained scales start: range, mse, lsq
        activation: int8:token            # of the input; int8:tensor is static, or trained by lsq and pact
        activation_gradient: clipped_ste
        rounding: nearest                 # of the weight in training: nearest, stochastic

Layers that no rule matches are left alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path as FilePath
from typing import Any, get_args

from jquant.core.errors import InputError
from jquant.core.scheme import scheme as parse_scheme
from jquant.nn.fake_quant import InputGradient, Rounding, Start, WeightGradient
from jquant.nn.rounded_input import check_input_scheme
from jquant.nn.surgery import Path, first_matches

_CHOICES: dict[str, Any] = {
    "gradient": WeightGradient,
    "start": Start,
    "activation_gradient": InputGradient,
    "rounding": Rounding,
}


@dataclass(frozen=True, kw_only=True)
class Rule:
    """What happens to the layers whose path one of the patterns matches."""

    layers: tuple[str, ...]  # regular expressions, searched for in the dotted path
    scheme: str | None  # of the weight; None leaves the layers alone
    gradient: WeightGradient = "clipped_ste"
    start: Start = "mse"
    rounding: Rounding = "nearest"
    activation: str | None = None  # scheme of the input
    activation_gradient: InputGradient = "clipped_ste"

    def __post_init__(self) -> None:
        what = f"rule {', '.join(self.layers) or '(no layers)'}"
        if not self.layers:
            raise InputError(f"{what}: it names no layers; give at least one pattern, as '^blocks\\.'")
        for name, kind in _CHOICES.items():
            if getattr(self, name) not in get_args(kind):
                raise InputError(f"{what}: {name} is {getattr(self, name)!r}; there are {', '.join(get_args(kind))}")
        if self.scheme is None and self.activation is not None:
            raise InputError(f"{what}: it has no scheme, which leaves layers alone, and yet one for their input")
        try:
            if self.scheme is not None:
                parse_scheme(self.scheme)
            if self.activation is not None:
                check_input_scheme(parse_scheme(self.activation))
        except InputError as error:
            raise InputError(f"{what}: {error}") from error


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Rules in order; the first that matches a layer decides."""

    rules: tuple[Rule, ...]

    def __post_init__(self) -> None:
        if not self.rules:
            raise InputError("the recipe has no rules; give at least one")

    def as_json(self) -> dict[str, Any]:
        """Plain values; `from_json` is the inverse."""
        return {"rules": [_rule_as_json(rule) for rule in self.rules]}

    @classmethod
    def from_json(cls, record: Any, source: str) -> Recipe:
        """Raises InputError naming `source` where the record is no recipe."""
        if not isinstance(record, Mapping) or list(record) != ["rules"] or not isinstance(record["rules"], Sequence):
            raise InputError(f"{source}: a recipe is a mapping with one field, rules, which is a list")
        return cls(
            rules=tuple(_rule_from_json(rule, f"{source}: rule {i + 1}") for i, rule in enumerate(record["rules"]))
        )


def one_rule(scheme: str, *, layers: Sequence[str] = (r"^blocks\.",), **choices: Any) -> Recipe:
    """All layers of the blocks, or those that the patterns match, in one way; `choices` are fields of `Rule`."""
    return Recipe(rules=(Rule(layers=tuple(layers), scheme=scheme, **choices),))


def read_recipe(path: str | FilePath) -> Recipe:
    """A recipe from a YAML or JSON file. Raises InputError where it cannot be read or is none."""
    import yaml

    path = FilePath(path)
    try:
        record = yaml.safe_load(path.read_text(encoding="utf-8"))  # JSON is YAML
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read: {error}") from error
    except yaml.YAMLError as error:
        raise InputError(f"{path}: is no YAML: {' '.join(str(error).split())}") from error
    return Recipe.from_json(record, str(path))


PRESETS: dict[str, Recipe] = {
    "int4-g128": one_rule("int4:g128:fp16"),
    "int4-g64-lsq": one_rule("int4:g64", gradient="lsq"),
    "int3-g64-lsq": one_rule("int3:g64", gradient="lsq"),
    "int2-g64-lsq": one_rule("int2:g64", gradient="lsq"),
    "w8a8": one_rule("int8:channel", activation="int8:token"),
    "w4a8": one_rule("int4:g128:fp16", activation="int8:token"),
    "fp8": one_rule("fp8_e4m3:channel", activation="fp8_e4m3:token"),
    "nf4": one_rule("nf4:g64:dq"),
    "mxfp4": one_rule("mxfp4"),
    "nvfp4": one_rule("nvfp4"),
}


def find_recipe(name: str) -> Recipe:
    """A preset, or the recipe in a file. Raises InputError where the name is neither."""
    if name in PRESETS:
        return PRESETS[name]
    if not FilePath(name).suffix and not FilePath(name).exists():
        raise InputError(f"recipe {name!r} is neither a file nor a preset of qat, which are {', '.join(PRESETS)}")
    return read_recipe(name)


def assign(recipe: Recipe, paths: Sequence[Path]) -> dict[Path, Rule]:
    """The rule of every layer that is to be quantized, in the order of the paths.

    Raises:
        InputError: a pattern matches nothing, or a rule is never the first to match: it would do nothing.
    """
    first = first_matches([rule.layers for rule in recipe.rules], paths)
    chosen = {path: recipe.rules[i] for path, i in first.items() if recipe.rules[i].scheme is not None}
    if not chosen:
        raise InputError("the recipe leaves every layer alone; give a rule with a scheme")
    return chosen


def _rule_as_json(rule: Rule) -> dict[str, Any]:
    record: dict[str, Any] = {"layers": list(rule.layers), "scheme": rule.scheme}
    for field in fields(Rule):
        value = getattr(rule, field.name)
        if field.name not in record and value != field.default:
            record[field.name] = value
    return record


def _rule_from_json(record: Any, what: str) -> Rule:
    names = [field.name for field in fields(Rule)]
    if not isinstance(record, Mapping):
        raise InputError(f"{what}: is {record!r}; it must be a mapping with fields {', '.join(names)}")
    unknown = [key for key in record if key not in names]
    if unknown:
        raise InputError(f"{what}: unknown field {', '.join(map(repr, unknown))}; there are {', '.join(names)}")
    for name in ("layers", "scheme"):
        if name not in record:
            raise InputError(f"{what}: field {name} is missing")
    layers = record["layers"]
    layers = [layers] if isinstance(layers, str) else layers
    if not isinstance(layers, Sequence) or not all(isinstance(pattern, str) for pattern in layers):
        raise InputError(f"{what}: layers is {layers!r}; it must be a list of patterns")
    for name in ("scheme", "activation"):
        if not isinstance(record.get(name), str | None):
            raise InputError(f"{what}: {name} is {record[name]!r}; it must be a spec string such as int4:g128")
    return Rule(**{**record, "layers": tuple(layers)})
