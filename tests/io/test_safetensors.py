"""The safetensors reader and writer: each against an independent hand, and damage refused."""

from __future__ import annotations

import json
import os
import struct
import time

import ml_dtypes
import numpy as np
import pytest

from jquant.core.errors import InputError
from jquant.io.safetensors import DTYPES, open_safetensors, write_safetensors

ENTRIES = [
    ("w", "F32", (2, 3), np.arange(6, dtype="<f4").tobytes()),
    ("odd", "U8", (3,), b"abc"),
    ("late", "F64", (1,), struct.pack("<d", 0.1)),  # not aligned in the file
    ("flags", "BOOL", (2,), b"\0\1"),
    ("scalar", "I64", (), struct.pack("<q", -5)),
    ("none", "F16", (0, 7), b""),
]


def test_reads_what_was_written(safetensors_bytes, save):
    file = open_safetensors(save(safetensors_bytes(ENTRIES, {"format": "pt"})))
    assert file.metadata == {"format": "pt"}
    assert list(file.tensors) == [name for name, *_ in ENTRIES]
    np.testing.assert_array_equal(file.read("w"), np.arange(6, dtype=np.float32).reshape(2, 3), strict=True)
    np.testing.assert_array_equal(file.read("odd"), np.frombuffer(b"abc", np.uint8), strict=True)
    np.testing.assert_array_equal(file.read("late"), np.array([0.1]), strict=True)
    np.testing.assert_array_equal(file.read("flags"), np.array([False, True]), strict=True)
    np.testing.assert_array_equal(file.read("scalar"), np.array(-5), strict=True)
    assert file.read("none").shape == (0, 7)
    assert not file.read("w").flags.writeable
    assert np.shares_memory(file.read("w"), file.data)
    with pytest.raises(InputError, match="no tensor 'nope' among its 6"):
        file.read("nope")


# One value each, its bytes from the format's definition.
ONE_POINT_FIVE = {"F64": "000000000000f83f", "F32": "0000c03f", "F16": "003e", "BF16": "c03f"}
SMALL = {"F8_E4M3": "3c", "F8_E5M2": "3e"}


@pytest.mark.parametrize(("dtype", "raw"), [*ONE_POINT_FIVE.items(), *SMALL.items()])
def test_floats_are_read_as_the_format_defines_them(safetensors_bytes, save, dtype, raw):
    file = open_safetensors(save(safetensors_bytes([("x", dtype, (1,), bytes.fromhex(raw))])))
    assert float(file.read("x")[0]) == 1.5


@pytest.mark.parametrize("name", DTYPES)
def test_written_tensors_come_back(tmp_path, name):
    dtype = DTYPES[name]
    bits = np.random.default_rng(0).integers(0, 2 if name == "BOOL" else 256, (3, 4 * dtype.itemsize), dtype=np.uint8)
    array = bits.view(dtype)
    path = tmp_path / "folder" / "x.safetensors"
    write_safetensors(path, {"a": array, "b": array.T, "c": array[0, 0].reshape(()), "d": array[:0]}, {"k": "v"})
    file = open_safetensors(path)
    assert file.metadata == {"k": "v"}
    for key, expected in {"a": array, "b": array.T, "c": array[0, 0].reshape(()), "d": array[:0]}.items():
        got = file.read(key)
        assert got.dtype == dtype
        assert got.shape == expected.shape
        assert got.tobytes() == expected.tobytes()
        assert file.tensors[key].type == name


