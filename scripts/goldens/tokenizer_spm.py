"""Records tests/goldens/tokenizer_spm.json: ids of SentencePiece's BPE, by SentencePiece itself.

Oracle: the `sentencepiece` module. Three tiny models are trained here on the sentences below, one like Llama 2's, one
like Gemma's and one without byte tokens; their pieces, scores and kinds go into the golden as a GGUF holds them. Of
Gemma 3 only the ids go there: its model is made of what gguf-py reads from a GGUF, and of nothing else. SentencePiece
finds no control token in a text; here a text is cut at them, and each part encoded as a text of its own.

Run with a Python that has `sentencepiece`, `protobuf`, `gguf` and `regex`:
`python scripts/goldens/tokenizer_spm.py GEMMA.gguf [TEXT ...]`. For each TEXT (plain or .gz) it prints the number of
Gemma's tokens, BOS among them, and the hash of their ids.
"""
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false

from __future__ import annotations

import argparse
import gzip
import hashlib
import importlib.metadata
import io
import json
import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece
from gguf import GGUFReader
from sentencepiece import sentencepiece_model_pb2
from tokenizer import SAMPLES  # scripts/goldens/tokenizer.py

TARGET = Path(__file__).parents[2] / "tests" / "goldens" / "tokenizer_spm.json"

SENTENCES = (
    "The quick brown fox jumps over the lazy dog, and the dog does not mind at all.",
    "A tokenizer turns text into numbers; the numbers are turned into text again.",
    "There were 12 of them in 2023 and 345 of them in 2024: the rest is not known.",
    "Der Zug nach München fährt um 7:45 Uhr; die Straße ist gesperrt, und es wird spät.",
    "Le café est fermé à midi, mais la boulangerie d'à côté reste ouverte jusqu'au soir.",
    "Привет, мир! Сегодня хорошая погода, и мы идём гулять в парк.",
    "今天天气很好，我们去公园散步。今天我们去公园。",
    "def main(x):    return x ** 2  # a comment ----- and ===== rules ======",
    "aaaa aaa aa a bababab abab aba cccccccc ........ ........ !!!! !!",
    "नमस्ते दुनिया नमस्ते",
)
TEXTS = (
    *SAMPLES,
    "the dog and the fox in 2024",
    "▁ a literal ▁sign▁ of the space",
    "tail of spaces   ",
    "a\0b\x7f",
    "\ufeffbom \ufffd replacement",
    "<0x41> is no byte token here <unk>",
    "<s>[INST] hi [/INST] hello</s> <|tool|>x<bos>y<start_of_turn>\nz<end_of_turn>",
    "ababababababab aaaaaaaaaaaaaaa ...........  ....  =====-----",
)

COMMON = {
    "model_type": "bpe",
    "normalization_rule_name": "identity",
    "remove_extra_whitespaces": False,
    "split_digits": True,
    "character_coverage": 0.995,
    "num_threads": 1,
    "minloglevel": 2,
}
LLAMA = {"vocab_size": 600, "byte_fallback": True, "control_symbols": ["<|tool|>", "[INST]"]}
GEMMA = {
    "vocab_size": 620,
    "byte_fallback": True,
    "add_dummy_prefix": False,
    "pad_id": 0,
    "eos_id": 1,
    "bos_id": 2,
    "unk_id": 3,
    "bos_piece": "<bos>",
    "eos_piece": "<eos>",
    "control_symbols": ["<start_of_turn>"],
    "user_defined_symbols": [*("\n" * n for n in (1, 2, 3)), *("▁" * n for n in (2, 3, 4, 7)), "<table>", "<tabl"],
}
PLAIN = {"vocab_size": 330, "byte_fallback": False}
MODELS = {"llama": LLAMA, "gemma": GEMMA, "plain": PLAIN}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("gemma", type=Path)
    parser.add_argument("texts", type=Path, nargs="*")
    arguments = parser.parse_args()
    gemma = Encoder(gemma_processor(arguments.gemma))
    golden = {
        "origin": {
            "oracle": "sentencepiece",
            "sentencepiece": importlib.metadata.version("sentencepiece"),
            "gguf": importlib.metadata.version("gguf"),
            "config": {"gemma3": arguments.gemma.name, "common": COMMON, "models": MODELS},
        },
        "texts": [*TEXTS, *random_texts()],
        "models": {name: recorded(options) for name, options in MODELS.items()},
        "gemma3_ids": [gemma(text) for text in [*TEXTS, *random_texts()]],
    }
    TARGET.write_text(json.dumps(golden, ensure_ascii=True, indent=None, separators=(",", ":")) + "\n")
    print(f"{TARGET}: {TARGET.stat().st_size:,} bytes")
    for path in arguments.texts:
        raw = path.read_bytes()
        text = (gzip.decompress(raw) if path.suffix == ".gz" else raw).decode("utf-8")
        ids = np.array([gemma.processor.bos_id(), *gemma(text)], "<i4")
        print(f"{path}: {len(ids):,} tokens, sha256 of int32 ids {hashlib.sha256(ids.tobytes()).hexdigest()}")


