"""Collectives of a compiled module: their kind, dtype, groups, bytes on the wire, and whether they are asynchronous.

XLA:TPU spreads an asynchronous gather over several fusions: one that starts it (it calls ``AsyncCollectiveStart``),
some that compute something else in the meantime, and one that ends it. It is counted once, where it starts.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import re

import numpy as np

from mono_jax.hlo.module import Computation, Instruction, Module
from mono_jax.hlo.traffic import COLLECTIVES

Groups = tuple[tuple[int, ...], ...]


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective as run by one device.

    Attributes:
      kind: opcode; "all-gather" also for "all-gather-start". An all-reduce of which a fusion keeps only this device's
        slice is a "reduce-scatter": XLA:TPU writes it this way, other backends do not.
      dtypes: bytes of the operands by dtype.
      groups: partitions that take part together; () = all devices of the program.
      devices: number of devices in a group.
      asynchronous: whether it starts in one instruction and ends in another.
    """

    kind: str
    dtypes: tuple[tuple[str, int], ...]
    groups: Groups
    devices: int
    asynchronous: bool

    @property
    def wire_bytes(self) -> dict[str, float]:
        """Bytes that each device sends, by dtype, with optimal ring algorithms."""
        n = max(self.devices, 1)
        share = {
            "all-gather": n - 1.0,
            "all-reduce": 2.0 * (n - 1) / n,
            "collective-permute": 1.0,
            "collective-broadcast": 1.0,
        }.get(self.kind, (n - 1) / n)
        return {dtype: size * share for dtype, size in self.dtypes}


def find(module: Module, computation: Computation, instruction: Instruction) -> tuple[Computation, Instruction] | None:
    """The collective that ``instruction`` is or contains, with the computation that it is in."""
    if _kind(instruction):
        return computation, instruction
    if instruction.opcode == "async-start":
        inner = module.computations[instruction.called("calls") or ""]
        return next(((inner, each) for each in inner.instructions if _kind(each)), None)
    return next((found for found in module.inside(instruction) if _kind(found[1])), None)


def started(module: Module, computation: Computation, instruction: Instruction) -> Collective | None:
    """The collective that ``instruction`` runs or starts, or None."""
    found = find(module, computation, instruction)
    if found is None or found[1].opcode.endswith(("-done", "-update")):
        return None
    role = _role(module, instruction)
    if role in ("goes on", "ends"):
        return None
    inner, collective = found
    kind = _kind(collective)
    if kind == "all-reduce" and inner is not computation and _keeps_a_slice(inner, collective):
        kind = "reduce-scatter"
    starts = role == "starts" or collective.opcode.endswith("-start") or instruction.opcode == "async-start"
    return _collective(inner, collective, kind, starts)


def ended(module: Module, computation: Computation, instruction: Instruction) -> str | None:
    """Name of the instruction that started the transfer that ``instruction`` waits for; None if it waits for none."""
    if instruction.opcode.endswith("-done"):
        start = computation.by_name[instruction.operands[0]]
        while not start.opcode.endswith("-start") and start.operands:
            start = computation.by_name[start.operands[0]]
        return start.name
    if _role(module, instruction) == "ends":
        channel = _channel(module, instruction)
        for other in reversed(computation.instructions[: computation.instructions.index(instruction)]):
            if _role(module, other) == "starts" and _channel(module, other) == channel:
                return other.name
    return None


def _kind(instruction: Instruction) -> str | None:
    name = instruction.opcode
    for end in ("-start", "-done", "-update"):
        name = name.removesuffix(end)
    return name if name in COLLECTIVES else None


def _role(module: Module, fusion: Instruction) -> str:
    """A fusion's role in an asynchronous collective: "starts", "goes on", "ends"; "" = none."""
    role = ""
    for _, instruction in module.inside(fusion):
        if instruction.target == "AsyncCollectiveStart":
            return "starts"
        if instruction.target == "AsyncCollectiveDone":
            return "ends"
        if _kind(instruction):
            flags = instruction.backend_config.get("async_collective_fusion_config", {})
            role = "goes on" if flags else role
    return role


def _channel(module: Module, fusion: Instruction) -> str | None:
    return next((i.attribute("channel_id") for _, i in module.inside(fusion) if _kind(i)), None)


