"""Checkpoints of the Llama family: their logits are those of transformers, and what is wrong with one is named."""

from __future__ import annotations

import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jquant.core.errors import InputError
from jquant.io.safetensors import open_safetensors
from jquant.models import checkpoint
from jquant.models.checkpoint import check_finite, load_model, open_checkpoint
from jquant.models.config import ModelConfig, RopeScaling
from jquant.models.families import config_from_gguf, config_from_hf
from jquant.models.rope import frequencies
from jquant.models.tensor_names import gguf_tensors, hf_tensors, interleaved_to_halves
from jquant.nn.linear import Linear
from jquant.nn.surgery import module_at

GOLDENS = Path(__file__).parents[1] / "goldens"
EMBED = "model.embed_tokens.weight"
GATE = "model.layers.1.mlp.gate_proj.weight"

HF = {
    "model_type": "llama",
    "vocab_size": 80,
    "hidden_size": 40,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "rms_norm_eps": 1e-5,
}
GGUF = {
    "general.architecture": "llama",
    "llama.vocab_size": 80,
    "llama.embedding_length": 40,
    "llama.feed_forward_length": 48,
    "llama.block_count": 2,
    "llama.attention.head_count": 4,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}


@pytest.mark.parametrize(
    ("model", "golden"),
    [("llama_a", "llama_a"), ("llama_b", "llama_b"), ("llama_c", "llama_c"), ("llama_b.gguf", "llama_b")],
)
def test_logits_are_those_of_transformers(model, golden):
    recorded = np.load(GOLDENS / golden / "golden.npz")
    meta, expected = json.loads(str(recorded["meta"])), recorded["logits"]
    logits = load_model(GOLDENS / model)(jnp.asarray(recorded["tokens"]))
    assert logits.dtype == jnp.float32
    limit = 1e-5 * np.abs(expected).max()  # 1.9e-6 seen
    np.testing.assert_allclose(np.asarray(logits), expected, rtol=0, atol=limit)
    assert min(meta["moves"].values()) > 1000 * limit, "a feature that moves no logit is not tested"


def test_weights_are_cast_once():
    model = load_model(GOLDENS / "llama_b", dtype=jnp.bfloat16)
    weight = open_safetensors(GOLDENS / "llama_b" / "model.safetensors").read(GATE)
    layer = module_at(model, "blocks.1.mlp.gate_proj")
    assert isinstance(layer, Linear)
    loaded = layer.weight.get_value()
    np.testing.assert_array_equal(np.asarray(loaded), weight.astype(ml_dtypes.bfloat16), strict=True)


def test_a_model_does_not_change_with_its_file(altered):
    """What jax takes over without a copy must be memory of our own, not a view of the mapped file."""
    folder = altered("llama_b")
    model = load_model(folder)
    before = np.array(model.embed.weight.get_value())
    file = folder / "model.safetensors"
    with file.open("r+b") as stream:  # in place, as a careless writer does
        stream.seek(2048)
        stream.write(bytes(file.stat().st_size - 2048))
    np.testing.assert_array_equal(np.asarray(model.embed.weight.get_value()), before)


def test_bfloat16_logits_are_float32_and_not_rounded():
    model = load_model(GOLDENS / "llama_a", dtype=jnp.bfloat16)
    logits = model(jnp.arange(8, dtype=jnp.int32)[None])
    assert logits.dtype == jnp.float32
    assert not jnp.array_equal(logits, logits.astype(jnp.bfloat16).astype(jnp.float32))


# Configs -------------------------------------------------------------------------------------------------------------


def test_defaults_of_a_hf_config():
    config = config_from_hf(HF, "f")
    assert (config.num_kv_heads, config.head_dim, config.rope_theta, config.max_length) == (4, 10, 10000.0, 2048)
    assert (config.tie_embeddings, config.qkv_bias, config.mlp_bias, config.rope_scaling) == (
        False,
        False,
        False,
        None,
    )


@pytest.mark.parametrize("spelling", ["old", "new"])
@pytest.mark.parametrize("kind", ["default", "linear", "llama3"])
def test_old_and_new_spellings_of_rope_agree(kind, spelling):
    options = {"default": {}, "linear": {"factor": 4.0}, "llama3": LLAMA3}[kind]
    if spelling == "new":
        rope = {"rope_parameters": {"rope_theta": 5e5, "rope_type": kind, **options}}
    else:
        rope = {"rope_theta": 5e5, "rope_scaling": {"type": kind, **options} if options else None}
    config = config_from_hf(HF | rope, "f")
    assert config.rope_theta == 5e5
    assert (
        config.rope_scaling
        == {
            "default": None,
            "linear": RopeScaling(kind="linear", factor=4.0),
            "llama3": RopeScaling(
                kind="llama3", factor=8.0, low_frequency_factor=1.0, high_frequency_factor=4.0, original_length=64
            ),
        }[kind]
    )


