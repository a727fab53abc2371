"""Calibration that evaluation shares is found: run against run, and from what a model keeps of its own."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

from jquant.core.errors import InputError
from jquant.data.blocks import Windows, windows
from jquant.data.overlap import calibration_record, check_disjoint, refuse_seen, with_earlier


@pytest.mark.parametrize("run", [1, 2, 5, 48, 64])
@pytest.mark.parametrize("shared", [True, False])
def test_calibration_that_shares_a_run_with_the_evaluation_is_refused(run: int, shared: bool) -> None:
    rng = np.random.default_rng(run)
    ours, theirs = rng.integers(0, 1000, 512), rng.integers(1000, 2000, 512)
    at, length = 128 + 31, run - (not shared)  # within the second window of 128
    theirs[3 * 128 : 3 * 128 + length] = ours[at : at + length]
    calibration, evaluation = windows(ours, window=128), windows(theirs, window=128)
    if not shared:
        check_disjoint(calibration, evaluation, run=run)
        return
    with pytest.raises(InputError, match=rf"window 1 .* window 3 .* the {run} tokens from 31 and 0 on"):
        check_disjoint(calibration, evaluation, run=run)


def test_runs_are_found_as_by_comparing_all_with_all() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        ours, theirs = rng.integers(0, 2, (2, 40))
        calibration, evaluation = windows(ours, window=20), windows(theirs, window=20)
        pieces = [
            {tuple(row[i : i + 7]) for row in cut.tokens.tolist() for i in range(14)}
            for cut in (calibration, evaluation)
        ]
        if pieces[0] & pieces[1]:
            with pytest.raises(InputError, match="share the 7 tokens"):
                check_disjoint(calibration, evaluation, run=7)
        else:
            check_disjoint(calibration, evaluation, run=7)


def test_calibration_on_the_evaluation_text_is_refused() -> None:
    cut = dataclasses.replace(windows(np.arange(20), window=10), text_name="pydoc:evaluation", text_sha256="ab")
    other = dataclasses.replace(windows(np.arange(30, 50), window=10), text_sha256="ab")
    with pytest.raises(InputError, match="both on the text pydoc:evaluation"):
        check_disjoint(other, cut)
    check_disjoint(dataclasses.replace(other, text_sha256="cd"), cut)


def _named(ids: np.ndarray, window: int, name: str) -> Windows:
    return dataclasses.replace(windows(ids, window=window), text_name=name, text_sha256=f"sha256 of {name}")


def _record(cut: Windows) -> dict[str, object]:
    return json.loads(json.dumps(calibration_record(cut)))


@pytest.mark.parametrize(
    ("window", "start", "length"), [(128, 512 + at, 63) for at in (0, 17, 31, 65)] + [(20, 71, 63)]
)
def test_a_text_that_holds_a_part_of_the_calibration_is_refused(window: int, start: int, length: int) -> None:
    rng = np.random.default_rng(start)
    ours, theirs = rng.integers(0, 1000, 1024), rng.integers(1000, 2000, 600)
    record = _record(_named(ours, window, "notes"))
    refuse_seen(record, _named(theirs, 300, "story"), "m")
    theirs[333 : 333 + length] = ours[start : start + length]
    with pytest.raises(InputError, match="m was calibrated on a part of the text story: window 1 holds, from token"):
        refuse_seen(record, _named(theirs, 300, "story"), "m")


def test_the_same_text_is_refused_and_old_records_know_no_more() -> None:
    cut = _named(np.arange(4096), 64, "notes")
    with pytest.raises(InputError, match="m was calibrated on the text notes"):
        refuse_seen(_record(cut), cut, "m")
    old = {name: value for name, value in _record(cut).items() if name not in ("run", "runs")}
    with pytest.raises(InputError, match="on the text notes"):
        refuse_seen(old, cut, "m")
    other = dataclasses.replace(cut, text_name="copy", text_sha256="another")
    refuse_seen(old, other, "m")
    with pytest.raises(InputError, match="a part of the text copy"):
        refuse_seen(_record(cut), other, "m")


@pytest.mark.parametrize(
    "damaged", [None, [], {"run": "x", "runs": 3}, {"run": 32, "runs": "?"}, {"run": 0, "runs": ""}]
)
def test_damaged_records_refuse_nothing(damaged: object) -> None:
    refuse_seen(damaged, _named(np.arange(100), 50, "story"), "m")


def test_little_text_tells_of_itself_alone() -> None:
    cut = _named(np.arange(12), 4, "notes")
    assert "runs" not in _record(cut)
    refuse_seen(_record(cut), dataclasses.replace(cut, text_sha256="another"), "m")
    short = _record(_named(np.arange(130), 4, "notes"))
    assert short["run"] == 32
    refuse_seen(short, _named(np.arange(1000, 1200), 100, "story"), "m")
    with pytest.raises(InputError, match="a part of the text story"):
        refuse_seen(short, _named(np.arange(20, 120), 100, "story"), "m")


def test_windows_that_step_by_less_than_their_length() -> None:
    ids = np.random.default_rng(0).integers(0, 1000, 512)
    cut = windows(np.concatenate([np.arange(2000, 2032), ids[:64]]), window=16, stride=8)
    with pytest.raises(InputError, match="window 4 holds, from token 0 on, 32 tokens"):
        refuse_seen(_record(_named(ids, 128, "notes")), cut, "m")


def test_windows_of_evaluation_may_be_shorter_than_a_run() -> None:
    ids = np.random.default_rng(0).integers(0, 1000, 512)
    record = _record(_named(ids, 128, "notes"))
    with pytest.raises(InputError, match="window 2 holds, from token 0 on, 32 tokens"):
        refuse_seen(record, _named(np.concatenate([np.arange(2000, 2032), ids[:64]]), 16, "story"), "m")


def test_rulers_and_rows_of_zeros_tell_of_no_text() -> None:
    rng = np.random.default_rng(0)
    ours, theirs = rng.integers(0, 1000, 512), rng.integers(1000, 2000, 512)
    ours[100:300] = theirs[200:400] = np.arange(200) % 12
    refuse_seen(_record(_named(ours, 512, "notes")), _named(theirs, 512, "story"), "m")
    zeros = _named(np.zeros(512, int), 512, "zeros")
    refuse_seen(_record(zeros), dataclasses.replace(zeros, text_sha256="another"), "m")


def test_what_the_source_had_learned_from_is_kept() -> None:
    first, second = (_named(np.arange(at, at + 512), 128, name) for at, name in ((0, "first"), (1000, "second")))
    record = json.loads(json.dumps(with_earlier(_record(second), _record(first))))
    for cut in (first, second):
        with pytest.raises(InputError, match=f"on the text {cut.text_name}"):
            refuse_seen(record, cut, "m")
    assert with_earlier(None, _record(first)) == _record(first)
    assert with_earlier(None, None) is None


def test_what_is_kept_of_a_long_training_stays_small_and_still_tells() -> None:
    ids = np.random.default_rng(0).integers(0, 50_000, 1 << 20)
    record = _record(_named(ids, 512, "corpus"))
    assert len(json.dumps(record)) < 46_000
    with pytest.raises(InputError, match="on a part of the text story"):
        refuse_seen(record, _named(ids[70_001:76_001], 500, "story"), "m")
