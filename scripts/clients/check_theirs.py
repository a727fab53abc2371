"""Reads what `write_theirs.py` wrote, packed, and compares logits; exit code 1 where one is off.

python scripts/clients/check_theirs.py DIR

Differences are the largest over all logits, relative to the largest logit. Inputs in 8 bits round as the last bits of
what comes before them fall, and a code shows in the logits.
"""

from __future__ import annotations

import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from flax import nnx

from jquant.core.qtensor import QTensor
from jquant.models.checkpoint import open_checkpoint
from jquant.models.decoder import Decoder
from jquant.nn.install import tensors_of

TOKENS = jnp.arange(24).reshape(2, 12)
QUANTIZED_INPUTS = {"llm_compressor-w8a8": 5e-2, "llm_compressor-fp8_dynamic": 5e-2}


def main() -> int:
    failed = 0
    found = sorted(path for path in Path(sys.argv[1]).glob("theirs-*") if (path / "logits.npy").exists())
    for path in found:
        name = path.name.removeprefix("theirs-")
        file = path / "model.gguf"
        model = open_checkpoint(file if file.exists() else path).packed().model()
        packed = [tensor for tensor in tensors_of(model).values() if isinstance(tensor, QTensor)]
        theirs, ours = np.load(path / "logits.npy"), _logits(model)
        difference = float(np.abs(theirs - ours).max() / np.abs(theirs).max())
        bar = QUANTIZED_INPUTS.get(name, 1e-4)
        passed = difference <= bar and len(packed) >= 14
        failed += not passed
        schemes = ", ".join(sorted({str(tensor.scheme) for tensor in packed}))
        print(f"{name:32} {difference:.1e}  {len(packed)} packed: {schemes}  {'' if passed else f'above {bar}'}")
    if not found:
        print(f"{sys.argv[1]}: nothing written by another tool is there")
    return 1 if failed or not found else 0


def _logits(model: Decoder) -> np.ndarray:
    return np.asarray(nnx.jit(lambda model, tokens: model(tokens))(model, TOKENS))


if __name__ == "__main__":
    sys.exit(main())
