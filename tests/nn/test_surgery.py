"""Layers are replaced by path, once, and packed layers compute with their decoded weights."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jquant.core.errors import InputError
from jquant.core.scheme import scheme
from jquant.nn.linear import Linear, QuantizedLinear
from jquant.nn.surgery import module_at, named_modules, replace, select
from jquant.ptq.rtn import quantize_layers
from tests.jitted import dequantize, quantize
from tests.tiny_checkpoint import tiny_model


def test_packed_layer_equals_its_decoded_weight() -> None:
    layer = Linear(64, 32, use_bias=True, rngs=nnx.Rngs(0))
    assert layer.bias is not None
    layer.bias.set_value(jnp.arange(32.0))
    q = quantize(layer.weight.get_value(), scheme("int4:g32"))
    x = jax.random.normal(jax.random.key(1), (3, 64))
    packed = QuantizedLinear(q, layer.bias.get_value())
    assert np.allclose(packed(x), x @ dequantize(q).T + jnp.arange(32.0), atol=1e-5)


def test_patterns_choose_layers() -> None:
    model = tiny_model()
    replaced = quantize_layers(model, scheme("int4:g32"), layers=(r"attn\.[qk]_proj$",))
    assert replaced == [f"blocks.{i}.attn.{p}_proj" for i in (0, 1) for p in "kq"]
    assert isinstance(module_at(model, "blocks.1.attn.k_proj"), QuantizedLinear)
    assert isinstance(module_at(model, "blocks.1.attn.v_proj"), Linear)


def test_what_matches_nothing_is_an_error_and_changes_nothing() -> None:
    model = tiny_model()
    with pytest.raises(InputError, match="matches nothing"):
        quantize_layers(model, scheme("int4:g32"), layers=("mlp", "experts"))
    with pytest.raises(InputError, match="no regular expression"):
        select(["a"], ["("])
    with pytest.raises(InputError, match=r"layer blocks\.0\.attn\.k_proj: group size 128"):
        quantize_layers(model, scheme("int4:g128"))
    assert not list(named_modules(model, QuantizedLinear))
    quantize_layers(model, scheme("int4:g32"))
    with pytest.raises(InputError, match="quantized already"):
        quantize_layers(model, scheme("int4:g32"))


def test_weights_that_are_not_finite_are_named() -> None:
    model = tiny_model()
    layer = module_at(model, "blocks.1.mlp.up_proj")
    assert isinstance(layer, Linear)
    layer.weight.set_value(layer.weight.get_value().at[2, 3].set(jnp.nan))
    with pytest.raises(InputError, match=r"blocks\.1\.mlp\.up_proj.*NaN"):
        quantize_layers(model, scheme("int4:g32"))


def test_a_shared_module_is_replaced_for_all_its_paths() -> None:
    class Pair(nnx.Module):
        def __init__(self) -> None:
            self.a = Linear(4, 4, rngs=nnx.Rngs(0))
            self.b = self.a
            self.many = nnx.List([self.a])

    pair, other = Pair(), Linear(4, 4, rngs=nnx.Rngs(1))
    replace(pair, {"b": other})
    assert pair.a is other
    assert pair.b is other
    assert pair.many[0] is other
    with pytest.raises(InputError, match="no module at"):
        module_at(pair, "c")
