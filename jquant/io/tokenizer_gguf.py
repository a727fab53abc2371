"""The tokenizer that a GGUF's `tokenizer.ggml.*` fields describe.

Of each kind of model the encoding is built in a file of its own; here are BOS and EOS, which all kinds share.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import tokenizers
from tokenizers import processors

from jquant.core.errors import InputError
from jquant.io.mapped import shown
from jquant.io.tokenizer import Tokenizer, checked_tokenizer
from jquant.io.tokenizer_bpe import bpe_backend, pre_tokenizer_name
from jquant.io.tokenizer_fields import CONTROL, NORMAL, UNUSED, USER_DEFINED, Fields
from jquant.io.tokenizer_spm import is_spm, spm_backend, spm_fields

BACKENDS = {"gpt2": bpe_backend, "llama": spm_backend}  # by tokenizer.ggml.model


def tokenizer_from_gguf(metadata: Mapping[str, Any], *, source: str = "GGUF") -> Tokenizer:
    """Builds the tokenizer that a GGUF's `tokenizer.ggml.*` fields describe.

    EOS are all of the tokens that end a text, a turn or a message.

    Args:
        metadata: as `open_gguf` returns it.
        source: the file's name, for errors.

    Raises:
        InputError: the tokenizer model or pre-tokenizer is not known, or the fields are missing or contradict.

    Reference: ggml/docs/gguf.md; llama.cpp's llama-vocab.cpp.
    """
    fields = Fields(metadata, source)
    model = fields.get("model", str)
    if model not in BACKENDS:
        raise InputError(
            f"{source}: tokenizer.ggml.model {shown(model)} is not supported; jquant builds byte-level BPE ('gpt2') "
            "and SentencePiece's BPE ('llama')"
        )
    backend, adds_bos = BACKENDS[model](fields)
    bos_id = fields.token_id("bos_token_id")
    add_bos = fields.get("add_bos_token", bool, adds_bos)
    stops = [fields.token_id(f"{stop}_token_id") for stop in ("eos", "eot", "eom")]
    eos_ids = tuple(dict.fromkeys(stop for stop in stops if stop is not None))
    add_eos = fields.get("add_eos_token", bool, False)
    template = metadata.get("tokenizer.chat_template")
    tokenizer = checked_tokenizer(
        source,
        backend=backend,
        bos_id=bos_id,
        eos_ids=eos_ids,
        add_bos=add_bos,
        add_eos=add_eos,
        chat_template=template if isinstance(template, str) else None,
    )
    _add_around(backend, bos_id if add_bos else None, eos_ids[0] if add_eos else None)
    return tokenizer


def _add_around(backend: tokenizers.Tokenizer, bos_id: int | None, eos_id: int | None) -> None:
    """BOS before a text and EOS after it. jquant does so itself; this is for whoever loads its tokenizer.json."""
    tokens = {number: str(backend.id_to_token(number)) for number in (bos_id, eos_id) if number is not None}
    names = {number: f"token {number}" if ":" in token or "$" in token else token for number, token in tokens.items()}
    bos, eos = ([names[number]] if number is not None else [] for number in (bos_id, eos_id))
    if names:
        backend.post_processor = processors.TemplateProcessing(  # pyright: ignore[reportAttributeAccessIssue]
            single=[*bos, "$A", *eos],
            pair=[*bos, "$A", *eos, *bos, "$B:1", *eos],
            # A template reads ":" and "$" in its own way, so a token that holds them is called by its number.
            special_tokens=[{"id": names[n], "ids": [n], "tokens": [token]} for n, token in tokens.items()],
        )


def tokenizer_to_gguf(tokenizer: Tokenizer, rows: int) -> dict[str, Any]:
    """The `tokenizer.*` fields of a GGUF; `tokenizer_from_gguf` gives a tokenizer of the same ids from them.

    Args:
        tokenizer: byte-level BPE, cut by one of the pre-tokenizers that a GGUF can name, or SentencePiece's BPE.
        rows: of the embedding; those without a token get one that no text contains.

    Raises:
        InputError: the tokenizer is of another kind.
    """
    said = json.loads(tokenizer.backend.to_str())
    model = said["model"]
    if model["type"] != "BPE" or tokenizer.vocab_size > rows:
        raise InputError(
            f"{tokenizer.source}: a tokenizer of {tokenizer.vocab_size} tokens, {model['type']}, for {rows} rows: "
            "GGUFs are written with BPE, one row a token; export another format"
        )
    tokens = [f"[PAD{index}]" for index in range(rows)]
    kinds = np.full(rows, UNUSED, np.int32)
    for token, index in model["vocab"].items():
        tokens[index], kinds[index] = token, NORMAL
    for added in said["added_tokens"]:
        tokens[added["id"]] = added["content"]
        kinds[added["id"]] = CONTROL if added["special"] else USER_DEFINED
    fields: dict[str, Any] = {
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.add_bos_token": tokenizer.add_bos,
        "tokenizer.ggml.add_eos_token": tokenizer.add_eos,
    }
    if is_spm(said):
        fields |= spm_fields(said, tokens, kinds, tokenizer.source)
    else:
        fields |= {
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": pre_tokenizer_name(said, tokenizer.source),
            "tokenizer.ggml.merges": [m if isinstance(m, str) else " ".join(m) for m in model["merges"]],
            "tokenizer.ggml.add_space_prefix": False,
        }
    if tokenizer.bos_id is not None:
        fields["tokenizer.ggml.bos_token_id"] = tokenizer.bos_id
    for name, index in zip(("eos", "eot", "eom"), tokenizer.eos_ids, strict=False):
        fields[f"tokenizer.ggml.{name}_token_id"] = index
    if tokenizer.chat_template is not None:
        fields["tokenizer.chat_template"] = tokenizer.chat_template
    return fields
