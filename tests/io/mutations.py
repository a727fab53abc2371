"""Ways to damage a file: blindly, or along the structure of GGUF, safetensors and JSON.

A mutator takes what it damages and a generator of random numbers, and is a function of these alone. Those that know
GGUF walk it by a parser of their own, which holds only for files that are sound up to the end of their header.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from tests.io.conftest import GGUF_FORMATS

Bytes = Callable[[bytes, np.random.Generator], bytes]

EXTREMES = (0, 1, 2, 3, 5, 9, 255, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**61, 2**62, 2**63 - 1, 2**63, 2**64 - 1)


def pick(rng: np.random.Generator, items: Any) -> Any:
    items = list(items)
    return items[int(rng.integers(len(items)))]


def _put(raw: bytes, place: int, new: bytes) -> bytes:
    """`new` written over what lies at `place`."""
    return raw[:place] + new + raw[place + len(new) :]


def _extreme(size: int, rng: np.random.Generator) -> int:
    around = (size - 1, size, size + 1, size // 2, size // 4)
    return pick(rng, (*EXTREMES, *around)) if rng.random() < 0.8 else int(rng.integers(0, 4 * size))


# Any bytes ------------------------------------------------------------------------------------------------------------


def cut(raw: bytes, rng: np.random.Generator) -> bytes:
    """The end is missing; half of the time the cut is in the first 2,000 bytes, where headers are."""
    return raw[: int(rng.integers(0, len(raw) if rng.random() < 0.5 else min(len(raw), 2000)))]


def flip(raw: bytes, rng: np.random.Generator) -> bytes:
    damaged = bytearray(raw)
    for _ in range(int(rng.integers(1, 9))):
        near = len(raw) if rng.random() < 0.3 else min(len(raw), 3000)
        damaged[int(rng.integers(near))] ^= 1 << int(rng.integers(8))
    return bytes(damaged)


def overwrite(raw: bytes, rng: np.random.Generator) -> bytes:
    """A run of up to 64 bytes becomes zeros, ones or noise."""
    count = int(rng.integers(1, 65))
    run = pick(rng, (bytes(count), b"\xff" * count, rng.bytes(count)))
    return _put(raw, int(rng.integers(0, max(1, min(len(raw), 4000) - count))), run)


def insert(raw: bytes, rng: np.random.Generator) -> bytes:
    place = int(rng.integers(0, min(len(raw), 4000)))
    return raw[:place] + rng.bytes(int(rng.integers(1, 17))) + raw[place:]


def remove(raw: bytes, rng: np.random.Generator) -> bytes:
    place = int(rng.integers(0, min(len(raw), 4000)))
    return raw[:place] + raw[place + int(rng.integers(1, 33)) :]


def copy_within(raw: bytes, rng: np.random.Generator) -> bytes:
    """A run of bytes is written over another place: sound parts, at the wrong one."""
    count = int(rng.integers(4, 200))
    source, place = (int(rng.integers(0, max(1, min(len(raw), 6000) - count))) for _ in range(2))
    return _put(raw, place, raw[source : source + count])


def integer(raw: bytes, rng: np.random.Generator) -> bytes:
    """An extreme integer anywhere."""
    width = pick(rng, (4, 8))
    value = _extreme(len(raw), rng) % (1 << 8 * width)
    return _put(raw, int(rng.integers(0, max(1, min(len(raw), 4000) - width))), value.to_bytes(width, "little"))


BYTES: tuple[Bytes, ...] = (cut, flip, overwrite, insert, remove, copy_within, integer)

# GGUF -----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A tensor as GGUF lists it: axes innermost first, offset within the data."""

    name: bytes
    axes: tuple[int, ...]
    ggml_id: int
    offset: int

    def packed(self) -> bytes:
        axes = struct.pack(f"<I{len(self.axes)}Q", len(self.axes), *(axis % 2**64 for axis in self.axes))
        place = struct.pack("<IQ", self.ggml_id % 2**32, self.offset % 2**64)
        return struct.pack("<Q", len(self.name)) + self.name + axes + place


@dataclass(frozen=True, kw_only=True)
class Layout:
    """A GGUF taken apart. `integers` are places and widths of all counts, lengths, kinds, axes, types and offsets."""

    version: int
    fields: list[tuple[bytes, bytes]]  # name; kind and value as stored
    entries: list[Entry]
    alignment: int
    start: int  # of the data
    data: bytes
    integers: list[tuple[int, int]]

    def packed(self) -> bytes:
        head = b"GGUF" + struct.pack("<IQQ", self.version, len(self.entries), len(self.fields))
        head += b"".join(struct.pack("<Q", len(name)) + name + value for name, value in self.fields)
        head += b"".join(entry.packed() for entry in self.entries)
        return head + bytes(-len(head) % self.alignment) + self.data


