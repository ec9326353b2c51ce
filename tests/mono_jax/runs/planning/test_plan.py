"""Plans of a tiny model's own step: their contents, what does not fit, what is assumed."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import pytest

from mono_jax.errors import ConfigError
from mono_jax.hlo.facts import facts
from mono_jax.runs import plan
from mono_jax.runs.planning import compiled, pixels, table
from mono_jax.runs.planning.needs import Memory
from mono_jax.runs.planning.targets import target
from mono_jax.runs.planning.workload import workload
from mono_jax.runs.program import Program, check_columns
from mono_jax.training.chips import CHIPS
from mono_jax.training.flops import count_tokens, step_flops
from mono_jax.training.loss import VOCABULARY_MULTIPLE

from ...helpers import SPEC

KEYS = {
    *("target", "devices", "mesh", "fits", "hbm_bytes_per_device", "hbm_limit", "argument_bytes", "temp_bytes"),
    *("flops_per_step", "collective_bytes", "compute_s", "memory_s", "collective_s", "exposed_collective_s", "bound"),
    *("roofline_mfu", "tokens_per_step", "samples_per_s", "days_for_stage", "compile_s"),
}


def values(**changes: Any) -> dict[str, Any]:
    data = {
        "sources": [{"spec": {"kind": "tar", "paths": "nowhere/*.tar"}}],
        "tokenizer": "nowhere",
        "max_tiles": 1,
        "batch_size": 8,
        "visual_tokens": 64,
        "text_tokens": 64,
        **changes.pop("data", {}),
    }
    return {"stage": "S1.1", "steps": 50, "model": {"preset": "tiny_mono"}, "data": data} | changes


def planned(name: str, config: dict[str, Any], **options: Any) -> dict[str, Any]:
    try:
        return plan.run(config, name, **options)
    except ConfigError as error:
        if "pip install" in str(error):
            pytest.skip(str(error))
        raise


@pytest.mark.parametrize("name", ["cpu:8", "v5e:2x2", "h200:1x8x1"])
def test_a_plan_of_the_step_itself(name: str):
    on_device = {"pixel_path": "device", "crop_size": 64} if name == "v5e:2x2" else {}
    found = planned(name, values(mesh={"fsdp": 4}, execution={"remat": "full"}, data=on_device))
    assert found.keys() >= KEYS
    assert found["fits"] is True
    assert found["argument_bytes"] + found["temp_bytes"] <= found["hbm_bytes_per_device"]
    assert found["tokens_per_step"] == 8 * 128
    assert found["samples_per_row"] == 4  # images of 16 tokens
    assert found["mesh"] == {"data": 1 if name == "v5e:2x2" else 2, "fsdp": 4, "context": 1, "tensor": 1}
    assert found["collective_bytes"]["all-gather"] > 0
    kernels = {
        "cpu:8": ("xla", ""),
        "v5e:2x2": ("pallas_tpu 128", "of 15.8 "),
        "h200:1x8x1": ("mosaic_gpu", "of 105.8 "),
    }
    kernel, limit = kernels[name]
    assert found["needs"] == f"attention {kernel}, experts static, remat full, bfloat16, 0.0 {limit}GiB"
    if name == "cpu:8":
        assert found["step_s"] is None and found["hbm_limit"] is None  # no data sheet, no guess
    else:
        assert 0 < found["roofline_mfu"] < 1
        assert found["step_s"] >= max(found["compute_s"], found["exposed_collective_s"])
        assert found["days_for_stage"] == pytest.approx(50 * found["step_s"] / 86400)
        assert found["samples_per_s"] == pytest.approx(8 * 4 / found["step_s"])
        assert not any("unknown" in line for line in found["assumptions"])
    assert any("MFU" in line for line in table.lines(found)) == (name != "cpu:8")
    assert any("tiles made before each step" in line for line in table.lines(found)) == bool(on_device)
    # Two rows per device, with 4 tiles of 32 pixels from crops of 64, to three digits.
    assert found["pixels_flops"] == (
        pytest.approx(2 * 4 * 3 * 6 * 64 * 32 * (64 + 32), rel=0.05) if on_device else None
    )


def test_tiles_made_on_the_device_are_part_of_the_plan():
    """The memory of their program covers its inputs, and the ranking by arithmetic counts what the compiler counts."""
    devices = target("cpu:8").devices[:2]
    config = plan.run_config(values(data={"pixel_path": "device", "crop_size": 64}, mesh={"data": 1, "fsdp": 2}))
    program = Program.build(config, devices=devices)
    tiles = pixels.compile_tiles(program)
    brought = sum(math.prod(a.sharding.shard_shape(a.shape)) for a in pixels.abstract_crops(program).values())
    found = compiled.memory_of(tiles)
    # Pixels are bytes; starts and weights, which are int32, and the cells come on top.
    assert found.arguments > brought and found.arguments > 4 * 4 * 64 * 64 * 3
    assert facts(tiles.as_text()).flops == pytest.approx(pixels.flops_of(program), rel=0.05)
    step = Memory(1000, 50, 10)
    both = pixels.with_step(step, tiles)
    assert both == Memory(1000 + found.arguments, max(50, found.temporaries), 10 + found.others)
    assert pixels.with_step(step, None) == step
    exact = Program.build(plan.run_config(values(mesh={"data": 1, "fsdp": 2})), devices=devices)
    assert (pixels.compile_tiles(exact), pixels.flops_of(exact)) == (None, 0.0)
    with pytest.raises(ConfigError, match=r"data.pixel_path='device' .* mesh.context splits rows: use 'exact'"):
        check_columns(config.data, program.model.config, 2)


def test_the_compiled_step_s_memory_and_work():
    """Arguments are the state's and batch's shards; FLOPs count each microbatch and layer as often as it runs."""
    devices = target("cpu:8").devices[:2]
    config = plan.run_config(values(grad_accum_steps=4, mesh={"data": 1, "fsdp": 2}))
    program = Program.build(config, devices=devices)
    executable = program.compile_step()
    leaves = jax.tree.leaves((program.abstract_state(), program.abstract_batch()))
    arguments = sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)
    assert compiled.memory_of(executable).arguments == pytest.approx(arguments, rel=0.02)
    work = workload(program, samples_per_row=1)
    layers, d, pairs = 2, 64, work.slots * (work.slots + 1) / 2
    dense = work.flops - work.rows * layers * 12 * d * pairs
    # XLA's attention multiplies all pairs of slots: two matmuls forward and five backward (scores are recomputed).
    attention = work.rows * layers * 14 * d * work.slots**2
    # The head's columns are padded where fsdp splits it: in its forward product and in that of its input gradient.
    filled = 4 * d * (-program.model.config.vocab_size % VOCABULARY_MULTIPLE) * config.data.batch_size * 64
    assert 2 * facts(executable.as_text()).flops == pytest.approx(dense + attention + filled, rel=2e-3)


def test_useful_work_is_what_training_counts():
    """A batch of full rows of equal samples has the FLOPs of the workload."""
    program = Program.build(plan.run_config(values(data={"batch_size": 2})), devices=jax.devices()[:1])
    batch = SPEC.empty(2)
    batch["segments"][:], batch["positions"][:] = 1, range(SPEC.sequence)
    counts = count_tokens(batch)
    assert (counts["visual"], counts["text"]) == (2 * SPEC.visual_tokens, 2 * SPEC.text_tokens)
    sized = values(data={"batch_size": 2, "visual_tokens": SPEC.visual_tokens, "text_tokens": SPEC.text_tokens})
    program = Program.build(plan.run_config(sized), devices=jax.devices()[:1])
    trained = frozenset(("visual_embedding", "visual_experts"))
    assert workload(program, 1).flops == pytest.approx(step_flops(program.model.config, trained, counts))


@pytest.mark.parametrize("samples", [0, -1, 1e9])
def test_samples_that_no_row_holds(samples: float):
    with pytest.raises(ConfigError, match="samples_per_row"):
        plan.run(values(), "cpu:8", samples_per_row=samples)


@pytest.mark.parametrize("at", ["after", "while"])
def test_what_does_not_fit_is_a_result(at: str, monkeypatch: pytest.MonkeyPatch):
    """GPU compilers do not reject programs that are too large; TPU compilers do."""
    hardware = dataclasses.replace(target("cpu:8"), chip=dataclasses.replace(CHIPS["H100"], hbm_bytes=1000))
    config = plan.run_config(values(model={"preset": "tiny_lm"}, stage="S0", data={"visual_tokens": 0}))
    program = Program.build(config, devices=hardware.devices)
    if at == "while":
        message = "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 21.5G of 15.75G hbm.\nmore"

        def refuse(_: Program) -> None:
            raise jax.errors.JaxRuntimeError(message)

        monkeypatch.setattr(Program, "compile_step", refuse)
    found = compiled.plan(program, hardware, workload(program))
    assert found["fits"] is False
    assert found["hbm_bytes_per_device"] > found["hbm_limit"] == 1000
    assert ("GiB per device" if at == "after" else "Ran out of memory") in found["reason"]
    assert found.keys() >= KEYS
    printed = list(table.lines(found))
    assert any(line.startswith("refused") for line in printed) and not any("()" in line for line in printed)


def test_a_program_that_cannot_be_read_still_has_its_memory(monkeypatch: pytest.MonkeyPatch):
    """A libtpu may write operations that an older jaxlib does not know (observed with v5p: 3-operand async updates)."""

    def unread(_: Any) -> str:
        raise jax.errors.JaxRuntimeError("INTERNAL: RET_CHECK failure: async-update instruction\nmore")

    monkeypatch.setattr(jax.stages.Compiled, "as_text", unread)
    found = planned("cpu:8", values(model={"preset": "tiny_lm"}, stage="S0", data={"visual_tokens": 0}))
    assert found.keys() >= KEYS and found["argument_bytes"] > 0 and found["step_s"] is None
    lines = list(table.lines(found))
    assert any("cannot read" in line and "async-update" in line for line in lines)


@pytest.mark.parametrize(
    ("message", "size"),
    [
        (
            "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 21.50G of 15.75G hbm.",
            21.5,
        ),
        ("E1000: the total memory required for HLO temporaries (3.00T) exceeds available HBM (15.75G)", 3072),
        ("INVALID_ARGUMENT: something else", None),
    ],
)
def test_what_the_compiler_says_it_needs(message: str, size: float | None):
    refused = compiled._refused(f"{message}\nmore", 1.0)
    assert refused["hbm_bytes_per_device"] == (None if size is None else int(size * (1 << 30)))
    assert refused["fits"] is False
    assert message in refused["reason"]


@pytest.mark.parametrize(
    ("seconds", "text"), [(2.37, "2.370 s"), (0.1, "0.100 s"), (0.0042, "4.2 ms"), (28e-6, "28 us"), (0.0, "0 us")]
)
def test_short_steps_are_no_zeros(seconds: float, text: str):
    assert table._span(seconds) == text


def test_a_stage_of_several_needs_no_sets():
    sequence = {
        "sets": {"kind": "demo"},
        "vision": {"hidden_size": 32, "patch_size": 4, "image_size": 32},
        "data": {"batch_size": 8, "visual_tokens": 16, "text_tokens": 16, "max_tiles": 1},
        "attention_experts": True,
        "stages": {
            "s0": {"stage": "S0", "steps": 3, "model": {"preset": "tiny_lm"}},
            "s1": {"stage": "S1.1++", "epochs": 2, "model": {}},
        },
    }
    found = plan.run_config(sequence, "s1")
    assert found.stage == "S1.1++"
    assert found.model["visual_attention_experts"] is True
    assert found.epochs == 2
    assert plan.run_config(sequence).stage == "S0"
    with pytest.raises(ConfigError, match="s1"):
        plan.run_config(sequence, "s3")
    with pytest.raises(ConfigError, match="one stage only"):
        plan.run_config(values(), "s1")
    del sequence["stages"]["s0"]  # as in a sequence that starts from a model folder
    with pytest.raises(ConfigError, match=r"config\.init is empty.* config\.common\.model\.preset"):
        plan.run_config(sequence)
    assert plan.run_config({**sequence, "common": {"model": {"preset": "tiny_lm"}}}).stage == "S1.1++"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": {"visual_tokens": 60}}, r"data\.visual_tokens is 60: with mesh\.context 4 .* a multiple of 8"),
        ({"data": {"text_tokens": 68}}, r"data\.text_tokens is 68: .* a multiple of 8"),
        (
            {"stage": "full", "model": {"preset": "tiny_modular"}},
            r"data\.visual_tokens is 64: .* of tiles of 16 slots .* of 128",
        ),
        (
            {"execution": {"context_parallel": "ulysses"}},
            r"mesh\.context 4 must divide the 2 key heads that a device has with mesh\.tensor 1",
        ),
    ],
)
def test_rows_that_devices_cannot_share_are_refused(changes: dict[str, Any], message: str):
    with pytest.raises(ConfigError, match=message):
        Program.build(plan.run_config(values(mesh={"context": 4}, **changes)), devices=jax.devices())
