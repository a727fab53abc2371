"""The GGUF reader: what it reads is what an independent writer wrote; what is damaged is refused, never worse."""

from __future__ import annotations

import contextlib
import struct
import time
import tracemalloc

import numpy as np
import pytest

from jquant.core.errors import InputError
from jquant.io.gguf import open_gguf

F32, F16, Q8_0, IQ4_XS = 0, 1, 8, 23
VALUES = np.arange(12, dtype="<f4").reshape(3, 4)
FIELDS = [
    ("general.architecture", "str", "llama"),
    ("a.u8", "u8", 255),
    ("a.i8", "i8", -128),
    ("a.u16", "u16", 65535),
    ("a.i16", "i16", -32768),
    ("a.u32", "u32", 2**32 - 1),
    ("a.i32", "i32", -(2**31)),
    ("a.u64", "u64", 2**64 - 1),
    ("a.i64", "i64", -(2**63)),
    ("a.f32", "f32", 0.5),
    ("a.f64", "f64", 0.1),
    ("a.true", "bool", True),
    ("a.words", "[str]", ["", "Ġé", "½ months"]),
    ("a.none", "[str]", []),
    ("a.numbers", "[i32]", [-1, 0, 7]),
    ("a.flags", "[bool]", [True, False]),
]
TENSORS = [
    ("first", (4, 3), F32, VALUES.tobytes()),
    ("half", (5,), F16, np.arange(5, dtype="<f2").tobytes()),
    ("blocks", (32, 2), Q8_0, (struct.pack("<e", 0.25) + bytes(range(32))) * 2),
    ("scalar", (), F32, struct.pack("<f", 7)),
]


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("alignment", [None, 8, 256])
def test_reads_what_was_written(gguf_bytes, save, version, alignment):
    fields = FIELDS + ([("general.alignment", "u32", alignment)] if alignment else [])
    file = open_gguf(save(gguf_bytes(fields, TENSORS, version=version, alignment=alignment or 32)))
    assert file.version == version
    assert list(file.metadata) == [name for name, _, _ in fields]
    for name, kind, value in fields:
        got = file.metadata[name]
        if isinstance(got, np.ndarray):
            assert got.dtype == {"[i32]": np.int32, "[bool]": np.bool_}[kind]
            assert got.tolist() == value
        else:
            assert got == value
            assert type(got) is type(value)
    assert list(file.tensors) == ["first", "half", "blocks", "scalar"]
    assert [info.shape for info in file.tensors.values()] == [(3, 4), (5,), (2, 32), ()]
    assert [info.type for info in file.tensors.values()] == ["F32", "F16", "Q8_0", "F32"]
    assert [info.nbytes for info in file.tensors.values()] == [48, 10, 68, 4]
    np.testing.assert_array_equal(file.read("first"), VALUES, strict=True)
    np.testing.assert_array_equal(file.read("half"), np.arange(5, dtype=np.float32), strict=True)
    np.testing.assert_array_equal(
        file.read("blocks"), np.tile(np.arange(32, dtype=np.float32) / 4, (2, 1)), strict=True
    )
    np.testing.assert_array_equal(file.read("scalar"), np.float32(7).reshape(()), strict=True)
    assert bytes(file.raw("blocks")) == TENSORS[2][3]
    assert not file.raw("blocks").flags.writeable


@pytest.mark.parametrize(("ggml_id", "name"), [(IQ4_XS, "IQ4_XS"), (99, "ggml type 99")])
def test_a_type_without_decoder_is_listed_and_refused_on_reading(gguf_bytes, save, ggml_id, name):
    tensors = [("odd", (256,), ggml_id, bytes(136)), ("next", (1,), F32, bytes(4))]
    file = open_gguf(save(gguf_bytes([], tensors)))
    assert file.tensors["odd"].type == name
    assert file.tensors["odd"].nbytes == (136 if ggml_id == IQ4_XS else 160)
    with pytest.raises(InputError, match=f"'odd' is of {name}.* decodes F32, F16"):
        file.read("odd")
    with pytest.raises(InputError, match="no tensor 'nope' among its 2"):
        file.read("nope")
    np.testing.assert_array_equal(file.read("next"), np.zeros(1, np.float32))


def _entry(name: bytes, axes: tuple[int, ...], ggml_id: int, offset: int) -> bytes:
    shape = struct.pack(f"<I{len(axes)}Q", len(axes), *axes)
    return struct.pack("<Q", len(name)) + name + shape + struct.pack("<IQ", ggml_id, offset)


