from __future__ import annotations

import pytest

from mono_jax.errors import ConfigError
from mono_jax.training.stages import get_stage


def test_a_misspelt_stage_names_the_nearest():
    with pytest.raises(ConfigError, match=r"did you mean 'S1\.3'"):
        get_stage("S1.4")
