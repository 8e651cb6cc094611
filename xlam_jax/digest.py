"""Digests: SHA-256 for content that is stored and compared later, BLAKE2b for keys of sets and dicts.

Checkpoints, caches, journals and held-out splits depend on the values, so no function may ever change its result.
"""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def hex_digest(*parts: str | bytes, length: int = 64) -> str:
    """Returns the first `length` hexadecimal digits of the SHA-256 of the concatenated parts; texts count as UTF-8."""
    return stream_digest(parts, length)


def stream_digest(parts: Iterable[str | bytes], length: int = 64) -> str:
    """Returns `hex_digest` of parts that are produced one at a time and need not fit into memory together."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(_encoded(part))
    return digest.hexdigest()[:length]


def parts_digest(parts: Iterable[str | bytes], length: int = 64) -> str:
    """Returns a digest that also depends on where one part ends and the next begins."""
    encoded = map(_encoded, parts)
    return stream_digest((piece for part in encoded for piece in (len(part).to_bytes(8, "big"), part)), length)


def json_digest(value: Any, length: int = 64, *, sort_keys: bool = True, **options: Any) -> str:
    """Returns the digest of a value's JSON text. `options` are those of `json.dumps`."""
    return hex_digest(json.dumps(value, sort_keys=sort_keys, **options), length=length)


def file_digest(path: Path, length: int = 64) -> str:
    """Returns the digest of a file's content, which is read in blocks."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:length]


def random_integer(text: str, size: int = 8) -> int:
    """Returns a pseudo-random integer of `size` bytes (below 256 ** size) that depends on nothing but the text."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:size], "big")


def key_digest(text: str, size: int = 16) -> bytes:
    """Returns a key of `size` bytes for a text (BLAKE2b), to be used in a set or dict in place of a long text.

    Half surrogate pairs, which UTF-8 can't encode, count as question marks.
    """
    return hashlib.blake2b(text.encode(errors="replace"), digest_size=size).digest()


def _encoded(part: str | bytes) -> bytes:
    return part.encode() if isinstance(part, str) else part
