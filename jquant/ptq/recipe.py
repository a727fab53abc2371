"""A recipe: ordered rules that say which layers are quantized, to what, and how.

    rules:
      - layers: ['head\\.lm_head$']          # a layer takes the first rule that matches its path
        scheme: null                         # left alone
      - layers: ['mlp\\.down_proj$']
        scheme: int8:channel
        activation: int8:tensor              # inputs are quantized too; int8:token needs no data
        activation_range: {percentile: {percent: 99.9}}   # of static ones: minmax (the default), mse, or this
      - layers: ['^blocks\\.']
        transforms: [awq]                    # rewrite the float model first
        method: {gptq: {damping: 0.02}}      # then round; a name alone takes the method's defaults
        scheme: int4:g128:asym

Layers that no rule matches are left alone: embeddings and lm_head, unless a rule names them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path as FilePath
from typing import Any

from jquant.core.errors import InputError
from jquant.core.scheme import scheme as parse_scheme
from jquant.nn.surgery import Path, first_matches, matches
from jquant.ptq.methods import SOLVERS
from jquant.ptq.static_ranges import RANGES, check_range
from jquant.ptq.transforms import TRANSFORMS, configured

_FIELDS = ("layers", "scheme", "method", "transforms", "activation", "activation_range")


@dataclass(frozen=True)
class Step:
    """A solver or a transform by name, with the options that differ from its defaults."""

    name: str
    options: tuple[tuple[str, Any], ...] = ()

    def as_json(self) -> Any:
        """The name, or {name: {option: value}}."""
        return {self.name: dict(self.options)} if self.options else self.name

    @classmethod
    def from_json(cls, record: Any, what: str) -> Step:
        """The inverse of `as_json`. Raises InputError naming `what`."""
        if isinstance(record, str):
            return cls(record)
        if isinstance(record, Mapping) and len(record) == 1:
            ((name, options),) = record.items()
            if isinstance(name, str) and isinstance(options, Mapping) and all(isinstance(key, str) for key in options):
                return cls(name, tuple((key, _frozen(value)) for key, value in options.items()))
        raise InputError(f"{what}: is {record!r}; it must be a name or {{name: {{option: value}}}}")


@dataclass(frozen=True, kw_only=True)
class Rule:
    """What happens to the layers whose path one of the patterns matches."""

    layers: tuple[str, ...]  # regular expressions, searched for in the dotted path
    scheme: str | None  # of the weight; None leaves the layers alone
    method: Step = Step("rtn")
    transforms: tuple[Step, ...] = ()
    activation: str | None = None  # scheme of the layer's input, quantized when it runs: int8:token
    activation_range: Step = Step("minmax")  # of a static one, int8:tensor: ptq/static_ranges.py

    def __post_init__(self) -> None:
        what = f"rule {', '.join(self.layers) or '(no layers)'}"
        if not self.layers:
            raise InputError(f"{what}: it names no layers; give at least one pattern, as '^blocks\\.'")
        if self.scheme is None and (self.transforms or self.activation or self.method != Step("rtn")):
            raise InputError(f"{what}: it has no scheme, which leaves layers alone, and yet says how to quantize them")
        for spec in (self.scheme, self.activation):
            if spec is not None:
                _checked(parse_scheme, spec, what)
        _checked(lambda step: configured(SOLVERS, step.name, step.options), self.method, what)
        _checked(
            lambda step: configured(RANGES, step.name, step.options, "activation_range"), self.activation_range, what
        )
        static = None if self.activation is None else parse_scheme(self.activation)
        _checked(lambda step: check_range(step.name, self.activation, static), self.activation_range, what)
        for transform in self.transforms:
            _checked(lambda step: configured(TRANSFORMS, step.name, step.options), transform, what)
            if TRANSFORMS[transform.name].needs_activation and self.activation is None:
                raise InputError(
                    f"{what}: {transform.name} moves difficulty from activations to weights, and the rule quantizes no "
                    f"activations; say in which scheme, as {transform.name}@int8:token or, in a rule, activation: "
                    "int8:token"
                )


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


def one_rule(method: str, scheme: str, *, layers: Sequence[str] = (r"^blocks\.",)) -> Recipe:
    """All layers by one solver to one scheme.

    `method` may name transforms first, and after an @ the scheme of inputs: awq+gptq, smoothquant@int8:token.
    """
    method, at, activation = method.partition("@")
    *transforms, solver = method.split("+")
    if solver in TRANSFORMS:
        transforms, solver = [*transforms, solver], "rtn"
    steps = tuple(map(Step, transforms))
    rule = Rule(
        layers=tuple(layers),
        scheme=scheme,
        method=Step(solver),
        transforms=steps,
        activation=activation if at else None,
    )
    return Recipe(rules=(rule,))


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


def to_yaml(recipe: Recipe) -> str:
    """The recipe as a YAML file's text; `read_recipe` is the inverse."""
    import yaml

    return yaml.safe_dump(recipe.as_json(), sort_keys=False, allow_unicode=True)


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


