"""From words to a recommendation: finds the model's sizes, the device and the losses that `hardware` reckons with.

Stands above the rooms, like the command line: it joins models, sweep and hardware.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from jquant.core.errors import InputError
from jquant.core.scheme import scheme
from jquant.hardware.devices import Device, find_device
from jquant.hardware.expected_loss import CAVEAT, PRIOR, ExpectedLoss
from jquant.hardware.local import LocalDevice, local_device, measurable_formats, measured_device
from jquant.hardware.measure import Measured, measure
from jquant.hardware.model_shape import ModelShape
from jquant.hardware.recommend import CANDIDATES, FLOAT, Candidate, Constraints, Recommendation, recommend
from jquant.hardware.recommend_config import RecommendConfig
from jquant.hardware.roofline import Load
from jquant.io import native
from jquant.io.json_file import read_json
from jquant.io.locate import DEMO, HUB_ID, locate_model
from jquant.models.checkpoint import open_checkpoint
from jquant.models.families import config_from_hf
from jquant.models.published import PUBLISHED, find_published, nearest_published
from jquant.models.shape import model_shape
from jquant.sweep.results import Cell
from jquant.sweep.store import CELLS, FORMAT, MANIFEST, VERSION

PROMPTS_AT_ONCE = 8192  # tokens of prompts in one pass, as servers feed them (vLLM, max_num_batched_tokens)
_BY = re.compile(r"\s+by\s+")


@dataclass(frozen=True, kw_only=True)
class Described:
    """A model's sizes, and where its weights are, if anywhere."""

    shape: ModelShape
    path: Path | None = None  # of weights


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """What a folder of results says."""

    path: Path
    model: dict[str, str] = field(repr=False)
    text: str
    reference: Cell
    cells: tuple[Cell, ...]


def recommend_for(config: RecommendConfig) -> Recommendation:
    """The recommendation that was asked for.

    Raises:
        InputError: model, device, scheme or results folder is unknown or wrong, or the results are of another model.
    """
    described = describe_model(config.model, family=config.family)
    candidates, losses, caveats, unmeasured = _losses(config, described)
    device = _local() if config.device is None else find_device(config.device)
    asked = Constraints(
        shape=described.shape,
        device=device,
        devices=config.devices,
        load=Load(batch=config.batch, prompt=config.prompt, output=config.output, chunk=PROMPTS_AT_ONCE),
        max_loss_percent=config.max_loss,
        first=config.first,
        cache=None if config.cache is None else scheme(config.cache),
        memory_gb=config.memory,
    )
    return recommend(asked, losses, candidates=candidates, caveats=caveats, unmeasured=unmeasured)


def describe_model(model: str, *, family: str = "llama-3") -> Described:
    """The sizes of MODEL; of a checkpoint only configs and headers are read, of a hub id config.json alone.

    Raises:
        InputError: it is nothing that is known; the message has names that are like it.
    """
    path = _path(model)
    if path is not None and path.is_file() and path.suffix == ".json":
        return Described(shape=_from_hf_config(path, model))
    if path is not None and path.is_dir() and not native.is_native(path) and (path / "config.json").exists():
        return Described(shape=_from_hf_config(path / "config.json", model), path=path)
    if path is not None:
        checkpoint = open_checkpoint(model)
        return Described(shape=model_shape(checkpoint.config, name=model, source=f"{path.name}'s header"), path=path)
    published = find_published(model, family=family)
    if published is not None:
        return Described(shape=model_shape(published.config, name=published.name, source=published.source))
    if HUB_ID.fullmatch(model):
        return Described(shape=_from_hub(model))
    near = nearest_published(model)
    hint = f"; did you mean {' or '.join(near)}?" if near else "."
    raise InputError(
        f"model {model[:200]!r} is no file or folder, no hub id owner/name, no size as 70B and no published model "
        f"known by name{hint} Known are {', '.join(PUBLISHED)}"
    )


def measure_local(*, side: int | None = None, copied_bytes: int | None = None) -> tuple[LocalDevice, Measured]:
    """The local device, and what it reaches."""
    local = local_device()
    small = local.platform == "cpu"
    measured = measure(
        measurable_formats(local),
        side=side or (1024 if small else 8192),
        copied_bytes=copied_bytes or (1 << 28 if small else 1 << 31),
    )
    return local, measured


def read_sweep(path: Path) -> Sweep:
    """Every finished cell in the folder of a sweep.

    Raises:
        InputError: it is no sweep, its float reference or all else is missing, or a cell's perplexity is no loss: NaN,
            zero or negative.
    """
    manifest = path / MANIFEST
    if not manifest.exists():
        raise InputError(f"{path}: is no folder of a sweep: there is no {MANIFEST}; make one with jquant sweep --out")
    record = read_json(manifest)
    definition = record.get("definition")
    if record.get("format") != FORMAT or record.get("version") != VERSION or not isinstance(definition, dict):
        raise InputError(f"{manifest}: is not a sweep of this version; sweep the model again")
    cells = [_cell(file) for file in sorted((path / CELLS).glob("*.json"))]
    references = [cell for cell in cells if cell.scheme == FLOAT]
    others = tuple(cell for cell in cells if cell.scheme != FLOAT)
    if not references or not others:
        missing = "the float reference" if not references else "a scheme"
        raise InputError(f"{path}: {missing} has not been measured yet; let the sweep finish")
    model, text = definition.get("model"), definition.get("text")
    if not isinstance(model, dict) or not isinstance(text, dict):
        raise InputError(f"{manifest}: does not say which model and text it is of; sweep the model again")
    return Sweep(path=path, model=model, text=str(text.get("name")), reference=references[0], cells=others)


