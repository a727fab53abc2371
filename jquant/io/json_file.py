"""JSON files: read as objects, with errors of one line, and written strictly."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from pathlib import Path
from typing import Any

from jquant.core.errors import InputError
from jquant.io.mapped import check_memory

_SURROGATE = re.compile(rb"\\u[dD]")


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        InputError: the file cannot be read, is no JSON, or holds something other than an object.
    """
    try:
        text = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from error
    return parse_json(text, str(path))


def read_json_if_there(path: Path) -> dict[str, Any]:
    """The object in a JSON file that a checkpoint may leave out: empty where there is no such file."""
    return read_json(path) if path.exists() else {}


def as_text(record: Any) -> str:
    """Strict JSON, which has no NaN: null where a number says nothing, as the standard error of one window."""
    return json.dumps(_finite(record), indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def parse_json(text: bytes, what: str, *, size: int | None = None) -> dict[str, Any]:
    """The object in UTF-8 JSON text in which no key occurs twice; `what` names the text in errors.

    `size` is that of the file that the text is a part of.

    An escape of half a character ("\\ud800"), which Python's parser lets pass, is refused: such a text can be neither a
    file's name nor printed.
    """
    check_memory(_memory(text), len(text) if size is None else size, what)
    try:
        value = json.loads(text.decode("utf-8"), object_pairs_hook=_unique)
        if _SURROGATE.search(text):
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except InputError as error:
        raise InputError(f"{what}: {error}") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{what}: is no JSON: {error}") from error
    if not isinstance(value, dict):
        raise InputError(f"{what}: holds a JSON {type(value).__name__}, expected an object")
    return value


def _memory(text: bytes) -> int:
    """Bytes that the parsed text takes at most: a list or object with a margin, what is in it, and the decoded text.

    Counted are signs, those within strings too: 60,000 tensors of a header come to 80 MB, and take 50.
    """
    items = text.count(b",") + text.count(b":")
    return 130 * items + 72 * (text.count(b"[") + text.count(b"{")) + len(text) * (2 if text.isascii() else 5)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        twice, _ = Counter(name for name, _ in pairs).most_common(1)[0]
        raise InputError(f"the key {twice[:80]!r} occurs twice")
    return value
