"""Hashes of content."""

from __future__ import annotations

from data_pipelines.io.digests import Digest, digest, hash64, json_digest


def test_borders_and_order_count() -> None:
    assert digest("ab", b"c") == digest(b"ab", "c")
    assert len({digest("ab", "c"), digest("a", "bc"), digest("c", "ab"), digest("abc")}) == 4
    collected = Digest()
    for part in ("ab", "c"):
        collected.add(part)
    assert collected.hex() == digest("ab", "c") and len(collected.hex()) == 32


def test_known_values() -> None:
    """They are part of files on disk."""
    assert digest("a") == "fc9c942180a48b1bfa36938828a429dc"
    assert json_digest({"b": 1, "a": [2]}) == json_digest({"a": [2], "b": 1}) == digest('{"a": [2], "b": 1}')
    assert (hash64(b"a"), hash64(b"")) == (3405396810240292928, 13020603013274838756)
