"""Bytes that an instruction moves to and from HBM.

Data in a scratch memory of the chip (VMEM, S(1) in the text) costs nothing. A fusion reads of an operand only what its
slices and gathers take, and writes only the update of a buffer that it updates in place: otherwise a scan's stacked
weights and results would be counted whole in every trip.
"""

from __future__ import annotations

from collections.abc import Iterable

from mono_jax.hlo import shapes
from mono_jax.hlo.module import Computation, Instruction, Module
from mono_jax.hlo.shapes import HBM, Array

# Instructions that move nothing themselves: names, views, and those that run other instructions.
_FREE = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call"),
    *("after-all", "partition-id", "replica-id", "optimization-barrier", "add-dependency", "domain", "iota"),
}
_VIEWS = ("bitcast", "reshape", "transpose", "copy", "convert")
_SLICES = ("dynamic-slice", "slice", "gather")
_UPDATES = {"dynamic-update-slice": 1, "scatter": -1}  # updates in place, and which operand is the update
COLLECTIVES = (
    *("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute"),
    *("collective-broadcast", "ragged-all-to-all"),
)


def hbm_bytes(module: Module, computation: Computation, instruction: Instruction) -> float:
    """Bytes read from and written to HBM by one run of ``instruction``, including tile padding."""
    opcode = instruction.opcode
    if opcode in _FREE or opcode.endswith(("-done", "-update")):
        return 0.0
    if (body := module.fused(instruction)) is not None:
        return _fusion(module, computation, instruction, body)
    operands = computation.operands(instruction)
    if opcode in _SLICES:
        return _moved(instruction) + (_moved(instruction) if _in_hbm(operands[0]) else 0) + _read(operands[1:])
    if opcode in _UPDATES:
        update = operands[_UPDATES[opcode]]
        return _read([update]) + (_stored(update) if _in_hbm(instruction) else 0)
    if opcode.endswith("-start"):  # of a copy or a collective: (source, destination, flags)
        parts = instruction.shape[:2] if isinstance(instruction.shape, tuple) else (instruction.shape,)
        return float(sum(_bytes(shapes.arrays(part)) for part in parts))
    return _moved(instruction) + _read(operands)


def _fusion(module: Module, computation: Computation, instruction: Instruction, body: Computation) -> float:
    total = 0.0
    for place, operand in enumerate(computation.operands(instruction)):
        if _in_hbm(operand) and place in body.parameters:
            total += min(_stored(operand), _read_of(module, body, body.parameters[place].name))
    roots = body.operands(body.root) if body.root.opcode == "tuple" else [body.root]
    results = list(instruction.shape) if body.root.opcode == "tuple" else [instruction.shape]
    return total + sum(_written(module, body, root, shape) for root, shape in zip(roots, results))


def _read_of(module: Module, body: Computation, name: str) -> float:
    """Bytes that a fused computation reads of its value ``name``, which is in HBM."""
    total, whole = 0.0, _stored(body.by_name[name])
    for user in body.users.get(name, []):
        if user is body.root and user.opcode == "tuple":
            continue  # passed on
        if user.opcode in COLLECTIVES or user.opcode == "custom-call":
            continue  # a buffer in flight: its bytes belong to the network, and are counted where the transfer starts
        if user.opcode in _SLICES and user.operands[0] == name:
            total += _stored(user)
        elif user.opcode in _UPDATES and user.operands[0] == name:
            continue  # written in place
        elif user.opcode in _VIEWS:
            total += min(whole, _read_of(module, body, user.name)) if body.users.get(user.name) else whole
        elif (inner := module.fused(user)) is not None:
            for place, operand in enumerate(user.operands):
                if operand == name:
                    total += _read_of(module, inner, inner.parameters[place].name)
        else:
            return whole
    return min(total, whole)


def _written(module: Module, body: Computation, root: Instruction, shape: shapes.Shape) -> float:
    if _bytes(shapes.arrays(shape)) == 0:
        return 0.0
    while root.opcode in _VIEWS and root.operands:
        root = body.by_name[root.operands[0]]
    if root.opcode == "parameter" or root.opcode in COLLECTIVES:
        return 0.0  # passed on
    if root.opcode in _UPDATES:
        return float(_stored(body.by_name[root.operands[_UPDATES[root.opcode]]]))
    if (inner := module.fused(root)) is not None and inner.root.opcode != "tuple":
        return _written(module, inner, inner.root, shape)
    return _bytes(shapes.arrays(shape))


def _bytes(found: Iterable[Array]) -> float:
    return float(sum(array.stored_bytes for array in found if array.space == HBM))


def _moved(instruction: Instruction) -> float:
    return _bytes(shapes.arrays(instruction.shape))


def _read(operands: Iterable[Instruction]) -> float:
    return sum(_moved(operand) for operand in operands)


def _stored(instruction: Instruction) -> float:
    return float(sum(array.stored_bytes for array in shapes.arrays(instruction.shape)))


def _in_hbm(instruction: Instruction) -> bool:
    return any(array.space == HBM for array in shapes.arrays(instruction.shape))
