"""Checkpoint folders: single file and shards alike, and nothing outside the folder is opened."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from jquant.core.errors import InputError
from jquant.io.hf_directory import INDEX, SINGLE, open_hf_directory
from jquant.io.safetensors import write_safetensors

A, B = np.arange(4, dtype=np.float32), np.ones((2, 2), np.float16)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with config.json and, beside it, a weight file that it must not reach."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "llama"}')
    write_safetensors(tmp_path / "outside.safetensors", {"a": A})
    return folder


def shard(folder: Path, **weight_map: str) -> None:
    """Two shards, "1" with a and "2" with b, under an index of the given places."""
    write_safetensors(folder / "1", {"a": A})
    write_safetensors(folder / "2", {"b": B})
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map or {"a": "1", "b": "2"}}))


@pytest.mark.parametrize("shards", [False, True])
def test_one_file_and_shards_read_alike(folder, shards):
    if shards:
        shard(folder)
    else:
        write_safetensors(folder / SINGLE, {"a": A, "b": B})
    (folder / "generation_config.json").write_text('{"eos_token_id": [2]}')
    model = open_hf_directory(folder)
    assert model.config == {"model_type": "llama"}
    assert model.generation_config == {"eos_token_id": [2]}
    assert set(model.tensors) == {"a", "b"}
    assert model.tensors["b"].shape == (2, 2)
    assert len(model.files) == (2 if shards else 1)
    np.testing.assert_array_equal(model.read("a"), A, strict=True)
    np.testing.assert_array_equal(model.read("b"), B, strict=True)
    with pytest.raises(InputError, match="no tensor 'c' among its 2"):
        model.read("c")


def test_without_generation_config(folder):
    write_safetensors(folder / SINGLE, {"a": A})
    assert open_hf_directory(folder).generation_config == {}


@pytest.mark.parametrize("name", ["../outside.safetensors", "x/../../outside.safetensors", "ABSOLUTE", "", ".."])
@pytest.mark.parametrize("windows", [False, True])
def test_an_index_may_not_name_a_file_outside(folder, name, windows):
    name = str(folder.parent / "outside.safetensors") if name == "ABSOLUTE" else name
    if windows:
        name = "C:" + name.replace("/", "\\")
    shard(folder, a=name)
    with pytest.raises(InputError, match=f"{INDEX}: names .* not a plain path inside the folder"):
        open_hf_directory(folder)


@pytest.mark.parametrize("shards", [False, True])
def test_a_link_may_not_lead_outside(folder, shards):
    if shards:
        shard(folder, a="1", b="link")
    (folder / ("link" if shards else SINGLE)).symlink_to(folder.parent / "outside.safetensors")
    with pytest.raises(InputError, match=r"link to .*outside\.safetensors, outside the folder: copy"):
        open_hf_directory(folder)


def test_a_link_within_the_folder_and_a_linked_folder_are_fine(folder):
    write_safetensors(folder / "real", {"a": A})
    (folder / SINGLE).symlink_to("real")
    (folder.parent / "alias").symlink_to(folder)
    np.testing.assert_array_equal(open_hf_directory(folder.parent / "alias").read("a"), A)


def test_the_cache_of_the_hub_may_link_to_its_blobs_and_nothing_else(tmp_path):
    repo = tmp_path / "models--owner--name"
    snapshot = repo / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    write_safetensors(repo / "blobs" / "abcd", {"a": A})
    write_safetensors(repo / "refs" / "abcd", {"a": A})
    (snapshot / "config.json").write_text("{}")
    (snapshot / SINGLE).symlink_to("../../blobs/abcd")
    np.testing.assert_array_equal(open_hf_directory(snapshot).read("a"), A)
    (snapshot / SINGLE).unlink()
    (snapshot / SINGLE).symlink_to("../../refs/abcd")
    with pytest.raises(InputError, match="outside the folder"):
        open_hf_directory(snapshot)


def test_the_cache_of_the_hub_may_link_to_the_blobs_that_repositories_share(tmp_path):
    """A file of the Hub's Xet storage is a link to REPO/blobs/ETAG, itself a link to CACHE/blobs/XX/HASH."""
    snapshot, name = tmp_path / "models--owner--name" / "snapshots" / "0123", "ab" * 32
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    (snapshot.parent.parent / "blobs").mkdir()
    (snapshot.parent.parent / "blobs" / "etag").symlink_to(f"../../blobs/ab/{name}")
    (snapshot / SINGLE).symlink_to("../../blobs/etag")
    write_safetensors(tmp_path / "blobs" / "ab" / name, {"a": A})
    np.testing.assert_array_equal(open_hf_directory(snapshot).read("a"), A)
    write_safetensors(tmp_path / "blobs" / "ab" / "other", {"a": A})
    (snapshot / SINGLE).unlink()
    (snapshot / SINGLE).symlink_to("../../../blobs/ab/other")
    with pytest.raises(InputError, match="outside the folder"):
        open_hf_directory(snapshot)


def _no_map(folder: Path) -> None:
    (folder / INDEX).write_text('{"weight_map": {"a": 1}}')


def _loop(folder: Path) -> None:
    shard(folder, a="loop")
    (folder / "loop").symlink_to("loop")


def _pickle(folder: Path) -> None:
    (folder / "pytorch_model.bin").write_bytes(b"\x80")


def _gguf(folder: Path) -> None:
    (folder / "x.gguf").write_bytes(b"GGUF")


def _other(folder: Path) -> None:
    write_safetensors(folder / "adapter.safetensors", {"a": A})


def _bad_config(folder: Path) -> None:
    (folder / "config.json").write_text("[]")


def _no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


BROKEN = {
    "missing shard": (lambda folder: shard(folder, a="1", b="3"), "names '3', which cannot be found: download"),
    "name too long": (lambda folder: shard(folder, a="x" * 5000), "cannot be found"),
    "null byte": (lambda folder: shard(folder, a="1\0"), "not a plain path"),
    "loop of links": (_loop, "cannot be found"),
    "tensor not in its shard": (lambda folder: shard(folder, a="1", b="1"), "places tensor 'b' in '1', which does not"),
    "tensor not in the index": (lambda folder: shard(folder, b="2", a="2"), "places tensor 'a' in '2'"),
    "unlisted tensor": (
        lambda folder: (shard(folder), write_safetensors(folder / "2", {"b": B, "c": B})),
        "tensor 'c'",
    ),
    "weight_map": (_no_map, "weight_map must map tensor names to file names"),
    "pickles": (_pickle, r"only pickled weights \(pytorch_model.bin\).* save_pretrained"),
    "gguf": (_gguf, "it holds x.gguf: give the path of that file"),
    "other": (_other, "has neither .* adapter.safetensors is not one of them"),
    "nothing": (lambda folder: None, f"has neither {SINGLE} nor {INDEX}"),
    "config": (_bad_config, "config.json: holds a JSON list, expected an object"),
    "no config": (_no_config, "has no config.json"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_is_wrong_is_named(folder, case):
    breaks, message = BROKEN[case]
    breaks(folder)
    with pytest.raises(InputError, match=message) as caught:
        open_hf_directory(folder)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_path_that_is_no_folder(folder):
    with pytest.raises(InputError, match="is no folder"):
        open_hf_directory(folder / "config.json")
