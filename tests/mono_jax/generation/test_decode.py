"""Generation does not depend on the other rows or on padding (test_parity.py compares it with the reference)."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mono_jax.errors import GenerationError
from mono_jax.generation import decode as generate
from mono_jax.generation.decode import Generation, Generator
from mono_jax.generation.options import Sampling
from mono_jax.generation.prompts import Prompt, bucket
from mono_jax.generation.sampling import choose, make_request
from mono_jax.models.layer_ranges import Layout, preferred_layout
from mono_jax.models.presets import PRESETS, preset
from mono_jax.parallel.mesh import make_mesh
from mono_jax.parallel.mesh_config import MeshConfig
from tests.mono_jax.helpers import random_params

IMAGE = 100  # placeholder of the tiny presets
LAYOUTS: tuple[Layout, ...] = ("stacked", "separate", "separate_transposed")


@pytest.fixture(scope="module")
def models() -> dict[str, Generator]:
    """Each kind of model, in float32; weights large enough that answers vary and depend on the images."""
    names = ("tiny_mono", "tiny_mono_1_5", "tiny_modular", "tiny_lm")
    return {name: Generator(PRESETS[name], random_params(PRESETS[name]), jnp.float32) for name in names}


@pytest.fixture(scope="module")
def mono(models: dict[str, Generator]) -> Generator:
    return models["tiny_mono"]


def prompt(pattern: str, seed: int = 0) -> Prompt:
    """``t`` = a text token, ``I`` = the 16 visual tokens of one 32-pixel tile."""
    rng = np.random.default_rng(seed)
    ids: list[int] = []
    for letter in pattern:
        ids += [int(rng.integers(3, 90))] if letter == "t" else [IMAGE] * 16
    tiles = pattern.count("I")
    patches = rng.integers(0, 256, (16 * tiles, 8, 8, 3), np.uint8) if tiles else None
    return Prompt(np.array(ids, np.int32), patches)


def join(*parts: Prompt | list[int]) -> Prompt:
    """One prompt of several and of generated tokens between them."""
    parts = [part if isinstance(part, Prompt) else Prompt(np.array(part, np.int32)) for part in parts]
    patches = [part.patches for part in parts if part.patches is not None]
    ids = np.concatenate([np.asarray(part.input_ids, np.int32) for part in parts])
    return Prompt(ids, np.concatenate(patches) if patches else None)


def assert_same(one: Generation, other: Generation) -> None:
    assert one.tokens == other.tokens
    assert (one.finish, one.stop_token) == (other.finish, other.stop_token)
    np.testing.assert_allclose(one.logits, other.logits, atol=2e-4)


# ------------------------------------------------------------------ what must not matter


def test_answers_are_lively(mono: Generator) -> None:
    """The tests here would prove little if all answers were the same."""
    ids = prompt("tItt").input_ids
    images = [prompt("I", seed).patches for seed in (3, 4)]
    one, other = mono.generate([Prompt(ids, image) for image in images], Sampling(16, return_logits=True))
    assert len(set(one.tokens)) > 4
    assert one.tokens != other.tokens
    assert np.abs(one.logits[0] - other.logits[0]).max() > 0.1


def test_batched_equals_single(mono: Generator) -> None:
    prompts = [prompt("tItt", 0), prompt("t" * 21, 1), prompt("ttIIttttItt", 2)]
    samplings = [
        Sampling(12, return_logits=True),
        Sampling(9, temperature=1.0, seed=5, return_logits=True),
        Sampling(5, temperature=0.7, top_k=20, top_p=0.9, seed=6, stop_tokens=(7, 8), return_logits=True),
    ]
    together = mono.generate(prompts, samplings)
    for one, sampling, answer in zip(prompts, samplings, together):
        assert_same(mono.generate([one], sampling)[0], answer)


def test_a_program_is_traced_from_shapes(mono: Generator) -> None:
    """For plans: no array is made, and layers are laid out separately as in a real run."""
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), random_params(mono.config))
    for layout in LAYOUTS:
        made = Generator(mono.config, random_params(mono.config), jnp.bfloat16, layout=layout)
        described = Generator(mono.config, shapes, jnp.bfloat16, layout=layout)
        assert jax.tree.map(lambda a: (a.shape, a.dtype), made.params) == jax.tree.map(
            lambda a: (a.shape, a.dtype), described.params
        )
        traced = described.traced(prompt("tItt"), Sampling(5))
        assert str(traced.jaxpr) == str(made.traced(prompt("tItt"), Sampling(5)).jaxpr)


def test_layers_lie_apart_where_that_is_faster() -> None:
    """For small models, the longer compilation is not worth it; TPUs copy only for kernels."""
    small, large = (
        {"layers": {"visual_feed_forward": jax.ShapeDtypeStruct((2, n, 1 << 10), np.float32)}} for n in (8, 1 << 13)
    )
    text = {"layers": {"feed_forward": large["layers"]["visual_feed_forward"]}}
    assert preferred_layout(None, small, platform="cpu") == "stacked"
    assert preferred_layout(None, large, platform="cpu") == "separate_transposed"
    assert preferred_layout(None, small, platform="gpu") == "separate"
    assert preferred_layout(None, large, platform="tpu") == "stacked"
    assert preferred_layout(None, large, grouped=True, platform="tpu") == "separate"
    assert preferred_layout(None, text, grouped=True, platform="tpu") == "stacked"
    mesh = make_mesh(MeshConfig(data=1, fsdp=1, tensor=2), jax.devices()[:2])
    assert preferred_layout(mesh, large, platform="gpu") == "stacked"


@pytest.mark.parametrize("layout", LAYOUTS[1:])
def test_separate_layers_give_the_same_answers(mono: Generator, layout: Layout) -> None:
    separate = Generator(mono.config, random_params(mono.config), jnp.float32, layout=layout)
    assert "layers[1:2]" in separate.params and "layers" not in separate.params
    prompts, sampling = [prompt("tItt", 0), prompt("ttt", 1)], Sampling(5, return_logits=True)
    for one, other in zip(mono.generate(prompts, sampling), separate.generate(prompts, sampling)):
        assert_same(one, other)


@pytest.mark.parametrize(("name", "count"), [("tiny_mono_1_5", 3), ("tiny_modular", 2)])
def test_cached_turns_equal_one_long_prompt(models: dict[str, Generator], name: str, count: int) -> None:
    """Images in later turns use the visual experts, and rows continue from their own lengths."""
    generator = models[name]
    sampling = Sampling(6, temperature=0.8, seed=3, return_logits=True)
    session = generator.session(2)
    turns = [
        [prompt("tItt", 1), prompt("tt", 2)],
        [prompt("ttIIt", 3), prompt("tItttttt", 4)],
        [prompt("ttt", 5), prompt("tIt", 6)],
    ]
    context: list[list[Any]] = [[], []]
    for turn in turns[:count]:
        answers = session.turn(turn, sampling)
        for row in range(2):
            context[row].append(turn[row])
        whole = generator.generate([join(*row) for row in context], sampling)
        for row in range(2):
            assert_same(whole[row], answers[row])
            context[row].append(answers[row].tokens)
        assert session.lengths == [len(join(*row).input_ids) for row in context]


def test_a_stop_token_is_not_part_of_the_context(mono: Generator) -> None:
    start = prompt("tItt", 1)
    free = mono.generate([start], Sampling(8))[0].tokens
    stop = next(token for token in free[1:] if token not in free[:1])
    upto = free.index(stop)
    session = mono.session()
    [answer] = session.turn([start], Sampling(8, stop_tokens=(99999, stop)))
    assert answer == Generation(free[:upto], "stop", stop)
    assert session.lengths == [len(start.input_ids) + upto]
    [after] = session.turn([prompt("tt", 2)], Sampling(4, return_logits=True))
    assert_same(mono.generate([join(start, answer.tokens, prompt("tt", 2))], Sampling(4, return_logits=True))[0], after)


def test_padding_changes_nothing(mono: Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    """More rows, visual slots, text slots and cache slots than needed."""
    prompts, sampling = [prompt("ttItt"), prompt("tttt", 1)], Sampling(5, return_logits=True)
    before = mono.generate(prompts, sampling)
    monkeypatch.setattr(generate, "bucket", lambda n, unit=1: -(-n // unit) * unit + 3 * unit)
    for one, other in zip(before, mono.generate(prompts, sampling)):
        assert_same(one, other)


def test_lengths_of_one_bucket_share_a_program(mono: Generator) -> None:
    mono.generate([prompt("ttt")], Sampling(3))
    programs = generate._programs(mono.config, mono.dtype, None)
    compiled = programs.prefill._cache_size(), programs.decode._cache_size()
    again = Generator(mono.config, random_params(mono.config, 1), jnp.float32)
    again.generate([prompt("ttttttttt")], Sampling(9, stop_tokens=(5,)))
    assert (programs.prefill._cache_size(), programs.decode._cache_size()) == compiled


def test_buckets_waste_at_most_a_quarter() -> None:
    sizes = [bucket(n) for n in range(2000)]
    assert all(n <= size <= max(n, 1.25 * n) for n, size in enumerate(sizes))
    assert sizes[:11] == [0, 1, 2, 3, 4, 5, 6, 7, 8, 10, 10]
    assert len(set(sizes)) < 45
    assert bucket(17, 16) == 32


def test_streamed_tokens_are_the_answer(mono: Generator) -> None:
    prompts, sampling = [prompt("ttt"), prompt("tItt", 1)], [Sampling(15), Sampling(4)]
    parts: list[list[list[int]]] = []
    answers = mono.generate(prompts, sampling, on_tokens=parts.append)
    assert [[token for part in parts for token in part[row]] for row in range(2)] == [a.tokens for a in answers]
    assert [len(row) for row in parts[0]] == [1, 1]  # the first token does not wait for other tokens
    assert len(parts) == 3
    assert answers == mono.generate(prompts, sampling)


def test_bfloat16_follows_float32(mono: Generator) -> None:
    """Greedy tokens may differ at near ties; the first step's logits are close."""
    half = Generator(mono.config, mono.params, jnp.bfloat16)
    assert half.params["layers"]["attention"]["wqkv"]["kernel"].dtype == jnp.bfloat16
    sampling = Sampling(1, return_logits=True)
    [one], [other] = (generator.generate([prompt("tItt")], sampling) for generator in (mono, half))
    spread = one.logits.std()
    assert 0 < np.abs(one.logits - other.logits).max() < 0.1 * spread


