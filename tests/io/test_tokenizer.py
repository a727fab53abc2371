"""Tokenizers against plain Python BPE (scripts/goldens/tokenizer.py), and what they make of files."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from tokenizers import models, pre_tokenizers, processors

from jquant.core.errors import InputError
from jquant.io.gguf import open_gguf
from jquant.io.tokenizer import tokenizer_from_json, tokenizer_to_json
from jquant.io.tokenizer_bpe import ALIASES, PRE_TOKENIZERS
from jquant.io.tokenizer_gguf import tokenizer_from_gguf

GOLDEN = json.loads((Path(__file__).parents[1] / "goldens" / "tokenizer.json").read_text())
SAMPLES = GOLDEN["samples"]


@pytest.mark.parametrize("name", PRE_TOKENIZERS)
def test_pre_tokenizers_cut_as_the_patterns_say(name):
    normalizer, split = PRE_TOKENIZERS[name].normalizer(), PRE_TOKENIZERS[name].split()
    for text, expected in zip(SAMPLES, GOLDEN["pieces"][name], strict=True):
        text = normalizer.normalize_str(text) if normalizer is not None else text
        assert [piece for piece, _ in split.pre_tokenize_str(text)] == expected


def test_the_goldens_cover_every_pre_tokenizer():
    assert set(GOLDEN["pieces"]) == set(PRE_TOKENIZERS)
    assert GOLDEN["origin"]["regex"]


# A vocabulary small enough to encode by hand: specials, single signs, and what the merges make of them.
TOKENS = ["<s>", "</s>", "<t> x", "a", "b", "c", "Ġ", "4", "2", "ab", "Ġab", "abc", "42", "!"]
KINDS = [3, 3, 4, *[1] * 11]
FIELDS: dict[str, Any] = {
    "model": "gpt2",
    "pre": "gpt-2",
    "tokens": TOKENS,
    "token_type": np.array(KINDS, np.int32),
    "merges": ["a b", "Ġ ab", "4 2"],
    "bos_token_id": 0,
    "eos_token_id": 1,
    "add_bos_token": False,
}


def tiny(**changes: Any) -> dict[str, Any]:
    """The metadata with fields changed, or left out where None."""
    fields = {**FIELDS, **changes}
    return {f"tokenizer.ggml.{name}": value for name, value in fields.items() if value is not None}


def words(tokenizer: Any, text: str) -> list[str]:
    return [TOKENS[token] for token in tokenizer.encode(text)]


def test_encode_and_decode():
    tokenizer = tokenizer_from_gguf(tiny())
    ids = tokenizer.encode("ab abc")
    np.testing.assert_array_equal(ids, np.array([9, 10, 5], np.int32), strict=True)
    assert tokenizer.decode(ids) == "ab abc"
    assert words(tokenizer, "<s>ab</s><t> x a") == ["<s>", "ab", "</s>", "<t> x", "Ġ", "a"]
    assert tokenizer.decode(tokenizer.encode("<s>ab</s><t> x a")) == "ab<t> x a"
    assert tokenizer.decode(tokenizer.encode("<s>ab</s>"), skip_special=False) == "<s>ab</s>"
    assert tokenizer.vocab_size == len(TOKENS)
    assert tokenizer.decode([9, len(TOKENS) + 5]) == "ab"
    np.testing.assert_array_equal(tokenizer.encode(""), np.zeros(0, np.int32), strict=True)


def test_the_pre_tokenizer_decides():
    assert words(tokenizer_from_gguf(tiny()), "42") == ["42"]
    assert words(tokenizer_from_gguf(tiny(pre="smollm")), "42") == ["4", "2"]
    assert words(tokenizer_from_gguf(tiny(pre="qwen2")), "42") == ["4", "2"]


def test_llama_bpe_takes_a_piece_that_is_a_token_whole_and_adds_bos():
    """No merge leads to "abc"."""
    assert words(tokenizer_from_gguf(tiny()), "abc") == ["ab", "c"]
    assert words(tokenizer_from_gguf(tiny(pre="llama-bpe", add_bos_token=None)), "abc") == ["<s>", "abc"]
    assert words(tokenizer_from_gguf(tiny(pre="llama-bpe")), "abc") == ["abc"]


def test_bos():
    plain, wants = tokenizer_from_gguf(tiny()), tokenizer_from_gguf(tiny(add_bos_token=True))
    assert (plain.bos_id, plain.add_bos, wants.add_bos) == (0, False, True)
    assert [list(tokenizer.encode("a")) for tokenizer in (plain, wants)] == [[3], [0, 3]]
    assert list(plain.encode("a", add_bos=True)) == [0, 3]
    assert list(wants.encode("a", add_bos=False)) == [3]
    without = tokenizer_from_gguf(tiny(bos_token_id=None))
    assert without.bos_id is None
    with pytest.raises(InputError, match="has no BOS token: use add_bos=False"):
        without.encode("a", add_bos=True)


def test_eos():
    plain, wants = tokenizer_from_gguf(tiny()), tokenizer_from_gguf(tiny(add_eos_token=True, add_bos_token=True))
    assert (plain.add_eos, wants.add_eos) == (False, True)
    assert [list(tokenizer.encode("a")) for tokenizer in (plain, wants)] == [[3], [0, 3, 1]]
    assert list(plain.encode("a", add_eos=True)) == [3, 1]
    assert list(wants.encode("a", add_eos=False)) == [0, 3]
    assert wants.backend.encode("a").ids == [0, 3, 1]  # for others, who read the tokenizer.json made of it
    with pytest.raises(InputError, match="has no EOS token: use add_eos=False"):
        tokenizer_from_gguf(tiny(eos_token_id=None)).encode("a", add_eos=True)


@pytest.mark.parametrize("name", ["<a:b>", "$A", "$", ":"])
def test_any_token_may_be_bos(name):
    """The template that a tokenizer.json holds reads ":" and "$" in its own way."""
    tokenizer = tokenizer_from_gguf(tiny(tokens=[name, *TOKENS[1:]], add_bos_token=True))
    assert list(tokenizer.encode("a")) == tokenizer.backend.encode("a").ids == [0, 3]


@pytest.mark.parametrize("name", ALIASES)
def test_other_names_of_a_pre_tokenizer(name):
    fields = {"add_bos_token": None}
    ours, its = (tokenizer_from_gguf(tiny(pre=pre, **fields)) for pre in (name, ALIASES[name]))
    assert ours.sha256 == its.sha256


def test_all_ends_are_known():
    assert tokenizer_from_gguf(tiny(eot_token_id=2, eom_token_id=1)).eos_ids == (1, 2)
    assert tokenizer_from_gguf(tiny(eos_token_id=None)).eos_ids == ()


def test_text_that_is_no_unicode():
    with pytest.raises(InputError, match="not valid Unicode at character 2"):
        tokenizer_from_gguf(tiny()).encode("ab\ud800")


BROKEN = {
    "model": ({"model": "t5"}, r"tokenizer.ggml.model 't5' is not supported; .* BPE \('gpt2'\) and .* \('llama'\)"),
    "pre": ({"pre": "unheard-of"}, "pre 'unheard-of' is not known; known: gpt-2, smollm, .*, default, llama3"),
    "no pre": ({"pre": None}, "tokenizer.ggml.pre is missing"),
    "no model": ({"model": None}, "tokenizer.ggml.model is missing"),
    "no tokens": ({"tokens": None}, "tokenizer.ggml.tokens is missing"),
    "tokens of another type": ({"tokens": np.zeros(3)}, "tokenizer.ggml.tokens is a ndarray, not list"),
    "token twice": ({"tokens": [*TOKENS[:-1], "a"]}, "tokens holds 'a' twice"),
    "kinds": ({"token_type": np.zeros(3, np.int32)}, "token_type has 3 entries, tokenizer.ggml.tokens 14"),
    "merge": ({"merges": ["a b", "ab"]}, "entry 1 of tokenizer.ggml.merges, 'ab', is no pair"),
    "merge of no token": ({"merges": ["a zz"]}, "merges: .*zz"),
    "merge of signs": ({"merges": ["a \0"]}, r"merges: .*\\x00"),
    "bos": ({"bos_token_id": 14}, "bos_token_id is 14; the vocabulary has 14 tokens"),
    "eos": ({"eos_token_id": 2**64 - 1}, "eos_token_id is 18446744073709551615"),
    "negative": ({"eot_token_id": -1}, "eot_token_id is -1"),
    "bos text": ({"bos_token_id": "<s>"}, "bos_token_id is a str, not int"),
    "add_bos": ({"add_bos_token": 1}, "add_bos_token is a int, not bool"),
    "eos wanted": ({"eos_token_id": None, "add_eos_token": True}, "asks for an EOS token .* defines none"),
    "bos wanted": ({"bos_token_id": None, "add_bos_token": True}, "asks for a BOS token .* defines none"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_is_wrong_with_metadata_is_named(case):
    changes, message = BROKEN[case]
    with pytest.raises(InputError, match=message) as caught:
        tokenizer_from_gguf(tiny(**changes), source="file.gguf")
    assert str(caught.value).startswith("file.gguf: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "changes",
    [{}, {"pre": "llama-bpe", "add_bos_token": True}, {"pre": "qwen2", "eot_token_id": 2}, {"add_eos_token": True}],
)
def test_written_and_read_it_is_the_same(tmp_path, changes):
    tokenizer = tokenizer_from_gguf(tiny(**changes))
    tokenizer_to_json(tokenizer, tmp_path / "new")
    for path in (tmp_path / "new", tmp_path / "new" / "tokenizer.json"):
        back = tokenizer_from_json(path)
        assert (back.bos_id, back.eos_ids, back.add_bos) == (tokenizer.bos_id, tokenizer.eos_ids, tokenizer.add_bos)
        assert back.add_eos == tokenizer.add_eos
        assert back.sha256 == tokenizer.sha256
        np.testing.assert_array_equal(back.encode("<s>ab abc 42!"), tokenizer.encode("<s>ab abc 42!"))


def test_without_bos_and_eos_it_is_the_same(tmp_path):
    tokenizer = tokenizer_from_gguf(tiny(bos_token_id=None, eos_token_id=None))
    tokenizer_to_json(tokenizer, tmp_path)
    assert tokenizer_from_json(tmp_path).sha256 == tokenizer.sha256


def test_the_fingerprint_tells_tokenizers_apart():
    changes: list[dict[str, Any]] = [
        {},
        {"pre": "smollm"},
        {"pre": "llama-bpe"},
        {"merges": ["a b"]},
        {"eos_token_id": 2},
        {"add_bos_token": True},
        {"add_eos_token": True},
        {"token_type": np.array([3, 3, 3, *[1] * 11])},
    ]
    prints = [tokenizer_from_gguf(tiny(**change)).sha256 for change in changes]
    assert len(set(prints)) == len(changes)
    assert prints[0] == tokenizer_from_gguf(tiny()).sha256
    assert dataclasses.replace(tokenizer_from_gguf(tiny()), eos_ids=()).sha256 not in prints


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tokenizer.json as others write it: BOS by a template, with truncation and padding."""
    backend = tokenizers.Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(TOKENS)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore[reportAttributeAccessIssue]
    backend.post_processor = processors.TemplateProcessing(  # pyright: ignore[reportAttributeAccessIssue]
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 0)]
    )
    backend.enable_truncation(3)
    backend.enable_padding(length=3)
    backend.save(str(tmp_path / "tokenizer.json"))
    return tmp_path


