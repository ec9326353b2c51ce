from __future__ import annotations

from typing import Any

import pytest

from mono_jax.errors import ConfigError
from mono_jax.runs.planning import scaling
from mono_jax.runs.planning.targets import Target

from .test_plan import values
from .test_search import absent


def test_a_table_has_every_stage_and_pod_and_sums_days(monkeypatch: pytest.MonkeyPatch):
    hardware = absent("v5e:2x2")

    def found(name: str) -> Target:
        if name.startswith("h100"):
            raise ConfigError("CUDA compiler: not here")
        return hardware

    monkeypatch.setattr(scaling, "target", found)
    monkeypatch.setattr(scaling, "SAMPLES", {"S1.1": 86400e3, "S2": 1e3})
    speeds = {"fits": True, "roofline_mfu": 0.5, "samples_per_s": 1000.0, "hbm_bytes_per_device": 1 << 30}
    entry = {"mesh": {"data": 1, "fsdp": 4, "tensor": 1}, "grad_accum_steps": 1, "remat": "full", "batch_size": 8}
    entry |= {"visual_tokens": 64, "text_tokens": 64, **speeds}
    asked = []

    def searched(run: Any, target: Target, samples: None, compile_best: int, batch_samples: float) -> dict[str, Any]:
        asked.append((run.stage, compile_best))
        real = {"roofline_mfu": 0.25, "samples_per_s": 500.0} if compile_best else {}
        return {**speeds, **real, "search": {"candidates": [entry]}}

    monkeypatch.setattr(scaling, "search", searched)
    preset = {"preset": "tiny_mono_1_5"}
    lines = list(scaling.table(lambda stage: values(stage=stage, model=preset), ["S1.1@v5e-256"]))
    assert asked.count(("S1.1", 1)) == 1 and asked.count(("S1.1", 0)) == 2
    rows = [line for line in lines if "@" not in line and line.startswith(("| S1", "| S2"))]
    assert len(rows) == 2 * 2 * 4
    assert sum("not made: CUDA compiler" in row for row in rows) == 4
    assert "| 2.00 | compiled |" in rows[0] and "| 1.00 | arithmetic |" in rows[1]
    (summed,) = (line for line in lines if line.startswith("| EViP S1 |"))
    assert summed == "| EViP S1 | 2.0 | 1.0 | 1.0 | 16 |"
    (plus,) = (line for line in lines if line.startswith("| EViP++ S1 |"))
    assert plus == "| EViP++ S1 | 0.4 | 0.4 | 0.4 |  |"


def test_a_row_that_is_none():
    with pytest.raises(ConfigError, match="is not a row of the table"):
        list(scaling.table(lambda stage: values(stage=stage), ["S1.1@moon"]))
