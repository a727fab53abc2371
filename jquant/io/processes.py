"""Several processes of one run (jax.distributed): one of them writes what is not an array, and all hear of errors.

Every function here is called by all processes in the same order; with one process each is what its name says.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from typing import Any

import jax

from jquant.core.errors import InputError

PATIENCE_S = 1800  # how long processes wait for each other; that one has died is found much earlier
LOST = (
    "contact with another process of this run was lost: the run ends on all of them; start the same command again on "
    "each, and it goes on from what is finished"
)

_calls = itertools.count()  # all processes make the same calls, so the number of a call names it


def several() -> bool:
    """Whether the run has more than one process."""
    return _state().num_processes > 1


def is_writer() -> bool:
    """Whether this is the process that writes."""
    return _state().process_id == 0


def on_writer(action: Callable[[], Any]) -> Any:
    """What `action` gives on the writer, a JSON value, for all processes; its InputError is raised in all."""
    if not several():
        return action()
    key = f"jquant/writer/{next(_calls)}"
    if not is_writer():
        said = json.loads(_get(key, 0))
        if said["error"] is not None:
            raise InputError(said["error"])
        return said["value"]
    try:
        value = action()
    except Exception as error:
        text = str(error) if isinstance(error, InputError) else f"{type(error).__name__}: {error}"
        _client().key_value_set(key, json.dumps({"error": f"process 0: {text}"}))
        raise
    _client().key_value_set(key, json.dumps({"value": value, "error": None}))
    return value


def in_all(action: Callable[[], Any]) -> Any:
    """What `action` gives here, once it is done in all processes; an InputError of any of them is raised in all."""
    if not several():
        return action()
    error, value = None, None
    try:
        value = action()
    except InputError as raised:
        error = raised
    said = hear_all("" if error is None else str(error))
    if error is not None:
        raise error
    for process, text in enumerate(said):
        if text:
            raise InputError(f"process {process}: {text}")
    return value


def hear_all(text: str) -> list[str]:
    """What each process says, this one `text`."""
    call = next(_calls)
    _client().key_value_set(f"jquant/all/{call}/{_state().process_id}", text)
    return [_get(f"jquant/all/{call}/{process}", process) for process in range(_state().num_processes)]


def _get(key: str, process: int) -> str:
    try:
        return _client().blocking_key_value_get(key, PATIENCE_S * 1000)
    except jax.errors.JaxRuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        if reason.startswith("DEADLINE_EXCEEDED"):
            raise InputError(f"process {process} has said nothing for {PATIENCE_S} s: {reason}") from error
        raise InputError(f"{LOST} ({reason})") from error


def _client() -> Any:
    return _state().client


def _state() -> Any:
    from jax._src import distributed  # the public functions start the devices, and none reaches the coordinator's store

    return distributed.global_state
