"""Arrays that stay on disk until a slice of them is requested."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

Bounds = tuple[tuple[int, int], ...]  # (start, stop) along each axis


@dataclass(frozen=True)
class LazyArray:
    """An array in a file: ``lazy[n]`` reads layer n, ``np.asarray(lazy)`` reads everything.

    ``lazy[a:b]`` is a range of layers, which is lazy too.

    ``read(n)`` returns slice n of the leading axis, or the whole array if it is not stacked (n None). ``region`` reads
    any part by itself, where reading less than a slice pays off (a bucket); None: parts are cut out of slices.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    stacked: bool
    read: Callable[[int | None], np.ndarray]
    region: Callable[[tuple[slice, ...]], np.ndarray] | None = None

    def __getitem__(self, n: int | slice) -> Any:
        if isinstance(n, slice):
            start, stop, step = n.indices(self.shape[0])
            if step != 1:
                raise ValueError(f"a range of layers must be contiguous, not in steps of {step}")
            shape = (max(stop - start, 0), *self.shape[1:])
            return replace(self, shape=shape, stacked=True, read=lambda i: self[start + i], region=None)
        return self.read(n) if self.stacked else self.read(None)[n]

    def parts(self, bounds: Sequence[Bounds], dtype: Any = None) -> list[np.ndarray]:
        """The parts within ``bounds``; each slice is read once, and slices that no part needs are not read."""
        inside = [tuple(slice(*pair) for pair in part) for part in bounds]
        if self.region is not None:
            return [np.asarray(self.region(index), dtype or self.dtype) for index in inside]
        out = [np.empty([stop - start for start, stop in part], dtype or self.dtype) for part in bounds]
        if not self.stacked:
            whole = self.read(None) if bounds else None
            for target, index in zip(out, inside):
                target[...] = whole[index]
            return out
        for n in sorted({n for part in bounds for n in range(*part[0])}):
            layer = self.read(n)
            for target, index in zip(out, inside):
                if index[0].start <= n < index[0].stop:
                    target[n - index[0].start] = layer[index[1:]]
        return out

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        out = np.empty(self.shape, dtype or self.dtype)
        if self.stacked:
            for n in range(self.shape[0]):
                out[n] = self.read(n)
        else:
            out[...] = self.read(None)
        return out

    def astype(self, dtype: Any) -> LazyArray:
        """The same array, cast slice by slice as it is read."""
        region = self.region and (lambda index: self.region(index).astype(dtype))
        return replace(self, dtype=np.dtype(dtype), read=lambda n: self.read(n).astype(dtype), region=region)