def test_the_bytes_follow_the_format(tmp_path):
    """Parsed by hand: length, header, then the widest types first; equal input gives equal bytes."""
    tensors = {"z": np.ones(3, np.int8), "é": np.array([1.5], ml_dtypes.bfloat16), "a": np.array([[2.0]], np.float32)}
    write_safetensors(tmp_path / "1", tensors, {"b": "2", "a": "1"})
    write_safetensors(tmp_path / "2", dict(reversed(tensors.items())), {"a": "1", "b": "2"})
    raw = (tmp_path / "1").read_bytes()
    assert raw == (tmp_path / "2").read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    assert length % 8 == 0
    assert json.loads(raw[8 : 8 + length]) == {
        "__metadata__": {"a": "1", "b": "2"},
        "a": {"dtype": "F32", "shape": [1, 1], "data_offsets": [0, 4]},
        "é": {"dtype": "BF16", "shape": [1], "data_offsets": [4, 6]},
        "z": {"dtype": "I8", "shape": [3], "data_offsets": [6, 9]},
    }
    assert raw[8 + length :] == bytes.fromhex("00000040" + "c03f" + "010101")


def test_big_endian_arrays_are_written_little_endian(tmp_path):
    write_safetensors(tmp_path / "x", {"a": np.array([1, 2], ">i4")})
    np.testing.assert_array_equal(open_safetensors(tmp_path / "x").read("a"), np.array([1, 2], np.int32), strict=True)


@pytest.mark.parametrize(
    ("tensors", "metadata", "message"),
    [
        ({"a": np.array(["text"])}, {}, "tensor 'a' is <U4, which safetensors cannot hold"),
        ({"a": np.array([None])}, {}, "tensor 'a' is object"),
        ({"a": np.zeros(1, ml_dtypes.int4)}, {}, "tensor 'a' is int4"),
        ({"__metadata__": np.zeros(1)}, {}, "reserved"),
        ({"a": np.zeros(1)}, {"k": 1}, "must map names to strings"),
    ],
)
def test_what_cannot_be_written_leaves_nothing(tmp_path, tensors, metadata, message):
    with pytest.raises(InputError, match=message):
        write_safetensors(tmp_path / "x", tensors, metadata)
    assert os.listdir(tmp_path) == []


def _entry(dtype: object = "U8", shape: object = (1,), offsets: object = (0, 1)) -> str:
    return json.dumps({"dtype": dtype, "shape": shape, "data_offsets": offsets})


