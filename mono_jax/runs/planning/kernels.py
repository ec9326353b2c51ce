"""The work of attention kernels inside a step, which the compiler cannot see.

What a kernel computes depends on the layout of the rows, which a program does not contain, so samples of equal length
are assumed.
``SHARES`` gives the largest share of the chip's peak that a kernel can reach: useful FLOPs of a block over the cycles
of its static schedule, as printed by the TPU compiler, or as measured.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Iterator

import jax.numpy as jnp
import numpy as np

from mono_jax.hlo.module import Computation, Instruction
from mono_jax.hlo.roofline import Work
from mono_jax.models.architecture import Architecture
from mono_jax.parallel.rows import dealt
from mono_jax.runs.planning.needs import attention, ways_of_queries
from mono_jax.runs.planning.workload import Workload
from mono_jax.runs.program import Program
from pallas_kernels.attention.contract import Implementation, Intervals
from pallas_kernels.attention.spans import key_spans, query_spans

# The kernels' phases, and how compiled programs name them: XLA:TPU gives an instruction the kernel's name, and cuDNN's
# calls have the name of JAX's function; Mosaic GPU's kernels can only be told apart by their origin in the traced
# program.
PHASES = {
    "forward": r"splash_mha_fwd|attention_forward|attention_fwd",
    "dq": r"splash_mha_dq|attention_dq",
    "dkv": r"splash_mha_dkv|attention_dkv",
    "backward": r"attention_backward|attention_bwd",
}
# Matrix products for each query-key pair. Each backward kernel recomputes the scores.
PRODUCTS = {"forward": 2, "dq": 3, "dkv": 4, "backward": 5}
SPLIT = ("splash", "mosaic_gpu")  # their backward pass is split into dq and dkv
# {chip: {implementation: {phase: {block: share}}}}. From LIBTPU_INIT_ARGS="--xla_jf_dump_to=DIR
# --xla_jf_dump_llo_text=true", bundles in *final_hlo-static-per-bundle-utilization.txt at one per cycle (S 8,192, 16
# query and 8 key heads of 128, bfloat16, libtpu 0.0.52; v5e: 1.5 GHz). Hopper: measured on an H200 with one sample of
# 16,384 tokens (experiments/benchmarks/kernels; 8 samples of 1,408 tokens reach 0.41 forward and 0.40 backward).
_HOPPER = {"attention/mosaic_gpu": {"forward": {128: 0.55}, "dq": {128: 0.66}, "dkv": {128: 0.66}}}
SHARES: dict[str, dict[str, dict[str, dict[int, float]]]] = {
    "tpu_v5e": {
        "attention/splash": {
            "forward": {128: 0.091, 512: 0.478, 1024: 0.604},
            "dq": {128: 0.189, 512: 0.814, 1024: 0.965},
            "dkv": {128: 0.235, 512: 0.835, 1024: 1.0},
        },
        # For partial blocks, as at the ends of samples; on whole blocks it reaches 0.71 and 1.
        "attention/pallas_tpu": {"forward": {512: 0.48}, "backward": {512: 0.82}},
    },
    "nvidia_h100_80gb_hbm3": _HOPPER,
    "nvidia_h200": _HOPPER,
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
        """FLOPs of one layer and microbatch on one device of ``program``'s mesh."""
        rows = program.run.data.batch_size / program.mesh.devices.size / program.run.grad_accum_steps
        work, ways = self.workload, ways_of_queries(program)
        pairs = visited_pairs(self.implementation, work.visual, work.text, work.samples, ways, phase)
        return flops_of(program.model.config, phase, pairs * rows)

    def share(self, phase: str) -> float:
        """Share of the peak that the kernel can reach; 1 if unknown, which is still a bound."""
        return share(self.implementation, self.workload.slots, self.chip, phase)

    def step_seconds(self, program: Program, peak: float, *, twice: bool) -> float:
        """Seconds of one step on one device at ``peak``; ``twice``: the forward kernel runs again in the backward
        pass."""
        phases = ["forward"] * (1 + twice) + (["dq", "dkv"] if _name(self.implementation) in SPLIT else ["backward"])
        layers = program.model.config.num_hidden_layers * program.run.grad_accum_steps
        return layers * sum(self.flops(program, phase) / (peak * self.share(phase)) for phase in phases)

    def kernels(self, program: Program, computation: Computation, instruction: Instruction) -> Work | None:
        """``roofline.Kernels`` once ``program`` is bound: the work of a kernel in the compiled step."""
        del computation
        phase = phase_of(instruction)
        return None if phase is None else Work(self.flops(program, phase), 0.0, self.share(phase))


