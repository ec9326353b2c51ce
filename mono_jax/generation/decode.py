"""Text from prompts and images: prefill, then decoding with a KV cache, all under jit.

    Prompt = token ids with image placeholders + pixels of their visual tokens
    turn:    [compact cache] -> prefill (whole prompts at once) -> first token -> decode loop -> tokens
    shapes:  rows, visual slots, text slots, cache and answer lengths are rounded up to buckets, so that
             few programs are compiled; the added slots are padding (segment 0) that nothing attends to.

Visual tokens take the visual experts in every turn: routing depends on the slots, not on whether there is a
cache. A row's tokens depend only on its own prompt, images and ``Sampling``, not on the other rows.

Dynamic RoPE scaling: a call rotates its new tokens by the row's length at that call; cached keys keep
the rotation they were computed with, as in the public release.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from mono_jax import tree
from mono_jax.errors import GenerationError
from mono_jax.generation.options import Sampling
from mono_jax.generation.prompts import TEXT_BUCKET, Prompt, bucket, check_prompt, pack
from mono_jax.generation.sampling import (
    Occurrences,
    Request,
    StaticChoices,
    choose,
    make_request,
    penalised,
    per_row,
    static_choices,
)
from mono_jax.models.architecture import Architecture
from mono_jax.models.cache import Cache
from mono_jax.models.layer_ranges import Layout, arranged
from mono_jax.models.layers import Transposed
from mono_jax.models.sharding import on_all
from mono_jax.models.transformer import Model, Params
from mono_jax.parallel.mesh import on_mesh, row_ways

STREAM_EVERY = 8  # tokens between two calls of ``on_tokens``

OnTokens = Callable[[list[list[int]]], None]


@dataclasses.dataclass(frozen=True)
class Generation:
    """An answer.

    Attributes:
      tokens: generated ids without the stop token.
      finish: "stop" = a stop token ended it, "length" = ``max_new_tokens`` did.
      stop_token: the one that ended it, or None.
      logits: float32 [steps, vocabulary] on request: for every chosen token, the stop token included.
    """

    tokens: list[int]
    finish: Literal["stop", "length"]
    stop_token: int | None = None
    logits: np.ndarray | None = None


class Generator:
    """Generates with one model. Cheap to construct: programs are compiled once per architecture, dtype and shape.

    Args:
      config, params: the model; params as a nested dict of JAX or NumPy arrays, or of their shapes if nothing is
        computed (``traced``).
      dtype: of the computation, the stored kernels and the cache; None = bfloat16 on accelerators, float32 on CPUs.
      max_length: maximum tokens (prompts, images and answers of all turns) that the cache of a row may hold.
      mesh: where the parameters are; its processes, if several, all make the same calls; None = one device.
      layout: see ``layer_ranges.arranged``; unless it is "stacked", the arrays of ``params`` are deleted.

    >>> generator = Generator(config, params)
    >>> [answer] = generator.generate([Prompt([1, 5, 7])], Sampling(max_new_tokens=20))
    """

    def __init__(
        self,
        config: Architecture,
        params: Mapping[str, Any],
        dtype: Any = None,
        *,
        max_length: int = 32768,
        mesh: Mesh | None = None,
        layout: Layout = "stacked",
    ) -> None:
        self.config, self.mesh = config, mesh
        self.dtype = jnp.dtype(dtype or default_dtype())
        self.max_length = max_length
        stored = {path: self._stored(path, leaf) for path, leaf in tree.flatten(dict(params)).items()}
        self.params = arranged(tree.unflatten(stored), layout)

    def _stored(self, path: str, leaf: Any) -> Any:
        """Kernels and embeddings in the dtype in which they are used (the same values, less memory to read)."""
        if isinstance(leaf, Transposed):
            return leaf.astype(self.dtype)
        at_use = path.rpartition("/")[2] in ("kernel", "embedding")
        if isinstance(leaf, jax.ShapeDtypeStruct):
            return leaf.update(dtype=self.dtype) if at_use else leaf
        return jnp.asarray(leaf.astype(self.dtype) if at_use else leaf)

    def session(self, rows: int = 1) -> Session:
        """A conversation, or ``rows`` of them in parallel."""
        return Session(self, rows)

    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling | Sequence[Sampling] | None = None,
        *,
        on_tokens: OnTokens | None = None,
    ) -> list[Generation]:
        """Answers to ``prompts`` of any lengths, all in one batch; arguments and errors as for ``Session.turn``."""
        if not prompts:
            return []
        return self.session(len(prompts)).turn(prompts, sampling, on_tokens=on_tokens)

    def traced(self, prompt: Prompt, sampling: Sampling) -> jax.stages.Traced:
        """The program from a prompt to its first token, as ``generate`` runs it; nothing is computed."""
        prompts = [check_prompt(self.config, prompt, "")]
        batch, ends = pack(self.config, prompts, np.zeros(1, np.int64), 1)
        request, shapes = make_request(self.config, [sampling], 1), static_choices([sampling])
        capacity = bucket(batch["order"].shape[1] + sampling.max_new_tokens, TEXT_BUCKET)
        prefill = _programs(self.config, self.dtype, self.mesh).prefill
        return prefill.trace(self.params, batch, ends, None, request, None, capacity=capacity, shapes=shapes)


class Session:
    """Conversations over several turns; earlier turns stay in the cache.

    The context of a row is: prompt 1, tokens 1, prompt 2, tokens 2, ...; stop tokens are not part of it, so a
    later prompt starts with the tokens that close the previous answer (``<|im_end|>``).

    Attributes:
      lengths: number of tokens in the context of each row.
    """

    def __init__(self, generator: Generator, rows: int = 1) -> None:
        self._generator = generator
        self._programs = _programs(generator.config, generator.dtype, generator.mesh)
        ways = 1 if generator.mesh is None else row_ways(generator.mesh)
        self._rows = -(-bucket(rows) // ways) * ways  # rows added by rounding up are never started
        self._cache: Cache | None = None
        self._cached = np.zeros(rows, np.int64)
        self._pending: list[list[int]] = [[] for _ in range(rows)]  # generated, not yet in the cache
        self._context: list[set[int]] = [set() for _ in range(rows)]  # tokens of earlier turns, for penalties
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
          sampling: one per row, or one for all (row i then uses ``seed + i``); None = greedy.
          on_tokens: called with each row's new tokens: after the first one, then every ``STREAM_EVERY`` tokens.

        Raises:
          GenerationError: placeholders that do not match the patches, ids or shapes that do not fit the
            model, more tokens than ``max_length`` (the session is unchanged); logits that are not finite.
        """
        if self._broken:
            raise GenerationError("an earlier turn of this session did not finish: start a new session")
        rows = len(self._pending)
        samplings = per_row(sampling or Sampling(), rows)
        prompts = self._checked(prompts, samplings)
        batch, ends = pack(self._generator.config, prompts, self._cached, self._rows)
        longest = max(s.max_new_tokens for s in samplings)
        request = make_request(self._generator.config, samplings, self._rows)
        shapes = static_choices(samplings)

        self._broken = True
        params, programs = self._generator.params, self._programs
        used = 0 if self._cache is None else int(self._cached.max())
        capacity = bucket(used + batch["order"].shape[1] + longest, TEXT_BUCKET)
        cache = None if self._cache is None else programs.compact(self._cache, capacity=capacity)
        seen = self._seen(prompts) if shapes.penalises else None
        state = programs.prefill(params, batch, ends, cache, request, seen, capacity=capacity, shapes=shapes)
        sent = [0] * rows
        while True:
            if on_tokens is not None:
                answers = [answer.tokens for answer in _answers(state, samplings)]
                on_tokens([tokens[n:] for tokens, n in zip(answers, sent)])
                sent = [len(tokens) for tokens in answers]
            if np.asarray(state.done).all():
                break
            until = longest if on_tokens is None else int(state.step) + STREAM_EVERY
            state = programs.decode(params, request, state, until, shapes=shapes)
        if not bool(state.finite):
            raise GenerationError("the model's logits are not finite: check the weights, or use dtype float32")

        self._cache = state.cache
        self._cached = np.asarray(state.lengths[:rows], np.int64)
        answers = _answers(state, samplings)
        self._pending = [answer.tokens[-1:] if answer.finish == "length" else [] for answer in answers]
        for context, prompt, answer in zip(self._context, prompts, answers):
            context.update(np.asarray(prompt.input_ids).tolist(), answer.tokens)
        self._broken = False
        return answers

    def _seen(self, prompts: Sequence[Prompt]) -> np.ndarray:
        """bool [rows, vocabulary]: the tokens in the context of each row."""
        seen = np.zeros((self._rows, self._generator.config.vocab_size), bool)
        for row, context, prompt in zip(seen, self._context, prompts):
            row[[*context]] = row[prompt.input_ids] = True
        return seen

    def _checked(self, prompts: Sequence[Prompt], samplings: Sequence[Sampling]) -> list[Prompt]:
        """The prompts with pending tokens in front; raises GenerationError unless all of them can be served."""
        if len(prompts) != len(self._pending):
            raise GenerationError(f"{len(prompts)} prompts for the {len(self._pending)} rows of this session")
        config, limit = self._generator.config, self._generator.max_length
        checked = []
        for i, (prompt, sampling) in enumerate(zip(prompts, samplings)):
            where = f"prompt {i}: " if len(prompts) > 1 else ""
            prompt = check_prompt(config, prompt, where)
            if sampling.stop or sampling.logprobs is not None:
                raise GenerationError(f"{where}stop strings and logprobs are only for the engine of mono_jax.serving")
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


