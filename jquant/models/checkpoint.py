"""From MODEL (a GGUF file, a Hugging Face folder, a native checkpoint) to a running decoder and its tokenizer."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jax.typing import DTypeLike

from jquant.core.errors import InputError
from jquant.core.qtensor import QTensor
from jquant.io import native
from jquant.io.locate import locate_model
from jquant.io.mapped import ALIGNMENT, aligned_empty
from jquant.io.tokenizer import Tokenizer
from jquant.models.checkpoint_readers import Reader
from jquant.models.config import ModelConfig
from jquant.models.decoder import Decoder
from jquant.nn.install import STATIC, install, tensors_of
from jquant.nn.placement import placed

EXPORT_RECORD = "jquant_export.json"  # in a folder that `export` wrote: what it was made from


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """An opened checkpoint: config and tensor list are read, weights are not."""

    name: str  # as the caller wrote it
    path: Path
    config: ModelConfig
    note: str  # what a reader of results must know about these weights; may be empty
    readers: dict[str, Reader] = field(repr=False)  # by parameter path of the decoder
    weights_sha256: Callable[[], str] = field(repr=False)
    tokenizer_reader: Callable[[], Tokenizer] = field(repr=False)
    activations: Mapping[str, str] = field(default_factory=dict, repr=False)  # schemes of layers' inputs, by path
    quantized: frozenset[str] = field(default=frozenset(), repr=False)  # layers whose weights `readers` give packed
    provenance: Mapping[str, Any] = field(default_factory=dict, repr=False)  # how a quantized model was made
    packed_form: Checkpoint | None = field(default=None, repr=False)  # of a GGUF: its blocks as they are

    def packed(self) -> Checkpoint:
        """The checkpoint with what its file packs left packed: to run it, or to write it in another format.

        A GGUF is opened as floats, to be quantized, because for many models there is no other source of weights; other
        checkpoints are opened packed.
        """
        return self if self.packed_form is None else self.packed_form

    def model(self, *, dtype: DTypeLike = jnp.float32, mesh: Mesh | None = None) -> Decoder:
        """The decoder with the weights of this checkpoint, cast to `dtype`; packed ones stay packed.

        On a mesh each device is given its own part of a weight (nn/placement.py).

        Raises:
            InputError: a tensor is missing, left over, of the wrong shape, or holds a NaN or an infinity.
        """
        model = self.abstract(dtype=dtype)
        self.load(model, dtype=dtype, mesh=mesh)
        return model

    def abstract(self, *, dtype: DTypeLike = jnp.float32) -> Decoder:
        """The decoder with shapes in the place of weights; `load` fills it, or a part of it.

        Raises:
            InputError: a tensor is missing or left over.
        """
        self._check_depth()
        model = _abstract_decoder(self.config, dtype)
        self._check_complete(tensors_of(model))
        return model

    def load(
        self, module: nnx.Module, *, prefix: str = "", dtype: DTypeLike = jnp.float32, mesh: Mesh | None = None
    ) -> None:
        """Fills a part of `abstract` with its weights, in place.

        Args:
            module: the decoder, or the part of it at `prefix`.
            prefix: its path with a dot behind it, as "blocks.3.".
            dtype: of the floats; packed ones stay packed.
            mesh: where weights go; one device without it.

        Raises:
            InputError: a tensor is of the wrong shape, or holds a NaN or an infinity.
        """
        wanted = tensors_of(module)
        static = [path for path in self.readers if _is_static(path) and path.startswith(prefix)]
        read = partial(self._read, prefix, dtype, mesh)
        with ThreadPoolExecutor() as pool:
            values = dict(zip(wanted, pool.map(read, wanted, wanted.values()), strict=True))
        values |= {path.removeprefix(prefix): placed(path, self.readers[path](), mesh) for path in static}
        activations = {
            path.removeprefix(prefix): spec for path, spec in self.activations.items() if path.startswith(prefix)
        }
        try:
            install(module, values, activations)
        except InputError as error:
            raise InputError(f"{self.path}: {error}") from error

    def tokenizer(self) -> Tokenizer:
        """The tokenizer that the checkpoint carries. Raises InputError where it has none that is understood."""
        return self.tokenizer_reader()

    def sha256(self) -> str:
        """Of the weights and the config, which together decide what the model computes; not of names or paths."""
        digest = hashlib.sha256(bytes.fromhex(self.weights_sha256()))
        digest.update(json.dumps(self.config.as_json(), sort_keys=True).encode())
        return digest.hexdigest()

    def _check_depth(self) -> None:
        """Before a decoder of that depth is built: a damaged config may ask for a billion blocks."""
        blocks = {path.split(".")[1] for path in self.readers if path.startswith("blocks.")}
        if self.config.num_layers > len(blocks):
            raise InputError(
                f"{self.path}: its config asks for {self.config.num_layers} blocks and there are tensors for "
                f"{len(blocks)}: the checkpoint is incomplete"
            )

    def _check_complete(self, wanted: Collection[str]) -> None:
        missing = [path for path in wanted if path not in self.readers]
        if missing:
            raise InputError(f"{self.path}: no tensor for {missing[0]}{_others(missing)}: the checkpoint is incomplete")
        left = sorted(path for path in set(self.readers) - set(wanted) if not _is_static(path))
        if left:
            raise InputError(
                f"{self.path}: tensor for {left[0]}{_others(left)} has no place in the model its config gives"
            )

    def _read(
        self, prefix: str, dtype: DTypeLike, mesh: Mesh | None, path: str, expected: jax.ShapeDtypeStruct
    ) -> jax.Array | QTensor:
        path = prefix + path
        value, what = self.readers[path](), f"{self.path}: tensor for {path}"
        if tuple(value.shape) != tuple(expected.shape):
            raise InputError(f"{what} has shape {tuple(value.shape)}, its config asks for {tuple(expected.shape)}")
        if not jnp.issubdtype(value.dtype, jnp.floating):
            raise InputError(f"{what} has dtype {value.dtype}, weights must be floats")
        if isinstance(value, QTensor):
            check_finite(np.asarray(_scales(value)), f"{what}, its scales")
            return placed(path, value, mesh)
        cast = _cast(value, np.dtype(dtype))
        check_finite(cast, what)
        return placed(path, cast, mesh)


def open_checkpoint(model: str | Path) -> Checkpoint:
    """Opens MODEL: `demo`, a GGUF file, a Hugging Face folder, a folder of `save`, or a hub id.

    Raises:
        InputError: there is no such model, or it is damaged or of an unknown architecture.
    """
    # They make checkpoints, so they import this file.
    from jquant.models.checkpoint_gguf import open_gguf_checkpoint
    from jquant.models.checkpoint_hf import open_hf_checkpoint
    from jquant.models.checkpoint_native import open_native_checkpoint

    path = locate_model(str(model))
    if path.is_dir() and native.is_native(path):
        return open_native_checkpoint(str(model), path)
    return (open_hf_checkpoint if path.is_dir() else open_gguf_checkpoint)(str(model), path)


def load_model(model: str | Path, *, dtype: DTypeLike = jnp.float32, mesh: Mesh | None = None) -> Decoder:
    """The decoder of MODEL with its weights in `dtype`, on one device or spread over a mesh (nn/mesh.py)."""
    return open_checkpoint(model).model(dtype=dtype, mesh=mesh)


def load_tokenizer(model: str | Path) -> Tokenizer:
    """The tokenizer of MODEL."""
    return open_checkpoint(model).tokenizer()


def check_finite(array: np.ndarray, what: str) -> None:
    """Raises InputError naming `what` and the first place where it holds a NaN or an infinity."""
    # A sum is finite only where every term is: one cheap pass for the usual case.
    with np.errstate(over="ignore", invalid="ignore"):
        suspicious = not np.isfinite(np.sum(array, dtype=np.float32))
    if suspicious:
        bad = np.argwhere(~np.isfinite(array.astype(np.float32)))
        if len(bad):
            place = tuple(int(i) for i in bad[0])
            others = f" and {len(bad) - 1} other places" if len(bad) > 1 else ""
            raise InputError(f"{what}: {array[place]} at {place}{others}; weights must be finite")


def _abstract_decoder(config: ModelConfig, dtype: DTypeLike) -> Decoder:
    """A decoder with shapes in the place of weights. One block is traced and copied: thirty take half a second."""
    one_block = dataclasses.replace(config, num_layers=1, windowed_blocks=())
    model = nnx.eval_shape(lambda: Decoder(one_block, dtype=dtype, rngs=nnx.Rngs(0)))
    model.blocks = nnx.List([nnx.clone(model.blocks[0]) for _ in range(config.num_layers)])
    model.config = config
    return model


def _cast(value: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """The values in `dtype`, in memory that jax takes over as it is.

    A view of a mapped file is copied even so: the model must not change when the file does.
    """
    if value.dtype == dtype and value.flags.writeable and value.ctypes.data % ALIGNMENT == 0:
        return value
    cast = aligned_empty(value.shape, dtype)
    with np.errstate(over="ignore", invalid="ignore"):  # what becomes infinite is found and named by the caller
        np.copyto(cast, value, casting="unsafe")
    return cast


_scales = jax.jit(QTensor.scales)


def _is_static(path: str) -> bool:
    """Whether a tensor is a scale of a layer's input, which no config asks for."""
    return path.rpartition(".")[2] in STATIC


def _others(names: list[str]) -> str:
    return f" (and {len(names) - 1} others)" if len(names) > 1 else ""
