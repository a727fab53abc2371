"""What options of several commands mean."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from jquant.core.errors import InputError

if TYPE_CHECKING:
    from jax.sharding import Mesh


def parsed_scheme(spec: str | None) -> Any:
    if spec is None:
        return None
    from jquant.core.scheme import scheme

    return scheme(spec)


def round_layers(model: Any, scheme: Any) -> None:
    if scheme is not None:
        from jquant.ptq.rtn import quantize_layers

        quantize_layers(model, scheme)


def default_batch(batch: int | None, mesh: Mesh | None = None) -> int:
    """Windows a forward pass: those asked for, else one on CPU and eight elsewhere, or as many as the mesh needs."""
    from jquant.kernels.dispatch import on_cpu
    from jquant.nn.mesh import DATA, axis_size

    least = 1 if on_cpu() else 8
    devices = axis_size(mesh, DATA)
    return -(-least // devices) * devices if batch is None else batch


def calibration_batch(batch: int | None, windows: int, mesh: Mesh | None = None) -> int:
    """As `default_batch`, where each batch must be full: of itself it is the largest that divides the windows.

    Raises:
        InputError: windows do not divide over the mesh.
    """
    from jquant.nn.mesh import DATA, axis_size

    devices = axis_size(mesh, DATA)
    if batch is None and windows % devices:
        fewer, more = windows // devices * devices, -(-windows // devices) * devices
        raise InputError(
            f"{windows} calibration windows over data={devices}: each device takes as many: give --calibration-windows "
            f"{f'{fewer} or {more}' if fewer else more}, or a --mesh with fewer devices along data"
        )
    if batch is not None:
        return batch
    sizes = range(devices, default_batch(None, mesh) + 1, devices)
    return max(size for size in sizes if windows % size == 0)
