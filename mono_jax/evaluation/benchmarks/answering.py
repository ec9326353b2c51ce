"""A model's greedy answers to examples: pictures are read ahead, and prompts of similar length share a batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext

import numpy as np

from data_pipelines.encoding.chat import ChatEncoder
from data_pipelines.encoding.decoding import ImageLimits
from data_pipelines.encoding.tiling import Tiling
from data_pipelines.encoding.tokenizer import Tokenizer
from data_pipelines.errors import BadSample, DataError
from mono_jax.evaluation.benchmarks.reading.example import Example
from mono_jax.generation.chat import end_tokens
from mono_jax.generation.decode import Generator
from mono_jax.generation.options import Sampling
from mono_jax.generation.prompts import Prompt
from mono_jax.generation.questions import Picture, Questions

WINDOW = 8  # batches whose prompts are in memory at once, and sorted by length
_THREADS = 4


class Asker:
    """Asks a model about examples, in the format it was trained on."""

    def __init__(
        self,
        generator: Generator | None,
        tokenizer: Tokenizer,
        chat: ChatEncoder,
        tiling: Tiling,
        limits: ImageLimits | None = None,
        pixel_path: str = "exact",
    ):
        """``generator``: None = only build prompts."""
        self._generator, self._tokenizer = generator, tokenizer
        self._questions = Questions(chat, tiling, limits, pixel_path)
        self._stops = tuple(sorted(end_tokens(tokenizer, chat)))

    def prompt(self, example: Example) -> Prompt:
        """Ids and pixels, built by the code that builds training samples. Raises DataError that names the example."""
        try:
            return self.ask(example.turns, [(picture.name, picture.read()) for picture in example.pictures])
        except BadSample as error:
            raise DataError(f"example {example.id}: {error}: change or remove it") from None

    def ask(self, turns: Sequence[tuple[str, str]], pictures: Sequence[Picture], answer: bool = True) -> Prompt:
        """The prompt of ``turns`` about (name, encoded picture) pairs; ``answer``: whether an answer is to follow.

        Raises BadSample that names the picture.
        """
        return self._questions.prompt(turns, pictures, answer)

    def answers(
        self,
        examples: Sequence[Example],
        max_new_tokens: int,
        batch_size: int,
        meeting: Callable[[], AbstractContextManager] = nullcontext,
    ) -> Iterator[list[tuple[Example, str]]]:
        """Yields batches of examples with their answers, not in the order of the examples.

        ``meeting``: context in which prompts are waited for; ``together`` where processes share the model, so that an
        example that one of them cannot read stops all. Raises DataError that names the example, and GenerationError.
        """
        size = WINDOW * batch_size
        with ThreadPoolExecutor(_THREADS) as pool:
            windows = [examples[start : start + size] for start in range(0, len(examples), size)]
            coming = _submit(pool, self.prompt, windows[0]) if windows else None
            for number, window in enumerate(windows):
                with meeting():
                    prompts = [each.result() for each in coming or ()]
                following = windows[number + 1 : number + 2]
                coming = _submit(pool, self.prompt, following[0]) if following else None
                for part in self.generate(prompts, max_new_tokens, batch_size):
                    yield [(window[i], text) for i, text in part]

    def generate(
        self, prompts: Sequence[Prompt], max_new_tokens: int, batch_size: int
    ) -> Iterator[list[tuple[int, str]]]:
        """Yields batches of (index of a prompt, answer); prompts of similar length share a batch."""
        sampling = Sampling(max_new_tokens=max_new_tokens, stop_tokens=self._stops)
        order = np.argsort([len(prompt.input_ids) for prompt in prompts], kind="stable")  # padded to the longest
        for start in range(0, len(order), batch_size):
            part = order[start : start + batch_size]
            generated = self._generator.generate([prompts[i] for i in part], sampling)
            yield [(int(i), self._tokenizer.decode(each.tokens).strip()) for i, each in zip(part, generated)]


def _submit(pool: ThreadPoolExecutor, function: Callable[[Example], Prompt], window: Sequence[Example]) -> list:
    return [pool.submit(function, example) for example in window]
