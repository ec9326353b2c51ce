"""Small faults of a source file, found in its syntax tree and planted in its text, one at a time."""

from __future__ import annotations

import ast
import dataclasses
import hashlib
from collections.abc import Iterator

_COMPARISONS = {
    ast.Lt: ("<", "<="),
    ast.LtE: ("<=", "<"),
    ast.Gt: (">", ">="),
    ast.GtE: (">=", ">"),
    ast.Eq: ("==", "!="),
    ast.NotEq: ("!=", "=="),
    ast.Is: ("is", "is not"),
    ast.IsNot: ("is not", "is"),
    ast.In: ("in", "not in"),
    ast.NotIn: ("not in", "in"),
}
_OPERATORS = {
    ast.Add: ("+", "-"),
    ast.Sub: ("-", "+"),
    ast.Mult: ("*", "+"),
    ast.Div: ("/", "*"),
    ast.FloorDiv: ("//", "*"),
    ast.Mod: ("%", "//"),
    ast.Pow: ("**", "*"),
    ast.BitAnd: ("&", "|"),
    ast.BitOr: ("|", "&"),
    ast.LShift: ("<<", ">>"),
    ast.RShift: (">>", "<<"),
}
_PAIRS = (("min", "max"), ("minimum", "maximum"), ("argmin", "argmax"), ("any", "all"), ("zeros", "ones"))
_NAMES = {old: new for pair in _PAIRS for old, new in (pair, pair[::-1])}
_NOT_SWAPPED = ("isinstance", "getattr", "setattr", "hasattr", "print", "field", "warning", "info")
_NOT_PLANTED = (ast.Raise, ast.Assert, ast.JoinedStr, ast.Import, ast.ImportFrom)  # messages and what is not run
_SILENT_CALLS = ("field", "warning", "info", "debug")  # help texts and logs


@dataclasses.dataclass(frozen=True)
class Fault:
    """``text`` in place of the bytes ``start`` to ``stop`` of ``file``.

    Attributes:
      kind: comparison, operator, logic, negation, constant, name, arguments or axis.
      line: of the expression, from 1. column: of the change, in bytes from the start of that line: expressions inside
        one another (``a * b * c``) may begin at the same place. change: "old -> new", on one line. source: the line,
        stripped.
      digest: of the file, which tells whether an earlier result still holds.
    """

    file: str
    kind: str
    line: int
    column: int
    start: int
    stop: int
    text: str
    change: str
    source: str
    digest: str

    @property
    def key(self) -> str:
        return f"{self.file}:{self.line}:{self.column}:{self.kind}:{self.change}"

    def planted(self, data: bytes) -> bytes:
        """The file with the fault."""
        return data[: self.start] + self.text.encode() + data[self.stop :]


def faults(file: str, data: bytes) -> list[Fault]:
    """Every fault that can be planted in the file, in order; each leaves it valid Python of another meaning."""
    tree = ast.parse(data)
    lines = data.splitlines(keepends=True)
    starts = [0]
    for line in lines:
        starts.append(starts[-1] + len(line))
    digest = hashlib.sha256(data).hexdigest()[:16]
    whole, found = ast.dump(tree), []
    for kind, node, (start, stop), text in _changes(tree, data, starts):
        old = data[start:stop].decode()
        change = f"{_one_line(old)} -> {_one_line(text)}"
        source = lines[node.lineno - 1].decode().strip()
        column = start - starts[node.lineno - 1]
        fault = Fault(file, kind, node.lineno, column, start, stop, text, change, source, digest)
        try:
            differs = ast.dump(ast.parse(fault.planted(data))) != whole
        except SyntaxError:
            continue
        if differs:
            found.append(fault)
    return sorted(found, key=lambda fault: (fault.start, fault.kind))


def _one_line(text: str) -> str:
    return " ".join(text.split())


_Span = tuple[int, int]


