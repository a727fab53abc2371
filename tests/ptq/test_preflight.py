"""What a run is said to take."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import pytest

from jquant.core.errors import InputError
from jquant.core.qtensor import quantize
from jquant.core.scheme import scheme
from jquant.nn.protocol import Equivalence
from jquant.ptq import awq, preflight, smoothquant
from jquant.ptq.cost import Cost, Load
from jquant.ptq.preflight import Estimate, estimate
from jquant.ptq.recipe import Rule, Step, one_rule

SHAPES = {"embed": (1000, 64), "blocks.0.up": (256, 64), "blocks.0.down": (64, 256), "blocks.1.up": (256, 64)}
RULE = Rule(layers=("blocks",), scheme="int4:g32", method=Step("gptq"))
RULES = {path: RULE for path in SHAPES if path.startswith("blocks.")}
LOAD = Load(windows=8, window=512)
# A block of a decoder, q_proj and the like reading one input.
BLOCK = {f"blocks.0.attn.{name}_proj": (64, 64) for name in "qkvo"}
BLOCK |= {"blocks.0.mlp.gate_proj": (256, 64), "blocks.0.mlp.up_proj": (256, 64), "blocks.0.mlp.down_proj": (64, 256)}
PLACES = (
    Equivalence("attn_norm", ("attn.q_proj", "attn.k_proj", "attn.v_proj"), (), "attn"),
    Equivalence("mlp_norm", ("mlp.gate_proj", "mlp.up_proj"), (), "mlp"),
    Equivalence("mlp.up_proj", ("mlp.down_proj",), (), "mlp.down_proj"),
)


def _of(method: str, spec: str, **options: Any) -> Estimate:
    rules = dict.fromkeys(BLOCK, one_rule(method, spec).rules[0])
    return estimate(rules, BLOCK, load=LOAD, places=PLACES, **options)


def test_memory_holds_two_blocks_and_the_embedding() -> None:
    found = estimate(RULES, SHAPES, load=LOAD)
    assert found.weight_bytes == 4 * (2 * 2 * 64 * 256 + 1000 * 64)
    assert found.activation_bytes == 4 * 4096 * (2 * 64 + 64 + 256)
    assert found.statistic_bytes > 1.5 * 4 * 256**2
    half = estimate(RULES, SHAPES, load=LOAD, itemsize=2)
    assert (half.weight_bytes, half.activation_bytes) == (found.weight_bytes / 2, found.activation_bytes / 2)
    assert half.statistic_bytes == found.statistic_bytes  # float32 whatever the model is
    spilled = estimate(RULES, SHAPES, load=LOAD, spill=True)
    assert spilled.needed_bytes == found.needed_bytes - found.activation_bytes
    assert spilled.disk_bytes == found.disk_bytes + found.activation_bytes


def test_layers_that_read_the_same_input_keep_it_once() -> None:
    assert _of("gptq", "int4:g32").activation_bytes == 4 * 4096 * (2 * 64 + 3 * 64 + 256)
    # Files are one a layer.
    assert _of("gptq", "int4:g32", spill=True).spilled_bytes == 4 * 4096 * (2 * 64 + 6 * 64 + 256)


def test_what_needs_no_data_keeps_no_activations() -> None:
    rules = dict.fromkeys(RULES, Rule(layers=("blocks",), scheme="int4:g32"))
    found = estimate(rules, SHAPES, load=None)
    assert (found.activation_bytes, found.operations) == (0, 0)
    assert found.statistic_bytes == 6 * 4 * 64 * 256  # no Gram matrix, nor a factor of it
    tight = dataclasses.replace(found, available_bytes=found.needed_bytes)
    with pytest.raises(InputError, match=r"are free: free some, or spread the work over devices \(--mesh\)"):
        tight.check(Path("q"))
    assert estimate(rules, SHAPES, load=LOAD).activation_bytes == 0
    assert estimate(RULES, SHAPES, load=LOAD).operations > 0


def test_operations_of_one_layer_are_those_of_the_pass_the_gram_matrix_the_solver_and_the_report() -> None:
    found = estimate({"blocks.0.up": RULE}, {"blocks.0.up": (256, 64)}, load=LOAD)
    passes = 4096 * (2 * 256 * 64 + 1.5 * 64**2)
    assert found.operations == passes + 64**3 + 2.5 * 2 * 256 * 64**2
    wide = estimate({"blocks.0.up": RULE}, {"blocks.0.up": (256, 64)}, load=Load(windows=8, window=512, attention=64))
    assert wide.operations == found.operations + 4096 * 4 * 512 * 64
    experts = {"blocks.0.up": (4, 256, 64)}
    two = estimate(dict.fromkeys(experts, RULE), experts, load=Load(windows=8, window=512, experts=2))
    assert two.operations == 4096 * (2 * 2 * 256 * 64 + 1.5 * 2 * 64**2) + 4 * (64**3 + 2.5 * 2 * 256 * 64**2)


def test_a_transform_costs_another_pass_and_its_search() -> None:
    """Of AWQ 21 candidates a place on 1,024 tokens, or 6 with GPTQ; of SmoothQuant 12."""
    plain, searched = _of("rtn@int8:tensor", "int8:channel"), _of("awq", "int4:g32")
    passes = 4096 * (2 * sum(rows * columns for rows, columns in BLOCK.values()) + 1.5 * (3 * 64**2 + 256**2))
    report = 3 * 2 * sum(rows * columns**2 for rows, columns in BLOCK.values())
    assert plain.operations == passes + report
    trials = 22 * 1024 * 2 * (4 * 64 * 64 + 3 * 64 * 256) + 21 * 2 * 64 * 256**2
    clipped = 10 * 2 * 32 * (2 * 64 * 64 + 3 * 64 * 256)  # not q and k
    assert searched.operations == 2 * passes + report + trials + clipped
    smooth = _of("smoothquant@int8:token", "int8:channel")
    assert smooth.operations == 2 * passes + report + 13 * 1024 * 2 * (4 * 64 * 64 + 4 * 64 * 256)


def _search(**options: Any) -> Cost:
    from jquant.ptq.trial import Outline

    shapes = {path.removeprefix("blocks.0."): shape for path, shape in BLOCK.items()}
    rounded = shapes if options.pop("rounded", True) else {}
    outline = Outline(PLACES, shapes, dict.fromkeys(shapes, scheme("int4:g32")), rounded, LOAD)
    return awq.cost(outline, awq.AWQConfig(**options))


@pytest.mark.parametrize("option", ["grid", "clip_grid", "search_tokens"])
def test_searches_are_counted_by_their_own_settings(option: str) -> None:
    default = getattr(awq.AWQConfig(), option)
    least, more = (_search(**{option: factor * default}) for factor in (1, 2))
    assert more.operations > 1.2 * least.operations or option == "clip_grid"
    assert more.roundings > least.roundings or option == "search_tokens"
    assert _search(rounded=False).operations < _search(rounded=False, solved_grid=10).operations


def test_alpha_that_is_given_is_not_searched() -> None:
    from jquant.ptq.trial import Outline

    shapes = {path.removeprefix("blocks.0."): shape for path, shape in BLOCK.items()}
    outline = Outline(PLACES, shapes, dict.fromkeys(shapes, scheme("int8:channel")), shapes, LOAD)
    searched, given, norms = (
        smoothquant.cost(outline, smoothquant.SmoothQuantConfig(**options)).operations  # type: ignore[arg-type]
        for options in ({"alpha": "search"}, {"alpha": 0.5}, {"alpha": 0.5, "places": "norms"})
    )
    assert searched / given == 13 / 3  # 11 values of α and none, or one and none; and the float output
    assert norms < given


@pytest.mark.parametrize(
    ("method", "spec", "times"), [("rtn-mse", "int4:g32", 10), ("hqq", "int4:g32:asym", 50), ("rtn", "q4_k", 5)]
)
def test_searches_on_weights_take_many_times_what_rounding_does(method: str, spec: str, times: int) -> None:
    shapes = {"blocks.0.up": (4096, 4096)}
    seconds = [
        estimate(dict.fromkeys(shapes, one_rule(*each).rules[0]), shapes, load=None).seconds
        - 4 * 4096**2 / preflight._BYTES_A_SECOND
        for each in (("rtn", "int4:g32"), (method, spec))
    ]
    assert seconds[1] > times / 2 * seconds[0]  # rates vary from one measurement to the next


@pytest.mark.parametrize("spec", ["int4:g32", "int4:g32:asym:fp16", "nf4:g64:dq", "nvfp4", "q4_k"])
def test_disk_takes_packed_weights_and_the_rest_as_it_is(spec: str) -> None:
    shapes = {**SHAPES, "blocks.0.down": (64, 512)}
    rules = {path: Rule(layers=(path,), scheme=spec) for path in shapes if path != "embed"}
    found = estimate(rules, shapes, load=None, itemsize=2)
    packed = [quantize(jax.numpy.ones(shapes[path]), scheme(spec)).nbytes for path in rules]
    assert found.disk_bytes == sum(packed) + 2 * 1000 * 64


def test_a_run_that_goes_on_writes_what_is_left() -> None:
    whole, rest = (estimate(RULES, SHAPES, load=LOAD, finished=finished) for finished in (0, 1))
    assert 0 < rest.operations < whole.operations
    packed = 2 * quantize(jax.numpy.ones((256, 64)), scheme("int4:g32")).nbytes
    assert whole.disk_bytes - rest.disk_bytes == packed + 2 * 4096 * 64 * 4  # the block, and states that are there


def test_a_disk_that_is_too_full_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "_available", lambda devices: None)
    target = tmp_path / "not" / "there" / "q"
    asked: list[Path] = []

    def usage(path: Path) -> Any:
        asked.append(Path(path))
        return type("usage", (), {"free": 2_000_000})

    monkeypatch.setattr(preflight.shutil, "disk_usage", usage)
    fits, spilled = (
        estimate(RULES, SHAPES, load=Load(windows=1, window=64), target=target),
        estimate(RULES, SHAPES, load=LOAD, target=target, spill=True),
    )
    assert asked == [tmp_path, tmp_path]
    fits.check(target)
    with pytest.raises(InputError, match=r"q: the run writes 10\.8 MB, 7\.34 MB of them activations, 2 MB are free"):
        spilled.check(target)
    assert "disk 10.8 MB, 7.34 MB of them activations" in str(spilled)
