"""Options of generation: how tokens are chosen, from flags and from generation_config.json."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mono_jax.errors import ConfigError, GenerationError
from mono_jax.files import read_json

_log = logging.getLogger(__name__)

NO_TEMPLATE = "none"
MAX_LOGPROBS = 20  # maximum tokens per position whose log-probabilities can be requested, as in OpenAI's API
_MOST, _LARGEST = 2**31 - 1, 1e30  # limits of int32, and of float32 with room to spare: devices compute with these
_DRAWING = ("temperature", "top_k", "top_p")
# Numbers that generation_config.json may have, and their types.
_NUMBER = (int, float)
_KINDS = {"max_new_tokens": int, "repetition_penalty": _NUMBER, "temperature": _NUMBER, "top_k": int, "top_p": _NUMBER}
# Its keys that are not supported here, each with the value (besides null) that has no effect; the second ones count
# only if tokens are drawn.
_UNSUPPORTED: dict[str, Any] = {
    "num_beams": 1,
    "penalty_alpha": 0,
    "no_repeat_ngram_size": 0,
    "min_length": 0,
    "min_new_tokens": 0,
    "guidance_scale": 1,
    "bad_words_ids": [],
    "begin_suppress_tokens": [],
    "sequence_bias": [],
    "forced_bos_token_id": None,
    "exponential_decay_length_penalty": None,
}
_UNSUPPORTED_DRAWING = {"min_p": 0, "typical_p": 1, "epsilon_cutoff": 0, "eta_cutoff": 0}
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
    ``temperature``. Logs a warning that names keys which would change answers there and have no effect here. Raises
    ConfigError that names the file and the key.
    """
    file = folder / "generation_config.json"
    values = read_json(file) if file.is_file() else {}
    draws = bool(values.get("do_sample"))
    read = [key for key in _KINDS if draws or key not in _DRAWING]
    found = {key: values[key] for key in read if values.get(key) is not None}
    for key, value in found.items():
        if isinstance(value, bool) or not isinstance(value, _KINDS[key]):
            raise ConfigError(f"{file}: {key} is {value!r}: it must be a number")
    if draws:
        found.setdefault("temperature", 1.0)
    found |= {key: value for key, value in given.items() if value is not None}
    stops, banned = (_ids(file, values, key) for key in ("eos_token_id", "suppress_tokens"))
    if without := _without_effect(values, draws):
        _log.warning("%s: %s: not supported, so answers may differ from those of transformers", file, without)
    try:
        return Sampling(**found, stop_tokens=stops, banned_tokens=banned)
    except GenerationError as error:
        raise error if given.get(str(error).split()[0]) is not None else ConfigError(f"{file}: {error}") from None


def _ids(file: Path, values: Mapping[str, Any], key: str) -> tuple[int, ...]:
    """The value of ``key``: an id, a list of ids, or None."""
    value = values.get(key)
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if not all(isinstance(token, int) and not isinstance(token, bool) and 0 <= token <= _MOST for token in ids):
        raise ConfigError(f"{file}: {key} is {value!r}: it must be an id or a list of ids")
    return tuple(ids)


def _without_effect(values: Mapping[str, Any], draws: bool) -> str:
    """The entries of ``values`` that would change answers in transformers only, as text."""
    neutral = _UNSUPPORTED | (_UNSUPPORTED_DRAWING if draws else {})
    return ", ".join(f"{key} = {values[key]!r}" for key in neutral if values.get(key) not in (None, neutral[key]))
