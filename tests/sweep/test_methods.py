"""Methods are an axis of a sweep: statistics are gathered once, and cells do not depend on what else a grid holds."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jquant.core.errors import InputError
from jquant.core.scheme import scheme
from jquant.models.decoder import Decoder
from jquant.nn.capture import capture, input_groups
from jquant.nn.protocol import apply
from jquant.nn.w8a8 import W8A8Linear
from jquant.ptq import gptq
from jquant.ptq.activations import InMemory
from jquant.ptq.data import Data
from jquant.ptq.fold import weight_at
from jquant.ptq.recipe import Step
from jquant.ptq.rtn import selected_layers
from jquant.ptq.source import share
from jquant.ptq.transforms import TRANSFORMS, Task
from jquant.sweep import quantize, statistics
from jquant.sweep.config import SweepConfig
from jquant.sweep.grid import Point, grid
from jquant.sweep.quantize import quantize_in_place
from jquant.sweep.results import Cell, Sweep
from jquant.sweep.run import run_sweep
from jquant.sweep.statistics import Wanted, gather, wanted
from jquant.sweep.work import Event
from tests.jitted import dequantize
from tests.ptq.places import model_with_outliers
from tests.tiny_checkpoint import tiny_model, write

METHODS = ("rtn", "rtn-mse", "gptq", "awq+gptq")
SCHEMES = ("int3:g32:asym",)
TOKENS = np.random.default_rng(0).integers(0, 256, (6, 32)).astype(np.int32)
EVERYTHING = Wanted(factors=gptq.GPTQConfig(), grams=True, calls=64, inner=True)
WITHOUT_FACTORS = Wanted(factors=None, grams=True, calls=64, inner=False)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write(tmp_path_factory.mktemp("model") / "tiny"))


def _config(model: str, out: Path, **changes: object) -> SweepConfig:
    base = {"model": model, "schemes": SCHEMES, "out": out, "window": 64, "windows": 3, "report": False}
    fewer = {"calibration_windows": 6, "layers": (r"mlp\.",)}  # programs to compile
    return SweepConfig(**(base | fewer | changes))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def whole(model: str, tmp_path_factory: pytest.TempPathFactory) -> Sweep:
    return run_sweep(_config(model, tmp_path_factory.mktemp("sweep") / "whole", methods=METHODS))


def _numbers(cell: Cell) -> dict[str, Any]:
    return {key: value for key, value in cell.as_json().items() if not key.startswith("seconds")}


def test_methods_of_a_scheme_stand_together_and_better_ones_are_better(whole: Sweep) -> None:
    assert [(cell.scheme, cell.method) for cell in whole.cells] == [(*SCHEMES, method) for method in METHODS]
    kl = {cell.method: cell.kl for cell in whole.cells}
    sqnr = {cell.method: cell.sqnr_db for cell in whole.cells}
    assert max(kl["gptq"], kl["awq+gptq"]) < 0.8 * min(kl["rtn"], kl["rtn-mse"])
    assert sqnr["rtn-mse"] > sqnr["rtn"] > sqnr["gptq"]
    assert abs(sqnr["awq+gptq"] - sqnr["gptq"]) < 3  # scales are undone before weights are compared
    assert len({cell.bits_per_weight for cell in whole.cells}) == 1
    assert whole.manifest["calibration"]["name"] == "pydoc:calibration"


def test_statistics_are_gathered_once_for_all_schemes(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def counting(*arguments: Any, **options: Any) -> Any:
            counts[function.__name__] = counts.get(function.__name__, 0) + 1
            return function(*arguments, **options)

        return counting

    counts: dict[str, int] = {}
    for module, name in ((statistics, "capture"), (statistics, "factorize"), (quantize, "factorize")):
        monkeypatch.setattr(module, name, counted(getattr(module, name)))
    events: list[Event] = []
    schemes = ("int3:g32:asym", "int3:g32")
    run_sweep(_config(model, tmp_path / "out", schemes=schemes, methods=("rtn", "gptq")), events.append)
    blocks, inputs = 2, 2
    assert counts == {"capture": blocks * 6, "factorize": blocks * inputs}  # one call a block and window
    assert len([event for event in events if event.seconds is not None]) == 1
    assert all(event.total == 4 for event in events)


def test_a_method_that_comes_later_completes_the_folder(model: str, whole: Sweep, tmp_path: Path) -> None:
    out = tmp_path / "grown"
    first = run_sweep(_config(model, out))
    assert "calibration" not in first.manifest
    stamps = {file: file.stat().st_mtime_ns for file in (out / "cells").glob("*.json")}
    grown = run_sweep(_config(model, out, methods=("gptq", "rtn-mse", "rtn")))
    assert {file: file.stat().st_mtime_ns for file in stamps} == stamps
    wanted = [next(cell for cell in whole.cells if cell.method == method) for method in ("gptq", "rtn-mse", "rtn")]
    assert list(map(_numbers, grown.cells)) == list(map(_numbers, wanted))


def test_ids_hold_the_calibration_only_where_the_method_learns_from_it(
    model: str, whole: Sweep, tmp_path: Path
) -> None:
    out = tmp_path / "other"
    other = run_sweep(_config(model, out, methods=("rtn", "rtn-mse", "gptq"), calibration_windows=5))
    ids = {cell.method: cell.id for cell in whole.cells}
    same = {cell.method: cell.id == ids[cell.method] for cell in other.cells}
    assert same == {"rtn": True, "rtn-mse": True, "gptq": False}
    # Cells of sweeps from before there were methods are still found.
    definition = {key: value for key, value in other.manifest.items() if key not in ("environment", "calibration")}
    record = {"definition": definition, "scheme": SCHEMES[0], "method": "rtn"}
    canonical = json.dumps(record, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    assert ids["rtn"] == hashlib.sha256(canonical.encode()).hexdigest()[:24]


def test_what_a_method_cannot_do_is_refused_before_anything_is_computed(model: str, tmp_path: Path) -> None:
    for changes, message in (
        ({"schemes": ("int4:g32",), "methods": ("rtn", "hqq")}, "scheme int4:g32 by method hqq: .*use int4:g32:asym"),
        ({"schemes": ("q4_0",), "methods": ("gptq",)}, "scheme q4_0 by method gptq: .*use it with rtn"),
        ({"schemes": ("int4:g32",), "methods": ("magic",)}, "methods: 'magic': .*there are rtn"),
        ({"methods": ("smoothquant",)}, "methods: 'smoothquant': .* as smoothquant@int8:token"),
        ({"methods": ("rtn@int8:tensor",)}, "methods: 'rtn@int8:tensor': .*jquant quantize"),
        ({"methods": ("rtn@",)}, "methods: 'rtn@': "),
        ({"methods": ("rtn@int8:token",)}, "scheme int3:g32:asym by method rtn@int8:token: .*as int8:channel"),
        ({"methods": ("awq",), "layers": (r"blocks.*q_proj",)}, r"by method awq: awq on blocks\.0\..*--layers"),
        ({"methods": ("gptq",), "calibration": "pydoc:evaluation"}, "both on the text pydoc:evaluation"),
        ({"methods": ("gptq",), "calibration_windows": 10**5}, "give a longer text, or --calibration-windows"),
        ({"methods": ()}, "methods: none given"),
        ({"calibration_windows": 0}, "calibration-windows 0"),
    ):
        with pytest.raises(InputError, match=message):
            run_sweep(_config(model, tmp_path / "out", **changes))
        assert not (tmp_path / "out").exists()
    assert list(map(str, grid(("int4:g32",), methods=("awq+rtn", "awq", "rtn")))) == ["int4:g32 awq", "int4:g32"]


def _captured(model: Decoder) -> list[dict[str, np.ndarray]]:
    """What every layer of every block reads, [rows, in], by plain runs of the whole model."""
    rows: list[dict[str, list[np.ndarray]]] = [{} for _ in model.blocks]
    for window in TOKENS:
        x = apply(model.embed, jnp.asarray(window[None]))
        for seen, block, context in zip(rows, model.blocks, model.contexts(len(window)), strict=True):
            paths = tuple(path.removeprefix("blocks.0.") for path in selected_layers(model, (r"^blocks\.0\.",)))
            for path, calls in capture(block, paths, (x, context)).items():
                seen.setdefault(path, []).append(np.asarray(calls[0][0], np.float64)[0])
            x = apply(block, x, context)
    return [{path: np.concatenate(pieces) for path, pieces in seen.items()} for seen in rows]


def test_statistics_are_those_of_the_float_model() -> None:
    model = tiny_model()
    paths = (
        [*selected_layers(model), "head.lm_head"] if hasattr(model.head, "lm_head") else list(selected_layers(model))
    )
    found = gather(model, paths, TOKENS, batch=4, wanted=EVERYTHING)
    for index, inputs in enumerate(_captured(model)):
        for path, x in inputs.items():
            known = found.inputs[f"blocks.{index}.{path}"]
            assert known.gram is not None
            wanted_gram = 2 / len(x) * x.T @ x
            np.testing.assert_allclose(known.gram.matrix, wanted_gram, rtol=1e-3, atol=1e-5 * np.abs(wanted_gram).max())
            assert known.absmean is not None
            np.testing.assert_allclose(known.absmean, np.abs(x).mean(0), rtol=1e-4)
        assert found.inputs[f"blocks.{index}.attn.q_proj"] is found.inputs[f"blocks.{index}.attn.v_proj"]
        assert len(found.calls[f"blocks.{index}.attn"]) == 1  # of four windows in a batch: more than 64 tokens


def test_what_else_is_kept_moves_no_bit() -> None:
    model = tiny_model()
    paths = list(selected_layers(model))
    only = Wanted(factors=gptq.GPTQConfig(), grams=False, calls=0, inner=False)
    ours, theirs = (gather(model, paths, TOKENS, batch=2, wanted=each) for each in (only, EVERYTHING))
    for path in paths:
        jax.tree.map(np.testing.assert_array_equal, ours.inputs[path].factor, theirs.inputs[path].factor)
        assert ours.inputs[path].gram is None
    assert not ours.calls
    assert wanted(grid(("int4:g32",), methods=("rtn", "gptq"))) == only
    assert wanted(grid(("int4:g32",), methods=("awq",))) == Wanted(factors=None, grams=True, calls=1024, inner=False)
    smoothed = wanted(grid(("int8:channel",), methods=("smoothquant@int8:token",)))
    assert smoothed == Wanted(factors=None, grams=False, calls=1024, inner=True)
    assert wanted(grid(("int4:g32",))) is None


@pytest.mark.parametrize(
    ("method", "spec", "activation"), [("awq", "int3:g32:asym", None), ("smoothquant", "int8:channel", "int8:token")]
)
def test_blocks_are_rewritten_as_the_pipeline_does_it(method: str, spec: str, activation: str | None) -> None:
    """The first block, whose inputs are the same in both."""
    model = model_with_outliers()
    paths = list(selected_layers(model, (r"^blocks\.0\.mlp\.",)))
    found = gather(model, paths, TOKENS, batch=1, wanted=Wanted(factors=None, grams=True, calls=1024, inner=True))
    inside = [path.removeprefix("blocks.0.") for path in paths]
    ours, theirs = share(model.blocks[0]), share(model.blocks[0])
    context = model.contexts(TOKENS.shape[1])[0]
    data = Data(
        count=len(TOKENS),
        arguments=lambda batch: (apply(model.embed, jnp.asarray(TOKENS[batch : batch + 1])), context),
        mask=lambda batch: None,
        store=InMemory(),
    )
    places = [place for place in model.equivalences() if set(place.consumers) <= set(inside)]
    config = TRANSFORMS[method].config
    TRANSFORMS[method].apply(Task(theirs, places, dict.fromkeys(inside, (spec, activation)), inside, data, ""), config)
    known = {path: found.inputs[f"blocks.0.{path}"] for path in inside}
    calls = {path.removeprefix("blocks.0."): each for path, each in found.calls.items()}
    (point,) = grid((spec,), methods=(method if activation is None else f"{method}@{activation}",))
    now, scales = quantize._rewrite(ours, places, point, known, calls, Step(method))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), *map(nnx.state, (ours, theirs)))
    groups = input_groups(ours, inside, (apply(model.embed, jnp.asarray(TOKENS[:1])), context))
    assert all(len({id(now[path].gram) for path in group}) == 1 for group in groups)  # one factor serves all
    assert set(scales) == set(inside)


def test_layers_that_quantize_their_inputs_lose_less_where_they_are_smoothed() -> None:
    floats = model_with_outliers()
    paths = list(selected_layers(floats))
    points = grid(
        ("int8:channel",), methods=("rtn@int8:token", "smoothquant@int8:token", "smoothquant+gptq@int8:token")
    )
    needs = wanted(points)
    assert needs is not None
    assert needs.grams
    found = gather(floats, paths, TOKENS, batch=1, wanted=needs)

    def run(model: Decoder) -> np.ndarray:
        x = apply(model.embed, jnp.asarray(TOKENS))
        for block, context in zip(model.blocks, model.contexts(TOKENS.shape[1]), strict=True):
            x = apply(block, x, context)
        return np.asarray(x)

    expected, lost = run(floats), []
    for point in points:
        model = share(floats)
        assert isinstance(model, Decoder)
        sums = quantize_in_place(model, paths, point, found if point.needs_data else None)
        assert len(sums) == len(paths)
        assert isinstance(model.blocks[1].mlp.up_proj, W8A8Linear)
        lost.append(np.linalg.norm(run(model) - expected) / np.linalg.norm(expected))
    assert max(lost[1:]) < 0.8 * lost[0]
    np.testing.assert_array_equal(run(floats), expected)


def test_experts_are_quantized_each_by_its_own_data() -> None:
    floats = model_with_outliers(num_experts=3, experts_per_token=2)
    path, spec = "blocks.0.mlp.down_proj", scheme("int4:g32")
    found = gather(floats, [path], TOKENS, batch=1, wanted=EVERYTHING)
    model = share(floats)
    assert isinstance(model, Decoder)
    quantize_in_place(model, [path], Point(spec, "gptq"), found)
    gram, weight, solved = found.inputs[path].gram, weight_at(floats, path), weight_at(model, path)
    assert gram is not None
    for expert in range(3):
        own = jax.tree.map(lambda each, at=expert: jnp.asarray(each[at]), gram)
        q = gptq.solve(weight[expert], own, spec).qtensor
        np.testing.assert_allclose(solved[expert], dequantize(q), rtol=1e-4)
