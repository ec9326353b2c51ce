"""Compiles the GPU kernels with the real compilers for an absent Hopper GPU, and inspects the result.

    Mosaic GPU   XLA:GPU's deviceless topology (needs the plugin of ``jax[cuda13]``, no GPU) -> PTX, ptxas log
    Triton       Triton's own compiler for compute capability 9.0 -> cubin

``facts`` of a kernel are registers per thread, bytes spilled, bytes of shared memory, the numbers of tensor-core
(HGMMA) and bulk-copy (UTMALDG) instructions, and the compiler's warnings. ``require_good`` rejects kernels that would
run slowly.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import absent
from pallas_kernels.checks.aot import KERNEL_CALLS, AotCheck, compile_ffn, expect_calls
from pallas_kernels.errors import Unavailable

TARGET = "h200"
MAX_SHARED_BYTES = 232_448  # per block, cudaDevAttrMaxSharedMemoryPerBlockOptin of compute capability 9.0
# ptxas's advisories on serialised wgmma instructions, and on setmaxnreg without effect.
_SLOW_WARNINGS = ("C7504", "C7508", "C7510", "C7511", "C7512", "C7513", "C7514")
# (rows, d, ff): the FFN of the 2B model and of a 7B model (Mono-InternVL table of models).
SHAPES = {"2b": (4096, 2048, 8192), "7b": (4096, 4096, 14336)}


def h200s(count: int) -> list[jax.Device]:
    """Described, absent H200s of one machine; ``Unavailable`` without the CUDA plugin."""
    return absent.gpus(TARGET, f"1x{count}x1")


# ======================================================================================================================
# Mosaic GPU
# ======================================================================================================================


def compile_for_h200(implementation: Any, trained: str, shape: str, *, gpus: int = 1) -> jax.stages.Compiled:
    """The FFN's forward and backward in bfloat16, blocks of 128 rows, on one H200 or a mesh of several.

    Args:
      implementation: as for ``modality_ffn``.
      trained: "both" or "visual".
      shape: key of SHAPES, whose number of rows is that of each shard.
      gpus: 1, or an even number for ``sharded_ffn`` with two shards of columns.

    Raises:
      Unavailable: the CUDA plugin is not installed.
    """
    rows, d, ff = SHAPES[shape]
    sizes = {"rows": rows * max(gpus // 2, 1), "d": d, "ff": ff, "block": 128, "dtype": jnp.bfloat16}
    return compile_ffn(h200s(gpus), implementation, trained=trained, **sizes)


@contextmanager
def dumped() -> Iterator[Path]:
    """A folder in which Mosaic GPU's compiler leaves PTX and logs."""
    before = os.environ.get("MOSAIC_GPU_DUMP_TO")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["MOSAIC_GPU_DUMP_TO"] = folder
        try:
            yield Path(folder)
        finally:
            if before is None:
                del os.environ["MOSAIC_GPU_DUMP_TO"]
            else:
                os.environ["MOSAIC_GPU_DUMP_TO"] = before


def _sass(ptx: Path) -> str:
    """Machine code of a PTX file; "" if jax's assembler or Triton's disassembler is not installed."""
    assembler, disassembler = _package("nvidia") / "cu13/bin/ptxas", _triton_tool("nvdisasm")
    if not (assembler.is_file() and disassembler.is_file()):
        return ""
    cubin = ptx.with_suffix(".cubin")
    _run(assembler, "-arch=sm_90a", "-o", cubin, ptx)
    return _run(disassembler, "-c", cubin)


def _package(name: str) -> Path:
    """Folder of an installed package (it need not exist)."""
    spec = importlib.util.find_spec(name)
    return Path(next(iter(spec.submodule_search_locations))) if spec else Path("absent")


def _triton_tool(name: str) -> Path:
    return _package("triton") / "backends" / "nvidia" / "bin" / name


def mosaic_facts(log: Path) -> dict[str, Any]:
    text, ptx, passes = log.read_text(), log.with_suffix(".ptx").read_text(), log.with_suffix(".mlir-passes.log")
    sass = _sass(log.with_suffix(".ptx"))
    shared = re.search(r"dynamic_shared_memory_size %c(\d+)_i32", passes.read_text())
    return {**_resources(text), "shared_bytes": int(shared[1]) if shared else 0, **_instructions(sass, ptx)}