def refuse_packed(recipe: Recipe, floats: Sequence[Path], packed: Sequence[Path]) -> None:
    """Raises InputError where a pattern matches layers that are quantized already, and no other."""
    for pattern in (pattern for rule in recipe.rules if rule.scheme is not None for pattern in rule.layers):
        if not matches(pattern, floats) and (found := matches(pattern, packed)):
            raise InputError(f"layer {found[0]} is quantized already: start from the float model")


def _rule_as_json(rule: Rule) -> dict[str, Any]:
    record: dict[str, Any] = {"layers": list(rule.layers), "scheme": rule.scheme}
    if rule.scheme is not None:
        record["method"] = rule.method.as_json()
    if rule.transforms:
        record["transforms"] = [step.as_json() for step in rule.transforms]
    if rule.activation is not None:
        record["activation"] = rule.activation
    if rule.activation_range != Step("minmax"):
        record["activation_range"] = rule.activation_range.as_json()
    return record


def _rule_from_json(record: Any, what: str) -> Rule:
    if not isinstance(record, Mapping):
        raise InputError(f"{what}: is {record!r}; it must be a mapping with fields {', '.join(_FIELDS)}")
    unknown = [key for key in record if key not in _FIELDS]
    if unknown:
        raise InputError(f"{what}: unknown field {', '.join(map(repr, unknown))}; there are {', '.join(_FIELDS)}")
    for name in ("layers", "scheme"):
        if name not in record:
            raise InputError(f"{what}: field {name} is missing")
    layers = record["layers"]
    layers = [layers] if isinstance(layers, str) else layers
    if not isinstance(layers, Sequence) or not all(isinstance(pattern, str) for pattern in layers):
        raise InputError(f"{what}: layers is {layers!r}; it must be a list of patterns")
    transforms = record.get("transforms", [])
    transforms = [transforms] if isinstance(transforms, str | Mapping) else transforms
    if not isinstance(transforms, Sequence):
        raise InputError(f"{what}: transforms is {transforms!r}; it must be a list")
    for name in ("scheme", "activation"):
        if not isinstance(record.get(name), str | None):
            raise InputError(f"{what}: {name} is {record[name]!r}; it must be a spec string such as int4:g128")
    return Rule(
        layers=tuple(layers),
        scheme=record["scheme"],
        method=Step.from_json(record.get("method", "rtn"), f"{what}: method"),
        transforms=tuple(Step.from_json(step, f"{what}: transforms") for step in transforms),
        activation=record.get("activation"),
        activation_range=Step.from_json(record.get("activation_range", "minmax"), f"{what}: activation_range"),
    )


def _checked(parse: Any, value: Any, what: str) -> None:
    try:
        parse(value)
    except InputError as error:
        raise InputError(f"{what}: {error}") from error


def _frozen(value: Any) -> Any:
    return tuple(map(_frozen, value)) if isinstance(value, list) else value
