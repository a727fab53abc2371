"""From MODEL (a GGUF file, a Hugging Face folder, a native checkpoint) to a running decoder and its tokenizer."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
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
from jquant.core.formats import GGML_BLOCKS
from jquant.core.qtensor import QTensor, in_blocks
from jquant.core.qtensor_rows import take_rows
from jquant.core.scheme import Tensor
from jquant.io import native
from jquant.io.gguf import GGUFFile, open_gguf
from jquant.io.hf_directory import HFDirectory, open_hf_directory
from jquant.io.json_file import read_json_if_there
from jquant.io.locate import locate_model
from jquant.io.mapped import ALIGNMENT, aligned_empty, shown
from jquant.io.tokenizer import Tokenizer, one_line, tokenizer_from_json
from jquant.io.tokenizer_gguf import tokenizer_from_gguf
from jquant.models.config import ModelConfig
from jquant.models.decoder import Decoder
from jquant.models.families import config_from_gguf, config_from_hf
from jquant.models.packed_hf import PackedLayers, packed_layers
from jquant.models.tensor_names import Table, Transform, gguf_tensors, hf_tensors, row_order
from jquant.nn.install import STATIC, install, tensors_of
from jquant.nn.placement import placed

Reader = Callable[[], "np.ndarray | QTensor"]
EXPORT_RECORD = "jquant_export.json"  # in a folder that `export` wrote: what it was made from

_BLOCKS = {block.name.removeprefix("ggml_").upper(): block for block in GGML_BLOCKS.values()}  # by ggml's name

# What can stay packed; a file may have other tensors in blocks too, as a table of positions.
_PACKABLE = re.compile(r"(_proj|^embed|lm_head)\.weight$")

# Buffers that old exporters saved beside the weights; the decoder computes them.
_DERIVED = re.compile(
    r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq|rope_freqs\.weight"
    r"|(transformer\.)?h\.\d+\.attn\.(bias|masked_bias)"  # GPT-2's causal mask
)

_SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_heads", "num_kv_heads", "head_dim", "num_experts")
_NUMBER = re.compile(r"(?<=\.)(?:0|[1-9][0-9]{0,8})(?=\.)")  # in tensor names; written so, no two names mean one place


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
    calibration_sha256: str | None = None  # of the text that a quantized model learned from
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
    path = locate_model(str(model))
    if path.is_dir() and native.is_native(path):
        return _open_native(str(model), path)
    if path.is_dir():
        return _open_hf(str(model), path)
    return _open_gguf(str(model), path)


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


def _open_gguf(name: str, path: Path) -> Checkpoint:
    file = open_gguf(path)
    depth = file.metadata.get(f"{file.metadata.get('general.architecture')}.block_count")
    config = _read_config(partial(config_from_gguf, file.metadata, file.tensors, str(path)), depth, file.tensors, path)
    config = _with_rope_divisors(config, file)
    names = [tensor for tensor in file.tensors if not _DERIVED.fullmatch(tensor)]
    table = gguf_tensors(file.metadata["general.architecture"])
    decoded = Checkpoint(
        name=name,
        path=path,
        config=config,
        note=_gguf_note(file, "decoded to floats: all losses here are measured against these decoded weights, not"),
        readers=_readers(names, table, file.read, config, path),
        weights_sha256=partial(_sha256, (path,)),
        tokenizer_reader=lambda: tokenizer_from_gguf(file.metadata, source=str(path)),
    )
    packed = _readers(names, table, partial(_blocks_or_floats, file), config, path)
    kept = {ours: reader for ours, reader in packed.items() if _PACKABLE.search(ours)}
    note = _gguf_note(file, "read as they are: losses here are theirs, with no comparison")
    form = dataclasses.replace(decoded, note=note, readers=decoded.readers | kept)
    return dataclasses.replace(decoded, packed_form=form)


def _blocks_or_floats(file: GGUFFile, name: str) -> np.ndarray | QTensor:
    """The tensor in the blocks of its file; decoded where it is a vector or no quantized type."""
    info = file.tensors[name]
    block = _BLOCKS.get(info.type)
    if block is None or len(info.shape) < 2:
        return file.read(name)
    return in_blocks(jnp.asarray(file.read_blocks(name)), block, columns=info.shape[-1])


def _open_hf(name: str, path: Path) -> Checkpoint:
    folder = open_hf_directory(path)
    source = path / "config.json"
    depth = folder.config.get("num_hidden_layers")
    config = _read_config(partial(config_from_hf, folder.config, str(source)), depth, folder.tensors, source)
    tied_copy = "lm_head.weight" if config.tie_embeddings else None
    names = [tensor for tensor in folder.tensors if not _DERIVED.fullmatch(tensor) and tensor != tied_copy]
    table, read = hf_tensors(config.architecture), folder.read
    packed, activations = None, {}
    if folder.config.get("quantization_config") is not None:
        packed = packed_layers(folder)
        weights = {f"{layer}.weight": layer for layer in packed.readers}
        names = [*(tensor for tensor in names if tensor not in packed.tensors), *weights]
        read = partial(_packed_or_float, packed, weights, folder)
    readers = _readers(names, table, read, config, path)
    if packed is not None:
        inputs, activations = _inputs(packed, table, path)
        readers |= inputs
    return Checkpoint(
        name=name,
        path=path,
        config=config,
        note=_hf_note(folder),
        readers=readers,
        weights_sha256=partial(_sha256, tuple(file.path for file in folder.files)),
        tokenizer_reader=lambda: tokenizer_from_json(path),
        activations=activations,
        provenance=_exported(path),
    )


def _packed_or_float(
    packed: PackedLayers, weights: Mapping[str, str], folder: HFDirectory, name: str
) -> np.ndarray | QTensor:
    return packed.weight(weights[name]) if name in weights else folder.read(name)


def _inputs(packed: PackedLayers, table: Table, path: Path) -> tuple[dict[str, Reader], dict[str, str]]:
    """Readers of the static scales of layers' inputs, and the schemes of inputs, by the decoder's paths."""
    readers: dict[str, Reader] = {}
    activations: dict[str, str] = {}
    for layer, activation in packed.activations.items():
        numbers = _NUMBER.findall(f"{layer}.")
        for template, _ in table[_NUMBER.sub("{}", f"{layer}.weight")]:
            owner = template.format(*numbers[:1]).removesuffix(".weight")
            if activations.setdefault(owner, str(activation)) != str(activation):
                raise InputError(f"{path}: inputs of {owner}'s experts are quantized in different ways")
            if not isinstance(activation.granularity, Tensor):
                continue
            if len(numbers) == 2:
                raise InputError(f"{path}: static scales for the inputs of single experts are not supported")
            readers[f"{owner}.input_scale"] = partial(_static, packed, layer, "input_scale")
            if activation.zero_point == "integer":
                readers[f"{owner}.input_zero_point"] = partial(_static, packed, layer, "input_zero_point")
    return readers, activations


def _static(packed: PackedLayers, layer: str, name: str) -> np.ndarray:
    return np.asarray(getattr(packed.readers[layer](), name), np.float32)


def _exported(path: Path) -> Mapping[str, Any]:
    """What a folder that `export` wrote says of its making."""
    said = read_json_if_there(path / EXPORT_RECORD).get("provenance", {})
    return said if isinstance(said, dict) else {}


def _open_native(name: str, path: Path) -> Checkpoint:
    opened = native.open_native(path)
    return Checkpoint(
        name=name,
        path=path,
        config=ModelConfig.from_json(opened.description.get("config"), str(path)),
        note=str(opened.description.get("note", "")),
        readers={tensor: partial(opened.read, tensor) for tensor in opened.names},
        weights_sha256=lambda: opened.sha256,
        tokenizer_reader=lambda: tokenizer_from_json(path),
        activations=_activations(opened.description, path),
        calibration_sha256=_calibration(opened.description),
        provenance=_provenance(opened.description),
    )


def _provenance(description: Mapping[str, Any]) -> Mapping[str, Any]:
    found = description.get("provenance", {})
    return found if isinstance(found, dict) else {}


def _activations(description: Mapping[str, Any], path: Path) -> dict[str, str]:
    found = description.get("activations", {})
    if not isinstance(found, dict) or not all(isinstance(spec, str) for spec in found.values()):
        raise InputError(f"{path}: the schemes of activations are damaged: {one_line(ValueError(found))}")
    return found


def _calibration(description: Mapping[str, Any]) -> str | None:
    found: Any = description
    for name in ("provenance", "calibration", "text_sha256"):
        found = found.get(name) if isinstance(found, dict) else None
    return found if isinstance(found, str) else None


def _is_static(path: str) -> bool:
    """Whether a tensor is a scale of a layer's input, which no config asks for."""
    return path.rpartition(".")[2] in STATIC


