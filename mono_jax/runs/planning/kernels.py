"""The work of attention kernels inside a compiled step, which only their authors know.

A kernel visits blocks of queries and keys; what it visits depends on the layout of the rows, which a program does not
hold: the workload's samples stand in for it. ``SHARES`` says how much of the chip's peak a kernel reaches at most while
it works on a block: useful FLOPs of a block over the cycles of its static schedule, which the compiler prints.
"""

from __future__ import annotations

import dataclasses
import re

from mono_jax.hlo.module import Computation, Instruction
from mono_jax.hlo.roofline import Work
from mono_jax.runs.planning.workload import Workload
from mono_jax.runs.program import Program


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One attention kernel.

    Attributes:
      name: regular expression of its name in compiled programs.
      phase: "forward", "dq", "dkv" or "backward" (dq and dkv in one).
      block: key of its block size in the kernel's metadata.
      skips: whether it passes over blocks that hold only other samples (else only over those above the diagonal).
    """

    name: str
    phase: str
    block: str
    skips: bool


KERNELS = (
    Kernel(r"splash_mha_fwd", "forward", "block_q", skips=False),
    Kernel(r"splash_mha_dq", "dq", "block_q_dq", skips=False),
    Kernel(r"splash_mha_dkv", "dkv", "block_q_dkv", skips=False),
)
MATMULS = {"forward": 2, "dq": 3, "dkv": 4, "backward": 5}
# {key of a chip's tuning table: {phase: {block: share}}}; from LIBTPU_INIT_ARGS="--xla_jf_dump_to=DIR
# --xla_jf_dump_llo_text=true" and the bundles of *final_hlo-static-per-bundle-utilization.txt (S 8,192, 16 query and 8
# key heads of 128, bfloat16, libtpu 0.0.52).
SHARES = {
    "tpu_v5e": {
        "forward": {128: 0.091, 512: 0.478, 1024: 0.604},
        "dq": {128: 0.189, 512: 0.814, 1024: 0.965},
        "dkv": {128: 0.235, 512: 0.835, 1024: 1.0},
    },
}


@dataclasses.dataclass(frozen=True)
class AttentionWork:
    """``roofline.Kernels`` for the attention of one workload on one chip (a key of a tuning table)."""

    workload: Workload
    chip: str

    def __call__(self, computation: Computation, instruction: Instruction) -> Work | None:
        kernel = next((k for k in KERNELS if re.search(k.name, instruction.name)), None)
        if kernel is None:
            return None
        shaped = [array for array in computation.arrays(instruction) if len(array.dims) >= 3 and array.dtype != "s8"]
        query = max(shaped, key=lambda array: array.size)
        *rows, heads, length, dim = query.dims
        found = re.search(rf"{kernel.block}\W*?(\d+)", instruction.attributes)
        block = int(found[1]) if found else 1
        calls = 1
        for size in rows:
            calls *= size
        flops = calls * MATMULS[kernel.phase] * 2.0 * heads * dim * self._pairs(length, block, kernel.skips)
        return Work(flops, 0.0, self._share(kernel.phase, block))

    def step_seconds(self, program: Program, rows: float, peak: float, *, twice: bool) -> float:
        """Seconds of attention in one step of one device without its program.

        Args:
          rows: of the device, a fraction where heads are shared.
          peak: FLOP/s.
          twice: the forward kernel runs again in the backward pass.
        """
        config, slots = program.model.config, self.workload.slots
        block = next((b for b in range(1024, 0, -128) if slots % b == 0), 128)
        phases = ("forward", "forward", "dq", "dkv") if twice else ("forward", "dq", "dkv")
        each = 2.0 * config.num_attention_heads * config.head_dim * self._pairs(slots, block, skips=False)
        layers = rows * config.num_hidden_layers
        return layers * sum(MATMULS[phase] * each / (peak * self._share(phase, block)) for phase in phases)

    def _pairs(self, length: int, block: int, skips: bool) -> float:
        """Pairs of a query and a key in the blocks that are visited."""
        samples = self.workload.samples * length / self.workload.slots if skips else 1.0
        each = length / samples
        return min(samples * each * (each + 2 * block if samples > 1 else each + block) / 2, length * length)

    def _share(self, phase: str, block: int) -> float:
        shares = SHARES.get(self.chip, {}).get(phase, {})
        return shares[min(shares, key=lambda known: abs(known - block))] if shares else 1.0
