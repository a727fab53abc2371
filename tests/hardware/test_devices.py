"""The table of devices: complete, sourced, of plausible figures; names are found, and the near ones offered."""

from __future__ import annotations

import json
import re
from pathlib import Path

import jax
import pytest
from rich.console import Console

from jquant.cli import main
from jquant.core.errors import InputError
from jquant.hardware import local as local_module
from jquant.hardware.devices import DEVICES, RATE_NAMES, Device, Figure, device_of_kind, find_device, render
from jquant.hardware.local import LocalDevice, local_device, measurable_formats, measured_device
from jquant.hardware.measure import MEASURABLE, Measured, measure

ROWS = list(DEVICES.values())


def figures(device: Device) -> dict[str, Figure | None]:
    return {
        "memory": device.memory_gb,
        "bandwidth": device.bandwidth_gb_s,
        "link": device.link_gb_s,
        **device.rates,
    }


def test_every_family_of_the_issue_is_there() -> None:
    asked = """h100-sxm h100-pcie h200 b200 gb200 a100-40gb a100-80gb a10 l4 l40s rtx-3090 rtx-4090 rtx-5090 mi250x
        mi300x mi325x mi355x gaudi2 gaudi3 m2-ultra m4-max xeon-8480 xeon-8380 epyc-9654 graviton4 tpu-v4 tpu-v5e
        tpu-v5p tpu-v6e"""
    assert set(asked.split()) == set(DEVICES)


@pytest.mark.parametrize("device", ROWS, ids=lambda device: device.name)
def test_a_row_is_plausible_and_sourced(device: Device) -> None:
    for name, figure in figures(device).items():
        if figure is not None:
            assert figure.value > 0, name
            assert len(figure.source.title) > 10, name
            assert re.search(r"20\d\d", figure.source.date), name
    assert set(device.rates) <= set(RATE_NAMES)
    assert "fp32" in device.rates  # float32 runs everywhere
    assert device.bandwidth_gb_s is not None
    known = {name: figure.value for name, figure in device.rates.items() if figure is not None}
    for narrow, wide in (("bf16", "fp32"), ("int8", "bf16"), ("int4", "int8"), ("mxfp4", "mxfp8"), ("fp8", "bf16")):
        if narrow in known and wide in known:
            assert known[narrow] >= known[wide], (narrow, wide)  # else nobody would build it
            assert known[narrow] <= 40 * known[wide], (narrow, wide)
    # Below some hundred operations a byte nothing would be gained by more units, above a few thousand by any.
    if device.rate("bf16") is not None and device.kind != "cpu":
        assert 50 < (device.rate("bf16") or 0) / (1e9 * device.bandwidth_gb_s.value) < 700


def test_what_the_guide_got_wrong_is_right_here() -> None:
    assert not find_device("h100-sxm").native("int4")
    assert find_device("a100-80gb").native("int4")
    assert not find_device("a100-80gb").native("fp8")
    for name in ("mi300x", "mi325x"):
        assert find_device(name).native("fp8fnuz")
        assert not find_device(name).native("fp8")
    assert find_device("mi355x").native("fp8")
    assert not find_device("mi355x").native("nvfp4")
    assert find_device("b200").native("nvfp4")


@pytest.mark.parametrize(
    ("name", "known"), [("H100-SXM", "h100-sxm"), ("rtx 4090", "rtx-4090"), (" tpu_v5e ", "tpu-v5e"), ("A10", "a10")]
)
def test_names_are_found_in_any_spelling(name: str, known: str) -> None:
    assert find_device(name).name == known


@pytest.mark.parametrize(
    ("name", "near"),
    [("h100", "h100-sxm or h100-pcie"), ("rtx-4080", "rtx-4090"), ("mi300", "mi300x"), ("m4-mxa", "m4-max")],
)
def test_an_unknown_name_gets_the_nearest_and_all(name: str, near: str) -> None:
    with pytest.raises(InputError, match=f"is unknown; did you mean .*{near}.*known are h100-sxm, .*tpu-v6e"):
        find_device(name)


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "h100-sxm"),
        ("NVIDIA H100 PCIe", "h100-pcie"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA A100-SXM4-40GB", "a100-40gb"),
        ("NVIDIA A100-SXM4-80GB", "a100-80gb"),
        ("NVIDIA A10", "a10"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA L4", "l4"),
        ("NVIDIA GeForce RTX 4090", "rtx-4090"),
        ("AMD Instinct MI300X", "mi300x"),
        ("AMD Instinct MI300X VF", "mi300x"),
        ("AMD Instinct MI300X OAM", "mi300x"),
        ("TPU v4", "tpu-v4"),
        ("TPU v5", "tpu-v5p"),
        ("TPU v5 lite", "tpu-v5e"),
        ("TPU v5p", "tpu-v5p"),
        ("TPU v6 lite", "tpu-v6e"),
        ("Apple M4 Max", "m4-max"),
    ],
)
def test_what_jax_calls_a_device_finds_its_row(kind: str, name: str) -> None:
    found = device_of_kind(kind)
    assert found is not None
    assert found.name == name


