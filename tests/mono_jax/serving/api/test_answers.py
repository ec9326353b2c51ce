"""Answers to clients: whole and streamed, one and several, with log-probabilities and with echo."""

from __future__ import annotations

import dataclasses
import itertools
import math
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("fastapi", reason="the extra serve is not installed: pip install '.[serve]'")

from data_pipelines.encoding.chat import ChatEncoder, word
from data_pipelines.encoding.decoding import ImageLimits
from data_pipelines.encoding.tokenizer import Tokenizer
from mono_jax.generation.chat import tiling_of
from mono_jax.generation.prompts import Prompt
from mono_jax.generation.questions import Questions
from mono_jax.models.architecture import Architecture
from mono_jax.serving.api.answers import logprobs
from mono_jax.serving.api.answers.pieces import TokenTexts, Trimmed
from mono_jax.serving.contract import TokenLogprobs
from tests.mono_jax.serving.api.running_server import Client, message, picture, serving
from tests.mono_jax.serving.api.scripted import ScriptedEngine, digest, logprob


def prompt_of(engine: ScriptedEngine, turns: list[tuple[str, str]], pictures: list[bytes]) -> Prompt:
    """The same as in training and generate.py."""
    encoder = ChatEncoder(engine.tokenizer, engine.form.template, engine.form.system_message)
    questions = Questions(encoder, tiling_of(engine.architecture, engine.form), ImageLimits())
    return questions.prompt(turns, [(str(number), data) for number, data in enumerate(pictures)])


def test_a_question_about_pictures_is_put_as_in_training(client: Client, engine: ScriptedEngine):
    pictures = [picture(1), picture(2, 64, 32)]
    prompt = prompt_of(engine, [("system", "Be brief."), ("human", "<image>\n<image>\nWhat?")], pictures)
    body = {"messages": [{"role": "system", "content": "Be brief."}, message(*pictures, "What?")], "seed": 7}
    status, answer = client.post("/v1/chat/completions", body)
    assert status == 200
    [choice] = answer["choices"]
    assert choice["message"] == {"role": "assistant", "content": f"seen {digest(prompt)} seed 7", "refusal": None}
    assert choice["finish_reason"] == "stop" and choice["logprobs"] is None
    tokens = len(engine.tokenizer.encode(f" seen {digest(prompt)} seed 7 \n"))
    assert answer["usage"] == {
        "prompt_tokens": len(prompt.input_ids),
        "completion_tokens": tokens,
        "total_tokens": len(prompt.input_ids) + tokens,
        "prompt_tokens_details": {"cached_tokens": 3},
    }
    assert (answer["object"], answer["model"]) == ("chat.completion", "scripted")


A, B = picture(1), picture(2)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ([A, "What?"], "<image>\nWhat?"),
        (["What?", A], "What?\n<image>"),
        (["One", A, "two", B], "One\n<image>\ntwo\n<image>"),
        ([A, B, "<image> and <image>: what differs?"], "<image> and <image>: what differs?"),
        (["<image> is", A, "not <image>", B], "<image> is\nnot <image>"),
        (["One", "two"], "One\ntwo"),
    ],
)
def test_pictures_stand_where_their_parts_or_the_text_say(
    content: list[Any], text: str, client: Client, engine: ScriptedEngine
):
    prompt = prompt_of(engine, [("human", text)], [part for part in content if isinstance(part, bytes)])
    status, answer = client.chat(*content, seed=0)
    assert status == 200, answer
    assert answer["choices"][0]["message"]["content"] == f"seen {digest(prompt)} seed 0"


def test_a_conversation_goes_on(client: Client, engine: ScriptedEngine):
    turns = [("human", "<image>\nWhat?"), ("gpt", "A cat."), ("human", "<image>\nAnd this?")]
    messages = [message(A, "What?"), {"role": "assistant", "content": "A cat."}, message(B, "And this?")]
    _, answer = client.post("/v1/chat/completions", {"messages": messages, "seed": 0})
    prompt = prompt_of(engine, turns, [A, B])
    assert answer["choices"][0]["message"]["content"] == f"seen {digest(prompt)} seed 0"


