"""A plan computed by arithmetic on shapes, without the compiler: milliseconds instead of minutes, for ranking.

Memory: the shards of state and batch as laid out in memory, plus, at the peak of the backward pass, the layers' saved
activations, the gradients, the unsharded weights of the head and of one layer, and that layer's activations. Time: dots
and attention at their rates, the bytes of the optimizer and the activations, and the part of the collectives that these
cannot hide. For candidates that ``search`` compiles, it also shows the compiler's memory.
"""

from __future__ import annotations

import dataclasses
import itertools
import math

import jax
import numpy as np
from jax.sharding import Mesh

from mono_jax import tree
from mono_jax.axes import CONTEXT, DATA, ROWS, SHARDS, TENSOR
from mono_jax.hlo.collectives import Collective
from mono_jax.models.architecture import Architecture
from mono_jax.runs.planning import pixels
from mono_jax.runs.planning.kernels import AttentionWork
from mono_jax.runs.planning.targets import Target, collective_seconds
from mono_jax.runs.planning.workload import Workload
from mono_jax.runs.program import Program
from mono_jax.training.flops import language_matmuls
from mono_jax.training.groups import groups_of, trained_groups
from mono_jax.training.state import state_shardings
from pallas_kernels.devices import device_key

_BF16, _F32 = 2, 4
HEAD = "token_embeddings"  # its parameter group
MIB = 1 << 20
# How many vectors of the layer's width everything except matmuls and attention moves per token and layer, forward and
# backward, as observed in compiled steps of the 2B model (S1.1, S1.3, S2 for v5e:4x4; S1.1, S2 for H200). TPUs keep
# what they can in vector memory, so larger activations (MiB of one, [tokens, width]) move more.
MOVED = {"tpu": 60.0, "gpu": 125.0}
MOVED_FOR_MIB, MOST_MOVED = {"tpu": 1.5, "gpu": 0.0}, 170.0
# If devices share rows: how often a layer reads or writes the keys and values of whole rows to put them in order; if
# they exchange heads, how often it does so with queries, keys, values and outputs (compiled for TPUs, such steps move
# no more than other steps).
KEYS_MOVED = {"tpu": 13.0, "gpu": 5.0}
HEADS_MOVED = {"tpu": 0.0, "gpu": 5.0}
# At least this share of the collectives is exposed: XLA:TPU waits for some of each layer's weights (in the same steps).
# Collectives of keys and values are fully exposed, since attention waits for them.
EXPOSED = {"tpu": 0.18, "gpu": 0.0}


@dataclasses.dataclass(frozen=True)
class StepCost:
    """Costs of one step on one device, in bytes, seconds and FLOPs."""

    arguments: float
    temporaries: float
    compute_s: float
    memory_s: float
    collective_s: float
    exposed_collective_s: float

    @property
    def memory(self) -> float:
        return self.arguments + self.temporaries

    @property
    def step_s(self) -> float:
        return self.compute_s + self.memory_s + self.exposed_collective_s


