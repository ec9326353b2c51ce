"""Where the time to the first token goes: from a JPEG to the token, each part by itself."""

from __future__ import annotations

import io
import time

import numpy as np
from PIL import Image

from data_pipelines.encoding.decoding import ImageLimits, decode
from data_pipelines.encoding.patches import image_patches
from data_pipelines.encoding.tiling import Tiling
from mono_jax.generation.options import Sampling
from mono_jax.generation.prompts import Prompt, check_prompt
from mono_jax.serving.chunks import Reading
from mono_jax.serving.engine import Engine


def host_parts(engine: Engine, tiles: int, rounds: int) -> dict[str, float]:
    """ "decode_s" of a JPEG of ``tiles`` tiles, and "tile_s": resizing and cutting it; least times of ``rounds``."""
    geometry = engine.architecture.geometry
    columns = next(n for n in range(int(tiles**0.5), 0, -1) if tiles % n == 0)
    size = (tiles // columns * geometry.tile_size, columns * geometry.tile_size)
    picture = np.random.default_rng(0).integers(0, 256, (size[1] // 16, size[0] // 16, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(picture).resize(size).save(file, "JPEG", quality=90)
    data, limits, tiling = file.getvalue(), ImageLimits(), Tiling(geometry, tiles, tiles, thumbnail=True)
    decoding, both = [], []
    for _ in range(rounds):
        start = time.perf_counter()
        decode(data, limits)
        decoding.append(time.perf_counter() - start)
        start = time.perf_counter()
        image_patches(data, tiling, limits)
        both.append(time.perf_counter() - start)
    return {"decode_s": min(decoding), "tile_s": max(min(both) - min(decoding), 0.0)}


def device_parts(engine: Engine, prompt: Prompt) -> dict[str, float]:
    """ "embed_s" (or encoding: from pixels to visual tokens) and "prefill_s" of one prompt, each call to its end.

    The engine must be idle, and reuse no prefixes: the first pages are written.
    """
    programs, config = engine.programs, engine.config
    prompt = check_prompt(engine.architecture, prompt, "")
    sizes, tile = programs.sizes, programs.tile_tokens
    reading = Reading(engine.architecture, prompt, sizes.chunks, sizes.block)
    tokens = len(reading.ids)
    programs.admit(0, list(range(1, -(-tokens // config.page) + 1)), Sampling(max_new_tokens=1), reading.ids)
    programs.wait()
    seconds = {"embed_s": 0.0, "prefill_s": 0.0}
    read = embedded = 0
    while read < tokens:
        part = reading.part(read)
        start = time.perf_counter()
        while embedded < part.feature_stop:
            stop = min(embedded + sizes.tiles[-1] * tile, -(-part.feature_stop // tile) * tile)
            programs.embed(prompt.patches[embedded:stop], prompt.patch_cells[embedded:stop], embedded)
            embedded = stop
        programs.wait()
        middle = time.perf_counter()
        programs.read(reading.chunk(part, 0, False), -(-part.stop // config.page))
        programs.wait()
        seconds["embed_s"] += middle - start
        seconds["prefill_s"] += time.perf_counter() - middle
        read = part.stop
    return seconds