def check_same_model(sweep: Sweep, described: Described) -> None:
    """Raises InputError where the results are of another model than the one that is asked about."""
    theirs = sweep.model.get("name", "?")
    if described.path is not None:
        ours = open_checkpoint(described.path if described.shape.name != DEMO else DEMO).sha256()
        if ours != sweep.model.get("sha256"):
            raise InputError(
                f"{sweep.path}: is a sweep of another model: {theirs}, sha256 {str(sweep.model.get('sha256'))[:12]}…; "
                f"{described.shape.name} has {ours[:12]}…. Sweep it: jquant sweep {described.shape.name} --schemes …"
            )
        return
    words = re.findall(r"[a-z]+|\d+(?:\.\d+)?", described.shape.name.lower())
    found = re.findall(r"[a-z]+|\d+(?:\.\d+)?", str(theirs).lower())
    if not set(words) <= set(found):
        raise InputError(
            f"{sweep.path}: is a sweep of {theirs}, and {described.shape.name} is asked about: losses of one model say "
            "little about another's; give the model that was swept, or leave --results out"
        )


def _losses(
    config: RecommendConfig, described: Described
) -> tuple[Sequence[Candidate], dict[tuple[str, str], ExpectedLoss], tuple[str, ...], str]:
    """Candidates, what they lose, what to know about that, and what to do about one whose loss is not known."""
    asked = tuple(_candidate(words) for words in config.schemes)
    if config.results is None:
        unmeasured = (
            "Where a loss is not known: jquant sweep MODEL --schemes S --methods M --out DIR, then --results DIR."
        )
        return asked or CANDIDATES, dict(PRIOR), (CAVEAT,), unmeasured
    sweep = read_sweep(config.results)
    check_same_model(sweep, described)
    reference = sweep.reference.perplexity
    said = f"measured in {sweep.path}: perplexity on {sweep.text}, {sweep.reference.tokens_scored:,} tokens"
    losses = {
        (cell.scheme, cell.method): ExpectedLoss(percent=100 * (cell.perplexity / reference - 1), source=said)
        for cell in sweep.cells
    }
    measured = tuple(Candidate(cell.scheme, cell.method) for cell in sweep.cells)
    known = {candidate.key for candidate in measured}
    candidates = asked or (*(each for each in CANDIDATES if each.key not in known), *measured)
    caveat = (
        f"Losses are those of {sweep.path}; one standard error of its float perplexity is {_relative(sweep):.2g} %."
    )
    return candidates, losses, (caveat,), f"Losses that are not known: sweep those schemes into {sweep.path}, too."


def _relative(sweep: Sweep) -> float:
    return 100 * sweep.reference.stderr


def _candidate(words: str) -> Candidate:
    spec, *method = _BY.split(words.strip())
    candidate = Candidate(spec, method[0] if method else ("none" if spec == FLOAT else "rtn"))
    _ = candidate.weights, candidate.inputs  # parsed here, so that a mistake is told before anything is measured
    return candidate


def _cell(file: Path) -> Cell:
    try:
        cell = Cell.from_json(read_json(file))
    except TypeError as error:
        raise InputError(f"{file}: is no cell of this version ({error}); delete it and sweep again") from error
    if not (isinstance(cell.perplexity, int | float) and cell.perplexity > 0) or math.isnan(cell.perplexity):
        raise InputError(
            f"{file}: perplexity {cell.perplexity} of {cell.scheme} is no measurement; delete it and sweep again"
        )
    return cell


def _local() -> Device:
    local, measured = measure_local()
    return measured_device(local, measured)


def _path(model: str) -> Path | None:
    """Where MODEL lies on this machine; None where it does not."""
    if model == DEMO:
        return locate_model(DEMO)
    try:
        path = Path(model).expanduser()
        return path if model and path.exists() else None
    except (OSError, ValueError, RuntimeError):
        return None


def _from_hf_config(file: Path, name: str) -> ModelShape:
    return model_shape(config_from_hf(read_json(file), str(file)), name=name, source=file.name)


def _from_hub(model: str) -> ModelShape:
    """From the config of a hub's repository; weights are not downloaded."""
    import huggingface_hub

    match = HUB_ID.fullmatch(model)
    assert match is not None
    try:
        file = huggingface_hub.hf_hub_download(match["repo"], "config.json", revision=match["revision"])
    except Exception as error:  # whatever HTTP client the installed version uses raises its own
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"model {model!r}: its config.json cannot be had from the Hub: {reason}") from error
    return _from_hf_config(Path(file), model)
