"""What training converted to is saved and loaded as any packed model: the same logits, to the bit."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jquant import qat
from jquant.models.checkpoint import open_checkpoint
from jquant.models.save import save
from jquant.nn.rounded_input import RoundedInputLinear
from jquant.nn.w8a8 import W8A8Linear
from tests.tiny_checkpoint import byte_tokenizer, tiny_model

TOKENS = jnp.arange(24).reshape(2, 12)


@pytest.mark.parametrize(
    ("recipe", "kind"),
    [
        (qat.one_rule("int8:channel", activation="int8:tensor"), W8A8Linear),
        (qat.one_rule("int4:g32", activation="int8:token"), RoundedInputLinear),
        (
            qat.one_rule("int4:channel:asym", activation="int8:tensor:asym", activation_gradient="lsq"),
            RoundedInputLinear,
        ),
        (qat.one_rule("mxfp4", activation="mxfp8_e4m3", layers=("blocks", "lm_head")), RoundedInputLinear),
    ],
    ids=["static codes", "groups", "learned", "mx"],
)
def test_saved_and_loaded(recipe: qat.Recipe, kind: type[nnx.Module], tmp_path: Path) -> None:
    model = tiny_model()
    report = qat.prepare(model, recipe, announce=lambda _: None)
    if report.uncalibrated:
        qat.calibrate(model, [TOKENS])
    run = nnx.jit(lambda model, tokens: model(tokens))
    run(model, TOKENS)  # static ranges are seen
    qat.set_observing(model, False)
    trained = run(model, TOKENS)
    packed = qat.convert(model)
    assert isinstance(packed.blocks[0].mlp.up_proj, kind)
    save(packed, tmp_path / "packed", tokenizer=byte_tokenizer(), note="trained")
    loaded = open_checkpoint(tmp_path / "packed").model()
    assert isinstance(loaded.blocks[0].mlp.up_proj, kind)
    found = nnx.jit(lambda model, tokens: model(tokens))(loaded, TOKENS)
    assert np.array_equal(found, trained)
    assert jax.tree.structure(nnx.state(loaded)) == jax.tree.structure(nnx.state(packed))
