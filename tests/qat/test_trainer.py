"""The trainer: any module and loss; microbatches, meshes and kills change nothing; what diverges is named."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jquant import qat
from jquant.core.errors import InputError
from jquant.io.folder_lock import locked_folder
from jquant.qat.batches import RowBatches
from jquant.qat.blowup import culprit
from jquant.qat.config import QATConfig
from jquant.qat.losses import distillation_loss
from jquant.qat.metrics import METRICS, StepRecord
from jquant.qat.trainer import TrainResult, train
from tests.qat.small import Net, arrays, batches, rows, squared_error
from tests.tiny_checkpoint import tiny_model

CONFIG = QATConfig(steps=8, batch=8, learning_rate=1e-2, warmup_steps=2, checkpoint_every=2, weight_decay=0.01)


def _config(**changes: Any) -> QATConfig:
    return QATConfig(**{**CONFIG.as_json(), **changes})


def _run(config: QATConfig, model: Net | None = None, **options: Any) -> tuple[Net, TrainResult, list[StepRecord]]:
    model = Net() if model is None else model
    heard: list[StepRecord] = []
    result = train(model, squared_error, batches(config), config, listen=heard.append, **options)
    return model, result, heard


def _lines(folder: Path) -> list[dict[str, Any]]:
    """The figures of each step, without the pace."""
    lines = [json.loads(line) for line in (folder / METRICS).read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "rows_per_second"} for line in lines]


def test_it_learns_and_everything_moves() -> None:
    before = arrays(Net())
    model, result, heard = _run(_config(steps=60))
    assert [record.step for record in heard] == list(range(1, 61))
    assert result.loss == heard[-1].loss < heard[0].loss / 2
    assert heard[0].parts == {"mse": heard[0].loss}
    moved = [not np.array_equal(*pair) for pair in zip(before, arrays(model), strict=True)]
    assert sum(moved) == len(moved) - 1  # all but the key of the random stream, whose counter moves


def test_frozen_parameters_stay() -> None:
    model, _, _ = _run(_config(frozen=("^first",)))
    np.testing.assert_array_equal(np.asarray(model.first.kernel), np.asarray(Net().first.kernel))
    assert not np.array_equal(np.asarray(model.second.kernel), np.asarray(Net().second.kernel))
    with pytest.raises(InputError, match="'third' matches nothing"):
        _run(_config(frozen=("third",)))


def test_quantization_parameters_have_a_rate_of_their_own() -> None:
    model, _, _ = _run(_config(scale_learning_rate=0.0))
    assert not np.asarray(model.log_scale.get_value()).any()
    model, _, _ = _run(_config(scale_learning_rate=1e-2))
    assert np.asarray(model.log_scale.get_value()).all()


def test_microbatches_give_what_one_batch_gives() -> None:
    def linear_loss(model: Any, batch: Any) -> Any:
        error = jnp.mean((model.second(jnp.tanh(model.first(batch["x"]))) - batch["y"]) ** 2)
        return error, {}

    losses = []
    for changes in ({}, {"batch": 2, "gradient_accumulation": 4}):
        heard: list[StepRecord] = []
        config = _config(**changes)
        train(Net(), linear_loss, batches(config), config, listen=heard.append)
        losses.append([record.loss for record in heard])
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-5)


@pytest.mark.parametrize(
    "mesh", [pytest.param("data=8", marks=pytest.mark.slow), "data=2,fsdp=4", "data=2,fsdp=2,tensor=2"]
)
def test_a_mesh_computes_what_one_device_does(mesh: str) -> None:
    alone, _, heard = _run(_config(steps=4), Net(dropout=0.0))
    spread, _, heard_too = _run(_config(steps=4, mesh=mesh), Net(dropout=0.0))
    np.testing.assert_allclose([r.loss for r in heard_too], [r.loss for r in heard], rtol=1e-5)
    for one, other in zip(arrays(alone), arrays(spread), strict=True):
        # Adam divides a gradient that is nothing but rounding by its own size: those parameters differ most.
        np.testing.assert_allclose(other, one, rtol=1e-3, atol=5e-4)
    if "fsdp" in mesh:
        kernel = spread.first.kernel.get_value()
        assert {shard.data.size for shard in kernel.addressable_shards} == {kernel.size // 4}


@pytest.mark.parametrize("mesh", ["fsdp=4", pytest.param("", marks=pytest.mark.slow)])
def test_a_run_goes_on_on_another_mesh(mesh: str, tmp_path: Path) -> None:
    """States that orbax wrote from eight devices are restored onto four, cut otherwise, and onto one."""

    def stop(record: StepRecord) -> None:
        if record.step == 5:
            raise KeyboardInterrupt

    whole, _, heard = _run(_config(mesh="data=8"), Net(dropout=0.0))
    config = _config(mesh="data=8")
    with pytest.raises(KeyboardInterrupt):
        train(Net(dropout=0.0), squared_error, batches(config), config, folder=tmp_path, listen=stop)
    moved, result, rest = _run(_config(mesh=mesh), Net(dropout=0.0), folder=tmp_path)
    assert result.resumed_from == 4
    np.testing.assert_allclose([r.loss for r in rest], [r.loss for r in heard[4:]], rtol=1e-4)
    for one, other in zip(arrays(whole), arrays(moved), strict=True):
        np.testing.assert_allclose(other, one, rtol=1e-3, atol=1e-3)
    held = {shard.data.shape for shard in moved.first.kernel.get_value().addressable_shards}
    assert held == ({(2, 16)} if mesh else {(8, 16)})


@pytest.mark.slow
def test_a_mesh_distils_as_one_device_does() -> None:
    """A decoder with trained scales of weights and inputs, and running ranges."""
    tokens = np.random.default_rng(0).integers(0, 257, (16, 12)).astype(np.int32)
    recipe = qat.Recipe(
        rules=(
            qat.Rule(layers=("mlp",), scheme="int4:g32", gradient="lsq"),
            qat.Rule(layers=(r"^blocks\.",), scheme="int4:g32:asym", activation="int8:tensor"),
        )
    )
    found = []
    for spec in ("", "data=2,fsdp=4"):
        config = _config(steps=3, learning_rate=1e-3, mesh=spec, weight_decay=0.0)
        model, heard = tiny_model(), []
        qat.prepare(model, recipe, announce=lambda said: None)
        data = RowBatches(tokens, batch=8, seed=0)
        train(model, distillation_loss(hidden_weight=0.1), data, config, teacher=tiny_model(), listen=heard.append)
        found.append((model, [(record.loss, record.parts["hidden"]) for record in heard]))
    (alone, losses), (spread, losses_too) = found
    np.testing.assert_allclose(losses_too, losses, rtol=1e-4)
    for one, other in zip(arrays(alone), arrays(spread), strict=True):
        np.testing.assert_allclose(other, one, rtol=1e-2, atol=5e-3)
    assert spread.blocks[0].mlp.up_proj.weight.get_value().sharding.spec == jax.sharding.PartitionSpec("fsdp", None)


def test_bfloat16_computes_near_float32() -> None:
    _, _, wide = _run(_config(steps=4), Net(dropout=0.0))
    model, _, narrow = _run(_config(steps=4, dtype="bfloat16"), Net(dropout=0.0))
    np.testing.assert_allclose([r.loss for r in narrow], [r.loss for r in wide], rtol=0.05)
    assert [r.loss for r in narrow] != [r.loss for r in wide]
    assert all(array.dtype != jnp.bfloat16 for array in arrays(model))


def test_a_stopped_run_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    whole, _, _ = _run(CONFIG, folder=tmp_path / "whole")

    class Stop(Exception):
        pass

    def stop(record: StepRecord) -> None:
        if record.step == 5:  # behind the state of step 4
            raise Stop

    with pytest.raises(Stop):
        train(Net(), squared_error, batches(CONFIG), CONFIG, folder=tmp_path / "cut", listen=stop)
    assert [line["step"] for line in _lines(tmp_path / "cut")] == [1, 2, 3, 4, 5]
    resumed, result, heard = _run(CONFIG, Net(seed=7), folder=tmp_path / "cut")  # weights come from the state
    assert result.resumed_from == 4
    assert [record.step for record in heard] == [5, 6, 7, 8]
    assert _lines(tmp_path / "cut") == _lines(tmp_path / "whole")
    for one, other in zip(arrays(whole), arrays(resumed), strict=True):
        np.testing.assert_array_equal(one, other)
    again, result, heard = _run(CONFIG, folder=tmp_path / "cut")  # all done: nothing is computed
    assert (result.resumed_from, heard) == (8, [])
    np.testing.assert_array_equal(arrays(again)[0], arrays(whole)[0])


_KILLED = """
import os, pathlib, signal, sys
from jquant.qat.config import QATConfig
from jquant.qat.trainer import train
from tests.qat.small import Net, batches, squared_error
config = QATConfig(steps=8, batch=8, learning_rate=1e-2, warmup_steps=2, checkpoint_every=2, weight_decay=0.01)
folder, when = pathlib.Path(sys.argv[1]), int(sys.argv[2])
left = [when]
def counted(function):
    def call(*arguments, **options):
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments, **options)
    return call
