"""SentencePiece's BPE from GGUF metadata (`tokenizer.ggml.model` "llama": Llama 2, Mistral, Mixtral, Gemma, Phi-3).

The file holds tokens with scores and no merges. Of all neighbours whose joined text is a token, SentencePiece joins
those whose token has the highest score, the leftmost of equals. Here the same order is a list of merges: for each
token, highest score first, every way to make it of two others.

Where text and tokens meet, as SentencePiece has it: a space is "▁"; a text starts with one more of them where
`add_space_prefix` says so; a character that is no token becomes the tokens of its UTF-8 bytes. Control tokens, which
SentencePiece never finds in a text, are found here. After one, or a token of the user's, the rest starts with a space
as a new text would: so do Llama 2's own tokenizer.json and llama.cpp, where SentencePiece adds one to a text.

Reference: Kudo and Richardson, "SentencePiece", 2018; llama.cpp's llama-vocab.cpp.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import tokenizers
from tokenizers import AddedToken, Regex, decoders, normalizers, pre_tokenizers

from jquant.core.errors import InputError
from jquant.io.tokenizer_bpe import merging_backend
from jquant.io.tokenizer_fields import BYTE, CONTROL, NORMAL, UNKNOWN, USER_DEFINED, Fields, Vocabulary, read_vocabulary

SPACE = "▁"
BYTE_TOKENS = frozenset(f"<0x{byte:02X}>" for byte in range(256))
# As in llama.cpp: Phi-3's added tokens swallow the blanks after them, which a GGUF cannot say.
STRIPPING_ARCHITECTURES = ("phi3",)
NOT_STRIPPING = ("<unk>", "<s>", "<|endoftext|>")
# Far beyond what models have (Gemma 3: tokens of up to 16 characters, 2.0 merges a token). Unbounded, a file of a
# megabyte could ask for minutes and gigabytes.
MAX_LENGTH = 1024
MAX_MERGES = 64  # for each token, on average


def spm_backend(fields: Fields) -> tuple[tokenizers.Tokenizer, bool]:
    """The SentencePiece tokenizer that the fields describe, and True: BOS comes first where they do not say.

    Raises:
        InputError: the fields are missing or contradict, or ask for what is not supported.
    """
    _refuse_unsupported(fields)
    vocabulary = _with_plain_spaces(read_vocabulary(fields))
    backend = merging_backend(
        fields,
        vocabulary,
        _merges(vocabulary, _scores(fields), fields.source),
        byte_fallback=_has_bytes(vocabulary),
        unk_token=_unknown(fields, vocabulary),
        fuse_unk=True,
    )
    prefix = fields.get("add_space_prefix", bool, True)
    backend.normalizer = normalizers.Sequence(  # pyright: ignore[reportAttributeAccessIssue]
        [*([normalizers.Prepend(SPACE)] if prefix else []), normalizers.Replace(" ", SPACE)]
    )
    backend.pre_tokenizer = _words(vocabulary)  # pyright: ignore[reportAttributeAccessIssue]
    backend.decoder = decoders.Sequence(  # pyright: ignore[reportAttributeAccessIssue]
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
        + ([decoders.Strip(" ", left=1, right=0)] if prefix else [])
    )
    backend.add_tokens(_added_tokens(fields, vocabulary, prefix=prefix))
    return backend, True


def is_spm(said: Mapping[str, Any]) -> bool:
    """Whether a tokenizer.json's BPE is SentencePiece's: spaces are "▁", not bytes spelled as letters."""
    return any(part.get("type") in ("Replace", "Metaspace") for part in _parts(said))


def spm_fields(said: Mapping[str, Any], tokens: Sequence[str], kinds: np.ndarray, source: str) -> dict[str, Any]:
    """The fields of a GGUF, beside tokens and their kinds, for SentencePiece's BPE in a tokenizer.json.

    A score is minus the rank of the token's first merge, which is what SentencePiece's trainer gives. Byte tokens and
    the unknown one are marked in `kinds`.

    Raises:
        InputError: its merges are not those that scores of tokens give, or it changes texts as a GGUF cannot say.

    Reference: Kudo and Richardson, "SentencePiece", 2018, 3.1; convert_hf_to_gguf.py for the names of fields.
    """
    model = said["model"]
    merges = [tuple(merge.split(" ") if isinstance(merge, str) else merge) for merge in model["merges"]]
    scores = np.full(len(tokens), -float(len(merges) + 1), np.float32)  # of those that nothing is merged into
    numbers = {token: number for number, token in enumerate(tokens)}
    made = [left + right for left, right in merges]
    for rank, token in reversed(list(enumerate(dict.fromkeys(made)))):
        scores[numbers[token]] = -rank
    unknown = model.get("unk_token")
    if unknown is not None:
        kinds[numbers[unknown]] = UNKNOWN
    if model.get("byte_fallback"):
        for token in BYTE_TOKENS & numbers.keys():
            kinds[numbers[token]] = BYTE
    scores[kinds != NORMAL] = 0
    vocabulary = Vocabulary(tokens=list(tokens), kinds=kinds, index=numbers)
    again = _merges(vocabulary, scores.astype(np.float64), source)
    order = list(dict.fromkeys(left + right for left, right in again))
    if set(again) != set(merges) or order != list(dict.fromkeys(made)):
        raise InputError(
            f"{source}: its {len(merges)} merges are not those that SentencePiece makes of the tokens' scores "
            f"({len(again)}), and a GGUF can say nothing else: export another format"
        )
    fields = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.add_space_prefix": _adds_a_space(said, source),
    }
    if unknown is not None:
        fields["tokenizer.ggml.unknown_token_id"] = numbers[unknown]
    return fields


def _parts(said: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Normalizers and pre-tokenizers, in their order."""
    found: list[Mapping[str, Any]] = []
    for name, members in (("normalizer", "normalizers"), ("pre_tokenizer", "pretokenizers")):
        part = said.get(name)
        if part is not None:
            found += part[members] if part["type"] == "Sequence" else [part]
    return found


