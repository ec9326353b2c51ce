"""Which modules faults are planted in, and which tests should notice."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from pathlib import Path

# The core: what decides the numbers of a run.
CORE = (
    "mono_jax/models/*",
    "mono_jax/training/*",
    "mono_jax/parallel/*",
    "mono_jax/weights/*",
    "data_pipelines/batch",
    "data_pipelines/packing/*",
    "data_pipelines/encoding/*",
    "data_pipelines/loading/*",
)
# Besides the mirrored test file, or in its place where there is none: tests below tests/, quick ones first.
FURTHER: dict[str, tuple[str, ...]] = {
    "mono_jax/models/architecture": ("mono_jax/models/test_transformer.py",),
    "mono_jax/models/attention": ("mono_jax/generation/test_decode.py",),
    "mono_jax/models/cache": ("mono_jax/generation/test_decode.py",),
    "mono_jax/models/execution": ("mono_jax/models/test_transformer.py",),
    "mono_jax/models/layer_ranges": ("mono_jax/training/test_free_groups.py",),
    "mono_jax/models/layers": ("mono_jax/models/test_transformer.py", "experiments/test_parity.py"),
    "mono_jax/models/presets": ("mono_jax/models/test_architecture.py", "mono_jax/models/test_transformer.py"),
    "mono_jax/models/rope": ("mono_jax/models/test_slots.py",),
    "mono_jax/models/transformer": ("mono_jax/models/test_moe.py",),
    "mono_jax/models/vision": ("mono_jax/models/test_transformer.py", "experiments/test_parity.py"),
    "mono_jax/parallel/mesh_config": ("mono_jax/parallel/test_mesh.py",),
    "mono_jax/training/groups": ("mono_jax/training/test_free_groups.py",),
    "mono_jax/training/callbacks/checkpointing": ("faults/test_loop_faults.py",),
    "mono_jax/training/callbacks/recorder": ("faults/test_loop_faults.py",),
    "mono_jax/training/callbacks/stopping": ("faults/test_loop_faults.py", "mono_jax/runs/test_stage.py"),
    "mono_jax/training/loop": ("faults/test_loop_faults.py", "mono_jax/runs/test_stage.py"),
    "mono_jax/training/optim_config": ("mono_jax/training/test_optim.py",),
    "mono_jax/training/stages": ("mono_jax/training/test_groups.py", "mono_jax/training/test_optim.py"),
    "mono_jax/training/state": ("mono_jax/training/test_free_groups.py", "mono_jax/training/test_step.py"),
    "mono_jax/weights/names": ("mono_jax/weights/test_readers.py", "mono_jax/weights/test_writers.py"),
    "data_pipelines/batch": ("data_pipelines/loading/test_assembly.py",),
    "data_pipelines/packing/lengths": ("data_pipelines/loading/test_packed_data.py",),
    "data_pipelines/loading/packed_data": ("data_pipelines/loading/test_assembly.py",),
    "data_pipelines/encoding/chat": ("data_pipelines/encoding/templates/test_jinja.py",),
    "data_pipelines/encoding/templates/template": ("data_pipelines/encoding/test_chat.py",),
    "data_pipelines/encoding/tokenizer": ("data_pipelines/encoding/templates/test_jinja.py",),
    "data_pipelines/encoding/samples": ("data_pipelines/loading/test_assembly.py",),
}
# Too slow to be run for every fault, and no help in finding one.
LEFT_OUT = ("test_stages_fill_97_percent", "compiles_for_several_tpus", "test_bfloat16_is_close")


def modules(root: Path, patterns: Sequence[str]) -> list[str]:
    """Paths of source files below ``root`` that match one of the patterns (without ".py"; a folder means all in it)."""
    files = sorted(
        file for package in ("mono_jax", "data_pipelines", "pallas_kernels") for file in (root / package).rglob("*.py")
    )
    names = [file.relative_to(root).with_suffix("").as_posix() for file in files if file.name != "__init__.py"]
    wanted = [pattern.removesuffix(".py").rstrip("/") for pattern in patterns]
    return [f"{name}.py" for name in names if any(fnmatch.fnmatch(name, w) or name.startswith(f"{w}/") for w in wanted)]


def tests_of(root: Path, module: str) -> list[str]:
    """The test files for ``module``: the mirrored one, then ``FURTHER``, else its room."""
    name = module.removesuffix(".py")
    room, _, leaf = name.rpartition("/")
    mirrored = f"{room}/test_{leaf}.py"
    chosen = [file for file in (mirrored, *FURTHER.get(name, ())) if (root / "tests" / file).is_file()]
    return [f"tests/{file}" for file in chosen or [room]]