os.replace, os.rename, os.unlink = map(counted, (os.replace, os.rename, os.unlink))
pathlib.Path.replace, pathlib.Path.rename = counted(pathlib.Path.replace), counted(pathlib.Path.rename)
train(Net(), squared_error, batches(config), config, folder=folder, listen=counted(lambda record: None))
"""


@pytest.mark.slow
def test_killed_at_any_point_it_gives_the_same_curve(tmp_path: Path) -> None:
    """Kill −9 at the n-th rename, removal or finished step: each run goes on from what the ones before it left."""

    def run(folder: Path, when: int) -> int:
        call = [sys.executable, "-c", _KILLED, str(folder), str(when)]
        environment = {**os.environ, "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "cache")}
        environment |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2"}
        return subprocess.run(call, env=environment, capture_output=True, check=False, timeout=300).returncode

    assert run(tmp_path / "whole", 0) == 0
    codes = [run(tmp_path / "cut", when) for when in (1, 2, 3, 5, 8, 9)]
    assert codes.count(-signal.SIGKILL) >= 4
    assert run(tmp_path / "cut", 0) == 0
    assert _lines(tmp_path / "cut") == _lines(tmp_path / "whole")


def test_another_run_is_refused_with_the_difference(tmp_path: Path) -> None:
    _run(_config(steps=3), folder=tmp_path, definition={"recipe": {"rules": [{"scheme": "int4:g32"}]}})
    with pytest.raises(InputError, match=r'another recipe.rules.0.scheme \("int4:g32" there, "int3:g32" here\)'):
        _run(_config(steps=3), folder=tmp_path, definition={"recipe": {"rules": [{"scheme": "int3:g32"}]}})
    with pytest.raises(InputError, match=r"another training.learning_rate \(0.01 there, 0.02 here\)"):
        _run(
            _config(steps=3, learning_rate=0.02),
            folder=tmp_path,
            definition={"recipe": {"rules": [{"scheme": "int4:g32"}]}},
        )


def test_it_keeps_the_latest_states_and_the_best(tmp_path: Path) -> None:
    figures = iter([5.0, 1.0, 4.0, 3.0])
    config = _config(checkpoint_every=None, eval_every=2, keep=1, best="score")
    _, result, heard = _run(config, folder=tmp_path, eval_fn=lambda model: {"score": next(figures)})
    assert sorted(int(path.name) for path in (tmp_path / "states").iterdir()) == [4, 8]
    assert result.best_step == 4
    assert result.evaluation == {"score": 3.0}
    assert [record.step for record in heard if record.evaluation] == [2, 4, 6, 8]
    assert _lines(tmp_path)[3]["eval_score"] == 1.0
    with pytest.raises(InputError, match="best is 'other'; the evaluation gives score"):
        _run(_config(best="other"), folder=tmp_path / "other", eval_fn=lambda model: {"score": 1.0})


def test_figures_that_are_asked_for_need_their_source(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="eval_every and best need figures: give eval_fn"):
        _run(_config(eval_every=2))
    with pytest.raises(InputError, match="best is 'score': its state is kept in a folder; give one"):
        _run(_config(best="score"), eval_fn=lambda model: {"score": 1.0})


def test_one_process_at_a_time_in_a_folder(tmp_path: Path) -> None:
    with locked_folder(tmp_path), pytest.raises(InputError, match="another process is at work there"):
        _run(CONFIG, folder=tmp_path)


def test_a_folder_without_a_state_takes_another_run(tmp_path: Path) -> None:
    def stop(record: StepRecord) -> None:
        raise KeyboardInterrupt

    config = _config(checkpoint_every=4)
    with pytest.raises(KeyboardInterrupt):
        train(Net(), squared_error, batches(config), config, folder=tmp_path, listen=stop)
    _, result, _ = _run(_config(learning_rate=2e-2), folder=tmp_path)
    assert result.resumed_from == 0
    assert [line["step"] for line in _lines(tmp_path)] == list(range(1, 9))


def test_any_iterator_with_a_place_is_read() -> None:
    """As grain's own: it has no length, so the config says how many steps."""
    dataset = grain.MapDataset.source(range(40)).seed(1).shuffle().map(lambda i: jax.tree.map(lambda a: a[i], rows()))
    iterator = iter(dataset.repeat(4).batch(8, drop_remainder=True).to_iter_dataset())
    heard: list[StepRecord] = []
    train(Net(), squared_error, iterator, _config(steps=3), listen=heard.append)
    assert [record.step for record in heard] == [1, 2, 3]
    with pytest.raises(InputError, match="the data does not say how long an epoch is: give steps"):
        train(Net(), squared_error, iterator, _config(steps=None))


