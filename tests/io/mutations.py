"""Ways to damage a file: blindly, along the structure of GGUF, safetensors and JSON, or in a tokenizer's fields.

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
Field = tuple[str, str, Any]  # name, kind, value, as write_gguf takes them
FieldMutator = Callable[[list[Field], np.random.Generator], list[Field]]

EXTREMES = (0, 1, 2, 3, 5, 9, 255, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**61, 2**62, 2**63 - 1, 2**63, 2**64 - 1)


def _pick(rng: np.random.Generator, items: Any) -> Any:
    items = list(items)
    return items[int(rng.integers(len(items)))]


def _put(raw: bytes, place: int, new: bytes) -> bytes:
    """`new` written over what lies at `place`."""
    return raw[:place] + new + raw[place + len(new) :]


def _extreme(size: int, rng: np.random.Generator) -> int:
    around = (size - 1, size, size + 1, size // 2, size // 4)
    return _pick(rng, (*EXTREMES, *around)) if rng.random() < 0.8 else int(rng.integers(0, 4 * size))


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
    run = _pick(rng, (bytes(count), b"\xff" * count, rng.bytes(count)))
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
    width = _pick(rng, (4, 8))
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
    place, width = _pick(rng, parse_gguf(raw).integers)
    old = int.from_bytes(raw[place : place + width], "little")
    new = _pick(rng, (_extreme(len(raw), rng), old + 1, old - 1, old * 2, old + 32, int(rng.integers(0, 45))))
    return _put(raw, place, (new % (1 << 8 * width)).to_bytes(width, "little"))


def gguf_border(raw: bytes, rng: np.random.Generator) -> bytes:
    """Cut before or after a number of the header, or at the start of a tensor."""
    layout = parse_gguf(raw)
    place, width = _pick(rng, layout.integers)
    tensor = layout.start + _pick(rng, [entry.offset for entry in layout.entries] or [0])
    return raw[: _pick(rng, (place, place + width, tensor, tensor + 1, tensor - 1))]


def gguf_value(raw: bytes, rng: np.random.Generator) -> bytes:
    """A field of another kind, an array of arrays, deep ones too, or a text that is no UTF-8."""
    layout = parse_gguf(raw)
    name, value = _pick(rng, layout.fields or [(b"a", b"")])
    deep = struct.pack("<IQ", 9, 1) * int(rng.integers(1, 3000))
    new = _pick(
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
    name, value = _pick(rng, fields or [(b"a", struct.pack("<IB", 0, 0))])
    alignment = _pick(rng, (0, 1, 2, 3, 4, 8, 16, 24, 64, 4096, 2**31, 2**32 - 1))
    others = [field for field in fields if field[0] != name]
    fields = _pick(
        rng,
        (
            [*fields, (name, value)],
            others,
            fields[::-1],
            [*others, (_pick(rng, (b"", b"\xff\xfe", name + b"\n", b"k" * 5000)), value)],
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
        index, other = int(rng.integers(len(entries))), _pick(rng, entries)
        entry, size = entries[index], len(layout.data)
        axis = int(rng.integers(max(1, len(entry.axes))))
        axes = (*entry.axes[:axis], _extreme(size, rng), *entry.axes[axis + 1 :])
        entries[index] = _pick(
            rng,
            (
                replace(entry, name=other.name),
                replace(entry, name=_pick(rng, (b"", b"\xff", b"a\nb", b"w" * 4000, b"blk.00.attn_q.weight"))),
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
    chosen = _pick(rng, (entries, entries, entries, entries[::-1], [*entries, entries[0]], entries[1:]))
    return replace(layout, entries=chosen).packed()


def gguf_data(raw: bytes, rng: np.random.Generator) -> bytes:
    """The tensors' bytes alone."""
    layout = parse_gguf(raw)
    if not layout.data:
        return gguf_value(raw, rng)
    data = _pick(rng, (flip, overwrite, copy_within, integer))(layout.data, rng)
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
    odd = _pick(rng, _DEEP) if rng.random() < 0.05 else _pick(rng, _ODD)
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
    new = _pick(rng, (None, "", "@twice@", r"\n", "z" * 3000, "\0", key + "x", key.replace("0", "00")))
    if new is not None:
        parent[new] = kept
    text = json.dumps(value, ensure_ascii=False)
    first = json.dumps(_pick(rng, parent) if parent else "a", ensure_ascii=False)
    return text.replace('"@twice@"', first).encode()


