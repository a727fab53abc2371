"""Recipes by name, and how much text the guide calibrates each method with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path as FilePath

from jquant.core.errors import InputError
from jquant.nn.surgery import Path
from jquant.ptq.block import rule_needs_data
from jquant.ptq.recipe import Recipe, Rule, Step, read_recipe

Shapes = Mapping[Path, tuple[int, ...]]  # of the weights of all layers, embedding and output projection included

_BLOCKS = (r"^blocks\.",)


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """A text by its name in `jquant.data.hub`, and how much of it."""

    text: str
    windows: int
    window: int


# The guide's table "get_recommended_config"; what a recipe's methods ask for is the most that any of them does.
RECOMMENDED: dict[str, Calibration] = {
    "gptq": Calibration(text="openplatypus", windows=128, window=2048),
    "awq": Calibration(text="wikitext2:train", windows=128, window=512),
    "smoothquant": Calibration(text="pile", windows=512, window=2048),
}


def preset(name: str, shapes: Shapes) -> Recipe:
    """The recipe of this name for a model with these layers.

    Raises:
        InputError: there is no such preset; the message lists them.
    """
    if name not in PRESETS:
        raise InputError(f"recipe {name!r}: neither a file nor a preset of quantize, which are {', '.join(PRESETS)}")
    return PRESETS[name](shapes)


def find_recipe(name: str, shapes: Shapes) -> Recipe:
    """A preset by its name, or the recipe in a file. Raises InputError where it is neither."""
    if name not in PRESETS and FilePath(name).exists():
        return read_recipe(name)
    return preset(name, shapes)


def calibrated(recipe: Recipe) -> bool:
    """Whether a rule learns from data."""
    return any(rule.scheme is not None and rule_needs_data(rule) for rule in recipe.rules)


def recommended(recipe: Recipe) -> Calibration:
    """What the guide calibrates the recipe's methods with; the larger where there are several."""
    names = [step.name for rule in recipe.rules for step in (*rule.transforms, rule.method)]
    known = [RECOMMENDED[name] for name in names if name in RECOMMENDED]
    return max(known, key=lambda each: each.windows * each.window, default=RECOMMENDED["gptq"])


def _blocks(
    scheme: str, method: str = "rtn", *, transforms: tuple[str, ...] = (), activation: str | None = None
) -> Callable[[Shapes], Recipe]:
    def recipe(shapes: Shapes) -> Recipe:
        steps = tuple(map(Step, transforms))
        rule = Rule(layers=_BLOCKS, scheme=scheme, method=Step(method), transforms=steps, activation=activation)
        return Recipe(rules=(rule,))

    return recipe


def _k_medium(small: str, large: str) -> Callable[[Shapes], Recipe]:
    """llama.cpp's *_M mixes: `large` for the output projection, and for v_proj and down_proj of some blocks.

    Those are the first and the last eighth, and every third between (llama.cpp, src/llama-quant.cpp, use_more_bits).
    A row that no super-block of 256 divides takes the type of 32-element blocks that llama.cpp falls back to.
    """

    def recipe(shapes: Shapes) -> Recipe:
        depth = 1 + max((int(path.split(".")[1]) for path in shapes if path.startswith("blocks.")), default=-1)
        more = [i for i in range(depth) if i < depth // 8 or i >= 7 * depth // 8 or (i - depth // 8) % 3 == 2]
        output = "head.lm_head" if "head.lm_head" in shapes else "embed"
        best = {f"blocks.{i}.{layer}" for i in more for layer in ("attn.v_proj", "mlp.down_proj")} | {output}
        by_scheme: dict[str, list[Path]] = {}
        for path, shape in shapes.items():
            wanted = large if path in best else small
            by_scheme.setdefault(wanted if shape[-1] % 256 == 0 else _FALLBACK[wanted], []).append(path)
        rules = (Rule(layers=(_any_of(paths),), scheme=scheme) for scheme, paths in by_scheme.items())
        return Recipe(rules=tuple(rules))

    return recipe


_FALLBACK = {"q4_k": "q5_0", "q5_k": "q5_1", "q6_k": "q8_0"}  # llama.cpp, src/llama-quant.cpp, tensor_type_fallback


def _any_of(paths: list[Path]) -> str:
    return "^(" + "|".join(path.replace(".", r"\.") for path in paths) + ")$"


PRESETS: dict[str, Callable[[Shapes], Recipe]] = {
    "gptq-int4-g128": _blocks("int4:g128:fp16", "gptq"),
    "gptq-int3-g64": _blocks("int3:g64:asym:fp16", "gptq"),
    "awq-int4-g128": _blocks("int4:g128:asym:fp16", transforms=("awq",)),
    "awq-gptq-int4-g128": _blocks("int4:g128:asym:fp16", "gptq", transforms=("awq",)),
    "hqq-int4-g64": _blocks("int4:g64:asym:fp16", "hqq"),
    "smoothquant-w8a8": _blocks("int8:channel", transforms=("smoothquant",), activation="int8:token"),
    "w8a8": _blocks("int8:channel", activation="int8:token"),
    "fp8": _blocks("fp8_e4m3:channel", activation="fp8_e4m3:token"),
    "int8": _blocks("int8:channel:fp16"),
    "nf4": _blocks("nf4:g64:dq"),
    "mxfp4": _blocks("mxfp4"),
    "nvfp4": _blocks("nvfp4"),
    "q4_k_m": _k_medium("q4_k", "q6_k"),
    "q5_k_m": _k_medium("q5_k", "q6_k"),
}