def _resources(log: str) -> dict[str, Any]:
    """What ptxas reports about one kernel."""
    return {
        "registers": int(re.search(r"Used (\d+) registers", log)[1]),
        "spill_bytes": sum(int(n) for n in re.findall(r"(\d+) bytes spill", log)),
        "warnings": sorted({code for code in re.findall(r"\((C75\d\d)\)", log) if code in _SLOW_WARNINGS}),
    }


def _instructions(sass: str, ptx: str) -> dict[str, Any]:
    """Numbers of tensor-core and bulk-copy instructions, from machine code if available."""
    patterns = (r"\bHGMMA", r"\bUTMALDG") if sass else (r"wgmma\.mma_async", r"cp\.async\.bulk\.tensor\.\dd\.shared")
    counts = {name: len(re.findall(p, sass or ptx)) for name, p in zip(("HGMMA", "UTMALDG"), patterns)}
    return counts | {"instructions_from": "sass" if sass else "ptx"}


def require_good(kernel: str, facts: Mapping[str, Any], *, bulk_copies: bool) -> Mapping[str, Any]:
    """The facts; raises RuntimeError if the kernel spills, overflows shared memory or lacks the fast instructions."""
    faults = []
    if facts["spill_bytes"]:
        faults.append(f"{facts['spill_bytes']} bytes of registers spilled")
    if facts["shared_bytes"] > MAX_SHARED_BYTES:
        faults.append(f"{facts['shared_bytes']} bytes of shared memory, {MAX_SHARED_BYTES} are available")
    if not facts["HGMMA"]:
        faults.append("no wgmma (HGMMA)")
    if bulk_copies and not facts["UTMALDG"]:
        faults.append("no TMA loads (UTMALDG)")
    if facts["warnings"]:
        faults.append(f"ptxas warnings {', '.join(facts['warnings'])}")
    if faults:
        raise RuntimeError(f"{kernel} for {TARGET}: {'; '.join(faults)}")
    return facts


def mosaic_checks() -> list[AotCheck]:
    """The FFN's forward and backward with both and with one expert trained, at the shapes of the 2B and 7B models.

    On one GPU (with the facts of the kernels), and at the 2B shape on a mesh of eight (with the same number of calls).
    """
    from pallas_kernels.experts.backends.mosaic import MosaicGpu

    def run(trained: str, shape: str) -> Mapping[str, Any]:
        with dumped() as folder:
            compiled = compile_for_h200(MosaicGpu(), trained, shape)
            # Kernels compiled earlier in this process are not included.
            kernels = {log.stem: mosaic_facts(log) for log in sorted(folder.glob("*.ptxas"))}
        for name, facts in kernels.items():
            require_good(name, facts, bulk_copies=True)
        return {"kernel_calls": expect_calls(compiled, trained), "kernels": kernels}

    def run_on_mesh(trained: str) -> Mapping[str, Any]:
        compiled = compile_for_h200(MosaicGpu(), trained, "2b", gpus=8)
        temporary = compiled.memory_analysis().temp_size_in_bytes
        return {"kernel_calls": expect_calls(compiled, trained), "temporary_bytes": temporary}

    cases = [("both", "2b"), ("visual", "2b"), ("both", "7b")]
    on_one = [AotCheck(TARGET, f"ffn {shape}, {t} trained", functools.partial(run, t, shape)) for t, shape in cases]
    return on_one + [
        AotCheck(TARGET, f"ffn 2b on a 4x2 mesh, {t} trained", functools.partial(run_on_mesh, t)) for t in KERNEL_CALLS
    ]


# ======================================================================================================================
# Triton
# ======================================================================================================================