DAMAGED = {
    "no JSON": ("{", "is no JSON"),
    "deep": ("[" * 100_000, "is no JSON"),
    "no object": ("[1]", "holds a JSON list"),
    "not UTF-8": (b"\xff", "is no JSON"),
    "twice": (f'{{"w": {_entry()}, "w": {_entry()}}}', "the key 'w' occurs twice"),
    "half a character": (f'{{"\\ud800": {_entry()}}}', "is no JSON: .* surrogates not allowed"),
    "twice inside": ('{"w": {"dtype": "U8", "dtype": "I8"}}', "the key 'dtype' occurs twice"),
    "metadata": ('{"__metadata__": {"a": 1}}', "__metadata__ must map names to strings"),
    "entry": ('{"w": 1}', "tensor 'w': its entry must hold"),
    "more keys": ('{"w": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1], "x": 1}}', "its entry must hold"),
    "dtype": (f'{{"w": {_entry(dtype=3)}}}', "dtype must be a string"),
    "shape": (f'{{"w": {_entry(shape=[-1])}}}', "shape must be a list"),
    "shape true": (f'{{"w": {_entry(shape=[True])}}}', "shape must be a list"),
    "shape fraction": (f'{{"w": {_entry(shape=[1.0])}}}', "shape must be a list"),
    "many axes": (f'{{"w": {_entry(shape=[1] * 65)}}}', "at most 64"),
    "offsets": (f'{{"w": {_entry(offsets=[1, 0])}}}', "two numbers"),
    "three offsets": (f'{{"w": {_entry(offsets=[0, 1, 1])}}}', "two numbers"),
    "long number": (f'{{"w": {_entry(offsets=[0, 10**4000])}}}', "two numbers"),
    "outside": (f'{{"w": {_entry(offsets=[0, 5], shape=[5])}}}', "reaches to byte .* truncated"),
    "size": (f'{{"w": {_entry(shape=[3], offsets=[0, 1])}}}', r"U8 of shape \(3,\) does not take the 1 bytes"),
    "overflow": (f'{{"w": {_entry(shape=[2**62, 4], dtype="F32", offsets=[0, 0])}}}', "does not take the 0 bytes"),
    "empty and large": (f'{{"w": {_entry(shape=[0, 2**62, 2**62], offsets=[0, 0])}}}', "is too large"),
    "overlap": (f'{{"w": {_entry(shape=[3], offsets=[0, 3])}, "v": {_entry(offsets=[2, 3])}}}', "'w' and 'v' overlap"),
    "gap": (f'{{"w": {_entry()}, "v": {_entry(offsets=[2, 3])}}}', "1 bytes belong to no tensor"),
    "rest": (f'{{"w": {_entry()}}}', "2 bytes belong to no tensor"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damage_is_named(headed, save, case):
    header, message = DAMAGED[case]
    path = save(headed(header if isinstance(header, bytes) else header.encode(), b"\0\0\0"))
    with pytest.raises(InputError, match=message) as caught:
        open_safetensors(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("unit", ["[],", '{"a":1},', "257,", '"ab",'])
def test_json_that_would_take_far_more_memory_than_the_file_is_refused(headed, save, unit):
    """Of empty lists the parsed text takes 24 times its bytes."""
    header = '{"w": [' + unit * 600_000 + "0]}"
    with pytest.raises(InputError, match=r"the header: would take some \d+ MiB of memory"):
        open_safetensors(save(headed(header.encode())))


def test_a_key_twice_among_many_is_found_at_once(headed, save):
    header = "{" + "".join(f'"{number}": {_entry()}, ' for number in range(30_000)) + f'"29999": {_entry()}}}'
    start = time.process_time()
    with pytest.raises(InputError, match="the key '29999' occurs twice"):
        open_safetensors(save(headed(header.encode())))
    assert time.process_time() - start < 2  # 0.1 s of computing; comparing each with each takes many


@pytest.mark.parametrize(
    ("raw", "message"),
    [(b"", "empty"), (b"\0" * 7, "it has 7 bytes"), (b"\xff" * 8, "header of 18446744073709551615 bytes in 8")],
)
def test_a_broken_length_is_named(save, raw, message):
    with pytest.raises(InputError, match=message):
        open_safetensors(save(raw))


def test_unknown_dtypes_are_listed_and_refused_on_reading(safetensors_bytes, save):
    file = open_safetensors(save(safetensors_bytes([("w", "F4", (4,), b"ab"), ("b", "BOOL", (1,), b"\2")])))
    assert (file.tensors["w"].type, file.tensors["w"].nbytes) == ("F4", 2)
    with pytest.raises(InputError, match="'w' is of dtype 'F4', which cannot be read; jquant reads F64"):
        file.read("w")
    with pytest.raises(InputError, match="'b' holds a boolean that is neither"):
        file.read("b")


def _open_and_read_all(path) -> bool:
    try:
        file = open_safetensors(path)
        for name in file.tensors:
            file.read(name)
    except InputError as error:
        message = str(error)
    else:
        return True
    assert str(path) in message
    assert "\n" not in message
    return False


def test_truncated_anywhere_is_an_input_error(safetensors_bytes, save):
    raw = safetensors_bytes(ENTRIES, {"format": "pt"})
    whole = [_open_and_read_all(save(raw[:length])) for length in range(len(raw) + 1)]
    assert whole == [False] * len(raw) + [True]


def test_flipped_bytes_open_or_are_an_input_error(safetensors_bytes, save):
    raw = safetensors_bytes(ENTRIES, {"format": "pt"})
    rng = np.random.default_rng(0)
    opened = 0
    for _ in range(1500):
        damaged = bytearray(raw)
        for place in rng.integers(0, len(raw), rng.integers(1, 4)):
            # Mostly JSON's own signs: any other byte rarely gets past the parser.
            damaged[place] = rng.choice(list(b'0123456789,:[]{}"')) if rng.random() < 0.7 else rng.integers(0, 256)
        opened += _open_and_read_all(save(bytes(damaged)))
    assert 30 < opened < 1400
