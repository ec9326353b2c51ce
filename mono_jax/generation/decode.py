"""Text from prompts and images: prefill, then decoding with a KV cache, all under jit.

    Prompt = token ids with image placeholders + pixels of their visual tokens
    turn:    [compact cache] -> prefill (whole prompts at once) -> first token -> decode loop -> tokens
    shapes:  rows, visual slots, text slots, cache and answer lengths are rounded up to buckets, so that
             few programs are compiled; what is rounded up is padding (segment 0) that nothing attends to.

Visual tokens take the visual experts in every turn: routing follows the slots, not whether there is a
cache. A row's tokens depend on its own prompt, images and ``Sampling`` alone, not on the rows beside it.

Dynamic RoPE scaling: a call rotates its new tokens with the row's length at that call; keys in the cache
keep the rotation they were made with, as in the public release.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from data_pipelines.batch import BatchSpec
from mono_jax.errors import GenerationError
from mono_jax.models.architecture import Architecture
from mono_jax.models.cache import Cache
from mono_jax.models.slots import Slots
from mono_jax.models.transformer import Model, Params

TEXT_BUCKET = 16  # text slots, cache slots and answers are rounded up to buckets of this unit
STREAM_EVERY = 8  # tokens between two calls of ``on_tokens``

OnTokens = Callable[[list[list[int]]], None]


@dataclasses.dataclass(frozen=True)
class Prompt:
    """One turn's input.

    Attributes:
      input_ids: int [n], with one image placeholder (``config.image_token_id``) per visual token. The last
        one must be text: no visual token predicts anything.
      patches: uint8 [v, P, P, 3], pixels of each visual token in order, or float32 that is normalised already;
        None = no image.
      patch_cells: int32 [v], cell of each token in its tile's grid; None = whole tiles, cell by cell.
    """

    input_ids: Sequence[int] | np.ndarray
    patches: np.ndarray | None = None
    patch_cells: np.ndarray | None = None


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How tokens are chosen.

    Attributes:
      max_new_tokens: most tokens of an answer, the stop token included.
      temperature: 0 = greedy; otherwise logits are divided by it.
      top_k: keep the k likeliest tokens; 0 = all.
      top_p: keep the likeliest tokens whose probabilities (after ``top_k``) first add up to this; 1 = all.
      seed: the token at position p of a row is drawn with a key made of ``seed`` and p.
      stop_tokens: any of these ends the answer.
      banned_tokens: never generated; the image placeholder never is, in any case.
      return_logits: keep the logits of every step (float32, rows x steps x vocabulary).
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    stop_tokens: tuple[int, ...] = ()
    banned_tokens: tuple[int, ...] = ()
    return_logits: bool = False

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise GenerationError(f"max_new_tokens is {self.max_new_tokens}: it must be at least 1")
        if not 0 <= self.temperature < float("inf"):
            raise GenerationError(f"temperature is {self.temperature}: use 0 (greedy) or a number above it")
        if self.top_k < 0:
            raise GenerationError(f"top_k is {self.top_k}: use 0 (all tokens) or a number above it")
        if not 0 < self.top_p <= 1:
            raise GenerationError(f"top_p is {self.top_p}: it must be greater than 0 and at most 1")


@dataclasses.dataclass(frozen=True)
class Generation:
    """An answer.

    Attributes:
      tokens: generated ids without the stop token.
      finish: "stop" = a stop token ended it, "length" = ``max_new_tokens`` did.
      stop_token: the one that ended it, or None.
      logits: float32 [steps, vocabulary] on request: of every chosen token, the stop token included.
    """

    tokens: list[int]
    finish: Literal["stop", "length"]
    stop_token: int | None = None
    logits: np.ndarray | None = None


class Generator:
    """Generates with one model. Cheap to make: programs are compiled once per architecture, dtype and shape.

    Args:
      config, params: the model; params as nested dict of JAX or NumPy arrays.
      dtype: of the computation, the stored kernels and the cache; None = bfloat16 on accelerators, float32 on the CPU.
      max_length: most tokens (prompts, images and answers of all turns) that the cache of a row may hold.

    >>> generator = Generator(config, params)
    >>> [answer] = generator.generate([Prompt([1, 5, 7])], Sampling(max_new_tokens=20))
    """

    def __init__(
        self, config: Architecture, params: Mapping[str, Any], dtype: Any = None, *, max_length: int = 32768
    ) -> None:
        self.config = config
        self.dtype = jnp.dtype(dtype or default_dtype())
        self.max_length = max_length
        self.params = jax.tree_util.tree_map_with_path(self._stored, dict(params))

    def _stored(self, path: tuple[Any, ...], leaf: Any) -> jax.Array:
        """Kernels and embeddings in the dtype they are used in (the same numbers, less memory to read)."""
        at_use = path[-1].key in ("kernel", "embedding")
        return jnp.asarray(leaf.astype(self.dtype) if at_use else leaf)

    def session(self, rows: int = 1) -> Session:
        """A conversation, or ``rows`` of them side by side."""
        return Session(self, rows)

    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling | Sequence[Sampling] | None = None,
        *,
        on_tokens: OnTokens | None = None,
    ) -> list[Generation]:
        """Answers to ``prompts`` of any lengths, all in one batch; arguments and errors as ``Session.turn``."""
        if not prompts:
            return []
        return self.session(len(prompts)).turn(prompts, sampling, on_tokens=on_tokens)


class Session:
    """Conversations that go on over several turns; earlier turns stay in the cache.

    The context of a row is: prompt 1, tokens 1, prompt 2, tokens 2, ...; stop tokens are not in it, so a
    later prompt starts with whatever closes the answer before it (``<|im_end|>``).

    Attributes:
      lengths: tokens in the context of each row.
    """

    def __init__(self, generator: Generator, rows: int = 1) -> None:
        self._generator = generator
        self._programs = _programs(generator.config, generator.dtype)
        self._rows = bucket(rows)  # rows added by rounding up are never started
        self._cache: Cache | None = None
        self._cached = np.zeros(rows, np.int64)
        self._pending: list[list[int]] = [[] for _ in range(rows)]  # generated, not yet in the cache
        self._broken = False

    @property
    def lengths(self) -> list[int]:
        return [int(n) + len(pending) for n, pending in zip(self._cached, self._pending)]

    def turn(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling | Sequence[Sampling] | None = None,
        *,
        on_tokens: OnTokens | None = None,
    ) -> list[Generation]:
        """One answer per row.

        Args:
          prompts: one per row of the session.
          sampling: one for each row, or one for all (row i then takes ``seed + i``); None = greedy.
          on_tokens: called with each row's new tokens: after the first, then every ``STREAM_EVERY``.

        Raises:
          GenerationError: placeholders that do not match the patches, ids or shapes that do not fit the
            model, more tokens than ``max_length`` (the session stays as it was); logits that are not finite.
        """
        if self._broken:
            raise GenerationError("an earlier turn of this session did not finish: start a new session")
        rows = len(self._pending)
        samplings = _per_row(sampling or Sampling(), rows)
        prompts = self._checked(prompts, samplings)
        batch, ends = _pack(self._generator.config, prompts, self._cached, self._rows)
        longest = max(s.max_new_tokens for s in samplings)
        request = _request(self._generator.config, samplings, self._rows)
        shapes = _shapes(samplings)

        self._broken = True
        params, programs = self._generator.params, self._programs
        used = 0 if self._cache is None else int(self._cached.max())
        capacity = bucket(used + batch["order"].shape[1] + longest, TEXT_BUCKET)
        cache = None if self._cache is None else programs.compact(self._cache, capacity=capacity)
        state = programs.prefill(params, batch, ends, cache, request, capacity=capacity, shapes=shapes)
        sent = [0] * rows
        while True:
            if on_tokens is not None:
                answers = [answer.tokens for answer in _answers(state, samplings)]
                on_tokens([tokens[n:] for tokens, n in zip(answers, sent)])
                sent = [len(tokens) for tokens in answers]
            if bool(state.done.all()):
                break
            until = longest if on_tokens is None else int(state.step) + STREAM_EVERY
            state = programs.decode(params, request, state, until, shapes=shapes)
        if not bool(state.finite):
            raise GenerationError("the model gave logits that are not finite: check the weights, or use dtype float32")

        self._cache = state.cache
        self._cached = np.asarray(state.lengths[:rows], np.int64)
        answers = _answers(state, samplings)
        self._pending = [answer.tokens[-1:] if answer.finish == "length" else [] for answer in answers]
        self._broken = False
        return answers

    def _checked(self, prompts: Sequence[Prompt], samplings: Sequence[Sampling]) -> list[Prompt]:
        """The prompts with what is pending in front; raises GenerationError unless all of them can be served."""
        if len(prompts) != len(self._pending):
            raise GenerationError(f"{len(prompts)} prompts for the {len(self._pending)} rows of this session")
        config, limit = self._generator.config, self._generator.max_length
        checked = []
        for i, (prompt, sampling) in enumerate(zip(prompts, samplings)):
            where = f"prompt {i}: " if len(prompts) > 1 else ""
            prompt = _check_prompt(config, prompt, where)
            context, new = self.lengths[i], len(prompt.input_ids)
            if context + new + sampling.max_new_tokens > limit:
                earlier = f"{context} tokens of earlier turns + " if context else ""
                raise GenerationError(
                    f"{where}{earlier}{new} prompt tokens + {sampling.max_new_tokens} new tokens do not fit the cache "
                    f"of {limit} tokens: shorten the prompt, use fewer image tiles or new tokens, or raise max_length"
                )
            pending = np.array(self._pending[i], np.int32)
            checked.append(dataclasses.replace(prompt, input_ids=np.concatenate([pending, prompt.input_ids])))
        if len({prompt.patches.dtype for prompt in checked if len(prompt.patches)}) > 1:
            raise GenerationError("patches of one batch must have one dtype: uint8 pixels or normalised float32")
        return checked


def default_dtype() -> Any:
    """bfloat16 on accelerators, float32 on the CPU (where bfloat16 is emulated)."""
    return jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16


def bucket(n: int, unit: int = 1) -> int:
    """The smallest of unit * (0, 1, ... 8, 10, 12, 14, 16, 20, 24, ...) that is not below n: four sizes per octave."""
    units = -(-n // unit)
    step = 1 << max(0, (units - 1).bit_length() - 3)
    return -(-units // step) * step * unit


# ---------------------------------------------------------------------------------------------------
# On the host: prompts to batches
# ---------------------------------------------------------------------------------------------------


def _check_prompt(config: Architecture, prompt: Prompt, where: str) -> Prompt:
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
                f"{where}this model takes no images: load one with a vision_config, or give text alone"
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
    """int32 [count]; None = whole tiles in the order of ``ps_version``. A modular model takes whole tiles alone."""
    vision = config.vision
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


def _pack(
    config: Architecture, prompts: Sequence[Prompt], offsets: np.ndarray, rows: int
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """One prompt per row, and the last text slot int32 [rows] of each.

    Row i's positions start at ``offsets[i]``; "lengths" is its context's length after this batch.
    """
    visual = bucket(max(len(prompt.patches) for prompt in prompts), config.vision.tile_tokens if config.vision else 1)
    text = bucket(max(len(prompt.input_ids) - len(prompt.patches) for prompt in prompts), TEXT_BUCKET)
    spec = BatchSpec(visual, text, config.vision.token_pixels if config.vision else 0)
    batch = spec.empty(rows)
    del batch["targets"], batch["loss_weights"]
    batch["patches"] = batch["patches"].astype(next((p.patches.dtype for p in prompts if len(p.patches)), np.uint8))
    batch["lengths"] = np.zeros_like(batch["positions"])
    ends = np.zeros(rows, np.int32)
    for i, (prompt, offset) in enumerate(zip(prompts, offsets)):
        ids, v = prompt.input_ids, len(prompt.patches)
        n, t = len(ids), len(ids) - v
        # A model without vision has no placeholder, whatever the number of the id.
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


def _per_row(sampling: Sampling | Sequence[Sampling], rows: int) -> list[Sampling]:
    if isinstance(sampling, Sampling):
        return [dataclasses.replace(sampling, seed=sampling.seed + i) for i in range(rows)]
    if len(sampling) != rows:
        raise GenerationError(f"{len(sampling)} samplings for {rows} prompts: give one for each, or one for all")
    return list(sampling)


def _shapes(samplings: Sequence[Sampling]) -> _Shapes:
    drawn = [s for s in samplings if s.temperature > 0]
    return _Shapes(
        answer=bucket(max(s.max_new_tokens for s in samplings), TEXT_BUCKET),
        with_logits=any(s.return_logits for s in samplings),
        draws=bool(drawn),
        filters=any(s.top_k > 0 or s.top_p < 1 for s in drawn),
    )


def _request(config: Architecture, samplings: Sequence[Sampling], rows: int) -> _Request:
    """Samplings as arrays; rows added by rounding up have ``max_new_tokens`` 0."""
    image = () if config.vision is None else (config.image_token_id,)
    idle = rows - len(samplings)

    def column(values: list[Any], dtype: Any, fill: Any = 0) -> np.ndarray:
        return np.array(values + [fill] * idle, dtype)

    def table(lists: list[tuple[int, ...]]) -> np.ndarray:
        result = np.full((rows, bucket(max(4, *map(len, lists)))), -1, np.int32)
        for row, values in zip(result, lists):
            row[: len(values)] = values
        return result

    return _Request(
        column([s.max_new_tokens for s in samplings], np.int32),
        column([s.temperature for s in samplings], np.float32),
        column([s.top_k for s in samplings], np.int32),
        column([s.top_p for s in samplings], np.float32, 1.0),
        column([s.seed % 2**32 for s in samplings], np.uint32),
        table([s.stop_tokens for s in samplings]),
        table([s.banned_tokens + image for s in samplings]),
    )


def _answers(state: _State, samplings: Sequence[Sampling]) -> list[Generation]:
    """What the rows have generated so far."""
    tokens, counts = np.asarray(state.tokens), np.asarray(state.counts)
    answers = []
    for i, sampling in enumerate(samplings):
        row = tokens[i, : counts[i]].tolist()
        stop = row.pop() if row[-1] in sampling.stop_tokens else None
        logits = np.asarray(state.logits[i, : counts[i]]) if sampling.return_logits else None
        answers.append(Generation(row, "length" if stop is None else "stop", stop, logits))
    return answers


# ---------------------------------------------------------------------------------------------------
# On the device
# ---------------------------------------------------------------------------------------------------


class _Request(NamedTuple):
    """``Sampling`` of each row as arrays [B]; stop and banned tokens [B, n], filled up with -1."""

    max_new_tokens: jax.Array
    temperature: jax.Array
    top_k: jax.Array
    top_p: jax.Array
    seed: jax.Array
    stop_tokens: jax.Array
    banned_tokens: jax.Array


class _Shapes(NamedTuple):
    """What is compiled in: size of the answer buffer; whether logits are kept, anything is drawn, anything filtered."""

    answer: int
    with_logits: bool
    draws: bool
    filters: bool


class _State(NamedTuple):
    """Decoding after ``step`` tokens.

    Attributes:
      cache: all but the last token of each row.
      lengths: int32 [B], tokens of each row in the cache.
      tokens: int32 [B, N] generated so far; counts: int32 [B], how many of them are the row's.
      done: bool [B].
      step: int32 scalar, columns of ``tokens`` in use.
      finite: bool scalar, all logits so far were finite.
      logits: float32 [B, N, vocabulary], or None.
    """

    cache: Cache
    lengths: jax.Array
    tokens: jax.Array
    counts: jax.Array
    done: jax.Array
    step: jax.Array
    finite: jax.Array
    logits: jax.Array | None


def choose(logits: jax.Array, positions: jax.Array, request: _Request, *, draws: bool, filters: bool) -> jax.Array:
    """The next token int32 [B] of each row from float32 logits [B, vocabulary].

    A draw is the argmax of logits plus Gumbel noise, which hangs on the row's seed and on ``positions`` [B]
    of the token alone.
    """
    rows, vocabulary = logits.shape
    # -1 would be the last token: what is not a token is sent out of bounds, where it is dropped.
    banned = jnp.where(request.banned_tokens < 0, vocabulary, request.banned_tokens)
    logits = logits.at[jnp.arange(rows)[:, None], banned].set(-jnp.inf, mode="drop")
    likeliest = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    if not draws:
        return likeliest

    def noise_of(seed: jax.Array, position: jax.Array) -> jax.Array:
        return jax.random.gumbel(jax.random.fold_in(jax.random.key(seed), position), (vocabulary,))

    noise = jax.vmap(noise_of)(request.seed, positions)
    greedy = request.temperature == 0
    logits = logits / jnp.where(greedy, 1.0, request.temperature)[:, None]
    if not filters:
        drawn = jnp.argmax(logits + noise, axis=-1)
    else:
        ranked = jnp.argsort(-logits, axis=-1, stable=True)
        logits, noise = (jnp.take_along_axis(a, ranked, axis=-1) for a in (logits, noise))
        top_k = jnp.where(request.top_k > 0, request.top_k, vocabulary)[:, None]
        logits = jnp.where(jnp.arange(vocabulary) < top_k, logits, -jnp.inf)
        probabilities = jax.nn.softmax(logits, axis=-1)
        before = jnp.cumsum(probabilities, axis=-1) - probabilities
        keep = (before < request.top_p[:, None]) | (request.top_p[:, None] == 1)  # sums may round to 1 early
        best = jnp.argmax(jnp.where(keep, logits, -jnp.inf) + noise, axis=-1)
        drawn = jnp.take_along_axis(ranked, best[:, None], axis=-1)[:, 0]
    return jnp.where(greedy, likeliest, drawn.astype(jnp.int32))


class _Programs(NamedTuple):
    compact: Any
    prefill: Any
    decode: Any


@functools.lru_cache(maxsize=16)
def _programs(config: Architecture, dtype: Any) -> _Programs:
    """The compiled functions of one architecture; params are an argument, so all models of the shape share them."""
    model = Model(config)

    def compact(cache: Cache, *, capacity: int) -> Cache:
        """Moves what is used to the front and changes the capacity; it must hold the longest row."""
        is_used = cache.slots.segments > 0
        front = jnp.argsort(~is_used, axis=1, stable=True)[:, :capacity]
        slots = Slots(*(jnp.take_along_axis(a, front, axis=1) for a in cache.slots))
        keys, values = (jnp.take_along_axis(a, front[None, :, :, None, None], axis=2) for a in cache[:2])
        return _widen(Cache(keys, values, slots, jnp.max(jnp.sum(is_used, axis=1, dtype=jnp.int32))), capacity)

    def prefill(
        params: Params,
        batch: Mapping[str, jax.Array],
        ends: jax.Array,
        cache: Cache | None,
        request: _Request,
        *,
        capacity: int,
        shapes: _Shapes,
    ) -> _State:
        """Runs whole prompts and chooses the first token; logits of the last text slot alone are made."""
        output = model(params, batch, dtype, cache=cache, collect=("cache",))
        hidden = jnp.take_along_axis(output.hidden, ends[:, None, None], axis=1)[:, 0]
        logits = model.logits(params, hidden)
        rows, vocabulary = logits.shape
        state = _State(
            cache=_widen(output.cache, capacity),
            lengths=batch["lengths"][:, 0],
            tokens=jnp.zeros((rows, shapes.answer), jnp.int32),
            counts=jnp.zeros(rows, jnp.int32),
            done=request.max_new_tokens == 0,
            step=jnp.zeros((), jnp.int32),
            finite=jnp.ones((), bool),
            logits=jnp.zeros((rows, shapes.answer, vocabulary), jnp.float32) if shapes.with_logits else None,
        )
        return _advance(state, logits, request, shapes)

    def decode(params: Params, request: _Request, state: _State, until: jax.Array, *, shapes: _Shapes) -> _State:
        """Goes on until all rows are done or have ``until`` tokens."""

        def body(state: _State) -> _State:
            running = (~state.done).astype(jnp.int32)
            batch = {
                "tokens": jax.lax.dynamic_index_in_dim(state.tokens, state.step - 1, axis=1),
                "patch_cells": jnp.zeros((running.size, 0), jnp.int32),
                "order": jnp.zeros((running.size, 1), jnp.int32),
                "positions": state.lengths[:, None],
                "segments": running[:, None],
                "lengths": state.lengths[:, None] + 1,
            }
            output = model(params, batch, dtype, cache=state.cache)
            state = state._replace(cache=output.cache, lengths=state.lengths + running)
            return _advance(state, model.logits(params, output.hidden[:, 0]), request, shapes)

        return jax.lax.while_loop(lambda state: (state.step < until) & ~state.done.all(), body, state)

    return _Programs(
        jax.jit(compact, static_argnames=("capacity",)),
        jax.jit(prefill, static_argnames=("capacity", "shapes"), donate_argnames=("cache",)),
        jax.jit(decode, static_argnames=("shapes",), donate_argnames=("state",)),
    )


def _widen(cache: Cache, capacity: int) -> Cache:
    """With empty slots behind, up to ``capacity``."""
    extra = capacity - cache.keys.shape[2]
    keys, values = (jnp.pad(a, ((0, 0), (0, 0), (0, extra), (0, 0), (0, 0))) for a in cache[:2])
    return cache._replace(
        keys=keys, values=values, slots=Slots(*(jnp.pad(a, ((0, 0), (0, extra))) for a in cache.slots))
    )


def _advance(state: _State, logits: jax.Array, request: _Request, shapes: _Shapes) -> _State:
    """Chooses and stores the next token of each row."""
    token = choose(logits, state.lengths, request, draws=shapes.draws, filters=shapes.filters)
    counts = state.counts + ~state.done
    stopped = jnp.any(token[:, None] == request.stop_tokens, axis=1)
    return state._replace(
        tokens=jax.lax.dynamic_update_index_in_dim(state.tokens, token, state.step, axis=1),
        counts=counts,
        done=state.done | stopped | (counts >= request.max_new_tokens),
        step=state.step + 1,
        finite=state.finite & jnp.isfinite(logits).all(),
        logits=state.logits
        if state.logits is None
        else jax.lax.dynamic_update_index_in_dim(state.logits, logits, state.step, axis=1),
    )