def test_gguf_metadata_gives_the_same_config_as_hf():
    from_gguf = open_checkpoint(GOLDENS / "llama_b.gguf").config
    from_hf = open_checkpoint(GOLDENS / "llama_b").config
    assert from_gguf.rope_scaling is None  # a GGUF holds the divisors that the scaling comes to
    np.testing.assert_allclose(frequencies(from_gguf), frequencies(from_hf), rtol=1e-6)
    same = {"rope_divisors": None, "rope_scaling": None, "norm_eps": 1e-5}
    assert from_gguf.as_json() | same == from_hf.as_json() | same
    assert from_gguf.norm_eps == np.float32(1e-5)


def test_gguf_vocabulary_and_biases_are_read_off_the_file():
    metadata = {key: value for key, value in GGUF.items() if key != "llama.vocab_size"}
    metadata["tokenizer.ggml.tokens"] = ["a", "b", "c"]
    config = config_from_gguf(metadata, {"blk.0.attn_q.bias": 0, "output.weight": 0}, "f")
    assert (config.vocab_size, config.qkv_bias, config.mlp_bias, config.tie_embeddings) == (3, True, False, False)
    assert config_from_gguf(GGUF, {}, "f").tie_embeddings


def test_a_config_survives_json():
    for name in ("llama_a", "llama_b", "llama_b.gguf"):
        config = open_checkpoint(GOLDENS / name).config
        assert ModelConfig.from_json(json.loads(json.dumps(config.as_json())), "f") == config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "bert"}, "model_type 'bert' is not supported; there are llama"),
        ({"model_type": 3}, "model_type is 3, it must be a string"),
        ({"model_type": None}, "field model_type is missing"),
        ({"hidden_act": "mish"}, "hidden_act 'mish' is not supported; there are silu"),
        ({"pretraining_tp": 2}, "pretraining_tp 2 is not supported"),
        ({"hidden_size": None}, "field hidden_size is missing"),
        ({"rms_norm_eps": None}, "field rms_norm_eps is missing"),
        ({"vocab_size": "80"}, "vocab_size is '80', it must be a whole number"),
        ({"vocab_size": 80.0}, r"vocab_size is 80\.0, it must be a whole number"),
        ({"num_hidden_layers": True}, "num_hidden_layers is True, it must be a whole number"),
        ({"num_hidden_layers": 0}, "num_layers is 0, it must be a whole number of at least 1"),
        ({"num_attention_heads": -1}, "num_heads is -1"),
        ({"num_key_value_heads": 3}, "4 heads do not share 3 key-value heads evenly"),
        ({"head_dim": 5}, "head_dim 5 must be even"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps is 'small', it must be a finite number"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan, it must be a finite number"),
        ({"rms_norm_eps": 10**400}, "rms_norm_eps is 1000*…, it must be a finite number"),
        ({"rms_norm_eps": -1}, r"norm_eps -1\.0 must not be negative"),
        ({"rope_theta": 0}, r"rope_theta 0\.0 be positive"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings is 'yes', it must be true or false"),
        ({"rope_scaling": ["linear"]}, r"rope parameters \['linear'\] are no object"),
        (
            {"rope_scaling": {"rope_type": "yarn"}},
            "rope type 'yarn' is not supported; there are default, linear, llama3",
        ),
        ({"rope_scaling": {"type": "linear"}}, "rope: field factor is missing"),
        ({"rope_scaling": {"type": "linear", "factor": -2}}, r"rope scaling factor -2\.0: it must be positive"),
        (
            {"rope_parameters": {"rope_type": "llama3", "factor": 8, "low_freq_factor": 1}},
            "field high_freq_factor is missing",
        ),
        (
            {"rope_scaling": {"rope_type": "llama3", **LLAMA3, "low_freq_factor": 4}},
            r"high_freq_factor 4\.0 must exceed low_freq_factor 4\.0",
        ),
    ],
)
def test_a_wrong_hf_field_is_named_with_its_file(change, message):
    fields = {key: value for key, value in (HF | change).items() if value is not None}
    with pytest.raises(InputError, match=f"^FOLDER/config.json: .*{message}") as caught:
        config_from_hf(fields, "FOLDER/config.json")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("family", "change", "message"),
    [
        ("qwen2", {"use_sliding_window": 1}, "use_sliding_window is 1, it must be true or false"),
        ("gemma2", {"sliding_window": 8, "layer_types": ["chunked_attention"] * 2}, "layer_types .* is not supported"),
        ("gemma2", {"sliding_window": 8, "layer_types": ["full_attention"]}, "1 blocks are said to be windowed or not"),
        ("gemma2", {"sliding_window": None}, "field sliding_window is missing"),
        ("gemma3_text", {"sliding_window": 8, "query_pre_attn_scalar": "x"}, "query_pre_attn_scalar is 'x'"),
        ("phi3", {"partial_rotary_factor": 0.75}, "rotary embeddings over a part of the dimensions"),
        ("phi3", {"rope_scaling": {"type": "longrope"}}, "rope type 'longrope' is not supported"),
        ("mistral", {"sliding_window": 0}, "a window of 0 positions"),
        ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 5}, "5 experts a token of 4"),
        ("qwen3_moe", {"mlp_only_layers": [0]}, "blocks with and without experts"),
        (
            "opt",
            {"ffn_dim": 8, "do_layer_norm_before": False},
            "do_layer_norm_before False is not supported; only True",
        ),
        ("opt", {"ffn_dim": 8, "word_embed_proj_dim": 20}, "word_embed_proj_dim 20 is not supported; only 40 is"),
        ("gpt2", {"n_embd": 8, "n_head": 2, "scale_attn_weights": False}, "scale_attn_weights False is not supported"),
    ],
)
def test_what_a_family_does_not_have_is_named(family, change, message):
    with pytest.raises(InputError, match=f"^F: .*{message}"):
        config_from_hf(HF | {"model_type": family} | change, "F")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"general.architecture": "gemma"}, "architecture 'gemma' is not supported; there are llama"),
        ({"llama.block_count": None}, r"field llama\.block_count is missing"),
        ({"llama.attention.head_count_kv": np.arange(40)}, r"llama\.attention\.head_count_kv is array\(.*…, it must"),
        ({"llama.rope.dimension_count": 4}, "rotary embeddings over 4 of 10 dimensions are not supported"),
        ({"llama.rope.scaling.type": "yarn"}, "rope scaling 'yarn' is not supported; there are none, linear"),
        ({"llama.rope.scaling.type": "linear"}, r"field llama\.rope\.scaling\.factor is missing"),
        ({"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 0.0}, r"rope scaling factor 0\.0"),
        ({"llama.vocab_size": None}, r"field llama\.vocab_size is missing"),
        ({"llama.vocab_size": None, "tokenizer.ggml.tokens": 7}, r"field llama\.vocab_size is missing"),
    ],
)
def test_a_wrong_gguf_field_is_named_with_its_file(change, message):
    fields = {key: value for key, value in (GGUF | change).items() if value is not None}
    with pytest.raises(InputError, match=f"^MODEL.gguf: {message}") as caught:
        config_from_gguf(fields, {}, "MODEL.gguf")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": "64"}, "hidden_size is '64', it must be a whole number"),
        ({"unknown": 1}, "the model config is damaged: .*unknown"),
        ({"rope_scaling": {"kind": "linear"}}, "the model config is damaged: .*factor"),
        ({"rope_divisors": [1.0]}, "1 rope divisors"),
    ],
)
def test_a_damaged_config_record_is_refused(change, message):
    record = config_from_hf(HF, "f").as_json()
    with pytest.raises(InputError, match=f"^SOURCE: .*{message}"):
        ModelConfig.from_json(record | change, "SOURCE")
    for damaged in (None, [], {}):
        with pytest.raises(InputError, match=r"^SOURCE: the model config is damaged"):
            ModelConfig.from_json(damaged, "SOURCE")


