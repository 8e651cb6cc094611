import gzip
import json
from pathlib import Path

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from xlam_jax.data import files
from xlam_jax.data.files import open_bytes, read_items, read_lines, stem
from xlam_jax.errors import UserError

JSON = st.recursive(
    st.none() | st.integers() | st.booleans() | st.text(alphabet='ab"\\[]{},: é\n', max_size=12),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(alphabet='a"\\]:,', max_size=4), inner, max_size=4)
    ),
    max_leaves=12,
)


@pytest.mark.parametrize("buffer", [1, 7, 64])
def test_the_items_are_those_of_the_whole_document(tmp_path, monkeypatch, buffer):
    monkeypatch.setattr(files, "BUFFER", buffer)
    path = tmp_path / "rows.json"

    @settings(max_examples=150, deadline=None, derandomize=True)
    @given(
        st.lists(JSON, max_size=4) | st.dictionaries(st.text(max_size=4), JSON, max_size=4),
        st.booleans(),
        st.sampled_from([None, 1]),
    )
    def check(document, ascii_only, indent):
        path.write_text(json.dumps(document, ensure_ascii=ascii_only, indent=indent), encoding="utf-8")
        values = list(document.values()) if isinstance(document, dict) else document
        assert [(number, json.loads(text)) for number, _, text in read_items(path)] == list(enumerate(values, start=1))

    check()


def items(path: Path, content: bytes) -> list[bytes]:
    path.write_bytes(content)
    return [text for _, _, text in read_items(path)]


def test_items_that_are_not_json_keep_their_place(tmp_path):
    path = tmp_path / "rows.json"
    assert items(path, b'\xef\xbb\xbf [1, nope ,{"a": }, "\xff"\n]\n') == [b"1", b" nope ", b'{"a": }', b' "\xff"\n']
    assert items(path, b'{"a": 1, "b" : {"c": "}"},\n}') == [b" 1", b' {"c": "}"}', b"\n"]  # the last: after a comma
    assert items(path, b"[,]") == [b"", b""]
    assert items(path, b" {\n} ") == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty, expected a JSON list or object"),
        (b"\xff\xfe[", "starts with '\ufffd', expected"),
        (b'"text"', "starts with '\"', expected"),
        (
            b'{"a": 1}\n{"a": 2}\n',
            r"continues after its first object has closed; name files with one object per line \.jsonl",
        ),
        (b"[1] x", "continues after its first list"),
        (b"[1}", r"opens with \[ and closes with }"),
        (b'[{"a": 1}, {"a"', "the item that begins at byte 10 never ends; was the file cut off"),
        (b'[{"a": 1}, {"a": "]', "the item that begins at byte 10 never ends"),
        (b"[1, 2", "the item that begins at byte 3 never ends"),
        (b"{1: 2}", "item 1 of its object has no key"),
        (b'{"a": 1, {"b": 2}}', "item 2 of its object has no key"),
    ],
)
def test_broken_documents_are_user_errors(tmp_path, content, message):
    with pytest.raises(UserError, match=message):
        items(tmp_path / "rows.json", content)


def test_endless_rows_are_user_errors(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "LONGEST_ROW", 3 << 20)
    path = tmp_path / "rows.json"
    assert items(path, b'["' + b"x" * (2 << 20) + b'"]')
    with pytest.raises(UserError, match="the item that begins at byte 1 is longer than 3 MiB"):
        items(path, b'["' + b"x" * (6 << 20))
    path.write_bytes(b"1\n" + b"x" * ((3 << 20) - 1) + b"\n" + b"x" * (4 << 20))
    with pytest.raises(UserError, match=r"rows\.json:3: more than 3 MiB without a line end"):
        list(read_lines(path))


def test_a_long_string_is_searched_in_linear_time(tmp_path):
    text = json.dumps(["x" * 30_000_000, {"a": "y" * 30_000_000}]).encode()
    assert [len(text) for text in items(tmp_path / "rows.json", text)] == [30_000_002, 30_000_010]


def pack(path: Path, content: bytes) -> bytes:
    half = len(content) // 2
    if path.suffix == ".gz":
        return gzip.compress(content[:half]) + gzip.compress(content[half:])
    packer = zstandard.ZstdCompressor(write_checksum=True)
    return packer.compress(content[:half]) + packer.compress(content[half:])


@pytest.mark.parametrize("name", ["rows.jsonl.gz", "rows.jsonl.zst"])
def test_compressed_files_are_decompressed(tmp_path, name, quickstart):
    plain = quickstart / "hammer.jsonl"
    path = tmp_path / name
    packed = pack(path, plain.read_bytes())
    path.write_bytes(packed)
    assert list(read_lines(path)) == list(read_lines(plain))
    assert stem(path) == "rows"
    damaged = bytearray(packed)
    damaged[len(packed) // 3] ^= 255
    for content, message in (
        (packed[:-1], "cannot be decompressed .it was cut off"),
        (packed[: len(packed) // 3], "cannot be decompressed .it was cut off"),
        (bytes(damaged), "cannot be decompressed|not an intact gzip file"),
        (b"[1]\n", "cannot be decompressed|not an intact gzip file"),
    ):
        path.write_bytes(content)
        with pytest.raises(UserError, match=message):
            list(read_lines(path))
    path.write_bytes(b"")
    assert list(read_lines(path)) == []


def test_unreadable_files_are_user_errors(tmp_path):
    for path in (tmp_path / "none.jsonl", tmp_path):
        with pytest.raises(UserError, match="cannot be read"), open_bytes(path) as file:
            file.read()