# ------------------------------------------------------------------ sampling


def request(rows: int, **changes: Any) -> Any:
    sampling = Sampling(**({"temperature": 1.0} | changes))
    config = preset("tiny_lm")
    return make_request(config, [dataclasses.replace(sampling, seed=i) for i in range(rows)], rows)


def draw(logits: list[float], count: int = 4000, **changes: Any) -> np.ndarray:
    """Relative frequencies of ``count`` draws, each with its own seed."""
    wanted = request(count, **changes)
    rows = jnp.tile(jnp.array(logits, jnp.float32), (count, 1))
    tokens = choose(rows, jnp.zeros(count, jnp.int32), wanted, draws=True, filters=True)
    return np.bincount(np.asarray(tokens), minlength=len(logits)) / count


LOGITS = [0.5, 2.0, -1.0, 1.5, 0.0]


def softmax(logits: list[float], keep: list[int], temperature: float = 1.0) -> np.ndarray:
    weights = np.zeros(len(logits))
    weights[keep] = np.exp(np.array(logits)[keep] / temperature)
    return weights / weights.sum()


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, softmax(LOGITS, [0, 1, 2, 3, 4])),
        ({"temperature": 2.0}, softmax(LOGITS, [0, 1, 2, 3, 4], 2.0)),
        ({"top_k": 3}, softmax(LOGITS, [1, 3, 0])),
        ({"top_k": 50}, softmax(LOGITS, [0, 1, 2, 3, 4])),
        # Probabilities in order: 0.484, 0.294, 0.108, 0.066, 0.024 (the sum first passes 0.6 with the second).
        ({"top_p": 0.6}, softmax(LOGITS, [1, 3])),
        ({"top_k": 2, "top_p": 0.7}, softmax(LOGITS, [1, 3])),  # of two tokens the first has 0.62
        ({"top_k": 2, "top_p": 0.6}, softmax(LOGITS, [1])),
        ({"top_p": 1e-6}, softmax(LOGITS, [1])),
        ({"banned_tokens": (1, 3)}, softmax(LOGITS, [0, 2, 4])),
        ({"temperature": 0.0}, softmax(LOGITS, [1])),
    ],
)
def test_draws_follow_the_distribution(changes: dict[str, Any], expected: np.ndarray) -> None:
    frequencies = draw(LOGITS, **changes)
    np.testing.assert_allclose(frequencies, expected, atol=0.03)
    assert (frequencies[expected == 0] == 0).all()