def _file(
    *entries: bytes, count: int | None = None, fields: bytes = b"", field_count: int = 0, body: int = 64
) -> bytes:
    counts = struct.pack("<IQQ", 3, len(entries) if count is None else count, field_count)
    head = b"GGUF" + counts + fields + b"".join(entries)
    return head + bytes(-len(head) % 32 + body)


def _field(kind: int, value: bytes, name: bytes = b"key") -> bytes:
    return struct.pack("<Q", len(name)) + name + struct.pack("<I", kind) + value


HUGE = 2**64 - 1
DAMAGED = {
    "empty": (b"", "the file is empty"),
    "magic": (b"GGML" + bytes(40), "starts with b'GGML'"),
    "version 1": (b"GGUF" + struct.pack("<I", 1) + bytes(40), "version 1 is not read"),
    "version 4": (b"GGUF" + struct.pack("<I", 4) + bytes(40), "version 4 is not read"),
    "big-endian": (b"GGUF" + struct.pack(">I", 3) + bytes(40), "big-endian"),
    "tensor count": (_file(count=HUGE), f"claims {HUGE} tensors"),
    "field count": (_file(field_count=HUGE), f"claims {HUGE} metadata fields"),
    "key length": (_file(fields=struct.pack("<Q", HUGE), field_count=1), "the name of metadata field 0 needs"),
    "key bytes": (_file(fields=_field(0, b"\0", b"\xff\xfe"), field_count=1), "field 0 is not UTF-8"),
    "value kind": (_file(fields=_field(13, b"\0"), field_count=1), "'key' has value type 13"),
    "element kind": (_file(fields=_field(9, struct.pack("<IQ", 77, 1)), field_count=1), "'key' has value type 77"),
    "boolean": (_file(fields=_field(7, b"\2"), field_count=1), "'key' holds a boolean that is neither"),
    "string length": (_file(fields=_field(8, struct.pack("<Q", 2**63)), field_count=1), "'key' needs"),
    "string array": (_file(fields=_field(9, struct.pack("<IQ", 8, 2**62)), field_count=1), "strings in metadata field"),
    "string in array": (_file(fields=_field(9, struct.pack("<IQQ", 8, 1, 2**63)), field_count=1), "string 0 of meta"),
    "bytes in array": (_file(fields=_field(9, struct.pack("<IQQ", 8, 1, 1) + b"\xff"), field_count=1), "not UTF-8"),
    "number array": (_file(fields=_field(9, struct.pack("<IQ", 12, 2**61)), field_count=1), "'key' needs"),
    "nested array": (_file(fields=_field(9, struct.pack("<IQ", 9, 1)), field_count=1), "array of arrays"),
    "key twice": (_file(fields=_field(0, b"\0") * 2, field_count=2), "'key' occurs twice"),
    "alignment 0": (_file(fields=_field(4, bytes(4), b"general.alignment"), field_count=1), "is '0'; it must be a"),
    "alignment 24": (_file(fields=_field(4, b"\x18\0\0\0", b"general.alignment"), field_count=1), "a power of two"),
    "alignment text": (
        _file(fields=_field(8, struct.pack("<Q", 2) + b"32", b"general.alignment"), field_count=1),
        "general.alignment is '32'",
    ),
    "tensor twice": (_file(_entry(b"w", (1,), 0, 0), _entry(b"w", (1,), 0, 32)), "'w' is listed twice"),
    "axes": (_file(_entry(b"w", (1,) * 5, 0, 0)), "'w' claims 5 axes"),
    "axis 0": (_file(_entry(b"w", (0, 2**63), 0, 0)), "every axis must be at least 1"),
    "overflow": (_file(_entry(b"w", (2**32, 2**32), 0, 0)), "'w' reaches to byte"),
    "overflow to 0": (_file(_entry(b"w", (2**62, 4), 1, 0)), "'w' reaches to byte"),
    "ragged row": (_file(_entry(b"w", (31, 32), 8, 0)), "rows of 31, no multiple of Q8_0's 32"),
    "offset": (_file(_entry(b"w", (1,), 0, 2**63)), "'w' starts at byte"),
    "offset of unknown": (_file(_entry(b"w", (1,), 99, 2**63)), "'w' starts at byte"),
    "misaligned": (_file(_entry(b"w", (1,), 0, 4)), "offset 4, which is no multiple of the alignment 32"),
    "overlap": (_file(_entry(b"w", (9,), 0, 0), _entry(b"v", (1,), 0, 32)), "'w' and 'v' overlap"),
    "same place": (_file(_entry(b"w", (1,), 0, 0), _entry(b"v", (1,), 0, 0)), "overlap"),
    "cut data": (_file(_entry(b"w", (17,), 0, 0)), "'w' reaches to byte .* truncated"),
    "line break": (_file(_entry(b"a\nb" + b"c" * 999, (17,), 0, 0)), r"tensor 'a\\nbc{30,80}…'"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damage_is_named(save, case):
    raw, message = DAMAGED[case]
    path = save(raw, ".gguf")
    with pytest.raises(InputError, match=message) as caught:
        open_gguf(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_no_count_drives_an_allocation(save):
    """A file of 1 MB that claims as much as its size lets it costs no more than a small multiple of its size."""
    for kind, least in ((0, 1), (8, 8), (12, 8)):
        fields = _field(9, struct.pack("<IQ", kind, (1 << 20) // least))
        path = save(_file(fields=fields, field_count=1, body=1 << 20))
        tracemalloc.start()
        with contextlib.suppress(InputError):
            open_gguf(path)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 8 << 20


@pytest.mark.parametrize(
    ("what", "field_count", "count", "rest"),
    [
        ("metadata fields", 80_000, 0, b""),
        ("tensors", 0, 80_000, b""),
        ("strings in metadata field 'key'", 1, 0, _field(9, struct.pack("<IQ", 8, 1_500_000))),
    ],
)
def test_what_would_take_far_more_memory_than_the_file_is_refused(save, what, field_count, count, rest):
    """Such counts fit into files of 3 to 12 MB. Here nothing follows: they are refused before anything is read."""
    body = 12 << 20 if rest else 3 << 20
    path = save(_file(fields=rest, field_count=field_count, count=count, body=body))
    with pytest.raises(InputError, match=rf"the \d+ {what}: would take some \d+ MiB"):
        open_gguf(path)


def test_strings_take_the_memory_they_are_counted_for(save):
    strings = 200_000 * (struct.pack("<Q", 2) + b"ab")
    path = save(_file(fields=_field(9, struct.pack("<IQ", 8, 200_000)) + strings, field_count=1))
    tracemalloc.start()
    assert len(open_gguf(path).metadata["key"]) == 200_000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 200_000 * 64


@pytest.mark.parametrize("place", ["folder", "missing"])
def test_a_path_that_is_no_file(tmp_path, place):
    with pytest.raises(InputError, match="cannot be read"):
        open_gguf(tmp_path if place == "folder" else tmp_path / "none.gguf")


def _open_and_read_all(path) -> bool:
    """Whether the file opens and every decodable tensor reads; any exception but InputError passes through."""
    try:
        file = open_gguf(path)
        for name in file.tensors:
            file.read(name)
    except InputError as error:
        message = str(error)
    else:
        return True
    assert str(path) in message
    assert "\n" not in message
    return False


def test_truncated_anywhere_it_opens_or_is_an_input_error(gguf_bytes, save):
    raw = gguf_bytes(FIELDS, TENSORS)
    whole = [_open_and_read_all(save(raw[:length])) for length in range(len(raw) + 1)]
    last_byte_used = len(raw) - 28  # the padding behind the last scalar
    assert whole == [length >= last_byte_used for length in range(len(raw) + 1)]


def test_flipped_bytes_open_or_are_an_input_error(gguf_bytes, save):
    raw = gguf_bytes(FIELDS, TENSORS)
    rng = np.random.default_rng(0)
    opened = 0
    for _ in range(1500):
        damaged = bytearray(raw)
        for place in rng.integers(0, len(raw), rng.integers(1, 4)):
            damaged[place] = rng.integers(0, 256)
        opened += _open_and_read_all(save(bytes(damaged)))
    assert 100 < opened < 1400  # both outcomes are exercised


@pytest.mark.slow
def test_the_demo_opens_at_once(demo_gguf):
    best = min(_timed(lambda: open_gguf(demo_gguf)) for _ in range(3))
    file = open_gguf(demo_gguf)
    assert len(file.tensors) == 272
    assert len(file.metadata["tokenizer.ggml.tokens"]) == 49152
    assert len(file.metadata["tokenizer.ggml.merges"]) == 48900
    assert file.tensors["token_embd.weight"].shape == (49152, 576)
    assert sum(info.size for info in file.tensors.values()) == 134_515_008
    assert best < 0.5  # 0.035 s seen; gguf-py takes 2 s


def _timed(work) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start
