"""A model of this project for lm-evaluation-harness: ``lm_eval --model mono_jax``.

Importing this module registers it. Neither the harness (``pip install '.[lm-eval]'``) nor this module needs torch.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from data_pipelines.encoding.chat import ChatEncoder
from data_pipelines.encoding.tokenizer import Tokenizer
from data_pipelines.special_tokens import END_TOKENS, IMAGE_CONTEXT
from mono_jax.errors import GenerationError
from mono_jax.evaluation.language.likelihood import Likelihoods, Pair
from mono_jax.generation.chat import prompt_format
from mono_jax.generation.decode import Generator
from mono_jax.generation.options import NO_TEMPLATE, Sampling
from mono_jax.generation.prompts import Prompt
from mono_jax.parallel.mesh import make_mesh
from mono_jax.parallel.mesh_config import MeshConfig
from mono_jax.weights.model_folder import find_model, load_model, local_files

DEFAULT_BATCH = 16
LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")  # synonyms


@register_model("mono_jax")
class MonoJaxLM(TemplateLM):
    """Log-likelihoods and text of the model in a folder.

    Args (``--model_args NAME=VALUE,...``):
      pretrained: model folder, Hugging Face folder or workdir.
      tokenizer: folder of a tokenizer, if other than the model's.
      dtype: "float32" or "bfloat16"; default: float32 on CPUs, else bfloat16.
      max_length: maximum number of tokens read at once; default: the model's ``max_position_embeddings``.
      max_gen_toks: maximum length of an answer where the task gives none.
      add_bos_token: put the BOS token, with which every training sample starts, in front of every context.
      batch_size: requests at a time; the devices of this process share them.
    """

    tokenizer_name = ""  # the folder, for the harness's caches

    def __init__(
        self,
        pretrained: str,
        tokenizer: str | None = None,
        dtype: str | None = None,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        add_bos_token: bool = True,
        batch_size: int | str = DEFAULT_BATCH,
        max_batch_size: int | None = None,
        device: str | None = None,
    ):
        super().__init__()
        del max_batch_size, device  # the harness passes these to every model
        folder = find_model(pretrained)
        self.tokenizer_name = tokenizer or str(folder)
        self._tokenizer = Tokenizer(tokenizer or local_files(folder))
        mesh = make_mesh(MeshConfig(data=1, fsdp=-1)) if jax.device_count() > 1 else None
        image = self._tokenizer.added.get(IMAGE_CONTEXT)
        config, params = load_model(folder, shardings=mesh, image_token_id=image)
        self.max_length, self.max_gen_toks = int(max_length or config.max_position_embeddings), int(max_gen_toks)
        self.batch_size = DEFAULT_BATCH if str(batch_size).startswith("auto") else int(batch_size)
        self._generator = Generator(config, params, dtype, max_length=self.max_length, mesh=mesh)
        self._likelihoods = Likelihoods(self._generator, self.max_length, self.batch_size)
        self._begin = [self._tokenizer.bos] if add_bos_token and self._tokenizer.bos is not None else []
        self._form = prompt_format(folder)

    # ------------------------------------------------------------------ tokens

    @property
    def eot_token_id(self) -> int:
        ids = [self._tokenizer.eos, self._tokenizer.bos, *(self._tokenizer.added.get(name) for name in END_TOKENS)]
        return next(number for number in [*ids, 0] if number is not None)

    @property
    def prefix_token_id(self) -> int:
        """The token before the first one: the BOS token, as in training, or the EOS token if there is none."""
        return self._tokenizer.bos if self._tokenizer.bos is not None else self.eot_token_id

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **options: Any) -> list[int]:
        """Ids of ``string``; with the BOS token in front unless ``add_special_tokens`` is False or it is there."""
        del options
        ids = list(self._tokenizer.encode(string))
        has_begin = add_special_tokens is False or ids[:1] == self._begin
        return ids if has_begin else [*self._begin, *ids]

    @functools.cached_property
    def _ends(self) -> frozenset[int]:
        ids = [self._tokenizer.eos, *(self._tokenizer.added.get(name) for name in END_TOKENS)]
        return frozenset(number for number in ids if number is not None)

    @functools.lru_cache(maxsize=64)  # noqa: B019  one object per process
    def _tokens_with(self, texts: tuple[str, ...]) -> frozenset[int]:
        """Single tokens that contain one of ``texts``: generation can stop there."""
        count = min(self._tokenizer.vocab_size, self._generator.config.vocab_size)
        return frozenset(n for n in range(count) if any(text in self._tokenizer.decode([n]) for text in texts))

    # ------------------------------------------------------------------ the harness's interface

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **options: Any
    ) -> list[tuple[float, bool]]:
        """Scores (strings, ids of the context, ids of the continuation)."""
        del options
        found = self._in_parts([(context, continuation) for _, context, continuation in requests], disable_tqdm)
        for (strings, _, _), result in zip(requests, found):
            if strings is not None:
                self.cache_hook.add_partial("loglikelihood", strings, result)
        return found

    def _in_parts(self, pairs: Sequence[Pair], quiet: bool) -> list[tuple[float, bool]]:
        """Longest first overall, a few batches at a time, so that progress is shown."""
        order = sorted(range(len(pairs)), key=lambda n: -len(pairs[n][0]) - len(pairs[n][1]))
        found: dict[int, tuple[float, bool]] = {}
        with tqdm(total=len(pairs), disable=quiet, desc="log-likelihoods") as bar:
            for start in range(0, len(order), self.batch_size):
                part = order[start : start + self.batch_size]
                found |= zip(part, self._likelihoods([pairs[number] for number in part]))
                bar.update(len(part))
        return [found[number] for number in range(len(pairs))]

    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[float]:
        """Scores whole texts: each token is predicted once, with as much preceding text as fits."""
        pairs: list[Pair] = []
        owners: list[int] = []
        for number, request in enumerate(requests):
            ids = self.tok_encode(request.args[0], add_special_tokens=False)
            windows = get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, 1)
            pairs += map(make_disjoint_window, windows)
            owners += [number] * (len(pairs) - len(owners))
        sums = [0.0] * len(requests)
        for owner, (value, _) in zip(owners, self._in_parts(pairs, disable_tqdm)):
            sums[owner] += value
        for request, value in zip(requests, sums):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, value)
        return sums

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """Answers, cut before the first of the task's stop strings. Raises GenerationError for unknown options."""
        answers: dict[int, str] = {}
        with tqdm(total=len(requests), disable=disable_tqdm, desc="answers") as bar:
            for sampling, stops, part in self._alike(requests):
                prompts = [Prompt(self._context(requests[number].args[0], sampling)) for number in part]
                for number, result in zip(part, self._generator.generate(prompts, sampling)):
                    ended = [] if result.stop_token is None or result.stop_token in self._ends else [result.stop_token]
                    text = self._tokenizer.decode([*result.tokens, *ended])
                    answers[number] = text[: min((text.find(stop) for stop in stops if stop in text), default=None)]
                    self.cache_hook.add_partial("generate_until", requests[number].args, answers[number])
                bar.update(len(part))
        return [answers[number] for number in range(len(requests))]

    def _context(self, text: str, sampling: Sampling) -> list[int]:
        room = self.max_length - sampling.max_new_tokens
        if room < 1:
            raise GenerationError(
                f"answers of {sampling.max_new_tokens} tokens leave no room for a prompt in {self.max_length}"
            )
        return (self.tok_encode(text) or [self.prefix_token_id])[-room:]

    def _alike(self, requests: Sequence[Instance]) -> Iterator[tuple[Sampling, tuple[str, ...], list[int]]]:
        """(options, stop strings, indices of the requests with these): batches of similar length."""
        groups: dict[tuple[Sampling, tuple[str, ...]], list[int]] = {}
        for number, request in enumerate(requests):
            groups.setdefault(self._options(request.args[1]), []).append(number)
        for (sampling, stops), numbers in groups.items():
            numbers.sort(key=lambda number: -len(requests[number].args[0]))
            for start in range(0, len(numbers), self.batch_size):
                yield sampling, stops, numbers[start : start + self.batch_size]

    def _options(self, given: Mapping[str, Any]) -> tuple[Sampling, tuple[str, ...]]:
        options = dict(given)
        until = options.pop("until", None) or ()
        stops = tuple(stop for stop in ([until] if isinstance(until, str) else until) if stop)
        lengths = [options.pop(name, None) for name in LENGTHS]
        longest = next((length for length in lengths if length is not None), self.max_gen_toks)
        temperature = float(options.pop("temperature", 0.0) or 0.0)
        if not options.pop("do_sample", temperature > 0):
            temperature = 0.0
        chosen = {name: options.pop(name) for name in ("top_k", "top_p", "seed") if options.get(name) is not None}
        if options:
            raise GenerationError(f"generation_kwargs: {', '.join(options)}: unknown to model mono_jax")
        ends = tuple(sorted(self._ends | (self._tokens_with(stops) if stops else frozenset())))
        return Sampling(int(longest), temperature, stop_tokens=ends, **chosen), stops

    # ------------------------------------------------------------------ chat

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The template's name, for the harness's records."""
        return self._form.template if chat_template else None

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Turns in the format the model was trained on. Raises GenerationError for a model without a template."""
        if self._form.template == NO_TEMPLATE:
            raise GenerationError(f"{self.tokenizer_name}: this model has no chat template")
        encoder = ChatEncoder(self._tokenizer, self._form.template, self._form.system_message)
        system, turns = self._form.system_message, list(chat_history)
        if turns and turns[0]["role"] == "system":
            system = turns.pop(0)["content"]
        said = [("gpt" if turn["role"] == "assistant" else "human", turn["content"]) for turn in turns]
        written = encoder.template.write(said, system, answer=add_generation_prompt)
        goes_on = turns and turns[-1]["role"] == "assistant" and not add_generation_prompt
        return written.text[: written.ends[-1]] if goes_on else written.text
