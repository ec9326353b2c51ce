"""How often each instruction runs: trip counts of while loops, and a walk over the whole module.

XLA:CPU and XLA:GPU write ``known_trip_count``; XLA:TPU does not. For it, the loop's counter is simulated: the scalar
integers among the values that the body passes on are computed from their initial values, trip after trip, until the
condition is false. So steps other than 1, counters that run down and limits that come through tuples of outer loops
need no special cases. A loop whose condition depends on data has no trip count (None).
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable, Iterator

from mono_jax.hlo.module import Computation, Instruction, Module
from mono_jax.hlo.shapes import Array, Shape

MAX_TRIPS = 1_000_000
_PASSED = ("copy", "bitcast", "reshape", "convert", "optimization-barrier", "bitcast-convert", "broadcast")
_ARITHMETIC: dict[str, Callable[[int, int], int]] = {
    "add": operator.add,
    "subtract": operator.sub,
    "multiply": operator.mul,
    "maximum": max,
    "minimum": min,
    "divide": lambda a, b: int(a / b),
    "and": operator.and_,
    "or": operator.or_,
    "xor": operator.xor,
    "shift-left": operator.lshift,
    "shift-right-logical": operator.rshift,
}
_COMPARED = {
    "LT": operator.lt,
    "LE": operator.le,
    "GT": operator.gt,
    "GE": operator.ge,
    "EQ": operator.eq,
    "NE": operator.ne,
}

# A value of the simulation: an integer, a tuple of values, None = unknown.
Value = int | tuple["Value", ...] | None


class Scalars:
    """Values of the scalar integers of one computation, given those of its parameters."""

    def __init__(self, module: Module, computation: Computation, parameters: dict[int, Value]):
        self.module, self.computation, self.parameters = module, computation, parameters
        self.known: dict[str, Value] = {}

    def of(self, name: str) -> Value:
        if name not in self.known:
            instruction = self.computation.by_name[name]
            self.known[name] = self._compute(instruction) if _may_be_known(instruction.shape) else None
        return self.known[name]

    def _compute(self, instruction: Instruction) -> Value:
        opcode, operands = instruction.opcode, instruction.operands
        if opcode == "parameter":
            return self.parameters.get(int(instruction.arguments))
        if opcode == "constant":
            return _integer(instruction.arguments)
        if opcode == "tuple":
            return tuple(self.of(name) for name in operands)
        if opcode == "get-tuple-element":
            whole = self.of(operands[0])
            return whole[instruction.index] if isinstance(whole, tuple) else None
        if opcode in _PASSED:
            return self.of(operands[0])
        if opcode in ("fusion", "call"):
            inner = self.module.computations[instruction.called("calls") or instruction.called("to_apply") or ""]
            return Scalars(self.module, inner, dict(enumerate(map(self.of, operands)))).of(inner.root.name)
        if opcode == "while":
            return self.passed_through(instruction)
        return self._arithmetic(instruction)

    def _arithmetic(self, instruction: Instruction) -> Value:
        opcode = instruction.opcode
        if opcode not in (*_ARITHMETIC, "compare", "select", "not"):
            return None
        values = [self.of(name) for name in instruction.operands]
        if not all(isinstance(value, int) for value in values):
            return None
        if opcode == "compare":
            return int(_COMPARED[instruction.attribute("direction") or "EQ"](*values))
        if opcode == "select":
            return values[1] if values[0] else values[2]
        if opcode == "not":
            return 1 - values[0]
        return _ARITHMETIC[opcode](*values) if opcode != "divide" or values[1] else None

    def passed_through(self, loop: Instruction) -> Value:
        """The tuple that a loop returns, with the values that the loop does not change."""
        before = self.of(loop.operands[0])
        same = _unchanged(self.module.computations[loop.called("body") or ""])
        if not isinstance(before, tuple):
            return None
        return tuple(value if place in same else None for place, value in enumerate(before))


def _may_be_known(shape: Shape) -> bool:
    """For tuples and single integers; arrays are never computed."""
    return not isinstance(shape, Array) or (shape.size == 1 and shape.dtype[0] in "sup")


def _integer(text: str) -> int | None:
    words = {"true": 1, "false": 0}
    text = text.strip("{} ")
    return words[text] if text in words else int(text) if text.lstrip("-").isdecimal() else None


def _unchanged(body: Computation) -> set[int]:
    """Indices in a loop's tuple that its body passes on unchanged."""
    if body.root.opcode != "tuple":
        return set(range(len(body.root.shape))) if body.root.opcode == "parameter" else set()
    found = set()
    for place, item in enumerate(body.operands(body.root)):
        while item.opcode in ("copy", "bitcast"):
            item = body.by_name[item.operands[0]]
        if item.opcode == "get-tuple-element" and item.index == place:
            source = body.by_name[item.operands[0]]
            found |= {place} if source.opcode == "parameter" else set()
    return found


