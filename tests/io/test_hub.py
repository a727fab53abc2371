"""Hub ids against a Hub of our own on 127.0.0.1: what is requested, what is cached, and what a failure says.

Each case asks through HF_ENDPOINT in a fresh process, for huggingface_hub reads its environment when it is imported.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest

GOLDENS = Path(__file__).parents[1] / "goldens"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
OF_THE_HUB = re.compile("HF_|HUGGING|TRANSFORMERS_|.*_proxy$", re.IGNORECASE)  # of the developer's environment
MOST_REQUESTS = 100  # of one case; a client that retries without end fails instead of hanging
LISTED = {  # what `locate_model` wants of a repository, and what it must leave alone
    "config.json": b"{}",
    "tokenizer.json": b'{"tokens": 1}',
    "model.safetensors": bytes(range(256)),
}
UNWANTED = {
    "pytorch_model.bin": b"\x80\x04pickle",
    "model.pt": b"\x80\x04pickle",
    "model.ckpt": b"\x80\x04pickle",
    "modeling_tiny.py": b"raise RuntimeError('remote code')",
    "config.json.py": b"raise RuntimeError('remote code')",
    "README.md": b"",
    "consolidated.safetensors": b"",
    "onnx/config.json": b"{}",
    "original/model.safetensors": b"",
    "../outside.json": b"{}",
    "/etc/outside.json": b"{}",
}


@dataclass(kw_only=True, eq=False)
class FakeHub:
    """What the Hub holds, how it misbehaves, and what it was asked."""

    url: str = ""
    commit: str = COMMIT
    cdn_url: str = ""  # another port, so another host to the client: large files come from there
    files: dict[str, bytes] = field(default_factory=lambda: LISTED | UNWANTED)  # of org/tiny
    xet_hashes: dict[str, str] = field(default_factory=dict)
    on_cdn: set[str] = field(default_factory=lambda: {"model.safetensors"})
    gone: set[str] = field(default_factory=set)  # listed, and not found when asked for
    gated: bool = False
    cut_once: dict[str, int] = field(default_factory=dict)  # the connection ends after so many bytes
    fail_once: set[str] = field(default_factory=set)  # answered by 500
    requests: list[tuple[str, str, str, dict[str, str]]] = field(default_factory=list)  # server, method, path, headers
    lock: threading.Lock = field(default_factory=threading.Lock)

    def paths(self, method: str = "GET", server: str | None = None) -> list[str]:
        """The paths asked for by `method`, in order."""
        return [asked[2] for asked in self.requests if asked[1] == method and server in (None, asked[0])]

    def names(self) -> set[str]:
        """The files asked for, by whatever method, under whatever address."""
        return {path.split(f"{self.commit}/", 1)[1] for _, _, path, _ in self.requests if f"{self.commit}/" in path}

    def answer(self, server: str, method: str, path: str, headers: dict[str, str]) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body; a header "cut" is where the body breaks off."""
        if len(self.requests) > MOST_REQUESTS:
            return 418, {}, b""
        if server == "cdn":
            return self._content(path.removeprefix(f"/{self.commit}/"), headers)
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+))?", path):
            return self._api(*match.groups())
        if match := re.fullmatch(rf"/org/tiny/resolve/{self.commit}/(.+)", path):
            return self._resolve(match[1], method, headers)
        return 404, {"X-Error-Code": "EntryNotFound"}, b""

    def _api(self, repo: str, what: str | None, revision: str | None) -> tuple[int, dict[str, str], bytes]:
        if repo != "org/tiny":
            return 401, {"X-Error-Code": "RepoNotFound"}, b"{}"
        if revision not in (None, "main", "v1", self.commit):
            return 404, {"X-Error-Code": "RevisionNotFound"}, b"{}"
        if what != "tree":
            return 200, {}, json.dumps({"id": repo, "sha": self.commit, "private": False}).encode()
        entries: list[dict[str, Any]] = [{"type": "directory", "path": "onnx", "oid": "0" * 40, "size": 0}]
        for name, raw in self.files.items():
            entry: dict[str, Any] = {"type": "file", "path": name, "size": len(raw), "oid": _etag(raw)[:40]}
            if name in self.on_cdn | set(self.xet_hashes):
                entry["lfs"] = {"oid": _etag(raw), "size": len(raw), "pointerSize": 130}
            if name in self.xet_hashes:
                entry["xetHash"] = self.xet_hashes[name]
            entries.append(entry)
        return 200, {}, json.dumps(entries).encode()

    def _resolve(self, name: str, method: str, headers: dict[str, str]) -> tuple[int, dict[str, str], bytes]:
        if self.gated:
            return 401, {"X-Error-Code": "GatedRepo"}, b""
        if name not in self.files or name in self.gone:
            return 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": self.commit}, b""
        raw = self.files[name]
        about = {"X-Repo-Commit": self.commit, "ETag": f'"{_etag(raw)}"'}
        if name in self.on_cdn:
            linked = {"X-Linked-Etag": f'"{_etag(raw)}"', "X-Linked-Size": str(len(raw))}
            return 302, {**about, **linked, "Location": f"{self.cdn_url}/{self.commit}/{name}"}, b""
        status, more, body = self._content(name, headers if method == "GET" else {})
        return status, {**about, **more}, body

    def _content(self, name: str, headers: dict[str, str]) -> tuple[int, dict[str, str], bytes]:
        raw = self.files[name]
        if name in self.fail_once:
            self.fail_once.remove(name)
            return 500, {}, b""
        cut = {"cut": str(self.cut_once.pop(name))} if name in self.cut_once else {}
        asked = re.fullmatch(r"bytes=(\d+)-", headers.get("range", ""))
        if asked is None:
            return 200, cut, raw
        start = int(asked[1])
        return 206, {"Content-Range": f"bytes {start}-{len(raw) - 1}/{len(raw)}", **cut}, raw[start:]


