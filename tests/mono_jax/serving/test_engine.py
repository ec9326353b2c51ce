"""The engine answers like Generator, in any batch, order and chunks, with and without reuse."""

from __future__ import annotations

import dataclasses
import math
import threading
import time
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mono_jax import tree
from mono_jax.errors import ConfigError, GenerationError
from mono_jax.generation.decode import Generator
from mono_jax.generation.options import Sampling
from mono_jax.generation.prompts import Prompt
from mono_jax.models.architecture import RopeScaling
from mono_jax.models.presets import preset
from mono_jax.serving import engine as engines
from mono_jax.serving import loop as loops
from mono_jax.serving.contract import EngineConfig, Event, Full, Request, TooLong
from mono_jax.serving.engine import Engine
from mono_jax.serving.loop import Loop
from mono_jax.serving.pages import Pages
from mono_jax.serving.programs import Programs, Sizes
from tests.mono_jax.generation.test_decode import IMAGE, prompt
from tests.mono_jax.helpers import random_params
from tests.mono_jax.serving.served import (
    CONFIG,
    REQUESTS,
    Client,
    Letters,
    Served,
    alone,
    begin,
    check,
    check_all,
    finish,
    run,
    served,
)

NTK = RopeScaling("dynamic", 2.0)


@pytest.fixture(scope="module")
def mono() -> Served:
    """Visual experts in attention and FFN; prompts longer than the trained length, which dynamic RoPE stretches."""
    return served(preset("tiny_mono_1_5", rope_scaling=NTK, max_position_embeddings=48))


@pytest.mark.parametrize(
    ("seed", "cancels", "changes"),
    [
        (0, 0.0, {"reuse_prefixes": False}),
        (1, 0.0, {}),
        (2, 0.05, {}),
        (3, 0.0, {"max_slots": 128}),  # one long request at a time: the others wait
    ],
    ids=["no_reuse", "reuse", "cancels", "full_cache"],
)
def test_answers_are_those_of_generator(mono: Served, seed: int, cancels: float, changes: dict[str, Any]) -> None:
    clients, loop = run(mono, seed, cancels, **changes)
    check_all(mono, clients)
    cancelled = sum(client.finish == "cancelled" for client in clients)
    assert (cancelled > 0) == (cancels > 0)
    cached = sum(client.events[0].cached_tokens for client in clients)
    assert (cached >= 40) == (changes.get("reuse_prefixes", True))
    pages = loop.scheduler.pages
    assert pages.used == 0
    assert len(pages._free) + pages.reusable == pages.count
    assert sum(loop.records.requests.values()) == REQUESTS