# Tensors -------------------------------------------------------------------------------------------------------------


MIXTRAL = "model.layers.0.block_sparse_moe.experts"


def _refused(folder: Path, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        load_model(folder)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("hf", "gguf"),
    [
        ("llama", "llama"),
        ("mixtral", "llama"),
        ("qwen2", "qwen2"),
        ("qwen3", "qwen3"),
        ("qwen3_moe", "qwen3moe"),
        ("gemma2", "gemma2"),
        ("gemma3_text", "gemma3"),
        ("phi3", "phi3"),
        ("gpt2", "gpt2"),
    ],
)
def test_both_kinds_of_checkpoint_fill_the_same_weights(hf, gguf):
    ours = {path for entries in hf_tensors(hf).values() for path, _ in entries if not path.endswith("bias")}
    theirs = {path for entries in gguf_tensors(gguf).values() for path, _ in entries}
    assert ours <= theirs
    assert all(path.count("{}") == (1 if path.startswith("blocks.") else 0) for path in ours | theirs)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_act": ["silu"]}, "the model config is damaged: .*list"),
        ({"rope_parameters": {"full_attention": 3}}, "the model config is damaged: .*int"),
        ({"intermediate_size": 10**400}, "the model config is damaged: intermediate_size is 2³¹ or more"),
        ({"model_type": "gemma2", "num_hidden_layers": 2**62}, "asks for 4611686018427387904 blocks"),
        ({"model_type": "gemma2", "sliding_window": 8, "query_pre_attn_scalar": 0}, "the model config is damaged"),
    ],
)
def test_a_config_of_any_values_is_refused_at_once(altered, change, message):
    _refused(altered(config=change), message)


