"""Estimates compared with the compiler's figures, and searches."""

from __future__ import annotations

from typing import Any

import pytest

from mono_jax.errors import ConfigError
from mono_jax.runs import plan
from mono_jax.runs.planning import compiled, search, table
from mono_jax.runs.planning.arithmetic import Arithmetic
from mono_jax.runs.planning.targets import Target, target
from mono_jax.runs.planning.workload import workload
from mono_jax.runs.program import Program

from .test_plan import values

GIB = 1 << 30
MODEL = {"preset": "mono_internvl_2b"}
ULYSSES = {"context_parallel": "ulysses"}


def absent(name: str) -> Target:
    try:
        return target(name)
    except ConfigError as error:
        pytest.skip(str(error))


def sized(visual: int, text: int, rows: int, parts: int = 1, **changes: Any) -> dict[str, Any]:
    data = {"visual_tokens": visual, "text_tokens": text, "batch_size": rows, "max_tiles": 4}
    return values(model=MODEL, data=data, grad_accum_steps=parts, **changes)


@pytest.mark.parametrize(
    ("name", "config", "remat", "gib"),
    [
        # The compiler's arguments and temporaries, GiB a device (2026-11-26, jax 0.10.2, libtpu 0.0.52).
        ("v5e:4x4", sized(7168, 1024, 384, 24), "full", 1.47 + 2.65),
        ("v5e:4x4", sized(13312, 1024, 384, 24, stage="S1.3"), "full", 1.97 + 4.42),
        ("v5e:4x4", sized(12800, 3584, 384, 24, stage="S2"), "full", 2.87 + 5.66),
        ("v5p:2x2x2", sized(12800, 3584, 384, 48, stage="S2"), "full", 5.72 + 6.76),
        ("h200:1x8x1", sized(7168, 1024, 8), "full", 2.18 + 2.64),
        ("h100:1x8x1", sized(7168, 1024, 8), "dots", 2.18 + 11.46),
        ("h100:1x8x1", sized(7168, 1024, 8), "none", 2.18 + 16.25),
        ("h200:1x8x1", sized(15360, 1024, 8, stage="S1.3"), "names", 2.55 + 7.39),
        ("h200:1x8x1", sized(15360, 1024, 8, stage="S1.3"), "offload", 2.55 + 2.89),
    ],
    ids=lambda value: None if isinstance(value, dict) else str(value),
)
def test_memory_is_within_a_tenth_of_the_compiler_s(name: str, config: dict[str, Any], remat: str, gib: float):
    hardware = absent(name)
    fsdp = min(len(hardware.devices), 16)
    config |= {"mesh": {"fsdp": fsdp}, "execution": {"remat": remat, "loss_chunk": 512}}
    program = Program.build(plan.run_config(config), devices=hardware.devices)
    found = Arithmetic(program, hardware).estimate(program, workload(program))
    assert found.memory / GIB == pytest.approx(gib, rel=0.1)


@pytest.mark.parametrize(
    ("name", "config", "mesh", "seconds"),
    [
        # The bounds of compiled steps (2026-11-26, jax 0.10.2, libtpu 0.0.52).
        ("v5e:4x4", sized(7168, 1024, 16), {"fsdp": 16}, 0.611),
        ("v5e:4x4", sized(40_960, 4096, 4), {"fsdp": 4, "context": 4}, 1.251),
        ("v5e:4x4", sized(40_960, 4096, 4, execution=ULYSSES), {"fsdp": 4, "context": 4}, 0.989),
        ("h200:1x8x1", sized(7168, 1024, 8), {"fsdp": 8}, 0.159),
        ("h200:1x8x1", sized(40_960, 4096, 2), {"fsdp": 2, "context": 4}, 0.239),
        ("h200:1x8x1", sized(40_960, 4096, 2, execution=ULYSSES), {"fsdp": 2, "context": 4}, 0.231),
    ],
    ids=lambda value: None if isinstance(value, dict) else str(value),
)
def test_time_is_near_the_compiled_step_s(name: str, config: dict[str, Any], mesh: dict[str, int], seconds: float):
    hardware = absent(name)
    execution = {"remat": "full", "loss_chunk": 512} | config.get("execution", {})
    config = config | {"mesh": mesh, "execution": execution}
    program = Program.build(plan.run_config(config), devices=hardware.devices)
    found = Arithmetic(program, hardware).estimate(program, workload(program))
    assert found.step_s == pytest.approx(seconds, rel=0.05)