def _answers(state: _State, samplings: Sequence[Sampling]) -> list[Generation]:
    """What the rows have generated so far."""
    tokens, counts = np.asarray(state.tokens), np.asarray(state.counts)
    logits = np.asarray(state.logits) if any(s.return_logits for s in samplings) else None
    answers = []
    for i, sampling in enumerate(samplings):
        row = tokens[i, : counts[i]].tolist()
        stop = row.pop() if row[-1] in sampling.stop_tokens else None
        of_row = logits[i, : counts[i]] if sampling.return_logits else None
        answers.append(Generation(row, "length" if stop is None else "stop", stop, of_row))
    return answers


class _State(NamedTuple):
    """Decoding after ``step`` tokens.

    Attributes:
      cache: all but the last token of each row.
      lengths: int32 [B], tokens of each row in the cache.
      tokens: int32 [B, N] generated so far; counts: int32 [B], number of them that belong to the row.
      done: bool [B].
      step: int32 scalar, number of columns of ``tokens`` in use.
      finite: bool scalar, whether all logits so far were finite.
      logits: float32 [B, N, vocabulary], or None.
      seen: the tokens of each row, if any row has penalties.
    """

    cache: Cache
    lengths: jax.Array
    tokens: jax.Array
    counts: jax.Array
    done: jax.Array
    step: jax.Array
    finite: jax.Array
    logits: jax.Array | None
    seen: Occurrences | None


