# pyright: reportMissingImports=false
"""A small random Llama quantized by other tools, each result with the logits that the tool's own client computes.

    CLIENT_PYTHON scripts/clients/write_theirs.py FLOAT DIR [TOOL …]

FLOAT is a Hugging Face folder with float weights, which `write_cases.py` leaves as DIR/tiny_model-float. Each result
is a folder DIR/theirs-TOOL-KIND with logits.npy in it, for `check_theirs.py`.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import transformers
from transformers import AutoModelForCausalLM

TOKENS = torch.arange(24).reshape(2, 12)


def main() -> int:
    source, folder, wanted = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:]
    transformers.logging.set_verbosity_error()
    for name, (package, write) in TOOLS.items():
        if wanted and name not in wanted:
            continue
        write(source, folder)
        print(f"{name}: {package} {importlib.metadata.version(package)}", flush=True)
    return 0


def llm_compressor(source: Path, folder: Path) -> None:
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import QuantizationModifier

    def grouped(bits: int, symmetric: bool) -> dict[str, object]:
        weights = QuantizationArgs(num_bits=bits, symmetric=symmetric, strategy="group", group_size=32)
        return {"config_groups": {"all": QuantizationScheme(targets=["Linear"], weights=weights)}}

    kinds: dict[str, dict[str, object]] = {
        "w4a16": grouped(4, True),
        "w4a16-asym": grouped(4, False),
        "w8a16": grouped(8, True),
        **{kind: {"targets": "Linear", "scheme": kind.upper()} for kind in ("w8a8", "fp8_dynamic")},
    }
    for kind, options in kinds.items():
        model = _float(source)
        oneshot(model=model, recipe=QuantizationModifier(ignore=["lm_head"], **options))
        path = folder / f"theirs-llm_compressor-{kind}"
        model.save_pretrained(path, save_compressed=True)
        _finish(path, source, AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32))


def gptqmodel(source: Path, folder: Path) -> None:
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # with the default it does not start on two cores
    import gptqmodel_client as client
    from gptqmodel import GPTQModel, QuantizeConfig
    from gptqmodel.quantization.config import AWQConfig

    texts = [" ".join(str(number * step) for number in range(40)) for step in range(1, 33)]
    for kind, options in {
        "int4": {"bits": 4, "sym": True},
        "int4-act_order": {"bits": 4, "sym": True, "desc_act": True},
        "int8": {"bits": 8, "sym": True},
        "int4-v2-asym": {"bits": 4, "sym": False, "format": "gptq_v2"},
        "awq": {"bits": 4},
    }.items():
        make = AWQConfig if kind == "awq" else QuantizeConfig
        config = make(group_size=32, pack_impl="original", **options)  # the other packer is compiled first
        model = GPTQModel.load(str(source), config, device="cpu")
        model.quantize(texts, batch_size=1)
        path = folder / f"theirs-gptqmodel-{kind}"
        model.save(str(path))
        loaded = client.load(path)
        client.in_float32(loaded)
        _finish(path, source, loaded)


def bitsandbytes(source: Path, folder: Path) -> None:
    """Its own multiplication rounds to bfloat16 on CPU: the logits are those of its own decoded weights."""
    from bitsandbytes.functional import dequantize_4bit
    from transformers import BitsAndBytesConfig

    for kind, double in (("nf4", False), ("nf4-double", True)):
        settings = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=double,
            bnb_4bit_compute_dtype=torch.float32,
        )
        packed = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, quantization_config=settings)
        path = folder / f"theirs-bitsandbytes-{kind}"
        packed.save_pretrained(path)
        plain = _float(source)
        with torch.no_grad():
            for name, layer in packed.named_modules():
                state = getattr(getattr(layer, "weight", None), "quant_state", None)
                if state is not None:
                    plain.get_submodule(name).weight.copy_(dequantize_4bit(layer.weight.data, state))
        _finish(path, source, plain)


def llama_cpp(source: Path, folder: Path) -> None:
    """Blocks of ggml's C quantizer in a file of gguf-py's writer, decoded by transformers."""
    import gguf

    library = _ggml()
    weights = _float(source).state_dict()
    for kind in ("Q4_0", "Q5_1", "Q8_0", "IQ4_NL"):
        path = folder / f"theirs-llama_cpp-{kind.lower()}"
        path.mkdir(parents=True)
        writer = gguf.GGUFWriter(str(path / "model.gguf"), "llama")
        _describe(writer, source)
        for name, tensor in weights.items():
            theirs, array = _named(name, tensor.float().numpy(), heads=4, kv_heads=2)
            if array.ndim == 2 and "blk" in theirs and array.shape[1] % 32 == 0:
                type_ = gguf.GGMLQuantizationType[kind]
                writer.add_tensor(theirs, _encoded(library, array, type_), raw_dtype=type_)
            else:
                writer.add_tensor(theirs, np.ascontiguousarray(array, np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        model = AutoModelForCausalLM.from_pretrained(path, gguf_file="model.gguf", dtype=torch.float32)
        with torch.no_grad():
            np.save(path / "logits.npy", model(TOKENS).logits.float().numpy())


def _describe(writer: object, source: Path) -> None:
    """The fields that gguf-py's own conversion writes for a Llama."""
    import json

    said = json.loads((source / "config.json").read_text())
    vocabulary = json.loads((source / "tokenizer.json").read_text())
    tokens = sorted(vocabulary["model"]["vocab"], key=vocabulary["model"]["vocab"].get)
    for name, value in (
        ("block_count", said["num_hidden_layers"]),
        ("context_length", said["max_position_embeddings"]),
        ("embedding_length", said["hidden_size"]),
        ("feed_forward_length", said["intermediate_size"]),
        ("head_count", said["num_attention_heads"]),
        ("head_count_kv", said["num_key_value_heads"]),
        ("layer_norm_rms_eps", said["rms_norm_eps"]),
        ("rope_dimension_count", said["head_dim"]),
        ("vocab_size", said["vocab_size"]),
        ("tokenizer_model", "gpt2"),
        ("tokenizer_pre", "gpt-2"),
        ("token_list", tokens),
        ("token_types", [1] * len(tokens)),
        ("token_merges", ["a b"]),
        ("eos_token_id", 256),
    ):
        getattr(writer, f"add_{name}")(value)


