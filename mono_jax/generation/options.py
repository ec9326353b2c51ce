"""How answers are asked for: the choice of tokens, and the form of prompts."""

from __future__ import annotations

import dataclasses

from data_pipelines.config import DataConfig
from mono_jax.errors import GenerationError

NO_TEMPLATE = "none"


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
class PromptFormat:
    """How questions are put to a model: as in ``DataConfig``, with its defaults; ``template`` may be NO_TEMPLATE."""

    template: str = DataConfig.template
    system_message: str | None = DataConfig.system_message
    min_tiles: int = DataConfig.min_tiles
    max_tiles: int = DataConfig.max_tiles
    thumbnail: bool = DataConfig.thumbnail
