"""How several processes of one run find each other. No jax here: the command line reads it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from jquant.core.errors import InputError


@dataclass(frozen=True, kw_only=True)
class ProcessOptions:
    """Several processes, on one host or many: the same command is started for each."""

    distributed: Literal["off", "auto"] = "off"
    """`auto`: SLURM, a TPU pod, Kubernetes or MPI says which process this is of how many, and where they meet."""
    coordinator: str | None = None
    """In the place of that: HOST:PORT on which process 0 listens."""
    processes: int | None = None
    """With a coordinator: how many processes there are."""
    process: int | None = None
    """With a coordinator: which of them this is, from 0."""
    startup_timeout: int = 300
    """Seconds within which all processes must have come."""
    heartbeat_timeout: int = 60
    """Seconds after which a silent process counts as lost, and the others end."""

    def __post_init__(self) -> None:
        given = [value is not None for value in (self.coordinator, self.processes, self.process)]
        if any(given) and not all(given):
            raise InputError("--coordinator HOST:PORT, --processes N and --process I belong together: give all three")
        if any(given) and self.distributed == "auto":
            raise InputError("--distributed auto finds the coordinator by itself: leave --coordinator out, or auto")
        for name in ("startup_timeout", "heartbeat_timeout"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}; it must be at least 1 second")
        if self.coordinator is not None and self.processes is not None and self.process is not None:
            if not re.fullmatch(r"(\[[0-9a-fA-F:]+\]|[^:\s]+):[0-9]{1,5}", self.coordinator):
                raise InputError(f"coordinator {self.coordinator!r}: write HOST:PORT, as node-0:8476")
            if not 0 <= self.process < self.processes:
                raise InputError(f"process {self.process} of {self.processes}: they are counted from 0")

    @property
    def asked_for(self) -> bool:
        """Whether there are several processes."""
        return self.distributed == "auto" or self.coordinator is not None
