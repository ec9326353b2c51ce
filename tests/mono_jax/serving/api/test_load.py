"""A load run with malformed and broken-off requests: no crash, no leak, no mixed-up answers."""

from __future__ import annotations

import pytest

pytest.importorskip("fastapi", reason="the extra serve is not installed: pip install '.[serve]'")
pytest.importorskip("aiohttp")

from tests.mono_jax.serving.api.load import load, scripted


def check(found: dict, growth_mib: float) -> None:
    outcomes = found["outcomes"]
    allowed = {"200", "gone", "refused", "malformed 400", "malformed 413", "slow 200", "slow 400"}
    assert set(outcomes) <= allowed, found
    assert outcomes["200"] > 0.85 * found["requests"] and outcomes["malformed 400"] > 0
    # Allocators and caches take their memory in the first tenth.
    assert found["memory_mib"][-1] - found["memory_mib"][0] < growth_mib, found


def test_some_hundred():
    with scripted() as target:
        check(load(target, 600, 32), growth_mib=200)


@pytest.mark.slow
def test_ten_thousand():
    with scripted() as target:
        check(load(target, 10_000, 64), growth_mib=64)  # the megabytes sent by attacks leave holes in heaps
