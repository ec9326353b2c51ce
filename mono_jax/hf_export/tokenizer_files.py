"""Tokenizer files in Hugging Face's format, with all added tokens, and the model's chat template."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from data_pipelines.encoding.templates.template import FIXED, FixedTemplate
from data_pipelines.encoding.tokenizer import Tokenizer
from data_pipelines.io.publish import write_json
from data_pipelines.special_tokens import OWN_TEMPLATE
from mono_jax.errors import WeightsError
from mono_jax.files import read_json
from mono_jax.weights.prompt_format import PromptFormat

_PIECE = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
# Processes the texts of a FixedTemplate like its ``write``; the texts are variables in front.
_FIXED = """
{%- if messages[0]['role'] == 'system' -%}
  {%- set message = messages[0]['content'] | trim -%}{%- set turns = messages[1:] -%}
{%- else -%}
  {%- set turns = messages -%}
{%- endif -%}
{%- if message -%}{{- system[0] + message + system[1] -}}{%- endif -%}
{%- for turn in turns -%}
  {%- set parts = question if turn['role'] == 'user' else answer -%}
  {{- parts[0] + (turn['content'] | trim) + parts[1] -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- answer[0] -}}{%- endif -%}
"""


def write_tokenizer(folder: Path, tokenizer: Tokenizer, prompt: PromptFormat) -> dict[str, int]:
    """Rewrites tokenizer_config.json, chat_template.jinja and, if there is one, tokenizer.json of ``folder``.

    Returns ids of special tokens for generation_config.json. Raises WeightsError if tokenizer.json cannot express the
    id of an added token.
    """
    file = folder / "tokenizer_config.json"
    values = read_json(file) if file.is_file() else {}
    names = _Names(tokenizer)
    for part, number in (("bos_token", tokenizer.bos), ("eos_token", tokenizer.eos)):
        values[part] = None if number is None else names.of(number)
    pad = values.get("pad_token") or values["eos_token"]
    values["pad_token"] = pad["content"] if isinstance(pad, dict) else pad
    template = _template(folder, values, prompt)
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    values |= {"chat_template": template, "padding_side": "left", "clean_up_tokenization_spaces": False}
    if tokenizer.file.suffix == ".json":
        _write_tokenizer_json(tokenizer)
        values |= {"tokenizer_class": "PreTrainedTokenizerFast"}
        values.pop("added_tokens_decoder", None)
        values.pop("auto_map", None)
    else:
        added = {str(number): {"content": name, **_PIECE} for name, number in tokenizer.added.items()}
        values |= {
            "tokenizer_class": "MonoJaxTokenizer",
            "auto_map": {"AutoTokenizer": ["tokenization_mono_jax.MonoJaxTokenizer", None]},
            "added_tokens_decoder": added,
        }
    write_json(file, values)
    ids = {
        "bos_token_id": tokenizer.bos,
        "pad_token_id": names.id(values["pad_token"]) if values["pad_token"] else None,
    }
    return {key: number for key, number in ids.items() if number is not None}


class _Names:
    """Tokens of a tokenizer by id and by name, including those of the file itself."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer, self._added = tokenizer, {number: name for name, number in tokenizer.added.items()}
        if tokenizer.file.suffix == ".json":
            import tokenizers

            self._name = tokenizers.Tokenizer.from_file(str(tokenizer.file)).id_to_token
        else:
            import sentencepiece

            self._name = sentencepiece.SentencePieceProcessor(str(tokenizer.file)).id_to_piece

    def of(self, number: int) -> str:
        return self._added.get(number) or self._name(number)

    def id(self, name: str) -> int:
        return self._tokenizer.id(name)


def _template(folder: Path, values: dict[str, Any], prompt: PromptFormat) -> str:
    """The Jinja source of the model's template, with the system message that the model was trained with."""
    if prompt.template != OWN_TEMPLATE:
        return _fixed(FIXED[prompt.template], prompt.system_message, values["bos_token"] is not None)
    own, found = folder / "chat_template.jinja", values.get("chat_template")
    if isinstance(found, list):
        found = {each["name"]: each["template"] for each in found}.get("default")
    source = own.read_text(encoding="utf-8") if own.is_file() else found
    # A prompt must not depend on the date: transformers provides such a function, but training does not.
    source = re.sub(r"\bstrftime_now\b", "no_date_of_today", source)
    if not prompt.system_message:
        return source
    turn = f"[{{'role': 'system', 'content': {json.dumps(prompt.system_message, ensure_ascii=False)}}}]"
    condition = "{%- if messages[0]['role'] != 'system' -%}"
    return f"{condition}{{%- set messages = {turn} + messages -%}}{{%- endif -%}}{source}"


def _fixed(template: FixedTemplate, message: str | None, begins: bool) -> str:
    texts = {
        "message": template.message if message is None else message,
        "system": template.system.split("{}"),
        "question": template.question.split("{}"),
        "answer": [template.answer_head, template.answer_tail],
    }
    head = "".join(f"{{%- set {name} = {json.dumps(text, ensure_ascii=False)} -%}}\n" for name, text in texts.items())
    return head + ("{{- bos_token -}}\n" if begins else "") + _FIXED.strip()


def _write_tokenizer_json(tokenizer: Tokenizer) -> None:
    """Adds tokens that are stored outside tokenizer.json to it.

    Its added tokens have ids after the vocabulary's, except those that the vocabulary contains: so they are added to
    both, if it is a table (a model's vocabulary may end after the tokenizer's, with the first added token beyond).
    """
    import tokenizers

    values = json.loads(tokenizer.file.read_text(encoding="utf-8"))
    known = {token["content"] for token in values.get("added_tokens") or []}
    missing = {name: number for name, number in tokenizer.added.items() if name not in known}
    vocabulary = values["model"]["vocab"]
    if isinstance(vocabulary, dict):
        vocabulary |= missing
    entries = [{"id": number, "content": name, **_PIECE} for name, number in missing.items()]
    values["added_tokens"] = sorted([*(values.get("added_tokens") or []), *entries], key=lambda token: token["id"])
    merges = values["model"].get("merges") or []
    if all(isinstance(pair, list) and not any(" " in part for part in pair) for pair in merges):
        values["model"] |= (
            {"merges": [" ".join(pair) for pair in merges]} if merges else {}
        )  # all releases of tokenizers read this form
    text = json.dumps(values, ensure_ascii=False)
    found = tokenizers.Tokenizer.from_str(text)
    for name, number in tokenizer.added.items():
        if found.token_to_id(name) != number:
            raise WeightsError(
                f"{tokenizer.file}: the id of {name!r} is {number}, but tokenizer.json can only give it "
                f"{found.token_to_id(name)}: its vocabulary has a gap"
            )
    tokenizer.file.write_text(text, encoding="utf-8")