def test_a_model_that_said_image_is_asked_again(client: Client, engine: ScriptedEngine):
    """The word does not stand for an image; its tokens are those of the word, as in generate.py."""
    said = "An <image> tag."
    messages = [message(A, "What?"), {"role": "assistant", "content": said}, message("And?")]
    for content in (said, [{"type": "text", "text": said}]):
        messages[1] = {"role": "assistant", "content": content}
        status, answer = client.post("/v1/chat/completions", {"messages": messages, "seed": 0})
        assert status == 200, answer
        prompt = prompt_of(engine, [("human", "<image>\nWhat?"), ("gpt", word(said)), ("human", "And?")], [A])
        assert answer["choices"][0]["message"]["content"] == f"seen {digest(prompt)} seed 0"
    assert said in engine.tokenizer.decode(prompt.input_ids)
    assert len(prompt.patches) == (np.asarray(prompt.input_ids) == engine.architecture.image_token_id).sum()


def test_cached_tokens_are_those_of_the_first_answer(client: Client):
    """The others share with it; the scripted engine reports three of each."""
    for path, asked in (
        ("chat/completions", {"messages": [message("Hi")]}),
        ("completions", {"prompt": ["Hey you"] * 2}),
    ):
        for more in ({}, {"echo": True, "logprobs": 1}) if "prompt" in asked else ({},):
            _, answer = client.post(f"/v1/{path}", asked | more | {"n": 3})
            cached = answer["usage"]["prompt_tokens_details"]["cached_tokens"]
            assert cached == 3 * (2 if "prompt" in asked else 1)


@pytest.mark.parametrize("stream", [False, True])
def test_an_echo_and_its_answer_are_taken_together_or_not(stream: bool, client: Client, engine: ScriptedEngine):
    roomy, ended = engine.config, dict(engine.ended)
    body = {"prompt": "Hi", "echo": True, "logprobs": 1, "stream": stream}
    engine.hold()
    try:
        engine.config = dataclasses.replace(roomy, max_rows=1, max_queue=1)
        with ThreadPoolExecutor() as pool:
            other = pool.submit(client.chat, "Hi")
            while not engine.under_way:
                threading.Event().wait(0.005)
            assert client.post("/v1/completions", body)[0] == 429
            assert sum(engine.ended.values()) - sum(ended.values()) == engine.ended.get("cancelled", 0) - ended.get(
                "cancelled", 0
            )
            engine.release()
            assert other.result()[0] == 200
    finally:
        engine.config = roomy
        engine.release()


def test_streamed_is_what_whole_is(client: Client):
    body = {"messages": [message(A, "What?")], "n": 3, "seed": 5, "logprobs": True, "top_logprobs": 2}
    _, whole = client.post("/v1/chat/completions", body)
    *frames, usage, end = client.stream("/v1/chat/completions", body | {"stream_options": {"include_usage": True}})
    assert end == "[DONE]"
    assert usage["choices"] == [] and usage["usage"] == whole["usage"]
    assert {(frame["id"], frame["object"]) for frame in frames} == {(usage["id"], "chat.completion.chunk")}
    assert [choice["message"]["content"][-6:] for choice in whole["choices"]] == ["seed 5", "seed 6", "seed 7"]
    for choice in whole["choices"]:
        of_choice = [frame["choices"][0] for frame in frames if frame["choices"][0]["index"] == choice["index"]]
        assert of_choice[0]["delta"]["role"] == "assistant"
        assert "".join(each["delta"].get("content", "") for each in of_choice) == choice["message"]["content"]
        assert [each["finish_reason"] for each in of_choice if each["finish_reason"]] == [choice["finish_reason"]]
        found = [entry for each in of_choice if each["logprobs"] for entry in each["logprobs"]["content"]]
        assert found == choice["logprobs"]["content"]


