"""Every source gives the text it promises, and every bad one an error that names file, line and fix."""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import json
import sys
import types
from pathlib import Path

import pytest

from jquant.core.errors import InputError
from jquant.data.hub import DATASETS, OTHER_NAMES
from jquant.data.text import load_calibration, load_text, text_names

SAMPLE = " First line.\r\n\n  Zweite Zeile: ½ – 量\n"


def test_plain_and_gzipped_files_give_the_characters_as_they_are(tmp_path: Path) -> None:
    for suffix in (".txt", ".raw", ".md", ".log"):
        plain, packed = tmp_path / f"a{suffix}", tmp_path / f"a{suffix}.gz"
        plain.write_bytes(SAMPLE.encode())
        packed.write_bytes(gzip.compress(SAMPLE.encode()))
        for path in (plain, packed):
            text = load_text(str(path))
            assert text.content == SAMPLE
            assert text.name == path.name
            assert text.sha256 == hashlib.sha256(SAMPLE.encode()).hexdigest()
            assert load_text(path) == text


def test_a_text_cannot_be_changed(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("word")
    text = load_text(tmp_path / "a.txt")
    with pytest.raises(dataclasses.FrozenInstanceError):
        text.content = "another"  # pyright: ignore[reportAttributeAccessIssue]


def test_a_byte_order_mark_is_not_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfword")
    assert load_text(tmp_path / "a.txt").content == "word"


def test_json_lines_join_the_chosen_field_by_a_blank_line(tmp_path: Path) -> None:
    records = [
        {"text": "one\u2028still one", "body": "eins"},
        {"text": "", "body": "zwei"},
        {"text": "three", "body": ""},
    ]
    content = "\n".join(json.dumps(record, ensure_ascii=False) for record in records) + "\n\n"
    (tmp_path / "a.jsonl").write_text(content, encoding="utf-8")
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(content.encode()))
    for name in ("a.jsonl", "a.jsonl.gz"):
        assert load_text(str(tmp_path / name)).content == "one\u2028still one\n\n\n\nthree"
        chosen = load_text(f"{tmp_path / name}#body")
        assert chosen.content == "eins\n\nzwei\n\n"
        assert chosen.name == f"{name}#body"


def test_a_folder_is_its_text_files_in_the_order_of_their_names(tmp_path: Path) -> None:
    folder = tmp_path / "corpus"
    (folder / "b").mkdir(parents=True)
    (folder / "b" / "inner.md").write_text("third")
    (folder / "a.txt").write_text("first")
    (folder / "c.jsonl").write_text('{"text": "fourth"}')
    (folder / "ab.raw.gz").write_bytes(gzip.compress(b"second"))
    (folder / "weights.bin").write_bytes(b"\xff\xfe")
    (folder / ".hidden.txt").write_text("hidden")
    text = load_text(folder)
    assert text.content == "first\n\nsecond\n\nthird\n\nfourth"
    assert text.name == "corpus/"


def test_a_path_object_is_never_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "pydoc").write_text("a file called pydoc")
    monkeypatch.chdir(tmp_path)
    assert load_text(Path("pydoc")).content == load_text("./pydoc").content == "a file called pydoc"
    assert load_text("pydoc").name == "pydoc:evaluation"


@pytest.mark.parametrize(
    ("name", "raw", "said"),
    [
        ("a.txt", b"", "is empty"),
        ("a.txt", b" \n\t", "is empty"),
        ("a.jsonl", b'{"text": ""}\n', "is empty"),
        ("a.txt", b"fine\nfine\nb\xe9d", r"a\.txt:3: byte 0xe9 at offset 11 is not UTF-8"),
        ("a.txt", b"\xef\xbb\xbffine\n\xff", r"a\.txt:2: byte 0xff at offset 8"),
        ("a.txt.gz", b"plain", r"a\.txt\.gz: not a whole gzip file"),
        ("a.txt.gz", gzip.compress(b"word " * 999, mtime=0)[:-9], r"a\.txt\.gz: not a whole gzip file"),
        ("a.txt.gz", gzip.compress(bytes(256), mtime=0)[:14] + b"\xff" * 40, r"a\.txt\.gz: not a whole gzip file"),
        ("a.jsonl", b'{"text": "a"}\n\n{"text": ', r"a\.jsonl:3: not a line of JSON"),
        ("a.jsonl", b'{"text": "a"}\n' + b"[" * 100_000, r"a\.jsonl:2: not a line of JSON"),
        ("a.jsonl", b'{"text": "a"}\n["b"]', r"a\.jsonl:2: a JSON list, not an object"),
        ("a.jsonl", b'{"body": "a", "n": 1}', r"a\.jsonl:1: no string field 'text'; string fields there: body;"),
        ("a.jsonl", b'{"text": null}', r"a\.jsonl:1: no string field 'text'; string fields there: none;"),
        ("a.jsonl", b'{"text": "\\ud800"}', r"a\.jsonl:1: field 'text' holds a lone surrogate"),
    ],
)
def test_a_bad_file_is_named_with_its_line(tmp_path: Path, name: str, raw: bytes, said: str) -> None:
    (tmp_path / name).write_bytes(raw)
    with pytest.raises(InputError, match=said) as raised:
        load_text(tmp_path / name)
    assert "\n" not in str(raised.value)


