"""README.md of an exported checkpoint: what it is made from, how, and what that cost, as far as it is on record."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import yaml

from jquant import __version__
from jquant.data.overlap import SAID
from jquant.models.checkpoint import Checkpoint


def model_card(checkpoint: Checkpoint, format: str, schemes: Mapping[str, str]) -> str:
    """Markdown. `schemes` are those of the packed tensors, by parameter path."""
    said = checkpoint.provenance
    lines = [
        "---",
        "library_name: transformers",
        f"tags: [jquant, {format}]",
        "---",
        f"# {checkpoint.path.name}",
        "",
        f"Written by jquant {__version__} in the format `{format}`.",
        "",
    ]
    if checkpoint.note:
        lines += [checkpoint.note[0].upper() + checkpoint.note[1:] + ".", ""]
    rows = [("architecture", checkpoint.config.architecture)]
    for scheme, count in Counter(schemes.values()).most_common():
        rows.append((f"`{scheme}`", f"{count} packed tensors"))
    rows += [
        (title, f"`{said[name]}`")
        for name, title in (("source", "made from"), ("source_sha256", "its hash"), ("jquant", "quantized by jquant"))
        if said.get(name)
    ]
    calibration = said.get("calibration")
    if isinstance(calibration, dict):
        rows += [
            (f"calibration {name.replace('_', ' ')}", f"`{calibration[name]}`") for name in SAID if name in calibration
        ]
    evaluation = said.get("evaluation")
    if isinstance(evaluation, dict):
        rows += [(name, str(value)) for name, value in evaluation.items()]
    lines += ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows), ""]
    if said.get("recipe"):
        lines += ["Recipe:", "", "```yaml", yaml.safe_dump(said["recipe"], sort_keys=False).rstrip(), "```", ""]
    return "\n".join(lines)
