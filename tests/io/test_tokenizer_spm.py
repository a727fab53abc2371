"""SentencePiece's BPE from GGUF fields against SentencePiece itself (scripts/goldens/tokenizer_spm.py)."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers

from jquant.core.errors import InputError
from jquant.io.gguf import open_gguf
from jquant.io.tokenizer import Tokenizer, tokenizer_from_json, tokenizer_to_json
from jquant.io.tokenizer_gguf import tokenizer_from_gguf, tokenizer_to_gguf

GOLDEN = json.loads((Path(__file__).parents[1] / "goldens" / "tokenizer_spm.json").read_text())
TEXTS, MODELS = GOLDEN["texts"], GOLDEN["models"]
NORMAL, UNKNOWN, CONTROL, UNUSED = 1, 2, 3, 5


def metadata(name: str, **changes: Any) -> dict[str, Any]:
    """A recorded model as `open_gguf` gives it, with fields changed, or left out where None."""
    fields = {key: value for key, value in MODELS[name].items() if key not in ("ids", "decoded")}
    fields |= {"model": "llama", "add_bos_token": False, **changes}
    arrays = {"scores": np.float32, "token_type": np.int32}
    fields |= {key: np.array(fields[key], kind) for key, kind in arrays.items() if fields[key] is not None}
    return {f"tokenizer.ggml.{key}": value for key, value in fields.items() if value is not None}


def build(name: str, **changes: Any) -> Tokenizer:
    return tokenizer_from_gguf(metadata(name, **changes))


def ids(name: str, *tokens: str) -> list[int]:
    return [MODELS[name]["tokens"].index(token) for token in tokens]


@pytest.mark.parametrize("name", MODELS)
def test_ids_are_those_of_sentencepiece(name):
    tokenizer = build(name)
    for text, expected in zip(TEXTS, MODELS[name]["ids"], strict=True):
        assert tokenizer.encode(text).tolist() == expected, text
    assert tokenizer.vocab_size == len(MODELS[name]["tokens"])


@pytest.mark.parametrize("name", MODELS)
def test_texts_of_ids_are_those_of_sentencepiece(name):
    tokenizer = build(name)
    for line, expected in zip(MODELS[name]["ids"], MODELS[name]["decoded"], strict=True):
        if expected is not None:
            assert tokenizer.decode(line) == expected


def test_the_goldens_meet_every_kind_of_token():
    for name, kinds in {"llama": {1, 3, 6}, "gemma": {1, 3, 4, 6}, "plain": {1, 2, 3}}.items():
        used = np.unique(np.concatenate(MODELS[name]["ids"]).astype(int))
        assert set(np.array(MODELS[name]["token_type"])[used]) >= kinds


@pytest.mark.parametrize("name", ["llama", "gemma"])
def test_a_text_comes_back(name):
    tokenizer = build(name)
    for text in TEXTS:
        if "▁" not in text and "[INST]" not in text:  # the space before a part comes back before its first alone
            assert tokenizer.decode(tokenizer.encode(text), skip_special=False) == text


@pytest.mark.parametrize("name", MODELS)
def test_written_to_a_gguf_the_ids_are_the_same(name: str) -> None:
    tokenizer = build(name)
    written = tokenizer_to_gguf(tokenizer, rows=tokenizer.vocab_size + 3)
    back = tokenizer_from_gguf(written)
    for text, expected in zip(TEXTS, MODELS[name]["ids"], strict=True):
        assert back.encode(text).tolist() == expected, text
    recorded = np.array(MODELS[name]["token_type"])
    assert np.array_equal(written["tokenizer.ggml.token_type"][:-3], recorded)
    assert (written["tokenizer.ggml.token_type"][-3:] == UNUSED).all()


def test_what_a_gguf_cannot_say_of_a_tokenizer() -> None:
    said = json.loads(build("llama").backend.to_str())
    merges = said["model"]["merges"]
    fewer = said | {"model": said["model"] | {"merges": merges[:-1]}}
    with pytest.raises(InputError, match="merges are not those that SentencePiece makes"):
        tokenizer_to_gguf(_of_json(fewer), rows=2000)
    parts = [{"type": "Lowercase"}, *said["normalizer"]["normalizers"]]
    lower = said | {"normalizer": {"type": "Sequence", "normalizers": parts}}
    with pytest.raises(InputError, match="changes texts by Lowercase"):
        tokenizer_to_gguf(_of_json(lower), rows=2000)


def _of_json(said: dict[str, Any]) -> Tokenizer:
    backend = tokenizers.Tokenizer.from_str(json.dumps(said))
    return Tokenizer(backend=backend, bos_id=None, eos_ids=(), add_bos=False, source="tokenizer.json")


def test_spaces_of_user_defined_tokens_may_be_written_plainly():
    """As the GGUFs of today have them."""
    tokens, kinds = MODELS["gemma"]["tokens"], MODELS["gemma"]["token_type"]
    plain = [token.replace("▁", " ") if kind == 4 else token for token, kind in zip(tokens, kinds, strict=True)]
    assert plain != tokens
    assert build("gemma", tokens=plain).sha256 == build("gemma").sha256


def tokens_of(text: str, scores: dict[str, float], *, unused: str = "") -> list[str]:
    """The tokens of a text by a vocabulary of these, an unknown token, and no space before the text."""
    tokens = ["<unk>", *scores]
    kinds = [UNKNOWN, *(UNUSED if token == unused else NORMAL for token in scores)]
    fields = {"tokens": tokens, "token_type": kinds, "scores": [0.0, *scores.values()]}
    fields |= {"bos_token_id": None, "eos_token_id": None, "unknown_token_id": None, "add_space_prefix": False}
    return [tokens[token] for token in build("plain", **fields).encode(text)]


def test_scores_decide():
    letters = dict.fromkeys("abc", 0.0)
    assert tokens_of("abcab", {**letters, "ab": -1.0, "bc": -2.0}) == ["ab", "c", "ab"]
    assert tokens_of("abcab", {**letters, "ab": -2.0, "bc": -1.0}) == ["a", "bc", "ab"]
    assert tokens_of("abcab", {**letters, "ab": -2.0, "bc": -1.0, "abc": -3.0}) == ["abc", "ab"]


@pytest.mark.parametrize("kind", [np.uint8, np.bool_])
def test_scores_of_any_kind_of_number(kind):
    """Of these a minus is another number, or an error."""
    fields = metadata("plain", tokens=["<unk>", "a", "b", "ab", "ba"], token_type=[2, 1, 1, 1, 1], scores=[0] * 5)
    fields["tokenizer.ggml.scores"] = np.array([0, 0, 0, 0, 1], kind)
    for name in ("bos", "eos", "unknown"):
        fields.pop(f"tokenizer.ggml.{name}_token_id", None)
    fields["tokenizer.ggml.add_space_prefix"] = False
    assert tokenizer_from_gguf(fields).encode("aba").tolist() == [1, 4]


def test_an_unused_token_is_not_made():
    assert tokens_of("ab", {"a": 0.0, "b": 0.0, "ab": 0.0}) == ["ab"]
    assert tokens_of("ab", {"a": 0.0, "b": 0.0, "ab": 0.0}, unused="ab") == ["a", "b"]


def test_the_unknown_token_may_be_a_control_token():
    """Gemma's is."""
    kinds = [CONTROL if kind == UNKNOWN else kind for kind in MODELS["plain"]["token_type"]]
    tokenizer = build("plain", token_type=kinds)
    assert [tokenizer.encode(text).tolist() for text in TEXTS] == MODELS["plain"]["ids"]


