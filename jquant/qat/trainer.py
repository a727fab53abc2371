"""Trains a prepared model: any NNX module, with any loss; resumed to the same bits wherever it was killed.

    train(model, distillation_loss(), RowBatches(windows, batch=8, seed=0), QATConfig(steps=500), teacher=float_model)

Bits are the same on CPU. On GPU, sums of an embedding's gradient come in any order: set
XLA_FLAGS=--xla_gpu_deterministic_ops=true for equal bits there.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from jquant.core.errors import InputError
from jquant.io.folder_lock import locked_folder
from jquant.io.processes import is_writer
from jquant.nn.mesh import make_mesh
from jquant.nn.placement import copied, fetched, parameter_shardings, put, state_shardings
from jquant.qat import blowup
from jquant.qat.batches import Batches
from jquant.qat.checkpoints import Checkpoints, check_definition
from jquant.qat.config import QATConfig
from jquant.qat.losses import LossFn
from jquant.qat.metrics import MetricsLog, StepRecord
from jquant.qat.optimizer import make_optimizer, schedule
from jquant.qat.schedule import FINAL, enter, rounded_to_nearest, stage_at
from jquant.qat.second_level import share_levels
from jquant.qat.sharding import check_rows, spread_rows, train_state_shardings
from jquant.qat.state import Parts, TrainState, cast, split
from jquant.qat.step import StepReport, make_step

EvalFn = Callable[[nnx.Module], Mapping[str, float]]
Listener = Callable[[StepRecord], None]


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """What a run came to."""

    steps: int
    resumed_from: int  # steps that an earlier run had done
    loss: float  # of the last step; NaN where an earlier run had done them all
    evaluation: dict[str, float]  # of the last step; empty where an earlier run had done them all
    best_step: int | None  # where the best was asked for: the step whose state the model holds
    best: float | None  # its figure
    seconds: float


def train(
    model: nnx.Module,
    loss_fn: LossFn,
    batches: Batches,
    config: QATConfig,
    *,
    teacher: nnx.Module | None = None,
    folder: Path | None = None,
    definition: Mapping[str, Any] | None = None,
    eval_fn: EvalFn | None = None,
    listen: Listener | None = None,
) -> TrainResult:
    """Trains a model in place.

    Args:
        model: any NNX module, after `prepare`; its floating parameters train, but those that `config.frozen` names.
        loss_fn: (model, batch) -> (loss, metrics), both of scalars, or (model, batch, teacher) -> … where there is a
            teacher. Runs under jit; variables that are no Param (running ranges, random streams) may change.
        batches: `config.rows_per_step` rows at a time; `RowBatches` or an iterator of a grain dataset.
        config: how.
        teacher: a model that the loss compares with; not trained.
        folder: keeps states and metrics, and is resumed from where an earlier run left them; one process at a time.
            None keeps nothing.
        definition: JSON values that say what is trained (source, recipe, data); another run's folder is refused.
        eval_fn: figures of the model, every `config.eval_every` steps and at the end.
        listen: hears of every step.

    Returns:
        What the run came to; the model holds its last state, or the best where `config.best` asks for it, quantized by
        the recipe, its ranges fixed.

    Raises:
        InputError: config and data do not fit, the folder holds another run, or the loss is not finite: then the model
            holds the state before that step, and the message names the step, the last good state and the layer.
    """
    started = time.perf_counter()
    if eval_fn is None and (config.eval_every is not None or config.best is not None):
        raise InputError("eval_every and best need figures: give eval_fn")
    if config.best is not None and folder is None:
        raise InputError(f"best is {config.best!r}: its state is kept in a folder; give one")
    config = config.with_steps(getattr(batches, "rows", None))
    run = _Run(model, loss_fn, batches, config, teacher, eval_fn)
    with _kept(folder, config, definition or {}) as states:
        done = 0 if states is None or states.latest is None else run.restore(states, states.latest)
        log = None
        if folder is not None and is_writer():
            log = MetricsLog(folder, done=done, tensorboard=config.tensorboard)
        try:
            last = run.steps(done, states, log, listen)
            best = None if states is None or config.best is None else states.best
            if states is not None and best is not None:
                run.restore(states, best)
        finally:
            run.put_back()
            if log is not None:
                log.close()
    enter(model, FINAL, config)
    return TrainResult(
        steps=run.total,
        resumed_from=done,
        loss=float("nan") if last is None else last.loss,
        evaluation={} if last is None else last.evaluation,
        best_step=best,
        best=None if best is None else run.best,
        seconds=time.perf_counter() - started,
    )


class _Run:
    """One call of `train`: the model taken apart, and what its steps need."""

    def __init__(
        self,
        model: nnx.Module,
        loss_fn: LossFn,
        batches: Batches,
        config: QATConfig,
        teacher: nnx.Module | None,
        eval_fn: EvalFn | None,
    ) -> None:
        assert config.steps is not None
        self.model, self.batches, self.config, self.eval_fn, self.total = model, batches, config, eval_fn, config.steps
        self.mesh = make_mesh(config.mesh)
        check_rows(config.batch, self.mesh)
        self.stage = stage_at(config, 0)
        enter(model, self.stage, config)
        parts = self._split()
        self.structure = parts.structure
        optimizer = make_optimizer(config, parts.groups)
        self.state, self.shardings = _placed(parts, optimizer, self.mesh)
        self.fixed = _spread(parts.fixed, self.mesh)
        self.teacher = (None, None) if teacher is None else _teaching(teacher, config.dtype, self.mesh)
        self.step = make_step(loss_fn, optimizer, dtype=config.dtype, shardings=self.shardings, mesh=self.mesh)
        self.rates = np.asarray(schedule(config, config.learning_rate)(jnp.arange(config.steps)))
        self.largest_at_start = fetched(blowup.largest(self.state.trained))
        self.best = float("inf")

    def restore(self, states: Checkpoints, step: int) -> int:
        """Goes back to where an earlier run stood; the steps that it had done."""
        self.stage = stage_at(self.config, step - 1)  # its parameters are those of this stage
        enter(self.model, self.stage, self.config)
        self.structure = self._split().structure
        self.state, place = states.restore(step, self.state)
        self.batches.set_state(place["batches"])
        self.best = float("inf") if place["best"] is None else place["best"]
        return step

    def steps(
        self, done: int, states: Checkpoints | None, log: MetricsLog | None, listen: Listener | None
    ) -> StepRecord | None:
        """All steps from `done` on. Each one's figures are fetched while the next runs."""
        pending: tuple[int, StepReport, float, str] | None = None
        clock, record = time.perf_counter(), None
        for step in range(done, self.total):
            self._enter_stage(step)
            batch = self._next_batch()
            self.state, report = self.step(
                self.structure, self.teacher[0], self.state, self.fixed, self.teacher[1], batch
            )
            if pending is not None:
                record, clock = self._finish(pending, clock, states, log, listen, evaluate=False)
            pending = (step + 1, report, *_amount(batch))
            if self._is_point(step + 1):
                record, clock = self._finish(pending, clock, states, log, listen, evaluate=True)
                pending = None
        return record

    def put_back(self) -> None:
        """The state as it is now into the model."""
        nnx.update(self.model, self.structure.state(self.state.trained), self.state.rest)
        share_levels(self.model)  # of the weights after the last update

    def _enter_stage(self, step: int) -> None:
        stage = stage_at(self.config, step)
        if stage != self.stage:
            self.put_back()
            enter(self.model, stage, self.config)
            self.stage = stage
            parts = self._split()
            self.structure = parts.structure
            # With the number of bits scales change too. The optimizer goes on as it was.
            state = TrainState(parts.trained, parts.rest, self.state.optimizer)
            self.state = state if self.shardings is None else jax.tree.map(put, state, self.shardings)

    def _split(self) -> Parts:
        return split(self.model, frozen=self.config.frozen, dtype=self.config.dtype)

    def _next_batch(self) -> Any:
        rows = next(self.batches)
        lengths = {len(leaf) for leaf in jax.tree.leaves(rows)}
        if lengths != {self.config.rows_per_step}:
            raise InputError(
                f"the data gives batches of {sorted(lengths)} rows, a step takes {self.config.rows_per_step} "
                f"(batch {self.config.batch} × gradient_accumulation {self.config.gradient_accumulation})"
            )
        shape = (self.config.gradient_accumulation, self.config.batch)
        return spread_rows(jax.tree.map(lambda leaf: leaf.reshape(*shape, *leaf.shape[1:]), rows), self.mesh)

    def _is_point(self, step: int) -> bool:
        """Whether something is done behind this step that needs its state."""
        return step == self.total or self._evaluates(step) or _divides(self.config.checkpoint_every, step)

    def _evaluates(self, step: int) -> bool:
        return self.eval_fn is not None and (step == self.total or _divides(self.config.eval_every, step))

    def _finish(
        self,
        pending: tuple[int, StepReport, float, str],
        clock: float,
        states: Checkpoints | None,
        log: MetricsLog | None,
        listen: Listener | None,
        *,
        evaluate: bool,
    ) -> tuple[StepRecord, float]:
        """Fetches a step's figures, checks them, evaluates and keeps the state where it is time; then tells."""
        step, report, amount, unit = pending
        report = fetched(report)
        now = time.perf_counter()
        if not report.finite:
            self._diverged(step, report, states)
        figures = {} if not (evaluate and self._evaluates(step)) else self._evaluate()
        record = StepRecord(
            step=step,
            steps=self.total,
            loss=float(report.loss),
            parts={name: float(value) for name, value in report.metrics.items()},
            grad_norm=float(report.grad_norm),
            learning_rate=float(self.rates[step - 1]),
            per_second=amount / max(now - clock, 1e-9),
            unit=unit,
            evaluation=figures,
        )
        if log is not None:
            log.write(record)
        if evaluate and states is not None:
            self._keep(step, figures, states)
        if listen is not None:
            listen(record)
        return record, time.perf_counter() if evaluate else now

    def _evaluate(self) -> dict[str, float]:
        assert self.eval_fn is not None
        self.put_back()
        with rounded_to_nearest(self.model):
            return {name: float(value) for name, value in self.eval_fn(self.model).items()}

    def _keep(self, step: int, figures: Mapping[str, float], states: Checkpoints) -> None:
        name = self.config.best
        if name is not None and figures and name not in figures:
            raise InputError(f"best is {name!r}; the evaluation gives {', '.join(figures)}")
        figure = None
        if name is not None and figures and self.stage.is_final and not np.isnan(figures[name]):
            figure = figures[name]  # floats, or more bits, would be better at no merit
        is_best = figure is not None and figure < self.best
        self.best = figure if figure is not None and is_best else self.best
        if step == self.total or is_best or _divides(self.config.checkpoint_every, step):
            place = {"batches": self.batches.get_state(), "best": None if np.isinf(self.best) else self.best}
            states.save(step, self.state, place, figure=figure)

    def _diverged(self, step: int, report: StepReport, states: Checkpoints | None) -> None:
        names = self.structure.names
        now = fetched(blowup.largest(self.state.trained))
        pointed = blowup.culprit(names, self.largest_at_start, now, np.asarray(report.norms))
        latest = None if states is None else states.latest
        kept = "no state was kept" if latest is None else f"the last good state is that of step {latest}"
        raise InputError(
            f"step {step}: loss {float(report.loss):.6g}, norm of its gradient {float(report.grad_norm):.6g}: training "
            f"has diverged; {pointed}; {kept}; lower learning_rate or scale_learning_rate, or "
            "lengthen warmup_steps"
        )