def test_more_experts_than_memory_holds_are_refused_at_once(altered):
    _refused(altered("family_mixtral", config={"num_local_experts": 2**30}), "experts, its config asks for 1073741824")


@pytest.mark.parametrize(
    ("name", "tensors", "message"),
    [
        ("llama_b", {"model.norm.weight": np.float32(1).reshape(())}, r"head\.norm\.weight is a single number"),
        ("family_gpt2", {"wte.weight": np.ones((4, 4), np.float32)}, "is not the only one for embed.weight"),
        ("family_gemma3_text", {"model.norm.weight": np.ones(32, np.int8)}, r"head\.norm\.weight has dtype int8"),
        ("family_mixtral", {f"{MIXTRAL}.0.w1.weight": np.ones((2, 2), np.float32)}, "of one expert have shape"),
        ("family_mixtral", {f"{MIXTRAL}.00.w1.weight": np.ones((2, 2), np.float32)}, "has no place"),
        ("family_mixtral", {f"{MIXTRAL}.{'9' * 5000}.w1.weight": np.ones((2, 2), np.float32)}, "has no place"),
    ],
)
def test_a_tensor_that_cannot_be_the_one_meant_is_refused(altered, name, tensors, message):
    _refused(altered(name, tensors=tensors), message)


def test_an_unmapped_tensor_is_an_error(altered):
    folder = altered(tensors={"model.layers.0.self_attn.q_norm.weight": np.ones(16, np.float32)})
    _refused(folder, r"tensor 'model\.layers\.0\.self_attn\.q_norm\.weight' has no place in a llama decoder")


def test_a_tensor_of_a_layer_too_many_is_an_error(altered):
    _refused(
        altered(tensors={"model.layers.7.input_layernorm.weight": np.ones(40, np.float32)}),
        r"blocks\.7\.attn_norm\.weight has no place in the model its config gives",
    )


def test_a_missing_tensor_is_an_error(altered):
    folder = altered(tensors={GATE: None, "model.norm.weight": None})
    _refused(folder, r"no tensor for head\.norm\.weight \(and 1 others\)|no tensor for blocks\.1.* \(and 1 others\)")


@pytest.mark.parametrize("layers", [3, 10**12])
def test_a_config_deeper_than_the_weights_is_an_error_at_once(altered, layers):
    _refused(
        altered(config={"num_hidden_layers": layers}), f"config asks for {layers} blocks and there are tensors for 2"
    )


def test_a_wrong_shape_is_an_error(altered):
    _refused(
        altered(tensors={GATE: np.ones((40, 48), np.float32)}),
        r"blocks\.1\.mlp\.gate_proj\.weight has shape \(40, 48\), its config asks for \(48, 40\)",
    )


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_a_weight_that_is_not_finite_is_named(altered, value, dtype):
    weight = np.zeros((48, 40), dtype)
    weight[5, 7] = value
    weight[6, 7] = -value
    _refused(
        altered(tensors={GATE: weight}),
        rf"blocks\.1\.mlp\.gate_proj\.weight: {value} at \(5, 7\) and 1 other places; weights must be finite",
    )


