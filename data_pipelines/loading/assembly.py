"""From samples to the fields of a packed row."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from data_pipelines.batch import Batch
from data_pipelines.encoding.samples import Sample


def fill_row(
    batch: Batch,
    row: int,
    samples: Sequence[Sample | None],
    visual_slots: int,
    weighting: str,
    sources: Sequence[int] = (),
) -> None:
    """Writes samples, whose patches are already in place, one after another into a row that holds only padding.

    Args:
      samples: None keeps its segment number but takes no slot.
      visual_slots: V.
      weighting: see ``DataConfig.loss_weighting``.
      sources: number of each sample's source, if the batch has the field "sources".
    """
    good = [(segment, sample) for segment, sample in enumerate(samples, 1) if sample is not None]
    if not good:
        return
    lengths = np.array([len(sample.input_ids) for _, sample in good])
    ids, visual = (np.concatenate([getattr(sample, name) for _, sample in good]) for name in ("input_ids", "visual"))
    n, text = len(ids), ~visual
    v, t = np.count_nonzero(visual), np.count_nonzero(text)

    targets, weights = _targets(ids, [sample for _, sample in good], weighting)
    batch["patch_cells"][row, :v] = np.concatenate([sample.patch_cells for _, sample in good])
    batch["tokens"][row, :t] = ids[text]
    batch["targets"][row, :t] = targets[text]
    batch["loss_weights"][row, :t] = weights[text]
    if "sources" in batch:
        numbers = [sources[segment - 1] + 1 for segment, _ in good]
        batch["sources"][row, :t] = np.repeat(numbers, [np.count_nonzero(~sample.visual) for _, sample in good])

    order = batch["order"][row]
    unused = np.concatenate([np.arange(v, visual_slots), np.arange(visual_slots + t, len(order))])
    order[:n][visual] = np.arange(v)
    order[:n][text] = visual_slots + np.arange(t)
    order[n:] = unused
    batch["positions"][row, :n] = np.arange(n) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    batch["segments"][row, :n] = np.repeat([segment for segment, _ in good], lengths)


def _targets(ids: np.ndarray, samples: Sequence[Sample], weighting: str) -> tuple[np.ndarray, np.ndarray]:
    """Next token and its weight at every position of a row: int32 [n], float32 [n]; 0 where nothing is trained on."""
    learnt = []  # for each position: the weight of the token that follows
    for sample in samples:
        mask = sample.loss_mask
        trained = max(1, np.count_nonzero(mask[1:]))
        learnt += [mask[1:] * {"token": 1.0, "sample": 1 / trained, "sqrt": trained**-0.5}[weighting], mask[:1] * 0]
    weights = np.concatenate(learnt).astype(np.float32)
    return np.where(weights > 0, np.roll(ids, -1), 0), weights
