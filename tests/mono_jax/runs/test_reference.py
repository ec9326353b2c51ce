from __future__ import annotations

from pathlib import Path

import pytest

from data_pipelines import strict
from mono_jax.models.architecture import Architecture
from mono_jax.runs import reference
from mono_jax.runs.config import EvipConfig, RunConfig

DOCUMENT = Path(__file__).parents[3] / "docs" / "config.md"


def test_the_document_is_up_to_date():
    assert DOCUMENT.read_text(encoding="utf-8") == reference.document(), "run python docs/make_config.py"


@pytest.mark.parametrize("cls", [RunConfig, EvipConfig, Architecture])
def test_every_key_has_a_meaning(cls: type):
    rows = list(strict.reference(cls))
    assert len(rows) > 8
    assert [row.key for row in rows if not row.help] == []


def test_help_in_the_terminal_has_every_key():
    text = reference.stage_keys()
    for key in ("stage", "data.sources.NAME.weight", "optim.learning_rate", "mesh.fsdp", "model.vision.patch_size"):
        assert f"\nconfig.{key}: " in f"\n{text}"
    assert "config.stages.NAME.optim.b1: None or a number; at least 0 and below 1" in reference.evip_keys()
    assert all(len(line) <= 400 for line in text.splitlines())
