"""Records tests/goldens/tokenizer.json: pieces of every GGUF pre-tokenizer, and token ids of the demo model.

Oracle: byte-level BPE in plain Python below, with the `regex` module for the pre-tokenizers' patterns and gguf-py for
the vocabulary and merges; nothing of Hugging Face's `tokenizers`, which jquant uses.

Run with a Python that has `gguf`, `regex` and numpy: `python scripts/goldens/tokenizer.py DEMO.gguf [TEXT ...]`. For
each TEXT (plain or .gz) it prints the number of tokens and the hash of their ids, to compare with jquant's.
"""
# pyright: reportMissingImports=false

from __future__ import annotations

import argparse
import functools
import gzip
import hashlib
import importlib.metadata
import itertools
import json
import unicodedata
from pathlib import Path

import numpy as np
import regex
from gguf import GGUFReader

TARGET = Path(__file__).parents[2] / "tests" / "goldens" / "tokenizer.json"

SAMPLES = (
    "4 ½ months",
    "Hello, world! It's 2024; we've paid $1,234.56 — they'LL see.",
    "  leading, trailing and   inner spaces  ",
    "tabs\tand\nnew\n\n\nlines\r\n  indented\n    def f(x):\n\treturn x**2  # ok\n",
    "Straße, naïve café, cafe\u0301, Ångström, Ωμέγα, Привет мир, İstanbul",
    "你好，世界。今天是2024年1月5日。 こんにちは世界 안녕하세요 세계",
    "مرحبا بالعالم ١٢٣٤ नमस्ते दुनिया १२३ สวัสดีชาวโลก שלום",
    "👩‍👩‍👧‍👦 🇩🇪 🤷🏽‍♀️ ∑∫√ ² ³ ⅷ Ⅻ ①",
    "no\u00a0break\u2003em\u3000wide\u200bzero\u2028line",
    "https://example.org/a?b=c&d=%20#e <tag attr='x'/> a_b-c.d@e [[1]] {x}|y^z~`w`",
    "<|im_start|>user\nHi<|im_end|>\n<|endoftext|> <|im_start <empty_output>",
    "1234567890 12 3 4567",
    "'s 't 'RE 'Ve don'T I'M 'x ''s",
    "camelCase HTMLParser iPhone's XMLs/n // a/b\n/\n ǅ ªº x\u0301Y\u0301 ท้ Ⅷa",
    " ",
    "\n",
    "",
)

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
REST = r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,%d}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
CONTRACTIONS = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
SIGN, UPPER, LOWER = r"[^\r\n\p{L}\p{N}]?", r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
CASED = (f"{SIGN}{UPPER}*{LOWER}+", f"{SIGN}{UPPER}+{LOWER}*")
CASED_REST = r"|\p{N}{1,%d}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
PATTERNS = {  # llama-vocab.cpp, llm_tokenizer_bpe: each cuts the pieces of the one before
    "gpt-2": (GPT2,),
    "smollm": (r"\p{N}", GPT2),
    "llama-bpe": (CONTRACTIONS + REST % 3,),
    "dbrx": (CONTRACTIONS + REST % 3,),
    "qwen2": (CONTRACTIONS + REST % 1,),
    "deepseek-r1-qwen": (CONTRACTIONS + REST % 1,),
    "tekken": ("|".join(CASED) + CASED_REST % 1,),  # the pattern in Mistral's tekken.json
    "gpt-4o": ("|".join(word + CONTRACTIONS + "?" for word in CASED) + CASED_REST % 3,),
    "default": (r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", r"[0-9][0-9][0-9]"),
}
NORMALIZED = ("qwen2",)  # by NFC first, as Qwen's tokenizer.json does


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("gguf", type=Path)
    parser.add_argument("texts", type=Path, nargs="*")
    arguments = parser.parse_args()
    encode = demo_encoder(arguments.gguf)
    golden = {
        "origin": {
            "oracle": "plain Python BPE of scripts/goldens/tokenizer.py",
            "regex": importlib.metadata.version("regex"),
            "gguf": importlib.metadata.version("gguf"),
            "unicode": unicodedata.unidata_version,
            "config": {"demo": arguments.gguf.name, "patterns": PATTERNS, "normalized": NORMALIZED},
        },
        "samples": SAMPLES,
        "pieces": {name: [pieces(name, text) for text in SAMPLES] for name in PATTERNS},
        "demo_ids": [encode(text) for text in SAMPLES],
    }
    TARGET.write_text(json.dumps(golden, ensure_ascii=True, indent=None, separators=(",", ":")) + "\n")
    print(f"{TARGET}: {TARGET.stat().st_size:,} bytes")
    for path in arguments.texts:
        raw = path.read_bytes()
        text = (gzip.decompress(raw) if path.suffix == ".gz" else raw).decode("utf-8")
        ids = np.array(encode(text), "<i4")
        print(f"{path}: {len(ids):,} tokens, sha256 of int32 ids {hashlib.sha256(ids.tobytes()).hexdigest()}")


def pieces(name: str, text: str) -> list[str]:
    """The text cut for BPE, every byte of a piece written as GPT-2's printable character."""
    parts = [unicodedata.normalize("NFC", text) if name in NORMALIZED else text]
    for pattern in PATTERNS[name]:
        parts = [cut for part in parts for cut in cuts(pattern, part)]
    return ["".join(BYTE_SIGNS[byte] for byte in part.encode()) for part in parts]


def cuts(pattern: str, text: str) -> list[str]:
    """The matches and what lies between them."""
    found, position = [], 0
    for match in regex.finditer(pattern, text):
        found += [text[position : match.start()], match.group()]
        position = match.end()
    return [part for part in [*found, text[position:]] if part]


def byte_signs() -> dict[int, str]:
    """GPT-2's map of bytes to printable characters: itself where printable, else the next one from U+0100 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + rank) for rank, byte in enumerate(others)}


BYTE_SIGNS = byte_signs()


def demo_encoder(path: Path):
    """Text to ids, by the vocabulary and merges that gguf-py reads from a GGUF."""
    fields = GGUFReader(path).fields

    def contents(name: str):
        return fields[f"tokenizer.ggml.{name}"].contents()

    tokens = contents("tokens")
    index = {token: number for number, token in enumerate(tokens)}
    ranks = {tuple(merge.split(" ")): rank for rank, merge in enumerate(contents("merges"))}
    special = [token for token, kind in zip(tokens, contents("token_type"), strict=True) if kind == 3]
    special_pattern = "|".join(map(regex.escape, sorted(special, key=len, reverse=True)))
    name = contents("pre")

    @functools.cache
    def merged(piece: str) -> list[int]:
        symbols = list(piece)
        while len(symbols) > 1:
            pairs = list(itertools.pairwise(symbols))
            best = min(pairs, key=lambda pair: ranks.get(pair, len(ranks)))
            if best not in ranks:
                break
            joined, position = [], 0
            while position < len(symbols):
                step = 2 if tuple(symbols[position : position + 2]) == best else 1
                joined.append("".join(symbols[position : position + step]))
                position += step
            symbols = joined
        return [index[symbol] for symbol in symbols]

    def encode(text: str) -> list[int]:
        ids: list[int] = []
        for part in cuts(special_pattern, text):
            ids += (
                [index[part]] if part in special else [token for piece in pieces(name, part) for token in merged(piece)]
            )
        return ids

    return encode


if __name__ == "__main__":
    main()
