"""ggml's block types against gguf-py and C ggml, as scripts/goldens/gguf_blocks.py recorded them."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jquant.core.errors import InputError
from jquant.core.formats import GGML_BLOCKS
from jquant.core.ggml_decode import PARTS
from jquant.core.ggml_encode import EXACT
from jquant.core.ggml_rows import decode_rows
from jquant.core.ggml_search import SEARCHED
from jquant.core.qtensor import QTensor, dequantize, quantize
from jquant.core.scheme import scheme, with_group

FOLDER = Path(__file__).parents[1] / "goldens"
BLOCKS = np.load(FOLDER / "gguf_blocks.npz")
ENCODED = np.load(FOLDER / "gguf_encoded.npz")
META = json.loads(str(ENCODED["meta"]))
RMSE: dict[str, dict[str, list[float]]] = META["rmse"]  # [plain, with importance] of C
ODD: dict[str, list[float]] = {name.lower(): errors for name, errors in META["odd"].items()}  # of C, plain, by rows
IMPORTANCE = jnp.asarray(ENCODED["importance"])
_quantize = jax.jit(quantize, static_argnames="scheme")


def _ggml(name: str) -> str:
    return name.removeprefix("ggml_").upper()


def test_every_type_has_a_decoder_an_encoder_and_goldens() -> None:
    assert set(GGML_BLOCKS) == set(PARTS) == {*EXACT, *SEARCHED}
    assert {_ggml(name) for name in SEARCHED} == set(RMSE)
    assert set(SEARCHED) == {name for name, block in GGML_BLOCKS.items() if block.takes_importance}


@pytest.mark.parametrize("name", GGML_BLOCKS)
def test_decodes_under_jit_bit_for_bit(name: str) -> None:
    """numpy's half of the same decoders is in tests/io/test_ggml_blocks.py. XLA flushes subnormal values."""
    block, expected = GGML_BLOCKS[name], BLOCKS[f"{_ggml(name)}.values"]
    raw = jnp.asarray(BLOCKS[f"{_ggml(name)}.raw"].reshape(2, -1))
    got = np.asarray(decode_rows(raw, block, expected.size // 2)).reshape(-1)
    subnormal = np.abs(expected) < np.finfo(np.float32).tiny
    assert np.array_equal(got[~subnormal], expected[~subnormal], equal_nan=True)
    assert np.all(got[subnormal] == 0)
    assert np.mean(subnormal & (expected != 0)) < 0.03


@pytest.mark.parametrize("name", EXACT)
def test_closed_forms_are_encoded_bit_for_bit(name: str) -> None:
    for key in ("gaussian", "laplace", "real", "odd"):
        q = _quantize(jnp.asarray(ENCODED[key], jnp.float32), scheme=scheme(name))
        assert np.array_equal(q.planes[0], ENCODED[f"{_ggml(name)}.{key}"]), key
        _check_scales(q)


@pytest.mark.parametrize("name", ODD)
def test_searched_types_err_no_more_than_c(name: str) -> None:
    """Root mean square errors; of the odd rows (constants, offsets, outliers, tiny numbers, sparse ones) one by one."""
    for key in ("gaussian", "laplace", "real"):
        x = ENCODED[key].astype(np.float32)
        q = _quantize(jnp.asarray(x), scheme=scheme(name))
        ours = np.sqrt(np.mean((np.asarray(dequantize(q), np.float64) - x) ** 2))
        assert 0 < ours <= RMSE[_ggml(name)][key][0], (key, ours / RMSE[_ggml(name)][key][0])
        _check_scales(q)
    x = ENCODED["odd"].astype(np.float32)
    back = np.asarray(dequantize(_quantize(jnp.asarray(x), scheme=scheme(name))), np.float64)
    rows = np.sqrt(np.mean((back - x) ** 2, axis=-1))
    assert np.all(rows <= 1.02 * np.asarray(ODD[name]) + 1e-6 * np.abs(x).max(-1)), [*zip(rows, ODD[name], strict=True)]


@pytest.mark.parametrize("name", SEARCHED)
def test_under_an_importance_vector_the_weighted_error_is_no_more_than_c_s(name: str) -> None:
    for key in ("gaussian", "laplace", "real"):
        x = ENCODED[key].astype(np.float32)
        q = _quantize(jnp.asarray(x), scheme=scheme(name), importance=IMPORTANCE)
        squared = (np.asarray(dequantize(q), np.float64) - x) ** 2
        ours = np.sqrt(np.average(squared, weights=np.broadcast_to(np.asarray(IMPORTANCE), x.shape)))
        assert 0 < ours <= RMSE[_ggml(name)][key][1], (key, ours / RMSE[_ggml(name)][key][1])


def _check_scales(q: QTensor) -> None:
    """They are the floats in the blocks, so that a loader sees one that is not finite."""
    scales = np.asarray(q.scales())
    assert scales.shape[0] == q.shape[0]
    assert np.all(np.isfinite(scales))
    assert np.any(scales != 0)


def test_importance_moves_the_error_to_where_it_matters_less() -> None:
    x = jnp.asarray(ENCODED["gaussian"], jnp.float32)
    half = jnp.where(jnp.arange(x.shape[1]) % 2 == 0, 100.0, 0.01)
    plain, weighted, alike = (
        np.asarray(dequantize(_quantize(x, scheme=scheme("q3_k"), importance=weights)))
        for weights in (None, half, jnp.full(x.shape[1], 2.0))
    )
    assert np.mean((weighted - x)[:, ::2] ** 2) < 0.9 * np.mean((plain - x)[:, ::2] ** 2)
    assert np.array_equal(alike, plain)


@pytest.mark.parametrize("name", ["q4_k", "q8_0", "ggml_nvfp4"])
def test_a_row_that_is_no_whole_number_of_blocks_is_padded(name: str) -> None:
    x = jnp.asarray(ENCODED["gaussian"][:, :300], jnp.float32)
    q = _quantize(x, scheme=scheme(name))
    padded = _quantize(jnp.pad(x, ((0, 0), (0, 212))), scheme=scheme(name))
    assert q.shape == x.shape
    assert np.array_equal(q.planes[0], padded.planes[0][:, : q.planes[0].shape[1]])
    assert np.array_equal(dequantize(q), dequantize(padded)[:, :300])


@pytest.mark.usefixtures("annotations_unchecked")
def test_what_block_types_refuse() -> None:
    x, q4_0 = jnp.ones((4, 256)), scheme("q4_0")
    q = quantize(x, q4_0)
    assert q.zero_points() is None
    for call, message in (
        (q.codes, "q4_0 stores whole blocks"),
        (partial(q4_0.element.round, x), "q4_0 stores whole blocks"),
        (partial(quantize, x, q4_0, scale=x[:, :1]), "finds the scales inside its blocks itself"),
        (partial(quantize, x, scheme("q8_0"), importance=x[0]), "q8_0 takes no importance"),
        (partial(quantize, x, scheme("int4:g32"), importance=x[0]), "int4:g32 takes no importance"),
        (partial(quantize, x, q4_0, importance=x[0, :8]), r"importance of shape \(8,\) for rows of 256"),
        (partial(with_group, q4_0, 64), "q4_0 fixes its blocks and scales"),
    ):
        with pytest.raises(InputError, match=message):
            call()
