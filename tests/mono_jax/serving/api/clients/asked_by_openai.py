"""Run by the Python of the clients: questions on standard input, answers on standard output, as JSON.

Asks each question with and without streaming, all questions at once; then cuts streams off in the middle.
"""

from __future__ import annotations

import json
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai

job = json.load(sys.stdin)
client = openai.OpenAI(base_url=f"{job['url']}/v1", api_key="none", max_retries=0, timeout=300)
MODEL = client.models.list().data[0].id
ASKED = {"model": MODEL, "max_tokens": job["tokens"], "temperature": 0}


def whole(messages: list[dict[str, Any]]) -> str:
    return client.chat.completions.create(messages=messages, **ASKED).choices[0].message.content


def streamed(messages: list[dict[str, Any]]) -> str:
    with client.chat.completions.create(messages=messages, stream=True, **ASKED) as stream:
        return "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices)


def helped(messages: list[dict[str, Any]]) -> str:
    """Uses the helper that joins chunks and names the events."""
    with client.chat.completions.stream(messages=messages, **ASKED) as stream:
        return "".join(event.delta for event in stream if event.type == "content.delta")


def cut(messages: list[dict[str, Any]]) -> int:
    """Pieces of a long answer that were read before it was cut off."""
    asked = ASKED | {"max_tokens": 24}
    with client.chat.completions.create(messages=messages, stream=True, **asked) as stream:
        for number, _ in enumerate(stream):
            if number == 2:
                return number
    return -1


def fault(**changes: Any) -> list[str]:
    """The exception's name, and the parameter that it names."""
    try:
        client.chat.completions.create(**{"messages": job["messages"][0], **ASKED, **changes})
    except openai.APIStatusError as error:
        return [type(error).__name__, error.param or ""]
    return []


with ThreadPoolExecutor(job["at_a_time"]) as pool:
    many = job["messages"] * -(-job["at_a_time"] // len(job["messages"]))
    result = {
        "whole": list(pool.map(whole, many))[: len(job["messages"])],
        "streamed": list(pool.map(streamed, many))[: len(job["messages"])],
        "again": list(pool.map(whole, many)) == list(pool.map(streamed, many)),
        "helped": helped(job["messages"][0]),
        "cut": list(pool.map(cut, job["messages"])),
    }
result["faults"] = [fault(model="gpt-4"), fault(max_tokens=10**6), fault(temperature=-1)]
echo = client.completions.create(model=MODEL, prompt="once upon", echo=True, logprobs=2, max_tokens=1, temperature=0)
result["echo"] = [len(echo.choices[0].logprobs.tokens), echo.choices[0].logprobs.token_logprobs[0]]
json.dump(result, sys.stdout)
