"""Which samples go into which row: a pure function of the configuration and the sources' lengths.

Glossary
  unit      what is shuffled and packed: a sample, or one piece of a plain text that is cut.
  pass      one walk through all units of one source, each exactly once, in an order specific to the pass.
  position  place in the shuffled mixture of all sources, 0, 1, 2, ... without end.
  epoch     as many positions as there are units; without weights it holds every unit exactly once.
  block     ``block_samples`` consecutive positions (fewer at the end of an epoch), packed into rows by themselves.
  row       global number of a packed row: rows of block 0, then of block 1, ...

Finding row r requires the row counts of all earlier blocks (counted once, kept in a file) and then only its own block.
"""

from __future__ import annotations

import dataclasses
import functools
import io
import logging
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from data_pipelines.batch import DEFAULT_GEOMETRY, TileGeometry
from data_pipelines.config import DataConfig
from data_pipelines.errors import DataError
from data_pipelines.io import publish
from data_pipelines.io.digests import with_checksum, without_checksum
from data_pipelines.io.storage import storage_error
from data_pipelines.packing.mixture import Mixture
from data_pipelines.packing.pack import Style, best_styles, pack
from data_pipelines.packing.permutation import LocalPermutation, Permutation, fold
from data_pipelines.packing.standing import Begin, Standing
from data_pipelines.packing.units import Units

