"""Seeded mutations of valid inputs: values of another type, missing and unknown keys, flipped and lost bytes."""

import copy
import json
from random import Random
from typing import Any


def nested(levels: int) -> list[Any]:
    """Returns a deeply nested list."""
    value: list[Any] = []
    for _ in range(levels):
        value = [value]
    return value


ODD: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 7, 10**9, 2**31, 2**63, -(2**64), 10**40, 10**400, 0.0, 1.0, -1.5, 1e-9, 1e300,
    float("inf"), float("nan"), "", " ", "x", "0", "-1", "4096", "true", "null", "linear", "~", "/", "..", ".", "a/b",
    "\0", "a\0b", "\ud800", "é" * 300, "x" * 5000, "2026-01-31", "2026-99-99", "2001-12-14t21:59:43.10-05:00", "1e400",
    "{", "{}", "[]", '{"a": 1}', "{{ x", "{% for %}", "(", "[a-", "user", "assistant", "tool", "system", "function",
    "developer", "[]{}<>", "<tools>", "<tool_call>{", "Action: x", "get_weather", "call_1", [], {}, [[]], [{}], [None],
    [1, "a"], [""], {"": ""}, {"a": None}, {"x": {"x": {}}}, {"type": "object"}, {"type": ["string", "null"]},
    {"name": 1}, {"function": None}, {"role": ""}, [{"role": None}], nested(30), nested(70), nested(200),
)  # fmt: skip
KEYS = ("", "x", "name", "type", "extends", "role", "\0", "\ud800", "0", "function", "arguments", "schema")


def _places(value: Any) -> list[tuple[Any, Any]]:
    """(container, key) of every value inside a value."""
    places: list[tuple[Any, Any]] = []
    waiting = [value]
    while waiting:
        node = waiting.pop()
        keys: Any = list(node) if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ()
        for key in keys:
            places.append((node, key))
            waiting.append(node[key])
    return places


def mutate(draw: Random, value: Any) -> Any:
    """Returns a copy of a JSON value with one to four of its parts replaced, removed, renamed, moved or duplicated."""
    root = [copy.deepcopy(value)]
    for _ in range(draw.choice((1, 1, 1, 2, 2, 4))):
        places = _places(root)
        container, key = draw.choice(places)
        match draw.randrange(8):
            case 0 | 1 | 2:
                container[key] = copy.deepcopy(draw.choice(ODD))
            case 3 if container is not root:
                del container[key]
            case 4:
                other, name = draw.choice(places)
                container[key] = copy.deepcopy(other[name])
            case 5:
                container[key] = str(container[key]) if draw.random() < 0.5 else [container[key]]
            case 6 if isinstance(container, dict):
                container[draw.choice(KEYS)] = container.pop(key) if draw.random() < 0.5 else draw.choice(ODD)
            case 7 if isinstance(container, list) and container is not root:
                container.insert(key, copy.deepcopy(container[key]))
    return root[0]


def mutate_bytes(draw: Random, data: bytes) -> bytes:
    """Returns bytes with a few of them flipped, removed, inserted or duplicated, or truncated."""
    content = bytearray(data)
    for _ in range(draw.choice((1, 1, 2, 8))):
        at = draw.randrange(len(content) + 1)
        length = draw.choice((1, 1, 2, 16, 200))
        match draw.randrange(6):
            case 0 if at < len(content):
                content[at] ^= 1 << draw.randrange(8)
            case 1:
                del content[at : at + length]
            case 2:
                content[at:at] = draw.choice(
                    (b"\0", b'"', b"{", b"[", b"[" * 3000, b"}", b"\xff", b"\xef\xbb\xbf", b"\n", b"- &a [*a]\n",
                     b"NaN", b"\xe2\x80\xa8", b"\\u0000", b"\\ud800", b": ", b"!!python/object:os.x y", b"9" * 5000)
                )  # fmt: skip
            case 3:
                content[at:at] = content[at : at + length]
            case 4:
                del content[at:]
            case 5:
                content[at : at + length] = draw.randbytes(min(length, len(content) - at))
    return bytes(content)


def mutate_json(draw: Random, value: Any) -> bytes:
    """The text of a JSON value, mutated as a value or as bytes."""
    if draw.random() < 0.3:
        return mutate_bytes(draw, json.dumps(value).encode())
    return json.dumps(mutate(draw, value)).encode()
