"""Judges for answers that no rule can grade (MathVista, MM-Vet): a command or an endpoint that the user names."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import time
import urllib.error
import urllib.request
from typing import Protocol

from mono_jax.errors import ConfigError, MonoJaxError

TIMEOUT = 120  # seconds for one reply
_TRIES = 4
_KEY = "JUDGE_API_KEY"


class JudgeError(MonoJaxError):
    """A judge that does not reply, or gives an unusable reply."""


class Judge(Protocol):
    """Replies to a prompt. ``name`` identifies it: scores of different judges are not comparable."""

    name: str

    def __call__(self, prompt: str) -> str: ...


class NoJudge:
    """Used where no judge was named."""

    name = "none"

    def __call__(self, prompt: str) -> str:
        raise ConfigError(
            "this task's answers are graded by a language model: give --judge=COMMAND (prompt on its standard input, "
            "reply on its standard output) or --judge=http://HOST/v1 with --judge_model=NAME"
        )


class CommandJudge:
    """A program that reads the prompt from its standard input and writes the reply to its standard output."""

    def __init__(self, command: str):
        self.name, self._words = command, shlex.split(command)

    def __call__(self, prompt: str) -> str:
        try:
            done = subprocess.run(self._words, input=prompt, capture_output=True, text=True, timeout=TIMEOUT)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise JudgeError(f"judge {self.name!r}: {error}") from None
        if done.returncode:
            raise JudgeError(f"judge {self.name!r} ended with {done.returncode}: {done.stderr.strip()[-200:]}")
        return done.stdout.strip()


class EndpointJudge:
    """A model behind an OpenAI-compatible ``/chat/completions``; its key is in the variable JUDGE_API_KEY."""

    def __init__(self, url: str, model: str):
        self.name, self._url, self._model = f"{model} at {url}", f"{url.rstrip('/')}/chat/completions", model

    def __call__(self, prompt: str) -> str:
        """Raises JudgeError; temporary errors of the server (429, 5xx) are retried a few times."""
        content = {"model": self._model, "temperature": 0, "messages": [{"role": "user", "content": prompt}]}
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get(_KEY):
            headers["Authorization"] = f"Bearer {key}"
        request = urllib.request.Request(self._url, json.dumps(content).encode(), headers)
        for attempt in range(1, _TRIES + 1):
            try:
                with urllib.request.urlopen(request, timeout=TIMEOUT) as reply:
                    return json.load(reply)["choices"][0]["message"]["content"].strip()
            except urllib.error.HTTPError as error:
                if attempt == _TRIES or not (error.code == 429 or error.code >= 500):
                    hint = f": set {_KEY}" if error.code == 401 else ""
                    raise JudgeError(f"judge {self.name}: HTTP {error.code} {error.reason}{hint}") from None
            except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
                if attempt == _TRIES:
                    raise JudgeError(f"judge {self.name}: {type(error).__name__}: {error}") from None
            time.sleep(2 ** (attempt - 1))
        raise AssertionError("unreachable")


def find_judge(named: str | None, model: str | None = None) -> Judge:
    """The judge of ``--judge`` and ``--judge_model``. Raises ConfigError for an endpoint without a model."""
    if not named:
        return NoJudge()
    if not named.startswith(("http://", "https://")):
        return CommandJudge(named)
    if not model:
        raise ConfigError(f"--judge={named} is an endpoint: name its model with --judge_model")
    return EndpointJudge(named, model)
