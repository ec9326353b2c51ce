"""Hashes of content: identities of files, indices and caches."""

from __future__ import annotations

import hashlib
import json
from typing import Any


def hash64(data: bytes) -> int:
    """64-bit content hash, never 0 (which stands for "not known")."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little") or 1


class Digest:
    """A 128-bit hash of parts that are added one by one; the boundaries between them matter."""

    def __init__(self) -> None:
        self._state = hashlib.blake2b(digest_size=16)

    def add(self, part: bytes | str) -> None:
        data = part.encode() if isinstance(part, str) else part
        self._state.update(len(data).to_bytes(8, "little"))
        self._state.update(data)

    def hex(self) -> str:
        """32 hex digits."""
        return self._state.hexdigest()


def digest(*parts: bytes | str) -> str:
    """The ``Digest`` of several parts."""
    result = Digest()
    for part in parts:
        result.add(part)
    return result.hex()


def with_checksum(data: bytes) -> bytes:
    """``data`` followed by 16 bytes that ``without_checksum`` verifies."""
    return data + hashlib.blake2b(data, digest_size=16).digest()


def without_checksum(data: bytes) -> bytes:
    """The data that was given to ``with_checksum``. Raises ValueError if any bit of it has changed."""
    data, checksum = data[:-16], data[-16:]
    if hashlib.blake2b(data, digest_size=16).digest() != checksum:
        raise ValueError("the checksum does not match")
    return data


def json_digest(value: Any) -> str:
    """The ``digest`` of ``value`` as JSON, whatever the order of its keys."""
    return digest(json.dumps(value, sort_keys=True))


def _crc_table() -> tuple[int, ...]:
    """The table for CRC-32C (RFC 3720, appendix B.4), bits reversed."""
    table = list(range(256))
    for _ in range(8):
        table = [value >> 1 ^ 0x82F63B78 * (value & 1) for value in table]
    return tuple(table)


_TABLE = _crc_table()


def masked_crc32c(data: bytes) -> int:
    """The checksum of TFRecord files, including TensorBoard's: CRC-32C, rotated and offset by a constant."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = _TABLE[(crc ^ byte) & 0xFF] ^ crc >> 8
    crc ^= 0xFFFFFFFF
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF
