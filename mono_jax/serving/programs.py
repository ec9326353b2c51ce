"""The compiled programs of an engine: one per size, all compiled before the first request.

    admit   a request takes a row
    embed   tiles to visual tokens                                     by tiles
    read    a chunk of a prompt; the last one chooses the first token  by slots, and pages of the row
    step    the next token of all answers: the text experts only       by rows, and pages of the longest row

Sizes are rounded up with padding, which does not change the results.
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

from mono_jax import tree
from mono_jax.generation.decode import Generator
from mono_jax.generation.options import Sampling
from mono_jax.models.architecture import Architecture
from mono_jax.models.execution import Execution
from mono_jax.models.layer_ranges import canonical
from mono_jax.models.paged_cache import PagedCache, reads_page_by_page
from mono_jax.models.sharding import on_all
from mono_jax.models.transformer import Model, Params
from mono_jax.parallel.mesh import on_mesh
from mono_jax.serving.bundles import Bundle, Bundles
from mono_jax.serving.chunks import Chunk
from mono_jax.serving.contract import EngineConfig
from mono_jax.serving.memory import (
    Logprobs,
    Memory,
    admitted,
    advanced,
    empty_memory,
    memory_shardings,
    packed_request,
    scored,
    state_of,
)
from pallas_kernels.devices import platform

Key = tuple[Any, ...]  # identifies a program: its kind and its sizes
ADMIT: Key = ("admit",)
LEAST_LENGTH = 128  # tokens of the shortest rows that have a separate program
SCORES_AT_ONCE = 32  # positions whose logits are in memory at once


@dataclasses.dataclass(frozen=True)
class Sizes:
    """The sizes for which there are programs; each tuple is in ascending order.

    Attributes:
      rows: of a step. step_pages, chunk_pages: of the longest row. chunks: slots. tiles: embedded at a time.
      block: slots that share an expert; chunks are multiples of it, or a single smaller block.
      plain: whether there are extra programs for rows that all only take the likeliest token (``advanced``).
      page_by_page: whether steps read the cache page by page (``PagedCache.attend``); not on meshes.
    """

    rows: tuple[int, ...]
    step_pages: tuple[int, ...]
    chunks: tuple[int, ...]
    chunk_pages: tuple[int, ...]
    tiles: tuple[int, ...]
    block: int
    plain: bool
    page_by_page: bool = False

    @classmethod
    def of(cls, config: EngineConfig, tile_tokens: int, *, on_cpu: bool, page_by_page: bool) -> Sizes:
        """Rows and chunks double, with one size between large chunks; lengths double, on CPUs and for chunks quadruple.

        Steps that read page by page are as long as their longest row, whatever they were compiled for. Kernels of
        accelerators need whole blocks, and read all weights even for a short chunk.
        """
        block = min(128, config.prefill_chunk)
        largest = -(-config.prefill_chunk // block) * block
        longest = config.pages_of_row
        least = -(-LEAST_LENGTH // config.page)
        quadrupled = _upto(longest, least, 4)
        doubled = _upto(largest, min(32, block) if on_cpu else block)
        stepped = quadrupled if on_cpu else _upto(longest, least)
        between = {3 * size // 2 for size in doubled if 2 * block <= size < largest / 1.5}
        return cls(
            rows=_upto(config.max_rows),
            step_pages=(longest,) if page_by_page else stepped,
            chunks=tuple(sorted({*doubled, *between})),
            chunk_pages=quadrupled,
            tiles=_upto(max(1, largest // tile_tokens)) if tile_tokens else (),
            block=block,
            plain=not on_cpu,
            page_by_page=page_by_page,
        )


def _upto(last: int, first: int = 1, factor: int = 2) -> tuple[int, ...]:
    """``first`` times the powers of ``factor`` that are below ``last``, and ``last``."""
    sizes = itertools.takewhile(lambda size: size < last, (first * factor**n for n in itertools.count()))
    return (*sizes, last)


def fitting(sizes: tuple[int, ...], wanted: int) -> int:
    """The smallest of ``sizes`` that is at least ``wanted``."""
    return next(size for size in sizes if size >= wanted)


class Programs:
    """Device calls; each one takes the memory that the previous one returned.

    A call never compiles anything: a size without a program is an error.
    """

    def __init__(self, generator: Generator, config: EngineConfig, sizes: Sizes | None = None):
        """``sizes``: None = those that serve everything ``config`` allows, on this kind of device."""
        self.generator = generator
        architecture, vision = generator.config, generator.config.vision
        self.tile_tokens = 0 if vision is None else vision.tile_tokens
        self.sizes = sizes or self._sizes(config)
        self._language_model, params = _language_model(architecture, generator.params)
        self._bundles = Bundles(params if generator.mesh is None else {})  # on a mesh, they may be split
        self._language_params = self._bundles.packed(params)
        features = 0
        if self.tile_tokens:  # of the longest prompt, plus what a tile or a chunk may take beyond its end
            features = config.max_length + self.tile_tokens * self.sizes.tiles[-1] + self.sizes.chunks[-1]
        self._empty = functools.partial(
            empty_memory,
            architecture,
            generator.dtype,
            rows=config.max_rows,
            pages=config.pages + 1,
            page=config.page,
            length=config.pages_of_row,
            features=features,
            heads_first=self.sizes.page_by_page,
        )
        self._memory: Memory | None = None
        self._compiled: dict[Key, Any] = {}

    # ------------------------------------------------------------------------------------------------------------------
    # Calls
    # ------------------------------------------------------------------------------------------------------------------

    def request(self, sampling: Sampling) -> np.ndarray:
        """``sampling`` as an array, for ``admit``; from any thread."""
        return packed_request(self.generator.config, sampling)

    def admit(self, row: int, pages: list[int], sampling: Sampling, request: np.ndarray, context: np.ndarray) -> None:
        """``request``: made from ``sampling``. ``context``: ids of the prompt, which only penalties use."""
        table = np.zeros(self._memory.rows.pages.shape[1], np.int32)
        table[: len(pages)] = pages
        seen = np.zeros(self.generator.config.vocab_size, bool)
        if sampling.penalises:
            seen[context] = True
        self._memory = self._compiled[ADMIT](self._memory, np.int32(row), table, request, seen)

    def embed(self, patches: np.ndarray, cells: np.ndarray, start: int) -> None:
        """Computes the visual tokens from ``start`` on of the prompt that is being read."""
        vision = self.generator.config.vision
        tiles = (key := self.embed_key(len(patches)))[1]
        pixels = np.zeros((1, tiles * self.tile_tokens, *_patch(vision)), np.uint8)
        padded = np.zeros((1, tiles * self.tile_tokens), np.int32)
        pixels[0, : len(patches)], padded[0, : len(cells)] = patches, cells
        program = self._compiled[key]
        self._memory = program(self.generator.params, self._memory, pixels, padded, np.int32(start))

    def read(self, chunk: Chunk, pages: int, plain: bool) -> tuple[jax.Array, Logprobs | None]:
        """Returns the token that a prompt's last chunk chooses (a packed ``Chosen``), and the chunk's scores.

        pages: of the row up to the chunk's end. plain: it takes the likeliest token, and no scores are requested.
        """
        program = self._compiled[self.read_key(chunk.tokens.size, pages, plain)]
        self._memory, found = program(self.generator.params, self._memory, chunk)
        return found

    def step(self, rows: list[int], pages: int, plain: bool) -> jax.Array:
        """The next token of each of ``rows``, a packed ``Chosen``.

        pages: of the longest row. plain: all take the likeliest token.
        """
        size = fitting(self.sizes.rows, len(rows))
        index = np.full(size, len(self._memory.rows.state) - 1, np.int32)
        index[: len(rows)] = rows
        program = self._compiled["step", plain and self.sizes.plain, size, fitting(self.sizes.step_pages, pages)]
        self._memory, found = program(self._language_params, self._memory, index)
        return found

    def embed_key(self, tokens: int) -> Key:
        """The key of the program that ``embed`` calls for this many visual tokens."""
        return ("embed", fitting(self.sizes.tiles, -(-tokens // self.tile_tokens)))

    def read_key(self, slots: int, pages: int, plain: bool) -> Key:
        """The key of the program that ``read`` calls."""
        return ("read", plain and self.sizes.plain, slots, fitting(self.sizes.chunk_pages, pages))

    def wait(self) -> None:
        """Blocks until the device has finished all its work."""
        jax.block_until_ready(self._memory)

    # ------------------------------------------------------------------------------------------------------------------
    # Compiling
    # ------------------------------------------------------------------------------------------------------------------

    def compile(self) -> int:
        """Allocates the memory and compiles all programs, several at a time; returns how many programs there are."""
        self._memory = jax.jit(self._empty, out_shardings=self._places)()
        memory, keys = jax.tree.map(_shape, self._memory), self._keys()
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            compiled = pool.map(lambda key: self.traced(key, memory).lower().compile(), keys)
            self._compiled = dict(zip(keys, compiled))
        return len(keys)

    def traced(self, key: Key, memory: Memory | None = None) -> jax.stages.Traced:
        """The program of ``key``, traced for parameters and ``memory`` that may be shapes; nothing is computed."""
        generator = self.generator
        memory = jax.eval_shape(self._empty) if memory is None else memory
        params = jax.tree.map(_shape, self._language_params if key[0] == "step" else generator.params)
        function, arguments, has_results = self._program(key, memory)
        donated = 0 if key == ADMIT else 1
        arguments = (memory, *arguments) if key == ADMIT else (params, memory, *arguments)
        out = self._places if generator.mesh is None or not has_results else (self._places, None)
        function = function if generator.mesh is None else on_mesh(function, generator.mesh)
        return jax.jit(function, donate_argnums=donated, out_shardings=out).trace(*arguments)

    def _sizes(self, config: EngineConfig) -> Sizes:
        def of_this_device() -> Sizes:
            return Sizes.of(config, self.tile_tokens, on_cpu=platform() == "cpu", page_by_page=reads_page_by_page())

        mesh = self.generator.mesh
        return of_this_device() if mesh is None else on_mesh(of_this_device, mesh)()

    @functools.cached_property
    def _places(self) -> Memory | None:
        mesh = self.generator.mesh
        return None if mesh is None else memory_shardings(self.generator.config, jax.eval_shape(self._empty), mesh)

    def _keys(self) -> list[Key]:
        kinds = (False, True) if self.sizes.plain else (False,)
        return [
            ADMIT,
            *(("embed", tiles) for tiles in self.sizes.tiles),
            *(("read", *sizes) for sizes in itertools.product(kinds, self.sizes.chunks, self.sizes.chunk_pages)),
            *(("step", *sizes) for sizes in itertools.product(kinds, self.sizes.rows, self.sizes.step_pages)),
        ]

    def _program(self, key: Key, memory: Memory) -> tuple[Callable[..., Any], tuple[Any, ...], bool]:
        """Its function, the shapes of its arguments except parameters and memory, and whether it has other results."""
        config = self.generator.config
        match key:
            case ("admit",):
                pages, request = (_i32(array.shape[1]) for array in (memory.rows.pages, memory.rows.requests))
                return self._admit, (_i32(), pages, request, _i32(config.vocab_size, dtype=bool)), False
            case ("embed", tiles):
                count = tiles * self.tile_tokens
                pixels = _i32(1, count, *_patch(config.vision), dtype=np.uint8)
                return self._embed, (pixels, _i32(1, count), _i32()), False
            case ("read", plain, size, pages):
                return functools.partial(self._read, pages=pages, plain=plain), (_chunk_shapes(size),), True
            case ("step", plain, rows, pages):
                return functools.partial(self._step, pages=pages, plain=plain), (_i32(rows),), True
        raise KeyError(key)

    def _cache(self, memory: Memory, pages: jax.Array) -> PagedCache:
        return PagedCache.of_rows(memory.keys, memory.values, pages, heads_first=self.sizes.page_by_page)

    @staticmethod
    def _admit(memory: Memory, *arguments: Any) -> Memory:
        return memory._replace(rows=admitted(memory.rows, *arguments))

    def _embed(self, params: Params, memory: Memory, patches: jax.Array, cells: jax.Array, start: jax.Array) -> Memory:
        visual = Model(self.generator.config).ends(params).embed_visual(patches, cells, self.generator.dtype)[0]
        features = jax.lax.dynamic_update_slice_in_dim(memory.features, visual.astype(memory.features.dtype), start, 0)
        return memory._replace(features=features)

    def _read(
        self, params: Params, memory: Memory, chunk: Chunk, *, pages: int, plain: bool
    ) -> tuple[Memory, tuple[jax.Array, Logprobs | None]]:
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
        cache = self._cache(memory, memory.rows.pages[chunk.row][None, :pages])
        output = model(params, batch, self.generator.dtype, cache=cache, visual=visual)
        logits = model.logits(params, output.hidden[:, chunk.end])
        rows, chosen = advanced(
            memory.rows, chunk.row[None], logits, chunk.length[None], chunk.is_last[None], plain=plain
        )
        scores = None
        if not plain:
            at_once = max(n for n in range(1, SCORES_AT_ONCE + 1) if size % n == 0)
            scores = scored(
                functools.partial(model.logits, params), output.hidden[0], chunk.targets, chunk.is_scored, at_once
            )
        memory = memory._replace(keys=output.cache.keys, values=output.cache.values, rows=rows)
        return memory, on_all((chosen, scores))

    def _step(
        self, bundle: Bundle, memory: Memory, index: jax.Array, *, pages: int, plain: bool
    ) -> tuple[Memory, jax.Array]:
        params, rows = self._bundles.unpacked(bundle), memory.rows
        state = state_of(rows, index)
        lengths, goes_on = state.length, ~state.done
        batch = {
            "tokens": state.token[:, None],
            "patch_cells": jnp.zeros((index.size, 0), jnp.int32),
            "order": jnp.zeros((index.size, 1), jnp.int32),
            "positions": lengths[:, None],
            "segments": goes_on.astype(jnp.int32)[:, None],
            "lengths": lengths[:, None] + 1,
        }
        cache = self._cache(memory, rows.pages[index, :pages])
        output = self._language_model(params, batch, self.generator.dtype, cache=cache)
        logits = self._language_model.logits(params, output.hidden[:, 0])
        rows, chosen = advanced(rows, index, logits, lengths + 1, goes_on, plain=plain)
        memory = memory._replace(keys=output.cache.keys, values=output.cache.values, rows=rows)
        return memory, on_all(chosen)


def _language_model(config: Architecture, params: Params) -> tuple[Model, Params]:
    """All that steps run and read: each array that is passed to a program costs the host time at every call."""
    without = {"vision": None, "visual_ffn_experts": False, "visual_attention_experts": False}
    model = Model(dataclasses.replace(config, bidirectional_images=False, **without))
    read = tree.flatten(model.abstract_params())
    return model, tree.unflatten({path: leaf for path, leaf in tree.flatten(params).items() if canonical(path) in read})


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
