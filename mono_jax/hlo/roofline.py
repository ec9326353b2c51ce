"""The minimum time that a compiled module takes on a chip, operation by operation: a bound, not a prediction.

An operation takes max(FLOPs / peak, HBM bytes / bandwidth); operations run one after another in schedule order.
Asynchronous copies and collectives run concurrently, each kind one after another; the time by which they exceed the
work between their start and their end is *exposed*. A synchronous collective is fully exposed. Not modelled: vector
units, latencies, how well a matmul fills the matrix unit (except for kernels, if the caller gives a share), links
shared by collectives of different axes, and HBM shared by copies and operations. Of the branches of a conditional, the
slowest counts, unless the caller knows that the fastest is taken.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from mono_jax.hlo import collectives, traffic, work
from mono_jax.hlo.collectives import Collective
from mono_jax.hlo.loops import Scope
from mono_jax.hlo.module import Computation, Instruction, Module, read


@dataclasses.dataclass(frozen=True)
class Work:
    """The work of one run of one instruction.

    Attributes:
      flops: multiply-adds times two.
      bytes: to and from HBM.
      efficiency: largest share of the peak that its FLOPs can reach.
    """

    flops: float
    bytes: float
    efficiency: float = 1.0


# A kernel's work, if the caller knows more than the module says: (computation, instruction) -> Work or None.
Kernels = Callable[[Computation, Instruction], Work | None]


@dataclasses.dataclass(frozen=True)
class Machine:
    """Rates of one device: peak in FLOP/s, HBM bandwidth in bytes/s, seconds of a collective.

    ``products``: largest share of the peak that matmuls reach.
    """

    peak: float
    bandwidth: float
    collective_seconds: Callable[[Collective], float]
    products: float = 1.0


@dataclasses.dataclass
class Totals:
    """Totals for one device and one run of the module; ``seconds`` is the bound, other times are parts or alternatives.

    Attributes:
      flops: of dots and kernels.
      bytes: to and from HBM, copies included.
      compute_s: FLOPs at the share of the peak that matmuls and kernels can reach, and nothing else.
      memory_s: bytes at the bandwidth.
      collective_s: collectives one after another.
      exposed_collective_s: the part of that time that operations do not hide.
      exposed_copy_s: the same for asynchronous copies.
      seconds: operations, each at the slower of its two rates, plus the exposed times.
      collectives: {(kind, dtype): [count, bytes on the wire]}.
      unknown_loops: loops without a trip count, taken as one trip.
      silent_kernels: kernels that do not report their FLOPs.
    """

    flops: float = 0.0
    bytes: float = 0.0
    compute_s: float = 0.0
    memory_s: float = 0.0
    collective_s: float = 0.0
    exposed_collective_s: float = 0.0
    exposed_copy_s: float = 0.0
    seconds: float = 0.0
    collectives: dict[tuple[str, str], list[float]] = dataclasses.field(default_factory=dict)
    unknown_loops: list[str] = dataclasses.field(default_factory=list)
    silent_kernels: list[str] = dataclasses.field(default_factory=list)

    def add(self, other: Totals, times: int) -> None:
        for field in dataclasses.fields(self):
            mine, theirs = getattr(self, field.name), getattr(other, field.name)
            if isinstance(mine, float):
                setattr(self, field.name, mine + theirs * times)
            elif isinstance(mine, list):
                mine += [name for name in theirs if name not in mine]
        for key, (count, size) in other.collectives.items():
            entry = self.collectives.setdefault(key, [0, 0.0])
            entry[0] += count * times
            entry[1] += size * times


def totals(text: str, machine: Machine, kernels: Kernels | None = None, branch: Callable[..., Any] = max) -> Totals:
    """Totals from a compiled module's text. ``branch``: ``max`` or ``min``: the branch that is taken, by time."""
    module = read(text)
    return _Timeline(module, machine, kernels or (lambda *_: None), branch).of(Scope(module, module.entry))


class _Timeline:
    def __init__(self, module: Module, machine: Machine, kernels: Kernels, branch: Callable[..., Any]):
        self.module, self.machine, self.kernels, self.branch = module, machine, kernels, branch

    def of(self, scope: Scope) -> Totals:
        """One run of a computation: one clock for operations, and one each for copies and collectives."""
        total, computation = Totals(), scope.computation
        ready: dict[str, tuple[str, float]] = {}  # what was started: (what runs it, when it finishes)
        free = {"network": 0.0, "copies": 0.0}
        for instruction in computation.instructions:
            if instruction.opcode != "async-start":
                for called, trips in self._called(scope, instruction):
                    if trips is None:
                        total.unknown_loops.append(instruction.name)
                    total.add(called, 1 if trips is None else trips)
            collective = collectives.started(self.module, computation, instruction)
            size = traffic.hbm_bytes(self.module, computation, instruction)
            if collective is not None:
                seconds = self._collective(total, collective)
                begins = max(total.seconds, free["network"])
                free["network"] = begins + seconds
                if collective.asynchronous:
                    ready[instruction.name] = ("network", free["network"])
                else:
                    self._wait(total, "network", free["network"])
            elif _is_copy(instruction):
                total.bytes += size
                total.memory_s += size / self.machine.bandwidth
                free["copies"] = max(total.seconds, free["copies"]) + size / self.machine.bandwidth
                ready[instruction.name] = ("copies", free["copies"])
            elif (start := collectives.ended(self.module, computation, instruction)) in ready:
                self._wait(total, *ready.pop(start))
            if (collective is None or instruction.opcode == "fusion") and not _is_copy(instruction):
                self._operation(total, computation, instruction, size)
        return total

    def _called(self, scope: Scope, instruction: Instruction) -> list[tuple[Totals, int | None]]:
        """What ``instruction`` runs besides itself, and how often; for a conditional, only one branch."""
        found = [(self.of(inner), trips) for inner, trips in scope.calls(instruction)]
        if instruction.opcode == "conditional" and found:
            return [self.branch(found, key=lambda branch: branch[0].seconds)]
        return found

    def _wait(self, total: Totals, what: str, until: float) -> None:
        exposed = max(until - total.seconds, 0.0)
        total.seconds += exposed
        if what == "network":
            total.exposed_collective_s += exposed
        else:
            total.exposed_copy_s += exposed

    def _collective(self, total: Totals, collective: Collective) -> float:
        for dtype, size in collective.wire_bytes.items():
            entry = total.collectives.setdefault((collective.kind, dtype), [0, 0.0])
            entry[0] += 1
            entry[1] += size
        seconds = self.machine.collective_seconds(collective)
        total.collective_s += seconds
        return seconds

    def _operation(self, total: Totals, computation: Computation, instruction: Instruction, size: float) -> None:
        done = Work(work.flops(self.module, computation, instruction), size, self.machine.products)
        if work.is_kernel(instruction):
            known = self.kernels(computation, instruction)
            if known is None and not done.flops:
                total.silent_kernels.append(instruction.name)
            done = known or done
        compute = done.flops / (self.machine.peak * done.efficiency)
        memory = done.bytes / self.machine.bandwidth
        total.flops += done.flops
        total.bytes += done.bytes
        total.compute_s += compute
        total.memory_s += memory
        total.seconds += max(compute, memory)


def _is_copy(instruction: Instruction) -> bool:
    """Whether it starts a copy that runs concurrently with the operations."""
    return instruction.opcode in ("copy-start", "slice-start", "dynamic-slice-start", "dynamic-update-slice-start")