def test_the_requests_are_lively(mono: Served) -> None:
    """The tests here would prove little if all requests were the same."""
    samplings = [request.sampling for request in mono.requests]
    images = {0 if r.prompt.patches is None else len(r.prompt.patches) // 16 for r in mono.requests}
    assert images == {0, 1, 2, 3}
    assert {answer.finish for answer in mono.expected} == {"stop", "length"}
    assert len({tuple(answer.tokens) for answer in mono.expected}) > 30
    assert any(s.penalises for s in samplings) and any(s.temperature == 0 for s in samplings)
    lengths = [len(request.prompt.input_ids) for request in mono.requests]
    assert min(lengths) < 32 < max(lengths)  # one chunk, several
    assert any(length > 48 for length in lengths)  # stretched


def test_images_of_others_are_not_reused(mono: Served) -> None:
    """Equal ids with other pixels, and equal pixels at another position of the prompt."""
    ids = prompt("ttttttttItt").input_ids
    images = [prompt("I", seed).patches for seed in (3, 4)]
    moved = np.concatenate([ids[:1], ids])
    requests = [Request(Prompt(p, images[i]), Sampling(6)) for p, i in ((ids, 0), (ids, 1), (moved, 0), (ids, 0))]
    engine = mono.engine()
    clients = [Client(request) for request in requests]
    for client in clients:
        begin(engine, [client.task(engine)])
        finish(engine)
    for client, expected in zip(clients, alone(mono.generator, requests)):
        check(client, expected)
    assert [client.events[0].cached_tokens for client in clients] == [0, 8, 0, 24]


def test_a_question_about_an_answer_reuses_it(mono: Served) -> None:
    """In a chat's next turn, only new tokens are read, as far as pages are full."""
    engine = mono.engine()

    def ask(start: Prompt) -> Client:
        client = Client(Request(start, Sampling(12)))
        begin(engine, [client.task(engine)])
        finish(engine)
        return client

    first = prompt("ttttt")
    answer = ask(first)
    again = Prompt(np.concatenate([first.input_ids, answer.tokens, prompt("ttt", 1).input_ids]))
    later = ask(again)
    assert later.events[0].cached_tokens == 16  # of 5 + 11, whose keys are known
    check(later, alone(mono.generator, [later.request])[0])


def test_a_prompt_that_is_known_whole_is_read_to_its_end(mono: Served) -> None:
    """Pages hold all of the prompt, but its last token still has to select the first token of the answer."""
    engine = mono.engine()
    clients = [Client(Request(prompt("t" * 16), Sampling(6, temperature=1.0, seed=seed))) for seed in (1, 2, 1)]
    for client in clients:
        begin(engine, [client.task(engine)])
        finish(engine)
    assert [client.events[0].cached_tokens for client in clients] == [0, 8, 8]
    for client, expected in zip(clients, alone(mono.generator, [client.request for client in clients])):
        check(client, expected)


def test_scores_are_log_probabilities(mono: Served) -> None:
    """For each token of the prompt given the previous ones, from a forward pass over the whole prompt."""
    engine = mono.engine()
    start = prompt("tt" + "I" + "t" * 22)
    client = Client(Request(start, Sampling(1000, logprobs=2), scores=True))  # no new token is made
    begin(engine, [client.task(engine)])
    finish(engine)
    [event] = client.events
    assert (event.finish, event.tokens, engine._loop.scheduler.pages.used) == ("length", (), 0)
    ids = np.asarray(start.input_ids)
    # The logits of the first token after each beginning of the prompt.
    places = [1, *range(19, 40)]
    begins = [Prompt(ids[:n], start.patches if n > 2 else None) for n in places]
    expected = mono.generator.generate(begins, Sampling(1, return_logits=True))
    assert [n for n, score in enumerate(event.scores) if score is not None] == places
    for n, answer in zip(places, expected):
        logprobs = answer.logits[0] - np.logaddexp.reduce(answer.logits[0])
        score = event.scores[n]
        assert score.token == ids[n]
        np.testing.assert_allclose(score.logprob, logprobs[ids[n]], atol=2e-4)
        np.testing.assert_allclose([value for _, value in score.top], np.sort(logprobs)[::-1][:2], atol=2e-4)


@pytest.mark.parametrize("turns", range(4))
def test_scores_are_given_up_like_answers(turns: int, mono: Served) -> None:
    """In the queue, while the prompt is read, and when its last chunk is dispatched; others are not affected."""
    engine = mono.engine(dataclasses.replace(CONFIG, max_queue=50))
    clients = [Client(request) for request in mono.requests[:4]]
    gone = Client(Request(prompt("t" * 120), Sampling(1), scores=True))
    task = gone.task(engine)
    begin(engine, [task, *(client.task(engine) for client in clients)])
    for _ in range(turns):
        engine._loop.turn()
    task.cancel()
    finish(engine)
    assert (gone.finish, len(gone.events), gone.events[-1].scores) == ("cancelled", 1, None)
    assert engine._loop.scheduler.pages.used == 0
    check_all(mono, clients)


def test_nothing_is_compiled_and_threads_get_their_answers(mono: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through the engine's own thread, from several client threads; then a drain."""
    engine = mono.engine()
    monkeypatch.setattr(mono.programs, "compile", lambda: 0)
    engine.start()
    clients = [Client(request) for request in mono.requests]

    def submit(mine: Sequence[Client]) -> None:
        for client in mine:
            engine.submit(client.request, client.events.append)

    threads = [threading.Thread(target=submit, args=(clients[n::4],)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    engine.close(drain=True)
    check_all(mono, clients)
    stats = engine.stats()
    assert stats.compilations == 0
    assert (stats.queued, stats.running, stats.slots_used) == (0, 0, 0)
    assert sum(stats.requests.values()) == REQUESTS == len(stats.first_token_s)
    assert stats.tokens_in == sum(len(client.request.prompt.input_ids) for client in clients)
    with pytest.raises(Full, match="closing"):
        engine.submit(clients[0].request, print)


def test_a_cut_tells_why(mono: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = mono.engine()
    monkeypatch.setattr(mono.programs, "compile", lambda: 0)
    engine.start()
    ended, client = threading.Event(), Client(Request(prompt("ttt"), Sampling(100)))

    def on_event(event: Event) -> None:
        client.events.append(event)
        ended.set()

    engine.submit(client.request, on_event)
    ended.wait()
    engine.close(drain=False)
    assert (client.finish, client.events[-1].message) in [("cancelled", "the engine is closing"), ("length", "")]


def test_a_step_is_timed_from_the_step_before(mono: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the host is slow, a turn's results arrive all at once: a step after a chunk would seem to take no time."""
    turns, turn = [0], Loop.turn

    def counted(loop: Loop, cut: str | None = None) -> None:
        turns[0] += 1
        turn(loop, cut)

    monkeypatch.setattr(Loop, "turn", counted)
    clock = types.SimpleNamespace(perf_counter=lambda: float(turns[0]), thread_time=time.thread_time)
    monkeypatch.setattr(loops, "time", clock)
    _, loop = run(mono, 1)
    records = loop.records
    assert 20 < records.steps_timed == len(records.step_s) == len(records.step_host_s) < records.steps
    assert set(records.step_s) == {1.0}
    assert all(seconds > 0 for seconds in records.step_host_s)
    assert sum(records.step_host_s) < records.busy_s  # prompts were read, too


@pytest.mark.parametrize("calls", ["c", "cc", "sc", "scc", "scsc"])
def test_an_engine_can_be_closed_at_any_time(calls: str, mono: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before it is started, and again, as in a ``finally``; afterwards it no longer counts compilations."""
    engine = mono.engine()
    monkeypatch.setattr(mono.programs, "compile", lambda: 0)
    for call in calls:
        engine.start() if call == "s" else engine.close()
    assert engine.closed is not None
    jax.jit(lambda x: x + len(calls))(0)
    assert engine.stats().compilations == 0


def test_requests_that_cannot_be_served(mono: Served) -> None:
    engine = mono.engine()
    with pytest.raises(Full, match="not been started"):
        engine.submit(Request(prompt("t"), Sampling(3)), print)
    engine._closing = None
    cases = [
        (
            prompt("ttt"),
            Sampling(126),
            TooLong,
            r"^3 prompt tokens \+ 126 new tokens exceed the 128 .*max_length",
        ),
        (Prompt([1, IMAGE, 2]), Sampling(3), GenerationError, "1 image placeholders"),
        (prompt("t"), Sampling(3, stop_tokens=tuple(range(64))), GenerationError, "64 stop_tokens"),
        (prompt("t"), Sampling(3, return_logits=True), GenerationError, "return_logits"),
        (Prompt(prompt("It").input_ids, np.zeros((16, 8, 8, 3), np.float32)), Sampling(3), GenerationError, "uint8"),
    ]
    for start, sampling, kind, message in cases:
        with pytest.raises(kind, match=message):
            engine.submit(Request(start, sampling), print)
    for _ in range(CONFIG.max_queue + CONFIG.max_rows):
        engine.submit(Request(prompt("t"), Sampling(3)), print)
    with pytest.raises(Full, match="104 requests are waiting already"):
        engine.submit(Request(prompt("t"), Sampling(3)), print)
    assert engine.stats().refused == 2


def test_a_prompt_of_several_requests_is_worked_out_once(mono: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, made = mono.engine(), []

    def counted(name: str, wrapped: Any) -> Any:
        return lambda *given: (made.append(name), wrapped(*given))[1]

    for name in ("check_prompt", "Contents", "Reading"):
        monkeypatch.setattr(engines, name, counted(name, getattr(engines, name)))
    prepared = engine.prepare(prompt("ttIttt"))
    digests = list(prepared.contents.digests)
    requests = [Request(prepared, Sampling(20, temperature=1.0, seed=seed)) for seed in range(3)]
    clients = [Client(request) for request in requests]
    begin(engine, [client.task(engine) for client in clients])
    finish(engine)
    for client, expected in zip(clients, alone(mono.generator, requests)):
        check(client, expected)
    assert sorted(made) == ["Contents", "Reading", "check_prompt"]
    assert prepared.contents.digests == digests  # those of the answers are not shared
    mono.engine()._task(requests[0], print)  # another engine's pages may have another size
    assert len(made) == 6


def test_a_client_that_fails_costs_nobody_else_anything(mono: Served) -> None:
    engine = mono.engine()

    def fails(event: Event) -> None:
        raise RuntimeError("gone")

    clients = [Client(request) for request in mono.requests[:3]]
    tasks = [client.task(engine) for client in clients]
    bad = engine._task(Request(prompt("tt"), Sampling(20)), fails)
    begin(engine, [bad, *tasks])
    finish(engine)
    assert bad.finish == "cancelled" and len(bad.answer) < 20
    check_all(mono, clients)


class Broken(Letters):
    """A tokenizer without text for token 7."""

    @staticmethod
    def decode(ids: Sequence[int]) -> str:
        if 7 in ids:
            raise SystemExit  # no Exception, like the panics of tokenizers
        return Letters.decode(ids)


def test_a_text_that_cannot_be_made_ends_one_request_and_no_other(mono: Served) -> None:
    engine = mono.engine()
    engine.tokenizer = Broken()
    clients = [Client(request) for request in mono.requests]
    for client in clients:
        engine._loop.scheduler.queue.append(client.task(engine))
    finish(engine)
    failed = [7 in expected.tokens for expected in mono.expected]
    assert 0 < sum(failed) < REQUESTS
    for client, expected, fails in zip(clients, mono.expected, failed):
        if client.finish == "error":
            assert fails and "could not be decoded" in client.events[-1].message
        else:  # a stop string may have come before the token
            check(client, expected)
    assert any(client.finish == "error" for client in clients)
    assert engine._loop.scheduler.pages.used == 0


EXTREMES = (*(sign * 10.0**power for sign in (1, -1) for power in (-320, -40, -30, 0, 9, 38, 300)), 0.0, np.nan, np.inf)


@pytest.mark.parametrize("scores", [False, True], ids=["answer", "scores"])
def test_no_number_that_a_request_may_have_ends_the_engine(mono: Served, scores: bool) -> None:
    """It is refused where it is given, or a device can compute with it."""
    start, engine, tasks = prompt("tIt"), mono.engine(), []
    kinds = {name: type(value) for name, value in dataclasses.asdict(Sampling(logprobs=1)).items()}
    for name, kind in kinds.items():
        if kind not in (int, float, tuple) or name == "stop":
            continue
        for extreme in (*EXTREMES, 2**31 - 1, 2**31, 2**63, -(2**63) - 1):
            if kind is not float and not math.isfinite(extreme):
                continue
            value = extreme if kind is float else (int(extreme),) if kind is tuple else int(extreme)
            values = {"max_new_tokens": 3, "temperature": 1.0, "repetition_penalty": 1.1} | {name: value}
            try:
                request = Request(start, Sampling(**values), scores)
                tasks.append(engine._task(request, Client(request).events.append))
            except GenerationError as error:
                assert name in str(error) or "new tokens exceed the 128" in str(error)
    assert len(tasks) > 50
    begin(engine, tasks)
    finish(engine)
    assert {task.finish for task in tasks} <= {"stop", "length"}


def test_what_is_accepted_is_admitted() -> None:
    """By an idle engine: otherwise it would wait forever, and all requests after it."""
    rng, accepted = np.random.default_rng(0), 0
    for _ in range(3000):
        length, slots, page = (int(rng.integers(1, most)) for most in (70, 90, 40))
        try:
            config = EngineConfig(max_rows=1, max_slots=slots, max_length=length, page=page)
        except ConfigError as error:
            assert "max_slots" in str(error)
            continue
        accepted += 1
        pages = Pages(config.max_slots // config.page)
        assert pages.take(-(-config.max_length // config.page)) is not None, config
    assert accepted > 300


def test_scores_that_are_not_finite_are_an_error_wherever_they_are(mono: Served) -> None:
    """A bad token early in the prompt spoils its chunk; a good last chunk proves nothing."""
    engine = mono.engine()
    client = Client(Request(prompt("t" * 60), Sampling(1, logprobs=0), scores=True))
    task = client.task(engine)
    begin(engine, [task])
    [read] = engine._loop._dispatched
    assert not read.chunk.is_last
    spoilt = read.scores._replace(chosen=jnp.asarray(read.scores.chosen).at[5].set(jnp.nan))
    engine._loop._dispatched = [read._replace(scores=spoilt)]
    finish(engine)
    assert client.finish == "error" and "not finite" in client.events[-1].message


def test_logits_that_are_not_finite_end_one_request_and_no_other(mono: Served) -> None:
    """The pages of a failed request are reused by others."""
    engine = mono.engine()
    params = jax.tree.map(lambda a: a, mono.generator.params)
    table = params["embed"]["embedding"]
    params["embed"] = {"embedding": table.at[95].set(jnp.nan)}  # no other request has token 95
    broken = dataclasses.replace(mono, generator=Generator(mono.generator.config, params, jnp.float32))
    before, mono.programs.generator = mono.programs.generator, broken.generator
    try:
        bad = Client(Request(Prompt([95] * 40), Sampling(5)))
        begin(engine, [bad.task(engine)])
        requests = [number for number, answer in enumerate(mono.expected) if 95 not in answer.tokens]
        clients = {number: Client(mono.requests[number]) for number in requests[:12]}
        begin(engine, [client.task(engine) for client in clients.values()])
        finish(engine)
    finally:
        mono.programs.generator = before
    assert bad.finish == "error" and "not finite" in bad.events[-1].message
    for number, client in clients.items():
        check(client, mono.expected[number])


def test_programs_are_kept_on_disk(tmp_path: Path) -> None:
    """The second start reads all of them, and its answers are the same."""
    config = EngineConfig(max_rows=1, max_slots=32, max_length=32, page=8, prefill_chunk=32, programs=str(tmp_path))
    sizes = Sizes(rows=(1,), step_pages=(4,), chunks=(32,), chunk_pages=(4,), tiles=(), block=32, plain=False)
    generator = Generator(preset("tiny_lm"), random_params(preset("tiny_lm")), jnp.float32)
    found: list[str] = []

    def heard(name: str, **_: Any) -> None:
        found.extend([name] if name == "/jax/compilation_cache/cache_hits" else [])

    answers, hits = [], []
    jax.monitoring.register_event_listener(heard)
    try:
        for _ in range(2):
            found.clear()
            engine = Engine(generator, Letters(), config, sizes=sizes)
            engine.start()
            hits.append(len(found))
            client = Client(Request(prompt("ttt"), Sampling(6)))
            engine.submit(client.request, client.events.append)
            engine.close(drain=True)
            assert engine.stats().compilations == 0
            answers.append(client.tokens)
    finally:
        jax.monitoring.unregister_event_listener(heard)
    assert hits[0] == 0 and hits[1] >= engine.stats().programs == 3
    assert answers[0] == answers[1] and len(answers[0]) == 6


def test_steps_run_the_text_experts_alone() -> None:
    """A step of a model with visual experts is given the arrays and has the FLOPs of its language model."""
    flops, given, read = {}, {}, {}
    for name in ("tiny_mono", "tiny_mono_1_5", "tiny_lm"):
        programs = Programs(Generator(preset(name), random_params(preset(name)), jnp.float32), CONFIG)
        step = programs.traced(("step", True, 4, 16))
        flops[name] = step.lower().cost_analysis()["flops"]
        [params, *_], _ = step.args_info
        given[name] = jax.tree.map(lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype), params)
        read[name] = set(tree.flatten(jax.eval_shape(programs._bundles.unpacked, given[name])))
    assert read["tiny_mono"] == read["tiny_mono_1_5"] == read["tiny_lm"]
    assert given["tiny_mono"] == given["tiny_mono_1_5"] == given["tiny_lm"]
    assert flops["tiny_mono"] == flops["tiny_mono_1_5"] == pytest.approx(flops["tiny_lm"], rel=1e-3)


@pytest.mark.parametrize("kind", ["read", "step"])
def test_the_likeliest_token_takes_no_branch(kind: str) -> None:
    """A GPU makes the host wait for each one, so that nothing is dispatched ahead."""
    programs = Programs(Generator(preset("tiny_lm"), random_params(preset("tiny_lm")), jnp.float32), CONFIG)
    plain, other = (str(programs.traced((kind, is_plain, 16, 16)).jaxpr) for is_plain in (True, False))
    assert " cond[" not in plain and " cond[" in other