class Arithmetic:
    """Estimates for ``target`` of programs that share ``program``'s architecture, stage and optimizer."""

    def __init__(self, program: Program, target: Target):
        self.program, self.target = program, target
        params = program.model.abstract_params()
        groups, trained = groups_of(program.model.config, params), trained_groups(program.stage, program.model.config)
        sizes = {path: leaf.size for path, leaf in tree.flatten(params).items()}
        self.parameters = sum(sizes.values())
        self.trained = sum(size for path, size in sizes.items() if groups[path] in trained)
        self._shapes = program.abstract_state()
        self._states: dict[Mesh, _State] = {}

    def estimate(self, program: Program, work: Workload) -> StepCost:
        """The cost of ``program`` with its own execution, microbatches and mesh."""
        if program.mesh not in self._states:
            self._states[program.mesh] = self._state(program.mesh)
        state, sizes = self._states[program.mesh], _Sizes.of(program, work)
        leaves = program.abstract_batch()
        batch = sum(_stored(leaf, self._tiled) for leaf in leaves.values())
        if crops := pixels.abstract_crops(program):  # and the patches made from them for the next step
            batch += sum(_stored(leaf, self._tiled) for leaf in (*crops.values(), leaves["patches"]))
        compute, memory = self._work_seconds(sizes, program, work, state)
        compute += pixels.flops_of(program) / (self.target.chip.peak * self.target.chip.products)
        parameters, keys = self._parameters_seconds(sizes, program), self._shared_rows_seconds(sizes, program)
        exposed = max(parameters - compute, EXPOSED[self._kind] * parameters) + keys
        temporaries = _temporaries(sizes, program, state)
        return StepCost(state.bytes + batch, temporaries, compute, memory, parameters + keys, exposed)

    def _state(self, mesh: Mesh) -> _State:
        places = state_shardings(self.program.model, *self._shapes, mesh)
        leaves = jax.tree.map(
            lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), self._shapes, places
        )
        changed, fixed = (sum(_stored(leaf, self._tiled) for leaf in jax.tree.leaves(part)) for part in leaves)
        shards = (leaf.sharding.shard_shape(leaf.shape) for leaf in jax.tree.leaves(leaves[0].trainable))
        return _State(changed + fixed, changed, sum(map(math.prod, shards)))

    @property
    def _tiled(self) -> bool:
        return self.target.platform == "tpu"

    @property
    def _kind(self) -> str:
        return "tpu" if self._tiled else "gpu"

    def _work_seconds(self, sizes: _Sizes, program: Program, work: Workload, state: _State) -> tuple[float, float]:
        """Seconds of dots and attention at their rates, and of the bytes that no dot hides."""
        chip, c, policy = self.target.chip, sizes.config, POLICIES[program.run.execution.remat]
        dots = _dot_flops(sizes, again=policy.again) * sizes.microbatches / (chip.peak * chip.products)
        kernels = AttentionWork.of(program, work, device_key(self.target.devices[0]))
        attention = kernels.step_seconds(program, chip.peak, twice=policy.attention_again)
        optimizer = 2 * state.changed
        activation = sizes.tokens * c.hidden_size * _BF16
        moved = min(MOVED[self._kind] + MOVED_FOR_MIB[self._kind] * activation / MIB, MOST_MOVED)
        activations = moved * activation * c.num_hidden_layers * sizes.microbatches
        ordered = self._ordered(sizes, program) * sizes.microbatches
        return dots + attention, (optimizer + activations + ordered) / chip.hbm_bandwidth

    def _ordered(self, sizes: _Sizes, program: Program) -> float:
        """Bytes moved to put the data of other devices' slots into sequence order."""
        ways = program.mesh.shape[CONTEXT]
        if ways == 1:
            return 0.0
        if program.run.execution.exchanges_heads:
            return (2 * sizes.queries + sizes.keys) * HEADS_MOVED[self._kind]
        return sizes.keys * ways * KEYS_MOVED[self._kind]

    def _parameters_seconds(self, sizes: _Sizes, program: Program) -> float:
        """Seconds to gather the weights, reduce the gradients, and reduce activations over ``tensor``."""
        c, mesh = sizes.config, program.mesh
        whole, trained = (_BF16 * size / sizes.tensor for size in (self.parameters, self.trained))
        shards = math.prod(mesh.shape[axis] for axis in SHARDS)
        activations = 6 * sizes.tokens * c.hidden_size * _BF16 * c.num_hidden_layers
        parts = [
            ("all-gather", SHARDS, 2 * whole / shards),  # forward and backward
            ("reduce-scatter", SHARDS, trained),
            ("all-reduce", (DATA,), trained / shards),
            ("all-reduce", (TENSOR,), activations),
        ]
        return sizes.microbatches * sum(self._seconds(mesh, *part) for part in parts)

    def _shared_rows_seconds(self, sizes: _Sizes, program: Program) -> float:
        """Seconds of what devices that share rows send each other for attention.

        Either gathers of keys and values and sums of their gradients (which XLA:TPU reduce-scatters only for some
        shapes), or exchanges of queries, keys, values, outputs and the gradients of all of these.
        """
        mesh, again = program.mesh, POLICIES[program.run.execution.remat].again
        kind = "all-reduce" if self._kind == "tpu" else "reduce-scatter"
        parts = [
            ("all-gather", (CONTEXT,), sizes.keys * (1 + again)),
            (kind, (CONTEXT,), sizes.keys * mesh.shape[CONTEXT]),
        ]
        if program.run.execution.exchanges_heads:
            parts = [("all-to-all", (CONTEXT,), (2 * sizes.queries + sizes.keys) * (2 + again))]
        return sizes.microbatches * sum(self._seconds(mesh, *part) for part in parts)

    def _seconds(self, mesh: Mesh, kind: str, axes: tuple[str, ...], size: float) -> float:
        """Seconds of a collective of ``size`` bytes along ``axes``."""
        if math.prod(mesh.shape[axis] for axis in axes) == 1:
            return 0.0
        groups, ways = _along(mesh, axes)
        return collective_seconds(self.target, mesh, Collective(kind, (("bf16", int(size)),), groups, ways, True))


