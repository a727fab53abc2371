"""The product with a packed weight, against that with the decoded one; and the assembly that decodes, run here."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jquant.core.errors import InputError
from jquant.core.formats import ELEMENTS, Element
from jquant.core.qtensor import dequantize, quantize
from jquant.core.scheme import scheme
from jquant.kernels import dispatch
from jquant.kernels.levels import assembly_of, known, levels
from jquant.kernels.packed_matmul import Tiling, fits, packed_matmul, tiling_of
from jquant.nn.linear import Linear

FITTING = (
    *("int4:g128", "int8:channel", "nf4:g64", "int4:g128:asym", "fp8_e4m3:channel", "mxfp4", "int4:g32:asym", "nvfp4"),
    *("int4:channel:asym", "int4:g128:bf16", "int2:g64", "nf4:g64:dq", "fp8_e5m2:channel", "mxfp8_e4m3"),
)


@pytest.mark.parametrize(
    ("spec", "batch"),
    [
        *((spec, 1) for spec in FITTING),
        *((spec, 5) for spec in (*FITTING[:8], "mxfp8_e4m3", "int8:g64:asym")),
        *(("int8:g16", 16), ("fp8_e4m3:g64", 16), ("int4:g128:asym", 70), ("mxfp4", 70)),
    ],
)
def test_product(spec: str, batch: int) -> None:
    weight = jax.random.normal(jax.random.key(0), (64, 512))
    x = jax.random.normal(jax.random.key(1), (batch, 512), jnp.bfloat16)
    q = quantize(weight, scheme(spec))
    assert fits(q)
    expected = jnp.matmul(x.astype(jnp.float32), dequantize(q).T, precision="highest")
    found = packed_matmul(x, q, interpret=True)
    # Where weights are scaled before the product, or levels have no exact bfloat16, they are rounded once to it.
    error = float(jnp.linalg.norm(found - expected) / jnp.linalg.norm(expected))
    group = q.scheme.tile(*q.matrix_shape)[1]
    step = tiling_of(batch, q)
    rounded = spec.startswith("nf4") or step.scale_first or (batch > 1 and group < step.inputs)
    assert error < (2.0**-8 if rounded else 2e-6)


@pytest.mark.parametrize(
    "tiling",
    [Tiling(rows=16, inputs=128, splits=1, warps=1), Tiling(rows=32, inputs=64, splits=6, warps=1)],
    ids=["whole rows", "split rows"],
)
def test_any_tiling_gives_the_same(tiling: Tiling) -> None:
    q = quantize(jax.random.normal(jax.random.key(0), (64, 768)), scheme("int4:g128:asym"))
    x = jax.random.normal(jax.random.key(1), (3, 768), jnp.bfloat16)
    expected = packed_matmul(x, q, interpret=True)
    np.testing.assert_allclose(packed_matmul(x, q, tiling=tiling, interpret=True), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("spec", ["int3:g64", "int4:b8x32", "q4_k", "int4:tensor", "int4:g768", "int8:g8"])
def test_what_does_not_fit(spec: str) -> None:
    assert not fits(quantize(jnp.ones((64, 1536)), scheme(spec)))


def test_tilings_divide_the_inputs() -> None:
    for columns in (256, 768, 1536, 14336):
        q = jax.eval_shape(lambda n=columns: quantize(jnp.zeros((64, n)), scheme("int2:g64")))
        for batch in (1, 16, 100):
            found = tiling_of(batch, q)
            assert columns % (found.inputs * found.splits) == 0


def test_a_packed_layer_uses_it_and_gives_the_same() -> None:
    layer = Linear(256, 64, use_bias=True, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    packed = layer.packed(quantize(layer.weight.get_value(), scheme("int4:g128")))
    x = jax.random.normal(jax.random.key(1), (2, 3, 256), jnp.bfloat16)
    with dispatch.override("jnp"):
        assert dispatch.multiply_packed(x, packed.weight.get_value()) is None
        expected = packed(x)
    with dispatch.override("interpret"):
        assert dispatch.multiply_packed(x, packed.weight.get_value()) is not None
        found = packed(x)
        assert dispatch.multiply_packed(x.astype(jnp.float32), packed.weight.get_value()) is None
        assert dispatch.multiply_packed(jnp.zeros((200, 256), jnp.bfloat16), packed.weight.get_value()) is None
    assert found.dtype == expected.dtype == jnp.bfloat16
    error = jnp.linalg.norm((found - expected).astype(jnp.float32)) / jnp.linalg.norm(expected.astype(jnp.float32))
    assert float(error) < 2.0**-7


def test_unknown_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JQUANT_KERNELS", "cuda")
    with pytest.raises(InputError, match="JQUANT_KERNELS=cuda: it must be one of auto, jnp, interpret, tpu"):
        dispatch.way()


@pytest.mark.parametrize("element", [e for e in ELEMENTS.values() if known(e)], ids=lambda e: e.name)
def test_assembly(element: Element) -> None:
    """Every code in every place of four bytes."""
    count = 2**element.bits
    codes = np.arange(count)
    if element.bits == 8 and not element.name.startswith("int"):
        codes = np.asarray(element.encode(jnp.asarray(element.levels())))  # without NaNs and infinities
    places = np.stack([np.roll(codes, shift) for shift in range(32 // element.bits)], axis=-1).astype(np.uint64)
    shifts = np.arange(places.shape[1], dtype=np.uint64) * np.uint64(element.bits)
    words = np.sum(places << shifts, axis=1).astype(np.uint32)
    expected = levels(jnp.asarray(words.view(np.uint8)), element, assembly=False)
    for index, level in enumerate(expected):
        found = [run_assembly(assembly_of(element, index), int(word)) for word in words]
        values = np.asarray(found, np.uint32).view(np.uint16).astype(np.uint32) << 16
        np.testing.assert_array_equal(values.reshape(-1).view(np.float32), np.asarray(level, np.float32))


def run_assembly(lines: list[str], word: int) -> list[int]:
    """$0 and $1 after the instructions on $2, by the meaning that the PTX manual gives each."""
    registers = {"$2": word}

    def value(token: str) -> int:
        if token in registers:
            return registers[token]
        return int(token[2:], 16) if token.startswith("0f") else int(token, 0)

    for line in lines:
        name, _, rest = line.rstrip(";").partition(" ")
        if name != ".reg":
            target, *operands = (token.strip() for token in rest.split(","))
            registers[target] = OPERATIONS[name](*map(value, operands)) & 0xFFFFFFFF
    return [registers["$0"], registers["$1"]]


def _permute(a: int, b: int, selector: int) -> int:
    source = (a | b << 32).to_bytes(8, "little")
    picks = [selector >> 4 * i & 15 for i in range(4)]
    assert all(pick < 8 for pick in picks)  # the mode that repeats a sign is not used
    return int.from_bytes(bytes(source[pick] for pick in picks), "little")


def _float(bits: int) -> Any:
    return np.asarray(bits, np.uint32).view(np.float32)[()]


def _bfloat16(value: Any) -> int:
    return int(np.asarray(value).astype(jnp.bfloat16).view(np.uint16))


def _fused(a: int, b: int, c: int) -> int:
    halves = []
    for shift in (0, 16):
        x, y, z = (np.float64(_float((operand >> shift & 0xFFFF) << 16)) for operand in (a, b, c))
        halves.append(_bfloat16(x * y + z))
    return halves[0] | halves[1] << 16


OPERATIONS: dict[str, Any] = {
    "mov.b32": lambda a: a,
    "shr.b32": lambda a, n: a >> n,
    "and.b32": lambda a, b: a & b,
    "or.b32": lambda a, b: a | b,
    "prmt.b32": _permute,
    "sub.f32": lambda a, b: int((_float(a) - _float(b)).view(np.uint32)),
    "cvt.rn.bf16x2.f32": lambda high, low: _bfloat16(_float(high)) << 16 | _bfloat16(_float(low)),
    "fma.rn.bf16x2": _fused,
}


def test_under_vmap_and_differentiation() -> None:
    """All rows of a batch go into one product; the gradient of x is that of the product, and q has none."""
    q = quantize(jax.random.normal(jax.random.key(0), (64, 256)), scheme("int4:g32"))
    x = jax.random.normal(jax.random.key(1), (3, 2, 256)).astype(jnp.bfloat16)
    expected = jnp.einsum("bri,oi->bro", x, dequantize(q, jnp.bfloat16), preferred_element_type=jnp.float32)

    def loss(x: jax.Array) -> jax.Array:
        found = dispatch.multiply_packed(x, q)
        assert found is not None
        return jnp.sum(found**2)

    with dispatch.override("interpret"):
        jaxpr = str(jax.make_jaxpr(jax.vmap(lambda x: dispatch.multiply_packed(x, q)))(x))
        found: Any = jax.vmap(lambda x: dispatch.multiply_packed(x, q))(x)
        gradient = jax.grad(loss)(x[0])
        stacked = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf, leaf]), q)
        experts: Any = jax.vmap(dispatch.multiply_packed)(x, stacked)
    assert "[6,64]" in jaxpr  # 3 · 2 rows in one product
    np.testing.assert_allclose(found, expected, rtol=1e-2, atol=1e-2)
    np.testing.assert_allclose(experts, expected, rtol=1e-2, atol=1e-2)
    pulled = jnp.matmul((2 * expected[0]).astype(jnp.bfloat16), dequantize(q, jnp.bfloat16))
    np.testing.assert_allclose(gradient.astype(jnp.float32), pulled.astype(jnp.float32), rtol=2e-2, atol=0.5)
