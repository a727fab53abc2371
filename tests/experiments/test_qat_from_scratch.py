"""The experiment on a model from nothing runs in small, and goes on from what its folder holds."""

from __future__ import annotations

from pathlib import Path

import pytest

import experiments.qat_from_scratch as experiment
from experiments.qat_from_scratch import Settings, run, table

SMALL = Settings(
    bits=(2,),
    hidden=64,
    feed_forward=64,
    layers=1,
    window=32,
    batch=4,
    float_steps=6,
    qat_steps=3,
    calibration_windows=4,
    windows=4,
)


@pytest.mark.slow
def test_a_second_call_takes_its_figures_from_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = run(tmp_path, SMALL)
    assert first.splitlines()[-1].startswith("int2:g64:asym")
    (tmp_path / "int2-g64-asym-rtn.json").unlink()
    for name in ("by_gptq", "by_qat", "trained_on"):
        monkeypatch.delattr(experiment, name)
    assert run(tmp_path, SMALL) == first


def test_recovered_is_the_share_of_what_rounding_lost() -> None:
    def figures(loss: float) -> dict[str, float]:
        return {"loss": loss, "stderr": 0.01}

    rows = {"float": figures(1.0), "float, on": figures(0.9)}
    for method, loss in (("rtn", 3.0), ("gptq", 2.0), ("qat", 1.1)):
        rows[f"int2:g64:asym {method}"] = figures(loss)
    assert table(rows, SMALL).splitlines()[-1].split()[-4:] == ["50", "%", "95", "%"]
