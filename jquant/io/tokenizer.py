"""Text to token ids and back, as the checkpoint defines it; read from tokenizer.json and written to it.

Encoding and merging are the work of Hugging Face's `tokenizers`; what is decided here is whether a text starts with BOS
and ends with EOS. `tokenizer_gguf` makes the same of a GGUF's metadata.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from jquant.core.errors import InputError
from jquant.io.atomic import replacing
from jquant.io.json_file import read_json_if_there
from jquant.io.mapped import shown

CHAT_TEMPLATE = "chat_template.jinja"
MAX_GAP = 1 << 20  # ids without a token below the largest id


@dataclass(frozen=True, kw_only=True, eq=False)
class Tokenizer:
    """A tokenizer that does not change. `backend` must not be altered by its holder."""

    backend: tokenizers.Tokenizer = field(repr=False)
    bos_id: int | None
    eos_ids: tuple[int, ...]
    add_bos: bool  # whether the checkpoint wants BOS before every text
    add_eos: bool = False  # whether it wants the first of `eos_ids` after every text
    source: str = field(default="the tokenizer", repr=False)  # its file's name, for errors
    chat_template: str | None = field(default=None, repr=False)  # Jinja; carried along, not used here

    def __post_init__(self) -> None:
        if self.add_bos and self.bos_id is None:
            raise InputError("the checkpoint asks for a BOS token before every text and defines none")
        if self.add_eos and not self.eos_ids:
            raise InputError("the checkpoint asks for an EOS token after every text and defines none")
        for name, token in [("BOS", self.bos_id), *(("EOS", token) for token in self.eos_ids)]:
            if token is not None and not 0 <= token < self.vocab_size:
                raise InputError(f"{name} token id {token} is outside the vocabulary of {self.vocab_size}")

    def encode(self, text: str, *, add_bos: bool | None = None, add_eos: bool | None = None) -> np.ndarray:
        """Token ids of a text.

        The text of a special token ("<|endoftext|>") inside `text` becomes that token, as in Hugging Face's own use.

        Args:
            text: any text; a few million characters are fine (0.4 µs a character).
            add_bos: whether BOS comes first; None: as the checkpoint says.
            add_eos: whether EOS comes last; None: as the checkpoint says.

        Returns:
            int32[tokens].

        Raises:
            InputError: BOS or EOS is asked for and there is none, the text is not valid Unicode, or the tokenizer is
                damaged in a way that shows only here.
        """
        first = [self.bos_id] if (self.add_bos if add_bos is None else add_bos) else []
        last = list(self.eos_ids[:1] or [None]) if (self.add_eos if add_eos is None else add_eos) else []
        if None in first:
            raise InputError("add_bos=True, but this tokenizer has no BOS token: use add_bos=False")
        if None in last:
            raise InputError("add_eos=True, but this tokenizer has no EOS token: use add_eos=False")
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise InputError(f"the text is not valid Unicode at character {error.start}: {error.reason}") from error
        with _failures_named(f"{self.source}: fails on a text"):
            ids = self.backend.encode_batch_fast([text], add_special_tokens=False)[0].ids
        return np.array([*first, *ids, *last], np.int32)

    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        """The text of token ids; special tokens are left out unless `skip_special` is False.

        Ids past the vocabulary (padding rows of an embedding) have no text and add none. Bytes that are no UTF-8 show
        as U+FFFD.
        """
        with _failures_named(f"{self.source}: fails on token ids"):
            return self.backend.decode([int(token) for token in ids], skip_special_tokens=skip_special)

    @functools.cached_property
    def vocab_size(self) -> int:
        """One more than the largest token id."""
        return max(self.backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    @functools.cached_property
    def sha256(self) -> str:
        """Fingerprint of everything that decides the ids: the serialised definition, BOS, EOS, add_bos and add_eos."""
        choices: dict[str, Any] = {"bos_id": self.bos_id, "eos_ids": self.eos_ids, "add_bos": self.add_bos}
        if self.add_eos:  # named only where it is true, so that fingerprints on record stay what they are
            choices["add_eos"] = True
        return hashlib.sha256(f"{self.backend.to_str()}\n{json.dumps(choices)}".encode()).hexdigest()


def tokenizer_from_json(path: str | os.PathLike[str]) -> Tokenizer:
    """Reads a tokenizer.json, or the one in a checkpoint folder, with the two configs beside it.

    BOS is tokenizer_config.json's `bos_token`, else generation_config.json's `bos_token_id`. EOS are all of
    generation_config.json's `eos_token_id`, then tokenizer_config.json's `eos_token`. BOS and EOS are added where
    `add_bos_token` and `add_eos_token` say so; where one is absent, as the post-processor of tokenizer.json does.

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
    with _failures_named(f"{file}: its post-processor fails on an empty text"):
        around = backend.encode("").ids
    return checked_tokenizer(
        file,
        backend=backend,
        bos_id=bos[0] if bos else None,
        eos_ids=tuple(dict.fromkeys(eos)),
        add_bos=_flag(config, "add_bos_token", config_file, bool(bos) and around[:1] == bos[:1]),
        add_eos=_flag(config, "add_eos_token", config_file, bool(eos) and around[-1:] == eos[:1]),
        chat_template=_chat_template(config, file.parent / CHAT_TEMPLATE),
    )


