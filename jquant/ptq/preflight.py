"""What a run will take, worked out before it starts.

time         passes of the calibration data through a block, its Gram matrices, what each method says of its solver and
             its search (cost.py), what reports compare, and weights on their way from file to file
memory       two blocks, the embedding and the output projection, which may stand beside them; the states of all
             calibration tokens at the block's entrance and at its layers; and the Gram matrix of the widest layer, in
             whose place its factor is made, with what making it takes
disk         the weights, packed or as they are; the states that a killed run would go on from; and spilled activations
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path as FilePath

import jax
from jax.sharding import Mesh

from jquant.core.errors import InputError
from jquant.core.qtensor import quantize
from jquant.core.scheme import scheme
from jquant.hardware.free_memory import free_memory, size_text
from jquant.kernels.dispatch import on_cpu
from jquant.nn.mesh import AXES, DATA, axis_size
from jquant.nn.placement import CUTTING
from jquant.nn.protocol import Equivalence
from jquant.nn.second_level import reading_together
from jquant.nn.surgery import Path
from jquant.ptq.block import fitting_places, rule_needs_data
from jquant.ptq.cost import Cost, Load, Shape, measured_rates, rounding, square_error
from jquant.ptq.methods import SOLVERS
from jquant.ptq.recipe import Rule
from jquant.ptq.rule_check import EMBEDDING
from jquant.ptq.transforms import TRANSFORMS, configured
from jquant.ptq.trial import Outline

_SHARE = 0.9  # of the free memory that a run may plan with
_BYTES_A_SECOND = 2e8  # of float weights that are read, packed, hashed and written: SmolLM2's on a CPU
_STATES = 3  # blocks whose entering states lie on disk at once (workdir.py)


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Before the run; seconds rest on rates measured now, and leave out what compiling takes, once a run."""

    operations: float
    seconds: float
    weight_bytes: int
    activation_bytes: int  # in memory, or on disk where they spill
    statistic_bytes: int
    available_bytes: int | None  # None where the platform does not say
    written_bytes: int  # to disk, without spilled activations
    spilled_bytes: int
    free_disk_bytes: int | None

    @property
    def needed_bytes(self) -> int:
        """Of memory at the peak."""
        return self.weight_bytes + self.statistic_bytes + (0 if self.spilled_bytes else self.activation_bytes)

    @property
    def disk_bytes(self) -> int:
        """Of disk at the peak."""
        return self.written_bytes + self.spilled_bytes

    def check(self, target: FilePath) -> None:
        """Raises InputError where the run cannot fit in memory, or its folder where `target` is to be."""
        needed, spills = self.needed_bytes, self.spilled_bytes > 0
        if self.available_bytes is not None and needed > _SHARE * self.available_bytes:
            advice = "quantize fewer windows" if spills else "keep activations on disk (--spill), or use fewer windows"
            if not self.activation_bytes:
                advice = "free some, or spread the work over devices (--mesh)"
            raise InputError(
                f"the run needs {size_text(needed)} ({size_text(self.weight_bytes)} of weights, "
                f"{size_text(self.activation_bytes)} of activations, {size_text(self.statistic_bytes)} of statistics), "
                f"{size_text(self.available_bytes)} are free: {advice}"
            )
        if self.free_disk_bytes is not None and self.disk_bytes > self.free_disk_bytes:
            spilled = f", {size_text(self.spilled_bytes)} of them activations" if spills else ""
            raise InputError(
                f"{target}: the run writes {size_text(self.disk_bytes)}{spilled}, "
                f"{size_text(self.free_disk_bytes)} are free on that disk: make room, or choose another --out"
                + (", or fewer windows" if spills else "")
            )

    def __str__(self) -> str:
        in_memory = self.activation_bytes and not self.spilled_bytes
        products = f"{self.operations / 1e12:.1f} TFLOP, " if self.operations > 5e10 else ""
        return (
            f"{products}about {_duration(self.seconds)} beyond compiling; "
            f"memory {size_text(self.needed_bytes)}"
            f"{f', {size_text(self.activation_bytes)} of them activations' if in_memory else ''}; "
            f"disk {size_text(self.disk_bytes)}"
            f"{f', {size_text(self.spilled_bytes)} of them activations' if self.spilled_bytes else ''}"
        )