def _adds_a_space(said: Mapping[str, Any], source: str) -> bool:
    """Whether a text starts with a space more. Raises InputError where a text is changed otherwise."""
    adds = False
    for part in _parts(said):
        match part["type"]:
            case "Prepend" if part["prepend"] == SPACE:
                adds = True
            case "Metaspace":
                adds = part.get("prepend_scheme", "always") != "never"
            case "Replace" if part["content"] == SPACE and part["pattern"] == {"String": " "}:
                pass
            case "Split":  # where words are cut, which no merge crosses
                pass
            case other:
                raise InputError(
                    f"{source}: its tokenizer changes texts by {other}, which a GGUF cannot say: export another format"
                )
    return adds


def _added_tokens(fields: Fields, vocabulary: Vocabulary, *, prefix: bool) -> list[AddedToken]:
    """The tokens that a text is searched for before anything is merged; the longest that starts first is taken.

    SentencePiece searches for the user's own after spaces have become "▁", and so is done here, unless texts start with
    a space more: `tokenizers` would want it before each of them. Only a text that itself holds "▁" shows a difference.
    """
    stripping = fields.architecture in STRIPPING_ARCHITECTURES

    def added(token: str, *, special: bool, normalized: bool) -> AddedToken:
        rstrip = stripping and token not in NOT_STRIPPING
        return AddedToken(token, special=special, normalized=normalized, rstrip=rstrip)

    special = [added(token, special=True, normalized=False) for token in vocabulary.of_kind(UNKNOWN, CONTROL)]
    user_defined = vocabulary.of_kind(USER_DEFINED)
    return special + [added(token, special=False, normalized=not prefix) for token in user_defined]


