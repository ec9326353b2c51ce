"""Where the time to the first token goes: each part from the JPEG to the token, measured separately."""

from __future__ import annotations

import io
import time
from collections.abc import Iterator

import numpy as np
from PIL import Image

from data_pipelines.encoding.decoding import ImageLimits, decode
from data_pipelines.encoding.patches import image_patches
from data_pipelines.encoding.tiling import Tiling
from mono_jax.generation.options import Sampling
from mono_jax.generation.prompts import Prompt, check_prompt
from mono_jax.serving.chunks import Part, Reading
from mono_jax.serving.engine import Engine
from mono_jax.serving.pages import Contents
from mono_jax.serving.programs import Programs


def jpeg(tiles: int, tile_size: int, seed: int = 0) -> bytes:
    """A JPEG that is cut into ``tiles`` tiles, with a blurred pattern made from ``seed``."""
    columns = next(n for n in range(int(tiles**0.5), 0, -1) if tiles % n == 0)
    size = (tiles // columns * tile_size, columns * tile_size)
    picture = np.random.default_rng(seed).integers(0, 256, (size[1] // 16, size[0] // 16, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(picture).resize(size).save(file, "JPEG", quality=90)
    return file.getvalue()


def host_parts(engine: Engine, tiles: int, rounds: int) -> dict[str, float]:
    """ "decode_s" of a JPEG of ``tiles`` tiles, and "tile_s": resizing and cutting it; minima over ``rounds``."""
    geometry = engine.architecture.geometry
    data, limits = jpeg(tiles, geometry.tile_size), ImageLimits()
    tiling = Tiling(geometry, tiles, tiles, thumbnail=True)
    decoding, both = [], []
    for _ in range(rounds):
        start = time.perf_counter()
        decode(data, limits)
        decoding.append(time.perf_counter() - start)
        start = time.perf_counter()
        image_patches(data, tiling, limits)
        both.append(time.perf_counter() - start)
    return {"decode_s": min(decoding), "tile_s": max(min(both) - min(decoding), 0.0)}


def digest_part(engine: Engine, prompt: Prompt) -> float:
    """Seconds for the digests by which a prompt's pages are found again.

    An engine that reuses prefixes makes them before the first token; the measured one does not, and so has none.
    """
    prompt = check_prompt(engine.architecture, prompt, "")
    start = time.perf_counter()
    Contents(engine.architecture, prompt, engine.config.page)
    return time.perf_counter() - start


def device_parts(engine: Engine, prompt: Prompt) -> dict[str, float]:
    """ "embed_s" (or encoding: from pixels to visual tokens) and "prefill_s" of one prompt, each call run to its end.

    The engine must be idle and must not reuse prefixes, because the first pages are overwritten.
    """
    programs, config = engine.programs, engine.config
    prompt = check_prompt(engine.architecture, prompt, "")
    tokens, first = len(prompt.input_ids), Sampling(max_new_tokens=1)
    programs.admit(0, list(range(1, -(-tokens // config.page) + 1)), first, programs.request(first), prompt.input_ids)
    programs.wait()
    seconds = {"embed_s": 0.0, "prefill_s": 0.0}
    for call in calls(programs, prompt):
        start = time.perf_counter()
        if isinstance(call, range):
            programs.embed(prompt.patches[call.start : call.stop], prompt.patch_cells[call.start : call.stop], call[0])
        else:
            reading, part = call
            programs.read(reading.chunk(part, 0, False), -(-part.stop // config.page), plain=True)
        programs.wait()
        seconds["embed_s" if isinstance(call, range) else "prefill_s"] += time.perf_counter() - start
    return seconds


def calls(programs: Programs, prompt: Prompt) -> Iterator[range | tuple[Reading, Part]]:
    """What the engine calls, in order, for a prompt without a cached prefix: visual tokens to embed, parts to read."""
    sizes, tile = programs.sizes, programs.tile_tokens
    reading = Reading(programs.generator.config, prompt, sizes.chunks, sizes.block)
    read = embedded = 0
    while read < len(reading.ids):
        part = reading.part(read)
        while embedded < part.feature_stop:
            stop = min(embedded + sizes.tiles[-1] * tile, -(-part.feature_stop // tile) * tile)
            yield range(embedded, stop)
            embedded = stop
        yield reading, part
        read = part.stop