def test_a_token_that_crosses_a_space_is_made():
    """Gemma has one, ">▁</"; words are not merged apart from each other then."""
    scores = {"a": 0.0, "b": 0.0, "▁": 0.0, "c": 0.0, "▁b": -2.0, "a▁": -1.0, "a▁b": -3.0}
    assert tokens_of("a b c ba", scores) == ["a▁b", "▁", "c", "▁b", "a"]


def test_the_space_before_a_text():
    with_space, without = build("llama", add_space_prefix=None), build("llama", add_space_prefix=False)
    assert with_space.encode("the").tolist() == ids("llama", "▁the")
    assert without.encode(" the").tolist() == ids("llama", "▁the")
    assert with_space.decode(ids("llama", "▁the", "▁the")) == "the the"
    assert without.decode(ids("llama", "▁the", "▁the")) == " the the"
    assert with_space.encode("").tolist() == without.encode("").tolist() == []


def test_bytes_of_a_text_that_is_cut():
    half = ids("llama", "<0xE2>", "<0x98>")
    assert build("llama").decode(half) == "\ufffd\ufffd"
    assert build("llama").decode([*half, *ids("llama", "<0xBA>")]) == "☺"


def test_bos_comes_first_where_the_file_does_not_say():
    assert build("llama", add_bos_token=None).encode("the").tolist() == ids("llama", "<s>", "▁the")
    both = build("llama", add_bos_token=True, add_eos_token=True)
    assert both.encode("the").tolist() == ids("llama", "<s>", "▁the", "</s>")
    assert both.backend.encode("the").ids == ids("llama", "<s>", "▁the", "</s>")


