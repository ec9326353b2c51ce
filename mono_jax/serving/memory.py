"""What an engine keeps on the device: the cache's pages, the image that is being read, the rows of the requests."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mono_jax.axes import TENSOR
from mono_jax.generation.options import MAX_LOGPROBS, Sampling
from mono_jax.generation.sampling import DTYPES, Occurrences, Request, choose, make_request, penalised
from mono_jax.models.architecture import Architecture

TOKENS_PER_TABLE = 64  # maximum number of stop tokens, and of banned tokens, of a request
_TABLES = ("stop_tokens", "banned_tokens")


class State(NamedTuple):
    """What each token of an answer changes: columns of ``Rows.state``.

    Attributes:
      token: int32, the last token of each row, not yet in the cache. length: int32, tokens in the cache.
      count: int32, tokens of the answer. done: bool.
    """

    token: jax.Array
    length: jax.Array
    count: jax.Array
    done: jax.Array


class Rows(NamedTuple):
    """Requests that are being answered, [R + 1]; the last row belongs to no request and is always done.

    Few arrays, because each one costs the host time at every call of a program.

    Attributes:
      state: int32 [R + 1, 4], see ``State``.
      requests: int32 [R + 1, W], from ``packed_request``. pages: int32 [R + 1, P], of the cache.
      seen: which tokens each row contains, for penalties.
    """

    state: jax.Array
    requests: jax.Array
    pages: jax.Array
    seen: Occurrences


class Memory(NamedTuple):
    """Keys and values as in ``PagedCache``; features [F, d], visual tokens of the prompt being read; rows."""

    keys: jax.Array
    values: jax.Array
    features: jax.Array
    rows: Rows


class Logprobs(NamedTuple):
    """For each token: its log-probability float32 [n], and the likeliest tokens [n, MAX_LOGPROBS] with theirs."""

    chosen: jax.Array
    tokens: jax.Array
    top: jax.Array


class Chosen(NamedTuple):
    """What a program says of each row: the next token int32 [B], whether it is the last one, whether its logits were
    finite; ``logprobs``: None from programs of plain rows, zeros where no row wants them.

    Programs return it as a single array, see ``packed``: fetching one costs the host a tenth of a millisecond.
    """

    token: jax.Array
    is_last: jax.Array
    is_finite: jax.Array
    logprobs: Logprobs | None

    def packed(self) -> jax.Array:
        """int32 [B, W], with the bits of floats."""
        parts = [jnp.stack(self[:3], axis=1, dtype=jnp.int32)]
        if self.logprobs is not None:
            chosen, tokens, top = self.logprobs
            parts += [_bits(chosen)[:, None], tokens, _bits(top)]
        return jnp.concatenate(parts, axis=1)

    @classmethod
    def of(cls, packed: np.ndarray) -> Chosen:
        """From a program's result on the host; without copies."""
        logprobs = None
        if packed.shape[1] > 3:
            middle = 4 + MAX_LOGPROBS
            numbers = packed.view(np.float32)
            logprobs = Logprobs(numbers[:, 3], packed[:, 4:middle], numbers[:, middle:])
        return cls(*packed[:, :3].T, logprobs)


def _bits(numbers: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(numbers, jnp.int32)


def empty_memory(
    config: Architecture,
    dtype: jnp.dtype,
    *,
    rows: int,
    pages: int,
    page: int,
    length: int,
    features: int,
    heads_first: bool,
) -> Memory:
    """Memory without requests. ``pages``: of the cache, with the unowned one; ``length``: maximum pages of a row."""
    layers, heads = config.num_hidden_layers, config.num_key_value_heads
    shape = (layers, pages, *((heads, page) if heads_first else (page, heads)), config.head_dim)
    requests = np.tile(packed_request(config, Sampling()), (rows + 1, 1))
    vocabulary = (rows + 1, config.vocab_size)
    table = Rows(
        jnp.zeros((rows + 1, len(State._fields)), jnp.int32).at[:, State._fields.index("done")].set(1),
        jnp.asarray(requests),
        jnp.zeros((rows + 1, length), jnp.int32),
        Occurrences(jnp.zeros(vocabulary, bool), jnp.zeros(vocabulary, jnp.int32)),
    )
    width = config.hidden_size if config.vision is not None else 0
    return Memory(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), jnp.zeros((features, width), dtype), table)


def memory_shardings(config: Architecture, memory: Memory, mesh: Mesh) -> Memory:
    """Pages are split by heads, as far as the number divides; everything else is replicated on every device."""
    whole = jax.tree.map(lambda _: NamedSharding(mesh, PartitionSpec()), memory)
    if config.num_key_value_heads % mesh.shape[TENSOR]:
        return whole
    heads = NamedSharding(mesh, PartitionSpec(None, None, None, TENSOR))
    return whole._replace(keys=heads, values=heads)


def packed_request(config: Architecture, sampling: Sampling) -> np.ndarray:
    """``sampling`` as int32 [W]: whether log-probabilities are wanted, and the bits of all arrays of a ``Request``."""
    request = make_request(config, [sampling], 1, TOKENS_PER_TABLE)
    return np.concatenate(
        [[np.int32(sampling.logprobs is not None)], *(array.ravel().view(np.int32) for array in request)]
    )


def unpacked_requests(packed: jax.Array) -> tuple[jax.Array, Request]:
    """From int32 [B, W]: whether log-probabilities are wanted, bool [B], and the requests."""
    ends = np.cumsum([1, *(TOKENS_PER_TABLE if name in _TABLES else 1 for name in Request._fields)])
    fields = []
    for name, dtype, start, stop in zip(Request._fields, DTYPES, ends[:-1], ends[1:]):
        field = packed[:, start:stop] if name in _TABLES else packed[:, start]
        fields.append(jax.lax.bitcast_convert_type(field, dtype))
    return packed[:, 0] != 0, Request(*fields)


