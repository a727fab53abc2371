"""One process of the fuzzing: damages files, reads them, and judges. Also the way to repeat a case.

    python -W error -m tests.io.fuzz llama_b.gguf:120:3        # cases 120, 121, 122 of a seed

prints a line for each case: seed, number, mutator, outcome, bytes and seconds. A case that fails prints what went
wrong; with FUZZ_KEEP=FOLDER set its files stay there. A case is decided by its seed and number alone.

The verdict: an InputError of one line that names the file, or a result. A tensor that is read must be what the file's
own list says, by another reader. A case may take 2 s (it is run again before it is called slow: the machine may be
shared) and twice the file's size and 64 MiB of memory: more cannot be allocated, so a count that is believed fails.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import os
import resource
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from jquant.core.errors import InputError
from jquant.io.ggml_blocks import BY_ID, BY_NAME, DECODABLE, decode
from jquant.io.gguf import open_gguf
from jquant.io.inspect import inspect_file
from jquant.io.locate import locate_model
from jquant.io.safetensors import DTYPES, open_safetensors
from jquant.io.tokenizer import Tokenizer, tokenizer_from_json, tokenizer_to_json
from jquant.io.tokenizer_gguf import tokenizer_from_gguf
from tests.io import field_mutations, mutations
from tests.io.conftest import write_gguf, write_safetensors_bytes

GOLDENS = Path(__file__).parents[1] / "goldens"
SECONDS = 2.0  # a case
MEMORY = 64 << 20  # bytes beside twice the file
JAX_MEMORY = 192 << 20  # more where a decoder is built
TEXT = "Hello <s> the 42 ▁▁  \n don't é 🙂 abab"

Files = dict[str, bytes]
Mutator = tuple[str, Callable[[np.random.Generator], Files]]


@dataclass(frozen=True, kw_only=True)
class Seed:
    """Sound files, the ways to damage them, and what reads them; `read` returns the outcome in a word."""

    files: Files = field(repr=False)
    mutators: tuple[Mutator, ...] = field(repr=False)
    read: Callable[[Path], str]
    memory: int = MEMORY


def main(arguments: list[str]) -> int:
    threading.stack_size(1 << 20)  # eight megabytes for each thread of a pool would count as memory
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        for argument in arguments:
            name, first, count = argument.rsplit(":", 2)
            seed = make_seed(name)
            with contextlib.suppress(InputError):  # what is imported and built once is not the first case's
                seed.read(_write(seed.files, Path(folder) / f"{name}-sound"))
            for index in range(int(first), int(first) + int(count)):
                failed += not _run(name, seed, index, Path(folder) / f"{name}-{index}")
    return 1 if failed else 0


def _run(name: str, seed: Seed, index: int, folder: Path) -> bool:
    mutator, files = mutate(name, seed, index)
    size = sum(map(len, files.values()))
    try:
        path = _write(files, folder)
        outcome, seconds = _timed(seed, path, size)
        if seconds > SECONDS:
            outcome, seconds = _timed(seed, path, size)
        assert seconds <= SECONDS, f"took {seconds:.1f} s"
    except BaseException:  # an abort of Rust's is no Exception
        print(f"FAILED {name}:{index}:1 by {mutator}: {traceback.format_exc()}", flush=True)
        if keep := os.environ.get("FUZZ_KEEP"):
            shutil.copytree(folder, Path(keep) / folder.name, dirs_exist_ok=True)
        return False
    else:
        print(json.dumps([name, index, mutator, outcome, size, round(seconds, 4)]), flush=True)
        return True
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def mutate(name: str, seed: Seed, index: int) -> tuple[str, Files]:
    """The mutator's name and the damaged files of a case."""
    rng = np.random.Generator(np.random.Philox(key=[zlib.crc32(name.encode()), index]))
    mutator, damage = seed.mutators[int(rng.integers(len(seed.mutators)))]
    return mutator, damage(rng)


def _write(files: Files, folder: Path) -> Path:
    """The file, or the folder where there are several."""
    folder.mkdir()
    for name, raw in files.items():
        (folder / name).write_bytes(raw)
    return folder / next(iter(files)) if len(files) == 1 else folder


