"""Runs a command as several processes of this machine that meet at a real coordinator, with two devices each."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
PROGRAM = "import sys; from jquant.cli import main; sys.exit(main(sys.argv[1:]))"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def started(
    *commands: Sequence[str],
    before: Sequence[str] = (),
    timeouts: tuple[int, int] = (60, 10),
    count: int | None = None,
    slurm: bool = False,
) -> Iterator[list[subprocess.Popen[str]]]:
    """One process for each command, as many as `count` says of one run; ended with the block.

    Args:
        commands: of the command line.
        before: Python that a process runs first, by process.
        timeouts: to start within, and between heartbeats.
        count: how many there are said to be.
        slurm: they learn it from the variables that srun sets.
    """
    port, running = free_port(), []
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
        "JAX_COMPILATION_CACHE_DIR": "",
    }
    try:
        for index, command in enumerate(commands):
            program = (before[index] if index < len(before) else "") + PROGRAM
            meeting = ["--coordinator", f"127.0.0.1:{port}", "--processes", str(count or len(commands))]
            meeting = ["--distributed", "auto"] if slurm else [*meeting, "--process", str(index)]
            limits = ["--startup-timeout", str(timeouts[0]), "--heartbeat-timeout", str(timeouts[1])]
            variables = {
                "SLURM_JOB_ID": str(port),  # of which jax makes a port
                "SLURM_STEP_NODELIST": "localhost",
                "SLURM_JOB_NUM_NODES": "1",
                "SLURM_NTASKS": str(len(commands)),
                "SLURM_PROCID": str(index),
                "SLURM_LOCALID": str(index),
                "SLURM_NODEID": "0",
            }
            running.append(
                subprocess.Popen(
                    [sys.executable, "-c", program, *command, *meeting, *limits],
                    cwd=ROOT,
                    env={**environment, **(variables if slurm else {})},
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                )
            )
        yield running
    finally:
        for process in running:
            process.kill()
            process.communicate()


def ended(processes: Sequence[subprocess.Popen[str]], seconds: float = 300) -> list[tuple[int, str, str]]:
    """Exit code, output and errors of each, once all have ended."""
    found = []
    for process in processes:
        out, error = process.communicate(timeout=seconds)
        found.append((process.returncode, out, error))
    return found