def _write(folder: Path, **files: Any) -> None:
    for name, value in files.items():
        (folder / f"{name}.json").write_text(value if isinstance(value, str) else json.dumps(value))


def test_a_folder_without_configs(folder):
    tokenizer = tokenizer_from_json(folder)
    assert (tokenizer.bos_id, tokenizer.eos_ids, tokenizer.add_bos) == (None, (), False)
    assert words(tokenizer, "aaaaa") == ["a"] * 5  # neither truncated nor padded
    assert words(tokenizer, "b") == ["b"]


@pytest.mark.parametrize(
    ("config", "generation", "expected"),
    [
        ({"bos_token": "<s>", "eos_token": "</s>"}, None, (0, (1,), True)),
        ({"bos_token": {"content": "<s>"}, "eos_token": None}, None, (0, (), True)),
        ({"bos_token": "<s>", "add_bos_token": False}, None, (0, (), False)),
        ({"bos_token": "<s>", "add_bos_token": None}, None, (0, (), True)),
        ({"bos_token": "a"}, None, (3, (), False)),
        ({"eos_token": "</s>"}, {"bos_token_id": 0, "eos_token_id": [2, 1]}, (0, (2, 1), True)),
        ({"eos_token": "</s>"}, {"eos_token_id": 3}, (None, (3, 1), False)),
    ],
)
def test_bos_and_eos_of_a_folder(folder, config, generation, expected):
    _write(folder, tokenizer_config=config, **({"generation_config": generation} if generation else {}))
    tokenizer = tokenizer_from_json(folder)
    assert (tokenizer.bos_id, tokenizer.eos_ids, tokenizer.add_bos) == expected


