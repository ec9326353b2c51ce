"""What a chat template is, and the fixed ones that the public release writes in code."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Sequence

from data_pipelines.special_tokens import IM_END, IM_START

Turns = Sequence[tuple[str, str]]  # ("human" or "gpt", text), alternating, starting with a question


@dataclasses.dataclass(frozen=True)
class Written:
    """A conversation as text.

    Attributes:
      text: with the template's special tokens by name.
      trained: (start, stop) characters of each answer and its end token, which the model has to predict.
      ends: where the text of each turn ends.
    """

    text: str
    trained: tuple[tuple[int, int], ...]
    ends: tuple[int, ...]


class Template(abc.ABC):
    """How a conversation is written.

    Attributes:
      begins: whether the text of ``write`` is complete, so that no begin token is added in front.
      digest: of whatever determines the text besides the template's name; "" for templates that never change.
      tokens: the tokens that the tokenizer must have. A tokenizer's own template requires none that it lacks.
    """

    begins = False
    digest = ""
    tokens: tuple[str, ...] = ()

    @abc.abstractmethod
    def write(self, turns: Turns, system: str | None = None, answer: bool = False) -> Written:
        """The conversation.

        Args:
          system: the system message; None = the template's own, "" = none.
          answer: end with the header of an answer to be generated.

        Raises:
          BadSample: "bad_conversation" if the template refuses it.
          DataError: the template cannot be used.
        """

    @abc.abstractmethod
    def follow(self, question: str) -> str:
        """The text between the last word of an answer and the first word of the next one."""

    @abc.abstractmethod
    def end(self) -> str | None:
        """The token that ends an answer, by name; None if it cannot be determined."""


@dataclasses.dataclass(frozen=True)
class FixedTemplate(Template):
    """``{}`` stands for the text of a turn. message: the system message to use if none is given."""

    message: str
    system: str
    question: str
    answer_head: str
    answer_tail: str
    tokens: tuple[str, ...]

    def write(self, turns: Turns, system: str | None = None, answer: bool = False) -> Written:
        message = self.message if system is None else system
        text, trained, ends = self.system.replace("{}", message) if message else "", [], []
        for speaker, said in turns:
            before, after = self.answer_head, self.answer_tail
            if speaker == "human":
                before, _, after = self.question.partition("{}")
            start = len(text) + len(before)
            text += before + said + after
            ends.append(start + len(said))
            if speaker != "human":
                trained.append((start, len(text)))
        return Written(text + (self.answer_head if answer else ""), tuple(trained), tuple(ends))

    def follow(self, question: str) -> str:
        return self.answer_tail + self.question.replace("{}", question) + self.answer_head

    def end(self) -> str | None:
        return self.answer_tail


FIXED: dict[str, Template] = {
    "internlm2-chat": FixedTemplate(
        message="你是由上海人工智能实验室联合商汤科技开发的书生多模态大模型，"
        "英文名叫InternVL, 是一个有用无害的人工智能助手。",
        system=f"{IM_START}system\n{{}}{IM_END}",
        question=f"{IM_START}user\n{{}}{IM_END}",
        answer_head=f"{IM_START}assistant\n",
        answer_tail=IM_END,
        tokens=(IM_START, IM_END),
    )
}
