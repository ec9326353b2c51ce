"""What a compiled step does, as plain facts: for golden tests and for a look inside.

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
      kind, dtype: "all-gather", "bf16"; a collective of several dtypes is several transfers.
      dims: shapes of its operands, on one device.
      bytes: each device sends in all its runs.
      times: it runs.
      devices: of a group; 0 = all of the program.
      asynchronous: other work may hide it.
      op_name: where in the traced program it comes from.
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
    """An instruction with FLOPs: a dot, a convolution, a fusion around them, a kernel with an estimate of its own.

    ``flops`` are those of all ``times`` runs; ``dims`` is the shape of the result, where it is one array.
    """

    name: str
    dims: tuple[int, ...]
    flops: float
    times: int
    op_name: str


@dataclasses.dataclass(frozen=True)
class Facts:
    """Of one device and one run of a program; ``loops`` are trip counts, None where they depend on data."""

    transfers: tuple[Transfer, ...]
    products: tuple[Product, ...]
    loops: dict[str, int | None]

    @property
    def flops(self) -> float:
        return sum(product.flops for product in self.products)

    def by_kind(self) -> dict[str, dict[str, tuple[int, float]]]:
        """{kind: {dtype: (collectives, bytes that a device sends)}}."""
        found: dict[str, dict[str, tuple[int, float]]] = {}
        for transfer in self.transfers:
            kind = found.setdefault(transfer.kind, {})
            times, size = kind.get(transfer.dtype, (0, 0.0))
            kind[transfer.dtype] = (times + transfer.times, size + transfer.bytes)
        return found


def facts(text: str) -> Facts:
    """Reads a compiled module's text; raises ValueError if it is none."""
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