@pytest.mark.parametrize(
    ("stage", "remat", "text", "samples", "seconds", "gib"),
    [
        ("S1.1", "full", 1024, 1, 0.909, 29.0),
        ("S2", "full", 1024, 1, 0.985, 53.3),
        ("S1.1", "none", 1024, 1, 0.827, 83.3),
        ("S1.1", "names", 1024, 1, 0.924, 34.8),
        ("S1.1", "none", 896, 7, 0.606, 82.6),
    ],
)
def test_a_plan_beside_what_an_h200_did(stage: str, remat: str, text: int, samples: int, seconds: float, gib: float):
    """4 rows, ``experiments/benchmarks/train_step.py`` (2026-11-26, jax 0.11.2): the bound holds and is not loose."""
    hardware = absent("h200:1x1x1")
    config = sized(7168, text, 4, stage=stage, execution={"remat": remat})
    program = Program.build(plan.run_config(config), devices=hardware.devices)
    found = Arithmetic(program, hardware).estimate(program, workload(program, samples))
    assert found.memory / GIB == pytest.approx(gib, rel=0.02)
    assert 0.75 * seconds < found.step_s < seconds


def test_what_costs_memory_and_what_saves_it():
    """These determine the order of candidates: saving more takes more memory and less time."""
    hardware = absent("v5e:4x4")

    def of(**changes: Any) -> Any:
        config = sized(7168, 1024, 32, changes.pop("parts", 1), mesh={"fsdp": 16, **changes.pop("mesh", {})})
        config["execution"] = {"remat": changes.pop("remat", "full"), "attention": "splash"}
        program = Program.build(plan.run_config(config), devices=hardware.devices)
        return Arithmetic(program, hardware).estimate(program, workload(program))

    full, dots, none = (of(remat=remat) for remat in ("full", "dots", "none"))
    assert full.memory < dots.memory < none.memory
    assert full.compute_s > dots.compute_s == none.compute_s
    parts = of(parts=2)
    assert parts.temporaries < full.temporaries and parts.arguments == full.arguments
    assert parts.collective_s == pytest.approx(2 * full.collective_s)
    assert parts.compute_s == pytest.approx(full.compute_s)
    assert of(mesh={"fsdp": 4}).arguments > 2 * full.arguments


def test_a_search_ranks_and_compiles_the_best(monkeypatch: pytest.MonkeyPatch):
    hardware = absent("v5e:2x2")
    run = plan.run_config(values(execution={"attention": "xla"}, mesh={"fsdp": 3}))  # its own mesh does not fit
    made = []

    def remember(program: Program, *rest: Any) -> dict[str, Any]:
        made.append(program)
        return {"fits": len(made) == 2, "hbm_bytes_per_device": 7, "roofline_mfu": 0.5 / len(made)}

    monkeypatch.setattr(compiled, "plan", remember)
    found = search.search(run, hardware, None, 3)
    entries = found["search"]["candidates"]
    assert len(entries) >= 30
    assert [entry["fits"] for entry in entries] == sorted((entry["fits"] for entry in entries), reverse=True)
    counted = [e for e in entries if e["fits"] and e["remat"] != "offload"]
    assert all(e["remat"] == "offload" for e in entries[len(counted) :] if e["fits"])  # its copies are not counted
    fitting = [(-round(e["roofline_mfu"], 3), e["hbm_bytes_per_device"]) for e in counted]
    assert fitting == sorted(fitting)  # among equally fast ones, the smallest first
    assert len({speed for speed, _ in fitting}) < len(fitting)
    axes = {tuple(entry["mesh"].values()) for entry in entries}
    whole = {(4, 1, 1, 1), (2, 2, 1, 1), (1, 4, 1, 1), (2, 1, 2, 1), (1, 2, 2, 1)}  # two key heads: tensor 2 at most
    assert axes == whole  # rows this short are not shared
    for entry, chosen in zip(entries, made):  # the compiled candidates are the ranked ones
        assert dict(chosen.mesh.shape) == entry["mesh"]
        assert chosen.model.execution.remat == chosen.run.execution.remat == entry["remat"]
        assert chosen.run.data.batch_size == entry["batch_size"]
        ways = entry["mesh"]["data"] * entry["mesh"]["fsdp"] * entry["grad_accum_steps"]
        assert entry["batch_size"] % ways == 0
    assert len(made) == 3
    assert found["roofline_mfu"] == 0.25  # the only one of the three that fits
    assert len(list(table.lines({"search": found["search"]}))) == 2 + table.SHOWN


def test_long_rows_may_be_shared():
    """If each device gets whole runs of both modalities and whole lanes of slots."""
    hardware = absent("v5e:2x2")
    program = search._program(plan.run_config(values()), hardware)
    found = search._candidates(program, hardware, [(40_960, 4096, 4), (40_960, 4100, 4), (8192, 1024, 4)])
    shared = {
        (c.run.data.text_tokens, c.run.mesh.context, c.run.mesh.fsdp, c.run.execution.context_parallel)
        for c in found
        if c.run.mesh.context > 1
    }
    # Two heads of keys: four devices cannot exchange them.
    ulysses = {(4096, 2, 1, "ulysses"), (4096, 2, 2, "ulysses")}
    assert shared == ulysses | {(4096, *ways, "all_gather") for ways in ((2, 1), (2, 2), (4, 1))}


def test_no_search_where_no_speed_is_known():
    with pytest.raises(ConfigError, match="the speed of cpu:8 is unknown"):
        plan.run(values(), "cpu:8", compile_best=1)
