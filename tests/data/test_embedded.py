"""The embedded text's two parts are a split of the distinct paragraphs and share next to nothing."""

from __future__ import annotations

import re
from pydoc_data.topics import topics

from jquant.data.embedded import distinct_paragraphs, split_paragraphs
from jquant.data.text import load_text


def _ngrams(content: str, n: int = 16) -> list[tuple[str, ...]]:
    words = content.split()
    return [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]


def _overlap(evaluation: str, calibration: str) -> float:
    seen = set(_ngrams(calibration))
    grams = _ngrams(evaluation)
    return sum(gram in seen for gram in grams) / len(grams)


def test_evaluation_shares_at_most_one_percent_of_its_16_grams_with_calibration() -> None:
    calibration, evaluation = load_text("pydoc:calibration").content, load_text("pydoc").content
    assert _overlap(evaluation, calibration) <= 0.01
    # The bound would catch the undropped text: there the same cut shares far more.
    whole = "\n\n".join(topics[name] for name in sorted(topics))
    cut = int(0.6 * len(whole))
    assert _overlap(whole[cut:], whole[:cut]) > 0.05


def test_the_split_is_sixty_to_forty_at_a_paragraph() -> None:
    calibration, evaluation = load_text("pydoc:calibration").content, load_text("pydoc:evaluation").content
    assert abs(len(calibration) / (len(calibration) + len(evaluation)) - 0.6) < 0.01
    paragraphs = [" ".join(p.split()) for p in re.split(r"\n\s*\n", f"{calibration}\n\n{evaluation}")]
    assert len(set(paragraphs)) == len(paragraphs)
    assert set(paragraphs) == {" ".join(p.split()) for t in topics.values() for p in re.split(r"\n\s*\n", t)} - {""}


def test_paragraphs_keep_their_first_place_and_their_indentation() -> None:
    assert distinct_paragraphs(["\n\na  b\n  \n   code\n  more\n", "a\nb\n\nc"]) == [
        "\n\na  b".strip(),
        "   code\n  more",
        "c",
    ]


def test_the_cut_lies_at_the_first_end_beyond_the_share() -> None:
    assert split_paragraphs(["aaa", "bbb", "cc", "dd"]) == (["aaa", "bbb"], ["cc", "dd"])
    assert split_paragraphs(["aaa", "bbb", "ccc"]) == (["aaa", "bbb"], ["ccc"])
    assert split_paragraphs(["aaa"]) == (["aaa"], [])
    assert split_paragraphs([]) == ([], [])
