"""Writes small random models in every format that `check.py` loads with its own client, with our logits beside them.

python scripts/clients/write_cases.py DIR
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from flax import nnx

from jquant import qat
from jquant.core.qtensor import quantize
from jquant.core.scheme import scheme
from jquant.models.checkpoint import open_checkpoint
from jquant.models.decoder import Decoder
from jquant.models.export import export
from jquant.models.gguf_export import export_gguf
from jquant.models.save import save
from jquant.ptq.rtn import quantize_layers
from tests.tiny_checkpoint import CONFIG, byte_tokenizer, tiny_model

TOKENS = jnp.arange(24).reshape(2, 12)
CASES: tuple[tuple[str, str, str | None], ...] = (
    *(("compressed-tensors", f"int{bits}:g32", None) for bits in (2, 3, 4, 8)),
    *(
        ("compressed-tensors", spec, None)
        for spec in ("int4:channel", "int4:g32:asym", "int3:g32:asym", "int8:channel")
    ),
    *(("compressed-tensors", spec, None) for spec in ("fp8_e4m3:channel", "fp8_e4m3:tensor")),
    ("compressed-tensors", "fp8_e4m3:channel", "fp8_e4m3:token"),
    ("compressed-tensors", "fp8_e4m3:tensor", "fp8_e4m3:tensor"),
    ("compressed-tensors", "int8:channel", "int8:tensor:asym"),
    ("hf", "int4:g32", None),
    ("bitsandbytes", "nf4:g32", None),
    ("bitsandbytes", "nf4:g32:dq", None),
    *(("gguf", spec, None) for spec in ("q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "iq4_nl")),
    ("gptq", "int4:g32:fp16", None),
    ("gptq", "int4:g32:fp16 act-order", None),
    ("gptq_v2", "int4:g32:asym:fp16", None),
    ("awq", "int4:g32:asym:fp16", None),
)


def qwen3() -> Decoder:
    """Another family, with norms of queries and keys. transformers takes its heads to be 128 wide in any GGUF."""
    config = dataclasses.replace(
        CONFIG, architecture="qwen3", qk_norm=True, hidden_size=128, intermediate_size=256, head_dim=128
    )
    return Decoder(config, rngs=nnx.Rngs(0))


def main() -> None:
    folder = Path(sys.argv[1])
    for make in (tiny_model, qwen3):
        for format, spec, activation in CASES:
            model = make()
            if activation is not None:
                qat.prepare(model, qat.one_rule(spec, activation=activation), announce=lambda _: None)
                _logits(model)  # static ranges are seen
                qat.set_observing(model, False)
                qat.convert(model)
            else:
                quantize_layers(model, scheme(spec.split()[0]))
            if spec.endswith("act-order"):
                _shuffle_groups(model, make())
            name = "-".join(filter(None, (make.__name__, format, spec, activation))).replace(":", "_").replace(" ", "_")
            native = folder / "native" / name
            save(model, native, tokenizer=byte_tokenizer())
            checkpoint = open_checkpoint(native)
            if format == "gguf":
                export_gguf(checkpoint, folder / name / "model.gguf")
            else:
                export(checkpoint, folder / name, format=format)
            np.save(folder / name / "logits.npy", _logits(model))


def _logits(model: Decoder) -> np.ndarray:
    return np.asarray(nnx.jit(lambda model, tokens: model(tokens))(model, TOKENS))


def _shuffle_groups(model: Decoder, source: Decoder) -> None:
    """Groups of inputs in no order, as GPTQ with act-order leaves them."""
    for index, block in enumerate(model.blocks):
        weight = source.blocks[index].mlp.up_proj.weight.get_value()
        order = np.random.default_rng(index).permutation(np.arange(weight.shape[1]) // 32)
        q = quantize(weight, scheme("int4:g32:fp16"), groups=jnp.asarray(order, jnp.int32))
        block.mlp.up_proj.weight.set_value(q)


if __name__ == "__main__":
    main()