@pytest.mark.parametrize(
    "kind",
    [
        "cpu",
        "NVIDIA GeForce GTX 1080",
        "NVIDIA A100-PCIE-40GB",
        "NVIDIA A100-SXM4-40GB MIG 1g.5gb",
        "NVIDIA A10G",
        "NVIDIA L40",
        "NVIDIA H100 NVL",
        "NVIDIA GeForce RTX 3090 Ti",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "TPU v4 lite",
    ],
)
def test_a_device_that_is_not_in_the_table_is_not_taken_for_one_whose_name_begins_alike(kind: str) -> None:
    assert device_of_kind(kind) is None


def test_rendering_says_what_is_not_known() -> None:
    console = Console(width=160)
    with console.capture() as captured:
        console.print(render([find_device("m4-max")]))
    text = captured.get()
    assert "bf16                  no figure found with a source" in text
    assert "bandwidth             546 GB/s" in text
    assert "Not native, decoded first: fp8, fp8fnuz, int8" in text


def test_json_has_source_and_date_of_each_figure() -> None:
    record = json.loads(json.dumps(find_device("h100-sxm").as_json()))
    assert record["rates_tera"]["fp8"] == {
        "value": 1978.9,
        "source": "NVIDIA H100 Tensor Core GPU Architecture, table 3",
        "date": "2022",
    }
    assert find_device("l4").as_json()["rates_tera"]["int4"] is None


def test_measuring_on_this_device() -> None:
    found = measure(("fp32", "bf16", "int8"), copied_bytes=1 << 20, side=64, seconds=0.01)
    assert set(found.tera_rates) == {"fp32", "bf16", "int8"}
    assert 0.01 < found.bandwidth_gb_s < 1e5
    assert all(1e-6 < rate < 1e4 for rate in found.tera_rates.values())


def test_larger_products_take_longer_and_rates_stay_of_one_order() -> None:
    rates = [
        measure(("fp32",), copied_bytes=1 << 16, side=side, seconds=0.02).tera_rates["fp32"] for side in (128, 512)
    ]
    assert max(rates) < 100 * min(rates)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"formats": ("int3",)}, "format 'int3'.*fp32, bf16"),
        ({"side": 0}, "side 0"),
        ({"copied_bytes": 3}, "copied_bytes 3"),
    ],
)
def test_bad_measurements(given: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        measure(**given)


def test_the_local_device(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found = local_device()
    assert found.platform == jax.devices()[0].platform
    assert found.memory_bytes is None or found.memory_bytes > 1e8
    assert set(measurable_formats(found)) <= set(MEASURABLE)
    if found.platform != "cpu":
        return
    monkeypatch.setattr(local_module.platform, "system", lambda: "Linux")
    info = tmp_path / "cpuinfo"
    monkeypatch.setattr(local_module, "_CPUINFO", info)
    for flags, native in (
        ("fpu avx2", ("fp32",)),
        ("avx512_vnni avx512_bf16", ("fp32", "bf16", "int8")),
        ("", ("fp32",)),
    ):
        info.write_text(f"processor : 0\nmodel name : Some CPU\nflags : {flags}\n")
        assert local_device().native == native
        assert local_device().description.startswith("Some CPU")


def test_a_container_has_what_its_limit_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    limit = tmp_path / "memory.max"
    limit.write_text("123456789\n")
    monkeypatch.setattr(local_module, "_CGROUP_LIMITS", (limit, tmp_path / "missing"))
    assert local_module._system_memory() == 123456789
    limit.write_text("max\n")
    assert (local_module._system_memory() or 0) > 123456789


def test_what_is_measured_no_faster_than_floats_is_not_native() -> None:
    local = LocalDevice(platform="cpu", description="CPU", count=1, memory_bytes=8e9, native=(), known=None)
    rates = {"fp32": 1.0, "bf16": 3.0, "int8": 2.0}
    device = measured_device(local, Measured(bandwidth_gb_s=20.0, copied_bytes=1, tera_rates=rates, side=1))
    assert set(device.rates) == {"fp32", "bf16"}
    assert device.float_format == "bf16"
    assert (device.kind, device.rate("bf16")) == ("cpu", 3e12)
    assert device.memory_gb is not None
    assert device.memory_gb.value == 8


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["hardware"]) == 0
    said = capsys.readouterr().out
    assert all(name in said for name in DEVICES)
    assert "Here: " in said
    assert main(["hardware", "l4", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["name"] == "l4"
    assert main(["hardware", "--measure", "--side", "64", "--copy-mb", "1"]) == 0
    assert "measured here: copy of 1 MB" in " ".join(capsys.readouterr().out.split())
    assert main(["hardware", "gtx-1080"]) == 2
    assert "known are h100-sxm" in capsys.readouterr().err
