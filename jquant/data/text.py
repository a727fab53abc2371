"""One text from any source: a file, a folder, a Hugging Face dataset by short name, or the embedded default."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from jquant.core.errors import InputError
from jquant.data.embedded import PARTS, read_part
from jquant.data.files import read_file, read_folder, split_field
from jquant.data.hub import DATASETS, OTHER_NAMES, read_dataset


@dataclass(frozen=True, kw_only=True)
class Text:
    """A text and what identifies it: results compare only where `sha256` is equal."""

    content: str
    name: str  # the file's or folder's own name, or "name:part"; never a path of this machine
    sha256: str  # of the content's UTF-8 bytes, in hexadecimal


def load_text(source: str | Path) -> Text:
    r"""Read a text.

    A known name comes before a file of that name; write `./c4` for a file called c4.

    | source | text |
    |---|---|
    | `FILE` | the file's characters as they are; `.gz` is decompressed |
    | `FILE.jsonl[.gz]`, `FILE.jsonl[.gz]#FIELD` | the strings of FIELD (default `text`), joined by `\n\n` |
    | `FOLDER` | its text and JSON-lines files at any depth, in the order of their names, joined by `\n\n` |
    | `wikitext2` or `wikitext`, `c4`, `pile`, `openplatypus`; `NAME:SPLIT` | a Hugging Face dataset: see `data.hub` |
    | `pydoc`, `pydoc:calibration` | parts of the standard library's language reference: see `jquant.data.embedded` |

    Args:
        source: a name or a path. A `Path` is always a path.

    Returns:
        The text, its name and the hash of its content.

    Raises:
        InputError: for an unknown name, an unreadable or undecodable file, a bad JSON line, or a text without a word.
    """
    name, content = _read_path(source) if isinstance(source, Path) else _read_named_or_path(source)
    if not content.strip():
        raise InputError(f"text {str(source)!r} is empty; give a source with at least one word")
    return Text(content=content, name=name, sha256=hashlib.sha256(content.encode("utf-8")).hexdigest())


def load_calibration(source: str | Path) -> Text:
    """As `load_text`, but a dataset named without a split is its train split, and `pydoc` its calibration part: what
    `load_text` reads by these names is for evaluation.

    Reference: IST-DASLab/gptq, datautils.py, which calibrates on the train splits of wikitext2 and c4.
    """
    if isinstance(source, str):
        known = OTHER_NAMES.get(source, source)
        if known == "pydoc" or known in DATASETS:
            source = f"{known}:{'calibration' if known == 'pydoc' else 'train'}"
    return load_text(source)


def text_names() -> tuple[str, ...]:
    """Every name that `load_text` knows, first those that need no network."""
    embedded = tuple("pydoc" if part == PARTS[0] else f"pydoc:{part}" for part in PARTS)
    return (
        embedded
        + tuple(
            name if split == dataset.splits[0] else f"{name}:{split}"
            for name, dataset in DATASETS.items()
            for split in dataset.splits
        )
        + tuple(OTHER_NAMES)
    )


def _read_named_or_path(source: str) -> tuple[str, str]:
    name, _, part = source.partition(":")
    name = OTHER_NAMES.get(name, name)
    if name == "pydoc":
        part = part or PARTS[0]
        return f"{name}:{part}", read_part(part)
    if name in DATASETS:
        part = part or DATASETS[name].splits[0]
        return f"{name}:{part}", read_dataset(name, part)
    if not source:
        raise InputError(f"text source is an empty string; give a path or one of: {', '.join(text_names())}")
    return _read_path(Path(source))


def _read_path(source: Path) -> tuple[str, str]:
    try:
        path, field = split_field(source)
        is_folder, exists = path.is_dir(), path.exists()
    except OSError as error:
        raise InputError(
            f"text source {str(source)!r} cannot be looked up ({error.strerror}); check the path"
        ) from error
    if is_folder:
        return f"{path.resolve().name}/", read_folder(path)
    if not exists:
        raise InputError(
            f"text source {str(source)!r} is neither a file nor a folder nor a known name; known names: "
            f"{', '.join(text_names())}"
        )
    return source.name, read_file(path, field=field)
