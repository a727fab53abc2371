"""The folder of a training run: what it computes, its latest and best states, and where its data stands.

    definition.json     what the run computes; another run is not resumed from here
    states/STEP/        by orbax: trained parameters, other variables, optimizer, place in the data
    metrics.jsonl       one line a step (qat/metrics.py)

A run that was killed at any point is resumed from its latest whole state, and computes the same bits.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jquant.core.errors import InputError
from jquant.io.atomic import replacing
from jquant.io.json_file import read_json
from jquant.io.processes import on_writer
from jquant.io.system_errors import system_errors

DEFINITION = "definition.json"
STATES = "states"


class Checkpoints:
    """An opened folder of states."""

    def __init__(self, folder: Path, *, keep: int) -> None:
        """
        Args:
            folder: of the run.
            keep: the latest states that are kept, beside the one whose figure is lowest.

        Raises:
            InputError: the folder cannot be made.
        """
        import orbax.checkpoint as ocp

        policies = ocp.checkpoint_managers
        best = policies.BestN(
            get_metric_fn=lambda figures: figures["best"], reverse=True, n=1, keep_checkpoints_without_metrics=False
        )
        options = ocp.CheckpointManagerOptions(
            preservation_policy=policies.AnyPreservationPolicy([policies.LatestN(n=keep), best]),
            cleanup_tmp_directories=True,
            enable_async_checkpointing=False,  # the next step donates the arrays that would be written
        )
        try:
            logging.getLogger("absl").addFilter(_no_information)
            self._manager = ocp.CheckpointManager((folder / STATES).absolute(), options=options)
        except OSError as error:
            raise InputError(f"{folder}: cannot be made: {error.strerror or error}") from error
        self._folder = folder

    @property
    def latest(self) -> int | None:
        """The step of the latest whole state."""
        return self._manager.latest_step()

    @property
    def best(self) -> int | None:
        """The step of the state whose figure is lowest; None where none has one."""
        scored = [(info.metrics["best"], info.step) for info in self._manager._checkpoints if info.metrics]
        return min(scored)[1] if scored else None

    def save(self, step: int, state: Any, place: Mapping[str, Any], *, figure: float | None = None) -> None:
        """Writes a state, which is there whole or not at all; older ones go.

        Args:
            step: optimizer steps done.
            state: a pytree of arrays.
            place: JSON values: where the data stands, and what else a resumed run must know.
            figure: what the best is chosen by, lower being better.

        Raises:
            InputError: it cannot be written, as on a full disk.
        """
        import orbax.checkpoint as ocp

        arguments = ocp.args.Composite(state=ocp.args.StandardSave(_by_path(state)), place=ocp.args.JsonSave(place))
        try:
            with system_errors():
                metrics = None if figure is None else {"best": figure}
                self._manager.save(step, args=arguments, metrics=metrics, force=True)
                self._manager.wait_until_finished()
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or " ".join(str(error).split())[:200]
            behind = "" if self.latest is None else f" to go on from step {self.latest}"
            raise InputError(
                f"{self._folder}: the state of step {step} cannot be written: {reason}; start the same command again"
                f"{behind}"
            ) from error

    def restore(self, step: int, like: Any) -> tuple[Any, dict[str, Any]]:
        """The state that was saved at a step, and its place.

        Args:
            step: one that is there.
            like: a state of the same structure, whose shapes, dtypes and shardings are taken.

        Raises:
            InputError: the state is damaged, or of another model.
        """
        import orbax.checkpoint as ocp

        leaves, treedef = jax.tree_util.tree_flatten_with_path(like)
        wanted = {_name(path): _abstract(leaf) for path, leaf in leaves}
        arguments = ocp.args.Composite(state=ocp.args.StandardRestore(wanted), place=ocp.args.JsonRestore())
        try:
            found = self._manager.restore(step, args=arguments)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise InputError(
                f"{self._folder}: the state of step {step} is damaged or of another model: {reason}; remove "
                f"{STATES}/{step} to go on from an earlier one"
            ) from error
        arrays = [_as_before(found["state"][_name(path)], leaf) for path, leaf in leaves]
        return jax.tree.unflatten(treedef, arrays), dict(found["place"])

    def close(self) -> None:
        """Ends orbax's threads."""
        self._manager.close()


def check_definition(folder: Path, definition: Mapping[str, Any]) -> None:
    """Keeps what a run computes in its folder; compares it where there are states of a run already.

    Raises:
        InputError: the folder holds a run that differs; the message names the first difference.
    """
    on_writer(lambda: _check_definition(folder, json.loads(json.dumps(definition))))  # as it will be read back


def _check_definition(folder: Path, definition: Mapping[str, Any]) -> None:
    path = folder / DEFINITION
    if not path.exists() or not has_states(folder):
        with replacing(path) as file:
            file.write((json.dumps(definition, indent=1, ensure_ascii=False) + "\n").encode())
        return
    found, wanted = _flat(read_json(path)), _flat(definition)
    for name in dict.fromkeys((*wanted, *found)):
        if found.get(name) != wanted.get(name):
            raise InputError(
                f"{folder}: holds a run with another {name} ({_short(found, name)} there, {_short(wanted, name)} "
                "here); finish that one, choose another folder, or remove this one"
            )


def has_states(folder: Path) -> bool:
    """Whether a run in this folder got as far as a whole state."""
    return any(state.name.isdigit() for state in (folder / STATES).glob("*"))


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """The leaves of nested JSON by dotted name."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    flat: dict[str, Any] = {}
    for key, item in items:
        flat |= _flat(item, f"{prefix}.{key}" if prefix else str(key))
    return flat if isinstance(value, dict | list) and value else {prefix: value}


def _short(values: Mapping[str, Any], name: str) -> str:
    text = json.dumps(values[name], ensure_ascii=False) if name in values else "none"
    return text if len(text) <= 80 else text[:77] + "…"


def _by_path(state: Any) -> dict[str, Any]:
    return {_name(path): _plain(leaf) for path, leaf in jax.tree_util.tree_flatten_with_path(state)[0]}


def _name(path: tuple[Any, ...]) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="|")


def _plain(leaf: Any) -> Any:
    """Random keys as the words they consist of."""
    return jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf


def _abstract(leaf: Any) -> Any:
    leaf = _plain(leaf)
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)


def _as_before(found: Any, like: Any) -> Any:
    if jnp.issubdtype(like.dtype, jax.dtypes.prng_key):
        return jax.random.wrap_key_data(found, impl=jax.random.key_impl(like))
    return found


def _no_information(record: logging.LogRecord) -> bool:
    """orbax tells the log of every file it opens."""
    return record.levelno >= logging.WARNING
