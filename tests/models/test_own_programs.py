"""Programs that are loaded for each place: the same function, each an executable of its own."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

from jquant.models import own_programs
from jquant.models import split as splitting
from jquant.models.generate import generate
from jquant.models.generate_batch import generate_batch
from tests.tiny_checkpoint import tiny_model


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As on a GPU; without kept programs, which a CPU cannot load a second time."""
    monkeypatch.setattr(own_programs, "are_recorded", lambda: True)
    enabled = jax.config.values["jax_enable_compilation_cache"]
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()
    own_programs._loaded.clear()
    yield
    own_programs._loaded.clear()
    jax.config.update("jax_enable_compilation_cache", enabled)
    compilation_cache.reset_cache()


def _function() -> Any:
    @partial(jax.jit, static_argnums=(1,), donate_argnums=2)
    def scaled(x: jax.Array, factor: int, sums: list[jax.Array]) -> tuple[jax.Array, list[jax.Array]]:
        return factor * x, [each + x for each in sums]

    return scaled


@pytest.mark.usefixtures("recorded")
def test_each_place_has_a_program_and_they_compute_the_same() -> None:
    function, sums = _function(), [[jnp.zeros(3)] for _ in range(3)]
    call = own_programs.own_programs(function, static=(1,))
    for turn in range(2):
        x = jnp.arange(3.0) + turn
        for place in range(3):
            y, sums[place] = call(place, x, 2, sums[place])
            np.testing.assert_array_equal(np.asarray(y), 2 * np.asarray(x))
    for (each,) in sums:
        np.testing.assert_array_equal(np.asarray(each), [1, 3, 5])
    first = function.lower(jnp.zeros(3), 2, [jnp.zeros(3)]).compile()
    ((executable, copies),) = own_programs._loaded.items()
    assert executable is first.runtime_executable()
    assert len({id(executable), *(id(copy.runtime_executable()) for copy in copies)}) == 3


@pytest.mark.usefixtures("recorded")
def test_copies_serve_the_next_caller_too_and_not_another_program() -> None:
    function = _function()
    for factor, count in ((2, 2), (2, 3), (5, 1)):
        call = own_programs.own_programs(function, static=(1,))
        for place in range(count):
            y, _ = call(place, jnp.ones(3), factor, [jnp.zeros(3)])
            assert float(y[0]) == factor
    assert [len(copies) for copies in own_programs._loaded.values()] == [2]


@pytest.mark.usefixtures("recorded")
def test_copies_of_few_programs_are_kept() -> None:
    function = _function()
    for factor in range(own_programs._MOST + 3):
        call = own_programs.own_programs(function, static=(1,))
        for place in range(2):
            call(place, jnp.ones(3), factor, [jnp.zeros(3)])
    assert len(own_programs._loaded) == own_programs._MOST


def test_elsewhere_the_function_is_called_as_it_is() -> None:
    call = own_programs.own_programs(_function(), static=(1,))
    y, _ = call(7, jnp.ones(3), 4, [jnp.zeros(3)])
    assert float(y[0]) == 4
    assert not own_programs._loaded


@pytest.mark.usefixtures("recorded")
def test_generation_by_them_gives_the_same_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two runs of two blocks, whose weights and caches differ; once more, by the copies of the first time."""
    prompts = [[1, 2, 3], [4, 5], [6]]

    def found() -> list[list[int]]:
        model = tiny_model(layers=4)
        rows = generate_batch(model, prompts, max_tokens=6, stop=lambda *_: False, rows=3)
        return [*rows, list(generate(model, np.arange(5), max_tokens=6))]

    monkeypatch.setattr(splitting, "longest_runs", lambda: (1, 2))
    by_copies = [found(), found()]
    assert [len(copies) for copies in own_programs._loaded.values()] == [1, 1]
    monkeypatch.setattr(own_programs, "are_recorded", lambda: False)
    assert by_copies == [found()] * 2


@pytest.mark.usefixtures("recorded")
def test_a_program_that_cannot_be_written_out_is_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: object) -> None:
        raise NotImplementedError("as of some experts' sort on a CPU")

    monkeypatch.setattr(own_programs.serialize_executable, "serialize", refuse)
    call = own_programs.own_programs(_function(), static=(1,))
    first, _ = call(0, jnp.ones(3), 7, [jnp.zeros(3)])
    with pytest.warns(UserWarning, match="share a program, which is slower: as of some experts"):
        y, (total,) = call(1, jnp.ones(3), 7, [jnp.ones(3)])
    assert (float(first[0]), float(y[0]), float(total[0])) == (7, 7, 2)
    assert [len(copies) for copies in own_programs._loaded.values()] == [0]


def test_runs_are_equal_where_they_can_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(splitting, "longest_runs", lambda: (4, 8))
    expected = {
        1: [[1], [1]],
        6: [[3, 3], [6]],
        11: [[3, 4, 4], [5, 6]],
        16: [[4] * 4, [8, 8]],
        30: [[3] * 10, [6] * 5],
    }
    for blocks, lengths in expected.items():
        parts = splitting.split(tiny_model(layers=blocks))
        assert [[len(run.leaves) for run in runs] for runs in (parts.prompt_runs, parts.token_runs)] == lengths, blocks
