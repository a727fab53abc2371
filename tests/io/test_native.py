"""Native checkpoints: bit for bit and still packed, whole or not there, and never read as something else."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jquant.core.errors import InputError
from jquant.core.qtensor import QTensor
from jquant.core.scheme import scheme
from jquant.io import native, new_folder
from jquant.io.native import ARRAYS, DESCRIPTION, open_native, write_native
from jquant.models.checkpoint import load_model, open_checkpoint
from jquant.models.save import save
from jquant.nn.protocol import apply
from jquant.ptq.rtn import quantize_layers
from tests.jitted import quantize
from tests.tiny_checkpoint import tiny_model

SCHEMES = (
    "int4:g32",
    "int3:g50",
    "int7:b10x30:asym",
    "int8:tensor",
    "int5:channel:asym:bf16",
    "int2:g16:fp16",
    "fp8_e4m3:channel",
    "fp6_e3m2:g32:e4m3",
    "mxfp4",
    "mxfp4:even",
    "mxint8",
    "nvfp4",
    "nf4:g64:dq",
    "codebook(-1.0/0.0/0.5):g16",
)
WEIGHT = np.random.default_rng(0).standard_normal((2, 24, 160)).astype(np.float32)
_quantize = jax.jit(quantize, static_argnames="scheme")


def _packed(spec: str, *, leading: bool = False) -> QTensor:
    return _quantize(jnp.asarray(WEIGHT if leading else WEIGHT[0]), scheme(spec))


def _same_bits(a: Any, b: Any) -> bool:
    left, right = jax.tree.flatten(a), jax.tree.flatten(b)
    return left[1] == right[1] and all(
        x.dtype == y.dtype and x.shape == y.shape and np.asarray(x).tobytes() == np.asarray(y).tobytes()
        for x, y in zip(left[0], right[0], strict=True)
    )


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A checkpoint of two packed tensors and a plain one."""
    tensors = {"a": _packed("int4:g32"), "b": _packed("mxfp4"), "n": np.arange(5, dtype=np.float32)}
    write_native(tmp_path / "saved", tensors, {"config": {"x": 1}})
    return tmp_path / "saved"


