"""The Ray cluster that a sweep runs on: reached or started, and how many workers it has room for."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import re
import socket
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from jquant import __version__
from jquant.core.errors import InputError
from jquant.sweep.config import SweepConfig

REACHABLE_SECONDS = 20.0  # in which a cluster must answer
MISSING = "--executor ray needs ray: pip install 'jquant[ray]'"


def check_extra() -> None:
    """Raises InputError where ray is not installed; ray is not imported."""
    if importlib.util.find_spec("ray") is None:
        raise InputError(MISSING)


@contextlib.contextmanager
def cluster(config: SweepConfig) -> Iterator[Any]:
    """Ray, connected: to the cluster that this process already uses, else to one that is left again at the end.

    Raises:
        InputError: ray is missing, nothing answers at the address within REACHABLE_SECONDS, Ray refuses it (another
            version of Ray or Python), or the cluster has GPUs and the config does not say whether to use them.
    """
    check_extra()
    ray: Any = importlib.import_module("ray")
    connected = ray.is_initialized()
    if connected and config.ray_address is not None:
        raise InputError(f"ray-address {config.ray_address}: this process is connected to a Ray cluster already")
    with contextlib.nullcontext() if connected else _connection(ray, config.ray_address):
        if config.gpus_per_cell is None and ray.cluster_resources().get("GPU"):
            raise InputError("the Ray cluster has GPUs: say --gpus-per-cell 1 to use them, or 0 to compute on CPUs")
        yield ray


def requests(config: SweepConfig, model_bytes: int) -> dict[str, float]:
    """What Ray sets aside for a worker, by the names of its resources.

    A worker holds the float model and, while it measures a cell, another copy of its weights.
    """
    memory = 2 * model_bytes + 10**9 if config.memory_per_cell is None else config.memory_per_cell * 10**9
    return {"CPU": config.cpus_per_cell or 1, "GPU": config.gpus_per_cell or 0, "memory": int(memory)}


def room(ray: Any, wanted: Mapping[str, float]) -> int:
    """How many workers the cluster holds, whoever else uses it. Raises InputError where it is none."""
    nodes = [node for node in ray.nodes() if node["Alive"]]
    count = sum(_room_on(node["Resources"], wanted) for node in nodes)
    if not count:
        raise InputError(_no_room(nodes, wanted))
    return count


def one_line(error: BaseException) -> str:
    """What Ray says, which are paragraphs, in a line: from where it says why, as far as it does."""
    text = " ".join(str(error).split())
    return text[max(0, text.find("The actor died because")) :][:240].strip(". ")


def cannot_start(error: BaseException) -> str:
    """Of a worker that could not even begin, mostly because something is not installed where it runs."""
    text = str(error).strip()
    found = re.search(r"\bip=([^,)]+)", text)
    where = f" on {found[1]}" if found else ""
    return (
        f"a worker{where} cannot start: {text.splitlines()[-1].strip()}: install jquant {__version__} with jquant[ray] "
        "on every host of the Ray cluster, for the Python that `ray start` uses"
    )


@contextlib.contextmanager
def _connection(ray: Any, address: str | None) -> Iterator[None]:
    named = address or os.environ.get("RAY_ADDRESS") or None
    if named == "auto":
        check_reachable(_running_here())
    elif named is not None and ":" in named:
        check_reachable(named)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # a cluster that we start tells nobody of it
    try:
        ray.init(address=named or "local", include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, RuntimeError, ValueError, SystemExit) as error:  # Ray's own words, also on versions
        what = "a Ray cluster cannot be started here" if named is None else f"ray-address {named}"
        token = "" if named is None else "; a cluster that asks for a token wants RAY_AUTH_MODE=token here too"
        reason = "Ray gave up waiting for it" if isinstance(error, SystemExit) else one_line(error)
        raise InputError(f"{what}: {reason}{token}") from error
    try:
        yield
    finally:
        ray.shutdown()


def check_reachable(address: str) -> None:
    """Raises InputError where nothing answers; Ray itself would try for two minutes and then end the process."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=REACHABLE_SECONDS / 2):
            pass
        if os.environ.get("RAY_USE_TLS", "0") in ("0", ""):
            grpc: Any = importlib.import_module("grpc")
            with grpc.insecure_channel(f"{host}:{port}") as channel:
                grpc.channel_ready_future(channel).result(timeout=REACHABLE_SECONDS / 2)
    except Exception as error:  # of sockets, of names, of numbers, of gRPC
        reason = one_line(error) or "nothing that speaks Ray's protocol answers"
        raise InputError(
            f"ray-address {address}: no Ray cluster answers there ({reason}); `ray start --head` prints the address, "
            "and `ray status` on that host tells whether it runs"
        ) from error


def _running_here() -> str:
    """The address that `auto` means: what `ray start` left on this machine, which may have ended since."""
    services: Any = importlib.import_module("ray._private.services")  # Ray has no public name for it
    try:
        return services.canonicalize_bootstrap_address("auto")
    except ConnectionError as error:
        raise InputError(f"ray-address auto: {one_line(error)}") from error


def _room_on(resources: Mapping[str, float], wanted: Mapping[str, float]) -> int:
    """How many workers a host holds."""
    return int(min(resources.get(name, 0) / amount + 1e-6 for name, amount in wanted.items() if amount))


def _no_room(nodes: Sequence[Any], wanted: Mapping[str, float]) -> str:
    def shown(amounts: Mapping[str, float]) -> str:
        gigabytes = amounts.get("memory", 0) / 10**9
        return f"{amounts.get('CPU', 0):g} CPUs, {amounts.get('GPU', 0):g} GPUs and {gigabytes:.1f} GB"

    hosts = "; ".join(f"{node['NodeManagerHostname']} has {shown(node['Resources'])}" for node in nodes)
    return (
        f"no host of the Ray cluster has room for a worker of {shown(wanted)}: {hosts}. Ask for less by "
        "--cpus-per-cell, --gpus-per-cell, --memory-per-cell"
    )
