"""The work of attention kernels inside a step, which only their authors know.

What a kernel computes depends on the layout of the rows, which a program does not hold: equal samples stand in for it.
``SHARES`` says how much of the chip's peak a kernel reaches at most: useful FLOPs of a block over the cycles of its
static schedule, as the TPU compiler prints them.
"""

from __future__ import annotations

import dataclasses
import functools
import re

import jax.numpy as jnp
import numpy as np

from mono_jax.hlo.module import Computation, Instruction
from mono_jax.hlo.roofline import Work
from mono_jax.runs.planning.needs import attention
from mono_jax.runs.planning.workload import Workload
from mono_jax.runs.program import Program
from pallas_kernels.attention.contract import Implementation, Intervals

# Names of kernels in compiled programs, and what they do: products of two matrices for each pair of a query and a key.
PHASES = {
    r"splash_mha_fwd|packed_attention_forward|fmha(?!.*[Bb]ackward)": "forward",
    r"splash_mha_dq": "dq",
    r"splash_mha_dkv": "dkv",
    r"packed_attention_backward|fmha.*[Bb]ackward": "backward",
}
PRODUCTS = {"forward": 2, "dq": 3, "dkv": 4, "backward": 5}
# {chip: {implementation: {phase: {block: share}}}}. From LIBTPU_INIT_ARGS="--xla_jf_dump_to=DIR
# --xla_jf_dump_llo_text=true", bundles of *final_hlo-static-per-bundle-utilization.txt at one a cycle (S 8,192, 16
# query and 8 key heads of 128, bfloat16, libtpu 0.0.52; v5e: 1.5 GHz).
SHARES: dict[str, dict[str, dict[str, dict[int, float]]]] = {
    "tpu_v5e": {
        "attention/splash": {
            "forward": {128: 0.091, 512: 0.478, 1024: 0.604},
            "dq": {128: 0.189, 512: 0.814, 1024: 0.965},
            "dkv": {128: 0.235, 512: 0.835, 1024: 1.0},
        },
        # While it works on parts of blocks, as it does at the ends of samples; on whole blocks 0.71 and 1.
        "attention/pallas_tpu": {"forward": {512: 0.48}, "backward": {512: 0.82}},
    },
}


@dataclasses.dataclass(frozen=True)
class AttentionWork:
    """Attention of ``workload`` by ``implementation`` on a chip (a key of a tuning table)."""

    implementation: Implementation
    workload: Workload
    chip: str

    @classmethod
    def of(cls, program: Program, workload: Workload, chip: str) -> AttentionWork:
        return cls(attention(program), workload, chip)

    def flops(self, program: Program, phase: str) -> float:
        """Of one layer and microbatch on one device of ``program``'s mesh."""
        config, mesh = program.model.config, program.mesh
        rows = program.run.data.batch_size / mesh.devices.size / program.run.grad_accum_steps
        pairs = visited_pairs(self.implementation, self.workload.slots, self.workload.samples)
        return PRODUCTS[phase] * 2.0 * config.num_attention_heads * config.head_dim * pairs * rows

    def share(self, phase: str) -> float:
        """Of the peak that the kernel can reach; 1 where it is not known: a bound still."""
        shares = SHARES.get(self.chip, {}).get(self.implementation.name, {}).get(phase, {})
        block = _block(self.implementation, self.workload.slots)
        return shares[min(shares, key=lambda known: abs(known - block))] if shares else 1.0

    def step_seconds(self, program: Program, peak: float, *, twice: bool) -> float:
        """Of one step of one device at ``peak``; ``twice``: the forward kernel runs again in the backward pass."""
        split = self.implementation.name.endswith("splash")
        phases = ["forward"] * (1 + twice) + (["dq", "dkv"] if split else ["backward"])
        layers = program.model.config.num_hidden_layers * program.run.grad_accum_steps
        return layers * sum(self.flops(program, phase) / (peak * self.share(phase)) for phase in phases)

    def kernels(self, program: Program, computation: Computation, instruction: Instruction) -> Work | None:
        """``roofline.Kernels``, once the program is given: the work of a kernel in the compiled step."""
        del computation
        names = f"{instruction.name} {instruction.target}"
        phase = next((phase for name, phase in PHASES.items() if re.search(name, names)), None)
        return None if phase is None else Work(self.flops(program, phase), 0.0, self.share(phase))


@functools.cache
def visited_pairs(implementation: Implementation, slots: int, samples: float) -> float:
    """Pairs of a query and a key that are computed of a row of ``slots`` in equal ``samples``, seen or not."""
    name, length, block = implementation.name.rpartition("/")[2], slots / samples, _block(implementation, slots)
    if name in ("xla", "xla_chunked", "cudnn_masked"):  # every pair, then a mask
        return float(slots) ** 2
    if name == "splash":  # below the diagonal, whatever the samples
        return slots * (slots + block) / 2.0
    if name == "pallas_tpu":
        from pallas_kernels.attention.visits import count_pairs

        place = np.arange(slots)
        first = np.ceil(np.floor(place / length) * length)
        intervals = Intervals(*(jnp.asarray(a[None], jnp.int32) for a in (first, place)))
        return float(count_pairs(intervals, implementation.grid(1, slots, slots)))
    return min(slots * (length + 2 * block) / 2.0, float(slots) ** 2)  # of a sample, and what its last blocks overhang


def _block(implementation: Implementation, slots: int) -> int:
    most = getattr(implementation, "block", getattr(implementation, "block_q", 128))
    return next((block for block in range(min(most, slots), 0, -128) if slots % block == 0), 128)