def test_filters_keep_the_draws_that_survive_them() -> None:
    """A row draws the same token whether or not the batch holds a row with top_k or top_p."""
    wanted = request(200)
    logits = jax.random.normal(jax.random.key(0), (200, 128)) * 3
    position = jnp.arange(200)
    one = choose(logits, position, wanted, draws=True, filters=False)
    assert jnp.array_equal(one, choose(logits, position, wanted, draws=True, filters=True))
    assert not jnp.array_equal(one, choose(logits, position + 1, wanted, draws=True, filters=False))


def test_top_k_of_one_is_greedy(mono: Generator) -> None:
    start = [prompt("tItt")]
    greedy = mono.generate(start, Sampling(10))
    assert mono.generate(start, Sampling(10, temperature=3.0, top_k=1, seed=9)) == greedy
    ties = jnp.zeros((50, 128))
    tied = choose(ties, jnp.arange(50), request(50, top_k=1), draws=True, filters=True)
    assert not tied.any()  # among equals the first, as for argmax


def test_seeds(mono: Generator) -> None:
    start = [prompt("ttt")]
    answers = [mono.generate(start, Sampling(10, temperature=2.0, seed=seed))[0].tokens for seed in (0, 0, 1, -1)]
    assert answers[0] == answers[1]
    assert len({tuple(answer) for answer in answers}) == 3
    rows = mono.generate(start * 2, Sampling(10, temperature=2.0, seed=0))
    assert [row.tokens for row in rows] == [answers[0], answers[2]]


