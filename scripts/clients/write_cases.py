"""Writes small random models in every format that `check.py` loads with its own client, with our logits beside them.

python scripts/clients/write_cases.py DIR [FORMAT …]
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from flax import nnx

from jquant import qat
from jquant.core.qtensor import QTensor, dequantize, quantize
from jquant.core.scheme import scheme
from jquant.data.blocks import text_windows
from jquant.data.text import load_text
from jquant.evaluation.perplexity import perplexity
from jquant.io.tokenizer_gguf import tokenizer_from_gguf
from jquant.models.checkpoint import Checkpoint, open_checkpoint
from jquant.models.decoder import Decoder
from jquant.models.export import export
from jquant.models.generate import generate
from jquant.models.gguf_export import export_gguf
from jquant.models.save import save
from jquant.nn.install import install, tensors_of
from jquant.nn.matrices import layer_shapes
from jquant.ptq.presets import find_recipe
from jquant.ptq.recipe import one_rule
from jquant.ptq.rtn import quantize_layers
from jquant.quantization_run import quantize_checkpoint
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
    *(("gptq", f"int{bits}:g32:fp16", None) for bits in (2, 3, 4, 8)),
    ("gptq", "int4:g32:fp16 act-order", None),
    ("gptq_v2", "int4:g32:asym:fp16", None),
    ("gptq_v2", "int4:g32:asym:fp16 act-order", None),
    ("awq", "int4:g32:asym:fp16", None),
    ("awq", "int4:g32:fp16", None),
)
# A second family has other tensors, whose names every format must find; all schemes are the first family's part.
OF_ANOTHER_FAMILY: tuple[tuple[str, str, str | None], ...] = (
    ("compressed-tensors", "int4:g32", None),
    ("compressed-tensors", "int4:g32:asym", None),
    ("compressed-tensors", "fp8_e4m3:channel", "fp8_e4m3:token"),
    ("compressed-tensors", "int8:channel", "int8:tensor:asym"),
    ("hf", "int4:g32", None),
    ("bitsandbytes", "nf4:g32:dq", None),
    ("gguf", "q4_0", None),
    ("gguf", "q8_0", None),
    ("gptq", "int4:g32:fp16", None),
    ("gptq_v2", "int4:g32:asym:fp16", None),
    ("awq", "int4:g32:asym:fp16", None),
)
WIDE = tuple(("gguf", spec, None) for spec in ("q2_k", "q3_k", "q4_k", "q5_k", "q6_k"))


def wide() -> Decoder:
    """Rows of whole super-blocks of 256."""
    config = dataclasses.replace(CONFIG, hidden_size=256, intermediate_size=512, head_dim=64)
    return Decoder(config, rngs=nnx.Rngs(0))


def qwen3() -> Decoder:
    """Another family, with norms of queries and keys. transformers takes its heads to be 128 wide in any GGUF."""
    config = dataclasses.replace(
        CONFIG, architecture="qwen3", qk_norm=True, hidden_size=128, intermediate_size=256, head_dim=128
    )
    return Decoder(config, rngs=nnx.Rngs(0))


def main() -> None:
    folder, wanted = Path(sys.argv[1]), sys.argv[2:]
    for make, cases in ((tiny_model, CASES), (qwen3, OF_ANOTHER_FAMILY), (wide, WIDE)):
        for format, spec, activation in cases:
            if wanted and format not in wanted:
                continue
            model = make()
            if activation is not None:
                qat.prepare(model, qat.one_rule(spec, activation=activation), announce=lambda _: None)
                _logits(model)  # static ranges are seen
                qat.set_observing(model, False)
                qat.convert(model)
            else:
                quantize_layers(model, scheme(spec.split()[0]))
            if spec.endswith("act-order"):
                _shuffle_groups(model, make(), spec.split()[0])
            name = "-".join(filter(None, (make.__name__, format, spec, activation))).replace(":", "_").replace(" ", "_")
            native = folder / "native" / name
            save(model, native, tokenizer=byte_tokenizer())
            checkpoint = open_checkpoint(native)
            if format == "gguf":
                export_gguf(checkpoint, folder / name / "model.gguf")
            else:
                export(checkpoint, folder / name, format=format)
            np.save(folder / name / "logits.npy", _logits(model))
            if format in ("gptq", "gptq_v2", "awq"):
                _write_decoded(model, checkpoint, folder / name)
    write_float(folder)
    write_sentencepiece(folder)
    write_smollm2(folder)


def _write_decoded(model: Decoder, checkpoint: Checkpoint, folder: Path) -> None:
    """What the packed weights decode to, and the logits where that is rounded to float16, as GPTQModel rounds it."""
    export(checkpoint, folder / "decoded", format="hf")
    rounded = open_checkpoint(folder / "decoded").model()
    packed = {name: q for name, q in tensors_of(model).items() if isinstance(q, QTensor)}
    install(rounded, {name: dequantize(q, jnp.float16).astype(jnp.float32) for name, q in packed.items()}, {})
    np.save(folder / "logits_float16.npy", _logits(rounded))


def write_sentencepiece(folder: Path) -> None:
    """A GGUF with SentencePiece's tokenizer, and the ids that texts have by it here."""
    golden = json.loads((Path(__file__).parents[2] / "tests" / "goldens" / "tokenizer_spm.json").read_text())
    said = golden["models"]["llama"]
    kinds = {"scores": np.float32, "token_type": np.int32}
    metadata = {"tokenizer.ggml.model": "llama", "tokenizer.ggml.add_bos_token": False}
    metadata |= {
        f"tokenizer.ggml.{name}": np.array(value, kinds[name]) if name in kinds else value
        for name, value in said.items()
        if name not in ("ids", "decoded") and value is not None
    }
    tokenizer = tokenizer_from_gguf(metadata)
    model = Decoder(dataclasses.replace(CONFIG, vocab_size=tokenizer.vocab_size), rngs=nnx.Rngs(0))
    save(model, folder / "native" / "sentencepiece", tokenizer=tokenizer)
    path = folder / "sentencepiece"
    export(folder / "native" / "sentencepiece", path / "model.gguf", format="gguf")
    texts = [text for text in golden["texts"] if text and "\0" not in text]
    ids = [tokenizer.encode(text).tolist() for text in texts]
    (path / "tokens.json").write_text(json.dumps({"texts": texts, "ids": ids}), encoding="utf-8")


