"""One optimizer step, compiled: microbatches, gradients, clipping, update; one that is not finite changes nothing."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from jquant.nn.mesh import TENSOR
from jquant.nn.placement import parameter_shardings, state_shardings
from jquant.qat.forward import IN_PARTS
from jquant.qat.losses import LossFn
from jquant.qat.second_level import share_levels
from jquant.qat.state import Structure, TrainState


class StepReport(NamedTuple):
    """What a step found; means over its microbatches."""

    loss: Float[Array, ""]
    metrics: dict[str, Array]
    grad_norm: Float[Array, ""]  # before clipping
    norms: Float[Array, " parameters"]  # of each trained parameter's gradient, in the order of Structure.names
    finite: Bool[Array, ""]  # whether loss and gradient were; where not, the state is what it was


Step = Callable[..., tuple[TrainState, StepReport]]


def make_step(
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    *,
    dtype: DTypeLike,
    shardings: TrainState | None,
    mesh: Mesh | None,
) -> Step:
    """The compiled step: (structure, teacher_graphdef, state, fixed, teacher_state, batch) -> (state, report).

    Args:
        loss_fn: (model, batch) -> (loss, metrics); where a teacher's graphdef is given (model, batch, teacher).
        optimizer: of the trained parameters.
        dtype: of computation; gradients and masters are float32.
        shardings: of the state; None where there is one device. A parameter that is cut over "fsdp" is gathered over it
            where it is used, in the dtype of computation, and its gradient scattered (Rajbhandari et al., ZeRO,
            1910.02054, stage 3); so are the teacher's and those that are not trained. Cuts over "tensor" stay. What
            belongs to a decoder's blocks is gathered by `forward.block_states`, block by block; its embedding and
            output projection stay in parts (outer.py); the rest, and all of other modules, is gathered at the start. A
            loss that runs a decoder by itself leaves it to XLA.
        mesh: of the shardings.

    The arrays of `state` are donated. Leaves of `batch` are [microbatches, rows, …]. A change of the structure, as
    between stages, compiles once more.
    """

    def gathered(state: Any) -> Any:
        """Whole over "fsdp", but for what stays in parts."""
        if mesh is None:
            return state

        def place(keys: tuple[Any, ...], cut: Any, whole: Any) -> Any:
            return cut if str(getattr(keys[0], "key", keys[0])) in IN_PARTS else whole

        places = (state_shardings(state, mesh), state_shardings(state, mesh, (TENSOR,)))
        return jax.lax.with_sharding_constraint(state, jax.tree_util.tree_map_with_path(place, *places))

    def loss_of(
        trained: Any, rest: Any, fixed: Any, batch: Any, structure: Structure, teacher: nnx.Module | None
    ) -> tuple[Array, Any]:
        trained = structure.computing(trained, dtype)
        if mesh is not None:
            cut, whole = parameter_shardings(trained, mesh), parameter_shardings(trained, mesh, (TENSOR,))
            places = {name: (cut if name.split(".")[0] in IN_PARTS else whole)[name] for name in trained}
            trained = jax.lax.with_sharding_constraint(trained, places)
            fixed = gathered(fixed)
        model = structure.merge(trained, fixed, rest)
        share_levels(model)
        with contextlib.nullcontext() if mesh is None else jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            loss, metrics = loss_fn(model, batch) if teacher is None else loss_fn(model, batch, teacher)
        changed = jax.tree.map(lambda new, old: new.astype(old.dtype), nnx.state(model, nnx.Not(nnx.Param)), rest)
        parts = {"loss": loss, **metrics}
        return loss.astype(jnp.float32), (jax.tree.map(lambda part: part.astype(jnp.float32), parts), changed)

    @partial(
        jax.jit,
        static_argnums=(0, 1),
        donate_argnums=(2,),
        out_shardings=None if shardings is None else (shardings, None),
    )
    def step(
        structure: Structure,
        teacher_graphdef: nnx.GraphDef | None,
        state: TrainState,
        fixed: Any,
        teacher_state: Any,
        batch: Any,
    ) -> tuple[TrainState, StepReport]:
        teacher = None if teacher_graphdef is None else nnx.merge(teacher_graphdef, *map(gathered, teacher_state))

        def gradient_of(*arguments: Any) -> tuple[Any, Any]:
            value, gradient = jax.value_and_grad(loss_of, has_aux=True)(*arguments)
            if shardings is not None:
                gradient = jax.lax.with_sharding_constraint(gradient, shardings.trained)
            return value, gradient

        def microbatch(carry: tuple[Any, Any], rows: Any) -> tuple[tuple[Any, Any], Any]:
            rest, total = carry
            (_, (parts, rest)), gradient = gradient_of(state.trained, rest, fixed, rows, structure, teacher)
            return (rest, jax.tree.map(jnp.add, total, gradient)), parts

        count = jax.tree.leaves(batch)[0].shape[0]
        if count == 1:
            only = jax.tree.map(lambda leaf: leaf[0], batch)
            (_, (parts, rest)), gradient = gradient_of(state.trained, state.rest, fixed, only, structure, teacher)
        else:
            nothing = jax.tree.map(jnp.zeros_like, state.trained)
            (rest, total), each = jax.lax.scan(microbatch, (state.rest, nothing), batch)
            gradient = jax.tree.map(lambda leaf: leaf / count, total)
            parts = jax.tree.map(lambda values: jnp.mean(values, axis=0), each)
        norms = jnp.stack([jnp.sqrt(jnp.sum(gradient[name] ** 2)) for name in structure.names])
        norm = jnp.sqrt(jnp.sum(norms**2))
        updates, optimizer_state = optimizer.update(gradient, state.optimizer, state.trained)
        finite = jnp.isfinite(parts["loss"]) & jnp.isfinite(norm)
        new = TrainState(optax.apply_updates(state.trained, updates), rest, optimizer_state)  # pyright: ignore
        kept = jax.tree.map(lambda after, before: jnp.where(finite, after, before), new, state)
        loss = parts.pop("loss")
        return kept, StepReport(loss, parts, norm, norms, finite)

    return step
