"""Which samples stand in which row: a pure function of the configuration and the sources' lengths.

Glossary
  unit      what is shuffled and packed: a sample, or one piece of plain text that is cut.
  pass      one walk through all units of one source, each exactly once, in an order of its own.
  position  place in the shuffled mixture of all sources, 0, 1, 2, ... for ever.
  epoch     as many positions as there are units; without weights it holds every unit exactly once.
  block     `block_samples` consecutive positions (fewer at the end of an epoch), packed into rows by themselves.
  row       global number of a packed row: rows of block 0, then of block 1, ...

Finding row r needs the numbers of rows of all blocks before it (counted once, kept in a file) and then only its block.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from data_pipelines.config import DataConfig
from data_pipelines.errors import DataError
from data_pipelines.io import publish
from data_pipelines.packing.lengths import Lengths
from data_pipelines.packing.pack import Style, best_styles, pack

SAVE_EVERY = 64  # blocks counted between two writes of the plan file
_MASK = 2**64 - 1


def mix(values: np.ndarray | int, key: int) -> np.ndarray:
    """A well mixed 64-bit hash of each value under a key (the finaliser of splitmix64): uint64, same shape."""
    x = np.asarray(values, np.uint64) + np.uint64((key * 0x9E3779B97F4A7C15 + 0x9E3779B97F4A7C15) & _MASK)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def fold(*numbers: int) -> int:
    """One 64-bit key from several numbers, the order of which matters."""
    key = 0
    for number in numbers:
        key = int(mix(np.array([(number ^ key) & _MASK], np.uint64), key)[0])
    return key


class Permutation:
    """A seeded permutation of range(n) of which any part can be had alone, in no memory.

    A Feistel network on the digits (left, right) of a number in a mixed radix, left < a, right < b, a * b >= n: in
    turn one digit is shifted by a hash of the other, modulo its radix, which can be undone and so is one to one. The
    few results that are not below n are sent through again until they are.
    """

    ROUNDS = 8

    def __init__(self, n: int, key: int):
        self.n = n
        self._left = max(1, math.isqrt(n))
        self._right = max(1, -(-n // self._left))
        self._keys = [fold(key, number) for number in range(self.ROUNDS)]

    def __call__(self, positions: np.ndarray) -> np.ndarray:
        """int64 [k] positions in range(n) -> int64 [k]."""
        result = self._once(np.asarray(positions, np.uint64))
        while len(outside := np.flatnonzero(result >= self.n)):
            result[outside] = self._once(result[outside])
        return result.astype(np.int64)

    def _once(self, values: np.ndarray) -> np.ndarray:
        radix = (np.uint64(self._left), np.uint64(self._right))
        digits = list(np.divmod(values, radix[1]))
        for number, key in enumerate(self._keys):
            moved, by = number % 2, digits[1 - number % 2]
            digits[moved] = (digits[moved] + mix(by, key) % radix[moved]) % radix[moved]
        return digits[0] * radix[1] + digits[1]


class LocalPermutation:
    """A permutation of range(n) that draws from few neighbourhoods at a time, so that far shards are read in long runs.

    range(n) is cut into runs of `run_length` neighbours and the runs are shuffled; `runs` of them at a time are poured
    together and shuffled. What is left over behind the last whole group is a group of its own, and comes last.
    """

    def __init__(self, n: int, key: int, runs: int, run_length: int):
        self.n, self.key, self._run_length = n, key, run_length
        self._group = runs * run_length
        self._whole = n // self._group * self._group
        self._runs = Permutation(self._whole // run_length, fold(key, 1))

    def __call__(self, positions: np.ndarray) -> np.ndarray:
        """int64 [k] positions in range(n) -> int64 [k]."""
        positions = np.asarray(positions, np.int64)
        groups = positions // self._group
        result = np.empty_like(positions)
        for group in np.unique(groups).tolist():
            at = np.flatnonzero(groups == group)
            start = group * self._group
            size = min(self._group, self.n - start)
            inside = start + Permutation(size, fold(self.key, 2, group))(positions[at] - start)
            if start < self._whole:
                inside = self._runs(inside // self._run_length) * self._run_length + inside % self._run_length
            result[at] = inside
        return result


class Mixture:
    """How many of the first n positions belong to each source: whole numbers that only grow with n, and sum to n.

    Source after source takes its share of what is left, rounded down. In one epoch without weights every source gets
    exactly its size; with weights every source is within a few samples of its share, at any n.
    """

    def __init__(self, sizes: Sequence[int], weights: Sequence[float] | None = None):
        if weights is None:
            self._shares = [int(size) for size in sizes]
        else:
            self._shares = [max(1, round(weight / sum(weights) * 2**32)) for weight in weights]

    def counts(self, n: int) -> list[int]:
        left, shares, result = n, sum(self._shares), []
        for share in self._shares:
            taken = left * share // shares if shares else 0
            result.append(taken)
            left, shares = left - taken, shares - share
        return result


class Units:
    """The units of one source and their lengths."""

    def __init__(self, lengths: Lengths, longest_piece: int, begin: int):
        """Args:
        longest_piece: tokens of the longest piece of plain text, `begin` of them put in front of each.
        """
        self.lengths, self._longest, self._begin = lengths, longest_piece, begin
        self.count = len(lengths.counts)
        self._ends: np.ndarray | None = None
        if lengths.plain:
            plain = np.maximum(-lengths.counts[:, 1].astype(np.int64), 0)
            self._ends = np.cumsum(np.maximum(1, -(-plain // (longest_piece - begin))))
            self.count = int(self._ends[-1])

    def get(self, units: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """int64 [k] units -> sample int64, piece int64, visual int64 (below 0: bad), text int64; all [k]."""
        if self._ends is None:
            counts = self.lengths.counts[units].astype(np.int64)
            return units, np.zeros_like(units), counts[:, 0], counts[:, 1]
        samples = np.searchsorted(self._ends, units, side="right")
        starts = np.where(samples > 0, self._ends[samples - 1], 0)
        pieces = units - starts
        counts = self.lengths.counts[samples].astype(np.int64)
        room = self._longest - self._begin
        cut = np.minimum(-counts[:, 1] - pieces * room, room) + self._begin
        return samples, pieces, counts[:, 0], np.where(counts[:, 1] < 0, cut, counts[:, 1])


@dataclasses.dataclass(frozen=True)
class Block:
    """A packed block of m units in R rows.

    Attributes:
      source, sample, piece, visual, text: int [m], row by row.
      starts: int64 [R + 1], units of row r are starts[r] .. starts[r + 1] - 1.
      dropped: (source, sample, reason) of units known not to be usable.
      epoch: which one.
    """

    source: np.ndarray
    sample: np.ndarray
    piece: np.ndarray
    visual: np.ndarray
    text: np.ndarray
    starts: np.ndarray
    dropped: tuple[tuple[int, int, str], ...]
    epoch: int

    @property
    def rows(self) -> int:
        return len(self.starts) - 1


class Plan:
    """The rows of all epochs."""

    def __init__(self, config: DataConfig, units: Sequence[Units], file: Path | None = None):
        """Args:
          units: of each source of `config`.
          file: where the numbers of rows per block are kept.

        Raises DataError if there is nothing to train on.
        """
        self.config, self.units, self._file = config, list(units), file
        sizes = [u.count for u in self.units]
        for source, size in zip(config.sources, sizes):
            if not size and (source.weight is not None or not sum(sizes)):
                raise DataError(f"data.sources[{source.name}]: no usable sample; see its spec, filters and index")
        weights = [source.weight for source in config.sources]
        self.mixture = Mixture(sizes, None if None in weights else weights)
        self.epoch_units = sum(sizes)
        self.blocks_per_epoch = -(-self.epoch_units // config.block_samples)
        self.blocks = None if config.epochs is None else self.blocks_per_epoch * config.epochs
        self._lock = threading.RLock()
        self._counts = np.zeros(0, np.int64)
        if file is not None and file.is_file():
            with contextlib.suppress(ValueError, EOFError):  # a damaged file: counted again
                self._counts = np.load(file).astype(np.int64)
        self._ends = np.cumsum(self._counts)
        self._saved = len(self._counts)
        self.block = functools.lru_cache(maxsize=8)(self._block)

    def positions(self, block: int) -> tuple[int, int]:
        """First position of a block and the one behind its last."""
        epoch, number = divmod(block, self.blocks_per_epoch)
        first = epoch * self.epoch_units
        start = first + number * self.config.block_samples
        return start, min(start + self.config.block_samples, first + self.epoch_units)

    def _permutation(self, source: int, number: int) -> Permutation | LocalPermutation | None:
        """Order of pass `number` of a source; None = as it lies."""
        config, n = self.config, self.units[source].count
        key = fold(config.seed, 0x5EED, source, number)
        if config.shuffle == "global":
            return Permutation(n, key)
        if config.shuffle == "local":
            return LocalPermutation(n, key, config.local_runs, config.run_length)
        return None

    def _drawn(self, block: int) -> list[np.ndarray]:
        """Units of a block, for each source: int64 arrays."""
        start, stop = self.positions(block)
        drawn = []
        for source, (first, last) in enumerate(zip(self.mixture.counts(start), self.mixture.counts(stop))):
            parts = [np.zeros(0, np.int64)]
            size = self.units[source].count
            while first < last:
                number, offset = divmod(first, size)
                taken = min(last - first, size - offset)
                places = np.arange(offset, offset + taken, dtype=np.int64)
                permutation = self._permutation(source, number)
                parts.append(places if permutation is None else permutation(places))
                first += taken
            drawn.append(np.concatenate(parts))
        return drawn

    def _columns(self, block: int) -> tuple[tuple[np.ndarray, ...], np.ndarray]:
        """(source, sample, piece, visual, text) of a block's units, and the code why one cannot be used (0: it can)."""
        drawn = self._drawn(block)
        source = np.repeat(np.arange(len(drawn)), [len(units) for units in drawn])
        gotten = [self.units[number].get(units) for number, units in enumerate(drawn)]
        sample, piece, visual, text = (np.concatenate(column) for column in zip(*gotten))
        config = self.config
        long = (text > config.text_tokens) | (visual + text > config.most_tokens)
        refused = np.select([visual < 0, visual > config.visual_tokens, long], [1, 2, 3])
        return (source, sample, piece, visual, text), refused

    def lengths(self, units: int) -> tuple[np.ndarray, np.ndarray]:
        """Visual and text tokens of the first units of the shuffled mixture, too long ones included, bad ones not."""
        blocks = range(min(self.blocks_per_epoch, -(-units // self.config.block_samples)))
        columns = [self._columns(block)[0] for block in blocks]
        visual, text = (np.concatenate([column[at] for column in columns])[:units] for at in (3, 4))
        return visual[visual >= 0], text[visual >= 0]

    @functools.cached_property
    def _styles(self) -> tuple[Style, ...]:
        """Ways of packing that suit the first block; shuffled ones are all alike."""
        (_, _, _, visual, text), refused = self._columns(0)
        good = refused == 0
        return best_styles(*self._sizes(visual[good], text[good]))

    def _sizes(self, visual: np.ndarray, text: np.ndarray) -> tuple[np.ndarray, np.ndarray, int, int]:
        """What packing goes by: visual and text tokens, V and T; in elastic rows all and text tokens, S and T."""
        if self.config.boundary_block:
            return visual + text, text, self.config.most_tokens, self.config.text_tokens
        return visual, text, self.config.visual_tokens, self.config.text_tokens

    def _block(self, block: int) -> Block:
        columns, refused = self._columns(block)
        source, sample, _, visual, text = columns
        dropped = tuple(
            (int(source[at]), int(sample[at]), self._reason(source[at], visual[at], refused[at]))
            for at in np.flatnonzero(refused)
        )
        good = np.flatnonzero(refused == 0)
        rows = pack(*self._sizes(visual[good], text[good]), self._styles)
        count = int(rows.max()) + 1 if len(rows) else 0
        # Packing fills rows by size; in a batch they are to be mixed.
        rows = Permutation(count, fold(self.config.seed, 0xB10C, block))(rows)
        order = good[np.argsort(rows, kind="stable")]
        starts = np.concatenate([[0], np.cumsum(np.bincount(rows, minlength=count))]).astype(np.int64)
        return Block(*(column[order] for column in columns), starts, dropped, block // self.blocks_per_epoch)

    def _reason(self, source: int, visual: int, code: int) -> str:
        if code == 1:
            return self.units[source].lengths.reasons[-1 - int(visual)]
        return "too_many_patches" if code == 2 else "too_long"

    def count_blocks(self, blocks: int, rows_of: Callable[[range], Sequence[int]] | None = None) -> None:
        """Makes sure that the rows of the first `blocks` blocks are counted.

        Args:
          rows_of: counts the rows of a range of blocks (in other processes, say); None = here.
        """
        with self._lock:
            while (counted := len(self._counts)) < blocks:
                todo = range(counted, min(blocks, counted + SAVE_EVERY))
                new = [self.block(block).rows for block in todo] if rows_of is None else rows_of(todo)
                self._counts = np.concatenate([self._counts, np.array(new, np.int64)])
                self._ends = np.cumsum(self._counts)
                if len(self._counts) >= self._saved + SAVE_EVERY:
                    self._save()

    def _save(self) -> None:
        if self._file is None:
            return
        self._file.parent.mkdir(parents=True, exist_ok=True)
        with publish.new_file(self._file) as file, file.open("wb") as stream:
            np.save(stream, self._counts.astype(np.uint32))
        self._saved = len(self._counts)

    def save(self) -> None:
        """Keeps what has been counted."""
        with self._lock:
            if len(self._counts) > self._saved:
                self._save()

    @property
    def counts(self) -> np.ndarray:
        """Rows of each block counted so far: int64 [blocks]. Put into a checkpoint, it spares counting anew."""
        return self._counts

    def restore(self, counts: np.ndarray) -> None:
        """Takes over `counts` of the same plan."""
        with self._lock:
            if len(counts) > len(self._counts):
                self._counts = np.asarray(counts, np.int64)
                self._ends = np.cumsum(self._counts)

    def epoch_rows(self, epoch: int, rows_of: Callable[[range], Sequence[int]] | None = None) -> int:
        """Rows of an epoch. Counts all blocks up to its end."""
        first, last = epoch * self.blocks_per_epoch, (epoch + 1) * self.blocks_per_epoch
        self.count_blocks(last, rows_of)
        return int(self._counts[first:last].sum())

    def locate(self, row: int) -> tuple[int, int] | None:
        """(block, row within it) of a global row; None behind the last epoch. Counts as many blocks as that takes."""
        while not len(self._ends) or row >= self._ends[-1]:
            counted = len(self._ends)
            if counted >= self.blocks_per_epoch and not self._ends[self.blocks_per_epoch - 1]:
                raise DataError("data: no sample fits in a row; see data.visual_tokens and data.text_tokens")
            if self.blocks is not None and counted >= self.blocks:
                return None
            self.count_blocks(counted + 1)
        block = int(np.searchsorted(self._ends, row, side="right"))
        if self.blocks is not None and block >= self.blocks:
            return None  # counted by a plan with more epochs
        return block, row - (int(self._ends[block - 1]) if block else 0)