def flops_of(config: Architecture, phase: str, pairs: float) -> float:
    """FLOPs of a phase of a layer's attention that computes ``pairs`` query-key pairs, over all heads."""
    return PRODUCTS[phase] * 2.0 * config.num_attention_heads * config.head_dim * pairs


def share(implementation: Implementation, slots: int, chip: str, phase: str) -> float:
    """Share of the chip's peak that a kernel can reach on rows of ``slots``; 1 if unknown, which is still a bound."""
    shares = SHARES.get(chip, {}).get(implementation.name, {}).get(phase, {})
    block = _block(implementation, slots)
    return shares[min(shares, key=lambda known: abs(known - block))] if shares else 1.0


def phase_of(kernel: Instruction) -> str | None:
    """Which of ``PHASES`` a kernel of a compiled program is; None if it is not an attention kernel."""
    names = f"{kernel.name} {kernel.op_name}"
    return next((phase for phase, pattern in PHASES.items() if re.search(pattern, names)), None)


def visited_pairs(
    implementation: Implementation, visual: int, text: int, samples: float, ways: int = 1, phase: str = "forward"
) -> float:
    """Query-key pairs that a phase computes for a row of equal ``samples``, masked ones included.

    Samples have an image, then text. If ``ways`` devices share the row, each counts like the one with the most work.
    """
    phase = phase if _name(implementation) == "mosaic_gpu" else "any"  # the others' phases are the same
    return _pairs(implementation, visual, text, samples, ways, phase)


@functools.cache
def _pairs(implementation: Implementation, visual: int, text: int, samples: float, ways: int, phase: str) -> float:
    slots = visual + text
    name, length, block = _name(implementation), slots / samples, _block(implementation, slots)
    if name in ("xla", "xla_chunked", "cudnn_masked"):  # every pair, then a mask
        return float(slots) ** 2
    if name == "splash":  # below the diagonal, whatever the samples
        return slots * (slots + block) / 2.0
    if name in ("pallas_tpu", "mosaic_gpu"):
        parts = _intervals(visual, text, samples, ways)
        return float(ways * max(pairs_of(implementation, own, slots, phase) for own in parts))
    # The pairs of each sample, plus the overhang of its last blocks.
    return min(slots * (length + 2 * block) / 2.0, float(slots) ** 2)


def pairs_of(implementation: Implementation, intervals: Intervals, keys: int, phase: str = "forward") -> int:
    """Pairs that a phase computes for queries that see ``intervals``; for kernels other than ours, only the visible
    pairs."""
    name = _name(implementation)
    if name == "pallas_tpu":
        from pallas_kernels.attention.visits import count_pairs

        return count_pairs(intervals, implementation.grid(*intervals.first.shape, keys))
    if name == "mosaic_gpu":
        return _mosaic_pairs(implementation, intervals, keys, phase)
    return int((intervals.last - intervals.first + 1).sum())


def _mosaic_pairs(implementation: Implementation, intervals: Intervals, keys: int, phase: str) -> int:
    """Pairs in tiles of queries and blocks of keys, or vice versa for ``dkv``."""
    from pallas_kernels.attention.backends.mosaic_loop import TILE

    walks = {"forward": implementation.output, "dq": implementation.dquery, "dkv": implementation.dkeys}
    block, queries = walks[phase].block, intervals.first.shape[1]
    bounds = [jnp.pad(a, ((0, 0), (0, -queries % TILE)), mode="edge") for a in intervals[:2]]
    keys += -keys % TILE
    spans = query_spans(*bounds, keys, block, TILE) if phase == "dkv" else key_spans(*bounds, TILE, block)
    return int((spans.stop - spans.start).sum()) * block * TILE


def _intervals(visual: int, text: int, samples: float, ways: int) -> Iterator[Intervals]:
    """The intervals of each device's queries, as ``parallel.rows`` assigns them, in such a row."""
    parts = [np.arange(count) for count in (visual, text)]
    sample = np.concatenate([slot * samples // max(len(slot), 1) for slot in parts])  # of visual slots, then of text
    order = np.argsort(sample, kind="stable")
    place, start = np.argsort(order), np.searchsorted(sample[order], sample)
    shares = [np.split(slot[dealt(len(slot), ways)] if ways > 1 else slot, ways) for slot in parts]
    for of_visual, of_text in zip(*shares):
        own = np.concatenate([of_visual, visual + of_text])
        own = own[np.argsort(place[own])]
        yield Intervals(*(jnp.asarray(a[own][None], jnp.int32) for a in (start, place)))


def _name(implementation: Implementation) -> str:
    return implementation.name.rpartition("/")[2]


def _block(implementation: Implementation, slots: int) -> int:
    most = getattr(implementation, "block", getattr(implementation, "block_q", 128))
    return next((block for block in range(min(most, slots), 0, -128) if slots % block == 0), 128)
