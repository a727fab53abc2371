"""The questions that `jquant advise` asks where it is called without arguments, one after another, with defaults."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

from jquant.core.errors import InputError
from jquant.core.scheme import scheme
from jquant.hardware.devices import find_device
from jquant.hardware.recommend_config import RecommendConfig

Ask = Callable[[str, str], str]  # question and default -> the answer, the default where it is empty
Say = Callable[[str], None]
LOCAL = "local"  # in the place of a device's name: measure this machine
_T = TypeVar("_T")


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """What the user knows of a PTQ loss."""

    scheme: str
    loss_percent: float | None


def ask_constraints(ask: Ask, say: Say, check_model: Callable[[str], object], *, device: str) -> RecommendConfig:
    """What a recommendation needs, asked for; a wrong answer is told and asked again.

    Args:
        ask: asks one question.
        say: tells what is wrong with an answer.
        check_model: raises InputError where MODEL is nothing that is known.
        device: the default, a name in the list or LOCAL.
    """

    def model(words: str) -> str:
        check_model(words)
        return words

    def known_device(words: str) -> str | None:
        return None if words == LOCAL else find_device(words).name

    def first(words: str) -> Literal["latency", "throughput"]:
        for goal in ("latency", "throughput"):
            if words and goal.startswith(words.lower()):
                return goal
        raise InputError(f"{words!r}: answer latency or throughput")

    def folder(words: str) -> Path | None:
        if words in ("", "none"):
            return None
        if not Path(words).is_dir():
            raise InputError(f"{words}: there is no such folder; give that of a jquant sweep, or none")
        return Path(words)

    def memory_of(name: str | None) -> float | None:
        """Asked where the list does not say: of a CPU."""
        if name is None or find_device(name).memory_gb is not None:
            return None
        return _until_right(ask, say, f"Memory of {name}, in GB", "256", _positive)

    what = "Model (a name as llama-3-8b, a size as 70B, a file or folder)"
    wanted = _until_right(ask, say, what, "llama-3-8b", model)
    chosen = _until_right(ask, say, f"Device (as h100-sxm; {LOCAL}: measure this machine)", device, known_device)
    return RecommendConfig(
        model=wanted,
        device=chosen,
        memory=memory_of(chosen),
        devices=_until_right(ask, say, "How many of them", "1", _whole),
        prompt=_until_right(ask, say, "Tokens of a prompt", "2048", _whole),
        output=_until_right(ask, say, "New tokens after it", "256", _whole),
        batch=_until_right(ask, say, "Sequences at once", "1", _whole),
        first=_until_right(ask, say, "What counts first, latency or throughput", "latency", first),
        max_loss=_until_right(ask, say, "Loss of perplexity that you accept, in percent", "5", _percent),
        results=_until_right(ask, say, "Folder of a sweep of this model", "none", folder),
    )


def ask_measurement(ask: Ask, say: Say, *, default: str) -> Measurement:
    """What the user measured of PTQ, for the choice between PTQ and QAT."""

    def spec(words: str) -> str:
        return str(scheme(words))

    def loss(words: str) -> float | None:
        return None if words in ("", "none") else _number(words)

    return Measurement(
        scheme=_until_right(ask, say, "Scheme of the weights that you want", default, spec),
        loss_percent=_until_right(ask, say, "Loss that you measured with it after PTQ, in percent", "none", loss),
    )


def _until_right(ask: Ask, say: Say, question: str, default: str, parse: Callable[[str], _T]) -> _T:
    while True:
        try:
            return parse(ask(question, default).strip() or default)
        except InputError as error:
            say(str(error))


def _whole(words: str) -> int:
    if not words.isdecimal() or int(words) < 1:
        raise InputError(f"{words!r}: give a whole number of at least 1")
    return int(words)


def _percent(words: str) -> float:
    value = _number(words)
    if not value >= 0:
        raise InputError(f"{words!r}: give a percentage of 0 or more")
    return value


def _positive(words: str) -> float:
    value = _number(words)
    if not 0 < value < float("inf"):
        raise InputError(f"{words!r}: give a number above 0")
    return value


def _number(words: str) -> float:
    try:
        value = float(words.removesuffix("%").strip())
    except ValueError:
        raise InputError(f"{words!r}: give a number, as 3.5") from None
    if value != value:
        raise InputError("NaN is no loss: the quantized model is broken, or was not measured")
    return value