def _refuse_unsupported(fields: Fields) -> None:
    """Normalisation that no model of these families asks for, and that would change ids silently if left out."""
    if fields.get("remove_extra_whitespaces", bool, False) or len(fields.get("precompiled_charsmap", np.ndarray, ())):
        raise InputError(
            f"{fields.source}: its SentencePiece model normalises text (remove_extra_whitespaces or "
            "precompiled_charsmap), which is not supported"
        )


def _with_plain_spaces(vocabulary: Vocabulary) -> Vocabulary:
    """User-defined tokens are searched for in the text itself, where a space is a space: "▁▁" is written "  ".

    Newer converters write them so already.
    """
    tokens, index = list(vocabulary.tokens), dict(vocabulary.index)
    for number in np.flatnonzero(vocabulary.kinds == USER_DEFINED).tolist():
        plain = tokens[number].replace(SPACE, " ")
        if plain not in index:
            del index[tokens[number]]
            tokens[number], index[plain] = plain, number
    return Vocabulary(tokens=tokens, kinds=vocabulary.kinds, index=index)


def _scores(fields: Fields) -> np.ndarray:
    scores = fields.per_token("scores").astype(np.float64)  # of unsigned numbers and truth values no minus can be taken
    if not np.isfinite(scores).all():
        number = int(np.flatnonzero(~np.isfinite(scores))[0])
        raise InputError(f"{fields.source}: tokenizer.ggml.scores holds {scores[number]} for token {number}")
    return scores


def _merges(vocabulary: Vocabulary, scores: np.ndarray, source: str) -> list[tuple[str, str]]:
    """Every way to make a token of two others, by falling score of the token made.

    Only normal tokens take part: the others are found in the text before, or stand for single bytes.
    """
    normal = np.flatnonzero(vocabulary.kinds == NORMAL)
    by_score = normal[np.argsort(-scores[normal], kind="stable")].tolist()
    known = {vocabulary.tokens[number] for number in by_score}
    merges = []
    for number in by_score:
        token = vocabulary.tokens[number]
        if len(token) > MAX_LENGTH or len(merges) > MAX_MERGES * len(known):
            raise InputError(
                f"{source}: tokenizer.ggml.tokens is damaged: token {number} has {len(token)} characters, and those "
                f"before it can be made in {len(merges)} ways; at most {MAX_LENGTH}, and {MAX_MERGES} a token, are read"
            )
        for cut in range(1, len(token)):
            # Most beginnings are no token: the end is looked up only where the beginning is one.
            if (left := token[:cut]) in known and (right := token[cut:]) in known:
                merges.append((left, right))
    return merges


def _has_bytes(vocabulary: Vocabulary) -> bool:
    return set(vocabulary.of_kind(BYTE)) >= BYTE_TOKENS


def _unknown(fields: Fields, vocabulary: Vocabulary) -> str | None:
    """The token for what is neither a token nor, where there are byte tokens, bytes."""
    number = fields.token_id("unknown_token_id")
    unknown = vocabulary.of_kind(UNKNOWN) if number is None else [vocabulary.tokens[number]]
    if not unknown and not _has_bytes(vocabulary):
        raise InputError(
            f"{fields.source}: its vocabulary has neither an unknown token nor all byte tokens <0x00> to <0xFF>: "
            "there are texts it cannot encode"
        )
    return unknown[0] if unknown else None


def _words(vocabulary: Vocabulary) -> pre_tokenizers.PreTokenizer:
    """Cuts before a "▁" wherever no token crosses, which changes no merge and lets words be merged once and remembered.

    A token may hold "▁" after another character (Gemma's ">▁</"): there nothing is cut.
    """
    inside = (token for token in vocabulary.of_kind(NORMAL) if SPACE in token[1:])
    crossing = {before for token in inside for before in re.findall(f"[^{SPACE}](?={SPACE})", token)}
    kept = re.escape("".join(sorted(crossing)))
    return pre_tokenizers.Split(Regex(f"(?<=[^{SPACE}{kept}])(?={SPACE})"), behavior="isolated")
