"""The devices of a run by name: `data=2,fsdp=4,tensor=2`.

data      batches are spread over it, parameters copied
fsdp      parameters are cut over it; training spreads batches over it too, and gathers a parameter where it is used
tensor    parameters are cut over it and stay so: each device computes its own part of a layer's outputs
"""

from __future__ import annotations

import math
import re
from typing import Any

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding

from jquant.core.errors import InputError
from jquant.io.processes import several

DATA, FSDP, TENSOR = "data", "fsdp", "tensor"
AXES = (DATA, FSDP, TENSOR)  # in this order devices are counted: those that cut a layer stand closest
_EXAMPLE = "data=2,fsdp=4"


def make_mesh(spec: str) -> Mesh | None:
    """The mesh that the text describes, its axes in the order of `AXES`; None for the empty text.

    One process may take a part of its devices; several take all that they have together.

    Raises:
        InputError: an unknown axis, or other devices than there are.
    """
    sizes = parse_mesh(spec)
    if not sizes:
        if several():
            there = jax.device_count()
            raise InputError(
                f"{jax.process_count()} processes with {there} devices: say how to use them, as data={there}"
            )
        return None
    wanted, there = math.prod(sizes.values()), jax.device_count()
    if wanted > there or (several() and wanted != there):
        of = f" of {jax.process_count()} processes" if several() else ""
        raise InputError(
            f"mesh {spec!r} asks for {wanted} devices, there are {there}{of}: {_named(jax.devices())}; "
            f"choose sizes whose product is {there}"
        )
    devices = jax.devices()[:wanted]
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes), devices=devices)


def parse_mesh(spec: str) -> dict[str, int]:
    """Devices by axis, in the order of `AXES`; nothing for the empty text.

    Raises:
        InputError: it is no list of axes with sizes, or names one twice.
    """
    sizes: dict[str, int] = {}
    for part in spec.split(",") if spec else ():
        found = re.fullmatch(rf"\s*({'|'.join(AXES)})\s*=\s*(0+|[1-9][0-9]{{0,6}})\s*", part)
        if found is None:
            raise InputError(f"mesh {spec!r}: write axes of {', '.join(AXES)} with their devices, as {_EXAMPLE}")
        if found[1] in sizes:
            raise InputError(f"mesh {spec!r}: {found[1]} stands there twice; write one size for it")
        sizes[found[1]] = int(found[2])
        if not sizes[found[1]]:
            raise InputError(f"mesh {spec!r}: an axis has at least 1 device; leave out what is not to be cut")
    return {axis: sizes[axis] for axis in AXES if axis in sizes}


def mesh_text(mesh: Mesh | None) -> str:
    """The text of a mesh; empty for None."""
    return "" if mesh is None else ",".join(f"{axis}={size}" for axis, size in mesh.shape.items())


def axis_size(mesh: Mesh | AbstractMesh | None, *axes: str) -> int:
    """Devices along these axes together."""
    return 1 if mesh is None else math.prod(mesh.shape.get(axis, 1) for axis in axes)


def mesh_of(tree: Any) -> Mesh | None:
    """The mesh that arrays of a module, state or pytree lie on; None where they lie on one device."""
    from flax import nnx

    tree = nnx.state(tree) if isinstance(tree, nnx.Module) else tree
    for leaf in jax.tree.leaves(tree):
        sharding = getattr(leaf, "sharding", None)
        if isinstance(sharding, NamedSharding) and isinstance(sharding.mesh, Mesh):
            return sharding.mesh
    return None


def _named(devices: list[Any]) -> str:
    first = ", ".join(str(device) for device in devices[:4])
    return first + (", …" if len(devices) > 4 else "")
