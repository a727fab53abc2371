"""The tokenizer that a GGUF's `tokenizer.ggml.*` fields describe.

Of each kind of model the encoding is built in a file of its own; here are BOS and EOS, which all kinds share.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import tokenizers
from tokenizers import processors

from jquant.core.errors import InputError
from jquant.io.mapped import shown
from jquant.io.tokenizer import Tokenizer, checked_tokenizer
from jquant.io.tokenizer_bpe import bpe_backend
from jquant.io.tokenizer_fields import Fields
from jquant.io.tokenizer_spm import spm_backend

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
