"""Where the time to the first token goes: each part from the JPEG to the token, measured separately."""

from __future__ import annotations

import collections
import io
import statistics
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from PIL import Image

from data_pipelines.encoding.decoding import ImageLimits, decode
from data_pipelines.encoding.patches import image_patches
from data_pipelines.encoding.tiling import Tiling
from mono_jax.generation.options import Sampling
from mono_jax.generation.prompts import Prompt, check_prompt
from mono_jax.serving.chunks import Part, Reading
from mono_jax.serving.contract import Request
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
    """ "decode_s" of a JPEG of ``tiles`` tiles, and "tile_s": resizing and cutting it; medians over ``rounds``."""
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
    decode_s = statistics.median(decoding)
    return {"decode_s": decode_s, "tile_s": max(statistics.median(both) - decode_s, 0.0)}


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
    prompt = check_prompt(engine.architecture, prompt, "")
    seconds = {"embed_s": 0.0, "prefill_s": 0.0}
    start = time.perf_counter()
    for call in _read(engine, prompt, 0, Sampling(max_new_tokens=1)):
        engine.programs.wait()
        if call is not None:
            seconds["embed_s" if isinstance(call, range) else "prefill_s"] += time.perf_counter() - start
        start = time.perf_counter()
    return seconds


def _read(engine: Engine, prompt: Prompt, row: int, sampling: Sampling) -> Iterator[Any]:
    """Dispatches what the engine does for a prompt in ``row``: yields None once admitted, then each of ``calls``."""
    programs, config = engine.programs, engine.config
    each = config.pages_of_row
    pages = list(range(1 + row * each, 1 + (row + 1) * each))
    programs.admit(row, pages, sampling, programs.request(sampling), prompt.input_ids)
    yield None
    for call in calls(programs, prompt):
        if isinstance(call, range):
            programs.embed(prompt.patches[call.start : call.stop], prompt.patch_cells[call.start : call.stop], call[0])
        else:
            reading, part = call
            programs.read(reading.chunk(part, row, False), -(-part.stop // config.page), plain=True)
        yield call


def bare_steps(engine: Engine, requests: Sequence[Request]) -> tuple[float | None, list[list[int]]]:
    """All ``requests`` decoded without a scheduler: the engine's program in a loop.

    Returns the median seconds of a step (None: there are no two steps), and each request's tokens after the first one.

    As in the engine, a step is dispatched before the tokens of the previous one are fetched. All must be greedy and of
    one length; the engine must be idle and must not reuse prefixes, because pages are overwritten.
    """
    programs, rows = engine.programs, list(range(len(requests)))
    for row, request in enumerate(requests):
        prompt = check_prompt(engine.architecture, request.prompt, "")
        collections.deque(_read(engine, prompt, row, request.sampling), maxlen=0)
    length, times, steps, before = len(requests[0].prompt.input_ids), [], [], None
    programs.wait()
    for number in range(1, requests[0].sampling.max_new_tokens):
        found = programs.step(rows, -(-(length + number) // engine.config.page), plain=True)
        if before is not None:
            steps.append(np.asarray(before))
        before = found
        times.append(time.perf_counter())
    if before is not None:
        steps.append(np.asarray(before))
    tokens = [[int(step[row, 0]) for step in steps] for row in rows]
    return statistics.median(np.diff(times)) if len(times) > 1 else None, tokens


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
