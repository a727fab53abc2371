"""The block decoders against gguf-py's values, recorded by scripts/goldens/gguf_blocks.py."""

from __future__ import annotations

import json
import time
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from jquant.core.errors import InputError
from jquant.core.formats import GGML_BLOCKS
from jquant.core.qtensor import QTensor, dequantize, quantize
from jquant.core.scheme import scheme
from jquant.io.ggml_blocks import BLOCK_TYPES, BY_ID, BY_NAME, CHUNK, DECODABLE, decode
from jquant.io.gguf import open_gguf
from jquant.io.native import open_native, write_native

GOLDENS = Path(__file__).parents[1] / "goldens" / "gguf_blocks.npz"
# Root mean square error on normal numbers of the blocks that C encoded, from SPEC 3; the others are rounding alone.
RMSE = {"Q4_0": 0.0863, "Q4_K": 0.0712, "Q6_K": 0.0177, "Q8_0": 0.0054, "F32": 0.0}
FACTS = {block.name.removeprefix("ggml_").upper(): block for block in GGML_BLOCKS.values()}


@pytest.fixture(scope="module")
def goldens():
    with np.load(GOLDENS) as file:
        return dict(file)


def test_the_goldens_cover_every_decoder_and_say_where_they_come_from(goldens):
    assert {name.split(".")[0] for name in goldens if name.endswith(".raw")} == set(DECODABLE)
    origin = json.loads(str(goldens["origin"]))
    assert origin["gguf"] == "0.19.0"


@pytest.mark.parametrize("name", DECODABLE)
def test_bit_equal_to_gguf_py(goldens, name):
    expected = goldens[f"{name}.values"]
    got = decode(BY_NAME[name], goldens[f"{name}.raw"])
    nan = np.isnan(expected)
    assert got.dtype == np.float32
    np.testing.assert_array_equal(np.isnan(got), nan)
    np.testing.assert_array_equal(got[~nan].view(np.uint32), expected[~nan].view(np.uint32))
    assert np.count_nonzero(~nan) > 0.8 * nan.size


@pytest.mark.parametrize("name", RMSE)
def test_encoded_normal_numbers_come_back(goldens, name):
    normal = goldens["normal"]
    back = decode(BY_NAME[name], goldens[f"{name}.raw"])[-normal.size :]
    assert np.sqrt(np.mean((back - normal) ** 2)) == pytest.approx(RMSE[name], rel=0.12)


@pytest.mark.parametrize("name", DECODABLE)
def test_chunks_and_places_do_not_matter(name):
    """Long inputs, which are decoded in chunks, equal their parts; input may lie at any address."""
    block_type = BY_NAME[name]
    count = 2 * CHUNK // block_type.elements + 3
    raw = np.random.default_rng(1).integers(0, 256, 1 + count * block_type.nbytes, dtype=np.uint8)[1:]
    whole = decode(block_type, raw)
    parts = [decode(block_type, part) for part in raw.reshape(count, -1)[[0, count // 2, count - 1]]]
    rows = whole.reshape(count, -1)[[0, count // 2, count - 1]]
    np.testing.assert_array_equal(rows, parts)


def test_out_is_filled_in_place_in_its_own_shape():
    raw = np.arange(8, dtype="<f4").view(np.uint8)
    out = np.empty((2, 4), np.float32)
    assert decode(BY_NAME["F32"], raw, out=out) is out
    np.testing.assert_array_equal(out, np.arange(8, dtype=np.float32).reshape(2, 4))


@pytest.mark.parametrize(
    ("name", "nbytes", "out", "message"),
    [
        ("IQ4_XS", 136, None, "IQ4_XS cannot be decoded; jquant decodes F32"),
        ("Q8_0", 35, None, "35 bytes are no whole number of Q8_0 blocks of 34"),
        ("Q8_0", 34, np.empty(31, np.float32), "out must be C-contiguous float32 of 32 values, got float32 of 31"),
        ("Q8_0", 34, np.empty(32, np.float16), "got float16 of 32"),
        ("Q8_0", 34, np.empty(64, np.float32)[::2], "C-contiguous"),
    ],
)
def test_mistakes_are_named(name, nbytes, out, message):
    with pytest.raises(InputError, match=message):
        decode(BY_NAME[name], np.zeros(nbytes, np.uint8), out=out)


@pytest.mark.parametrize("spec", ["q4_k", "q8_0", "ggml_nvfp4"])
def test_a_packed_tensor_is_a_file_s_bytes_and_a_native_checkpoint_keeps_them(spec, tmp_path):
    """Rows of 500, which no file can hold, only in the native checkpoint."""
    x = jnp.asarray(np.random.default_rng(4).standard_normal((6, 512), np.float32))
    q, ragged = (quantize(each, scheme(spec)) for each in (x, x[:, :500]))
    row = BY_NAME[spec.removeprefix("ggml_").upper()]
    assert q.nbytes * row.elements == x.size * row.nbytes
    np.testing.assert_array_equal(decode(row, np.asarray(q.planes[0]).reshape(-1)).reshape(x.shape), dequantize(q))
    write_native(tmp_path / "saved", {"whole": q, "ragged": ragged}, {})
    opened = open_native(tmp_path / "saved")
    assert {opened.tensors[name].type for name in opened.names} == {spec}
    for name, tensor in (("whole", q), ("ragged", ragged)):
        back = opened.read(name)
        assert isinstance(back, QTensor)
        assert back.scheme == scheme(spec)
        assert opened.tensors[name].nbytes == tensor.nbytes
        np.testing.assert_array_equal(dequantize(back), dequantize(tensor))


def test_the_table_has_no_row_twice():
    assert len(BY_ID) == len(BY_NAME) == len(BLOCK_TYPES)


@pytest.mark.parametrize("name", FACTS)
def test_the_table_and_core_agree_on_sizes(name):
    assert (BY_NAME[name].elements, BY_NAME[name].nbytes) == (FACTS[name].elements, FACTS[name].nbytes)


@pytest.mark.slow
def test_the_demo_decodes_in_half_a_second(demo_gguf):
    """135 million weights on one core, memory touched beforehand: 0.3 s seen; gguf-py takes 1.5 to 2.7 s."""
    file = open_gguf(demo_gguf)
    out = np.zeros(max(info.size for info in file.tensors.values()), np.float32)
    best = np.inf
    for _ in range(3):
        start = time.perf_counter()
        for name, info in file.tensors.items():
            decode(BY_NAME[info.type], file.raw(name), out=out[: info.size])
        best = min(best, time.perf_counter() - start)
    assert best < 1.0  # twice the bar: the machine may be shared
