"""Text files and folders of them: plain or gzipped, as they are or as JSON lines."""

from __future__ import annotations

import gzip
import json
import zlib
from pathlib import Path

from jquant.core.errors import InputError

DOCUMENT_SEPARATOR = "\n\n"
DEFAULT_FIELD = "text"
JSON_LINES = (".jsonl", ".jsonl.gz")
FOLDER_SUFFIXES = (".txt", ".txt.gz", ".raw", ".raw.gz", ".md", ".md.gz", *JSON_LINES)


def read_folder(folder: Path) -> str:
    """The files of a folder with a suffix of `FOLDER_SUFFIXES`, in the order of their names, joined by a blank line.

    Hidden files and folders are left out. JSON lines are read by their field `text`.

    Raises:
        InputError: where the folder holds no such file, or one that cannot be read.
    """
    inside = {path.relative_to(folder): path for path in folder.rglob("*") if path.is_file()}
    names = [
        name
        for name in sorted(inside, key=Path.as_posix)
        if name.name.lower().endswith(FOLDER_SUFFIXES) and not any(part.startswith(".") for part in name.parts)
    ]
    if not names:
        raise InputError(f"folder {str(folder)!r} holds no text file; files read are {', '.join(FOLDER_SUFFIXES)}")
    return DOCUMENT_SEPARATOR.join(read_file(inside[name]) for name in names)


def read_file(path: Path, *, field: str = DEFAULT_FIELD) -> str:
    """One file's text: as it is, or for JSON lines the strings of `field` joined by a blank line.

    Line ends are kept. A byte order mark is not part of the text.

    Raises:
        InputError: for bytes that are not gzip or UTF-8 as the name promises, or a bad JSON line; names file and line.
    """
    text = _decode(_read_bytes(path), path)
    if not path.name.lower().endswith(JSON_LINES):
        return text
    # str.splitlines would also split at U+2028 and the like, which JSON strings may hold.
    lines = enumerate(text.split("\n"), start=1)
    return DOCUMENT_SEPARATOR.join(_document(line, field, f"{path}:{n}") for n, line in lines if line.strip())


def split_field(source: Path) -> tuple[Path, str]:
    """`FILE.jsonl#FIELD` as (FILE.jsonl, FIELD); any other path, or one that exists as written, with the default."""
    stem, mark, field = source.name.rpartition("#")
    if not mark or not stem.lower().endswith(JSON_LINES) or source.exists():
        return source, DEFAULT_FIELD
    if not field:
        raise InputError(f"text source {str(source)!r} names no field after '#'; write {stem}#FIELD or drop the '#'")
    return source.with_name(stem), field


def _read_bytes(path: Path) -> bytes:
    try:
        raw = path.read_bytes()
        return gzip.decompress(raw) if path.name.lower().endswith(".gz") else raw
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise InputError(
            f"{path}: not a whole gzip file ({error}); fetch it again, or drop .gz if it is plain"
        ) from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); check that it is a readable file") from error


def _decode(raw: bytes, path: Path) -> str:
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        # With a byte order mark the error counts from behind it.
        start = error.start + (len(raw) - len(error.object))
        line = raw.count(b"\n", 0, start) + 1
        raise InputError(
            f"{path}:{line}: byte 0x{raw[start]:02x} at offset {start} is not UTF-8 ({error.reason}); "
            "convert the file to UTF-8"
        ) from error


def _document(line: str, field: str, where: str) -> str:
    try:
        record = json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        raise InputError(f"{where}: not a line of JSON ({error}); each line must be one object") from error
    if not isinstance(record, dict):
        raise InputError(f"{where}: a JSON {type(record).__name__}, not an object; each line must be one object")
    if not isinstance(record.get(field), str):
        strings = [key for key, value in record.items() if isinstance(value, str)]
        raise InputError(
            f"{where}: no string field {field!r}; string fields there: {', '.join(strings) or 'none'}; "
            "choose one with FILE.jsonl#FIELD"
        )
    try:
        record[field].encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(
            f"{where}: field {field!r} holds a lone surrogate, which no text can; mend the line"
        ) from error
    return record[field]