def _named(name: str, array: np.ndarray, *, heads: int, kv_heads: int) -> tuple[str, np.ndarray]:
    """llama.cpp's name of a tensor, and its rows as llama.cpp has them."""
    ends = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    layers = {
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
    }
    module = name.removesuffix(".weight")
    if module in ends:
        return f"{ends[module]}.weight", array
    _, _, number, layer = module.split(".", 3)
    if layers[layer] in ("attn_q", "attn_k"):
        count = heads if layers[layer] == "attn_q" else kv_heads
        array = array.reshape(count, 2, -1, array.shape[1]).swapaxes(1, 2).reshape(array.shape)
    return f"blk.{number}.{layers[layer]}.weight", array


def _ggml() -> ctypes.CDLL:
    files = importlib.metadata.files("libggml-python") or []
    library = ctypes.CDLL(str(next(file.locate() for file in files if file.name == "libggml-base.so")))
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    return library


def _encoded(library: ctypes.CDLL, array: np.ndarray, kind: int) -> np.ndarray:
    import gguf

    rows, columns = array.shape
    elements, size = gguf.GGML_QUANT_SIZES[kind]
    values = np.ascontiguousarray(array, np.float32)
    out = np.zeros((rows, columns // elements * size), np.uint8)
    library.ggml_quantize_chunk(
        ctypes.c_int(int(kind)),
        values.ctypes.data_as(ctypes.c_void_p),
        out.ctypes.data_as(ctypes.c_void_p),
        ctypes.c_int64(0),
        ctypes.c_int64(rows),
        ctypes.c_int64(columns),
        None,
    )
    return out


def _float(source: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)


def _finish(path: Path, source: Path, model: torch.nn.Module) -> None:
    """The tokenizer, where the tool has not brought it along, and the logits."""
    for file in source.glob("tokenizer*"):
        if not (path / file.name).exists():
            shutil.copy(file, path / file.name)
    with torch.no_grad():
        np.save(path / "logits.npy", model(TOKENS).logits.float().numpy())


TOOLS: dict[str, tuple[str, Callable[[Path, Path], None]]] = {
    "bitsandbytes": ("bitsandbytes", bitsandbytes),
    "llama_cpp": ("libggml-python", llama_cpp),
    "llm_compressor": ("llmcompressor", llm_compressor),
    "gptqmodel": ("gptqmodel", gptqmodel),
}


if __name__ == "__main__":
    sys.exit(main())
