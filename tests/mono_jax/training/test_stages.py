from __future__ import annotations

import pytest

from mono_jax.errors import ConfigError
from mono_jax.training.stages import STAGES, get_stage


def test_a_misspelt_stage_names_the_nearest():
    with pytest.raises(ConfigError, match=r"did you mean 'S1\.3'"):
        get_stage("S1.4")


VISUAL = {"visual_embedding", "visual_experts"}
TABLE = {
    "S0": ({"*"}, 3e-4, "cosine"),
    "S1.1": (VISUAL, 2e-4, "constant"),
    "S1.2": (VISUAL, 1e-4, "constant"),
    "S1.3": (VISUAL | {"attention"}, 5e-5, "cosine"),
    "S2": ({"*"}, 4e-5, "cosine"),
    "delta": (VISUAL, 2e-4, "constant"),
    "full": ({"*"}, 2e-4, "constant"),
    "S1.3-frozen-attention": (VISUAL, 5e-5, "cosine"),
}
PLUS = {f"{name}++": row for name, row in TABLE.items() if name in ("S1.1", "S1.2", "S1.3", "S2")}


def test_defaults_of_the_stages_are_these():
    """A run that names a stage gets these numbers: a change here changes published recipes."""
    found = {
        stage.name: (set(stage.trains) - {"visual_attention"}, stage.learning_rate, stage.schedule)
        for stage in STAGES.values()
    }
    assert found == TABLE | PLUS
    assert {name for name, stage in STAGES.items() if "visual_attention" in stage.trains} == {
        "S1.1++",
        "S1.2++",
        "S1.3++",
    }
    assert {(stage.warmup, stage.weight_decay) for stage in STAGES.values()} == {(0.03, 0.01)}
    assert all(name == stage.name for name, stage in STAGES.items())
