"""The command line: reads options and calls the command (jquant/commands/)."""

from __future__ import annotations

import dataclasses
import sys
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import tyro

from jquant import programs
from jquant.commands.consult import (
    advise_by_questions,
    advise_command,
    formats_command,
    hardware_command,
    inspect_command,
    recommend_command,
)
from jquant.commands.evaluate import diagnose_command, eval_command, sweep_command, validate_command
from jquant.commands.generate import generate_command
from jquant.commands.make import export_command, qat_command, quantize_command
from jquant.config_file import read_config_file
from jquant.core.errors import InputError, InputWarning
from jquant.evaluation.config import EvalConfig
from jquant.evaluation.diagnose_config import DiagnoseConfig
from jquant.evaluation.validate_config import ValidateConfig
from jquant.hardware.advise_config import AdviseConfig
from jquant.hardware.catalog_config import FormatsConfig
from jquant.hardware.recommend_config import HardwareConfig, RecommendConfig
from jquant.io.inspect_config import InspectConfig
from jquant.models.export_config import ConvertConfig, ExportConfig
from jquant.models.generate_config import GenerateConfig
from jquant.ptq.config import QuantizeConfig
from jquant.qat.command import QATCommand
from jquant.sweep.config import SweepConfig


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code: 0, 1 for a failed validation, 2 for a mistake of the caller, 130 when
    interrupted."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0] in ("-h", "--help"):
        print(_overview())
        return 0
    if words[0] == "--version":
        from jquant import __version__

        print(f"jquant {__version__}")
        return 0
    with warnings.catch_warnings():
        warnings.showwarning = partial(_show_warning, warnings.showwarning)
        code = _reported(words)
    if "jquant.distributed" in sys.modules:
        sys.modules["jquant.distributed"].leave(code)
    return code


def _reported(words: list[str]) -> int:
    """Runs a command; what goes wrong is told."""
    try:
        if words[0] not in COMMANDS:
            raise InputError(f"unknown command {words[0]!r}; there are {', '.join(COMMANDS)}")
        if words == ["advise"]:
            advise_by_questions()
            return 0
        config_type, run = COMMANDS[words[0]]
        config = _parse(config_type, words[0], words[1:])
        if hasattr(config, "hosts") and config.hosts.asked_for:
            from jquant.distributed import start

            start(config.hosts)
        programs.keep()
        code = run(config)
    except InputError as error:
        if "jquant.distributed" in sys.modules:
            sys.modules["jquant.distributed"].tell(str(error))
        else:
            print(f"jquant: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("jquant: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        sys.stderr.close()
        return 0
    return code or 0


def _show_warning(
    otherwise: Callable[..., None], message: Warning | str, category: type[Warning], *where: Any, **more: Any
) -> None:
    if issubclass(category, InputWarning):
        print(f"jquant: warning: {message}", file=sys.stderr)
    else:
        otherwise(message, category, *where, **more)


def _parse(config_type: type, command: str, words: list[str]) -> Any:
    """The config from `--config FILE`, if given, and from the words, which win."""
    path = None
    for index, word in enumerate(words):
        if word == "--config":
            if index + 1 == len(words):
                raise InputError("--config needs the path of a YAML file")
            path, words = words[index + 1], words[:index] + words[index + 2 :]
            break
        if word.startswith("--config="):
            path, words = word.removeprefix("--config="), words[:index] + words[index + 1 :]
            break
    if path is None:
        return tyro.cli(config_type, prog=f"jquant {command}", args=words)
    values = read_config_file(path, config_type)
    default = config_type(**{**_required(config_type), **values})
    return tyro.cli(config_type, prog=f"jquant {command}", args=words, default=default)


def _required(config_type: type) -> dict[str, Any]:
    return {
        field.name: tyro.MISSING for field in dataclasses.fields(config_type) if field.default is dataclasses.MISSING
    }


def _overview() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {(config.__doc__ or '').splitlines()[0]}" for name, (config, _) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: jquant COMMAND …        (jquant COMMAND --help for its options)",
            "",
            "The quantization lab for JAX.",
            "",
            "commands:",
            *lines,
            "",
            "MODEL is `demo`, the path of a GGUF file or of a checkpoint folder, or a hub id.",
            "Options may also come from a YAML file: jquant COMMAND --config FILE.",
        ]
    )


COMMANDS: dict[str, tuple[type, Callable[[Any], int | None]]] = {
    "eval": (EvalConfig, eval_command),
    "validate": (ValidateConfig, validate_command),
    "diagnose": (DiagnoseConfig, diagnose_command),
    "sweep": (SweepConfig, sweep_command),
    "quantize": (QuantizeConfig, quantize_command),
    "qat": (QATCommand, qat_command),
    "export": (ExportConfig, export_command),
    "convert": (ConvertConfig, export_command),
    "generate": (GenerateConfig, generate_command),
    "inspect": (InspectConfig, inspect_command),
    "formats": (FormatsConfig, formats_command),
    "hardware": (HardwareConfig, hardware_command),
    "recommend": (RecommendConfig, recommend_command),
    "advise": (AdviseConfig, advise_command),
}


if __name__ == "__main__":
    sys.exit(main())
