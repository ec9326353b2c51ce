"""The compiled programs of an engine: one for each size, all made before the first request.

    admit   a request takes a row
    embed   tiles to visual tokens                                     by tiles
    read    a chunk of a prompt; the last one chooses the first token  by slots, and pages of the row
    step    the next token of all answers: the text experts alone      by rows, and pages of the longest row

What is rounded up to a size is padding, which changes nothing.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mono_jax.generation.decode import Generator
from mono_jax.generation.options import Sampling
from mono_jax.generation.sampling import make_request
from mono_jax.models.execution import Execution
from mono_jax.models.paged_cache import PagedCache
from mono_jax.models.sharding import on_all
from mono_jax.models.transformer import Model, Params
from mono_jax.parallel.mesh import on_mesh
from mono_jax.serving.chunks import Chunk
from mono_jax.serving.contract import EngineConfig
from mono_jax.serving.memory import (
    TOKENS_PER_TABLE,
    Chosen,
    Logprobs,
    Memory,
    admitted,
    advanced,
    empty_memory,
    memory_shardings,
    scored,
)

LEAST_LENGTH = 128  # tokens of the shortest rows that have a program of their own
SCORES_AT_ONCE = 32  # places whose logits are in memory at once


@dataclasses.dataclass(frozen=True)
class Sizes:
    """For which sizes there are programs; each tuple ascends.

    Attributes:
      rows: of a step. step_pages, chunk_pages: of the longest row. chunks: slots. tiles: embedded at once.
      block: slots that share an expert; chunks are its multiples, or below it one block.
      plain: whether steps have programs of their own for rows that all take the likeliest token (``advanced``).
    """

    rows: tuple[int, ...]
    step_pages: tuple[int, ...]
    chunks: tuple[int, ...]
    chunk_pages: tuple[int, ...]
    tiles: tuple[int, ...]
    block: int
    plain: bool

    @classmethod
    def of(cls, config: EngineConfig, tile_tokens: int, on_cpu: bool) -> Sizes:
        """Rows and chunks double, with one between large chunks; lengths double, on CPUs and of chunks they quadruple.

        Kernels of accelerators want whole blocks, and read all weights for a short chunk, too.
        """
        block = min(128, config.prefill_chunk)
        largest = -(-config.prefill_chunk // block) * block
        longest = -(-config.max_length // config.page)
        least = -(-LEAST_LENGTH // config.page)
        quadrupled = _upto(longest, least, 4)
        doubled = _upto(largest, min(32, block) if on_cpu else block)
        between = {3 * size // 2 for size in doubled if 2 * block <= size < largest / 1.5}
        return cls(
            rows=_upto(config.max_rows),
            step_pages=quadrupled if on_cpu else _upto(longest, least),
            chunks=tuple(sorted({*doubled, *between})),
            chunk_pages=quadrupled,
            tiles=_upto(max(1, largest // tile_tokens)) if tile_tokens else (),
            block=block,
            plain=not on_cpu,
        )


def _upto(last: int, first: int = 1, factor: int = 2) -> tuple[int, ...]:
    """``first`` and its multiples by ``factor`` below ``last``, and ``last``."""
    sizes = itertools.takewhile(lambda size: size < last, (first * factor**n for n in itertools.count()))
    return (*sizes, last)


def fitting(sizes: tuple[int, ...], wanted: int) -> int:
    """The smallest of ``sizes`` that is not below ``wanted``."""
    return next(size for size in sizes if size >= wanted)


class Programs:
    """Calls of the device; each one takes the memory that the one before it left.

    Nothing is compiled by a call: a size without a program is an error.
    """

    def __init__(self, generator: Generator, config: EngineConfig, sizes: Sizes | None = None):
        """``sizes``: None = those that serve all that ``config`` allows, on this kind of device."""
        self.generator = generator
        architecture, vision = generator.config, generator.config.vision
        self.tile_tokens = 0 if vision is None else vision.tile_tokens
        self.sizes = sizes or Sizes.of(config, self.tile_tokens, jax.default_backend() == "cpu")
        self._model = Model(architecture)
        features = 0
        if self.tile_tokens:  # of the longest prompt, and what a tile or a chunk may take beyond its end
            features = config.max_length + self.tile_tokens * self.sizes.tiles[-1] + self.sizes.chunks[-1]
        self._empty = functools.partial(
            empty_memory,
            architecture,
            generator.dtype,
            rows=config.max_rows,
            pages=config.max_slots // config.page + 1,
            page=config.page,
            length=-(-config.max_length // config.page),
            features=features,
        )
        self._memory: Memory | None = None
        self._compiled: dict[tuple[Any, ...], Any] = {}

    # ------------------------------------------------------------------------------------------------------------------
    # Calls
    # ------------------------------------------------------------------------------------------------------------------

    def admit(self, row: int, pages: list[int], sampling: Sampling, context: np.ndarray) -> None:
        """``context``: ids of the prompt, which matter to penalties only."""
        config = self.generator.config
        table = np.zeros(self._memory.rows.pages.shape[1], np.int32)
        table[: len(pages)] = pages
        seen = np.zeros(config.vocab_size, bool)
        if sampling.penalises:
            seen[context] = True
        request = make_request(config, [sampling], 1, TOKENS_PER_TABLE)
        wants = np.bool_(sampling.logprobs is not None)
        self._memory = self._compiled["admit",](self._memory, np.int32(row), table, wants, request, seen)

    def embed(self, patches: np.ndarray, cells: np.ndarray, start: int) -> None:
        """Visual tokens ``start`` and following of the prompt that is read."""
        vision = self.generator.config.vision
        tiles = fitting(self.sizes.tiles, -(-len(patches) // self.tile_tokens))
        pixels = np.zeros((1, tiles * self.tile_tokens, *_patch(vision)), np.uint8)
        padded = np.zeros((1, tiles * self.tile_tokens), np.int32)
        pixels[0, : len(patches)], padded[0, : len(cells)] = patches, cells
        program = self._compiled["embed", tiles]
        self._memory = program(self.generator.params, self._memory, pixels, padded, np.int32(start))

    def read(self, chunk: Chunk, pages: int) -> tuple[Chosen, Logprobs]:
        """What a prompt's last chunk chooses, and scores; ``pages``: of the row up to the chunk's end."""
        program = self._compiled["read", chunk.tokens.size, fitting(self.sizes.chunk_pages, pages)]
        self._memory, found = program(self.generator.params, self._memory, chunk)
        return found

    def step(self, rows: list[int], pages: int, plain: bool) -> Chosen:
        """The next token of each of ``rows``; ``pages``: of the longest one; ``plain``: all take the likeliest one."""
        size = fitting(self.sizes.rows, len(rows))
        index = np.full(size, self._memory.rows.done.size - 1, np.int32)
        index[: len(rows)] = rows
        program = self._compiled["step", plain and self.sizes.plain, size, fitting(self.sizes.step_pages, pages)]
        self._memory, found = program(self.generator.params, self._memory, index)
        return found

    def wait(self) -> None:
        """Until the device has done all that it was asked for."""
        jax.block_until_ready(self._memory)

    # ------------------------------------------------------------------------------------------------------------------
    # Compiling
    # ------------------------------------------------------------------------------------------------------------------

    def compile(self) -> int:
        """Makes the memory and all programs, several at a time; returns how many programs there are."""
        generator, mesh = self.generator, self.generator.mesh
        abstract = jax.eval_shape(self._empty)
        places = None if mesh is None else memory_shardings(generator.config, abstract, mesh)
        self._memory = jax.jit(self._empty, out_shardings=places)()
        params, memory = jax.tree.map(_shape, (generator.params, self._memory))

        def compiled(function: Callable[..., Any], with_results: bool, *arguments: Any) -> Any:
            out = places if not with_results or mesh is None else (places, None)
            donated = 1 if arguments[0] is params else 0
            function = function if mesh is None else on_mesh(function, mesh)
            jitted = jax.jit(function, donate_argnums=donated, out_shardings=out)
            return jitted.lower(*arguments).compile()

        jobs = {("admit",): lambda: compiled(self._admit, False, memory, *self._admit_shapes(memory))}
        for tiles in self.sizes.tiles:
            count = tiles * self.tile_tokens
            shapes = (_i32(1, count, *_patch(generator.config.vision), dtype=np.uint8), _i32(1, count), _i32())
            jobs["embed", tiles] = lambda shapes=shapes: compiled(self._embed, False, params, memory, *shapes)
        for size, pages in itertools.product(self.sizes.chunks, self.sizes.chunk_pages):
            read = functools.partial(self._read, pages=pages)
            jobs["read", size, pages] = lambda f=read, s=size: compiled(f, True, params, memory, _chunk_shapes(s))
        kinds = (False, True) if self.sizes.plain else (False,)
        for plain, rows, pages in itertools.product(kinds, self.sizes.rows, self.sizes.step_pages):
            step = functools.partial(self._step, pages=pages, plain=plain)
            jobs["step", plain, rows, pages] = lambda f=step, r=rows: compiled(f, True, params, memory, _i32(r))
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            self._compiled = dict(zip(jobs, pool.map(lambda job: job(), jobs.values())))
        return len(jobs)

    def _admit_shapes(self, memory: Memory) -> tuple[Any, ...]:
        config = self.generator.config
        request = jax.tree.map(_shape, make_request(config, [Sampling()], 1, TOKENS_PER_TABLE))
        flag, context = _i32(dtype=bool), _i32(config.vocab_size, dtype=bool)
        return _i32(), _i32(memory.rows.pages.shape[1]), flag, request, context

    @staticmethod
    def _admit(memory: Memory, *arguments: Any) -> Memory:
        return memory._replace(rows=admitted(memory.rows, *arguments))

    def _embed(self, params: Params, memory: Memory, patches: jax.Array, cells: jax.Array, start: jax.Array) -> Memory:
        visual = self._model.ends(params).embed_visual(patches, cells, self.generator.dtype)[0]
        features = jax.lax.dynamic_update_slice_in_dim(memory.features, visual.astype(memory.features.dtype), start, 0)
        return memory._replace(features=features)

    def _read(
        self, params: Params, memory: Memory, chunk: Chunk, *, pages: int
    ) -> tuple[Memory, tuple[Chosen, Logprobs]]:
        size = chunk.tokens.size
        model = Model(self.generator.config, Execution(experts="grouped", experts_block=min(self.sizes.block, size)))
        visual = None
        if self.tile_tokens:
            visual = jax.lax.dynamic_slice_in_dim(memory.features, chunk.feature, size)[None]
        batch = {
            "tokens": chunk.tokens[None],
            "patch_cells": jnp.zeros((1, 0), jnp.int32),
            "order": chunk.order,
            "positions": chunk.positions,
            "segments": chunk.segments,
            "lengths": jnp.full((1, size), chunk.length),
        } | ({} if visual is None else {"visual_slots": chunk.boundary})
        cache = PagedCache.of_rows(memory.keys, memory.values, memory.rows.pages[chunk.row][None, :pages])
        output = model(params, batch, self.generator.dtype, cache=cache, visual=visual)
        logits = model.logits(params, output.hidden[:, chunk.end])
        rows, chosen = advanced(
            memory.rows, chunk.row[None], logits, chunk.length[None], chunk.is_last[None], plain=False
        )
        at_once = max(n for n in range(1, SCORES_AT_ONCE + 1) if size % n == 0)
        scores = scored(
            functools.partial(model.logits, params), output.hidden[0], chunk.targets, chunk.is_scored, at_once
        )
        memory = memory._replace(keys=output.cache.keys, values=output.cache.values, rows=rows)
        return memory, on_all((chosen, scores))

    def _step(
        self, params: Params, memory: Memory, index: jax.Array, *, pages: int, plain: bool
    ) -> tuple[Memory, Chosen]:
        rows = memory.rows
        lengths, goes_on = rows.length[index], ~rows.done[index]
        batch = {
            "tokens": rows.token[index][:, None],
            "patch_cells": jnp.zeros((index.size, 0), jnp.int32),
            "order": jnp.zeros((index.size, 1), jnp.int32),
            "positions": lengths[:, None],
            "segments": goes_on.astype(jnp.int32)[:, None],
            "lengths": lengths[:, None] + 1,
        }
        cache = PagedCache.of_rows(memory.keys, memory.values, rows.pages[index, :pages])
        output = self._model(params, batch, self.generator.dtype, cache=cache)
        logits = self._model.logits(params, output.hidden[:, 0])
        rows, chosen = advanced(rows, index, logits, lengths + 1, goes_on, plain=plain)
        memory = memory._replace(keys=output.cache.keys, values=output.cache.values, rows=rows)
        return memory, on_all(chosen)


def _patch(vision: Any) -> tuple[int, int, int]:
    return vision.token_pixels, vision.token_pixels, vision.num_channels


def _shape(array: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=getattr(array, "sharding", None))


def _i32(*shape: int, dtype: Any = np.int32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def _chunk_shapes(size: int) -> Chunk:
    of_slots, of_row, one = _i32(size), _i32(1, size), _i32()
    flag = _i32(dtype=bool)
    return Chunk(of_slots, of_slots, of_row, of_row, of_row, _i32(1), one, one, one, one, flag, flag)
