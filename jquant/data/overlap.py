"""What evaluation shares with the text that methods learned from: there a model's figures say nothing."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Int32, UInt64

from jquant.core.errors import InputError
from jquant.data.blocks import Windows

_RUN = 32  # tokens; a model keeps a hash of every run that begins at a multiple of it in a calibration window
_SHORTEST = 13  # that tells of a text and not of a language (GPT-3: Brown et al., 2005.14165, C)
SAID = ("text", "text_sha256", "ids_sha256", "windows", "window")  # what people read of a record
_MOST = 4096  # hashes that it keeps: those of 131,072 tokens; of more, as in training, so many


def check_disjoint(calibration: Windows, evaluation: Windows, *, run: int = 64) -> None:
    """Refuses calibration data that the evaluation holds a part of.

    Args:
        calibration: what methods learn from.
        evaluation: what they are measured on.
        run: so many consecutive tokens that both hold are a part, or a whole window where windows are shorter.

    Raises:
        InputError: both are of one text, or share a run; the message says where.
    """
    if calibration.text_sha256 and calibration.text_sha256 == evaluation.text_sha256:
        raise InputError(
            f"calibration and evaluation are both on the text {evaluation.text_name}: methods would be measured on "
            "what they learned from; give another calibration text, as pydoc:calibration"
        )
    run = min(run, calibration.window, evaluation.window)
    theirs, ours = _run_hashes(evaluation.tokens, run), _run_hashes(calibration.tokens, run)
    # Equal hashes only propose: the tokens decide.
    for window, start in np.argwhere(np.isin(ours, theirs)):
        wanted = calibration.tokens[window, start : start + run]
        for other, begin in np.argwhere(theirs == ours[window, start]):
            if np.array_equal(evaluation.tokens[other, begin : begin + run], wanted):
                raise InputError(
                    f"calibration window {window} ({calibration.text_name or 'ids'}) and evaluation window {other} "
                    f"({evaluation.text_name or 'ids'}) share the {run} tokens from {start} and {begin} on: methods "
                    "would be measured on what they learned from; give another calibration text"
                )


def calibration_record(windows: Windows) -> dict[str, Any]:
    """What a quantized model keeps of the windows that it learned from: JSON values, up to 45 kB.

    Of every run of 63 tokens that another text shares with what the windows cover, one of the hashed runs is a part;
    where there are more of these than are kept, of a longer part.
    """
    record: dict[str, Any] = {
        "text": windows.text_name,
        "text_sha256": windows.text_sha256,
        "ids_sha256": windows.sha256,
        "windows": len(windows.tokens),
        "window": windows.window,
    }
    covered = _covered(windows)
    run = min(_RUN, covered.size)
    if run < _SHORTEST:
        return record
    hashes = np.unique(_run_hashes(covered, run)[:, ::run][_telling(covered, run)])
    kept = hashes[:: max(1, -(-hashes.size // _MOST))].astype("<u8")
    return record | {"run": run, "runs": base64.b64encode(kept.tobytes()).decode("ascii")}


def _covered(windows: Windows) -> Int32[np.ndarray, "1 tokens"]:
    """The ids that windows cover, each once."""
    return np.concatenate([windows.tokens[0], windows.tokens[1:, -windows.stride :].reshape(-1)])[None]


def _telling(tokens: Int32[np.ndarray, "n window"], run: int) -> np.ndarray:
    """Which of the runs that follow each other tell of a text, by their different tokens; no ruler or row of zeros."""
    cut = np.sort(tokens[:, : tokens.shape[1] // run * run].reshape(len(tokens), -1, run), axis=-1)
    return 1 + np.sum(np.diff(cut, axis=-1) != 0, axis=-1) >= _SHORTEST


def with_earlier(record: Mapping[str, Any] | None, earlier: Any) -> Mapping[str, Any] | None:
    """The record of a model that was made of one that had learned from text too, whose record is `earlier`."""
    if not isinstance(earlier, Mapping):
        return record
    return dict(earlier) if record is None else {**record, "earlier": dict(earlier)}


def refuse_seen(record: Any, evaluation: Windows, model: str) -> None:
    """Refuses to evaluate a model on what it learned from.

    Args:
        record: of `calibration_record`, as the model's folder has it, in whatever state; None where it learned from no
            text. One from before runs were kept knows the whole text only.
        evaluation: windows of the model's own tokenizer.
        model: its name.

    Raises:
        InputError: the text is that of calibration, or windows hold a part of it.
    """
    if not isinstance(record, Mapping):
        return
    if record.get("text_sha256") and record["text_sha256"] == evaluation.text_sha256:
        raise InputError(
            f"{model} was calibrated on the text {evaluation.text_name}: its figures there say nothing; give another"
        )
    refuse_seen(record.get("earlier"), evaluation, model)
    run, hashes = record.get("run"), _decoded(record.get("runs"))
    covered = _covered(evaluation)
    if not isinstance(run, int) or not 0 < run <= covered.size or hashes is None:
        return
    found = np.flatnonzero(np.isin(_run_hashes(covered, run), hashes))
    if found.size:
        window = min(int(found[0]) // evaluation.stride, len(evaluation.tokens) - 1)
        start = int(found[0]) - window * evaluation.stride
        raise InputError(
            f"{model} was calibrated on a part of the text {evaluation.text_name}: window {window} holds, from token "
            f"{start} on, {run} tokens of its calibration text {record.get('text', '')}; its figures there say "
            "nothing; give another"
        )


def _decoded(runs: Any) -> np.ndarray | None:
    try:
        return np.frombuffer(base64.b64decode(runs, validate=True), "<u8")
    except (TypeError, ValueError, binascii.Error):
        return None


def _run_hashes(tokens: Int32[np.ndarray, "n window"], run: int) -> UInt64[np.ndarray, "n starts"]:
    """A hash of the `run` tokens from every place of every window on, by doubling: h(a ++ b) = mix(c·h(a) + h(b))."""
    powers = [_mix(tokens.astype(np.uint64))]  # [k]: of 2ᵏ tokens
    while 2 << (len(powers) - 1) <= run:
        powers.append(_joined(powers[-1], powers[-1], 1 << (len(powers) - 1)))
    hashes, length = powers[-1], 1 << (len(powers) - 1)
    for exponent in reversed(range(len(powers) - 1)):
        if length + (1 << exponent) <= run:
            hashes, length = _joined(hashes, powers[exponent], length), length + (1 << exponent)
    return hashes


def _joined(first: np.ndarray, second: np.ndarray, length: int) -> np.ndarray:
    """Of runs of `length` tokens, each followed by one of the second kind."""
    after = second[:, length:]
    return _mix(first[:, : after.shape[1]] * np.uint64(0x9E3779B97F4A7C15) + after)


def _mix(x: np.ndarray) -> np.ndarray:
    """The finalizer of SplitMix64 (Steele, Lea & Flood 2014): products and sums wrap around."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
