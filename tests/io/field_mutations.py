"""Ways to damage the fields of a GGUF that describe a tokenizer, before they are written; as those of mutations.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from tests.io.mutations import pick

Field = tuple[str, str, Any]  # name, kind, value, as write_gguf takes them
FieldMutator = Callable[[list[Field], np.random.Generator], list[Field]]


def _with(fields: list[Field], name: str, kind: str, value: Any) -> list[Field]:
    """The field set, or added where it is not there."""
    others = [field for field in fields if field[0] != f"tokenizer.ggml.{name}"]
    return [*others, (f"tokenizer.ggml.{name}", kind, value)]


def _value(fields: list[Field], name: str) -> Any:
    return next((value for key, _, value in fields if key == f"tokenizer.ggml.{name}"), [])


def field_kinds(fields: list[Field], rng: np.random.Generator) -> list[Field]:
    """A field is gone, or of another kind."""
    name, _, _ = pick(rng, fields)
    odd: list[tuple[str, Any]] = [("u8", 1), ("i32", -1), ("u64", 2**64 - 1), ("f32", np.nan), ("bool", True)]
    odd += [("str", "x"), ("[str]", ["x"]), ("[u8]", [1, 2]), ("[f64]", [0.5]), ("[str]", []), ("[i32]", [])]
    others = [field for field in fields if field[0] != name]
    return others if rng.random() < 0.3 else [*others, (name, *pick(rng, odd))]


def field_swap(fields: list[Field], rng: np.random.Generator) -> list[Field]:
    """Two arrays change their names."""
    arrays = [index for index, (_, kind, _) in enumerate(fields) if kind.startswith("[")]
    one, two = pick(rng, arrays), pick(rng, arrays)
    swapped = list(fields)
    swapped[one], swapped[two] = (fields[one][0], *fields[two][1:]), (fields[two][0], *fields[one][1:])
    return swapped


def field_ids(fields: list[Field], rng: np.random.Generator) -> list[Field]:
    """Token ids out of range, or of any token at all; and whether BOS and EOS are added."""
    count = len(_value(fields, "tokens"))
    name = pick(rng, ("bos", "eos", "eot", "eom", "unknown"))
    new = pick(rng, [("u32", count), ("u32", 2**32 - 1), ("i64", -1), *[("u32", int(rng.integers(count)))] * 5])
    fields = _with(fields, f"{name}_token_id", *new)
    flag = pick(rng, ("add_bos_token", "add_eos_token", "add_space_prefix", "remove_extra_whitespaces"))
    return _with(fields, flag, "bool", bool(rng.integers(2)))


_PAIRS = ("", " ", "ab", "a  b", "a b c", "zz qq", " a", "a ", "a b", "\0 \0", "🙂 🙂", "x" * 3000 + " y")


def field_merges(fields: list[Field], rng: np.random.Generator) -> list[Field]:
    """Merges that are no pairs, of no tokens, in another order, twice."""
    merges = list(_value(fields, "merges")) or ["a b"]
    merges[int(rng.integers(len(merges)))] = pick(rng, _PAIRS)
    tokens = _value(fields, "tokens")
    pairs = [f"{pick(rng, tokens)} {pick(rng, tokens)}" for _ in range(3)]
    return _with(fields, "merges", "[str]", pick(rng, (merges, merges[::-1], merges * 2, merges[1:], merges + pairs)))


def field_numbers(fields: list[Field], rng: np.random.Generator) -> list[Field]:
    """Scores and kinds of tokens of the wrong number, not finite, or of an odd kind."""
    count = len(_value(fields, "tokens"))
    name = pick(rng, ("scores", "token_type"))
    length = pick(rng, (0, 1, count - 1, count + 1, *[count] * 6))
    kind = pick(rng, ("f32", "f64", "u8", "i8", "u16", "i32", "u64", "bool"))
    if kind[0] == "f":
        values = rng.choice(pick(rng, ([0.0, -1.0, -2.5], [np.nan, np.inf, 0.0], [-1e38, 1e38])), length).tolist()
    elif kind == "bool":
        values = (rng.random(length) < 0.5).tolist()
    else:
        values = rng.integers(0, pick(rng, (2, 7, 100)), length).tolist()
    return _with(fields, name, f"[{kind}]", values)


_TOKENS = (
    *("", " ", "▁", "a", "$A", "a:b", ":", "\0", "\n", "\\", "[", "]", "^", "-", "&&", "#", "(?", "<0x00>", "<0xZZ>"),
    *("🙂", "\u0301", "\ufffd", "▁▁▁", "a▁b", "]▁x", "^▁x", "&&▁x", "\\▁x", "-▁z", "\0▁x", "s" * 3000, "▁" * 500, " ▁"),
)


def field_tokens(fields: list[Field], rng: np.random.Generator) -> list[Field]:
    """Tokens twice, empty, long, of signs that mean something to a regular expression or a template."""
    tokens = list(_value(fields, "tokens"))
    for _ in range(int(rng.integers(1, 6))):
        tokens[int(rng.integers(len(tokens)))] = pick(rng, _TOKENS)
    choices = (tokens, tokens, tokens, tokens[1:], [*tokens, tokens[0]], ["a" * n for n in range(1, len(tokens) + 1)])
    chosen = pick(rng, choices)
    return _with(fields, "tokens", "[str]", list(dict.fromkeys(chosen)) if rng.random() < 0.3 else chosen)


def field_names(fields: list[Field], rng: np.random.Generator) -> list[Field]:
    """Another model, pre-tokenizer or architecture."""
    if rng.random() < 0.3:
        return [*fields[1:], ("general.architecture", "str", pick(rng, ("phi3", "", "gemma2")))]
    known = ("gpt-2", "smollm", "llama-bpe", "dbrx", "qwen2", "tekken", "gpt-4o", "default", "llama3", "", "x\ny")
    new = ("model", pick(rng, ("gpt2", "llama", "bert", ""))), ("pre", pick(rng, known))
    name, value = pick(rng, new)
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