def estimate(
    rules: Mapping[Path, Rule],
    shapes: Mapping[Path, Shape],
    *,
    load: Load | None,
    places: Sequence[Equivalence] = (),
    itemsize: int = 4,
    mesh: Mesh | None = None,
    target: FilePath = FilePath(),
    spill: bool = False,
    finished: int = 0,
) -> Estimate:
    """Of quantizing layers by their rules.

    On a mesh memory is that of one device, and devices share the work.

    Args:
        rules: of the layers that are quantized.
        shapes: of the weights of all layers.
        load: the calibration data; None where no rule needs any.
        places: of every block, where transforms may fold scales.
        itemsize: bytes of an activation, and of a weight that stays as it is.
        mesh: as in `quantize_model`.
        target: where the folder will be.
        spill: activations go to disk.
        finished: blocks that an earlier run has done.
    """
    parts = _parts(shapes)
    blocks = {prefix: inside for prefix, inside in parts.items() if prefix.startswith("blocks.")}
    load = load if any(map(rule_needs_data, rules.values())) else None
    cost, kept, filed, written, moved = Cost(), 0, 0, 0, 0
    for index, (prefix, inside) in enumerate(parts.items()):
        wanted = {path: rules[prefix + path] for path in inside if prefix + path in rules}
        reading = [path for path in wanted if prefix + path != EMBEDDING]
        groups = reading_together(reading, places if prefix in blocks else ())
        if load is not None:
            kept = max(kept, sum(load.rows(inside[group[0]]) * inside[group[0]][-1] for group in groups))
            filed = max(filed, sum(load.rows(inside[path]) * inside[path][-1] for path in reading))
        if prefix in blocks and index < finished:
            continue
        cost += _part_cost(prefix, inside, wanted, groups, places, load)
        moved += sum(map(math.prod, inside.values()))
        written += sum(
            _packed_bytes(wanted[path].scheme or "", shape) if path in wanted else itemsize * math.prod(shape)
            for path, shape in inside.items()
        )
    largest = max((sum(map(math.prod, inside.values())) for inside in blocks.values()), default=0)
    outer = sum(
        math.prod(shape) for prefix, inside in parts.items() if prefix not in blocks for shape in inside.values()
    )
    widest = max((shapes[path] for path in rules), key=lambda shape: shape[-1])
    with_inputs = [shapes[path] for path in rules if path != EMBEDDING] if load is not None else []
    squares = max((math.prod(shape[:-2]) * shape[-1] ** 2 for shape in with_inputs), default=0)
    states = activations = spilled = 0
    if load is not None:
        hidden = min((shape[-1] for inside in blocks.values() for shape in inside.values()), default=0)
        states = load.tokens * itemsize * hidden
        activations = 2 * states + itemsize * kept
        spilled = 2 * states + itemsize * filed  # layers that read the same input have a file each
    rates = measured_rates()
    seconds = cost.operations / rates.operations + cost.roundings / rates.roundings
    return Estimate(
        operations=cost.operations,
        seconds=seconds / axis_size(mesh, *AXES) + 4 * moved / _BYTES_A_SECOND,
        weight_bytes=(2 * largest + outer) * itemsize // axis_size(mesh, *CUTTING),
        activation_bytes=activations // axis_size(mesh, DATA),
        statistic_bytes=int(4 * (1.5 if on_cpu() else 4) * squares)
        + 6 * 4 * math.prod(widest) // axis_size(mesh, *CUTTING),
        available_bytes=_available(1 if mesh is None else len(mesh.local_devices)),
        written_bytes=written + (1 if finished else _STATES) * states,
        spilled_bytes=spilled if spill else 0,
        free_disk_bytes=_free_disk(target),
    )