def test_what_diverges_is_named(tmp_path: Path) -> None:
    def explode(model: Any, batch: Any) -> Any:
        loss, parts = squared_error(model, batch)
        huge = jnp.max(jnp.abs(model.log_scale.get_value())) > 2.5
        return loss + jnp.where(huge, jnp.nan, 0.0) - 1e3 * jnp.sum(model.log_scale.get_value()), parts

    config = _config(steps=20, scale_learning_rate=1.0, max_grad_norm=1e6)
    model = Net()
    model.log_scale.set_value(jnp.full((16,), 0.5))
    with pytest.raises(
        InputError,
        match=r"step 4: loss nan.*; log_scale has grown most.*0.5 at the start; the last good state is that of step 2",
    ):
        train(model, explode, batches(config), config, folder=tmp_path)
    assert all(np.isfinite(array).all() for array in arrays(model))


def test_the_layer_whose_scale_blew_up_is_named() -> None:
    """Scales are kept as logarithms: −0.1 to −1 is a factor of two, not of ten."""
    names: list[str] = ["a.weight", "a.weight_quantizer.log_scale", "b.weight_quantizer.log_scale"]
    start = dict(zip(names, (0.5, 0.1, 5.0), strict=True))
    for now, wanted in (
        ((2.0, 1.0, 5.0), "a.weight has grown most"),
        ((2.0, 1.0, 15.0), "b.weight_quantizer.log_scale has grown most: its largest value is 15, 5 at the start"),
        ((2.0, float("nan"), 15.0), "a.weight_quantizer.log_scale holds a value that is not finite"),
    ):
        assert culprit(names, start, dict(zip(names, now, strict=True)), np.ones(3)).startswith(wanted)


def test_scales_stay_positive_whatever_their_rate() -> None:
    net = Net(dropout=0.0)
    qat.prepare(net, qat.one_rule("int4:channel", layers=("second",), gradient="lsq"), announce=lambda said: None)
    _run(_config(scale_learning_rate=3.0), net)
    scale, _ = net.second.weight_quantizer.parameters()  # type: ignore[attr-defined]
    assert (np.asarray(scale) > 0).all()
    assert (np.asarray(scale) < 1e-3).any() or (np.asarray(scale) > 1e2).any()


def test_data_that_does_not_fit_is_refused() -> None:
    config = _config(steps=None, batch=64)
    with pytest.raises(InputError, match="40 rows of data, and a step takes 64"):
        train(Net(), squared_error, batches(_config()), config)
    with pytest.raises(InputError, match=r"batches of \[8\] rows, a step takes 16"):
        train(Net(), squared_error, batches(_config()), _config(gradient_accumulation=2))


def test_tensorboard_gets_the_same_figures(tmp_path: Path) -> None:
    _run(_config(steps=3, tensorboard=True), folder=tmp_path)
    assert [path.name.startswith("events") for path in (tmp_path / "tensorboard").iterdir()] == [True]
