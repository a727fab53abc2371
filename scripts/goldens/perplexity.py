"""Records tests/goldens/perplexity_NAME.npz: a real model's token ids and losses on the start of WikiText-2 test.

Oracle: transformers, which decodes the GGUF, tokenizes and runs in float32 on torch.

Run with a Python that has torch, transformers, gguf and accelerate:

    ORACLE scripts/goldens/perplexity.py smollm2 SmolLM2-135M-Instruct.Q4_1.gguf wiki.test.raw.gz

The arrays are `ids` [16, 512], the first windows of the whole text's tokens, and `nll` [16], nats (float64) summed over
window[1:] given window[:-1]. `meta` holds versions, the text's hash and its number of tokens by transformers' own
tokenizer (whose conversion of SmolLM2's splits digits otherwise: 2 ids of 303,415, none in these windows).
"""
# pyright: reportMissingImports=false

from __future__ import annotations

import argparse
import gzip
import hashlib
import importlib.metadata
import json
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

FOLDER = Path(__file__).parents[2] / "tests" / "goldens"
WINDOW, WINDOWS = 512, 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name")
    parser.add_argument("gguf", type=Path)
    parser.add_argument("text", type=Path)
    arguments = parser.parse_args()
    raw = gzip.decompress(arguments.text.read_bytes())
    source = {"pretrained_model_name_or_path": arguments.gguf.parent, "gguf_file": arguments.gguf.name}
    every = AutoTokenizer.from_pretrained(**source)(raw.decode())["input_ids"]
    ids = np.asarray(every[: WINDOW * WINDOWS], np.int32).reshape(WINDOWS, WINDOW)
    model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32).eval()
    nll = np.asarray([_nll(model, torch.from_numpy(window).long()) for window in ids])
    meta = {
        "oracle": "transformers",
        "version": importlib.metadata.version("transformers"),
        "torch": torch.__version__,
        "gguf": arguments.gguf.name,
        "text_sha256": hashlib.sha256(raw).hexdigest(),
        "tokens": len(every),
        "perplexity": float(np.exp(nll.sum() / (WINDOWS * (WINDOW - 1)))),
    }
    print(json.dumps(meta, indent=1))
    np.savez_compressed(FOLDER / f"perplexity_{arguments.name}.npz", ids=ids, nll=nll, meta=json.dumps(meta))


@torch.inference_mode()
def _nll(model: torch.nn.Module, window: torch.Tensor) -> float:
    logits = model(window[None], use_cache=False).logits[0, :-1]
    return torch.nn.functional.cross_entropy(logits.double(), window[1:], reduction="sum").item()


if __name__ == "__main__":
    main()