def compile_launch(launch: Any, inputs: Sequence[jnp.dtype]) -> dict[str, Any]:
    """Facts of one Triton launch compiled for compute capability 9.0.

    Args:
      launch: a ``pallas_kernels.experts.backends.triton.Launch``.
      inputs: dtypes of the kernel's inputs.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from pallas_kernels.experts.backends.triton import compilable

    names = {"bfloat16": "*bf16", "float32": "*fp32", "int32": "*i32"}
    arrays = [names[jnp.dtype(d).name] for d in (*inputs, *(out.dtype for out in launch.outputs))]
    constants, kernel = dict(launch.constants), compilable(launch.kernel)
    signature = dict(zip(kernel.arg_names, [*arrays, *["constexpr"] * len(constants)], strict=True))
    source = ASTSource(
        kernel,
        signature,
        {(kernel.arg_names.index(name),): value for name, value in constants.items()},
        {(i,): [["tt.divisibility", 16]] for i in range(len(arrays))},  # jax's buffers are aligned
    )
    options = {"num_warps": launch.blocks.warps, "num_stages": launch.blocks.stages, "enable_fp_fusion": True}
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        usage = _run(_triton_tool("cuobjdump"), "--dump-resource-usage", cubin)
        sass = _run(_triton_tool("nvdisasm"), "-c", cubin)
    return {
        "registers": int(re.search(r"REG:(\d+)", usage)[1]),
        # Triton does not pass on ptxas's log; with every array in registers, everything on the stack was spilled.
        "spill_bytes": sum(int(n) for n in re.findall(r"(?:STACK|LOCAL):(\d+)", usage)),
        "warnings": [],
        "shared_bytes": compiled.metadata.shared,
        **_instructions(sass, ""),
    }


def _run(tool: Path, *arguments: Any) -> str:
    """The output of a command."""
    command = [tool, *arguments]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True).stdout


def triton_launches(shape: str, dtype: jnp.dtype = jnp.bfloat16) -> dict[str, tuple[Any, list[jnp.dtype]]]:
    """{name: (launch, input dtypes)} of the kernels of an FFN's forward and backward, at a shape of ``SHAPES``."""
    from pallas_kernels.experts.backends.triton import Product, Triton, plan, plan_weight_gradient

    rows, d, ff = SHAPES[shape]
    array = functools.partial(jax.ShapeDtypeStruct, dtype=dtype)
    x, h = array((rows, d)), array((rows, ff))
    into, out_of = (array((d, ff)),) * 2, (array((ff, d)),) * 2
    source = jax.ShapeDtypeStruct((rows,), jnp.int32)
    tuned, block = Triton(), 128
    full = dtype == jnp.float32
    product, gate_up, backward, gradient = (
        tuned.float32 if full else blocks for blocks in (tuned.product, tuned.gate_up, tuned.backward, tuned.gradient)
    )
    grouped = functools.partial(plan, rows=rows, out_dtype=dtype, block=block)
    inputs = [dtype] * 2 + [jnp.int32] * 2 + [dtype] * 6
    gathered_x = Product(x, into, weights_second=into, rows=source)
    launches = {
        "swiglu, saved": grouped(gathered_x, blocks=gate_up, swiglu=True, save=True),
        "swiglu": grouped(gathered_x, blocks=gate_up, swiglu=True),
        "down": grouped(Product(h, out_of), blocks=product),
        "swiglu_backward": grouped(Product(x, out_of, saved=(h, h)), blocks=backward, transpose=True),
        "dx": grouped(Product(h, into, x_second=h, weights_second=into), blocks=product, transpose=True),
    }
    gradients = {
        "weight_gradient": plan_weight_gradient(d, ff, jnp.float32, block=block, blocks=gradient),
    }
    return {name: (launch, inputs) for name, launch in launches.items()} | {
        name: (launch, [dtype, dtype, jnp.int32, jnp.int32]) for name, launch in gradients.items()
    }


def triton_checks() -> list[AotCheck]:
    """Every kernel of an FFN's forward and backward in bfloat16; with the CUDA plugin, the whole program too."""

    def run(shape: str) -> Mapping[str, Any]:
        if importlib.util.find_spec("triton") is None:
            raise Unavailable("Triton's compiler: triton is not installed (pip install triton)")
        kernels = {
            name: require_good(name, compile_launch(*launch), bulk_copies=False)
            for name, launch in triton_launches(shape).items()
        }
        return {"kernel_calls": _triton_calls(shape), "kernels": kernels}

    return [AotCheck(TARGET, f"ffn {shape}", functools.partial(run, shape)) for shape in SHAPES]


def _triton_calls(shape: str) -> dict[str, int] | str:
    """Kernel calls of an FFN's gradient by trained experts, or why jax-triton cannot compile it here."""
    from pallas_kernels.experts.backends.triton import Triton

    try:
        return {t: expect_calls(compile_for_h200(Triton(), t, shape), t) for t in KERNEL_CALLS}
    except Unavailable as reason:
        return str(reason)
