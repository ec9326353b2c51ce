"""Shapes as written in a compiled module: ``bf16[2,64]{1,0:T(8,128)(2,1)S(1)}``, tuples of them, and their bytes."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator

_BITS = {"pred": 8, "token": 0, "opaque": 0, "c64": 64, "c128": 128}
_ARRAY = re.compile(r"(?P<dtype>[a-z]\w*)\[(?P<dims>[^\]]*)\](?:\{(?P<layout>[^{}]*)\})?")
_COMMENT = re.compile(r"/\*.*?\*/")
HBM = 0  # memory space of data outside the chip's own scratch memories; on TPUs 1 is VMEM


@dataclasses.dataclass(frozen=True)
class Array:
    """One array.

    Attributes:
      dtype: as in HLO: bf16, f32, s32, pred, f8e4m3fn ...
      dims: logical sizes.
      order: dimensions from the minor to the major one.
      tiles: (8, 128), (2, 1) ...: to which the minor dimensions are padded; () = none.
      space: memory space, see ``HBM``.
    """

    dtype: str
    dims: tuple[int, ...]
    order: tuple[int, ...] = ()
    tiles: tuple[tuple[int, ...], ...] = ()
    space: int = HBM

    @property
    def size(self) -> int:
        """Elements."""
        return math.prod(self.dims)

    @property
    def bytes(self) -> int:
        """Bytes of the elements themselves, as sent over a wire."""
        return (self.size * bits(self.dtype) + 7) // 8

    @property
    def stored_bytes(self) -> int:
        """Bytes in memory: the minor dimensions are padded to whole tiles."""
        if not self.tiles or not self.dims:
            return self.bytes
        order = self.order or tuple(reversed(range(len(self.dims))))
        minor_first = [self.dims[axis] for axis in order]
        tile = list(reversed(self.tiles[0]))
        for place, edge in enumerate(tile):
            if place < len(minor_first):
                minor_first[place] = -(-minor_first[place] // edge) * edge
        return (math.prod(minor_first) * bits(self.dtype) + 7) // 8


Shape = Array | tuple["Shape", ...]


def bits(dtype: str) -> int:
    """Bits of one element."""
    if dtype in _BITS:
        return _BITS[dtype]
    found = re.match(r"[a-z]+(\d+)", dtype)
    return int(found[1]) if found else 0


def parse(text: str) -> Shape:
    """The shape described by ``text``; raises ValueError if it is not one."""
    text = _COMMENT.sub("", text).strip()
    if text.startswith("("):
        return tuple(parse(part) for part in split(text[1:-1]))
    found = _ARRAY.fullmatch(text)
    if found is None:
        raise ValueError(f"not a shape: {text[:80]!r}")
    dims = tuple(int(size.strip().removeprefix("<=")) for size in found["dims"].split(",") if size.strip())
    order, _, rest = (found["layout"] or "").partition(":")
    tiles = re.match(r"T((?:\([^)]*\))+)", rest)
    space = re.search(r"S\((\d+)\)", rest)
    return Array(
        found["dtype"],
        dims,
        tuple(int(axis) for axis in order.split(",") if axis.strip()),
        tuple(_sizes(tile) for tile in re.findall(r"\(([^)]*)\)", tiles[1])) if tiles else (),
        int(space[1]) if space else HBM,
    )


def _sizes(tile: str) -> tuple[int, ...]:
    return tuple(int(size) if size.strip().isdecimal() else 1 for size in tile.split(","))


def split(text: str) -> list[str]:
    """Splits ``text`` at the commas outside brackets."""
    parts, depth, start = [], 0, 0
    for place, letter in enumerate(text):
        if letter in "([{":
            depth += 1
        elif letter in ")]}":
            depth -= 1
        elif letter == "," and depth == 0:
            parts.append(text[start:place])
            start = place + 1
    parts.append(text[start:])
    return [part for part in parts if part.strip()]


def arrays(shape: Shape) -> Iterator[Array]:
    """All arrays of a shape."""
    if isinstance(shape, Array):
        yield shape
    else:
        for part in shape:
            yield from arrays(part)
