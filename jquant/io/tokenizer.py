"""Text to token ids and back, as the checkpoint defines it: from tokenizer.json, or rebuilt from GGUF metadata.

Encoding and merging are the work of Hugging Face's `tokenizers`; what is decided here is the pre-tokenizer that a GGUF
only names, which tokens are special, and whether a text starts with BOS.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

from jquant.core.errors import InputError
from jquant.io.atomic import replacing
from jquant.io.json_file import read_json_if_there
from jquant.io.mapped import shown


@dataclass(frozen=True, kw_only=True, eq=False)
class Tokenizer:
    """A tokenizer that does not change. `backend` must not be altered by its holder."""

    backend: tokenizers.Tokenizer = field(repr=False)
    bos_id: int | None
    eos_ids: tuple[int, ...]
    add_bos: bool  # whether the checkpoint wants BOS before every text

    def __post_init__(self) -> None:
        if self.add_bos and self.bos_id is None:
            raise InputError("the checkpoint asks for a BOS token before every text and defines none")
        for name, token in [("BOS", self.bos_id), *(("EOS", token) for token in self.eos_ids)]:
            if token is not None and not 0 <= token < self.vocab_size:
                raise InputError(f"{name} token id {token} is outside the vocabulary of {self.vocab_size}")

    def encode(self, text: str, *, add_bos: bool | None = None) -> np.ndarray:
        """Token ids of a text.

        The text of a special token ("<|endoftext|>") inside `text` becomes that token, as in Hugging Face's own use.

        Args:
            text: any text; a few million characters are fine (0.4 µs a character).
            add_bos: whether BOS comes first; None: as the checkpoint says.

        Returns:
            int32[tokens].

        Raises:
            InputError: BOS is asked for and there is none, or the text is not valid Unicode.
        """
        bos = self.add_bos if add_bos is None else add_bos
        if bos and self.bos_id is None:
            raise InputError("add_bos=True, but this tokenizer has no BOS token: use add_bos=False")
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise InputError(f"the text is not valid Unicode at character {error.start}: {error.reason}") from error
        ids = self.backend.encode_batch_fast([text], add_special_tokens=False)[0].ids
        return np.array([self.bos_id, *ids] if bos else ids, np.int32)

    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        """The text of token ids; special tokens are left out unless `skip_special` is False.

        Ids past the vocabulary (padding rows of an embedding) have no text and add none. Bytes that are no UTF-8 show
        as U+FFFD.
        """
        return self.backend.decode([int(token) for token in ids], skip_special_tokens=skip_special)

    @functools.cached_property
    def vocab_size(self) -> int:
        """One more than the largest token id."""
        return max(self.backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    @functools.cached_property
    def sha256(self) -> str:
        """Fingerprint of everything that decides the ids: the serialised definition, BOS, EOS and add_bos."""
        choices = json.dumps({"bos_id": self.bos_id, "eos_ids": self.eos_ids, "add_bos": self.add_bos})
        return hashlib.sha256(f"{self.backend.to_str()}\n{choices}".encode()).hexdigest()


def tokenizer_from_json(path: str | os.PathLike[str]) -> Tokenizer:
    """Reads a tokenizer.json, or the one in a checkpoint folder, with the two configs beside it.

    BOS is tokenizer_config.json's `bos_token`, else generation_config.json's `bos_token_id`. EOS are all of
    generation_config.json's `eos_token_id`, then tokenizer_config.json's `eos_token`. BOS is added where
    `add_bos_token` says so; where it is absent, as the post-processor of tokenizer.json does.

    Raises:
        InputError: a file is missing or damaged, or names a token that the vocabulary lacks.
    """
    path = Path(path)
    file = path / "tokenizer.json" if path.is_dir() else path
    if not file.exists():
        also = " (a SentencePiece tokenizer.model is not read)" if (file.parent / "tokenizer.model").exists() else ""
        raise InputError(f"{file}: there is no such file{also}: save the tokenizer as tokenizer.json")
    backend = _parse_backend(file)
    config_file, generation_file = file.parent / "tokenizer_config.json", file.parent / "generation_config.json"
    config, generation = read_json_if_there(config_file), read_json_if_there(generation_file)
    named_bos = _token_named_in(config, "bos_token", backend, config_file)
    named_eos = _token_named_in(config, "eos_token", backend, config_file)
    bos = [*named_bos, *_ids_in(generation, "bos_token_id", generation_file)]
    eos = [*_ids_in(generation, "eos_token_id", generation_file), *named_eos]
    bos_id = bos[0] if bos else None
    add_bos = config.get("add_bos_token")
    if add_bos is None:
        add_bos = bos_id is not None and backend.encode("").ids[:1] == [bos_id]
    if type(add_bos) is not bool:
        raise InputError(f"{config_file}: add_bos_token is {shown(str(add_bos))}; expected true or false")
    return _checked(file, backend=backend, bos_id=bos_id, eos_ids=tuple(dict.fromkeys(eos)), add_bos=add_bos)


def _parse_backend(file: Path) -> tokenizers.Tokenizer:
    """The definition alone: a file may also ask for truncation and padding, which would silently cut texts."""
    try:
        backend = tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # tokenizers raises nothing more exact
        raise InputError(f"{file}: is no tokenizer that `tokenizers` reads: {_one_line(error)}") from error
    backend.no_truncation()
    backend.no_padding()
    return backend


def _token_named_in(config: dict[str, Any], key: str, backend: tokenizers.Tokenizer, file: Path) -> list[int]:
    """The id of the token that tokenizer_config.json names, by its text or as {"content": text}; or nothing."""
    token = config.get(key)
    if isinstance(token, dict):
        token = token.get("content")
    if token is None:
        return []
    index = backend.token_to_id(token) if isinstance(token, str) else None
    if index is None:
        raise InputError(f"{file}: {key} is {shown(str(token))}, which is no token of the tokenizer.json beside it")
    return [index]


def _ids_in(config: dict[str, Any], key: str, file: Path) -> list[int]:
    """The ids that generation_config.json gives, as a number or a list; or nothing."""
    value = config.get(key)
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if not all(type(token) is int for token in ids):
        raise InputError(f"{file}: {key} is {shown(str(value))}; expected a token id or a list of them")
    return ids


def _checked(
    source: str | Path, *, backend: tokenizers.Tokenizer, bos_id: int | None, eos_ids: tuple[int, ...], add_bos: bool
) -> Tokenizer:
    """The tokenizer, its constructor's errors led by the file's name."""
    try:
        return Tokenizer(backend=backend, bos_id=bos_id, eos_ids=eos_ids, add_bos=add_bos)
    except InputError as error:
        raise InputError(f"{source}: {error}") from error


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def tokenizer_to_json(tokenizer: Tokenizer, folder: str | os.PathLike[str]) -> None:
    """Writes tokenizer.json, tokenizer_config.json and generation_config.json, from which `tokenizer_from_json` gives
    the same tokenizer (equal `sha256`) and transformers an equal one."""
    folder = Path(folder)
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": tokenizer.add_bos}
    generation: dict[str, Any] = {}
    if tokenizer.bos_id is not None:
        config["bos_token"] = tokenizer.backend.id_to_token(tokenizer.bos_id)
        generation["bos_token_id"] = tokenizer.bos_id
    if tokenizer.eos_ids:
        config["eos_token"] = tokenizer.backend.id_to_token(tokenizer.eos_ids[0])
        generation["eos_token_id"] = list(tokenizer.eos_ids)
    texts = {
        "tokenizer.json": tokenizer.backend.to_str(),
        "tokenizer_config.json": json.dumps(config, indent=2, ensure_ascii=False),
        "generation_config.json": json.dumps(generation, indent=2),
    }
    for name, text in texts.items():
        with replacing(folder / name) as file:
            file.write(text.encode())


def tokenizer_from_gguf(metadata: Mapping[str, Any], *, source: str = "GGUF") -> Tokenizer:
    """Builds the tokenizer that a GGUF's `tokenizer.ggml.*` fields describe.

    Args:
        metadata: as `open_gguf` returns it.
        source: the file's name, for errors.

    Raises:
        InputError: the tokenizer model or pre-tokenizer is not known, or the fields are missing or contradict.

    Reference: ggml/docs/gguf.md; llama.cpp's llama-vocab.cpp for what each pre-tokenizer's name means.
    """
    fields = _Fields(metadata, source)
    model = fields.get("model", str)
    if model != "gpt2":
        raise InputError(
            f"{source}: tokenizer.ggml.model {shown(model)} is not supported; jquant builds byte-level BPE ('gpt2')"
        )
    name = fields.get("pre", str)
    if name not in PRE_TOKENIZERS:
        raise InputError(f"{source}: tokenizer.ggml.pre {shown(name)} is not known; known: {', '.join(PRE_TOKENIZERS)}")
    pre = PRE_TOKENIZERS[name]
    backend = _bpe_backend(fields, ignore_merges=pre.ignore_merges)
    backend.normalizer = pre.normalizer()  # pyright: ignore[reportAttributeAccessIssue]
    backend.pre_tokenizer = pre.split()  # pyright: ignore[reportAttributeAccessIssue]
    backend.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    bos_id = fields.token_id("bos_token_id")
    add_bos = fields.get("add_bos_token", bool, pre.add_bos)
    if add_bos and bos_id is not None:
        # jquant adds BOS itself; this is for whoever loads the tokenizer.json that is made of it.
        bos = backend.id_to_token(bos_id)
        backend.post_processor = processors.TemplateProcessing(  # pyright: ignore[reportAttributeAccessIssue]
            single=[bos, "$A"], pair=[bos, "$A", bos, "$B:1"], special_tokens=[(bos, bos_id)]
        )
    stops = [fields.token_id(f"{stop}_token_id") for stop in ("eos", "eot", "eom")]
    eos_ids = tuple(dict.fromkeys(stop for stop in stops if stop is not None))
    return _checked(source, backend=backend, bos_id=bos_id, eos_ids=eos_ids, add_bos=add_bos)


@dataclass(frozen=True, kw_only=True)
class PreTokenizer:
    """What llama.cpp does for one value of `tokenizer.ggml.pre`."""

    split: Callable[[], Any]  # text to the pieces that BPE merges within
    normalizer: Callable[[], Any] = lambda: None
    ignore_merges: bool = False  # a piece that is itself a token is taken whole
    add_bos: bool = False  # where tokenizer.ggml.add_bos_token is absent


# The GPT-2 pattern without its last branch: what it leaves over is a piece of its own.
GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
WORDS_PATTERN = (  # digits in runs of {digits}; Llama 3's and Qwen 2's tokenizer.json
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,{digits}}}"
    r"| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
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
    return _by_patterns(WORDS_PATTERN.format(digits=3))


def _qwen2() -> Any:
    return _by_patterns(WORDS_PATTERN.format(digits=1))


def _llama_cpp_default() -> Any:
    return _by_patterns(r"[\p{P}\$\+<=>\^~\|]+", GPT2_PATTERN, r"\p{N}+", r"[0-9][0-9][0-9]")


PRE_TOKENIZERS = {
    "gpt-2": PreTokenizer(split=_gpt2),
    "smollm": PreTokenizer(split=_digits_then_gpt2),
    "llama-bpe": PreTokenizer(split=_llama3, ignore_merges=True, add_bos=True),
    # llama.cpp leaves out the NFC of Qwen's own tokenizer.json, which is followed here.
    "qwen2": PreTokenizer(split=_qwen2, normalizer=normalizers.NFC),
    "default": PreTokenizer(split=_llama_cpp_default),
}

# enum llama_token_type
UNKNOWN, CONTROL, USER_DEFINED = 2, 3, 4
_REQUIRED: Any = object()


class _Fields:
    """Typed access to the `tokenizer.ggml.*` metadata."""

    def __init__(self, metadata: Mapping[str, Any], source: str) -> None:
        self.source = source
        self._metadata = metadata

    def get(self, name: str, kind: type, default: Any = _REQUIRED) -> Any:
        """The field as int, bool, str, list[str] (`kind` list) or numpy array, or `default` where it is absent."""
        key = f"tokenizer.ggml.{name}"
        if key not in self._metadata:
            if default is _REQUIRED:
                raise InputError(f"{self.source}: metadata field {key} is missing: convert the model again")
            return default
        value = self._metadata[key]
        if type(value) is not kind:
            raise InputError(f"{self.source}: metadata field {key} is a {type(value).__name__}, not {kind.__name__}")
        return value

    def token_id(self, name: str) -> int | None:
        """The field as the index of a token, None where it is absent."""
        value, count = self.get(name, int, None), len(self.get("tokens", list))
        if value is not None and not 0 <= value < count:
            raise InputError(f"{self.source}: tokenizer.ggml.{name} is {value}; the vocabulary has {count} tokens")
        return value


def _bpe_backend(fields: _Fields, *, ignore_merges: bool) -> tokenizers.Tokenizer:
    """A BPE model with its added tokens: control and unknown tokens special, user-defined ones not."""
    tokens: list[str] = fields.get("tokens", list)
    merges: list[str] = fields.get("merges", list)
    kinds: np.ndarray = fields.get("token_type", np.ndarray)
    if len(kinds) != len(tokens):
        raise InputError(
            f"{fields.source}: tokenizer.ggml.token_type has {len(kinds)} entries, tokenizer.ggml.tokens {len(tokens)}"
        )
    vocab = {token: index for index, token in enumerate(tokens)}
    if len(vocab) != len(tokens):
        index = next(index for index, token in enumerate(tokens) if vocab[token] != index)
        raise InputError(f"{fields.source}: tokenizer.ggml.tokens holds {shown(tokens[index])} twice")
    # The first character belongs to the left part even where it is a space, as in llama.cpp.
    cuts = [merge.find(" ", 1) for merge in merges]
    if -1 in cuts:
        index = cuts.index(-1)
        raise InputError(
            f"{fields.source}: entry {index} of tokenizer.ggml.merges, {shown(merges[index])}, is no pair 'left right'"
        )
    pairs = [(merge[:cut], merge[cut + 1 :]) for merge, cut in zip(merges, cuts, strict=True)]
    try:
        backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=pairs, ignore_merges=ignore_merges))
    except Exception as error:  # tokenizers raises nothing more exact
        raise InputError(f"{fields.source}: tokenizer.ggml.merges: {_one_line(error)}") from error
    added = [
        AddedToken(tokens[index], special=int(kinds[index]) != USER_DEFINED, normalized=False)
        for index in np.flatnonzero(np.isin(kinds, (UNKNOWN, CONTROL, USER_DEFINED)))
    ]
    backend.add_tokens(added)
    return backend