def _etag(raw: bytes) -> str:
    return hashlib.sha256(raw).hexdigest()


def _serve(hub: FakeHub, server: str) -> ThreadingHTTPServer:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            path = urlsplit(self.path).path
            headers = {name.lower(): value for name, value in self.headers.items()}
            with hub.lock:
                hub.requests.append((server, self.command, path, headers))
                status, more, body = hub.answer(server, self.command, path, headers)
            self.send_response(status)
            cut = more.pop("cut", None)
            for name, value in {"Content-Length": str(len(body)), **more}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body if cut is None else body[: int(cut)])
            self.close_connection = cut is not None

        do_HEAD = do_GET

        def log_message(self, format: str, *args: Any) -> None:
            pass

    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    return httpd


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    hub = FakeHub()
    servers = [_serve(hub, name) for name in ("hub", "cdn")]
    hub.url, hub.cdn_url = (f"http://127.0.0.1:{server.server_address[1]}" for server in servers)
    yield hub
    for server in servers:
        server.shutdown()
        server.server_close()
    assert len(hub.requests) <= MOST_REQUESTS


@pytest.fixture
def run(hub, tmp_path):
    """Runs Python code in a process whose Hub is ours; what it prints last, or the error it raises."""

    def run(code: str, **environment: str) -> str:
        kept = {key: value for key, value in os.environ.items() if not OF_THE_HUB.match(key)}
        ours = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf"), "DO_NOT_TRACK": "1"}
        done = subprocess.run(
            [sys.executable, "-c", code],
            env={**kept, **ours, **environment},
            capture_output=True,
            text=True,
            timeout=60,
        )
        said = (done.stdout if done.returncode == 0 else done.stderr).strip()
        return said.rsplit("\n", 1)[-1]

    return run


@pytest.fixture
def locate(run):
    """`locate_model` in a process whose Hub is ours: the folder, or the line of the error."""

    def locate(model: str = "org/tiny", **environment: str) -> Path | str:
        line = run(f"from jquant.io.locate import locate_model; print('at', locate_model({model!r}))", **environment)
        return Path(line.removeprefix("at ")) if line.startswith("at ") else line

    return locate


def contents(folder: Path | str) -> dict[str, bytes]:
    """The files under a folder; the line of the error where there is none."""
    assert isinstance(folder, Path), folder
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_only_safetensors_json_and_tokenizer_files_are_asked_for(hub, locate):
    hub.files |= {"merges.txt": b"a b", "tokenizer.model": b"x", "model-2.safetensors": b"y"}
    wanted = {name: raw for name, raw in hub.files.items() if name not in UNWANTED}
    assert contents(locate()) == wanted
    assert hub.names() == set(wanted)
    assert len(hub.paths(server="cdn")) == 1  # the large file, behind a redirect


def test_what_is_in_the_cache_is_not_downloaded_again(hub, locate):
    first = locate()
    asked = len(hub.requests)
    assert locate() == first
    assert [path for _, _, path, _ in hub.requests[asked:]] == ["/api/models/org/tiny/revision/main"]
    asked = len(hub.requests)
    assert locate(f"org/tiny@{COMMIT}") == first  # a commit cannot change: nothing to ask
    assert locate(HF_HUB_OFFLINE="1") == first
    assert len(hub.requests) == asked


