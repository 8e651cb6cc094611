"""Headers of safetensors files: this project refuses what the format's library refuses, and reads the rest alike."""

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, deserialize
from safetensors.numpy import save

from xlam_jax.errors import UserError
from xlam_jax.weights.shards import BITS, DTYPES, Shard, parse_header, read_tensors

Q, OUT = "model.layers.0.self_attn.q_proj.weight", "model.layers.0.self_attn.o_proj.weight"


def file(header: Any, data: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(dtype: Any, shape: Any, start: Any, stop: Any) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


def ours(content: bytes) -> dict[str, tuple[str, tuple[int, ...], bytes]] | None:
    """Parses a file with this project. Returns None if it refuses the file."""
    length = int.from_bytes(content[:8], "little")
    try:
        if not 0 < length <= len(content) - 8:
            raise ValueError
        data = content[8 + length :]
        tensors = parse_header(content[8 : 8 + length], len(data))
    except ValueError:
        return None
    return {key: (tensor.dtype, tensor.shape, data[tensor.start : tensor.stop]) for key, tensor in tensors.items()}


def library(content: bytes) -> dict[str, tuple[str, tuple[int, ...], bytes]] | None:
    """Parses a file with the format's library. Returns None if it refuses the file."""
    try:
        read = deserialize(content)
    except SafetensorError:
        return None
    return {key: (tensor["dtype"], tuple(tensor["shape"]), bytes(tensor["data"])) for key, tensor in read}


def base() -> tuple[dict[str, Any], bytes]:
    header = {
        "__metadata__": {"format": "pt"},
        Q: entry("F32", [2, 3], 0, 24),
        OUT: entry("F32", [3, 2], 24, 48),
        "norm": entry("BF16", [4], 48, 56),
        "none": entry("F16", [0, 7], 56, 56),
        "packed": entry("F4", [6], 56, 59),
    }
    return header, bytes(range(59))


def test_the_base_is_read_alike():
    content = file(*base())
    assert ours(content) == library(content) is not None


@pytest.mark.parametrize("dtype", BITS)
def test_every_dtype_of_the_format(dtype: str):
    content = file({"a": entry(dtype, [8], 0, BITS[dtype])}, bytes(BITS[dtype]))
    assert ours(content) == library(content) is not None
    assert ours(file({"a": entry(dtype, [9], 0, BITS[dtype])}, bytes(BITS[dtype]))) is None


NUMBERS = st.one_of(
    st.integers(0, 64),
    st.sampled_from([-1, 2**31, 2**32, 2**63, 2**64 - 1, 2**64, 1.0, 24.0, float("nan"), True, None, "3", [], {}]),
)
LISTS = st.one_of(st.lists(NUMBERS, max_size=4), NUMBERS)
VALUES = {
    "dtype": st.one_of(st.sampled_from([*BITS, "I4", "f32", "FLOAT", ""]), NUMBERS),
    "shape": LISTS,
    "data_offsets": LISTS,
}
CHANGES = st.one_of(
    *(st.tuples(st.just("set"), st.sampled_from([Q, OUT, "norm", "none", "packed"]), st.just(key), value)
      for key, value in VALUES.items()),
    st.tuples(st.just("entry"), st.sampled_from([Q, "norm", "new", "__metadata__", ""]), LISTS),
    st.tuples(st.just("drop"), st.sampled_from([Q, OUT, "norm", "none", "packed", "__metadata__"])),
    st.tuples(st.just("copy"), st.sampled_from([Q, OUT, "packed"]), st.sampled_from([OUT, "norm", "none", "new"])),
    st.tuples(st.just("swap"), st.sampled_from([Q, OUT]), st.sampled_from([OUT, "norm", "packed"])),
    st.tuples(st.just("field"), st.sampled_from([Q, "norm"]), st.sampled_from(["dtype", "shape", "more"])),
    st.tuples(st.just("data"), st.integers(-8, 8)),
)  # fmt: skip


def change(header: dict[str, Any], data: bytes, action: tuple[Any, ...]) -> bytes:
    kind, *rest = action
    name: Any = rest[0] if rest else None
    target = header.get(name, {}) if isinstance(name, str) else {}
    if kind == "set" and rest[0] in header and isinstance(target, dict):
        target[rest[1]] = rest[2]
    elif kind == "entry":
        header[rest[0]] = rest[1]
    elif kind == "drop":
        header.pop(rest[0], None)
    elif kind == "copy" and rest[0] in header:
        header[rest[1]] = header[rest[0]]
    elif kind == "swap" and rest[0] in header and rest[1] in header:
        header[rest[0]], header[rest[1]] = header[rest[1]], header[rest[0]]
    elif kind == "field" and isinstance(target, dict):
        if target.pop(rest[1], None) is None:
            target[rest[1]] = 1
    elif kind == "data":
        return data + bytes(rest[0]) if rest[0] > 0 else data[: rest[0]]
    return data


@settings(max_examples=150, deadline=None)
@given(actions=st.lists(CHANGES, min_size=1, max_size=3))
@example(actions=[("entry", "__metadata__", [])])
@example(actions=[("entry", "__metadata__", False)])
def test_changed_headers(actions: list[tuple[Any, ...]]):
    header, data = base()
    for action in actions:
        data = change(header, data, action)
    content = file(header, data)
    read = ours(content)
    assert read is None or read == library(content)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_changed_bytes(data: st.DataObject):
    content = bytearray(file(*base()))
    for _ in range(data.draw(st.integers(1, 3))):
        position = data.draw(st.integers(0, len(content) - 1))
        kind = data.draw(st.sampled_from(["set", "digit", "insert", "delete"]))
        if kind == "delete":
            del content[position]
        elif kind == "insert":
            content.insert(position, data.draw(st.sampled_from(b'0-{}[]",: \\\x00\xff')))
        else:
            content[position] = data.draw(st.sampled_from(b"0123456789") if kind == "digit" else st.integers(0, 255))
    read = ours(bytes(content))
    assert read is None or read == library(bytes(content))


ONE = entry("U8", [1], 0, 1)
TEXT = b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}'
BROKEN: dict[str, tuple[Any, bytes, str]] = {
    "another tensor's bytes": (
        {Q: entry("F32", [2, 3], 24, 48), OUT: entry("F32", [3, 2], 24, 48)},
        bytes(48),
        "starts at byte 24 of the data and leaves a gap after the header, which ends at 0",
    ),
    "overlap": (
        {Q: entry("F32", [2, 3], 0, 24), OUT: entry("F32", [3, 2], 20, 44)},
        bytes(44),
        f"{OUT} starts at byte 20 of the data and overlaps {Q}, which ends at 24",
    ),
    "both": ({Q: entry("F32", [2, 3], 0, 24), OUT: entry("F32", [3, 2], 0, 24)}, bytes(24), "overlaps"),
    "gap": (
        {"a": ONE, "b": entry("U8", [1], 2, 3)},
        bytes(3),
        "b starts at byte 2 of the data and leaves a gap after a, which ends at 1",
    ),
    "another shape": (
        {Q: entry("F32", [2, 2], 0, 24)},
        bytes(24),
        f"{Q} is F32 [2, 2], 16 bytes, and its data_offsets [0, 24] span 24",
    ),
    "half a byte": ({"a": entry("F4", [3], 0, 1)}, bytes(1), "1.5 bytes"),
    "data too short": (
        {"a": entry("U8", [2], 0, 2)},
        bytes(1),
        "its tensors have 2 bytes, and 1 bytes follow the header",
    ),
    "data too long": ({"a": ONE}, bytes(2), "its tensors have 1 bytes, and 2 bytes follow"),
    "backwards": ({"a": entry("U8", [1], 1, 0)}, bytes(1), "its start and its end are expected"),
    "three offsets": (b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1,2]}}', bytes(1), "data_offsets [0, 1, 2]"),
    "unknown dtype": ({"a": entry("I4", [1], 0, 1)}, bytes(1), "a has dtype 'I4', which is not a dtype of the format"),
    "a shape of floats": ({"a": entry("U8", [1.0], 0, 1)}, bytes(1), "a has shape [1.0]; a list of whole numbers"),
    "a negative size": ({"a": entry("U8", [-1, -1], 0, 1)}, bytes(1), "a has shape [-1, -1]"),
    "a boolean size": ({"a": entry("U8", [True], 0, 1)}, bytes(1), "a has shape [True]"),
    "a huge shape": ({"a": entry("U8", [2**40, 2**40, 0], 0, 0)}, b"", "more values than a file can contain"),
    "a list": (b"[]", b"", "not a JSON object"),
    "no JSON": (b"{", b"", ""),
    "an entry of another kind": ({"a": [1]}, b"", "a is [1]; exactly dtype, shape, data_offsets are expected"),
    "a field more": ({"a": ONE | {"x": 1}}, bytes(1), "exactly dtype, shape, data_offsets"),
    "metadata of numbers": ({"__metadata__": {"a": 1}}, b"", "__metadata__ is {'a': 1}"),
    "a tensor twice": (TEXT[:-1] + b"," + TEXT[1:], bytes(1), "the key 'a' occurs twice"),
    "a field twice": (TEXT.replace(b'"dtype"', b'"dtype":"U8","dtype"'), bytes(1), "the key 'dtype' occurs twice"),
    "minus zero": (TEXT.replace(b"[0,", b"[-0,"), bytes(1), "-0"),
    "NaN": (TEXT.replace(b"[1]", b"[NaN]"), bytes(1), "NaN is not a JSON value"),
    "half a surrogate": (TEXT.replace(b'"a"', b'"\\ud800"'), bytes(1), "surrogates"),
    "no UTF-8": (TEXT.replace(b'"a"', b'"\xff"'), bytes(1), "utf-8"),
    "a byte order mark": (b"\xef\xbb\xbf" + TEXT, bytes(1), "not a JSON object"),
    "deep nesting": (TEXT.replace(b"[1]", b"[" * 100_000 + b"]" * 100_000), bytes(1), ""),
}
STRICTER = {"a huge shape", "a field more", "a tensor twice"}
"""Cases that the format's library accepts: empty tensors of a huge shape, unknown fields, the last of two entries."""