def _timed(seed: Seed, path: Path, size: int) -> tuple[str, float]:
    start = time.perf_counter()
    with _limited(2 * size + seed.memory):
        outcome = _outcome(seed, path)
    return outcome, time.perf_counter() - start


def _outcome(seed: Seed, path: Path) -> str:
    try:
        return seed.read(path)
    except InputError as error:
        return _checked(error, path)


def _checked(error: InputError, path: Path, *, names: str = "") -> str:
    """An error must name the file, and `names`, on one line that a person can read."""
    message = str(error)
    assert names in message, f"names no {names}: {message}"
    assert str(path) in message, f"names no file: {message}"
    assert message.isprintable(), f"is not one line of text: {message!r}"
    assert len(message) < 1500, f"a message of {len(message)} characters: {message[:300]}"
    return "error"


class Hang(BaseException):
    """Passes every `except Exception`."""


@contextlib.contextmanager
def _limited(memory: int) -> Iterator[None]:
    """At most so much more memory than now, and ten seconds; what does not heed the alarm the parent kills."""

    def ring(*_: Any) -> None:
        raise Hang("ten seconds")

    hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
    resource.setrlimit(resource.RLIMIT_DATA, (_data_in_use() + memory, hard))
    signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, 10)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        resource.setrlimit(resource.RLIMIT_DATA, (hard, hard))


def _data_in_use() -> int:
    """Bytes that RLIMIT_DATA counts; where the system does not say, as good as all."""
    try:
        return int(Path("/proc/self/status").read_text().split("VmData:")[1].split()[0]) << 10
    except OSError:
        return 1 << 40


# What reads -----------------------------------------------------------------------------------------------------------


def read_gguf(path: Path) -> str:
    """Opens, inspects, reads every tensor and builds the tokenizer."""
    file = open_gguf(path)
    raw = path.read_bytes()
    _same_tensors(file, raw, path)
    inspection = inspect_file(path)
    assert [tensor.name for tensor in inspection.tensors] == list(file.tensors)
    assert all(info.offset + info.nbytes <= len(raw) for info in file.tensors.values())
    if not any(name.startswith("tokenizer.") for name in file.metadata):
        return "read"
    try:
        _use(tokenizer_from_gguf(file.metadata, source=str(path)))
    except InputError as error:
        _checked(error, path)
        return "read, no tokenizer"
    return "read, tokenizer"


def _same_tensors(file: Any, raw: bytes, path: Path) -> None:
    """Every tensor that reads is the decode of the bytes at which the list itself says it is."""
    layout = mutations.parse_gguf(raw)
    assert [name.decode() for name, _ in layout.fields] == list(file.metadata)
    assert [entry.name.decode() for entry in layout.entries] == list(file.tensors)
    assert all(axis for entry in layout.entries for axis in entry.axes)
    assert not any(entry.offset % layout.alignment for entry in layout.entries)
    extents = []
    for entry in layout.entries:
        name = entry.name.decode()
        begin = end = layout.start + entry.offset
        if (kind := BY_ID.get(entry.ggml_id)) is not None:
            end = begin + math.prod(entry.axes) // kind.elements * kind.nbytes
        extents.append((begin, end))
        assert file.tensors[name].shape == entry.axes[::-1]
        try:
            got = file.read(name)
        except InputError as error:
            _checked(error, path, names=repr(name)[:40].rstrip("'"))
            continue
        assert kind is not None
        np.testing.assert_array_equal(got.ravel(), decode(kind, np.frombuffer(raw[begin:end], np.uint8)))
        assert got.shape == entry.axes[::-1]
    _apart(extents, len(raw))


def _apart(extents: list[tuple[int, int]], size: int) -> None:
    """No tensor over another, none beyond the file."""
    ordered = sorted(extents)
    assert all(one[1] <= two[0] for one, two in itertools.pairwise(ordered)), "tensors overlap"
    assert not ordered or max(end for _, end in ordered) <= size, "a tensor reaches beyond the file"