BROKEN_FILES = {
    "no JSON": ({"tokenizer": "{"}, "tokenizer.json: is no tokenizer that `tokenizers` reads: EOF"),
    "another JSON": ({"tokenizer": {"a": 1}}, "is no tokenizer"),
    "config": ({"tokenizer_config": "["}, "tokenizer_config.json: is no JSON"),
    "bos": ({"tokenizer_config": {"bos_token": "<z>"}}, "tokenizer_config.json: bos_token is '<z>', which is no token"),
    "bos number": ({"tokenizer_config": {"bos_token": 1}}, "bos_token is '1', which is no token"),
    "add_bos": ({"tokenizer_config": {"add_bos_token": "yes"}}, "add_bos_token is 'yes'; expected true or false"),
    "add_eos": ({"tokenizer_config": {"add_eos_token": 1}}, "add_eos_token is '1'; expected true or false"),
    "eos text": (
        {"generation_config": {"eos_token_id": ["a"]}},
        r"generation_config.json: eos_token_id is .* expected",
    ),
    "eos outside": ({"generation_config": {"eos_token_id": 99}}, "EOS token id 99 is outside the vocabulary of 14"),
    "bos wanted": ({"tokenizer_config": {"add_bos_token": True}}, "asks for a BOS token"),
}


@pytest.mark.parametrize("case", BROKEN_FILES)
def test_what_is_wrong_with_files_is_named(folder, case):
    files, message = BROKEN_FILES[case]
    _write(folder, **files)
    with pytest.raises(InputError, match=message) as caught:
        tokenizer_from_json(folder)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_post_processor_of_a_token_that_is_not_defined(folder):
    """At which Rust panics."""
    definition = json.loads((folder / "tokenizer.json").read_text())
    single = [{"SpecialToken": {"id": "nope", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    definition["post_processor"] = {
        "type": "TemplateProcessing",
        "single": single,
        "pair": single,
        "special_tokens": {},
    }
    (folder / "tokenizer.json").write_text(json.dumps(definition))
    with pytest.raises(InputError, match=r"tokenizer\.json: its post-processor fails on an empty text: no entry found"):
        tokenizer_from_json(folder)


def test_a_part_that_fails_on_texts_alone(folder):
    definition = json.loads((folder / "tokenizer.json").read_text())
    definition["normalizer"] = [""]  # `tokenizers` reads it, and panics at a letter of two bytes
    (folder / "tokenizer.json").write_text(json.dumps(definition))
    with pytest.raises(InputError, match=r"tokenizer\.json: fails on a text: index out of bounds"):
        tokenizer_from_json(folder).encode("don't é")


def test_an_id_far_beyond_the_others(folder):
    """`tokenizers` would count up to it, and note every number on the way."""
    definition = json.loads((folder / "tokenizer.json").read_text())
    definition["model"]["vocab"]["far"] = 2**32 - 1
    (folder / "tokenizer.json").write_text(json.dumps(definition))
    with pytest.raises(InputError, match=r"tokenizer\.json: has a token of id 4294967295 among 1\d tokens"):
        tokenizer_from_json(folder)


def test_there_is_no_tokenizer(tmp_path):
    with pytest.raises(InputError, match=r"tokenizer\.json: there is no such file: save"):
        tokenizer_from_json(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"")
    with pytest.raises(InputError, match=r"SentencePiece tokenizer\.model is not read"):
        tokenizer_from_json(tmp_path)


@pytest.fixture(scope="module")
def demo(demo_gguf):
    return tokenizer_from_gguf(open_gguf(demo_gguf).metadata, source=str(demo_gguf))


@pytest.mark.slow
def test_the_demo_equals_plain_python_bpe(demo):
    for text, expected in zip(SAMPLES, GOLDEN["demo_ids"], strict=True):
        ids = demo.encode(text)
        assert ids.tolist() == expected
        assert demo.decode(ids, skip_special=False) == text
    assert (demo.bos_id, demo.eos_ids, demo.add_bos, demo.vocab_size) == (1, (2,), False, 49152)


@pytest.mark.slow
def test_the_demo_splits_digits_of_all_kinds(demo):
    tokens = [demo.backend.id_to_token(int(token)) for token in demo.encode("4 ½ months")]
    assert tokens == ["4", "Ġ", "Â½", "Ġmonths"]


@pytest.mark.slow
def test_a_long_text_is_encoded_whole(demo):
    text = "\n".join(SAMPLES) * 3000  # 2 million characters
    ids = demo.encode(text)
    assert demo.decode(ids, skip_special=False) == text


@pytest.mark.slow
def test_the_demo_written_and_read_is_the_same(demo, tmp_path):
    tokenizer_to_json(demo, tmp_path)
    back = tokenizer_from_json(tmp_path)
    assert back.sha256 == demo.sha256
    assert [back.encode(text).tolist() for text in SAMPLES] == GOLDEN["demo_ids"]