def _parts(shapes: Mapping[Path, Shape]) -> dict[str, dict[Path, Shape]]:
    """Layers of each block, then those outside of them, by prefix and path behind it."""
    parts: dict[str, dict[Path, Shape]] = {}
    for path in sorted(shapes, key=lambda path: not path.startswith("blocks.")):
        depth = 2 if path.startswith("blocks.") else 0
        prefix = "".join(f"{name}." for name in path.split(".")[:depth])
        parts.setdefault(prefix, {})[path.removeprefix(prefix)] = shapes[path]
    return parts


def _part_cost(
    prefix: str,
    inside: Mapping[Path, Shape],
    wanted: Mapping[Path, Rule],
    groups: Sequence[Sequence[Path]],
    places: Sequence[Equivalence],
    load: Load | None,
) -> Cost:
    """Of one block, or of what is outside of them."""
    cost = sum((_layer_cost(rule, inside[path], on_data=load is not None) for path, rule in wanted.items()), Cost())
    for group in groups:
        for step in dict.fromkeys(wanted[path].method for path in group):
            cost += SOLVERS[step.name].factor_cost(inside[group[0]])
    if load is None:
        return cost
    is_block = prefix.startswith("blocks.")
    # Of every input, 3/4 of the full products: most of what lies below the diagonal is left out.
    passes = sum(1.5 * load.rows(inside[group[0]]) * inside[group[0]][-1] ** 2 for group in groups)
    passes += load.tokens * load.passing(inside.values(), attends=True) if is_block else 0
    cost += Cost(operations=passes)
    for step in dict.fromkeys(step for rule in wanted.values() for step in rule.transforms):
        asking = [path for path, rule in wanted.items() if step in rule.transforms]
        outline = Outline(
            places=fitting_places(step, asking, places, prefix),
            shapes=inside,
            schemes={path: scheme(wanted[path].scheme or "") for path in asking},
            rounded=[path for path in asking if not SOLVERS[wanted[path].method.name].needs_gram],
            load=load,
        )
        search = TRANSFORMS[step.name].cost(outline, configured(TRANSFORMS, step.name, step.options))
        cost += search + Cost(operations=passes)  # and another pass to observe
    return cost


def _layer_cost(rule: Rule, shape: Shape, *, on_data: bool) -> Cost:
    """Of solving a layer, and of what the report says of it: three times what errors do to the output."""
    solver, wanted = SOLVERS[rule.method.name], scheme(rule.scheme or "")
    config = configured(SOLVERS, rule.method.name, rule.method.options)
    compared = (
        square_error(shape) * (1.5 if solver.needs_gram else 3) if on_data else Cost()
    )  # of half of H, if ordered
    return solver.cost(shape, wanted, config) + rounding(shape, wanted) + compared


@lru_cache(maxsize=1024)
def _packed_bytes(spec: str, shape: Shape) -> int:
    found = jax.eval_shape(partial(quantize, scheme=scheme(spec)), jax.ShapeDtypeStruct(shape, "float32"))
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(found))


def _available(devices: int) -> int | None:
    """Free bytes of a device that the arrays will lie on; on CPU so many share what is free."""
    if not on_cpu():
        stats = jax.local_devices()[0].memory_stats() or {}
        return stats["bytes_limit"] - stats["bytes_in_use"] if "bytes_limit" in stats else None
    free = free_memory()
    return None if free is None else free // devices


def _free_disk(target: FilePath) -> int | None:
    """Of the file system that a file of this name would lie on."""
    there = target.absolute()
    while not there.exists() and there != there.parent:
        there = there.parent
    try:
        return shutil.disk_usage(there).free
    except OSError:
        return None


def _duration(seconds: float) -> str:
    return (
        f"{seconds:.0f} s"
        if seconds < 120
        else f"{seconds / 60:.0f} min"
        if seconds < 7200
        else f"{seconds / 3600:.1f} h"
    )