def write_smollm2(folder: Path) -> None:
    """The demo model: at 4 bits for transformers, and for llama.cpp with our perplexity and 32 greedy tokens."""
    demo, source = open_checkpoint("demo"), folder / "native"
    tokenizer = demo.tokenizer()
    windows = text_windows(load_text("pydoc"), tokenizer, window=512, limit=4)
    prompt = tokenizer.encode("The capital of France is")
    for name, recipe, format in (
        ("smollm2-compressed-tensors-int4_g64", one_rule("rtn", "int4:g64"), "compressed-tensors"),
        ("smollm2-gguf-f16", None, "gguf"),
        ("smollm2-gguf-q8_0", one_rule("rtn", "q8_0"), "gguf"),
        ("smollm2-gguf-q4_k_m", find_recipe("q4_k_m", layer_shapes(demo.abstract())), "gguf"),
    ):
        (folder / name).mkdir()
        if recipe is not None:
            quantize_checkpoint(demo, recipe, source / name)
        out = folder / name / "model.gguf" if format == "gguf" else folder / name / "model"
        if recipe is None:
            export_gguf(demo, out, dtype="float16")
        else:
            export(source / name, out, format=format)
        model = open_checkpoint(out).packed().model()
        if format == "gguf":
            greedy = [int(token) for token in generate(model, prompt, max_tokens=32)]
            said = {"prompt": prompt.tolist(), "greedy": greedy, "perplexity": perplexity(model, windows).value}
            said["perplexity_as_llama_cpp"] = said["perplexity"]
            if recipe is not None:
                said["perplexity_as_llama_cpp"] = perplexity(_inputs_in_8_bits(out), windows).value
            (folder / name / "said.json").write_text(json.dumps(said), encoding="utf-8")
            np.save(folder / name / "windows.npy", windows.tokens)
        else:
            tokens = windows.tokens[:1, :64]
            np.save(folder / name / "tokens.npy", tokens)
            logits = nnx.jit(lambda model, tokens: model(tokens))(model, jnp.asarray(tokens))
            np.save(folder / name / "logits.npy", logits)


def write_float(folder: Path) -> None:
    """Float weights for `write_theirs.py`: inputs in whole blocks of 64, and outputs, as GPTQModel's AWQ asks."""
    config = dataclasses.replace(CONFIG, hidden_size=128, intermediate_size=128, head_dim=32)
    model = Decoder(config, rngs=nnx.Rngs(0))
    save(model, folder / "native" / "tiny_model-float", tokenizer=byte_tokenizer())
    export(folder / "native" / "tiny_model-float", folder / "tiny_model-float", format="hf")


def _inputs_in_8_bits(path: Path) -> Decoder:
    """The model with the inputs of its blocks' layers rounded as llama.cpp rounds them where weights are blocks.

    Of most block types Q8_0: groups of 32, −127 … 127, scales in float16. K types round 256 together, and the head's
    inputs are rounded too; what is left between the two perplexities is that, and llama.cpp's cache in float16.
    """
    checkpoint = open_checkpoint(path).packed()
    layers = [path.removesuffix(".weight") for path in checkpoint.readers if path.endswith("_proj.weight")]
    return dataclasses.replace(checkpoint, activations=dict.fromkeys(layers, "int8:g32:restricted:fp16")).model()


def _logits(model: Decoder) -> np.ndarray:
    return np.asarray(nnx.jit(lambda model, tokens: model(tokens))(model, TOKENS))


def _shuffle_groups(model: Decoder, source: Decoder, spec: str) -> None:
    """Groups of inputs in no order, as GPTQ with act-order leaves them."""
    for index, block in enumerate(model.blocks):
        weight = source.blocks[index].mlp.up_proj.weight.get_value()
        order = np.random.default_rng(index).permutation(np.arange(weight.shape[1]) // 32)
        q = quantize(weight, scheme(spec), groups=jnp.asarray(order, jnp.int32))
        block.mlp.up_proj.weight.set_value(q)


if __name__ == "__main__":
    main()
