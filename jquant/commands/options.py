"""What options of several commands mean."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from jquant.core.errors import InputError

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from jquant.data.text import Text
    from jquant.models.checkpoint import Checkpoint


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


def refuse_calibration_text(checkpoint: Checkpoint, text: Text) -> None:
    if checkpoint.calibration_sha256 == text.sha256:
        raise InputError(
            f"{checkpoint.name} was calibrated on the text {text.name}: its perplexity there says nothing; give another"
        )