class _Programs(NamedTuple):
    compact: Any
    prefill: Any
    decode: Any


@functools.lru_cache(maxsize=16)
def _programs(config: Architecture, dtype: Any, mesh: Mesh | None) -> _Programs:
    """The compiled functions of one architecture; params are an argument, so all models of this shape share them."""
    model = Model(config)

    def compiled(function: Any, **options: Any) -> Any:
        return jax.jit(function if mesh is None else on_mesh(function, mesh), **options)

    def compact(cache: Cache, *, capacity: int) -> Cache:
        return cache.compacted(capacity)

    def prefill(
        params: Params,
        batch: Mapping[str, jax.Array],
        ends: jax.Array,
        cache: Cache | None,
        request: Request,
        seen: jax.Array | None,
        *,
        capacity: int,
        shapes: StaticChoices,
    ) -> _State:
        """Runs whole prompts and chooses the first token; computes the logits of only the last text slot.

        ``seen`` bool [B, vocabulary]: tokens of each row's context, if any row has penalties.
        """
        output = model(params, batch, dtype, cache=cache, collect=("cache",))
        hidden = jnp.take_along_axis(output.hidden, ends[:, None, None], axis=1)[:, 0]
        logits = model.logits(params, hidden)
        rows, vocabulary = logits.shape
        state = _State(
            cache=output.cache.widened(capacity),
            lengths=batch["lengths"][:, 0],
            tokens=jnp.zeros((rows, shapes.answer), jnp.int32),
            counts=jnp.zeros(rows, jnp.int32),
            done=request.max_new_tokens == 0,
            step=jnp.zeros((), jnp.int32),
            finite=jnp.ones((), bool),
            logits=jnp.zeros((rows, shapes.answer, vocabulary), jnp.float32) if shapes.with_logits else None,
            seen=None if seen is None else Occurrences(seen, jnp.zeros(seen.shape, jnp.int32)),
        )
        return _readable(_advance(state, logits, request, shapes))

    def decode(params: Params, request: Request, state: _State, until: jax.Array, *, shapes: StaticChoices) -> _State:
        """Continues until all rows are done or have ``until`` tokens."""

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

        return _readable(jax.lax.while_loop(lambda state: (state.step < until) & ~state.done.all(), body, state))

    return _Programs(
        compiled(compact, static_argnames=("capacity",)),
        compiled(prefill, static_argnames=("capacity", "shapes"), donate_argnames=("cache",)),
        compiled(decode, static_argnames=("shapes",), donate_argnames=("state",)),
    )


def _readable(state: _State) -> _State:
    """Replicates all but the cache on every device, so that every process of a run can read it."""
    return on_all(state._replace(cache=None))._replace(cache=state.cache)


def _advance(state: _State, logits: jax.Array, request: Request, shapes: StaticChoices) -> _State:
    """Chooses and stores the next token of each row."""
    seen = state.seen
    wanted = logits if seen is None else penalised(logits, request, seen)
    token = choose(wanted, state.lengths, request, draws=shapes.draws, filters=shapes.filters)
    if seen is not None:
        seen = seen._replace(answer=seen.answer.at[jnp.arange(token.size), token].add(1))
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
        seen=seen,
    )