@contextlib.contextmanager
def _kept(folder: Path | None, config: QATConfig, definition: Mapping[str, Any]) -> Iterator[Checkpoints | None]:
    """The states of a run's folder, if there is one, after comparing what it computes."""
    if folder is None:
        yield None
        return
    place = {"backend": jax.default_backend(), "jax": jax.__version__}
    with locked_folder(folder):
        check_definition(folder, {**definition, "training": config.decisive(), **place})
        states = Checkpoints(folder, keep=config.keep)
        try:
            yield states
        finally:
            states.close()


def _placed(parts: Parts, optimizer: Any, mesh: Mesh | None) -> tuple[TrainState, Any]:
    """The first state, in arrays of its own, on the devices; and where it lies, on a mesh."""
    if mesh is None:
        trained = jax.tree.map(jnp.copy, parts.trained)
        return TrainState(trained, jax.tree.map(jnp.copy, parts.rest), optimizer.init(trained)), None
    places = parameter_shardings(parts.trained, mesh)
    trained = {name: jnp.copy(put(array, places[name])) for name, array in parts.trained.items()}
    shapes = jax.eval_shape(optimizer.init, trained)
    moments = jax.jit(optimizer.init, out_shardings=train_state_shardings(shapes, places, mesh))(trained)
    state = TrainState(trained, jax.tree.map(jnp.copy, copied(parts.rest, mesh)), moments)
    return state, train_state_shardings(state, places, mesh)


def _spread(tree: Any, mesh: Mesh | None) -> Any:
    """What is not trained, by the same rules."""
    return tree if mesh is None else jax.tree.map(put, tree, state_shardings(tree, mesh))


def _teaching(teacher: nnx.Module, dtype: str, mesh: Mesh | None) -> tuple[nnx.GraphDef, tuple[Any, Any]]:
    """The teacher's graphdef and states, parameters in the dtype of computation; what is packed stays as it is."""
    graphdef, params, rest = nnx.split(teacher, nnx.Param, ...)
    params = jax.tree.map(lambda leaf: cast(leaf, dtype), params)
    return graphdef, (_spread(params, mesh), _spread(rest, mesh))


def _divides(every: int | None, step: int) -> bool:
    return every is not None and step % every == 0


def _amount(batch: Any) -> tuple[float, str]:
    """What a batch holds: tokens where it is one array of whole numbers, else rows."""
    leaves = jax.tree.leaves(batch)
    if len(leaves) == 1 and leaves[0].ndim == 3 and jnp.issubdtype(leaves[0].dtype, jnp.integer):
        return float(leaves[0].size), "tokens"
    return float(leaves[0].shape[0] * leaves[0].shape[1]), "rows"
