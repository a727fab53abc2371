"""The embedded default text: the language reference that every Python carries, split for calibration and evaluation."""

from __future__ import annotations

import re
from collections.abc import Iterable
from itertools import accumulate

from jquant.core.errors import InputError

PARTS = ("evaluation", "calibration")  # the first is the default
CALIBRATION_SHARE = 0.6  # of the characters, from the start


def read_part(part: str) -> str:
    """One part of `pydoc_data.topics`, repeated paragraphs dropped.

    Topics in the order of their names are cut into paragraphs at blank lines. A paragraph that equals an earlier one up
    to white space is dropped before the split: the topics quote each other, and an evaluation text that stands in the
    calibration text measures nothing. The first 60 % of the characters, up to a paragraph's end, are the calibration
    part. The text differs between Python versions.

    Args:
        part: "evaluation" or "calibration".

    Returns:
        Paragraphs joined by a blank line.

    Raises:
        InputError: for another part, or a Python without `pydoc_data`.
    """
    if part not in PARTS:
        raise InputError(f"text 'pydoc' has no part {part!r}; its parts are {', '.join(PARTS)}")
    calibration, evaluation = split_paragraphs(distinct_paragraphs(_topics().values()))
    return "\n\n".join(calibration if part == "calibration" else evaluation)


def distinct_paragraphs(texts: Iterable[str]) -> list[str]:
    """The paragraphs of all texts in order, each kept where it first occurs; compared with white space normalised."""
    first: dict[str, str] = {}
    for text in texts:
        for paragraph in re.split(r"\n\s*\n", text):
            first.setdefault(" ".join(paragraph.split()), paragraph.rstrip())
    first.pop("", None)
    return list(first.values())


def split_paragraphs(paragraphs: list[str], *, share: float = CALIBRATION_SHARE) -> tuple[list[str], list[str]]:
    """(calibration, evaluation): cut at the first paragraph's end at or beyond `share` of the characters."""
    ends = list(accumulate(map(len, paragraphs)))
    cut = next((index + 1 for index, end in enumerate(ends) if end >= share * ends[-1]), 0)
    return paragraphs[:cut], paragraphs[cut:]


def _topics() -> dict[str, str]:
    try:
        from pydoc_data.topics import topics  # a Linux distribution may ship it apart from the interpreter
    except ImportError as error:
        raise InputError(
            "text 'pydoc' needs the standard library's pydoc_data, which this Python lacks; "
            "install it or give a file of text"
        ) from error
    return dict(sorted(topics.items()))