def test_logprobs_of_a_chat(client: Client, engine: ScriptedEngine):
    _, answer = client.chat("Hi", logprobs=True, top_logprobs=2, max_tokens=4, seed=0)
    content = answer["choices"][0]["logprobs"]["content"]
    said = engine.tokenizer.encode(f" seen {digest(prompt_of(engine, [('human', 'Hi')], []))} seed 0 \n")[:4]
    expected = [logprob(token, place, 2) for place, token in enumerate(said, 1)]
    assert [entry["logprob"] for entry in content] == [each.logprob for each in expected]
    assert "".join(entry["token"] for entry in content).strip() == answer["choices"][0]["message"]["content"]
    assert [[top["logprob"] for top in entry["top_logprobs"]] for entry in content] == [
        [value for _, value in each.top] for each in expected
    ]
    assert all(bytes(entry["bytes"]).decode() == entry["token"] for entry in content)


@pytest.mark.parametrize("by_ids", [False, True])
def test_an_echo_with_logprobs_has_those_of_the_prompt(by_ids: bool, client: Client, engine: ScriptedEngine):
    text = "once upon"
    ids = [engine.tokenizer.bos, *engine.tokenizer.encode(text)]
    body = {"prompt": ids if by_ids else text, "echo": True, "logprobs": 1, "max_tokens": 2, "seed": 0}
    _, answer = client.post("/v1/completions", body)
    [choice] = answer["choices"]
    found = choice["logprobs"]
    assert choice["text"].startswith(text)
    assert found["token_logprobs"][0] is None and found["top_logprobs"][0] is None
    scores = [logprob(token, place, 1) for place, token in enumerate(ids)][1:]
    assert found["token_logprobs"][1 : len(ids)] == [each.logprob for each in scores]
    # As lm-eval determines whether a token is the likeliest one.
    greedy = [max(top.values()) == own for top, own in zip(found["top_logprobs"][1:], found["token_logprobs"][1:])]
    assert greedy[: len(scores)] == [each.top[0][0] == each.token for each in scores]
    assert len(found["tokens"]) == len(ids) + 2 == len(found["text_offset"])
    for token, offset in zip(found["tokens"], found["text_offset"]):
        assert choice["text"][offset : offset + len(token)] == token


def test_of_tokens_with_the_same_text_the_likelier_counts():
    """So that the largest value is that of the likeliest token, which lm-eval compares with the token's own."""

    class SameText:
        @staticmethod
        def decode(ids: Sequence[int]) -> str:
            return "\ufffd" * len(ids)

    found = [TokenLogprobs(3, -math.inf, ((7, -0.5), (8, -2.0)))]
    shape = logprobs.OfText(SameText()).add([3], found)
    assert shape["top_logprobs"] == [{"\ufffd": -0.5}] and shape["token_logprobs"] == [-9999.0]
    assert logprobs.OfChat(SameText()).add([3], found)["content"][0]["bytes"] is None


def test_log_probabilities_of_a_piece_take_no_longer_the_more_came_before(engine: ScriptedEngine):
    """Otherwise streams would be quadratic, on the event loop that all clients share."""
    counting = _Counting(engine.tokenizer)
    ids = [5 + number % 40 for number in range(400)]
    found = [TokenLogprobs(token, -1.0, ((6, -2.0),)) for token in ids]
    costs, texts = [], logprobs.OfText(engine.tokenizer).add(ids, found)["tokens"]
    of_chat, of_text = logprobs.OfChat(counting), logprobs.OfText(counting)
    logprobs.OfText(counting).add(ids, found)  # the texts of likeliest tokens, each once, whenever it first comes
    for number in range(len(ids)):
        counting.decoded = 0
        chat = of_chat.add(ids[number : number + 1], found[number : number + 1])
        text = of_text.add(ids[number : number + 1], found[number : number + 1])
        costs.append(counting.decoded)
        assert chat["content"][0]["token"] == text["tokens"][0] == texts[number]
    assert max(costs) == costs[-1] == costs[10]


