from __future__ import annotations

from collections.abc import Iterator

import jax
import pytest


@pytest.fixture
def every_program_is_kept() -> Iterator[None]:
    """However little time it took to compile."""
    before = jax.config.jax_persistent_cache_min_compile_time_secs
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    yield
    jax.config.update("jax_persistent_cache_min_compile_time_secs", before)