# ======================================================================================================================
# Sizes
# ======================================================================================================================


@dataclasses.dataclass(frozen=True)
class _Sizes:
    """Sizes on one device for one microbatch.

    Attributes:
      config: the model's.
      tokens: slots of the device's rows, or its share of them; ``visual`` and ``text`` are those of each kind.
      microbatches: number per step.
      tensor: devices that share heads and columns.
      trained: parameter groups that train.
    """

    config: Architecture
    tokens: float
    visual: float
    text: float
    microbatches: int
    tensor: int
    trained: frozenset[str]

    @classmethod
    def of(cls, program: Program, work: Workload) -> _Sizes:
        mesh, config = program.mesh.shape, program.model.config
        rows = work.rows / (math.prod(mesh[axis] for axis in (*ROWS, CONTEXT)) * program.run.grad_accum_steps)
        trained = trained_groups(program.stage, config)
        counts = (rows * work.slots, rows * work.visual, rows * work.text)
        return cls(config, *counts, program.run.grad_accum_steps, mesh["tensor"], trained)

    @property
    def keys(self) -> float:
        """Bytes of the keys and values of all layers."""
        c = self.config
        return 2 * self.tokens * c.num_key_value_heads * c.head_dim / self.tensor * _BF16 * c.num_hidden_layers

    @property
    def queries(self) -> float:
        """Bytes of the queries of all layers."""
        c = self.config
        return self.keys * c.num_attention_heads / (2 * c.num_key_value_heads)

    @property
    def layer_weights(self) -> float:
        """Parameters of one layer, on one device of ``tensor``."""
        c = self.config
        qkv = c.hidden_size * c.qkv_dim * (1 + c.visual_attention_experts)
        ffn = 3 * c.hidden_size * c.intermediate_size * (1 + c.visual_ffn_experts)
        return (qkv + c.hidden_size * c.query_dim + ffn) / self.tensor


@dataclasses.dataclass(frozen=True)
class _State:
    """On one device: bytes of the state and frozen parameters, bytes that a step changes, parameters that train."""

    bytes: float
    changed: float
    trained: float


def _stored(leaf: jax.ShapeDtypeStruct, tiled: bool) -> float:
    """Bytes of a leaf's shard; on a TPU two of its dimensions are padded, those that add the least padding."""
    shape = leaf.sharding.shard_shape(leaf.shape)
    if not tiled or not shape:
        return math.prod(shape) * leaf.dtype.itemsize
    if len(shape) == 1:
        return _up(shape[0], 1024) * leaf.dtype.itemsize
    padded = min(_up(a, 8) * _up(b, 128) / (a * b) for a, b in itertools.permutations(shape, 2))
    return math.prod(shape) * padded * leaf.dtype.itemsize


