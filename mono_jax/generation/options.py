"""Options of generation: how tokens are chosen, from flags and from generation_config.json."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from mono_jax.errors import ConfigError, GenerationError
from mono_jax.files import read_json

NO_TEMPLATE = "none"
MAX_LOGPROBS = 20  # maximum tokens per position whose log-probabilities can be requested, as in OpenAI's API
_MOST, _LARGEST = 2**31 - 1, 1e30  # limits of int32, and of float32 with room to spare: devices compute with these
_DRAWING = ("temperature", "top_k", "top_p")
SAMPLING_FLAGS = ("max_new_tokens", *_DRAWING, "seed")  # of generate.py; None = the default of the model's folder


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How tokens are chosen.

    Attributes:
      max_new_tokens: maximum tokens of an answer, the stop token included.
      temperature: 0 = greedy; otherwise logits are divided by it.
      top_k: keep the k likeliest tokens; 0 = all.
      top_p: keep the likeliest tokens whose probabilities (after ``top_k``) first add up to this; 1 = all.
      seed: the token at position p of a row is drawn with a key derived from ``seed`` and p.
      stop_tokens: any of these ends the answer.
      banned_tokens: never generated; nor is the image placeholder, in any case.
      return_logits: keep the logits of every step (float32, rows x steps x vocabulary).
      repetition_penalty: logits of tokens of the context and of the answer are divided by it where positive, else
        multiplied (Keskar et al., arXiv 1909.05858); 1 = none.
      presence_penalty, frequency_penalty: subtracted from the logit of a token that the answer already contains, once,
        and for each occurrence (as in OpenAI's API); 0 = none.
      stop: strings, any of which ends the answer without being part of it. logprobs: how many of the likeliest tokens
        to return with each token and its log-probability, None = none. Both are for ``mono_jax.serving``: a
        ``Generator`` does not handle text.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    stop_tokens: tuple[int, ...] = ()
    banned_tokens: tuple[int, ...] = ()
    return_logits: bool = False
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    stop: tuple[str, ...] = ()
    logprobs: int | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.max_new_tokens <= _MOST:
            raise GenerationError(f"max_new_tokens is {self.max_new_tokens}: it must be from 1 to {_MOST}")
        if self.temperature and not 1 / _LARGEST <= self.temperature <= _LARGEST:
            raise GenerationError(f"temperature is {self.temperature}: use 0 (greedy) or a number above it")
        if not 0 <= self.top_k <= _MOST:
            raise GenerationError(f"top_k is {self.top_k}: use 0 (all tokens) or a number from 1 to {_MOST}")
        if not 0 < self.top_p <= 1:
            raise GenerationError(f"top_p is {self.top_p}: it must be greater than 0 and at most 1")
        if not 1 / _LARGEST <= self.repetition_penalty <= _LARGEST:
            raise GenerationError(f"repetition_penalty is {self.repetition_penalty}: use 1 (none) or a number above 0")
        for name in ("presence_penalty", "frequency_penalty"):
            if not abs(getattr(self, name)) <= _LARGEST:
                raise GenerationError(f"{name} is {getattr(self, name)}: use 0 (none) or another finite number")
        for name in ("stop_tokens", "banned_tokens"):
            if not all(0 <= token <= _MOST for token in getattr(self, name)):
                raise GenerationError(f"{name} is {getattr(self, name)}: ids are from 0 to {_MOST}")
        if "" in self.stop:
            raise GenerationError("stop contains an empty string, which is in every text: leave it out")
        if self.logprobs is not None and not 0 <= self.logprobs <= MAX_LOGPROBS:
            raise GenerationError(f"logprobs is {self.logprobs}: it must be from 0 to {MAX_LOGPROBS}")

    @property
    def is_plain(self) -> bool:
        """Whether the likeliest tokens are taken, and nothing else is requested."""
        return self.temperature == 0 and not self.penalises and self.logprobs is None

    @property
    def penalises(self) -> bool:
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0


def default_sampling(folder: Path, **given: Any) -> Sampling:
    """Sampling as in the generation_config.json of ``folder``, except for the given values (None: not given).

    Its keys mean what they mean in transformers: without ``do_sample`` the likeliest token is taken, regardless of
    ``temperature``. Raises ConfigError that names the file and the key.
    """
    file = folder / "generation_config.json"
    values = read_json(file) if file.is_file() else {}
    found = {key: values[key] for key in ("max_new_tokens", *_DRAWING) if values.get(key) is not None}
    if values.get("do_sample"):
        found.setdefault("temperature", 1.0)
    else:
        found = {key: value for key, value in found.items() if key not in _DRAWING}
    kinds = {"max_new_tokens": int, "temperature": (int, float), "top_k": int, "top_p": (int, float)}
    for key, value in found.items():
        if isinstance(value, bool) or not isinstance(value, kinds[key]):
            raise ConfigError(f"{file}: {key} is {value!r}: it must be a number")
    ends = values.get("eos_token_id")
    ends = [] if ends is None else ends if isinstance(ends, list) else [ends]
    if not all(isinstance(token, int) and not isinstance(token, bool) for token in ends):
        raise ConfigError(f"{file}: eos_token_id is {values['eos_token_id']!r}: it must be an id or a list of ids")
    found |= {key: value for key, value in given.items() if value is not None}
    try:
        return Sampling(**found, stop_tokens=tuple(ends))
    except GenerationError as error:
        raise error if given.get(str(error).split()[0]) is not None else ConfigError(f"{file}: {error}") from None