def test_sources_that_do_not_exist_are_answered_with_what_does(tmp_path: Path) -> None:
    for source in ("wikitext3", str(tmp_path / "none.txt"), str(tmp_path / "none.jsonl#text"), "x" * 5000):
        with pytest.raises(InputError, match="text source") as raised:
            load_text(source)
        if len(source) < 5000:
            for name in (
                "pydoc",
                "pydoc:calibration",
                "wikitext2",
                "wikitext2:validation",
                "c4",
                "pile",
                "openplatypus",
            ):
                assert name in str(raised.value)
    for source, said in (
        ("", "empty string"),
        ("pydoc:test", "no part 'test'; its parts are evaluation, calibration"),
        ("c4:test", "no split 'test'; its splits are validation, train"),
        (str(tmp_path), "holds no text file"),
    ):
        with pytest.raises(InputError, match=said):
            load_text(source)
    (tmp_path / "a.jsonl").write_text("{}")
    with pytest.raises(InputError, match="names no field"):
        load_text(f"{tmp_path}/a.jsonl#")


def test_every_listed_name_is_known_and_listed_once() -> None:
    names = text_names()
    assert len(set(names)) == len(names)
    assert {name.partition(":")[0] for name in names} == {"pydoc", *DATASETS, *OTHER_NAMES}


def test_a_dataset_is_read_through_the_datasets_package(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[object, ...]] = []

    def load_dataset(hub_id: str, config: str | None, *, split: str, streaming: bool) -> list[dict[str, str]]:
        asked.append((hub_id, config, split, streaming))
        return [{"text": f"t{n}", "instruction": f"i{n}", "output": f"o{n}"} for n in range(3000)]

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))  # type: ignore[arg-type]
    wikitext, c4, platypus = load_text("wikitext2:validation"), load_text("c4"), load_text("openplatypus")
    assert asked == [
        ("Salesforce/wikitext", "wikitext-2-raw-v1", "validation", False),
        ("allenai/c4", "en", "validation", True),
        ("garage-bAInd/Open-Platypus", None, "train", False),
    ]
    assert (wikitext.name, c4.name, platypus.name) == ("wikitext2:validation", "c4:validation", "openplatypus:train")
    assert wikitext.content == "\n\n".join(f"t{n}" for n in range(3000))
    assert c4.content == "\n\n".join(f"t{n}" for n in range(2000))
    assert platypus.content.startswith("i0\n\no0\n\ni1\n\no1\n\n")


def test_calibration_reads_what_evaluation_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(hub_id: str, config: str | None, *, split: str, streaming: bool) -> list[dict[str, str]]:
        return [{"text": f"{hub_id} {split}", "instruction": split, "output": split}]

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))  # type: ignore[arg-type]
    assert load_text("wikitext") == load_text("wikitext2:test")
    assert load_text("wikitext:validation") == load_text("wikitext2:validation")
    for source, name in (
        ("wikitext", "wikitext2:train"),
        ("wikitext2", "wikitext2:train"),
        ("c4", "c4:train"),
        ("pile", "pile:train"),
        ("openplatypus", "openplatypus:train"),
        ("pydoc", "pydoc:calibration"),
        ("wikitext:validation", "wikitext2:validation"),
        ("pydoc:evaluation", "pydoc:evaluation"),
    ):
        assert load_calibration(source) == load_text(name)
        assert load_calibration(source).name == name
    with pytest.raises(InputError, match=r"known names: .*wikitext2, .*openplatypus, wikitext$"):
        load_calibration("wikitex")
    with pytest.raises(InputError, match="no split 'tests'; its splits are test, validation, train"):
        load_calibration("wikitext:tests")


def test_a_missing_package_and_an_unreachable_hub_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: object, **__: object) -> None:
        raise ConnectionError("no route")

    monkeypatch.setitem(sys.modules, "datasets", None)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"pip install 'jquant\[eval\]'"):
        load_text("wikitext2")
    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=unreachable))  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"Salesforce/wikitext could not be read .*no route"):
        load_text("wikitext2")
