"""A compiled module's text (``compiled.as_text()``) as computations and instructions.

Only what the readers in this package need is parsed: names, opcodes, shapes, operands and the text of the attributes.
The dialects of TPU, GPU and CPU differ in attributes and layouts, not in this grammar.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import re
from collections.abc import Iterator

from mono_jax.hlo import shapes
from mono_jax.hlo.shapes import Array, Shape

_INSTRUCTION = re.compile(r"^\s+(?P<root>ROOT )?%?(?P<name>[\w.\-]+) = ")
_HEADER = re.compile(r"^(?P<entry>ENTRY )?%?(?P<name>[\w.\-]+) .*\{\s*$")
_OPCODE = re.compile(r"\s*([a-z][\w\-]*)\(")
_NAME = re.compile(r"%([\w.\-]+)")
_CALLED = re.compile(
    r"\b(?:calls|body|condition|to_apply|branch_computations|true_computation|false_computation|called_computations)="
    r"(?:\{([^}]*)\}|%?([\w.\-]+))"
)


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line: ``name = shape opcode(operands), attributes``.

    ``arguments`` is the text between the brackets: the value of a constant, or the number of a parameter.
    """

    name: str
    opcode: str
    shape: Shape
    operands: tuple[str, ...]
    arguments: str
    attributes: str

    def attribute(self, name: str) -> str | None:
        """Text of a plain attribute, or None: ``direction=LT``, ``custom_call_target="x"``."""
        found = re.search(rf"(?:^|[,\s]){name}=(\"[^\"]*\"|\{{[^{{}}]*\}}|[^,\s]+)", self.attributes)
        return found[1].strip('"') if found else None

    def called(self, name: str) -> str | None:
        """The computation named by one attribute (``calls``, ``body``, ``condition``, ``to_apply``)."""
        value = self.attribute(name)
        return value.lstrip("%") if value else None

    @property
    def all_called(self) -> list[str]:
        """All computations that it calls."""
        found = ((many or one) for many, one in _CALLED.findall(self.attributes))
        return [name.strip().lstrip("%") for names in found for name in names.split(",") if name.strip()]

    @functools.cached_property
    def backend_config(self) -> dict:
        """The backend's own attributes; {} if there are none or they are not JSON."""
        place = self.attributes.find("backend_config=")
        if place < 0:
            return {}
        text = self.attributes[place + len("backend_config=") :]
        try:
            if text.startswith('"'):  # a quoted string, the alternative notation
                text = json.JSONDecoder().raw_decode(text)[0]
            value = json.JSONDecoder().raw_decode(text)[0]
        except (json.JSONDecodeError, TypeError):
            return {}
        return value if isinstance(value, dict) else {}

    @property
    def target(self) -> str | None:
        """The target of a custom call."""
        return self.attribute("custom_call_target") if self.opcode == "custom-call" else None

    @property
    def op_name(self) -> str:
        """Its origin in the traced program; "" if unknown."""
        found = re.search(r'op_name="([^"]*)"', self.attributes)
        return found[1] if found else ""

    @property
    def index(self) -> int:
        """The index of a get-tuple-element."""
        return int(self.attribute("index") or 0)


@dataclasses.dataclass(frozen=True)
class Computation:
    """Instructions in the order in which they run, if the module is scheduled."""

    name: str
    instructions: tuple[Instruction, ...]
    root: Instruction

    @functools.cached_property
    def by_name(self) -> dict[str, Instruction]:
        return {instruction.name: instruction for instruction in self.instructions}

    @functools.cached_property
    def parameters(self) -> dict[int, Instruction]:
        return {int(i.arguments): i for i in self.instructions if i.opcode == "parameter"}

    @functools.cached_property
    def users(self) -> dict[str, list[Instruction]]:
        """{name: the instructions that read it}."""
        found: dict[str, list[Instruction]] = {}
        for instruction in self.instructions:
            for operand in dict.fromkeys(instruction.operands):
                found.setdefault(operand, []).append(instruction)
        return found

    def operands(self, instruction: Instruction) -> list[Instruction]:
        return [self.by_name[name] for name in instruction.operands if name in self.by_name]

    def arrays(self, instruction: Instruction) -> list[Array]:
        """The arrays of its operands."""
        return [array for operand in self.operands(instruction) for array in shapes.arrays(operand.shape)]


@dataclasses.dataclass(frozen=True)
class Module:
    computations: dict[str, Computation]
    entry: Computation

    def fused(self, instruction: Instruction) -> Computation | None:
        """The computation of a fusion; None for every other instruction."""
        return self.computations.get(instruction.called("calls") or "") if instruction.opcode == "fusion" else None

    def inside(self, instruction: Instruction) -> Iterator[tuple[Computation, Instruction]]:
        """Instructions of the fusion ``instruction``, including nested fusions, with their computations."""
        if (body := self.fused(instruction)) is not None:
            for inner in body.instructions:
                yield body, inner
                yield from self.inside(inner)


def read(text: str) -> Module:
    """Raises ValueError if the text is not an HLO module."""
    computations, entry = {}, None
    name, lines = "", []
    for line in text.splitlines():
        if not name:
            if (header := _HEADER.match(line)) and not line.startswith("HloModule"):
                name, lines = header["name"], []
                entry = name if header["entry"] else entry
        elif line.rstrip() == "}":
            computations[name] = _computation(name, lines)
            name = ""
        elif _INSTRUCTION.match(line):
            lines.append(line)
        elif lines:  # an attribute that contains line breaks
            lines[-1] += "\n" + line
    if entry is None:
        raise ValueError("not the text of an HLO module: no ENTRY computation")
    return Module(computations, computations[entry])


def _computation(name: str, lines: list[str]) -> Computation:
    parsed = [_instruction(line) for line in lines]
    roots = [instruction for instruction, is_root in parsed if is_root]
    return Computation(name, tuple(instruction for instruction, _ in parsed), roots[0] if roots else parsed[-1][0])


def _instruction(line: str) -> tuple[Instruction, bool]:
    head = _INSTRUCTION.match(line)
    rest = line[head.end() :]
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    opcode = _OPCODE.match(rest, end)
    if opcode is None:
        raise ValueError(f"not an instruction: {line[:120]!r}")
    close = _closing(rest, opcode.end() - 1)
    arguments, attributes = rest[opcode.end() : close], rest[close + 1 :].lstrip(", ")
    operands = () if opcode[1] in ("constant", "parameter") else tuple(_NAME.findall(arguments))
    shape = shapes.parse(rest[:end])
    return Instruction(head["name"], opcode[1], shape, operands, arguments, attributes), bool(head["root"])


def _closing(text: str, start: int) -> int:
    """Index of the bracket that closes the one at ``start``."""
    depth = 0
    for found in re.finditer(r"[()]", text[start:]):
        depth += 1 if found[0] == "(" else -1
        if depth == 0:
            return start + found.start()
    raise ValueError(f"brackets do not match: {text[:120]!r}")
