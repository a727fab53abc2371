"""A jitted function that is compiled once, and loaded for each place that calls it.

On a GPU XLA has the driver record a program's kernels with the addresses of their operands, as a CUDA graph, and starts
that. Where one program serves several runs of blocks in turn, each with weights and caches of its own, it is recorded
anew at every call, which takes the host as long as the GPU takes for the token. Loaded for each run it is recorded
once.
"""

from __future__ import annotations

import threading
import warnings
from collections import Counter, OrderedDict
from collections.abc import Callable
from typing import Any

import jax
from jax.experimental import serialize_executable

from jquant.kernels.dispatch import on_cuda

AtPlace = Callable[..., Any]  # of a place, which has a number, and of what the function takes

_MOST = 16  # programs of which copies are kept

# Of a program that jax keeps, what was loaded of it for places after the first.
_loaded: OrderedDict[Any, list[jax.stages.Compiled]] = OrderedDict()
_lock = threading.Lock()


def shared(function: Any) -> AtPlace:
    """One program for all places."""
    return lambda _, *operands: function(*operands)


def own_programs(function: Any, *, static: tuple[int, ...]) -> AtPlace:
    """A program for each place, where programs are recorded; elsewhere `shared`.

    Args:
        function: jitted.
        static: which of its arguments are static, by number.

    Returns:
        A function of a place and of what `function` takes. At every call of a place operands must have the same shapes,
        dtypes, and static values. A program that cannot be written out is shared, and a warning says so.
    """
    if not are_recorded():
        return shared(function)
    copies: dict[int, jax.stages.Compiled | None] = {}  # by place; None: the function as it is
    served: Counter[Any] = Counter()  # places, by their program

    def call(place: int, *operands: Any) -> Any:
        if place not in copies:
            program = function.lower(*operands).compile()
            executable = program.runtime_executable()
            copies[place] = None if served[executable] == 0 else _copy(program, served[executable] - 1)
            served[executable] += 1
        copy = copies[place]
        if copy is None:
            return function(*operands)
        return copy(*(operand for index, operand in enumerate(operands) if index not in static))

    return call


def are_recorded() -> bool:
    """Whether XLA has programs recorded here: on one NVIDIA GPU."""
    return on_cuda() and jax.device_count() == 1


def _copy(program: jax.stages.Compiled, index: int) -> jax.stages.Compiled | None:
    """One that is loaded of it, as copies outlive the generation that asked for them.

    None, with a warning, where it cannot be written out.
    """
    executable = program.runtime_executable()
    with _lock:
        copies = _loaded.setdefault(executable, [])
        _loaded.move_to_end(executable)
        if len(_loaded) > _MOST:
            _loaded.popitem(last=False)
        while len(copies) <= index:
            try:
                parts = serialize_executable.serialize(program)
            except (jax.errors.JaxRuntimeError, NotImplementedError, ValueError) as error:  # as XLA and jax say so
                warnings.warn(f"runs of blocks share a program, which is slower: {error}", stacklevel=2)
                return None
            copies.append(serialize_executable.deserialize_and_load(*parts, execution_devices=jax.devices()[:1]))
        return copies[index]
