"""The coverage report as a terminal shows it."""

from __future__ import annotations

import dataclasses

import pytest
from rich.console import Console

from jquant.ptq.coverage import Coverage, LayerReport, render

LAYER = LayerReport(
    path="blocks.29.mlp.down_proj",
    method="gptq",
    scheme="int4:g128:asym",
    activation=None,
    transforms=("awq",),
    shape=(576, 1536),
    bits_per_weight=4.3125,
    on_data=True,
    rounding_error=6.52e-03,
    error=1.22e-13,
    damping=0.123457,
    fallback=False,
    seconds=1234.56,
)


def _shown(width: int, *layers: LayerReport) -> str:
    console = Console(width=width)
    with console.capture() as capture:
        console.print(render(Coverage(layers=layers, transforms=(), left_alone=(), seconds=0.0)))
    return capture.get()


@pytest.mark.parametrize("width", [80, 120])
def test_no_figure_is_cut(width: int) -> None:
    long = dataclasses.replace(LAYER, path="encoder.layers.10.experts.gate_projection_of_a_long_name")
    lines = _shown(width, LAYER, long).splitlines()
    assert max(map(len, lines)) <= width
    figures = ["4.31", "6.52e-03", "1.22e-13", "0.00", "0.123457", "1234.56"]
    assert lines[2].split() == [LAYER.path, *figures]
    assert lines[3].split()[-6:] == figures
    assert long.path == "".join(line.split()[0] for line in lines[3:])


def test_even_where_nothing_fits() -> None:
    text = "".join(_shown(40, LAYER).split())
    for part in ("6.52", "e-03", "1.22", "e-13", "0.12", "3457"):
        assert part in text
    assert "…" not in text


def test_the_summary_names_transforms_and_inputs_too() -> None:
    other = dataclasses.replace(LAYER, method="rtn", transforms=(), scheme="int8:channel", activation="int8:token")
    coverage = Coverage(layers=(LAYER, other, LAYER), transforms=(), left_alone=("head.lm_head",), seconds=1.0)
    assert coverage.summary() == (
        "3 layers: 2 by awq+gptq to int4:g128:asym, 1 by rtn to int8:channel with inputs in int8:token; 1 left alone"
    )


def test_layers_of_one_kind_stand_together() -> None:
    other = dataclasses.replace(
        LAYER, path="head.lm_head", method="rtn", transforms=(), scheme="int8:channel", activation="int8:token"
    )
    failed = dataclasses.replace(LAYER, path="blocks.0.attn.v_proj", fallback=True, on_data=False)
    lines = _shown(120, LAYER, other, failed, dataclasses.replace(LAYER, path="blocks.3.attn.q_proj")).splitlines()
    assert [line.split("  ")[0].strip() for line in lines] == [
        "2 by awq+gptq to int4:g128:asym; errors of the outputs",
        "layer",
        "blocks.29.mlp.down_proj",
        "blocks.3.attn.q_proj",
        "",
        "1 by rtn to int8:channel with inputs in int8:token; errors of the outputs",
        "layer",
        "head.lm_head",
        "",
        "1 by awq+gptq to int4:g128:asym; errors of the weights; FELL BACK to rounding",
        "layer",
        "blocks.0.attn.v_proj",
    ]
    assert len({len(line.rstrip()) for line in lines if line.startswith(("blocks", "head"))}) == 1
