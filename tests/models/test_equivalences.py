"""Every family's logits stay as they are when channels are rescaled wherever its config says that they can be."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jquant.calib import gram
from jquant.core.errors import InputError
from jquant.core.scheme import scheme
from jquant.models.checkpoint import load_model
from jquant.models.decoder import Decoder
from jquant.nn.linear import ExpertLinear, Linear
from jquant.nn.protocol import apply
from jquant.nn.surgery import module_at, named_modules
from jquant.ptq.fold import fold, fold_gram, weight_at
from jquant.ptq.rtn import quantize_layers
from tests.tiny_checkpoint import CONFIG, tiny_model

GOLDENS = Path(__file__).parents[1] / "goldens"
FAMILIES = ["llama_a", *sorted(folder.parent.name for folder in GOLDENS.glob("family_*/golden.npz"))]
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 60, (2, 30)), jnp.int32)

OF_INPUTS = ["attn_norm", "mlp_norm"]
PLACES = {  # beyond the norms'; families not named have up → down
    "family_gpt2": ["attn.v_proj"],  # gelu scales nothing
    "family_opt": ["attn.v_proj", "mlp.up_proj"],
}


def _logits(model: Decoder) -> np.ndarray:
    return np.asarray(apply(model, TOKENS))


def _rescale(model: Decoder, seed: int) -> None:
    """Scales between 1/8 and 8 at every place of every block."""
    rng = np.random.default_rng(seed)
    for block in model.blocks:
        for place in model.equivalences():
            weight = weight_at(block, place.producer)
            shape = weight.shape if weight.ndim == 1 else weight.shape[:-1]
            fold(block, place, jnp.asarray(np.exp2(rng.uniform(-3, 3, shape)), jnp.float32))


def _biased(model: Decoder) -> Decoder:
    """Biases that are zero in a fresh model would hide that they are not rescaled."""
    rng = np.random.default_rng(7)
    graphdef, state = nnx.split(model)

    def some(array: jax.Array) -> jax.Array:
        noise = jnp.asarray(rng.uniform(0.1, 0.5, array.shape), array.dtype)
        return array + noise if array.ndim == 1 else array

    return nnx.merge(graphdef, jax.tree.map(some, state))


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_stay(family: str) -> None:
    model = _biased(load_model(GOLDENS / family))
    before = _logits(model)
    _rescale(model, 0)
    found = [place.producer for place in model.equivalences()]
    assert sorted(found) == sorted(OF_INPUTS + PLACES.get(family, ["mlp.up_proj"]))
    np.testing.assert_allclose(_logits(model), before, rtol=0, atol=1e-4 * np.abs(before).max())


@pytest.mark.parametrize(
    ("changes", "places"),
    [
        ({"num_kv_heads": 4}, ["attn.v_proj", "mlp.up_proj"]),
        ({"num_kv_heads": 4, "qkv_bias": True, "output_bias": True, "mlp_bias": True}, ["attn.v_proj", "mlp.up_proj"]),
        ({"norm": "layer", "positions": "learned", "gated": False, "activation": "silu", "mlp_bias": True}, []),
        ({"num_experts": 3, "experts_per_token": 2, "post_norms": True}, ["mlp.up_proj"]),
        ({"norm": "layer", "gated": False, "activation": "relu", "mlp_bias": True}, ["mlp.up_proj"]),
    ],
)
def test_what_no_golden_combines(changes: dict, places: list[str]) -> None:
    model = _biased(Decoder(dataclasses.replace(CONFIG, **changes), rngs=nnx.Rngs(0)))
    before = _logits(model)
    _rescale(model, 1)
    assert sorted(place.producer for place in model.equivalences()) == sorted(OF_INPUTS + places)
    np.testing.assert_allclose(_logits(model), before, rtol=0, atol=1e-4 * np.abs(before).max())


@pytest.mark.parametrize("family", FAMILIES)
def test_every_linear_layer_of_a_block_reads_at_one_place_at_most(family: str) -> None:
    model = load_model(GOLDENS / family)
    layers = [path for path, _ in named_modules(model.blocks[0], (Linear, ExpertLinear))]
    places = model.equivalences()
    reading = [path for place in places for path in place.consumers]
    assert len(set(reading)) == len(reading)
    assert set(reading) <= set(layers)
    for place in places:
        module_at(model.blocks[0], place.parent)
        assert all(path == place.parent or path.startswith(f"{place.parent}.") for path in place.consumers)
        assert place.parent in place.consumers or not place.parent.endswith("_proj")


def test_the_gram_matrix_follows() -> None:
    x = np.random.default_rng(0).standard_normal((50, 6)).astype(np.float32)
    scales = np.linspace(0.2, 3, 6).astype(np.float32)
    before = gram.finalize(gram.update(gram.init(6), jnp.asarray(x)))
    after = gram.finalize(gram.update(gram.init(6), jnp.asarray(x / scales)))
    np.testing.assert_allclose(fold_gram(before, jnp.asarray(scales)).matrix, after.matrix, rtol=1e-4, atol=1e-4)


def test_bad_scales_change_nothing() -> None:
    model = tiny_model()
    place, block = model.equivalences()[0], model.blocks[0]
    before = _logits(model)
    for scales, message in [
        (jnp.ones(63), r"\(63,\) for attn_norm: they must be \(64,\)"),
        (jnp.ones(64).at[3].set(0), "positive and finite"),
        (jnp.ones(64).at[3].set(jnp.nan), "positive and finite"),
    ]:
        with pytest.raises(InputError, match=message):
            fold(block, place, scales)
    quantize_layers(model, scheme("int8:channel"), layers=(r"v_proj$",))
    with pytest.raises(InputError, match=r"attn\.v_proj: it has no float weight"):
        fold(block, place, jnp.full(64, 2.0))
    quantized = tiny_model()
    quantize_layers(quantized, scheme("int8:channel"), layers=(r"v_proj$",))
    np.testing.assert_array_equal(_logits(model), _logits(quantized))
    assert not np.array_equal(before, _logits(model))
