"""Hugging Face datasets by short name, joined to one text the way published perplexities and calibrations do it."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice
from typing import Any

from jquant.core.errors import InputError


@dataclass(frozen=True, kw_only=True)
class HubDataset:
    """Where a named text lies and how its records become one text."""

    hub_id: str
    config: str | None
    splits: tuple[str, ...]  # the first is the default
    fields: tuple[str, ...]  # a document is these strings of a record, joined like documents
    documents: int | None  # read only the first ones, by streaming; None reads all


# wikitext2 is joined by "\n\n" as in IST-DASLab/gptq (datautils.py), whose protocol published tables follow. That text
# is not the raw file: its records are the file's lines with their line ends, so figures for `wikitext2` and for
# wiki.test.raw differ, and so do the hashes.
DATASETS = {
    "wikitext2": HubDataset(
        hub_id="Salesforce/wikitext",
        config="wikitext-2-raw-v1",
        splits=("test", "validation", "train"),
        fields=("text",),
        documents=None,
    ),
    "c4": HubDataset(
        hub_id="allenai/c4", config="en", splits=("validation", "train"), fields=("text",), documents=2000
    ),
    "pile": HubDataset(hub_id="NeelNanda/pile-10k", config=None, splits=("train",), fields=("text",), documents=2000),
    "openplatypus": HubDataset(
        hub_id="garage-bAInd/Open-Platypus",
        config=None,
        splits=("train",),
        fields=("instruction", "output"),
        documents=None,
    ),
}

OTHER_NAMES = {"wikitext": "wikitext2"}


def read_dataset(name: str, split: str) -> str:
    r"""The documents of a dataset's split, joined by `\n\n`, empty ones included.

    Args:
        name: a key of `DATASETS`.
        split: one of its splits.

    Returns:
        One text.

    Raises:
        InputError: for an unknown split, a missing `datasets` package, or a dataset that cannot be fetched.
    """
    dataset = DATASETS[name]
    if split not in dataset.splits:
        raise InputError(f"text {name!r} has no split {split!r}; its splits are {', '.join(dataset.splits)}")
    try:
        import datasets  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise InputError(
            f"text {name!r} needs the package 'datasets': pip install 'jquant[eval]', or give a file of text"
        ) from error
    try:
        records = datasets.load_dataset(
            dataset.hub_id, dataset.config, split=split, streaming=dataset.documents is not None
        )
        return "\n\n".join(_document(record, dataset) for record in islice(records, dataset.documents))
    except (OSError, ValueError, KeyError) as error:
        said = " ".join(str(error).split())
        raise InputError(
            f"text {name!r}: {dataset.hub_id} could not be read from the Hugging Face hub ({said}); "
            "check the network and HF_HOME, or give a file of text"
        ) from error


def _document(record: Any, dataset: HubDataset) -> str:
    return "\n\n".join(record[field] for field in dataset.fields)