def read_safetensors(path: Path) -> str:
    file = open_safetensors(path)
    inspection = inspect_file(path)
    assert [tensor.name for tensor in inspection.tensors] == list(file.tensors)
    raw = path.read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    pairs = json.loads(raw[8:start], object_pairs_hook=list)
    assert [name for name, _ in pairs if name != "__metadata__"] == list(file.tensors)
    header = {name: dict(entry) for name, entry in pairs if name != "__metadata__"}
    "".join(header).encode()  # fails at half a character
    extents = [(start + entry["data_offsets"][0], start + entry["data_offsets"][1]) for entry in header.values()]
    _apart(extents, len(raw))
    assert sum(end - begin for begin, end in extents) == len(raw) - start
    for name in file.tensors:
        entry = header[name]
        begin, end = entry["data_offsets"]
        try:
            got = file.read(name)
        except InputError as error:
            _checked(error, path, names=repr(name)[:40].rstrip("'"))
            continue
        assert got.tobytes() == raw[start + begin : start + end]
        assert (got.dtype, got.shape) == (DTYPES[entry["dtype"]], tuple(entry["shape"]))
    return "read"


def read_tokenizer(path: Path) -> str:
    _use(tokenizer_from_json(path))
    return "tokenizer"


def _use(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(TEXT)
    assert ids.dtype == np.int32
    assert ((ids >= 0) & (ids < tokenizer.vocab_size)).all()
    assert isinstance(tokenizer.decode(ids), str)
    assert isinstance(tokenizer.decode(range(min(tokenizer.vocab_size, 700)), skip_special=False), str)
    assert len(tokenizer.sha256) == 64


def read_checkpoint(path: Path) -> str:
    """Builds the decoder: a fraction of a second, so there are fewer of these."""
    from flax import nnx

    from jquant.models.checkpoint import open_checkpoint

    model = open_checkpoint(path).packed().model()
    for value in nnx.to_flat_state(nnx.state(model, nnx.Param)).leaves:
        assert np.isfinite(np.asarray(value.get_value())).all()
    return "model"


# Seeds ----------------------------------------------------------------------------------------------------------------

FAMILIES = ("llama", "qwen2", "qwen3", "qwen3moe", "gemma2", "gemma3", "phi3", "gpt2")  # as GGUF calls them
FOLDERS = ("llama_a", "llama_b", *(f"family_{name}" for name in ("gemma3_text", "gpt2", "mixtral", "opt", "phi3")))


@cache
def make_seed(name: str) -> Seed:
    """By its name: FILE.gguf, FILE.safetensors, tokenizer.json, a checkpoint, or a packed export."""
    if name == "tokenizer.json":
        return _folder(_tokenizer_files(), read_tokenizer)
    if name.startswith("packed "):
        return _folder(_packed_files(name.removeprefix("packed ")), read_checkpoint, MEMORY + JAX_MEMORY)
    if name.startswith("checkpoint "):
        return _checkpoint(name.removeprefix("checkpoint "))
    stem, _, suffix = name.rpartition(".")
    if suffix == "safetensors":
        return _file(name, _safetensors(stem), mutations.BYTES + mutations.SAFETENSORS * 2, read_safetensors)
    fields = {"bpe": _bpe, "llama": _spm, "gemma": _spm, "plain": _spm}.get(stem)
    if fields is not None:
        return _with_fields(name, fields(stem), read_gguf)
    return _file(name, _gguf(stem), mutations.BYTES + mutations.GGUF * 2, read_gguf)


def _file(name: str, raw: bytes, mutators: tuple[mutations.Bytes, ...], read: Callable[[Path], str]) -> Seed:
    name = f"x.{name.rpartition('.')[2]}"
    chosen = tuple((mutator.__name__, _on_bytes(mutator, raw, name)) for mutator in mutators)
    return Seed(files={name: raw}, mutators=chosen, read=read)


def _on_bytes(mutator: mutations.Bytes, raw: bytes, name: str) -> Callable[[np.random.Generator], Files]:
    return lambda rng: {name: mutator(raw, rng)}


def _with_fields(
    name: str, fields: list[field_mutations.Field], read: Callable[[Path], str], tensors: Any = ()
) -> Seed:
    """A GGUF of these fields, damaged in its fields before it is written and in its bytes after."""
    raw = write_gguf(fields, tensors)
    seed = _file(name, raw, mutations.BYTES + mutations.GGUF, read)

    def on_fields(mutator: field_mutations.FieldMutator) -> Callable[[np.random.Generator], Files]:
        return lambda rng: {"x.gguf": write_gguf(mutator(fields, rng), tensors)}

    more = tuple((mutator.__name__, on_fields(mutator)) for mutator in field_mutations.FIELDS)
    return Seed(files=seed.files, mutators=seed.mutators + more * 3, read=read)


def _folder(files: Files, read: Callable[[Path], str], memory: int = MEMORY) -> Seed:
    """A folder of which one file is damaged, as fits it."""

    def on_file(mutator: mutations.Bytes, name: str) -> Callable[[np.random.Generator], Files]:
        return lambda rng: {**files, name: mutator(files[name], rng)}

    chosen = []
    for name in files:
        structured = mutations.SAFETENSORS if name.endswith(".safetensors") else mutations.JSON * 2
        for mutator in (*structured, mutations.flip, mutations.cut):
            chosen.append((mutator.__name__, on_file(mutator, name)))
    return Seed(files=files, mutators=tuple(chosen), read=read, memory=memory)


def _packed_files(spec: str) -> Files:
    """A folder that `export` writes, of a small model: FORMAT SCHEME."""
    from jquant.core.scheme import scheme
    from jquant.models.export import export
    from jquant.models.save import save
    from jquant.ptq.rtn import quantize_layers
    from tests.tiny_checkpoint import byte_tokenizer, tiny_model

    format, _, weights = spec.partition(" ")
    model = tiny_model()
    quantize_layers(model, scheme(weights))
    with tempfile.TemporaryDirectory() as folder:
        save(model, f"{folder}/native", tokenizer=byte_tokenizer())
        export(f"{folder}/native", f"{folder}/out", format=format)
        return {name: Path(folder, "out", name).read_bytes() for name in ("config.json", "model.safetensors")}


def _checkpoint(name: str) -> Seed:
    memory = MEMORY + JAX_MEMORY
    if name in FOLDERS:
        kept = (".json", ".safetensors")
        files = {file.name: file.read_bytes() for file in sorted((GOLDENS / name).iterdir()) if file.suffix in kept}
        return _folder(files, read_checkpoint, memory)
    if name == "llama_b.gguf":
        seed = _file(name, _gguf("llama_b"), mutations.GGUF, read_checkpoint)
    else:
        seed = _file("x.gguf", _family(name), (mutations.gguf_integer, mutations.gguf_value), read_checkpoint)
    return Seed(files=seed.files, mutators=seed.mutators, read=read_checkpoint, memory=memory)


def _gguf(stem: str) -> bytes:
    if stem == "demo":
        return _demo()
    if stem != "blocks":
        return (GOLDENS / f"{stem}.gguf").read_bytes()
    tensors = []
    with np.load(GOLDENS / "gguf_blocks.npz") as goldens:
        for kind in DECODABLE:
            row = BY_NAME[kind]
            tensors.append(
                (f"blk.0.{kind}", (row.elements, 2), row.ggml_id, bytes(goldens[f"{kind}.raw"])[: 2 * row.nbytes])
            )
    tensors.append(("scalar", (), 0, bytes(4)))
    tensors.append(("unread", (256,), 23, bytes(136)))
    return write_gguf([("general.architecture", "str", "llama"), ("odd", "[bool]", [True, False])], tensors)


def _demo() -> bytes:
    """The demo's header, its metadata whole, with its three smallest tensors."""
    with locate_model("demo").open("rb") as file:
        layout = mutations.parse_gguf(file.read())
    small = sorted(layout.entries, key=lambda entry: math.prod(entry.axes))[:3]
    data, entries = b"", []
    for entry in small:
        assert entry.ggml_id == 0
        entries.append(mutations.replace(entry, offset=len(data)))
        data += layout.data[entry.offset :][: 4 * math.prod(entry.axes)]
        data += bytes(-len(data) % layout.alignment)
    return mutations.replace(layout, entries=entries, data=data).packed()


def _family(name: str) -> bytes:
    """The header of a family's GGUF: its fields, of a tiny model, and one tensor."""
    sizes = {"block_count": 2, "context_length": 64, "embedding_length": 32, "feed_forward_length": 48}
    sizes |= {"attention.head_count": 4, "attention.head_count_kv": 2, "attention.key_length": 8, "vocab_size": 50}
    sizes |= {"attention.sliding_window": 16, "rope.dimension_count": 8}
    if name == "qwen3moe":
        sizes |= {"expert_count": 4, "expert_used_count": 2, "expert_feed_forward_length": 16}
    norms = ("attention.layer_norm_rms_epsilon", "attention.layer_norm_epsilon", "rope.freq_base")
    fields: list[field_mutations.Field] = [("general.architecture", "str", name)]
    fields += [(f"{name}.{field}", "u32", value) for field, value in sizes.items()]
    fields += [(f"{name}.{field}", "f32", 1e-5) for field in norms]
    return write_gguf(
        fields, [("token_embd.weight", (32, 50), 1, bytes(3200)), ("rope_freqs.weight", (4,), 0, b"\0\0\x80?" * 4)]
    )


def _safetensors(stem: str) -> bytes:
    if stem != "dtypes":
        return (GOLDENS / stem / "model.safetensors").read_bytes()
    rng = np.random.default_rng(0)
    entries = [
        (f"t.{name}", name, (2, 3), rng.integers(0, 2, 6 * dtype.itemsize, np.uint8).tobytes())
        for name, dtype in DTYPES.items()
    ]
    return write_safetensors_bytes([*entries, ("none", "F32", (0, 4), b""), ("one", "U8", (), b"1")], {"format": "pt"})


def _bpe(_: str) -> list[field_mutations.Field]:
    """A byte-level BPE with a token for every byte, some merges, special tokens and one with a colon in it."""
    letters = [chr(code) for code in (*range(33, 127), *range(161, 173), *range(174, 256), *range(256, 324))]
    merges = ["t h", "th e", "Ġ the", "a b", "ab ab", "4 2", "l l", "Ġ Ġ", "H e"]
    tokens = ["<s>", "</s>", "<|a:b|>", *letters, *(merge.replace(" ", "") for merge in merges)]
    kinds = [3, 3, 4, *[1] * (len(tokens) - 3)]
    fields = [("model", "str", "gpt2"), ("pre", "str", "gpt-2"), ("tokens", "[str]", tokens)]
    fields += [("token_type", "[i32]", kinds), ("merges", "[str]", merges), ("bos_token_id", "u32", 0)]
    fields += [("eos_token_id", "u32", 1), ("add_bos_token", "bool", True)]
    named: list[field_mutations.Field] = [(f"tokenizer.ggml.{key}", kind, value) for key, kind, value in fields]
    return [("general.architecture", "str", "llama"), *named]


def _spm(stem: str) -> list[field_mutations.Field]:
    """One of the SentencePiece models that the goldens record."""
    model = json.loads((GOLDENS / "tokenizer_spm.json").read_text())["models"][stem]
    kinds = {"tokens": "[str]", "scores": "[f32]", "token_type": "[i32]", "add_space_prefix": "bool"}
    named: list[field_mutations.Field] = [
        (f"tokenizer.ggml.{key}", kinds.get(key, "u32"), value)
        for key, value in model.items()
        if key not in ("ids", "decoded") and value is not None
    ]
    return [("general.architecture", "str", "llama"), ("tokenizer.ggml.model", "str", "llama"), *named]


def _tokenizer_files() -> Files:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.gguf"
        path.write_bytes(write_gguf(_bpe("bpe")))
        tokenizer_to_json(tokenizer_from_gguf(open_gguf(path).metadata), folder)
        return {file.name: file.read_bytes() for file in sorted(Path(folder).glob("*.json"))}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