SAVE_EVERY = 64  # blocks counted between two writes of the plan file
_REFUSALS = {2: "too_many_patches", 3: "too_long"}
_COUNTED = 1 << 20  # samples processed together
_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Block:
    """A packed block of m units in R rows.

    Attributes:
      source, sample, piece, visual, text: int [m], row by row.
      starts: int64 [R + 1], units of row r are starts[r] .. starts[r + 1] - 1.
      dropped: (source, sample, reason) of units known to be unusable.
      epoch: the epoch it belongs to.
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

    def __init__(
        self,
        config: DataConfig,
        units: Sequence[Units],
        file: Path | None = None,
        geometry: TileGeometry = DEFAULT_GEOMETRY,
        begin: Begin | None = None,
        describe: Callable[[int, int], str] | None = None,
    ):
        """Args:
          units: of each source in ``config``.
          file: where the row counts of the blocks are kept.
          geometry: of the model's tiles.
          begin: where an earlier mixture left off; None = the run's first mixture. Blocks are counted from there.
          describe: returns the key of (source, sample) and what is wrong with it, for messages.

        Raises DataError if there is nothing to train on.
        """
        self.config, self.units, self._file = config, list(units), file
        self._describe = describe or "{}:{}".format
        self.begin = begin or Begin.first(len(self.units))
        self._first_row = self.begin.step * config.batch_size
        self.most_tokens = config.most_tokens(geometry.tokens_per_tile)
        sizes = [u.count for u in self.units]
        for source, size in zip(config.sources, sizes):
            if not size and (source.weight is not None or not sum(sizes)):
                raise DataError(f"data.sources[{source.name}]: no usable sample; see its spec, filters and index")
        self.mixture = Mixture(sizes, [source.weight for source in config.sources])
        self.epoch_units = sum(sizes)
        self.blocks_per_epoch = -(-self.epoch_units // config.block_samples)
        self.blocks = None if config.epochs is None else self.blocks_per_epoch * config.epochs
        self._lock = threading.RLock()
        self._counts = np.zeros(0, np.int64)
        if file is not None:
            self._counts = _kept_counts(file)
        self._ends = np.cumsum(self._counts)
        self._saved = len(self._counts)
        self.block = functools.lru_cache(maxsize=8)(self._block)

    def positions(self, block: int) -> tuple[int, int]:
        """First position of a block and the one after its last."""
        epoch, number = divmod(block, self.blocks_per_epoch)
        first = epoch * self.epoch_units
        start = first + number * self.config.block_samples
        return start, min(start + self.config.block_samples, first + self.epoch_units)

    def _permutation(self, source: int, number: int) -> Permutation | LocalPermutation | None:
        """Order of pass ``number`` of a source; None = storage order."""
        config, n = self.config, self.units[source].count
        key = fold(config.seed, 0x5EED, self.begin.standings[source].number, number)
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
            standing, size = self.begin.standings[source], self.units[source].count
            parts = [np.array(standing.waiting[first:last], np.int64)]
            first, last = (_taken(standing, drawn) for drawn in (first, last))
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
        """(source, sample, piece, visual, text) of a block's units, and a code why one is unusable (0: usable)."""
        drawn = self._drawn(block)
        source = np.repeat(np.arange(len(drawn)), [len(units) for units in drawn])
        columns = zip(*(self.units[number].get(units) for number, units in enumerate(drawn)))
        sample, piece, visual, text = (np.concatenate(column) for column in columns)
        return (source, sample, piece, visual, text), self._code(visual, text)

    def _code(self, visual: np.ndarray, text: np.ndarray) -> np.ndarray:
        """Why units of these lengths are unusable: 0 = usable, 1 = bad, otherwise a key of ``_REFUSALS``."""
        long = (text > self.config.text_tokens) | (visual + text > self.most_tokens)
        return np.select([visual < 0, visual > self.config.visual_tokens, long], [1, 2, 3])

    def lengths(self, units: int) -> tuple[np.ndarray, np.ndarray]:
        """Visual and text tokens of the first units of the shuffled mixture, including too long but not bad ones."""
        blocks = range(min(self.blocks_per_epoch, -(-units // self.config.block_samples)))
        columns = [self._columns(block)[0] for block in blocks]
        visual, text = (np.concatenate([column[at] for column in columns])[:units] for at in (3, 4))
        return visual[visual >= 0], text[visual >= 0]

    @functools.cached_property
    def _styles(self) -> tuple[Style, ...]:
        """Packing styles that suit the first block; shuffled blocks are all similar."""
        (_, _, _, visual, text), refused = self._columns(0)
        good = refused == 0
        return best_styles(*self._sizes(visual[good], text[good]))

    def _sizes(self, visual: np.ndarray, text: np.ndarray) -> tuple[np.ndarray, np.ndarray, int, int]:
        """Arguments of packing: visual and text tokens, V and T; with ragged boundaries, all and text tokens, S, T."""
        if self.config.boundary_block:
            return visual + text, text, self.most_tokens, self.config.text_tokens
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
        # Packing fills rows by size; within a batch they should be mixed.
        rows = Permutation(count, fold(self.config.seed, 0xB10C, block))(rows)
        order = good[np.argsort(rows, kind="stable")]
        starts = np.concatenate([[0], np.cumsum(np.bincount(rows, minlength=count))]).astype(np.int64)
        return Block(*(column[order] for column in columns), starts, dropped, block // self.blocks_per_epoch)

    def drops(self, block: int) -> list[tuple[int, int, str]]:
        """What is dropped from a block, and from those right before it that have no row to be reported with."""
        first = block
        while 0 < first <= len(self._counts) and not self._counts[first - 1]:
            first -= 1
        return [drop for number in range(first, block + 1) for drop in self.block(number).dropped]

    def _reason(self, source: int, visual: int, code: int) -> str:
        if code == 1:
            return self.units[source].lengths.reasons[-1 - int(visual)]
        return _REFUSALS[int(code)]

    def count_blocks(self, blocks: int, rows_of: Callable[[range], Sequence[int]] | None = None) -> None:
        """Counts the rows of the first ``blocks`` blocks unless they have been counted.

        Args:
          rows_of: counts the rows of a range of blocks (in other processes, say); None = in this process.
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
        buffer = io.BytesIO()
        np.save(buffer, self._counts.astype(np.uint32))
        try:
            publish.write_bytes(self._file, with_checksum(buffer.getvalue()))
        except OSError as error:  # counted again next time: no reason to end a run
            _log.warning("%s: cannot be written (%s); the plan is not kept", self._file, error.strerror or error)
            self._file = None
        self._saved = len(self._counts)

    def save(self) -> None:
        """Saves what has been counted."""
        with self._lock:
            if len(self._counts) > self._saved:
                self._save()

    @property
    def counts(self) -> np.ndarray:
        """Rows of each block counted so far: int64 [blocks]. Stored in a checkpoint, it saves counting them again."""
        return self._counts

    def restore(self, counts: np.ndarray) -> None:
        """Takes over ``counts`` of the same plan."""
        with self._lock:
            if len(counts) > len(self._counts):
                self._counts = np.asarray(counts, np.int64)
                self._ends = np.cumsum(self._counts)

    def refused(self, source: int) -> dict[str, int]:
        """Number of samples of a source that do not fit in any row, by reason; plain text is cut instead."""
        counts, found = self.units[source].lengths.counts, Counter[str]()
        for start in range(0, len(counts), _COUNTED):
            visual, text = counts[start : start + _COUNTED].astype(np.int64).T
            good = (visual >= 0) & (text >= 0)
            code = np.where(good, self._code(visual, text), 0)
            found.update({reason: int(np.count_nonzero(code == number)) for number, reason in _REFUSALS.items()})
        return dict(+found)

    def epoch_rows(self, epoch: int, rows_of: Callable[[range], Sequence[int]] | None = None) -> int:
        """Rows of an epoch. Counts all blocks up to its end."""
        first, last = epoch * self.blocks_per_epoch, (epoch + 1) * self.blocks_per_epoch
        self.count_blocks(last, rows_of)
        return int(self._counts[first:last].sum())

    def locate(self, row: int) -> tuple[int, int] | None:
        """(block, row within it) of a global row; None after the last epoch. Counts as many blocks as necessary."""
        row -= self._first_row
        if row < 0:
            raise DataError(f"data: this mixture begins at step {self.begin.step}")
        while not len(self._ends) or row >= self._ends[-1]:
            counted = len(self._ends)
            if counted >= self.blocks_per_epoch and not self._ends[self.blocks_per_epoch - 1]:
                raise DataError(self._nothing())
            if self.blocks is not None and counted >= self.blocks:
                return None
            self.count_blocks(counted + 1)
        block = int(np.searchsorted(self._ends, row, side="right"))
        if self.blocks is not None and block >= self.blocks:
            return None  # counted by a plan with more epochs
        return block, row - (int(self._ends[block - 1]) if block else 0)

    def _nothing(self) -> str:
        """Why no sample of the first epoch is usable: the reasons with counts and an example of each."""
        drops = [drop for block in range(min(self.blocks_per_epoch, 64)) for drop in self.block(block).dropped]
        counts = Counter(reason for _, _, reason in drops)
        examples = {reason: self._describe(source, sample) for source, sample, reason in reversed(drops)}
        found = "; ".join(f"{reason} {count}, e.g. {examples[reason]}" for reason, count in counts.most_common())
        slots = " (see data.visual_tokens and data.text_tokens)" if counts.keys() & set(_REFUSALS.values()) else ""
        return f"data: no sample fits in a row{slots}: {found}"

    def standings(self, row: int) -> tuple[Standing, ...]:
        """The state of the sources once the rows before the global row ``row`` have been used."""
        place = self.locate(row)
        if place is None:
            raise DataError(f"data: its epochs end before row {row}")
        block, inside = place
        packed, at = self.block(block), self.positions(block)[inside > 0]
        left = slice(packed.starts[inside], None) if inside else slice(0, 0)
        result = []
        for source, drawn in enumerate(self.mixture.counts(at)):
            old, mine = self.begin.standings[source], packed.source[left] == source
            waiting = self.units[source].number(packed.sample[left][mine], packed.piece[left][mine]).tolist()
            result.append(Standing(old.number, _taken(old, drawn), (*waiting, *old.waiting[drawn:])))
        return tuple(result)


def _taken(standing: Standing, drawn: int) -> int:
    """Units drawn from a source's passes once ``drawn`` units of it have been drawn since the mixture began."""
    return standing.taken + max(0, drawn - len(standing.waiting))


def _kept_counts(file: Path) -> np.ndarray:
    """Rows of each block from an earlier count: int64; empty if there is no intact file.

    Raises StorageError if it cannot be read.
    """
    try:
        return np.load(io.BytesIO(without_checksum(file.read_bytes())), allow_pickle=False).astype(np.int64)
    except FileNotFoundError:
        pass
    except OSError as error:
        raise storage_error(str(file), error, "remove it, or use another cache_dir") from None
    except (ValueError, EOFError) as error:
        _log.warning("%s: damaged (%s); its blocks are counted again", file, error)
    return np.zeros(0, np.int64)