def _changes(tree: ast.AST, data: bytes, starts: list[int]) -> Iterator[tuple[str, ast.expr, _Span, str]]:
    """(kind, node, bytes that are replaced, new text)."""

    def span(node: ast.expr) -> _Span:
        assert node.end_lineno is not None and node.end_col_offset is not None
        return starts[node.lineno - 1] + node.col_offset, starts[node.end_lineno - 1] + node.end_col_offset

    def text(node: ast.expr) -> str:
        start, stop = span(node)
        return data[start:stop].decode()

    def between(left: ast.expr, right: ast.expr, old: str, new: str) -> tuple[_Span, str]:
        start, stop = span(left)[1], span(right)[0]
        return (start, stop), data[start:stop].decode().replace(old, new, 1)

    for node in _planted(tree):
        if isinstance(node, ast.Compare):
            operands = [node.left, *node.comparators]
            for left, right, operator in zip(operands, operands[1:], node.ops):
                yield "comparison", node, *between(left, right, *_COMPARISONS[type(operator)])
        elif isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
            if not any(isinstance(part, ast.JoinedStr) or _is_text(part) for part in (node.left, node.right)):
                yield "operator", node, *between(node.left, node.right, *_OPERATORS[type(node.op)])
        elif isinstance(node, ast.BoolOp):
            old, new = ("and", "or") if isinstance(node.op, ast.And) else ("or", "and")
            yield "logic", node, *between(node.values[0], node.values[1], old, new)
        elif isinstance(node, ast.UnaryOp) and not isinstance(node.operand, ast.Constant):
            yield "negation", node, span(node), f"({text(node.operand)})"
        elif isinstance(node, ast.Constant) and isinstance(node.value, bool | int | float):
            new = str(not node.value) if isinstance(node.value, bool) else repr(_other(node.value))
            yield "constant", node, span(node), new
        elif isinstance(node, ast.Call):
            yield from (("axis", value, span(value), new) for value, new in _axes(node))
            name = _called(node)
            if name in _NAMES:
                start, stop = span(node.func)
                yield "name", node, (stop - len(name), stop), _NAMES[name]
            if len(node.args) >= 2 and name not in _NOT_SWAPPED and _swappable(*node.args[:2]):
                (start, end), (begin, stop) = span(node.args[0]), span(node.args[1])
                swapped = text(node.args[1]) + data[end:begin].decode() + text(node.args[0])
                yield "arguments", node, (start, stop), swapped


def _planted(node: ast.AST) -> Iterator[ast.AST]:
    """The nodes where a fault would change what a program does: no annotations, messages, help texts or decorators."""
    if isinstance(node, _NOT_PLANTED) or (isinstance(node, ast.Call) and _called(node) in _SILENT_CALLS):
        return
    if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
        return
    if isinstance(node, ast.keyword) and node.arg == "axis":  # changed as an axis, not as a number
        return
    yield node
    hidden: list[ast.AST | None] = []
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        hidden += node.decorator_list
    hidden += [getattr(node, name, None) for name in ("annotation", "returns")]
    for child in ast.iter_child_nodes(node):
        if not any(child is other for other in hidden):
            yield from _planted(child)


def _called(node: ast.Call) -> str:
    return getattr(node.func, "attr", getattr(node.func, "id", ""))


def _axes(node: ast.Call) -> list[tuple[ast.expr, str]]:
    """The values of ``axis=`` that are plain numbers, and another one for each."""
    found = []
    for keyword in node.keywords:
        if keyword.arg == "axis":
            try:
                axis = ast.literal_eval(keyword.value)
            except ValueError:
                continue
            if isinstance(axis, int):
                found.append((keyword.value, str({0: 1, -1: 0}.get(axis, axis - 1 if axis > 0 else axis + 1))))
    return found


def _swappable(one: ast.expr, other: ast.expr) -> bool:
    return ast.dump(one) != ast.dump(other) and not any(isinstance(arg, ast.Starred) for arg in (one, other))


def _is_text(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str | bytes)


def _other(value: int | float) -> int | float:
    return value + 1 if isinstance(value, int) else value * 2 or 1.0
