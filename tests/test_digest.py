"""Digests keep their values: what earlier versions stored is compared with what this one computes."""

import hashlib
import json
from pathlib import Path

from xlam_jax.digest import (
    file_digest,
    hex_digest,
    json_digest,
    key_digest,
    parts_digest,
    random_integer,
    stream_digest,
)


def test_known_values():
    assert hex_digest("abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert hex_digest(b"a", "bc", length=16) == "ba7816bf8f01cfea"
    assert key_digest("abc", 8).hex() == "d8bb14d833d59559"
    assert random_integer("abc") == 0xBA7816BF8F01CFEA
    assert random_integer("abc", size=4) == 0xBA7816BF


def test_a_stream_is_its_concatenation_and_parts_are_not():
    assert stream_digest(iter(["a", b"bc"])) == hex_digest("abc")
    assert parts_digest(["a", "bc"]) != parts_digest(["ab", "c"])
    prefixed = b"\0\0\0\0\0\0\0\x01a\0\0\0\0\0\0\0\x02bc"
    assert parts_digest(["a", b"bc"]) == hashlib.sha256(prefixed).hexdigest()


def test_json_does_not_depend_on_the_order_of_keys_unless_asked():
    value = {"b": 1, "a": "é"}
    assert json_digest(value, 24) == hashlib.sha256(b'{"a": "\\u00e9", "b": 1}').hexdigest()[:24]
    spelled = json.dumps(value, ensure_ascii=False)
    assert json_digest(value, sort_keys=False, ensure_ascii=False) == hashlib.sha256(spelled.encode()).hexdigest()


def test_files(tmp_path: Path):
    content = bytes(range(256)) * 5000
    (tmp_path / "file").write_bytes(content)
    assert file_digest(tmp_path / "file", length=32) == hashlib.sha256(content).hexdigest()[:32]


def test_keys_of_texts_that_utf8_can_not_encode():
    assert key_digest("\ud800") == key_digest("?")