def state_of(rows: Rows, index: jax.Array) -> State:
    """The state of the rows ``index`` [B]."""
    state = State(*rows.state[index].T)
    return state._replace(done=state.done != 0)


def admitted(rows: Rows, row: jax.Array, pages: jax.Array, request: jax.Array, context: jax.Array) -> Rows:
    """The memory with a new request in ``row``: its pages [P], packed [W], and the tokens of its prompt."""
    seen = Occurrences(rows.seen.context.at[row].set(context), rows.seen.answer.at[row].set(0))
    return Rows(rows.state.at[row].set(0), rows.requests.at[row].set(request), rows.pages.at[row].set(pages), seen)


def advanced(
    rows: Rows, index: jax.Array, logits: jax.Array, lengths: jax.Array, goes_on: jax.Array, *, plain: bool
) -> tuple[Rows, jax.Array]:
    """Chooses and stores the next token of the rows ``index`` [B] from logits [B, vocabulary]; also returns what the
    host is told of them, ``Chosen.packed``.

    Args:
      lengths: int32 [B], tokens in the cache: the position of the new token.
      goes_on: bool [B]; rows where it is False stay unchanged.
      plain: all rows take the likeliest token, without penalties or log-probabilities. (Rows with other options take
        branches of the program, at each of which a GPU makes the host wait.)
    """
    wants_logprobs, request = unpacked_requests(rows.requests[index])
    state = state_of(rows, index)
    if plain:
        token, seen = choose(logits, lengths, request, draws=False, filters=False), rows.seen
        logprobs = None
    else:
        token, seen, logprobs = _chosen(rows.seen, index, logits, lengths, goes_on, request, wants_logprobs)
    finite = jnp.isfinite(logits).all(axis=-1)
    count = state.count + 1
    stopped = jnp.any(token[:, None] == request.stop_tokens, axis=1)
    done = stopped | (count >= request.max_new_tokens) | ~finite
    old, new = (jnp.stack(columns, axis=1, dtype=jnp.int32) for columns in (state, (token, lengths, count, done)))
    rows = rows._replace(state=rows.state.at[index].set(jnp.where(goes_on[:, None], new, old)), seen=seen)
    return rows, Chosen(token, done, finite, logprobs).packed()


def _chosen(
    seen: Occurrences,
    index: jax.Array,
    logits: jax.Array,
    lengths: jax.Array,
    goes_on: jax.Array,
    request: Request,
    wants_logprobs: jax.Array,
) -> tuple[jax.Array, Occurrences, Logprobs]:
    """The tokens of the rows ``index``, the tokens seen including them, and their log-probabilities."""
    has_penalties = (
        (request.repetition_penalty != 1) | (request.presence_penalty != 0) | (request.frequency_penalty != 0)
    )
    wanted = jax.lax.cond(
        has_penalties.any(),
        lambda: penalised(logits, request, Occurrences(seen.context[index], seen.answer[index])),
        lambda: logits,
    )
    token = _choose(wanted, lengths, request)
    logprobs = jax.lax.cond(
        (wants_logprobs & goes_on).any(),
        lambda: logprobs_of(logits, token),
        lambda: _no_logprobs(token.size),
    )
    return token, seen._replace(answer=seen.answer.at[index, token].add(goes_on)), logprobs


def _choose(logits: jax.Array, positions: jax.Array, request: Request) -> jax.Array:
    """``choose``, with no more work than the rows in question need."""
    draws = request.temperature > 0
    filters = draws & ((request.top_k > 0) | (request.top_p < 1))
    kinds = [(False, False), (True, False), (True, True)]
    branches = [lambda d=d, f=f: choose(logits, positions, request, draws=d, filters=f) for d, f in kinds]
    return jax.lax.switch(draws.any().astype(jnp.int32) + filters.any(), branches)


def logprobs_of(logits: jax.Array, tokens: jax.Array) -> Logprobs:
    """The log-probabilities of ``tokens`` [n] under float32 logits [n, vocabulary]."""
    total = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    chosen = jnp.take_along_axis(logits, tokens[:, None], axis=-1) - total
    top, likeliest = jax.lax.top_k(logits, min(MAX_LOGPROBS, logits.shape[-1]))
    missing = ((0, 0), (0, MAX_LOGPROBS - top.shape[-1]))
    return Logprobs(chosen[:, 0], jnp.pad(likeliest, missing), jnp.pad(top - total, missing))


def _no_logprobs(count: int) -> Logprobs:
    return Logprobs(
        jnp.zeros(count), jnp.zeros((count, MAX_LOGPROBS), jnp.int32), jnp.zeros((count, MAX_LOGPROBS), jnp.float32)
    )


def scored(logits_of: object, hidden: jax.Array, targets: jax.Array, wanted: jax.Array, chunk: int) -> Logprobs:
    """Scores targets int32 [n] after hidden [n, d], ``chunk`` of them at a time; zeros where not ``wanted``."""

    def of_all() -> Logprobs:
        parts = (hidden.reshape(-1, chunk, hidden.shape[-1]), jnp.maximum(targets, 0).reshape(-1, chunk))
        found = jax.lax.map(lambda part: logprobs_of(logits_of(part[0]), part[1]), parts)
        return jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), found)

    return jax.lax.cond(wanted, of_all, lambda: _no_logprobs(targets.size))