def _chat_template(config: dict[str, Any], file: Path) -> str | None:
    """Of its own file, or as older checkpoints have it in tokenizer_config.json; named variants are left out."""
    if file.is_file():
        try:
            return file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{file}: cannot be read: {one_line(error)}") from error
    found = config.get("chat_template")
    return found if isinstance(found, str) else None


def _parse_backend(file: Path) -> tokenizers.Tokenizer:
    """The definition alone: a file may also ask for truncation and padding, which would silently cut texts."""
    with _failures_named(f"{file}: is no tokenizer that `tokenizers` reads"):
        backend = tokenizers.Tokenizer.from_file(str(file))
    ids = backend.get_vocab(with_added_tokens=True).values()
    if max(ids, default=0) > len(ids) + MAX_GAP:  # `tokenizers` visits every number on the way when it writes itself
        raise InputError(f"{file}: has a token of id {max(ids)} among {len(ids)} tokens: the file is damaged")
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


def _flag(config: dict[str, Any], key: str, file: Path, default: bool) -> bool:
    """A true or false of tokenizer_config.json, where null is as good as absent."""
    value = default if config.get(key) is None else config[key]
    if type(value) is not bool:
        raise InputError(f"{file}: {key} is {shown(str(value))}; expected true or false")
    return value


def checked_tokenizer(source: str | Path, **fields: Any) -> Tokenizer:
    """The tokenizer of these fields, its constructor's errors led by the file's name."""
    try:
        return Tokenizer(source=str(source), **fields)
    except InputError as error:
        raise InputError(f"{source}: {error}") from error


@contextlib.contextmanager
def _failures_named(what: str) -> Iterator[None]:
    """What `tokenizers` raises, which is nothing exact, as an InputError; its panics too, which are no Exception."""
    try:
        yield
    except MemoryError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise InputError(f"{what}: {one_line(error)}") from error


def one_line(error: BaseException) -> str:
    """The message of an error that others raised, short enough for ours; what cannot be printed is escaped."""
    text = " ".join(str(error).split())[:200]
    return text if text.isprintable() else repr(text)[1:-1]


def tokenizer_to_json(tokenizer: Tokenizer, folder: str | os.PathLike[str]) -> None:
    """Writes tokenizer.json, tokenizer_config.json and generation_config.json, from which `tokenizer_from_json` gives
    the same tokenizer (equal `sha256`) and transformers an equal one."""
    folder = Path(folder)
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": tokenizer.add_bos,
        "add_eos_token": tokenizer.add_eos,
    }
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
    if tokenizer.chat_template is not None:
        texts[CHAT_TEMPLATE] = tokenizer.chat_template
    for name, text in texts.items():
        with replacing(folder / name) as file:
            file.write(text.encode())