def parse_gguf(raw: bytes) -> Layout:
    """Takes a sound GGUF apart, by struct alone."""
    integers: list[tuple[int, int]] = []
    place = 4

    def number(width: int) -> int:
        nonlocal place
        integers.append((place, width))
        place += width
        return int.from_bytes(raw[place - width : place], "little")

    def text() -> bytes:
        nonlocal place
        length = number(8)
        place += length
        return raw[place - length : place]

    def value(kind: int) -> None:
        nonlocal place
        if kind == 8:
            text()
        elif kind == 9:
            inner, count = number(4), number(8)
            if inner != 8:
                place += count * sizes[inner]
            else:
                for _ in range(count):
                    length = int.from_bytes(raw[place : place + 8], "little")
                    if count < 1000:
                        integers.append((place, 8))
                    place += 8 + length
        else:
            place += sizes[kind]

    sizes = {kind: struct.calcsize(form) for kind, form in GGUF_FORMATS.values()}
    version, count, field_count = number(4), number(8), number(8)
    fields, alignment = [], 32
    for _ in range(field_count):
        name, begin = text(), place
        value(number(4))
        fields.append((name, raw[begin:place]))
        if name == b"general.alignment":
            alignment = int.from_bytes(raw[begin + 4 : place], "little")
    entries = []
    for _ in range(count):
        name = text()
        axes = tuple(number(8) for _ in range(number(4)))
        entries.append(Entry(name=name, axes=axes, ggml_id=number(4), offset=number(8)))
    start = -(-place // alignment) * alignment
    return Layout(
        version=version,
        fields=fields,
        entries=entries,
        alignment=alignment,
        start=start,
        data=raw[start:],
        integers=integers,
    )


def gguf_integer(raw: bytes, rng: np.random.Generator) -> bytes:
    """A count, length, kind, axis, type or offset becomes another number."""
    place, width = pick(rng, parse_gguf(raw).integers)
    old = int.from_bytes(raw[place : place + width], "little")
    new = pick(rng, (_extreme(len(raw), rng), old + 1, old - 1, old * 2, old + 32, int(rng.integers(0, 45))))
    return _put(raw, place, (new % (1 << 8 * width)).to_bytes(width, "little"))


def gguf_border(raw: bytes, rng: np.random.Generator) -> bytes:
    """Cut before or after a number of the header, or at the start of a tensor."""
    layout = parse_gguf(raw)
    place, width = pick(rng, layout.integers)
    tensor = layout.start + pick(rng, [entry.offset for entry in layout.entries] or [0])
    return raw[: pick(rng, (place, place + width, tensor, tensor + 1, tensor - 1))]


def gguf_value(raw: bytes, rng: np.random.Generator) -> bytes:
    """A field of another kind, an array of arrays, deep ones too, or a text that is no UTF-8."""
    layout = parse_gguf(raw)
    name, value = pick(rng, layout.fields or [(b"a", b"")])
    deep = struct.pack("<IQ", 9, 1) * int(rng.integers(1, 3000))
    new = pick(
        rng,
        (
            struct.pack("<I", 9) + deep,
            struct.pack("<I", 8) + struct.pack("<Q", 3) + b"\xed\xa0\x80",
            struct.pack("<I", 7) + b"\2",
            struct.pack("<I", 6) + struct.pack("<f", np.nan),
            struct.pack("<I", 5) + struct.pack("<i", -1),
            struct.pack("<I", 11) + struct.pack("<q", -(2**63)),
            struct.pack("<I", 10) + struct.pack("<Q", _extreme(len(raw), rng)),
            struct.pack("<I", 12) + struct.pack("<d", 1e300),
            struct.pack("<IIQ", 9, 8, 2**20),
            struct.pack("<IIQ", 9, 0, len(raw)),
            struct.pack("<I", int(rng.integers(0, 20))) + value[4:],
        ),
    )
    fields = [(key, new if key == name else old) for key, old in layout.fields] or [(name, new)]
    return replace(layout, fields=fields).packed()


def gguf_fields(raw: bytes, rng: np.random.Generator) -> bytes:
    """Fields twice, gone, in another order, with odd names, or an odd alignment."""
    layout = parse_gguf(raw)
    fields = list(layout.fields)
    name, value = pick(rng, fields or [(b"a", struct.pack("<IB", 0, 0))])
    alignment = pick(rng, (0, 1, 2, 3, 4, 8, 16, 24, 64, 4096, 2**31, 2**32 - 1))
    others = [field for field in fields if field[0] != name]
    fields = pick(
        rng,
        (
            [*fields, (name, value)],
            others,
            fields[::-1],
            [*others, (pick(rng, (b"", b"\xff\xfe", name + b"\n", b"k" * 5000)), value)],
            [*fields, (b"general.alignment", struct.pack("<II", 4, alignment))],
            [*fields, (b"general.alignment", struct.pack("<IQ", 10, _extreme(len(raw), rng)))],
        ),
    )
    return replace(layout, fields=fields).packed()


def gguf_tensor(raw: bytes, rng: np.random.Generator) -> bytes:
    """One or two entries of the tensor list with other names, axes, types or places."""
    layout = parse_gguf(raw)
    if not layout.entries:
        return gguf_value(raw, rng)
    entries = list(layout.entries)
    for _ in range(int(rng.integers(1, 3))):
        index, other = int(rng.integers(len(entries))), pick(rng, entries)
        entry, size = entries[index], len(layout.data)
        axis = int(rng.integers(max(1, len(entry.axes))))
        axes = (*entry.axes[:axis], _extreme(size, rng), *entry.axes[axis + 1 :])
        entries[index] = pick(
            rng,
            (
                replace(entry, name=other.name),
                replace(entry, name=pick(rng, (b"", b"\xff", b"a\nb", b"w" * 4000, b"blk.00.attn_q.weight"))),
                replace(entry, name=entry.name.replace(b"0", b"9" * int(rng.integers(1, 6000)))),
                replace(entry, axes=axes),
                replace(entry, axes=()),
                replace(entry, axes=entry.axes[::-1]),
                replace(entry, axes=(*entry.axes, 1, 1, 1)[: int(rng.integers(0, 7))]),
                replace(entry, axes=(2**32, 2**32, 2**32, 2**32)),
                replace(entry, axes=tuple(max(1, axis // 2) for axis in entry.axes)),
                replace(entry, ggml_id=int(rng.integers(0, 45))),
                replace(entry, ggml_id=_extreme(size, rng)),
                replace(entry, offset=other.offset),
                replace(entry, offset=other.offset + layout.alignment),
                replace(entry, offset=_extreme(size, rng)),
                replace(entry, offset=entry.offset + int(rng.integers(1, 32))),
            ),
        )
    chosen = pick(rng, (entries, entries, entries, entries[::-1], [*entries, entries[0]], entries[1:]))
    return replace(layout, entries=chosen).packed()


def gguf_data(raw: bytes, rng: np.random.Generator) -> bytes:
    """The tensors' bytes alone."""
    layout = parse_gguf(raw)
    if not layout.data:
        return gguf_value(raw, rng)
    data = pick(rng, (flip, overwrite, copy_within, integer))(layout.data, rng)
    return replace(layout, data=data).packed()


GGUF: tuple[Bytes, ...] = (gguf_integer, gguf_integer, gguf_border, gguf_value, gguf_fields, gguf_tensor, gguf_data)

# JSON -----------------------------------------------------------------------------------------------------------------

_DEEP = ("[" * 50_000, "[" * 900 + "]" * 900, '{"a":' * 5000 + "1" + "}" * 5000)
_ODD = (
    *("null", "true", "false", "0", "-1", "1", "2", "0.5", "-0.0", "1e999", "-1e999", "NaN", "-Infinity", "1e38"),
    *("64", "1000000000", "4294967296", "9223372036854775807", "9223372036854775808", "1" + "0" * 400, "9" * 5000),
    *('""', '"x"', r'"\ud800"', r'"\u0000"', '"🙂"', '"../x"', '"' + "y" * 5000 + '"', "[]", "{}", "[[]]", '[""]'),
    *('{"a":1,"a":1}', '{"a":{}}', "[1,2,3]", '["float"]', "[0]", "[1e400]", "[null]", '{"content":[]}', "tru", "'x'"),
)


def json_node(raw: bytes, rng: np.random.Generator) -> bytes:
    """One value anywhere in a JSON text becomes an odd one."""
    value = json.loads(raw)
    if rng.random() < 0.05:
        value = {"": value}
    parent, key = _place(value, rng)
    parent[key] = "@odd@"
    odd = pick(rng, _DEEP) if rng.random() < 0.05 else pick(rng, _ODD)
    return json.dumps(value, ensure_ascii=False).replace('"@odd@"', odd).encode()


def json_swap(raw: bytes, rng: np.random.Generator) -> bytes:
    """Two values change places, or one is copied over another."""
    value = json.loads(raw)
    (one, here), (two, there) = _place(value, rng), _place(value, rng)
    copied = json.loads(json.dumps([one[here], two[there]]))
    two[there] = copied[0]
    if rng.random() < 0.5:
        one[here] = copied[1]
    return json.dumps(value, ensure_ascii=False).encode()


def json_key(raw: bytes, rng: np.random.Generator) -> bytes:
    """A key is gone, renamed, or there twice."""
    value = json.loads(raw)
    parent, key = _place(value, rng)
    while not isinstance(parent, dict):
        parent, key = _place(value, rng)
    kept = parent.pop(key)
    new = pick(rng, (None, "", "@twice@", r"\n", "z" * 3000, "\0", key + "x", key.replace("0", "00")))
    if new is not None:
        parent[new] = kept
    text = json.dumps(value, ensure_ascii=False)
    first = json.dumps(pick(rng, parent) if parent else "a", ensure_ascii=False)
    return text.replace('"@twice@"', first).encode()


def json_number(raw: bytes, rng: np.random.Generator) -> bytes:
    """A number becomes another of the same kind."""
    value = json.loads(raw)
    numbers = [(parent, key) for parent, key in _parents(value) if type(parent[key]) in (int, float)]
    if not numbers:
        return json_node(raw, rng)
    parent, key = pick(rng, numbers)
    old = parent[key]
    parent[key] = pick(rng, (old + 1, old - 1, -old, 2 * old, old // 2, 0, 1, 10**12, 2**63, old + 0.5, 3))
    return json.dumps(value, ensure_ascii=False).encode()


def _place(value: Any, rng: np.random.Generator) -> tuple[Any, Any]:
    """A place that holds a value, found from the top: what stands alone is met more often than one of many alike."""
    key = pick(rng, value if isinstance(value, dict) else range(len(value)))
    below = value[key]
    return _place(below, rng) if isinstance(below, dict | list) and below and rng.random() < 0.8 else (value, key)


def _parents(value: Any) -> list[tuple[Any, Any]]:
    """Every place that holds a value: its object or list, and the key or index."""
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    places = [(value, key) for key in keys]
    return places + [place for key in keys for place in _parents(value[key])]


JSON: tuple[Bytes, ...] = (json_node, json_node, json_swap, json_key, json_number)

# Safetensors ----------------------------------------------------------------------------------------------------------


def _in_header(mutator: Bytes) -> Bytes:
    def damaged(raw: bytes, rng: np.random.Generator) -> bytes:
        header, body = raw[8:][: int.from_bytes(raw[:8], "little")], raw[8 + int.from_bytes(raw[:8], "little") :]
        new = mutator(header, rng)
        return len(new).to_bytes(8, "little") + new + body

    damaged.__name__ = f"header_{mutator.__name__}"
    return damaged


def header_entry(raw: bytes, rng: np.random.Generator) -> bytes:
    """Dtype, shape or extent of a tensor changed so that the entry itself still makes sense."""
    length = int.from_bytes(raw[:8], "little")
    header, body = json.loads(raw[8 : 8 + length]), raw[8 + length :]
    names = [name for name in header if name != "__metadata__"]
    entry, other = header[pick(rng, names)], header[pick(rng, names)]
    begin, end = entry["data_offsets"]
    change = pick(
        rng,
        (
            {"dtype": pick(rng, ("F64", "F32", "F16", "BF16", "I32", "U8", "BOOL", "F8_E4M3", "F4", "C64", ""))},
            {"shape": entry["shape"][::-1]},
            {"shape": [*entry["shape"], 1]},
            {"shape": [1] * 70},
            {"shape": [0, 2**62, 2**62]},
            {"shape": [2**63 - 1, 2**63 - 1], "dtype": "I4"},
            {"shape": []},
            {"shape": [_extreme(len(raw), rng), *entry["shape"][1:]]},
            {"data_offsets": other["data_offsets"]},
            {"data_offsets": [begin + 1, end + 1]},
            {"data_offsets": [begin, _extreme(len(raw), rng)]},
            {"data_offsets": [end, begin]},
            {"shape": other["shape"], "data_offsets": other["data_offsets"], "dtype": other["dtype"]},
            {"shape": [0], "data_offsets": [0, 0]},
        ),
    )
    entry.update(change)
    if rng.random() < 0.2:
        header["__metadata__"] = pick(rng, ({}, {"a": "b"}, {"a": 1}, [], None, {"": ""}))
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + body


def header_length(raw: bytes, rng: np.random.Generator) -> bytes:
    length = int.from_bytes(raw[:8], "little")
    near = int(rng.integers(max(0, length - 20), length + 20))
    return _put(raw, 0, pick(rng, (_extreme(len(raw), rng), near)).to_bytes(8, "little"))


def body(raw: bytes, rng: np.random.Generator) -> bytes:
    """The tensors' bytes alone: changed, longer or shorter."""
    length = 8 + int.from_bytes(raw[:8], "little")
    data = raw[length:]
    changed = (flip(data, rng), overwrite(data, rng), copy_within(data, rng), data + bytes(3), data[:-1])
    return raw[:length] + pick(rng, changed)


SAFETENSORS: tuple[Bytes, ...] = (*map(_in_header, JSON), header_entry, header_entry, header_length, body)
