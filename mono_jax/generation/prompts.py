"""Prompts, checked and packed into batches.

Rows, visual slots, text slots, cache and answer lengths are rounded up to buckets, so that few programs are compiled;
the added slots are padding (segment 0) that nothing attends to.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from data_pipelines.batch import BatchSpec, native_cells, of_native_cells
from mono_jax.errors import GenerationError
from mono_jax.models.architecture import Architecture

TEXT_BUCKET = 16  # text slots, cache slots and answers are rounded up to buckets of this unit


@dataclasses.dataclass(frozen=True)
class Prompt:
    """One turn's input.

    Attributes:
      input_ids: int [n], with one image placeholder (``config.image_token_id``) per visual token. The last
        one must be text, because visual tokens predict nothing.
      patches: uint8 [v, P, P, 3], pixels of each visual token in order, or float32 that is already normalised;
        None = no image.
      patch_cells: int32 [v], cell of each token in its tile's grid; None = whole tiles, cell by cell.
    """

    input_ids: Sequence[int] | np.ndarray
    patches: np.ndarray | None = None
    patch_cells: np.ndarray | None = None


def bucket(n: int, unit: int = 1) -> int:
    """The smallest of unit * (0, 1, ... 8, 10, 12, 14, 16, 20, 24, ...) that is not below n: four sizes per octave."""
    units = -(-n // unit)
    step = 1 << max(0, (units - 1).bit_length() - 3)
    return -(-units // step) * step * unit


def check_prompt(config: Architecture, prompt: Prompt, where: str) -> Prompt:
    """``prompt`` as NumPy arrays (no image = zero patches); raises GenerationError if it does not fit the model."""
    vision = config.vision
    ids = np.asarray(prompt.input_ids)
    if ids.ndim != 1 or not ids.size or not np.issubdtype(ids.dtype, np.integer):
        raise GenerationError(
            f"{where}input_ids must be a non-empty list of token ids, got {ids.dtype}{list(ids.shape)}"
        )
    if ids.min() < 0 or ids.max() >= config.vocab_size:
        wrong = ids[(ids < 0) | (ids >= config.vocab_size)][0]
        raise GenerationError(
            f"{where}token id {wrong} is outside the vocabulary of {config.vocab_size}: use the model's own tokenizer"
        )
    given = 0 if prompt.patches is None else len(prompt.patches)
    if vision is None:
        if given:
            raise GenerationError(
                f"{where}this model takes no images: load one with a vision_config, or give text only"
            )
        return Prompt(ids, np.zeros((0, 0, 0, 3), np.uint8), np.zeros(0, np.int32))
    placeholders = int((ids == config.image_token_id).sum())
    if placeholders != given:
        raise GenerationError(
            f"{where}{placeholders} image placeholders (id {config.image_token_id}) but {given} visual tokens: "
            "each image needs as many placeholders as it has visual tokens"
        )
    if ids[-1] == config.image_token_id:
        raise GenerationError(f"{where}the prompt ends with an image placeholder: close the image and ask something")
    shape = (vision.token_pixels, vision.token_pixels, vision.num_channels)
    patches = np.zeros((0, *shape), np.uint8) if prompt.patches is None else np.asarray(prompt.patches)
    if patches.shape[1:] != shape or patches.dtype not in (np.uint8, np.float32):
        raise GenerationError(
            f"{where}patches are {patches.dtype}{list(patches.shape)}, this model takes uint8 or float32 "
            f"[v, {', '.join(map(str, shape))}]"
        )
    return Prompt(ids, patches, _check_cells(config, prompt.patch_cells, given, where))


def _check_cells(config: Architecture, cells: np.ndarray | None, count: int, where: str) -> np.ndarray:
    """int32 [count]; None = whole tiles in the order of ``ps_version``. A modular model takes whole tiles only."""
    vision = config.vision
    if vision.native:
        return _check_native_cells(cells, count, where)
    tile, edge = vision.tile_tokens, vision.tile // vision.token_pixels
    if (cells is None or not config.is_monolithic) and count % tile:
        raise GenerationError(f"{where}{count} visual tokens are not whole tiles of {tile} tokens")
    if cells is None:
        grid = np.arange(tile).reshape(edge, edge)
        cells = np.resize(grid if vision.ps_version == "v2" else grid.T, count)
    cells = np.asarray(cells, np.int32)
    if cells.shape != (count,) or (count and not 0 <= cells.min() <= cells.max() < tile):
        raise GenerationError(f"{where}patch_cells must be {count} numbers from 0 to {tile - 1}, one per visual token")
    return cells


def _check_native_cells(cells: np.ndarray | None, count: int, where: str) -> np.ndarray:
    """int32 [count], for whole images."""
    given = np.zeros(0, np.int32) if cells is None else np.asarray(cells, np.int32)
    start = 0
    while start < len(given):
        _, _, rows, columns = map(int, of_native_cells(given[start]))
        image = given[start : start + rows * columns]
        if not np.array_equal(image, native_cells(columns, rows)):
            break
        start += len(image)
    if len(given) != count or start < len(given):
        raise GenerationError(
            f"{where}patch_cells must be those of whole images ({count} visual tokens), as made by "
            "data_pipelines.batch.native_cells: this model takes images in native resolution"
        )
    return given


def pack(
    config: Architecture, prompts: Sequence[Prompt], offsets: np.ndarray, rows: int
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """One prompt per row, and the index of the last text slot of each, int32 [rows].

    Positions of row i start at ``offsets[i]``; "lengths" is the length of its context after this batch.
    """
    visual = bucket(max(len(prompt.patches) for prompt in prompts), config.vision.tile_tokens if config.vision else 1)
    text = bucket(max(len(prompt.input_ids) - len(prompt.patches) for prompt in prompts), TEXT_BUCKET)
    spec = BatchSpec(visual, text, config.vision.token_pixels if config.vision else 0)
    batch = spec.empty(rows)
    del batch["targets"], batch["loss_weights"]
    dtype = next((p.patches.dtype for p in prompts if len(p.patches)), np.uint8)
    batch["patches"] = batch["patches"].astype(dtype, copy=False)
    batch["lengths"] = np.zeros_like(batch["positions"])
    ends = np.zeros(rows, np.int32)
    for i, (prompt, offset) in enumerate(zip(prompts, offsets)):
        ids, v = prompt.input_ids, len(prompt.patches)
        n, t = len(ids), len(ids) - v
        # A model without vision has no placeholder, whatever the id is.
        is_visual = (ids == config.image_token_id) & (config.vision is not None)
        slots = np.where(is_visual, np.cumsum(is_visual) - 1, visual + np.cumsum(~is_visual) - 1)
        batch["tokens"][i, :t] = ids[~is_visual]
        batch["patches"][i, :v], batch["patch_cells"][i, :v] = prompt.patches, prompt.patch_cells
        batch["order"][i] = np.concatenate([slots, np.setdiff1d(np.arange(spec.sequence), slots)])
        batch["positions"][i, :n] = offset + np.arange(n)
        batch["segments"][i, :n] = 1
        batch["lengths"][i] = offset + n
        ends[i] = t - 1
    return batch, ends