def test_the_placeholder_is_never_generated() -> None:
    """Even if the model would choose nothing else; a model without vision has no placeholder."""
    logits = jnp.zeros((1, 128)).at[0, IMAGE].set(50.0).at[0, 120].set(40.0)
    for name, expected in (("tiny_mono", 120), ("tiny_modular", 120), ("tiny_lm", IMAGE)):
        wanted = make_request(preset(name), [Sampling()], 1)
        token = choose(logits, jnp.zeros(1, jnp.int32), wanted, draws=False, filters=False)
        assert token.tolist() == [expected], name


# ------------------------------------------------------------------ bad input


def bad_prompts() -> list[tuple[str, str, Prompt, str]]:
    image = prompt("tItt")
    ids = np.asarray(image.input_ids)
    return [
        (
            "too few placeholders",
            "tiny_mono",
            Prompt(ids[2:], image.patches),
            "15 image placeholders.*16 visual",
        ),
        ("no image", "tiny_mono", Prompt(ids), "16 image placeholders .id 100. but 0 visual tokens"),
        ("no placeholder", "tiny_mono", Prompt([1, 2], image.patches), "0 image placeholders"),
        ("empty", "tiny_mono", Prompt([]), "non-empty list of token ids"),
        ("unknown id", "tiny_lm", Prompt([1, 128]), "token id 128 is outside the vocabulary of 128"),
        ("negative id", "tiny_lm", Prompt([-1, 5]), "token id -1 is outside"),
        ("ends with an image", "tiny_mono", Prompt(ids[:-2], image.patches), "ends with an image placeholder"),
        ("image for a language model", "tiny_lm", image, "takes no images"),
        ("patch size", "tiny_mono", Prompt(ids, np.zeros((16, 28, 28, 3), np.uint8)), r"takes uint8 .*8, 8, 3"),
        ("patch type", "tiny_mono", Prompt(ids, image.patches.astype(np.int64)), "patches are int64"),
        ("cells", "tiny_mono", Prompt(ids, image.patches, np.arange(1, 17)), "numbers from 0 to 15"),
        ("broken tile", "tiny_modular", Prompt(ids[2:], image.patches[1:]), "not whole tiles of 16"),
    ]


@pytest.mark.parametrize(
    ("name", "bad", "message"), [case[1:] for case in bad_prompts()], ids=[case[0] for case in bad_prompts()]
)
def test_bad_prompts(models: dict[str, Generator], name: str, bad: Prompt, message: str) -> None:
    with pytest.raises(GenerationError, match=message) as caught:
        models[name].generate([bad], Sampling(2))
    assert "\n" not in str(caught.value)
    with pytest.raises(GenerationError, match="prompt 1: "):
        models[name].generate([Prompt([1, 2]), bad], Sampling(2))