class _Counting:
    """A tokenizer that counts the tokens that it has decoded."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer, self.decoded = tokenizer, 0

    def encode(self, text: str) -> Sequence[int]:
        return self._tokenizer.encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        self.decoded += len(ids)
        return self._tokenizer.decode(ids)


TOKENIZERS = ["chat", *(f"chat_templates/{name}" for name in ("llama2", "llama3", "mistral", "smollm2", "gemma3"))]
WRITTEN = ["a你😀b", "one two three", "naïve 模型 x", "🙂🙃 of 👩‍👩‍👧 several", "  two  spaces \n\n and\tlines "]


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("text", WRITTEN)
def test_offsets_are_positions_in_the_text(name: str, text: str, golden_dir: Path):
    """A split character counts once, where it begins; streamed in any pieces, offsets are the same."""
    tokenizer = Tokenizer(golden_dir / name)
    ids = list(tokenizer.encode(text))
    found = [TokenLogprobs(token, -1.0) for token in ids]
    whole = logprobs.OfText(tokenizer, begin=5).add(ids, found)
    before = [tokenizer.decode(ids[:number]).rstrip("\ufffd") for number in range(len(ids))]
    assert whole["text_offset"] == [5 + len(each) for each in before]
    for token, offset in zip(whole["tokens"], whole["text_offset"]):
        assert "\ufffd" in token or tokenizer.decode(ids)[offset - 5 :].startswith(token)
    rng = np.random.default_rng(0)
    for _ in range(5):
        form, streamed = logprobs.OfText(tokenizer, begin=5), {name: [] for name in whole}
        cuts = [0, *np.sort(rng.integers(0, len(ids) + 1, 3)).tolist(), len(ids)]
        for start, stop in itertools.pairwise(cuts):
            for field, values in form.add(ids[start:stop], found[start:stop]).items():
                streamed[field] += values
        assert streamed == whole


@pytest.mark.parametrize("name", TOKENIZERS)
def test_the_likeliest_tokens_are_written_as_they_would_be_in_the_text(name: str, golden_dir: Path):
    """Alone, some tokenizers leave out the space that a token begins with: "Yes" and " Yes" would be the same."""
    tokenizer = Tokenizer(golden_dir / name)
    ids, others = [list(tokenizer.encode(text)) for text in ("the cat sat on the mat", "a dog was at a door")]
    top = [((token, -1.0), *((other, -2.0) for other in others if other != token)) for token in ids]
    found = [TokenLogprobs(token, -1.0, each) for token, each in zip(ids, top)]
    of_text, of_chat = logprobs.OfText(tokenizer).add(ids, found), logprobs.OfChat(tokenizer).add(ids, found)
    for place, (token, each) in enumerate(zip(of_text["tokens"], top)):
        texts = [tokenizer.decode([*ids[:place], other]) for other, _ in each]
        expected = [text[len(tokenizer.decode(ids[:place])) :] for text in texts]
        assert expected[0] == token and of_text["top_logprobs"][place] == {
            text: -1.0 if text == token else -2.0 for text in expected
        }
        entry = of_chat["content"][place]
        assert [other["token"] for other in entry["top_logprobs"]] == expected and entry["token"] == token
        assert [bytes(other["bytes"]).decode() for other in entry["top_logprobs"]] == expected


@pytest.mark.parametrize("stop", [None, " two t_", "b"])
@pytest.mark.parametrize("prompt", ["once upon", "a你😀b", [9, 8, 7]])
@pytest.mark.parametrize("echo", [False, True])
def test_streamed_log_probabilities_are_the_whole_ones(
    echo: bool, prompt: Any, stop: str | None, client: Client, engine: ScriptedEngine
):
    """Wherever text is held back, because a stop string or a character may follow."""
    engine.script, plain = lambda prompt, sampling: "one two three a你😀b 🙂 two to", engine.script
    try:
        body = {"prompt": prompt, "echo": echo, "logprobs": 2, "max_tokens": 60, "seed": 0, "n": 2, "stop": stop}
        _, whole = client.post("/v1/completions", body)
        frames = client.stream("/v1/completions", body)
    finally:
        engine.script = plain
    for number, choice in enumerate(whole["choices"]):
        of_choice = [frame["choices"][0] for frame in frames[:-1] if frame["choices"][0]["index"] == number]
        assert "".join(each["text"] for each in of_choice) == choice["text"]
        for name, values in choice["logprobs"].items():
            assert [value for each in of_choice for value in each["logprobs"][name]] == values, name
        found = choice["logprobs"]
        texts = [(token, at) for token, at in zip(found["tokens"], found["text_offset"]) if "\ufffd" not in token]
        inside = [(token, at) for token, at in texts if at + len(token) <= len(choice["text"])]
        assert all(choice["text"][at:].startswith(token) for token, at in inside)
        assert len(inside) > 0.6 * len(texts) if stop else inside == texts


def test_the_begin_of_a_prompt_is_no_part_of_its_text(golden_dir: Path, small: Architecture):
    """Tokenizers may write its name; the echo of a text is the text."""
    tokenizer = Tokenizer(golden_dir / "chat_templates/llama3")
    engine = ScriptedEngine(tokenizer, small.replace(vocab_size=tokenizer.vocab_size))
    engine.start()
    with serving(engine) as client:
        for prompt in ("once upon", [tokenizer.bos, *tokenizer.encode("once upon")]):
            body = {"prompt": prompt, "echo": True, "logprobs": 0, "max_tokens": 0}
            [choice] = client.post("/v1/completions", body)[1]["choices"]
            found, unseen = choice["logprobs"], isinstance(prompt, str)
            assert found["text_offset"][0] == 0 and found["tokens"][0] == tokenizer.name(tokenizer.bos)
            for token, at in [*zip(found["tokens"], found["text_offset"])][unseen:]:
                assert choice["text"][at:].startswith(token)
            assert choice["text"] == ("" if unseen else found["tokens"][0]) + "once upon"
    engine.close()


def test_an_echo_alone(client: Client, engine: ScriptedEngine):
    submitted = len(engine.ended)
    _, answer = client.post("/v1/completions", {"prompt": "once", "echo": True, "logprobs": 0, "max_tokens": 0})
    [choice] = answer["choices"]
    assert (choice["text"], choice["finish_reason"]) == ("once", "length")
    assert len(choice["logprobs"]["tokens"]) == 1 + len(engine.tokenizer.encode("once"))
    assert answer["usage"]["completion_tokens"] == 0 and len(engine.ended) == submitted


def test_one_token_with_logprobs_is_one_even_where_it_ends_the_answer(client: Client, engine: ScriptedEngine):
    """lm-eval assumes that the last list entry is the generated one and drops it."""
    engine.script, plain = lambda prompt, sampling: "<|im_end|>", engine.script
    try:
        body = {"prompt": [5, 6, 7], "echo": True, "logprobs": 1, "max_tokens": 1}
        _, whole = client.post("/v1/completions", body)
        frames = client.stream("/v1/completions", body)
    finally:
        engine.script = plain
    [choice] = whole["choices"]
    assert len(choice["logprobs"]["token_logprobs"]) == 4
    assert (choice["text"], choice["finish_reason"]) == (engine.tokenizer.decode([5, 6, 7]), "stop")
    streamed = [value for frame in frames[:-1] for value in frame["choices"][0]["logprobs"]["token_logprobs"]]
    assert streamed == choice["logprobs"]["token_logprobs"]


def test_several_prompts_and_answers_are_numbered(client: Client, engine: ScriptedEngine):
    prompts = [[5, 6], [7, 8, 9]]
    body = {"prompt": prompts, "n": 2, "seed": 1, "max_tokens": 40}
    _, whole = client.post("/v1/completions", body)
    expected = [f" seen {digest(Prompt(np.array(ids)))} seed {seed} \n" for ids in prompts for seed in (1, 2)]
    assert [choice["index"] for choice in whole["choices"]] == [0, 1, 2, 3]
    assert [choice["text"] for choice in whole["choices"]] == expected
    texts = dict.fromkeys(range(4), "")
    for frame in client.stream("/v1/completions", body)[:-1]:
        texts[frame["choices"][0]["index"]] += frame["choices"][0]["text"]
    assert list(texts.values()) == expected
    assert whole["usage"]["prompt_tokens"] == 5


@pytest.mark.parametrize(
    ("asked", "used"),
    [
        ({}, {"temperature": 0.0, "max_new_tokens": 64}),
        ({"temperature": 0.5, "top_p": 0.9, "top_k": 3}, {"temperature": 0.5, "top_p": 0.9, "top_k": 3}),
        ({"top_k": -1}, {"top_k": 0}),
        ({"stop": "a"}, {"stop": ("a",)}),
        ({"stop": ["a", "b", "a", ""]}, {"stop": ("a", "b")}),
        ({"max_tokens": 5}, {"max_new_tokens": 5}),
        ({"max_tokens": 5, "max_completion_tokens": 6}, {"max_new_tokens": 6}),
        ({"presence_penalty": 1, "frequency_penalty": -1}, {"presence_penalty": 1, "frequency_penalty": -1}),
        ({"repetition_penalty": 1.2, "seed": -3}, {"repetition_penalty": 1.2, "seed": -3}),
        ({"logprobs": True}, {"logprobs": 0}),
        ({"logprobs": False}, {"logprobs": None}),
        ({"user": "me", "metadata": {"a": "b"}, "tools": [], "response_format": {"type": "text"}}, {}),
    ],
)
def test_parameters_reach_the_engine(
    asked: dict[str, Any], used: dict[str, Any], client: Client, engine: ScriptedEngine
):
    seen = []
    engine.script, plain = lambda prompt, sampling: seen.append(sampling) or "yes", engine.script
    try:
        status, answer = client.chat("Hi", **asked)
    finally:
        engine.script = plain
    assert status == 200, answer
    assert {name: getattr(seen[0], name) for name in used} == used
    assert seen[0].stop_tokens == engine.sampling.stop_tokens


def test_an_answer_of_no_given_length_has_the_room_that_is_left(client: Client, engine: ScriptedEngine):
    seen = []
    engine.script, plain = lambda prompt, sampling: seen.append(sampling.max_new_tokens) or "yes", engine.script
    try:
        for length in (1000, 1023):
            assert client.post("/v1/completions", {"prompt": [5] * length})[0] == 200
        for length, most in ((1000, 30), (1024, None)):
            status, answer = client.post("/v1/completions", {"prompt": [5] * length, "max_tokens": most})
            assert (status, answer["error"]["code"]) == (400, "context_length_exceeded")
        _, answer = client.chat("x " * 420)  # the model's own default is 64
        left = 1024 - answer["usage"]["prompt_tokens"]
        assert seen == [16, 1, left] and left < 64
    finally:
        engine.script = plain


def test_without_a_seed_every_answer_is_drawn_anew(client: Client):
    answers = {client.chat("Hi")[1]["choices"][0]["message"]["content"] for _ in range(3)}
    assert len(answers) == 3


@pytest.mark.parametrize("text", ["  a b \n", "", " \n ", "a", "\ta\n\nb  "])
def test_trimmed_pieces_are_the_trimmed_text(text: str):
    for cut in range(len(text) + 1):
        trimmed = Trimmed()
        assert trimmed.add(text[:cut]) + trimmed.add(text[cut:]) == text.strip()


def test_texts_of_tokens_add_up(engine: ScriptedEngine):
    ids = list(engine.tokenizer.encode("hello you and  you"))
    texts = TokenTexts(engine.tokenizer)
    assert "".join(texts.add(token)[0] for token in ids) == engine.tokenizer.decode(ids)


def test_tokens_are_counted_without_the_tokenizer(client: Client, engine: ScriptedEngine):
    _, info = client.get("/tokenizer_info")
    assert (info["bos_token"], info["eos_token"]) == ("<s>", "</s>")
    for text in ("hello you", "</s>", "<|im_end|>x"):
        _, with_begin = client.post("/tokenize", {"prompt": text})
        _, plain = client.post("/tokenize", {"prompt": text, "add_special_tokens": False})
        special = {"</s>": [engine.tokenizer.eos]}
        assert plain["tokens"] == special.get(text, list(engine.tokenizer.encode(text)))
        assert with_begin["tokens"] == special.get(text, [engine.tokenizer.bos, *plain["tokens"]])
        assert plain["count"] == len(plain["tokens"])
    ids = list(engine.tokenizer.encode("hello you"))
    assert client.post("/detokenize", {"tokens": ids})[1] == {"prompt": "hello you"}


def test_the_model_is_named(client: Client):
    _, listed = client.get("/v1/models")
    assert [card["id"] for card in listed["data"]] == ["scripted"]
    assert client.get("/v1/models/scripted")[1] == listed["data"][0]
    assert client.get("/health") == (200, {"status": "ok", "model": "scripted", "reason": None})