def test_a_changed_branch_is_downloaded(hub, locate):
    first = locate("org/tiny@v1")
    hub.commit = COMMIT[::-1]
    hub.files["config.json"] = b'{"new": 1}'
    second = locate("org/tiny@v1")
    assert (first.name, second.name) == (COMMIT, COMMIT[::-1])
    assert contents(second)["config.json"] == b'{"new": 1}'
    assert len(hub.paths(server="cdn")) == 1  # the weights are the same, and were there


def test_a_cut_download_goes_on_where_it_was(hub, locate):
    big = bytes(range(256)) * (48 << 10)  # 12 MiB; the client keeps what it has in pieces of 10 MiB
    hub.files["model.safetensors"], hub.cut_once = big, {"model.safetensors": 11 << 20}
    assert contents(locate())["model.safetensors"] == big
    ranges = [asked[3].get("range") for asked in hub.requests if asked[0] == "cdn"]
    assert ranges == [None, f"bytes={10 << 20}-"]


def test_a_failed_download_keeps_the_files_that_were_complete(hub, locate):
    hub.fail_once = {"model.safetensors"}
    error = locate()
    assert "model 'org/tiny': could not be downloaded from the Hub: HfHubHTTPError" in error
    assert "500" in error
    offline = locate(HF_HUB_OFFLINE="1")
    assert "only a part of it is in the cache, and HF_HUB_OFFLINE is set" in offline
    asked = len(hub.requests)
    assert contents(locate()) == LISTED
    assert {path.rsplit("/", 1)[1] for _, method, path, _ in hub.requests[asked:] if "api" not in path} == {
        "model.safetensors"
    }


def test_a_token_is_for_the_hub_alone(hub, locate):
    locate(HF_TOKEN="hf_dummy")
    tokens = {(server, headers.get("authorization")) for server, _, _, headers in hub.requests}
    assert tokens == {("hub", "Bearer hf_dummy"), ("cdn", None)}


FAILURES = {
    "no such model": ({}, "org/none", "the Hub knows no such model, or it is private"),
    "no such revision": ({}, "org/tiny@v2", "at revision 'v2': the Hub's repository has no such revision"),
    "gated": ({"gated": True}, "org/tiny", "the Hub asks for consent first"),
    "a file is gone": ({"gone": {"config.json"}}, "org/tiny", "could not be downloaded from the Hub: .*EntryNotFound"),
    "pickles only": (
        {"files": {"config.json": b"{}", "pytorch_model.bin": b"\x80"}},
        "org/tiny",
        r"holds no \*\.safetensors .*pickled weights \(\.bin, \.pt\), which may run code, are not read",
    ),
}


@pytest.mark.parametrize("case", FAILURES)
def test_a_failure_is_one_line_that_says_what_to_do(hub, locate, case):
    changes, model, message = FAILURES[case]
    vars(hub).update(changes)
    error = locate(model)
    assert isinstance(error, str)
    assert error.startswith("jquant.core.errors.InputError: model 'org/")
    assert re.search(message, error)
    assert not hub.names() & set(UNWANTED)


def test_offline_nothing_is_asked(hub, locate):
    assert "is neither a path nor in the cache, and HF_HUB_OFFLINE is set" in locate(HF_HUB_OFFLINE="1")
    assert hub.requests == []


def test_no_hub_answers(locate):
    assert "the Hub cannot be reached: check the network" in locate(HF_ENDPOINT="http://127.0.0.1:9")


LOGITS = """
import numpy, jax.numpy as jnp
from jquant.models.checkpoint import open_checkpoint
logits = open_checkpoint("org/tiny").model()(jnp.asarray(numpy.load("{golden}")["tokens"]))
numpy.save("{out}", logits)
"""


def test_a_model_from_the_hub_computes_what_it_should(hub, run, tmp_path):
    """Its weights lie in the store that the Hub's cache shares between repositories, as all Xet files do."""
    hub.files = {path.name: path.read_bytes() for path in (GOLDENS / "llama_b").glob("*[!z]")} | UNWANTED
    hub.xet_hashes = {"model.safetensors": "ab" * 32}
    store = tmp_path / "hf" / "hub" / "blobs"
    (store / "ab").mkdir(parents=True)
    (store / ".huggingface-shared-blobs").write_text("1\n")
    (store / "ab" / ("ab" * 32)).write_bytes(hub.files["model.safetensors"])
    golden, out = GOLDENS / "llama_b" / "golden.npz", tmp_path / "logits.npy"
    assert run(LOGITS.format(golden=golden, out=out)) == ""
    expected = np.load(golden)["logits"]
    np.testing.assert_allclose(np.load(out), expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    weights = tmp_path / "hf" / "hub" / "models--org--tiny" / "snapshots" / COMMIT / "model.safetensors"
    assert weights.resolve().is_relative_to(store)
