"""Chat templates that come with tokenizers: Jinja programs, run in a sandbox.

They say how a conversation is written, but not which part of it is the assistant's. Marks are inserted to find out: one
after the text of every turn, and two around the content of ``{% generation %}``, which some templates have for this
purpose. In templates without it, an answer begins where the header of an answer to be generated ends, and ends with the
special token after its text: exactly what the model has to generate.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from data_pipelines.encoding.templates.template import Template, Turns, Written
from data_pipelines.errors import BadSample, DataError

_SAID, _BEGIN, _END = _MARKS = "\ufdd0\ufdd1\ufdd2"  # Unicode noncharacters, which do not occur in text
_MARK = re.compile(f"([{_MARKS}])")
_ROLES = {"human": "user", "gpt": "assistant"}


class _Refused(Exception):
    """A template's message about a conversation that it refuses to write."""


class _Generation(jinja2.ext.Extension):
    """``{% generation %}``: its output is enclosed in two marks."""

    tags = {"generation"}  # noqa: RUF012  jinja2's own declaration

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_marked"), [], [], body).set_lineno(line)

    def _marked(self, caller: Callable[[], str]) -> str:
        return _BEGIN + caller() + _END


def _refuse(message: str) -> None:
    raise _Refused(message)


def _json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)


def _sandbox() -> jinja2.Environment:
    """As in transformers, except for the date: a sample must not depend on the current day."""
    found = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
    )
    found.filters["tojson"] = _json
    found.globals |= {"raise_exception": _refuse, "dict": lambda **values: values}
    return found


class JinjaTemplate(Template):
    """The template ``source``, from the file ``where``.

    special: the tokenizer's special tokens by role ("bos_token"), to which templates refer. added: all tokens that are
    cut out of texts by name. Raises DataError if the source is not a template, or a special token is not in ``added``.
    """

    begins = True  # or writes no begin token if its author wants none

    def __init__(self, source: str, special: Mapping[str, str], added: Collection[str], where: str | Path):
        self._where, self._special = where, dict(special)
        for part, name in special.items():
            if part in source and name not in added:
                raise DataError(f"{where}: its {part} {name!r} is not a token; add it to added_tokens.json beside it")
        self.digest = hashlib.sha256(json.dumps([source, special], sort_keys=True).encode()).hexdigest()[:16]
        self._token = re.compile("|".join(map(re.escape, sorted(added, key=len, reverse=True))) or r"(?!)")
        try:
            self._template = _sandbox().from_string(source)
        except jinja2.TemplateError as error:
            raise DataError(f"{where}: its chat template cannot be read ({error})") from None

    def write(self, turns: Turns, system: str | None = None, answer: bool = False) -> Written:
        text, ends, blocks = self._read(turns, system, answer)
        if len(ends) != len(turns):
            raise DataError(f"{self._where}: its chat template writes {len(ends)} of {len(turns)} turns' texts")
        if not blocks:
            blocks = [self._answer(text, ends, number) for number in range(1, len(turns), 2)]
        return Written(text, tuple(blocks), tuple(ends))

    def follow(self, question: str) -> str:
        text, ends, _ = self._read([("human", "."), ("gpt", "."), ("human", question)], None, answer=True)
        return text[ends[1] :]

    def end(self) -> str | None:
        text, ends, _ = self._read([("human", "."), ("gpt", ".")], None, answer=False)
        found = self._token.search(text, ends[-1])
        return found[0] if found else None

    @functools.cached_property
    def _opening(self) -> str:
        """The text between the last word of a question and the first word of its answer."""
        text, ends, _ = self._read([("human", ".")], None, answer=True)
        return text[ends[-1] :]

    def _answer(self, text: str, ends: list[int], number: int) -> tuple[int, int]:
        """Where turn ``number``, an answer, begins and stops in ``text``; raises DataError if that is unknown."""
        mark = "mark the answers with {% generation %}"
        if not text.startswith(self._opening, ends[number - 1]):
            found = text[ends[number - 1] : ends[number - 1] + len(self._opening)]
            raise DataError(
                f"{self._where}: its chat template has {found!r} before an answer, but {self._opening!r} before one "
                f"to be generated: {mark}"
            )
        last = self._token.search(text, ends[number])
        if last is None or text[ends[number] : last.start()].strip():
            raise DataError(f"{self._where}: its chat template puts no special token after an answer: {mark}")
        return ends[number - 1] + len(self._opening), last.end()

    def _read(self, turns: Turns, system: str | None, answer: bool) -> tuple[str, list[int], list[tuple[int, int]]]:
        """The text without marks; where the turns' texts end in it; (start, stop) of the generation blocks."""
        messages = [{"role": "system", "content": system}] if system else []
        messages += [{"role": _ROLES[speaker], "content": said + _SAID} for speaker, said in turns]
        if any(mark in said for _, said in (("", system or ""), *turns) for mark in _MARKS):
            raise BadSample("bad_conversation", detail="the text contains a Unicode noncharacter")
        try:
            text = self._template.render(
                messages=messages, tools=None, documents=None, add_generation_prompt=answer, **self._special
            )
        except _Refused as error:
            raise BadSample("bad_conversation", detail=_MARK.sub("", str(error))) from None
        except Exception as error:  # a template is a program: anything can be wrong with it
            raise DataError(f"{self._where}: its chat template fails ({_MARK.sub('', str(error))})") from None
        parts = _MARK.split(text)
        size, ends, starts, stops = 0, [], [], []
        for number, part in enumerate(parts):
            if number % 2:
                {_SAID: ends, _BEGIN: starts, _END: stops}[part].append(size)
            else:
                size += len(part)
        return "".join(parts[::2]), ends, list(zip(starts, stops))


def tokenizer_template(folder: Path, added: Collection[str]) -> JinjaTemplate:
    """The template of the tokenizer in ``folder``. Raises DataError if it has none, or if it cannot be used."""
    values: dict[str, Any] = {}
    try:
        for name in ("special_tokens_map.json", "tokenizer_config.json"):
            if (file := folder / name).is_file():
                values |= json.loads(file.read_text("utf-8"))
        found = values.get("chat_template")
        if isinstance(found, list):  # several, by name
            found = {each["name"]: each["template"] for each in found}.get("default")
        if (own := folder / "chat_template.jinja").is_file():
            file, found = own, own.read_text("utf-8")
        special = {part: _name(value) for part, value in values.items() if part.endswith("_token")}
    except (ValueError, TypeError, KeyError) as error:
        raise DataError(f"{file}: cannot be read ({error})") from None
    if not isinstance(found, str):
        raise DataError(
            f"{folder}: this tokenizer has no chat template, neither chat_template.jinja nor the key chat_template in "
            "tokenizer_config.json: set data.template"
        )
    return JinjaTemplate(found, {part: name for part, name in special.items() if isinstance(name, str)}, added, file)


def _name(value: Any) -> Any:
    return value.get("content") if isinstance(value, dict) else value
