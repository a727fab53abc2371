"""Byte-level BPE from GGUF metadata (`tokenizer.ggml.model` "gpt2"): its merges, and the pre-tokenizer that it names.

A GGUF says how text is cut before merging by a name alone. What stands here for a name is the cut that the models'
own tokenizer.json makes; where llama.cpp does otherwise, that is said beside it.

Reference: llama.cpp's llama-vocab.cpp for what the names mean.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

from jquant.core.errors import InputError
from jquant.io.mapped import shown
from jquant.io.tokenizer import one_line
from jquant.io.tokenizer_fields import CONTROL, UNKNOWN, USER_DEFINED, Fields, Vocabulary, read_vocabulary


def bpe_backend(fields: Fields) -> tuple[tokenizers.Tokenizer, bool]:
    """The BPE tokenizer that the fields describe, and whether BOS comes first where they do not say.

    Raises:
        InputError: the pre-tokenizer is not known, or the fields are missing or contradict.
    """
    name: str = fields.get("pre", str)
    pre = PRE_TOKENIZERS.get(ALIASES.get(name, name))
    if pre is None:
        known = ", ".join([*PRE_TOKENIZERS, *ALIASES])
        raise InputError(f"{fields.source}: tokenizer.ggml.pre {shown(name)} is not known; known: {known}")
    vocabulary = read_vocabulary(fields)
    backend = merging_backend(fields, vocabulary, _pairs(fields), ignore_merges=pre.ignore_merges)
    backend.add_tokens(
        [AddedToken(token, special=True, normalized=False) for token in vocabulary.of_kind(UNKNOWN, CONTROL)]
        + [AddedToken(token, special=False, normalized=False) for token in vocabulary.of_kind(USER_DEFINED)]
    )
    backend.normalizer = pre.normalizer()  # pyright: ignore[reportAttributeAccessIssue]
    backend.pre_tokenizer = pre.split()  # pyright: ignore[reportAttributeAccessIssue]
    backend.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    return backend, pre.add_bos


def merging_backend(
    fields: Fields, vocabulary: Vocabulary, merges: list[tuple[str, str]], **options: Any
) -> tokenizers.Tokenizer:
    """A bare BPE model: no cut, no added tokens. `options` are those of `tokenizers.models.BPE`."""
    try:
        return tokenizers.Tokenizer(models.BPE(vocab=vocabulary.index, merges=merges, **options))
    except Exception as error:  # tokenizers raises nothing more exact
        raise InputError(f"{fields.source}: tokenizer.ggml.merges: {one_line(error)}") from error


def _pairs(fields: Fields) -> list[tuple[str, str]]:
    """The merges, each 'left right'. As in llama.cpp, the first character belongs to the left even if it is a space."""
    merges: list[str] = fields.get("merges", list)
    cuts = [merge.find(" ", 1) for merge in merges]
    if -1 in cuts:
        index = cuts.index(-1)
        raise InputError(
            f"{fields.source}: entry {index} of tokenizer.ggml.merges, {shown(merges[index])}, is no pair 'left right'"
        )
    return [(merge[:cut], merge[cut + 1 :]) for merge, cut in zip(merges, cuts, strict=True)]


@dataclass(frozen=True, kw_only=True)
class PreTokenizer:
    """What one value of `tokenizer.ggml.pre` stands for."""

    split: Callable[[], Any]  # text to the pieces that BPE merges within
    normalizer: Callable[[], Any] = lambda: None
    ignore_merges: bool = False  # a piece that is itself a token is taken whole
    add_bos: bool = False  # where tokenizer.ggml.add_bos_token is absent


# The GPT-2 pattern without its last branch: what it leaves over is a piece of its own.
GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
REST_PATTERN = (  # digits in runs of {digits}; a run of signs may end in newlines, or in {also} too
    r"|\p{{N}}{{1,{digits}}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n{also}]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"  # with the one sign before it
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
CASED_WORDS = tuple(  # also cut between a lower-case and an upper-case letter
    rf"[^\r\n\p{{L}}\p{{N}}]?{letters}" for letters in (f"{UPPER}*{LOWER}+", f"{UPPER}+{LOWER}*")
)


def _by_patterns(*patterns: str) -> Any:
    """Each pattern cuts the pieces of the one before; then bytes become printable characters."""
    splits = [pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in patterns]
    return pre_tokenizers.Sequence([*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def _gpt2() -> Any:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)


def _digits_then_gpt2() -> Any:
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _gpt2()])


def _llama3() -> Any:
    return _by_patterns(f"{CONTRACTIONS}|{WORD}" + REST_PATTERN.format(digits=3, also=""))


def _qwen2() -> Any:
    return _by_patterns(f"{CONTRACTIONS}|{WORD}" + REST_PATTERN.format(digits=1, also=""))


def _tekken() -> Any:
    return _by_patterns("|".join(CASED_WORDS) + REST_PATTERN.format(digits=1, also="/"))


def _gpt4o() -> Any:
    words = "|".join(f"{word}{CONTRACTIONS}?" for word in CASED_WORDS)
    return _by_patterns(words + REST_PATTERN.format(digits=3, also="/"))


def _llama_cpp_default() -> Any:
    return _by_patterns(r"[\p{P}\$\+<=>\^~\|]+", GPT2_PATTERN, r"\p{N}+", r"[0-9][0-9][0-9]")


PRE_TOKENIZERS = {
    "gpt-2": PreTokenizer(split=_gpt2),  # GPT-2, OPT
    "smollm": PreTokenizer(split=_digits_then_gpt2),  # SmolLM, SmolLM2
    "llama-bpe": PreTokenizer(split=_llama3, ignore_merges=True, add_bos=True),  # Llama 3
    "dbrx": PreTokenizer(split=_llama3),  # Phi-4
    # llama.cpp leaves out the NFC of Qwen's own tokenizer.json, which is followed here.
    "qwen2": PreTokenizer(split=_qwen2, normalizer=normalizers.NFC),  # Qwen2, Qwen3, Qwen3-MoE
    "deepseek-r1-qwen": PreTokenizer(split=_qwen2),
    "tekken": PreTokenizer(split=_tekken, ignore_merges=True, add_bos=True),  # Mistral since Nemo
    "gpt-4o": PreTokenizer(split=_gpt4o),  # Phi-4-mini
    "default": PreTokenizer(split=_llama_cpp_default),
}
ALIASES = {"llama3": "llama-bpe", "llama-v3": "llama-bpe", "smaug-bpe": "dbrx"}


def pre_tokenizer_name(said: dict[str, Any], source: str) -> str:
    """What a GGUF calls the cut that a tokenizer.json makes before merging.

    Args:
        said: the tokenizer.json, parsed.
        source: its file's name, for errors.

    Raises:
        InputError: it has no name.
    """
    for name, pre in PRE_TOKENIZERS.items():
        bare = tokenizers.Tokenizer(models.BPE(ignore_merges=pre.ignore_merges))
        bare.normalizer = pre.normalizer()  # pyright: ignore[reportAttributeAccessIssue]
        bare.pre_tokenizer = pre.split()  # pyright: ignore[reportAttributeAccessIssue]
        mine = json.loads(bare.to_str())
        if _cut(mine) == _cut(said):
            return name
    raise InputError(
        f"{source}: its pre-tokenizer has no name among {', '.join(PRE_TOKENIZERS)}, and a GGUF says it by name alone: "
        "export another format"
    )


def _cut(said: dict[str, Any]) -> Any:
    """What decides the pieces; offsets into the text do not."""

    def plain(node: Any) -> Any:
        if isinstance(node, dict):
            return {name: plain(value) for name, value in node.items() if name != "trim_offsets"}
        return [plain(each) for each in node] if isinstance(node, list) else node

    return plain([said.get("pre_tokenizer"), said.get("normalizer"), bool(said["model"].get("ignore_merges"))])
