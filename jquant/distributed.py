"""Joins the processes of a run (jax.distributed), and sees to it that they end together.

jax ends a process whose peers are lost by abort(), after a C++ trace: an exit handler of our own says what happened and
what to do, and gives the exit code of a mistake. Versions are compared before anything is computed.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.metadata
import json
import os
import signal
import socket
import sys
import time
from typing import Any

import jax

import jquant
from jquant.core.errors import InputError
from jquant.io.process_options import ProcessOptions
from jquant.io.processes import LOST, hear_all, on_writer

EXIT_CODE = 2
_LEAVING_S = 10  # that processes wait for each other when they end
_COMPARED = ("jax", "jaxlib", "flax", "orbax-checkpoint")

_last_words: str | None = None  # what an aborted process says; empty where all has been said, None if none was started
_errors = 2  # where our own errors go; jax's C++ writes to 2


def start(options: ProcessOptions) -> None:
    """Meets the other processes. To be called once, before jax knows its devices.

    Raises:
        InputError: the coordinator is not reached, processes are missing, or their versions differ.
    """
    deadline = time.monotonic() + options.startup_timeout
    if options.coordinator is not None and options.process:
        _wait_for_coordinator(options.coordinator, deadline)
    _keep_standard_streams()
    _say_when_aborted(
        f"the {options.processes or 'other'} processes did not all reach the coordinator "
        f"{options.coordinator or 'that the cluster names'} within {options.startup_timeout} s: are all started, with "
        "the same --coordinator and --processes, and is its port open?"
    )
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    try:
        jax.distributed.initialize(
            options.coordinator,
            options.processes,
            options.process,
            initialization_timeout=max(1, int(deadline - time.monotonic())),
            heartbeat_timeout_seconds=options.heartbeat_timeout,
            shutdown_timeout_seconds=_LEAVING_S,
        )
    except (ValueError, RuntimeError) as error:
        where = f"coordinator {options.coordinator}" if options.coordinator else "--distributed auto"
        reason = " ".join(str(error).split())[:300]
        if "should be defined" in reason or "must be defined" in reason:
            reason = "no SLURM, TPU pod, Kubernetes or MPI is found here; give --coordinator, --processes, --process"
        raise InputError(f"{where}: {reason}") from error
    _say_when_aborted(LOST)
    check_versions(hear_all(json.dumps(_versions())))
    if jax.process_index():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  results are told by process 0


def tell(error: str) -> None:
    """Prints an error as the last line of this process: an abort in another thread says the same, and no more."""
    global _last_words
    if _last_words is not None:
        _last_words = error
        _silence_runtime()
    print(f"jquant: error: {error}", file=sys.stderr)


def leave(code: int) -> None:
    """Ends the process with the others where they end too, and does not wait long for those that do not."""
    global _last_words
    if _last_words is None:
        return  # nothing was started
    sys.stdout.flush()
    sys.stderr.flush()
    if code:
        _last_words = ""
    with contextlib.suppress(Exception):
        jax.distributed.shutdown()
    if code:
        os._exit(code)  # jax would wait for the others once more


def check_versions(said: list[str]) -> None:
    """Raises InputError in all processes where the software of one is not that of process 0."""

    def compare() -> None:
        first, *others = map(json.loads, said)
        for index, other in enumerate(others, start=1):
            for name in first["versions"]:
                ours, theirs = first["versions"][name], other["versions"].get(name)
                if ours != theirs:
                    raise InputError(
                        f"process {index} on {other['host']} has {name} {theirs}, process 0 on {first['host']} "
                        f"has {ours}: install the same versions on all hosts"
                    )

    on_writer(compare)


def _versions() -> dict[str, Any]:
    versions = {"jquant": jquant.__version__, "python": ".".join(map(str, sys.version_info[:2]))}
    for name in _COMPARED:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return {"host": socket.gethostname(), "versions": versions}


def _wait_for_coordinator(address: str, deadline: float) -> None:
    host, _, port = address.rpartition(":")
    began = time.monotonic()
    while True:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
            return
        except (OSError, OverflowError) as error:
            if time.monotonic() > deadline:
                raise InputError(
                    f"coordinator {address} is not reached within {time.monotonic() - began:.0f} s ({error}): is "
                    "process 0 started there, and the port open?"
                ) from error
        time.sleep(0.5)


def _keep_standard_streams() -> None:
    """Ours alone: Gloo's C++ prints to 1 who is connected, in the midst of results, and that goes to 2; what jax's says
    there can be silenced, and ours cannot."""
    global _errors
    sys.stdout.flush()
    sys.stderr.flush()
    ours, _errors = os.dup(1), os.dup(2)
    os.dup2(2, 1)
    sys.stdout = os.fdopen(ours, "w", encoding=sys.stdout.encoding, buffering=1)
    sys.stderr = os.fdopen(_errors, "w", encoding=sys.stderr.encoding, errors="backslashreplace", buffering=1)


def _silence_runtime() -> None:
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 2)
    os.close(silence)
    time.sleep(0.05)  # what another thread is writing there at this moment comes before our last line


def _say_when_aborted(text: str) -> None:
    global _last_words
    if _last_words is None:
        libc = ctypes.CDLL(None)
        libc.signal.restype, libc.signal.argtypes = ctypes.c_void_p, (ctypes.c_int, ctypes.c_void_p)
        libc.signal(signal.SIGABRT, ctypes.cast(_aborted, ctypes.c_void_p))
    _last_words = text


@ctypes.CFUNCTYPE(None, ctypes.c_int)
def _aborted(number: int) -> None:
    """Called in the thread that aborts; Python's own handlers would wait for the main one, which does not go on."""
    if _last_words:
        _silence_runtime()  # another thread may be amid a trace of its own
        os.write(_errors, f"jquant: error: {_last_words}\n".encode())
    os._exit(EXIT_CODE)