def test_a_weight_too_large_for_the_wanted_dtype_is_named(altered):
    weight = np.zeros((48, 40), np.float32)
    weight[5, 7] = 1e5
    folder = altered(tensors={GATE: weight})
    load_model(folder)
    with pytest.raises(InputError, match=r"blocks\.1\.mlp\.gate_proj\.weight: inf at \(5, 7\)"):
        load_model(folder, dtype=jnp.float16)


def test_large_finite_weights_are_fine():
    check_finite(np.full(4, 3e38, np.float32), "x")  # their sum is infinite


@pytest.mark.parametrize("dtype", [np.int8, np.int32, np.bool_])
def test_an_integer_weight_is_an_error(altered, dtype):
    folder = altered(tensors={GATE: np.ones((48, 40), dtype)})
    _refused(folder, rf"blocks\.1\.mlp\.gate_proj\.weight has dtype {np.dtype(dtype)}, weights must be floats")


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ({"quant_method": "gptq", "bits": 4, "group_size": 128}, "no tensor is called qweight"),
        ({"quant_method": "quip"}, "quant_method 'quip' is not read; there are gptq, awq, compressed-tensors"),
        ("odd", "quant_method 'None' is not read"),
        ({}, "quant_method 'None' is not read"),
    ],
)
def test_a_config_of_packed_weights_that_are_not_there_is_refused(altered, method, message):
    _refused(altered(config={"quantization_config": method}), message)


def test_a_tied_checkpoint_may_hold_a_copy_of_the_head(altered):
    embed = open_safetensors(GOLDENS / "llama_b" / "model.safetensors").read(EMBED)
    model = load_model(altered(tensors={"lm_head.weight": np.array(embed)}))
    assert model.head.lm_head is None
    assert model.head.embed is model.embed


def test_an_untied_checkpoint_needs_a_head(altered):
    _refused(altered(config={"tie_word_embeddings": False}), r"no tensor for head\.lm_head\.weight")


def test_derived_buffers_of_old_exporters_are_passed_over(altered):
    load_model(altered(tensors={"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(8, np.float32)}))


def test_interleaved_rows_go_back_to_halves():
    halves = np.arange(2 * 6 * 3).reshape(12, 3)
    pairs = np.concatenate([halves[head * 6 :][[0, 3, 1, 4, 2, 5]] for head in range(2)])
    np.testing.assert_array_equal(interleaved_to_halves(pairs, 2), halves)
    np.testing.assert_array_equal(interleaved_to_halves(pairs[:, 0], 2), halves[:, 0])


# What a checkpoint says of itself ------------------------------------------------------------------------------------


def test_the_hash_is_of_weights_and_config_and_not_of_the_path(altered, tmp_path):
    recorded = open_checkpoint(GOLDENS / "llama_c").sha256()
    copy = altered("llama_c")
    assert re.fullmatch("[0-9a-f]{64}", recorded)
    assert open_checkpoint(copy).sha256() != open_checkpoint(GOLDENS / "llama_b").sha256()
    moved = copy.rename(tmp_path / "moved")
    unchanged = open_checkpoint(moved).sha256()
    config = json.loads((moved / "config.json").read_text())
    (moved / "config.json").write_text(json.dumps(config | {"use_cache": False}))
    assert open_checkpoint(moved).sha256() == unchanged  # not a part of the model
    (moved / "config.json").write_text(json.dumps(config | {"rope_theta": 20000.0}))
    assert open_checkpoint(moved).sha256() != unchanged


def test_notes_say_how_weights_were_stored():
    assert open_checkpoint(GOLDENS / "llama_a").note == "weights stored as BF16"
    assert open_checkpoint(GOLDENS / "llama_b.gguf").note == "weights stored as F16"


def test_opening_reads_no_weight(monkeypatch):
    monkeypatch.setattr(checkpoint, "check_finite", lambda *_: pytest.fail("a weight was read"))
    assert open_checkpoint(GOLDENS / "llama_a").config.num_layers == 3


@pytest.mark.parametrize("shape", [(300, 50), (2000, 600)])  # of malloc, and in huge pages
def test_memory_that_jax_takes_over_is_used_without_a_copy(shape):
    array = checkpoint.aligned_empty(shape, np.dtype(np.float32))
    array[...] = 1
    if jax.default_backend() == "cpu":
        assert jax.device_put(array).unsafe_buffer_pointer() == array.ctypes.data
