"""The `tokenizer.ggml.*` fields of a GGUF: each of the type it must have, and the vocabulary they describe.

Reference: ggml/docs/gguf.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from jquant.core.errors import InputError
from jquant.io.mapped import shown

# enum llama_token_type
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
_REQUIRED: Any = object()


class Fields:
    """Typed access to the `tokenizer.ggml.*` metadata of the file `source`."""

    def __init__(self, metadata: Mapping[str, Any], source: str) -> None:
        self.source = source
        self._metadata = metadata

    @property
    def architecture(self) -> str:
        """`general.architecture`, "" where the file does not say."""
        return str(self._metadata.get("general.architecture", ""))

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

    def per_token(self, name: str) -> np.ndarray:
        """The field as an array of one number a token."""
        values, count = self.get(name, np.ndarray), len(self.get("tokens", list))
        if len(values) != count:
            raise InputError(
                f"{self.source}: tokenizer.ggml.{name} has {len(values)} entries, tokenizer.ggml.tokens {count}"
            )
        return values


@dataclass(frozen=True, kw_only=True, eq=False)
class Vocabulary:
    """The tokens of a GGUF and what kind each is."""

    tokens: list[str] = field(repr=False)
    kinds: np.ndarray = field(repr=False)  # [tokens] of NORMAL, UNKNOWN, …
    index: dict[str, int] = field(repr=False)  # of each token

    def of_kind(self, *kinds: int) -> list[str]:
        """The tokens of these kinds, in order."""
        return [self.tokens[index] for index in np.flatnonzero(np.isin(self.kinds, kinds))]


def read_vocabulary(fields: Fields) -> Vocabulary:
    """The vocabulary that the fields describe.

    Raises:
        InputError: a field is missing, their lengths differ, or a token occurs twice.
    """
    tokens: list[str] = fields.get("tokens", list)
    kinds = fields.per_token("token_type")
    index = {token: number for number, token in enumerate(tokens)}
    if len(index) != len(tokens):
        number = next(number for number, token in enumerate(tokens) if index[token] != number)
        raise InputError(f"{fields.source}: tokenizer.ggml.tokens holds {shown(tokens[number])} twice")
    return Vocabulary(tokens=tokens, kinds=kinds, index=index)