def _read_config(read: Callable[[], ModelConfig], depth: object, tensors: Collection[str], source: Path) -> ModelConfig:
    """`read()` of a stranger's config, whose fields may be of any kind and whose number of blocks any number.

    `depth` is that number as the file has it; a block has at least one tensor.
    """
    if type(depth) is int and depth > len(tensors):
        raise InputError(
            f"{source}: its config asks for {depth} blocks and there are tensors for {len(tensors)} at most: "
            "the checkpoint is incomplete"
        )
    try:
        config = read()
    except InputError:
        raise
    except (TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise InputError(f"{source}: the model config is damaged: {one_line(error)}") from error
    for name in _SIZES:
        if getattr(config, name) >= 1 << 31:  # beyond any model; shapes and floats of larger ones overflow
            raise InputError(f"{source}: the model config is damaged: {name} is 2³¹ or more")
    return config


def _with_rope_divisors(config: ModelConfig, file: GGUFFile) -> ModelConfig:
    if "rope_freqs.weight" not in file.tensors:
        return config
    divisors = file.read("rope_freqs.weight")
    if not (np.isfinite(divisors) & (divisors > 0)).all():
        raise InputError(f"{file.path}: tensor rope_freqs.weight holds a value that is not positive and finite")
    try:
        return dataclasses.replace(config, rope_divisors=tuple(float(value) for value in divisors.ravel()))
    except InputError as error:
        raise InputError(f"{file.path}: tensor rope_freqs.weight: {error}") from error


def _sha256(files: tuple[Path, ...]) -> str:
    """Of the files' bytes, in the order of their names."""
    digest = hashlib.sha256()
    for path in sorted(files):
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def _readers(
    tensors: Iterable[str],
    table: Table,
    read: Callable[[str], np.ndarray | QTensor],
    config: ModelConfig,
    path: Path,
) -> dict[str, Reader]:
    """By parameter path; matrices of experts that lie apart are stacked."""
    readers: dict[str, Reader] = {}
    stacks: dict[str, dict[int, Reader]] = {}
    for tensor in tensors:
        numbers = _NUMBER.findall(tensor)
        template = _NUMBER.sub("{}", tensor)
        if template not in table:
            raise InputError(f"{path}: tensor {shown(tensor)} has no place in a {config.architecture} decoder")
        for template_of_ours, transform in table[template]:
            ours = template_of_ours.format(*numbers[:1])
            reader = partial(_transformed, read, tensor, transform, config, f"{path}: tensor for {ours}")
            if len(numbers) == 2:
                stacks.setdefault(ours, {})[int(numbers[1])] = reader
            elif ours in readers:  # some families' tensors go by either of two names
                raise InputError(f"{path}: tensor {shown(tensor)} is not the only one for {ours}")
            else:
                readers[ours] = reader
    for ours, experts in stacks.items():
        if len(experts) != config.num_experts or max(experts) >= config.num_experts:
            raise InputError(
                f"{path}: tensors for {ours} of {len(experts)} experts, its config asks for {config.num_experts}"
            )
        readers[ours] = partial(_stacked, [experts[index] for index in range(config.num_experts)], ours, path)
    return readers


def _transformed(
    read: Callable[[str], np.ndarray | QTensor], tensor: str, transform: Transform, config: ModelConfig, what: str
) -> np.ndarray | QTensor:
    array = read(tensor)
    if isinstance(array, QTensor):
        order = row_order(transform, config, array.shape[-2])
        if order is None:
            raise InputError(f"{what} is packed, and {shown(tensor)} has inputs where outputs belong: convert it again")
        return take_rows(array, order, what)
    if not jnp.issubdtype(array.dtype, jnp.floating):  # a transform may make floats of it
        raise InputError(f"{what} has dtype {array.dtype}, weights must be floats")
    if not array.ndim:
        raise InputError(f"{what} is a single number, weights are vectors and matrices")
    return transform(array, config)


def _stacked(readers: list[Reader], ours: str, path: Path) -> np.ndarray | QTensor:
    found = [reader() for reader in readers]
    if any(isinstance(each, QTensor) for each in found):
        kinds = {each.scheme if isinstance(each, QTensor) else None for each in found}
        if len(kinds) > 1 or len({each.shape for each in found}) > 1:
            raise InputError(f"{path}: tensors for {ours} of single experts are of different schemes or shapes")
        return jax.tree.map(lambda *arrays: jnp.stack(arrays), *found)
    matrices = [np.asarray(each) for each in found]
    shapes = list(dict.fromkeys(matrix.shape for matrix in matrices))
    if len(shapes) > 1:
        raise InputError(f"{path}: tensors for {ours} of one expert have shape {shapes[0]}, of another {shapes[1]}")
    if len({matrix.dtype for matrix in matrices}) > 1:  # numpy knows no common dtype of bfloat16 and float16
        matrices = [matrix.astype(np.float32) for matrix in matrices]
    return np.stack(matrices)


def _gguf_note(file: GGUFFile, use: str) -> str:
    """Says so where the weights were quantized before they came here, and what that means in their `use`."""
    sizes = Counter[str]()
    for info in file.tensors.values():
        sizes[info.type] += info.size
    largest = sizes.most_common(1)[0][0] if sizes else "F32"
    if largest in ("F32", "F16", "BF16"):
        return f"weights stored as {largest}"
    bits = 8 * sum(info.nbytes for info in file.tensors.values()) / max(sum(sizes.values()), 1)
    return (
        f"the weights come from a GGUF already quantized to {largest} ({bits:.2f} bits a weight overall) and {use} "
        "against the original model"
    )


def _hf_note(folder: HFDirectory) -> str:
    types = Counter(info.type for info in folder.tensors.values())
    return f"weights stored as {types.most_common(1)[0][0]}" if types else ""


def _others(names: list[str]) -> str:
    return f" (and {len(names) - 1} others)" if len(names) > 1 else ""