def _up(size: int, edge: int) -> int:
    return -(-size // edge) * edge


# ======================================================================================================================
# Memory
# ======================================================================================================================


@dataclasses.dataclass(frozen=True)
class Policy:
    """What a policy of ``execution.remat`` keeps and repeats.

    Attributes:
      inputs: how many activations of the layer's width d it keeps per token and layer.
      dots: whether it also keeps the outputs of the matmuls.
      again: whether matmuls are recomputed in the backward pass.
      attention_again: the same for the forward attention kernel.
    """

    inputs: int
    dots: bool
    again: bool
    attention_again: bool

    def saved(self, c: Architecture, tensor: int) -> float:
        """Elements per token and layer that the backward pass finds in a device's memory."""
        dots = (c.qkv_dim + 2 * c.intermediate_size) / tensor + 2 * c.hidden_size
        return self.inputs * c.hidden_size + self.dots * dots


POLICIES = {
    "none": Policy(7, dots=True, again=False, attention_again=False),
    "dots": Policy(1, dots=True, again=False, attention_again=False),
    "dots_no_batch": Policy(1, dots=True, again=False, attention_again=False),
    "names": Policy(3, dots=False, again=True, attention_again=False),
    "offload": Policy(0, dots=False, again=True, attention_again=False),  # in the host's memory
    "full": Policy(1, dots=False, again=True, attention_again=True),
}


def _temporaries(sizes: _Sizes, program: Program, state: _State) -> float:
    c, execution = sizes.config, program.run.execution
    width, context = program.dtype.itemsize, program.mesh.shape[CONTEXT]
    kept = POLICIES[execution.remat].saved(c, sizes.tensor)
    saved = kept * sizes.tokens * c.num_hidden_layers * width
    sums = _F32 if sizes.microbatches > 1 else 0
    gradients = state.trained * (width + width + sums)  # compute copy, gradient, sum
    head = c.vocab_size * c.hidden_size / sizes.tensor * width * (1 + (HEAD in sizes.trained))  # and its gradient
    # Backward through an FFN of one modality: gate, up, their product, and the gradients of these.
    ffn = 6 * max(sizes.visual, sizes.text) * c.intermediate_size / sizes.tensor * width
    # Data of the other devices' slots that attention holds, as received and in order, and the gradients of both.
    heads = c.num_attention_heads + c.num_key_value_heads
    heads = heads if execution.exchanges_heads else c.num_key_value_heads * context
    shared = 4 * 2 * sizes.tokens * heads * c.head_dim / sizes.tensor * width
    layer = sizes.layer_weights * width + 8 * sizes.tokens * c.hidden_size * width
    layer += max(ffn, shared if context > 1 else 0.0)
    chunk = min(execution.loss_chunk or sizes.text, sizes.text)
    logits = 2 * chunk * c.vocab_size / sizes.tensor * _F32
    return saved + gradients + head + max(layer, logits)


# ======================================================================================================================
# Work and network
# ======================================================================================================================


def _dot_flops(sizes: _Sizes, *, again: bool) -> float:
    """FLOPs on one device for one microbatch, without attention scores: forward, backward, and ``again`` if
    recomputed."""
    matmuls = language_matmuls(sizes.config, sizes.visual, sizes.text)
    total = sum(each.forward * (2 + (again and each.needed) + (each.group in sizes.trained)) for each in matmuls)
    return total / sizes.tensor


def _along(mesh: Mesh, axes: tuple[str, ...]) -> tuple[tuple[tuple[int, ...], ...], int]:
    """One group of partitions along axes of the mesh, and its number of devices."""
    places = np.arange(mesh.devices.size).reshape(mesh.devices.shape)
    group = places[tuple(slice(None) if name in axes else 0 for name in mesh.axis_names)].reshape(-1)
    return (tuple(group.tolist()),), len(group)
