"""Commands that tell: inspect, formats, hardware, recommend, advise."""

from __future__ import annotations

import dataclasses
import sys

from jquant.commands.options import parsed_scheme
from jquant.commands.terminal import json_text, new_console
from jquant.core.errors import InputError
from jquant.hardware.advise_config import AdviseConfig
from jquant.hardware.catalog_config import FormatsConfig
from jquant.hardware.recommend_config import HardwareConfig, RecommendConfig
from jquant.io.inspect_config import InspectConfig


def inspect_command(config: InspectConfig) -> None:
    from jquant.io.inspect import inspect_file, render
    from jquant.io.locate import locate_model

    inspection = inspect_file(locate_model(config.file))
    if config.json:
        print(json_text(inspection.as_json()))
    else:
        new_console().print(render(inspection))


def formats_command(config: FormatsConfig) -> None:
    from jquant.hardware.catalog import catalog, render

    entries = catalog()
    if config.json:
        print(json_text([entry.as_json() for entry in entries]))
    else:
        new_console().print(render(entries))


def hardware_command(config: HardwareConfig) -> None:
    from jquant.hardware.devices import DEVICES, find_device, render
    from jquant.hardware.local import local_device, measured_device

    if config.measure:
        from jquant.recommendation_run import measure_local

        copied = None if config.copy_mb is None else config.copy_mb * 1_000_000
        local, measured = measure_local(side=config.side, copied_bytes=copied)
        device = measured_device(local, measured)
        if config.json:
            print(json_text({"local": local.as_json(), "measured": dataclasses.asdict(measured)}))
            return
        new_console().print(render([device]))
        rates = ", ".join(f"{name} {rate:.4g}" for name, rate in measured.tera_rates.items())
        print(f"All rates that were measured, in 1e12 operations a second: {rates}")
        return
    devices = list(DEVICES.values()) if config.device is None else [find_device(config.device)]
    if config.json:
        print(json_text([device.as_json() for device in devices]))
        return
    new_console().print(render(devices))
    if config.device is None:
        local = local_device()
        known = "not in the list" if local.known is None else local.known.name
        memory = "" if local.memory_bytes is None else f", {local.memory_bytes / 1e9:.1f} GB"
        said = f"Here: {local.count} × {local.description} ({local.platform}{memory}), {known}; native: "
        print(f"{said}{', '.join(local.native) or 'not known'}. Measure it: jquant hardware --measure")


def recommend_command(config: RecommendConfig) -> None:
    from jquant.hardware.recommendation_table import render
    from jquant.recommendation_run import recommend_for

    found = recommend_for(config)
    if config.json:
        print(json_text(found.as_json()))
    else:
        new_console().print(render(found))


def advise_by_questions() -> None:
    if not sys.stdin.isatty():
        raise InputError(
            "advise without arguments asks questions, and standard input is no terminal; give the answers as options: "
            "jquant recommend llama-3-70b --device h100-sxm, or jquant advise demo --scheme int4:g128 --ptq-loss 3"
        )
    from jquant.advice_run import advise_interactively

    advise_interactively()


def advise_command(config: AdviseConfig) -> None:
    from jquant.hardware.advise_config import count
    from jquant.hardware.qat_decision import Question, decide, device_rate, measured_rate, render

    spec = parsed_scheme(config.scheme)
    if config.tflops is not None:
        rate = measured_rate(config.tflops, memory_gb=config.memory)
    else:
        rate = device_rate(config.device or "h100-sxm", utilization=config.utilization)
    if config.parameters is not None:
        parameters = count(config.parameters, "parameters")
    else:
        from jquant.models.checkpoint import open_checkpoint
        from jquant.nn.install import tensors_of

        abstract = open_checkpoint(config.model or "").abstract()
        parameters = sum(tensor.size for tensor in tensors_of(abstract).values())
    decision = decide(
        Question(
            scheme=spec,
            requirement=config.requirement,
            parameters=parameters,
            tokens=count(config.tokens, "tokens"),
            rate=rate,
            devices=config.devices,
            ptq_loss_percent=config.ptq_loss,
            tolerance_percent=config.tolerance,
            distilled=config.distill,
            budget_hours=config.budget,
        )
    )
    print(json_text(decision.as_json()) if config.json else render(decision))
