"""The facts about a compiled step: for golden tests and for inspection.

>>> found = facts(step.lower(state, frozen, batch).compile().as_text())
>>> found.by_kind()["all-gather"]["bf16"]
(48, 3043491840.0)
>>> [t for t in found.transfers if t.kind == "all-reduce" and not t.asynchronous and t.bytes > 1e6]
[]
"""

from __future__ import annotations

import dataclasses

from mono_jax.hlo import collectives, loops, shapes, work
from mono_jax.hlo.module import Module, read


@dataclasses.dataclass(frozen=True)
class Transfer:
    """A collective, and how often the program runs it.

    Attributes:
      kind, dtype: "all-gather", "bf16"; a collective of several dtypes counts as several transfers.
      dims: shapes of its operands, on one device.
      bytes: bytes that each device sends over all runs.
      times: number of runs.
      devices: number of devices in a group; 0 = all of the program.
      asynchronous: whether other work may overlap with it.
      op_name: its origin in the traced program.
    """

    kind: str
    dtype: str
    dims: tuple[tuple[int, ...], ...]
    bytes: float
    times: int
    devices: int
    asynchronous: bool
    op_name: str


@dataclasses.dataclass(frozen=True)
class Product:
    """An instruction with FLOPs: a dot, a convolution, a fusion around them, or a kernel with its own estimate.

    ``flops`` are those of all ``times`` runs; ``dims`` is the shape of the result, if it is a single array.
    """

    name: str
    dims: tuple[int, ...]
    flops: float
    times: int
    op_name: str


@dataclasses.dataclass(frozen=True)
class Facts:
    """The facts for one device and one run of a program; ``loops`` are trip counts, None if they depend on data."""

    transfers: tuple[Transfer, ...]
    products: tuple[Product, ...]
    loops: dict[str, int | None]

    @property
    def flops(self) -> float:
        return sum(product.flops for product in self.products)

    def by_kind(self) -> dict[str, dict[str, tuple[int, float]]]:
        """{kind: {dtype: (number of collectives, bytes that a device sends)}}."""
        found: dict[str, dict[str, tuple[int, float]]] = {}
        for transfer in self.transfers:
            kind = found.setdefault(transfer.kind, {})
            times, size = kind.get(transfer.dtype, (0, 0.0))
            kind[transfer.dtype] = (times + transfer.times, size + transfer.bytes)
        return found


def facts(text: str) -> Facts:
    """Reads a compiled module's text; raises ValueError if it is not one."""
    module = read(text)
    transfers, products = [], []
    for run in loops.executed(module):
        transfers += _transfers(module, run)
        flops = work.flops(module, run.computation, run.instruction)
        if flops:
            dims = run.instruction.shape.dims if isinstance(run.instruction.shape, shapes.Array) else ()
            name, origin = run.instruction.name, run.instruction.op_name
            products.append(Product(name, dims, flops * run.times, run.times, origin))
    return Facts(tuple(transfers), tuple(products), loops.loops(module))


def _transfers(module: Module, run: loops.Executed) -> list[Transfer]:
    collective = collectives.started(module, run.computation, run.instruction)
    if collective is None:
        return []
    computation, instruction = collectives.find(module, run.computation, run.instruction)
    found = []
    for dtype, size in collective.wire_bytes.items():
        dims = tuple(array.dims for array in computation.arrays(instruction) if array.dtype == dtype)
        found.append(
            Transfer(
                collective.kind,
                dtype,
                dims,
                size * run.times,
                run.times,
                collective.devices,
                collective.asynchronous,
                instruction.op_name,
            )
        )
    return found