def _edit(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    description = json.loads((folder / DESCRIPTION).read_text())
    change(description)
    (folder / DESCRIPTION).write_text(json.dumps(description))


def _read_all(folder: Path) -> dict[str, Any]:
    opened = open_native(folder)
    return {name: opened.read(name) for name in opened.names}


def _refused(folder: Path, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        _read_all(folder)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


# Round trips ---------------------------------------------------------------------------------------------------------


def test_packed_tensors_come_back_bit_for_bit_and_packed(tmp_path):
    tensors = {f"blocks.0.{spec}": _packed(spec) for spec in SCHEMES}
    tensors |= {f"stack.{spec}": _packed(spec, leading=True) for spec in SCHEMES[:3] + SCHEMES[-4:]}
    write_native(tmp_path / "m", tensors, {})
    found = _read_all(tmp_path / "m")
    assert list(found) == list(tensors)
    for name, tensor in tensors.items():
        assert isinstance(found[name], QTensor), name
        assert _same_bits(found[name], tensor), name
        assert found[name].nbytes == tensor.nbytes


def test_a_file_holds_packed_bytes_and_little_else(tmp_path):
    weight = np.random.default_rng(0).standard_normal((1024, 1024), np.float32)
    q = _quantize(jnp.asarray(weight), scheme("int3:g64:fp16"))
    write_native(tmp_path / "m", {"q": q}, {})
    in_file = sum(file.stat().st_size for file in (tmp_path / "m" / ARRAYS).rglob("*") if file.is_file())
    assert in_file < 1.05 * q.nbytes


@pytest.mark.parametrize("kind", [np.asarray, jnp.asarray])
def test_arrays_of_all_dtypes_come_back(tmp_path, kind):
    names = sorted(native.HELD - ({"float64", "int64", "uint64"} if kind is jnp.asarray else set()))
    values = np.arange(15).reshape(3, 5) % 2
    tensors = {name: kind(values.astype(np.dtype(name))) for name in names}
    tensors |= {"scalar": kind(np.float32(3)), "turned": kind(WEIGHT[0].T), "a/b": kind(WEIGHT[0])}
    write_native(tmp_path / "m", tensors, {})
    for name, found in _read_all(tmp_path / "m").items():
        assert _same_bits(found, tensors[name]), name


def test_bfloat16_origin_and_description_are_kept(tmp_path):
    q = _quantize(jnp.asarray(WEIGHT[0], jnp.bfloat16), scheme("int4:g32"))
    write_native(tmp_path / "m", {"q": q}, {"note": "½ a model", "format": "other"}, extra_files={"t.json": b"{}"})
    opened = open_native(tmp_path / "m")
    assert opened.read("q").dtype == jnp.bfloat16
    assert opened.description["note"] == "½ a model"
    assert (tmp_path / "m" / "t.json").read_bytes() == b"{}"
    assert (tmp_path / "m").stat().st_mode & 0o777 == 0o755


def test_a_tensor_can_be_read_again_and_alone(saved):
    opened = open_native(saved)
    first = opened.read("a")
    assert _same_bits(opened.read("a"), first)
    assert _same_bits(open_native(saved).read("n"), np.arange(5, dtype=np.float32))
    with pytest.raises(InputError, match="no tensor 'c' among its 3"):
        opened.read("c")


@pytest.mark.parametrize("spec", ["int4:g32", "nf4:g32:dq", None])
def test_a_saved_model_gives_equal_logits(tmp_path, spec):
    model, tokens = tiny_model(), jnp.arange(40, dtype=jnp.int32)[None]
    if spec is not None:
        quantize_layers(model, scheme(spec))
    save(model, tmp_path / "m")
    loaded = load_model(tmp_path / "m")
    np.testing.assert_array_equal(np.asarray(apply(loaded, tokens)), np.asarray(apply(model, tokens)))
    for leaf in jax.tree.leaves(loaded.blocks[0].mlp.up_proj.weight.get_value()):
        assert isinstance(leaf, jax.Array), "a numpy array would be copied to the device at every call"


def test_equal_content_has_an_equal_hash_however_often_it_is_saved(tmp_path):
    one, other = tiny_model(), tiny_model()
    quantize_layers(one, scheme("int4:g32"))
    quantize_layers(other, scheme("int4:g32"))
    save(one, tmp_path / "one", provenance={"at": "noon"})
    save(other, tmp_path / "other", provenance={"at": "midnight"})
    assert open_checkpoint(tmp_path / "one").sha256() == open_checkpoint(tmp_path / "other").sha256()
    nudged = tiny_model()
    nudged.head.norm.weight.set_value(nudged.head.norm.weight.get_value().at[3].multiply(1 + 1e-6))
    quantize_layers(nudged, scheme("int4:g32"))
    save(nudged, tmp_path / "nudged")
    assert open_checkpoint(tmp_path / "nudged").sha256() != open_checkpoint(tmp_path / "one").sha256()


# What must not be read -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("written", "claimed"),
    [("int4:g32", "nf4:g32"), ("nf4:g32", "int4:g32"), ("mxfp4", "mxfp4:even"), ("int4:g32", "int4:g32:restricted")],
)
def test_another_scheme_of_equal_shapes_is_refused(tmp_path, written, claimed):
    write_native(tmp_path / "m", {"q": _packed(written)}, {})
    _read_all(tmp_path / "m")
    _edit(tmp_path / "m", lambda description: description["tensors"]["q"].update(scheme=claimed))
    _refused(tmp_path / "m", r"tensor 'q': arrays/ and jquant\.json do not belong together")


def test_another_scheme_of_other_shapes_is_refused(saved):
    _edit(saved, lambda description: description["tensors"]["a"].update(scheme="int4:g64"))
    _refused(saved, r"tensor 'a': array stored.*scale is float32\[24, 5\], jquant\.json calls for float32\[24, 3\]")


def test_swapped_tensors_and_foreign_arrays_are_refused(saved, tmp_path):
    twin = tmp_path / "twin"
    tensors = {"a": _quantize(jnp.asarray(WEIGHT[1]), scheme("int4:g32")), "b": _packed("mxfp4")}
    write_native(twin, {**tensors, "n": np.arange(5, dtype=np.float32)}, {})
    ours = json.loads((saved / DESCRIPTION).read_text())
    _edit(twin, lambda description: description.update(tensors=ours["tensors"]))
    _refused(twin, "tensor 'a': .* do not belong together")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(version=3), "version 3; this jquant reads jquant-native version 2"),
        (lambda d: d.update(format="other"), "format 'other'"),
        (lambda d: d.pop("tensors"), "the table of tensors is missing"),
        (lambda d: d.update(files=[]), "the table of files is missing"),
        (lambda d: d["tensors"].update(a=3), "entry of tensor 'a' is damaged"),
        (lambda d: d["tensors"]["a"].pop("shape"), "entry of tensor 'a' is damaged: no 'shape'"),
        (lambda d: d["tensors"]["a"].update(shape="ab"), "entry of tensor 'a' is damaged"),
        (lambda d: d["tensors"]["a"].update(shape=[24, -160]), "entry of tensor 'a' is damaged"),
        (lambda d: d["tensors"]["a"].update(shape=[24, 10**30]), "tensor 'a'"),
        (lambda d: d["tensors"]["a"].update(dtype="float33"), "entry of tensor 'a' is damaged"),
        (lambda d: d["tensors"]["a"].update(scheme="int99"), "entry of tensor 'a' is damaged.*unknown element"),
        (lambda d: d["tensors"]["a"].update(scheme=4), "entry of tensor 'a' is damaged"),
        (lambda d: d["tensors"]["a"].update(sha256=None), "entry of tensor 'a' is damaged"),
        (lambda d: d["tensors"].update(new=d["tensors"]["a"]), "arrays are missing or damaged"),
    ],
)
def test_a_damaged_table_is_refused(saved, change, message):
    _edit(saved, change)
    _refused(saved, message)