def _keeps_a_slice(computation: Computation, reduce: Instruction) -> bool:
    """Whether only a slice is read of every array that ``reduce`` sums."""
    users = computation.users.get(reduce.name, [])
    while len(users) == 1 and users[0].opcode in ("bitcast", "reshape", "copy", "convert"):
        users = computation.users.get(users[0].name, [])
    if users and all(user.opcode == "get-tuple-element" for user in users):  # several arrays in one instruction
        return all(_keeps_a_slice(computation, user) for user in users)
    return bool(users) and all(user.opcode == "dynamic-slice" for user in users)


def _collective(computation: Computation, instruction: Instruction, kind: str, asynchronous: bool) -> Collective:
    sizes: dict[str, int] = {}
    for array in computation.arrays(instruction):
        sizes[array.dtype] = sizes.get(array.dtype, 0) + array.bytes
    found = groups(instruction.attributes)
    return Collective(kind, tuple(sorted(sizes.items())), found, len(found[0]) if found else 0, asynchronous)


# ======================================================================================================================
# Groups
# ======================================================================================================================


def groups(attributes: str) -> Groups:
    """Partitions that take part together, in any notation; () = all.

    {{0,1},{2,3}}    [2,4]<=[8]    [4,2]<=[2,4]T(1,0)    mesh['x'=4,'y'=2] {'x'}    source_target_pairs={{0,1},{1,0}}
    """
    if pairs := re.search(r"source_target_pairs=\{((?:\{\d+,\d+\},?)*)\}", attributes):
        return _connected([(int(a), int(b)) for a, b in re.findall(r"\{(\d+),(\d+)\}", pairs[1])])
    if listed := re.search(r"replica_groups=\{((?:\{[\d,]*\},?)*)\}", attributes):
        return tuple(tuple(map(int, g.split(","))) for g in re.findall(r"\{([\d,]+)\}", listed[1]))
    if iota := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes):
        shape, source = _numbers(iota[1]), _numbers(iota[2])
        ids = np.arange(math.prod(source)).reshape(source)
        ids = ids.transpose(_numbers(iota[3])) if iota[3] else ids
        return tuple(map(tuple, ids.reshape(shape[0], -1).tolist()))
    if mesh := re.search(r"replica_groups=@?mesh\[([^\]]*)\](?:[^{]*?)\s*\{([^}]*)\}", attributes):
        return _of_mesh(mesh[1], mesh[2])
    return ()


def _of_mesh(axes: str, chosen: str) -> Groups:
    """Groups along ``chosen`` axes ('x', or a part of one, 'x':(2)4: 4 parts after 2 larger ones) of a mesh."""
    sizes = {name: int(size) for name, size in re.findall(r"'([^']*)'=(\d+)", axes)}
    parts = [(name, int(a or 1), int(b or 0)) for name, a, b in re.findall(r"'([^']*)'(?::\((\d+)\)(\d+))?", chosen)]
    shape: list[int] = []
    along: dict[str, list[tuple[int, int]]] = {}  # axis: its dimensions as (place, size of the larger part)
    for name, size in sizes.items():
        mine = [(before, before * part) for axis, before, part in parts if axis == name and part]
        cuts = sorted({1, size, *itertools.chain(*mine)})
        along[name] = []
        for larger, smaller in itertools.pairwise(cuts):
            along[name].append((len(shape), larger))
            shape.append(smaller // larger)
    grouped = []
    for name, before, size in parts:
        end = before * size if size else sizes[name]
        grouped += [place for place, larger in along[name] if before <= larger < end]
    rest = [place for place in range(len(shape)) if place not in grouped]
    ids = np.arange(math.prod(shape)).reshape(shape).transpose([*rest, *grouped])
    return tuple(map(tuple, ids.reshape(-1, math.prod(shape[place] for place in grouped)).tolist()))


def _connected(pairs: list[tuple[int, int]]) -> Groups:
    """The rings and chains formed by pairs of (source, target)."""
    group: dict[int, set[int]] = {}
    for source, target in pairs:
        joined = group.get(source, {source}) | group.get(target, {target})
        for device in joined:
            group[device] = joined
    return tuple(dict.fromkeys(tuple(sorted(devices)) for devices in group.values()))


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]
