"""Which samples of the shards are offered: usable ones, joined with captions, filtered, repeated."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Iterator

import numpy as np

from data_pipelines.sources.captions import Captions
from data_pipelines.sources.indices.shard_index import ORIGINS, ShardIndex
from data_pipelines.sources.selection.filters import Filters
from data_pipelines.sources.selection.share import Share

_TEXT_COLUMNS = {"text_chars": "chars", "script": "script", "text_hash": "text_hash"}  # of an index: of captions
# Reasons of samples that a joined caption makes usable.
_CURED_BY_CAPTION = ("no_caption", "caption_not_utf8", "text_too_large", "broken_json", "nothing_to_train")


CONTRADICTION = "caption_of_another_image"  # reason of a sample whose joined caption names another url or sha256


@dataclasses.dataclass(frozen=True)
class Selection:
    """The samples of one shard that are offered.

    Attributes:
      index: the shard's index.
      rows: int64 [k] rows of the index, in order; a row occurs again where it is offered again.
      captions: int64 [k] rows of the joined captions, -1 = the sample's own text; None without a join.
    """

    index: ShardIndex
    rows: np.ndarray
    captions: np.ndarray | None = None

    def where(self, chosen: np.ndarray) -> Selection:
        """Those that ``chosen`` (bool [k] or int [m]) picks."""
        return Selection(self.index, self.rows[chosen], None if self.captions is None else self.captions[chosen])


def select(
    index: ShardIndex, name: str, filters: Filters, captions: Captions | None
) -> tuple[Selection, np.ndarray, Counter[str]]:
    """(what is offered of a shard, the hashes of its texts, the unusable samples by reason).

    Args:
      name: of the shard in keys.
      filters: count what they drop.
    """
    rows, joined, lost = _join(index, name, captions)
    text = {key: index.columns[key][rows] for key in _TEXT_COLUMNS}
    if joined is not None:
        text = {key: captions.columns[column][joined] for key, column in _TEXT_COLUMNS.items()}
    keep = filters.keep(index, rows, text)
    return Selection(index, rows, joined).where(keep), text["text_hash"][keep], lost


def unique(
    indices: Iterable[ShardIndex], names: Iterable[str], filters: Filters, captions: Captions | None
) -> Iterator[np.ndarray]:
    """For each shard, which of its selected samples are no duplicates (bool [k])."""
    hashes = []
    trial = Filters(filters.options)  # whose counts are thrown away
    for name, index in zip(names, indices):
        selection, text_hash, _ = select(index, name, trial, captions)
        hashes.append((text_hash, index.columns["image_hash"][selection.rows]))
    mask = filters.unique(*(np.concatenate(column) for column in zip(*hashes)))
    return iter(np.split(mask, np.cumsum([len(text_hash) for text_hash, _ in hashes])[:-1]))


def _join(
    index: ShardIndex, name: str, captions: Captions | None
) -> tuple[np.ndarray, np.ndarray | None, Counter[str]]:
    """(usable rows, their joined captions, unusable samples by reason) of a shard."""
    if captions is None:
        return index.usable, None, Counter(index.dropped())
    cured = [i + 1 for i, reason in enumerate(index.reasons) if reason in _CURED_BY_CAPTION]
    reason, with_image = index.columns["reason"], index.columns["image_count"] > 0
    rows = np.flatnonzero(with_image & np.isin(reason, [0, *cured]))
    origins = {origin: index.columns[origin][rows] for origin in ORIGINS}
    joined = captions.find(name, index.keys.take(rows), origins)
    offered = np.zeros(len(index), bool)
    offered[rows] = True
    lost = Counter(index.reasons[r - 1] if r else "no_image" for r in reason[~offered].tolist())
    lost["no_joined_caption"] += int(np.count_nonzero(joined < 0))
    contradicted = (joined >= 0) & captions.contradicts(joined, origins)
    lost[CONTRADICTION] += int(np.count_nonzero(contradicted))
    good = (joined >= 0) & ~contradicted
    return rows[good], joined[good], +lost


def repeat(selection: Selection, share: Share) -> Selection:
    """What ``share`` offers of the samples."""
    return selection if share == Share() else selection.where(share.rows(len(selection.rows)))