def test_special_tokens_of_phi3_swallow_the_blanks_after_them():
    fields = metadata("llama")
    plain = tokenizer_from_gguf(fields).encode("<|tool|> \n the").tolist()
    assert plain[0] == ids("llama", "<|tool|>")[0]
    assert len(plain) > 2
    phi3 = tokenizer_from_gguf({**fields, "general.architecture": "phi3"})
    assert phi3.encode("<|tool|> \n the").tolist() == ids("llama", "<|tool|>", "▁the")
    assert phi3.encode("<s> the").tolist() == tokenizer_from_gguf(fields).encode("<s> the").tolist()


@pytest.mark.parametrize("name", MODELS)
def test_written_and_read_it_is_the_same(name, tmp_path):
    tokenizer = build(name)
    tokenizer_to_json(tokenizer, tmp_path)
    back = tokenizer_from_json(tmp_path)
    assert back.sha256 == tokenizer.sha256
    assert [back.encode(text).tolist() for text in TEXTS] == MODELS[name]["ids"]


LONG = [*MODELS["plain"]["tokens"][:-1], "a" * 2000]
NESTED = ["a" * length for length in range(1, 331)]  # 329 · 330 / 2 ways to make a token of two
BROKEN = {
    "no scores": ({"scores": None}, "metadata field tokenizer.ggml.scores is missing"),
    "scores": ({"scores": [0.0]}, "tokenizer.ggml.scores has 1 entries, tokenizer.ggml.tokens 330"),
    "nan": ({"scores": [np.nan, *[0.0] * 329]}, "tokenizer.ggml.scores holds nan for token 0"),
    "kinds": ({"token_type": [1]}, "tokenizer.ggml.token_type has 1 entries"),
    "no unknown token": (
        {"unknown_token_id": None, "token_type": [1] * 330},
        "neither an unknown token nor all byte tokens <0x00> to <0xFF>",
    ),
    "unknown": ({"unknown_token_id": 330}, "unknown_token_id is 330; the vocabulary has 330 tokens"),
    "blanks": ({"remove_extra_whitespaces": True}, "normalises text .* not supported"),
    "charsmap": ({"precompiled_charsmap": np.ones(4, np.int8)}, "normalises text .* not supported"),
    "prefix": ({"add_space_prefix": 1}, "add_space_prefix is a int, not bool"),
    "long token": ({"tokens": LONG}, "tokenizer.ggml.tokens is damaged: token 329 has 2000 characters"),
    "too many merges": (
        {"tokens": NESTED, "token_type": [1] * 329 + [2]},
        "can be made in 2.* ways; at most 1024, and",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_is_wrong_with_metadata_is_named(case):
    changes, message = BROKEN[case]
    with pytest.raises(InputError, match=message) as caught:
        tokenizer_from_gguf(metadata("plain", **changes), source="file.gguf")
    assert str(caught.value).startswith("file.gguf: ")
    assert "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def gemma() -> Tokenizer:
    path = Path(sys.prefix) / "share" / "jquant" / "gemma-3-270m-q4_k_m.gguf"
    return tokenizer_from_gguf(open_gguf(path).metadata, source=str(path))


@pytest.mark.slow
def test_gemma_equals_sentencepiece(gemma):
    for text, expected in zip(TEXTS, GOLDEN["gemma3_ids"], strict=True):
        assert gemma.encode(text, add_bos=False).tolist() == expected, text
        if "▁" not in text:
            assert gemma.decode(expected, skip_special=False) == text
    assert (gemma.bos_id, gemma.eos_ids, gemma.add_bos, gemma.add_eos) == (2, (1,), True, False)
    assert gemma.vocab_size == 262144