def json_number(raw: bytes, rng: np.random.Generator) -> bytes:
    """A number becomes another of the same kind."""
    value = json.loads(raw)
    numbers = [(parent, key) for parent, key in _parents(value) if type(parent[key]) in (int, float)]
    if not numbers:
        return json_node(raw, rng)
    parent, key = _pick(rng, numbers)
    old = parent[key]
    parent[key] = _pick(rng, (old + 1, old - 1, -old, 2 * old, old // 2, 0, 1, 10**12, 2**63, old + 0.5, 3))
    return json.dumps(value, ensure_ascii=False).encode()


def _place(value: Any, rng: np.random.Generator) -> tuple[Any, Any]:
    """A place that holds a value, found from the top: what stands alone is met more often than one of many alike."""
    key = _pick(rng, value if isinstance(value, dict) else range(len(value)))
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
    entry, other = header[_pick(rng, names)], header[_pick(rng, names)]
    begin, end = entry["data_offsets"]
    change = _pick(
        rng,
        (
            {"dtype": _pick(rng, ("F64", "F32", "F16", "BF16", "I32", "U8", "BOOL", "F8_E4M3", "F4", "C64", ""))},
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
        header["__metadata__"] = _pick(rng, ({}, {"a": "b"}, {"a": 1}, [], None, {"": ""}))
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + body


def header_length(raw: bytes, rng: np.random.Generator) -> bytes:
    length = int.from_bytes(raw[:8], "little")
    near = int(rng.integers(max(0, length - 20), length + 20))
    return _put(raw, 0, _pick(rng, (_extreme(len(raw), rng), near)).to_bytes(8, "little"))


def body(raw: bytes, rng: np.random.Generator) -> bytes:
    """The tensors' bytes alone: changed, longer or shorter."""
    length = 8 + int.from_bytes(raw[:8], "little")
    data = raw[length:]
    changed = (flip(data, rng), overwrite(data, rng), copy_within(data, rng), data + bytes(3), data[:-1])
    return raw[:length] + _pick(rng, changed)


SAFETENSORS: tuple[Bytes, ...] = (*map(_in_header, JSON), header_entry, header_entry, header_length, body)

# The fields of a tokenizer --------------------------------------------------------------------------------------------


def _with(fields: list[Field], name: str, kind: str, value: Any) -> list[Field]:
    """The field set, or added where it is not there."""
    others = [field for field in fields if field[0] != f"tokenizer.ggml.{name}"]
    return [*others, (f"tokenizer.ggml.{name}", kind, value)]


def _value(fields: list[Field], name: str) -> Any:
    return next((value for key, _, value in fields if key == f"tokenizer.ggml.{name}"), [])


def field_kinds(fields: list[Field], rng: np.random.Generator) -> list[Field]:
    """A field is gone, or of another kind."""
    name, _, _ = _pick(rng, fields)
    odd: list[tuple[str, Any]] = [("u8", 1), ("i32", -1), ("u64", 2**64 - 1), ("f32", np.nan), ("bool", True)]
    odd += [("str", "x"), ("[str]", ["x"]), ("[u8]", [1, 2]), ("[f64]", [0.5]), ("[str]", []), ("[i32]", [])]
    others = [field for field in fields if field[0] != name]
    return others if rng.random() < 0.3 else [*others, (name, *_pick(rng, odd))]


def field_swap(fields: list[Field], rng: np.random.Generator) -> list[Field]:
    """Two arrays change their names."""
    arrays = [index for index, (_, kind, _) in enumerate(fields) if kind.startswith("[")]
    one, two = _pick(rng, arrays), _pick(rng, arrays)
    swapped = list(fields)
    swapped[one], swapped[two] = (fields[one][0], *fields[two][1:]), (fields[two][0], *fields[one][1:])
    return swapped


def field_ids(fields: list[Field], rng: np.random.Generator) -> list[Field]:
    """Token ids out of range, or of any token at all; and whether BOS and EOS are added."""
    count = len(_value(fields, "tokens"))
    name = _pick(rng, ("bos", "eos", "eot", "eom", "unknown"))
    new = _pick(rng, [("u32", count), ("u32", 2**32 - 1), ("i64", -1), *[("u32", int(rng.integers(count)))] * 5])
    fields = _with(fields, f"{name}_token_id", *new)
    flag = _pick(rng, ("add_bos_token", "add_eos_token", "add_space_prefix", "remove_extra_whitespaces"))
    return _with(fields, flag, "bool", bool(rng.integers(2)))


_PAIRS = ("", " ", "ab", "a  b", "a b c", "zz qq", " a", "a ", "a b", "\0 \0", "🙂 🙂", "x" * 3000 + " y")


def field_merges(fields: list[Field], rng: np.random.Generator) -> list[Field]:
    """Merges that are no pairs, of no tokens, in another order, twice."""
    merges = list(_value(fields, "merges")) or ["a b"]
    merges[int(rng.integers(len(merges)))] = _pick(rng, _PAIRS)
    tokens = _value(fields, "tokens")
    pairs = [f"{_pick(rng, tokens)} {_pick(rng, tokens)}" for _ in range(3)]
    return _with(fields, "merges", "[str]", _pick(rng, (merges, merges[::-1], merges * 2, merges[1:], merges + pairs)))


def field_numbers(fields: list[Field], rng: np.random.Generator) -> list[Field]:
    """Scores and kinds of tokens of the wrong number, not finite, or of an odd kind."""
    count = len(_value(fields, "tokens"))
    name = _pick(rng, ("scores", "token_type"))
    length = _pick(rng, (0, 1, count - 1, count + 1, *[count] * 6))
    kind = _pick(rng, ("f32", "f64", "u8", "i8", "u16", "i32", "u64", "bool"))
    if kind[0] == "f":
        values = rng.choice(_pick(rng, ([0.0, -1.0, -2.5], [np.nan, np.inf, 0.0], [-1e38, 1e38])), length).tolist()
    elif kind == "bool":
        values = (rng.random(length) < 0.5).tolist()
    else:
        values = rng.integers(0, _pick(rng, (2, 7, 100)), length).tolist()
    return _with(fields, name, f"[{kind}]", values)


_TOKENS = (
    *("", " ", "▁", "a", "$A", "a:b", ":", "\0", "\n", "\\", "[", "]", "^", "-", "&&", "#", "(?", "<0x00>", "<0xZZ>"),
    *("🙂", "\u0301", "\ufffd", "▁▁▁", "a▁b", "]▁x", "^▁x", "&&▁x", "\\▁x", "-▁z", "\0▁x", "s" * 3000, "▁" * 500, " ▁"),
)


def field_tokens(fields: list[Field], rng: np.random.Generator) -> list[Field]:
    """Tokens twice, empty, long, of signs that mean something to a regular expression or a template."""
    tokens = list(_value(fields, "tokens"))
    for _ in range(int(rng.integers(1, 6))):
        tokens[int(rng.integers(len(tokens)))] = _pick(rng, _TOKENS)
    choices = (tokens, tokens, tokens, tokens[1:], [*tokens, tokens[0]], ["a" * n for n in range(1, len(tokens) + 1)])
    chosen = _pick(rng, choices)
    return _with(fields, "tokens", "[str]", list(dict.fromkeys(chosen)) if rng.random() < 0.3 else chosen)


def field_names(fields: list[Field], rng: np.random.Generator) -> list[Field]:
    """Another model, pre-tokenizer or architecture."""
    if rng.random() < 0.3:
        return [*fields[1:], ("general.architecture", "str", _pick(rng, ("phi3", "", "gemma2")))]
    known = ("gpt-2", "smollm", "llama-bpe", "dbrx", "qwen2", "tekken", "gpt-4o", "default", "llama3", "", "x\ny")
    new = ("model", _pick(rng, ("gpt2", "llama", "bert", ""))), ("pre", _pick(rng, known))
    name, value = _pick(rng, new)
    return _with(fields, name, "str", value)


FIELDS: tuple[FieldMutator, ...] = (
    field_kinds,
    field_swap,
    field_ids,
    field_merges,
    field_numbers,
    field_tokens,
    field_names,
)
