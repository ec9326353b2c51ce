"""Which samples of the shards are offered: usable ones, joined with captions, filtered, repeated."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Iterator

import numpy as np

from data_pipelines.sources.captions import Captions
from data_pipelines.sources.indices.shard_index import ORIGINS, SCORES, ShardIndex
from data_pipelines.sources.scores import Scores
from data_pipelines.sources.selection.filters import Filters, shapes
from data_pipelines.sources.selection.share import Share

_TEXT_COLUMNS = {
    "text_chars": "chars",
    "script": "script",
    "text_hash": "text_hash",
}  # column of an index: column of captions
# Reasons of samples that a joined caption makes usable.
_CURED_BY_CAPTION = ("no_caption", "caption_not_utf8", "text_too_large", "broken_json", "nothing_to_train")


CONTRADICTION = "caption_of_another_image"  # reason for a sample whose joined caption names another url or sha256


@dataclasses.dataclass(frozen=True)
class Selection:
    """The samples of one shard that are offered.

    Attributes:
      index: the shard's index.
      rows: int64 [k] rows of the index, in order; a row that is offered again occurs again.
      captions: int64 [k] rows of the joined captions, -1 = the sample's own text; None without a join.
    """

    index: ShardIndex
    rows: np.ndarray
    captions: np.ndarray | None = None

    def where(self, chosen: np.ndarray) -> Selection:
        """The samples picked by ``chosen`` (bool [k] or int [m])."""
        return Selection(self.index, self.rows[chosen], None if self.captions is None else self.captions[chosen])


@dataclasses.dataclass(frozen=True)
class Joined:
    """Data joined to the samples of shards by key. ``separator``: see ``Format.key_separator``."""

    captions: Captions | None = None
    scores: Scores | None = None
    separator: str = "/"

    @property
    def digest(self) -> str:
        return "".join(part.digest for part in (self.captions, self.scores) if part is not None)


def select(
    index: ShardIndex, name: str, filters: Filters, joined: Joined
) -> tuple[Selection, np.ndarray, Counter[str]]:
    """(the offered samples of a shard, the hashes of their texts, the unusable samples by reason).

    Args:
      name: of the shard in keys.
      filters: these count what they drop.
    """
    usable, lost = _usable(index, name, joined)
    found = columns(usable, name, joined)
    keep = filters.keep(found, index.columns["image_count"][usable.rows] > 0)
    return usable.where(keep), found["text_hash"][keep], lost


def columns(usable: Selection, name: str, joined: Joined) -> dict[str, np.ndarray]:
    """[k] each: what filters know about samples: their scores, shapes and texts (joined ones if there are any)."""
    index, rows = usable.index, usable.rows
    text = {key: index.columns[key][rows] for key in _TEXT_COLUMNS}
    if joined.captions is not None:
        text = {key: joined.captions.columns[column][usable.captions] for key, column in _TEXT_COLUMNS.items()}
    scores = {score: index.columns[score][rows] for score in SCORES}
    if joined.scores is not None:
        scores |= joined.scores.find(name, index.keys.take(rows), joined.separator)
    return scores | shapes(index, rows) | text


def settle(indices: Iterable[ShardIndex], names: Iterable[str], filters: Filters, joined: Joined) -> None:
    """Turns the filters' shares of the samples into values, based on all usable samples of the shards."""
    wanted = filters.shared
    parts = []
    for name, index in zip(names, indices):
        found = columns(_usable(index, name, joined)[0], name, joined)
        parts.append({column: found[column].astype(np.float32) for column in wanted})
    filters.settle({column: np.concatenate([part[column] for part in parts]) for column in wanted})


def unique(
    indices: Iterable[ShardIndex], names: Iterable[str], filters: Filters, joined: Joined
) -> Iterator[np.ndarray]:
    """For each shard, which of its selected samples are not duplicates (bool [k])."""
    hashes = []
    trial = filters.uncounted()
    for name, index in zip(names, indices):
        selection, text_hash, _ = select(index, name, trial, joined)
        hashes.append((text_hash, index.columns["image_hash"][selection.rows]))
    mask = filters.unique(*(np.concatenate(column) for column in zip(*hashes)))
    return iter(np.split(mask, np.cumsum([len(text_hash) for text_hash, _ in hashes])[:-1]))


def _usable(index: ShardIndex, name: str, joins: Joined) -> tuple[Selection, Counter[str]]:
    """(the usable samples of a shard, with their joined captions; the unusable samples by reason)."""
    captions = joins.captions
    if captions is None:
        return Selection(index, index.usable), Counter(index.dropped())
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
    return Selection(index, rows[good], joined[good]), +lost


def repeat(selection: Selection, share: Share) -> Selection:
    """The part of the samples that ``share`` offers."""
    return selection if share == Share() else selection.where(share.rows(len(selection.rows)))