def trip_count(module: Module, loop: Instruction, initial: Value) -> int | None:
    """Trips of a while instruction whose tuple starts as ``initial``; None if they depend on data."""
    known = loop.backend_config.get("known_trip_count", {}).get("n")
    if known is not None:
        return int(known)
    body = module.computations[loop.called("body") or ""]
    condition = module.computations[loop.called("condition") or ""]
    state = initial
    for trips in range(MAX_TRIPS):
        goes_on = Scalars(module, condition, {0: state}).of(condition.root.name)
        if not isinstance(goes_on, int):
            return None
        if not goes_on:
            return trips
        after = Scalars(module, body, {0: state}).of(body.root.name)
        if after == state:
            return None  # no known value ends it
        state = after
    return None


# ======================================================================================================================
# The walk
# ======================================================================================================================


class Scope:
    """One computation as called: the known values of its parameters, and so the trips of its loops."""

    def __init__(self, module: Module, computation: Computation, parameters: dict[int, Value] | None = None):
        self.module, self.computation = module, computation
        self._scalars = Scalars(module, computation, parameters or {})

    def calls(self, instruction: Instruction) -> list[tuple[Scope, int | None]]:
        """What ``instruction`` runs besides itself, and how often: loop bodies, branches, called computations.

        Fusions are instructions, not calls. Every branch of a conditional counts as taken; None = unknown trips.
        """
        if instruction.opcode == "while":
            return [self._loop(instruction)]
        if instruction.opcode not in ("call", "conditional", "async-start"):
            return []
        names = [name for name in instruction.all_called if name in self.module.computations]
        values = [self._scalars.of(name) for name in instruction.operands]
        if instruction.opcode == "conditional":
            return [(self._inner(name, [value]), 1) for name, value in zip(names, values[1:])]
        return [(self._inner(name, values), 1) for name in names]

    def _inner(self, name: str, values: list[Value]) -> Scope:
        return Scope(self.module, self.module.computations[name], dict(enumerate(values)))

    def _loop(self, loop: Instruction) -> tuple[Scope, int | None]:
        initial = self._scalars.of(loop.operands[0])
        inside = self._scalars.passed_through(loop)
        return self._inner(loop.called("body") or "", [inside]), trip_count(self.module, loop, initial)


@dataclasses.dataclass(frozen=True)
class Executed:
    """An instruction outside fusions, the computation it is in, and how often one run of the module executes it."""

    instruction: Instruction
    computation: Computation
    times: int


def executed(module: Module) -> Iterator[Executed]:
    """Every instruction outside fusions with its count; a loop without a trip count counts once."""
    yield from _walk(Scope(module, module.entry), 1)


def _walk(scope: Scope, times: int) -> Iterator[Executed]:
    for instruction in scope.computation.instructions:
        yield Executed(instruction, scope.computation, times)
        for inner, trips in scope.calls(instruction):
            yield from _walk(inner, times * (1 if trips is None else trips))


def loops(module: Module) -> dict[str, int | None]:
    """{name of a while instruction: its trips}; None = they depend on data."""
    return dict(_loops(Scope(module, module.entry)))


def _loops(scope: Scope) -> Iterator[tuple[str, int | None]]:
    for instruction in scope.computation.instructions:
        for inner, trips in scope.calls(instruction):
            if instruction.opcode == "while":
                yield instruction.name, trips
            yield from _loops(inner)
