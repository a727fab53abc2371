"""From a checkpoint to a quantized one in a folder: streamed a block at a time, and resumed where it was interrupted.

Stands above the rooms, like the command line: it joins models, ptq and io.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from jax.sharding import Mesh

from jquant import __version__
from jquant.calib.gram import check_rows
from jquant.core.errors import InputError
from jquant.data.blocks import Windows
from jquant.data.overlap import calibration_record, with_earlier
from jquant.io.json_file import as_text, read_json
from jquant.io.native import check_new_folder
from jquant.kernels.dispatch import way
from jquant.models.checkpoint import Checkpoint
from jquant.models.config import ModelConfig
from jquant.models.decoder import check_length
from jquant.models.save import describe, tokenizer_files
from jquant.models.stream import StreamedModel
from jquant.nn.mesh import DATA, axis_size, mesh_text
from jquant.ptq.activations import InMemory, OnDisk
from jquant.ptq.cost import Load
from jquant.ptq.coverage import Coverage
from jquant.ptq.data import Products
from jquant.ptq.pipeline import Event, quantize_blocks
from jquant.ptq.preflight import Estimate, estimate
from jquant.ptq.recipe import Recipe, Rule, assign
from jquant.ptq.rule_check import check_products, check_rules, inputs_of_gram
from jquant.ptq.workdir import open_workdir

NUMERICS = 13  # raised when a change moves bits: an unfinished run of another value is not gone on with


def quantize_checkpoint(
    checkpoint: Checkpoint,
    recipe: Recipe,
    out: Path,
    *,
    calibration: Windows | None = None,
    batch: int = 1,
    dtype: Literal["float32", "bfloat16"] = "float32",
    products: Products = "float32",
    spill: bool = False,
    mesh: Mesh | None = None,
    on_estimate: Callable[[Estimate], None] = lambda estimate: None,
    on_resume: Callable[[int], None] = lambda parts: None,
    progress: Callable[[Event], None] | None = None,
) -> Coverage:
    """Quantizes a checkpoint into a new native one.

    Until it is done everything lies in `.NAME.unfinished` beside `out`; the same call goes on from there, to the same
    bits. Memory holds two blocks and the activations unless they spill.

    Args:
        checkpoint: of float weights.
        recipe: what happens to which layers.
        out: a folder that does not exist yet, or is empty.
        calibration: windows of text; None where no rule needs data.
        batch: windows a forward pass.
        dtype: of activations and of the tensors that stay unquantized.
        products: of calibration, as in `quantize_model`. CPUs and GPUs sum products of bfloat16 in orders of their own,
            as those of float32, which may turn a code over.
        spill: activations go to files in the unfinished folder.
        mesh: devices to spread the work over, as in `quantize_model`. Sums come in another order on another mesh and
            with other processes, which may turn a code over: a run goes on with the same alone.
        on_estimate: hears what the run will take, before it starts.
        on_resume: hears how many parts an earlier run had finished, where there are any.
        progress: hears of every finished block.

    Raises:
        InputError: a rule does not fit, a layer is quantized already, the run cannot fit in memory or on disk, or the
            folder cannot be written.
    """
    check_new_folder(out)
    source = StreamedModel(checkpoint, dtype=dtype, mesh=mesh)
    shapes = source.shapes()
    rules = assign(recipe, list(shapes))
    _check_float(checkpoint, rules)
    check_rules(rules, shapes, calibration is not None, places=source.equivalences())
    check_products(products, rules)
    batches = None
    if calibration is not None:
        check_rows(inputs_of_gram(rules, shapes), calibration.tokens.size)
        check_length(checkpoint.config, calibration.window)
        batches = in_batches(calibration.tokens, batch, mesh)
    tokenizer = tokenizer_files(checkpoint.tokenizer())  # a damaged one is found now, not behind the last block
    definition = _definition(checkpoint, recipe, calibration, batch, dtype, products, mesh)
    with open_workdir(out.parent / f".{out.name}.unfinished", definition) as workdir:
        if workdir.is_complete:  # an earlier run was stopped on its last step
            workdir.publish(out)
            return Coverage.from_json(read_json(out / "coverage.json"))
        if finished := workdir.finished:
            on_resume(finished)
        expected = estimate(
            rules,
            shapes,
            load=None if calibration is None else _load(checkpoint.config, calibration, batch),
            places=source.equivalences(),
            itemsize=np.dtype(dtype).itemsize,
            mesh=mesh,
            target=out,
            spill=spill,
            finished=finished,
        )
        on_estimate(expected)
        expected.check(out)
        store = OnDisk(workdir.path) if spill else InMemory()
        try:
            coverage = quantize_blocks(
                source,
                recipe,
                batches,
                workdir=workdir,
                store=store,
                mesh=mesh,
                progress=progress,
                products=products,
            )
        finally:
            if isinstance(store, OnDisk):
                store.close()
        provenance = {
            "source": checkpoint.path.name,
            "source_sha256": definition["source_sha256"],
            "recipe": recipe.as_json(),
            "calibration": with_earlier(
                None if calibration is None else calibration_record(calibration),
                checkpoint.provenance.get("calibration"),
            ),
            "products": products,
            "kernels": definition["kernels"],
            "mesh": definition["mesh"],
            "jquant": __version__,
            "jax": jax.__version__,
        }
        workdir.complete(
            describe(checkpoint.config, note=checkpoint.note, provenance=provenance, activations=workdir.activations()),
            extra_files={**tokenizer, "coverage.json": as_text(coverage.as_json()).encode()},
        )
        workdir.publish(out)
    return coverage


def _load(config: ModelConfig, calibration: Windows, batch: int) -> Load:
    return Load(
        windows=len(calibration.tokens),
        window=calibration.window,
        batch=batch,
        attention=config.num_heads * config.head_dim,
        experts=config.experts_per_token,
    )


def _check_float(checkpoint: Checkpoint, rules: Mapping[str, Rule]) -> None:
    for path in rules:
        if path in checkpoint.quantized:
            inputs = f", its inputs to {checkpoint.activations[path]}" if path in checkpoint.activations else ""
            raise InputError(
                f"{checkpoint.path}: layer {path} is quantized already{inputs}: start from the float model"
            )


def in_batches(tokens: np.ndarray, batch: int, mesh: Mesh | None = None) -> list[np.ndarray]:
    """Windows [n, window] as batches of one size. Raises InputError where they do not come out even, or on the mesh."""
    if batch < 1 or len(tokens) % batch:
        raise InputError(f"batch {batch} for {len(tokens)} calibration windows: it must divide them evenly")
    if batch % (devices := axis_size(mesh, DATA)):
        raise InputError(f"batch {batch} over data={devices}: it must be a multiple of {devices}")
    return list(tokens.reshape(-1, batch, tokens.shape[-1]))


def _definition(
    checkpoint: Checkpoint,
    recipe: Recipe,
    calibration: Windows | None,
    batch: int,
    dtype: str,
    products: Products,
    mesh: Mesh | None,
) -> dict[str, Any]:
    """Everything that decides the bits of the result."""
    text = None
    if calibration is not None:
        text = {
            "text": calibration.text_name,
            "text_sha256": calibration.text_sha256,
            "ids_sha256": calibration.sha256,
            "windows": len(calibration.tokens),
            "window": calibration.window,
        }
    return {
        "numerics": NUMERICS,
        "source_sha256": checkpoint.sha256(),
        "recipe": recipe.as_json(),
        "calibration": text,
        "batch": batch,
        "dtype": dtype,
        "products": products,
        "kernels": way(),
        "mesh": mesh_text(mesh),
        "processes": jax.process_count(),
        "jax": jax.__version__,
        "backend": jax.default_backend(),
        "jquant": __version__,
    }