def test_a_prompt_longer_than_the_cache(mono: Generator) -> None:
    small = Generator(mono.config, mono.params, jnp.float32, max_length=40)
    message = r"^18 prompt tokens \+ 23 new tokens do not fit the cache of 40 tokens: shorten .* raise max_length$"
    with pytest.raises(GenerationError, match=message):
        small.generate([prompt("Itt")], Sampling(23))
    session = small.session()
    [first] = session.turn([prompt("Itt")], Sampling(6))
    with pytest.raises(GenerationError, match=r"24 tokens of earlier turns \+ 18 prompt tokens"):
        session.turn([prompt("Itt")], Sampling(6))
    [second] = session.turn([prompt("ttttt", 1)], Sampling(11))  # refused, not broken: exactly 40 tokens fit
    whole = join(prompt("Itt"), first.tokens, prompt("ttttt", 1))
    assert mono.generate([whole], Sampling(11))[0] == second
    assert session.lengths == [40]


@pytest.mark.parametrize(
    "changes",
    [
        {"max_new_tokens": 0},
        {"temperature": -1.0},
        {"temperature": float("nan")},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"repetition_penalty": 0.0},
        {"presence_penalty": float("nan")},
        {"frequency_penalty": float("inf")},
        {"stop": ("",)},
        {"logprobs": 21},
        {"logprobs": -1},
    ],
)
def test_bad_sampling(changes: dict[str, Any]) -> None:
    with pytest.raises(GenerationError, match=next(iter(changes))):
        Sampling(**changes)


def test_wrong_numbers_of_things(mono: Generator) -> None:
    with pytest.raises(GenerationError, match="1 prompts for the 2 rows"):
        mono.session(2).turn([prompt("t")])
    with pytest.raises(GenerationError, match="2 samplings for 1 prompts"):
        mono.generate([prompt("t")], [Sampling(), Sampling()])
    assert mono.generate([]) == []


def test_damaged_weights_are_told(mono: Generator) -> None:
    params = jax.tree.map(lambda a: a, mono.params)
    params["final_norm"] = {"scale": params["final_norm"]["scale"].at[3].set(jnp.nan)}
    session = Generator(mono.config, params, jnp.float32).session()
    with pytest.raises(GenerationError, match="not finite"):
        session.turn([prompt("ttt")], Sampling(4))
    with pytest.raises(GenerationError, match="start a new session"):
        session.turn([prompt("ttt")], Sampling(4))


# ------------------------------------------------------------------ penalties


PENALTIES = [
    {"repetition_penalty": 1.4},
    {"repetition_penalty": 0.7},
    {"presence_penalty": 1.5},
    {"frequency_penalty": -0.8},
    {"repetition_penalty": 1.2, "presence_penalty": 0.5, "frequency_penalty": 0.9},
]


def penalised_by_hand(logits: np.ndarray, context: list[int], answer: list[int], sampling: Sampling) -> np.ndarray:
    """The definitions, token by token: arXiv 1909.05858 (context and answer), and OpenAI's API (answer)."""
    logits = logits.astype(np.float64)
    for token in {*context, *answer}:
        logits[token] *= sampling.repetition_penalty if logits[token] < 0 else 1 / sampling.repetition_penalty
    for token in set(answer):
        logits[token] -= sampling.presence_penalty + answer.count(token) * sampling.frequency_penalty
    return logits


def test_penalties(mono: Generator) -> None:
    """Greedy answers take the likeliest token after penalties, in a batch with unpenalised rows, over two turns."""
    samplings = [Sampling(14, return_logits=True, **changes) for changes in [*PENALTIES, {}]]
    session = mono.session(len(samplings))
    contexts: list[list[int]] = [[] for _ in samplings]
    changed = 0
    for turn in range(2):
        prompts = [prompt("tItt" if turn == 0 else "ttt", seed) for seed in range(len(samplings))]
        for row, answer in enumerate(session.turn(prompts, samplings)):
            contexts[row] += np.asarray(prompts[row].input_ids).tolist()
            for n, token in enumerate(answer.tokens):
                wanted = penalised_by_hand(answer.logits[n], contexts[row], answer.tokens[:n], samplings[row])
                wanted[IMAGE] = -np.inf
                assert token == wanted.argmax()
                changed += token != np.where(np.arange(wanted.size) == IMAGE, -np.inf, answer.logits[n]).argmax()
            contexts[row] += answer.tokens
    assert changed > 10


def test_what_a_generator_does_not_know(mono: Generator) -> None:
    for sampling in (Sampling(2, stop=("x",)), Sampling(2, logprobs=0)):
        with pytest.raises(GenerationError, match="for the engine"):
            mono.generate([prompt("t")], sampling)