def random_texts() -> list[str]:
    """Texts of few different characters, where many merges compete."""
    chance = random.Random(0)
    alphabets = ("ab", "abc ", "aet h", " .", "-= ", "the dog\n", "<table> \n", "今天我们 x", "0123 45", "▁ a☺")
    return ["".join(chance.choices(letters, k=chance.randint(5, 40))) for letters in alphabets for _ in range(6)]


class Encoder:
    """Text to ids, control and unknown tokens found in it."""

    def __init__(self, processor: Any) -> None:
        self.processor = processor
        numbers = range(processor.get_piece_size())
        special = [number for number in numbers if processor.is_control(number) or processor.is_unknown(number)]
        self.special = {processor.id_to_piece(number): number for number in special}
        longest_first = sorted(self.special, key=len, reverse=True)
        self.pattern = re.compile(f"({'|'.join(map(re.escape, longest_first))})")

    def __call__(self, text: str) -> list[int]:
        ids: list[int] = []
        for part in self.pattern.split(text):
            ids += [self.special[part]] if part in self.special else self.processor.encode(part)
        return ids


def recorded(options: dict[str, Any]) -> dict[str, Any]:
    """Trains a model: its vocabulary as a GGUF has it, the ids of all texts, and the texts of those ids."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES * 4), model_writer=model, **COMMON, **options
    )
    proto = sentencepiece_model_pb2.ModelProto.FromString(model.getvalue())
    processor = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    ids = list(map(Encoder(processor), [*TEXTS, *random_texts()]))
    return {
        "tokens": [piece.piece for piece in proto.pieces],
        "scores": [piece.score for piece in proto.pieces],
        "token_type": [piece.type for piece in proto.pieces],
        "bos_token_id": processor.bos_id(),
        "eos_token_id": processor.eos_id(),
        "unknown_token_id": processor.unk_id(),
        "add_space_prefix": proto.normalizer_spec.add_dummy_prefix,
        "ids": ids,
        # SentencePiece shows an unknown token as a sign of its own.
        "decoded": [None if processor.unk_id() in line else processor.decode(line) for line in ids],
    }


def gemma_processor(path: Path) -> Any:
    """SentencePiece with the pieces, scores and kinds that a GGUF holds."""
    fields = GGUFReader(path).fields

    def contents(name: str) -> Any:
        return fields[f"tokenizer.ggml.{name}"].contents()

    proto = sentencepiece_model_pb2.ModelProto()
    for token, score, kind in zip(contents("tokens"), contents("scores"), contents("token_type"), strict=True):
        user_defined = kind == sentencepiece_model_pb2.ModelProto.SentencePiece.USER_DEFINED
        # Converters write the spaces of user-defined pieces plainly.
        proto.pieces.add(piece=token.replace(" ", "▁") if user_defined else token, score=score, type=kind)
    proto.pieces[contents("unknown_token_id")].type = sentencepiece_model_pb2.ModelProto.SentencePiece.UNKNOWN
    trainer = proto.trainer_spec
    trainer.model_type = sentencepiece_model_pb2.TrainerSpec.BPE
    trainer.byte_fallback = True
    trainer.unk_id, trainer.bos_id, trainer.eos_id = (
        contents(f"{name}_token_id") for name in ("unknown", "bos", "eos")
    )
    trainer.unk_piece, trainer.bos_piece, trainer.eos_piece = "<unk>", "<bos>", "<eos>"
    proto.normalizer_spec.add_dummy_prefix = contents("add_space_prefix")
    proto.normalizer_spec.remove_extra_whitespaces = False
    proto.normalizer_spec.name = "identity"
    return sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())


if __name__ == "__main__":
    main()