@pytest.mark.parametrize("name", BROKEN)
def test_broken_headers(name: str, tmp_path: Path):
    header, data, message = BROKEN[name]
    path = tmp_path / "model.safetensors"
    path.write_bytes(file(header, data))
    with pytest.raises(UserError) as error:
        Shard(str(path))
    assert str(error.value).startswith(f"{path}: truncated or damaged, {path.stat().st_size} bytes (")
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 600
    if name not in STRICTER:
        assert library(path.read_bytes()) is None


@pytest.mark.parametrize("length", [0, 46, 2**40, 2**64 - 1])
def test_a_header_longer_than_the_file(length: int, tmp_path: Path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", length) + b"{}" + bytes(20))
    with pytest.raises(UserError, match=rf"truncated or damaged, 30 bytes \(a header of {length} bytes\)"):
        Shard(str(path))


def test_all_tensors_of_a_file(tmp_path: Path):
    values = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.arange(4, dtype=np.float16)}
    (tmp_path / "x.safetensors").write_bytes(save(values))
    read = read_tensors(str(tmp_path / "x.safetensors"))
    assert {key: value.tolist() for key, value in read.items()} == {
        key: value.tolist() for key, value in values.items()
    }
    (tmp_path / "x.safetensors").write_bytes(save({"a": np.ones(2, np.int8)}))
    with pytest.raises(UserError, match=f"a is I8, and only {', '.join(DTYPES)} are supported"):
        read_tensors(str(tmp_path / "x.safetensors"))
