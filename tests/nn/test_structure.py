"""Equal structures are one object, whatever their arrays are."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from flax import nnx

from jquant.nn.structure import taken_apart


def test_equal_modules_have_one_structure() -> None:
    first, second = (taken_apart(nnx.Linear(3, 4, rngs=nnx.Rngs(seed))) for seed in (0, 1))
    assert first[0] is second[0]
    assert not np.array_equal(first[1][1], second[1][1])
    wide, no_bias = nnx.Linear(3, 5, rngs=nnx.Rngs(0)), nnx.Linear(3, 4, use_bias=False, rngs=nnx.Rngs(0))
    assert len({first[0], taken_apart(wide)[0], taken_apart(no_bias)[0]}) == 3


def test_merged_it_is_the_module_again() -> None:
    module, x = nnx.Linear(3, 4, rngs=nnx.Rngs(0)), jnp.ones((2, 3))
    structure, leaves = taken_apart(module)
    np.testing.assert_array_equal(structure.merge(leaves)(x), module(x))