@pytest.mark.parametrize("damage", ["missing", "cut", "empty"])
def test_every_array_file_is_needed_whole(saved, damage, tmp_path):
    files = [file for file in (saved / ARRAYS).rglob("*") if file.is_file()]
    assert len(files) > 3
    for file in files:
        raw = file.read_bytes()
        file.unlink()
        if damage != "missing":
            file.write_bytes(raw[: len(raw) // 2] if damage == "cut" else b"")
        _refused(saved, rf"file '.*{file.name}' (is missing|has \d+ bytes, saved were {len(raw)}): copy")
        file.write_bytes(raw)
    _read_all(saved)


def test_changed_bytes_are_found(saved):
    file = max((file for file in (saved / ARRAYS).rglob("*") if file.is_file()), key=lambda file: file.stat().st_size)
    raw = bytearray(file.read_bytes())
    for place in range(len(raw) // 3, len(raw) // 3 + 64):
        raw[place] ^= 0xFF
    file.write_bytes(raw)
    _refused(saved, "do not belong together|missing or damaged")


@pytest.mark.parametrize("text", ["", "[]", '{"format": "jqu'])
def test_a_damaged_description_is_refused(saved, text):
    (saved / DESCRIPTION).write_text(text)
    with pytest.raises(InputError, match=DESCRIPTION):
        load_model(saved)


def test_scales_that_are_not_finite_are_named(tmp_path):
    model = tiny_model()
    quantize_layers(model, scheme("int4:g32"))
    layer = model.blocks[1].mlp.up_proj
    q = layer.weight.get_value()
    layer.weight.set_value(jax.tree.map(lambda a: a.at[2, 1].set(jnp.nan) if a.dtype == jnp.float32 else a, q))
    save(model, tmp_path / "m")
    with pytest.raises(InputError, match=r"blocks\.1\.mlp\.up_proj\.weight, its scales: nan at \(2, 1\)"):
        load_model(tmp_path / "m")


# Writing -------------------------------------------------------------------------------------------------------------


def test_only_a_new_or_empty_folder_is_written(saved, tmp_path):
    before = sorted(saved.rglob("*"))
    with pytest.raises(InputError, match="exists and is not empty"):
        write_native(saved, {"n": np.ones(2, np.float32)}, {})
    assert sorted(saved.rglob("*")) == before
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="exists and is no folder"):
        write_native(tmp_path / "file", {"n": np.ones(2, np.float32)}, {})
    with pytest.raises(InputError, match="cannot be written"):
        write_native(tmp_path / "file" / "below", {"n": np.ones(2, np.float32)}, {})
    (tmp_path / "empty").mkdir()
    write_native(tmp_path / "empty", {"n": np.ones(2, np.float32)}, {})
    _read_all(tmp_path / "empty")


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (np.ones((0, 4), np.float32), r"tensor 't' of shape \(0, 4\) is empty"),
        (np.ones(4, "<M8[s]"), r"tensor 't' is datetime64\[s\], which a native checkpoint cannot hold"),
    ],
)
def test_what_cannot_be_held_is_refused(tmp_path, tensor, message):
    with pytest.raises(InputError, match=message):
        write_native(tmp_path / "m", {"t": tensor}, {})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("step", ["_save", "_hash", "replacing"])
@pytest.mark.parametrize("error", [RuntimeError("bug"), KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_a_failed_write_leaves_nothing(tmp_path, monkeypatch, step, error):
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(native, step, fail)
    expected = InputError if isinstance(error, OSError) else type(error)
    with pytest.raises(expected, match="No space left on device" if expected is InputError else None):
        write_native(tmp_path / "m", {"n": np.ones(2, np.float32)}, {})
    assert list(tmp_path.iterdir()) == []


_WRITER = """
    import sys, time
    import numpy as np
    from jquant.io import native
    save = native._save
    def slow(folder, tensors):
        save(folder, tensors)
        print("arrays are written", flush=True)
        time.sleep(60)
    native._save = slow
    native.write_native(sys.argv[1], {"n": np.ones(2, np.float32)}, {})
"""


def test_a_killed_writer_leaves_nothing_under_the_name_and_the_next_one_tidies_up(tmp_path):
    target = tmp_path / "m"
    with subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(_WRITER), str(target)], stdout=subprocess.PIPE, text=True
    ) as writer:
        assert writer.stdout is not None
        assert writer.stdout.readline() == "arrays are written\n"
        (left,) = tmp_path.iterdir()
        assert left.name.startswith(".m.")
        new_folder._remove_abandoned(target)
        assert left.exists(), "its writer is at work"
        os.kill(writer.pid, signal.SIGKILL)
    assert [path.name for path in tmp_path.iterdir()] == [left.name]
    write_native(target, {"n": np.ones(2, np.float32)}, {})
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_nothing_is_logged(saved, caplog, capfd):
    with caplog.at_level(logging.WARNING):
        _read_all(saved)
        write_native(saved.parent / "again", {"n": np.ones(2, np.float32)}, {})
    time.sleep(0.05)
    assert not caplog.records
    assert capfd.readouterr() == ("", "")
