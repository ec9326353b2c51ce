"""Places that a workdir may have."""

from __future__ import annotations

import pytest

from mono_jax.errors import CheckpointError
from mono_jax.runs.workdir import place_of


@pytest.mark.parametrize("url", ["gs://bucket/run", "s3://bucket/run"])
def test_a_url_is_no_folder_of_that_name(url):
    with pytest.raises(CheckpointError, match=f"{url}: a workdir must be a folder"):
        place_of(url)
