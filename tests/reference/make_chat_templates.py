"""Makes the golden cases of tokenizers' chat templates with transformers: small tokenizers, each built as its family's.

    python -m tests.reference.make_chat_templates tests/golden/chat_templates

A case is a folder with tokenizer.json, tokenizer_config.json and chat_template.jinja, which marks nothing;
marked.jinja, the same with ``{% generation %}`` around what an assistant has to write; and cases.json: a list of
``turns`` ([speaker, text]), ``ids`` of the conversation, ``mask`` (which of them stand in a generation block), and
``prompt`` (ids of the turns up to the last question, with the head of an answer). The templates are written for this
purpose, after what each family's look like when they are rendered.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import transformers
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

TEXT = (
    "The grey kite flies over the sea, and the red one over the house. Where is the dog? It is in front of the tree.\n"
    "user assistant system model You are a helpful assistant. [INST] [/INST] <<SYS>> How many boats are there? Three!\n"
)
TURNS: list[list[tuple[str, str]]] = [
    [("human", "Where is the dog?"), ("gpt", "In front of the tree.")],
    [("system", "Be brief."), ("human", "How many boats?"), ("gpt", "3")],
    [
        *(("human", "Hi"), ("gpt", "assistant"), ("human", "Überall?\n\n  Ja: 谢谢 🙂"), ("gpt", "é\n\nb  c")),
        *(("human", "so"), ("gpt", "🙂 {{ x }} {% y %}")),
    ],
    [
        ("human", "think"),
        ("gpt", "<think>\nA kite.\n</think>\n\nred"),
        ("human", "on"),
        ("gpt", "<think>\nB\n</think>\n\nno"),
    ],
]
_CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' }}{% if m['role'] == 'assistant' %}{% generation %}"
    "{{ m['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\\n' }}{% else %}{{ m['content'] + '<|im_end|>\\n' }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
# Family: what its template writes, parts of tokenizer_config.json, added tokens, and the kind of tokenizer.
FAMILIES: dict[str, tuple[str, dict[str, Any], tuple[str, ...], str]] = {
    "smollm2": (
        "{% if messages[0].role != 'system' %}{{ '<|im_start|>system\\n' + 'Sei <b>nett, ü' | tojson }}"
        "{{ '<|im_end|>\\n' }}{% endif %}" + _CHATML,
        {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"},
        ("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
        "bytes",
    ),
    "llama3": (  # texts are trimmed; the date is what the template says where no clock is given
        "{{ bos_token }}{% if date_string is not defined %}"
        "{% set date_string = strftime_now('%d %b %Y') if strftime_now is defined else '26 Jul 2024' %}{% endif %}"
        "{% if messages[0]['role'] == 'system' %}{% set said = messages[0]['content'] | trim %}"
        "{% set messages = messages[1:] %}{% else %}{% set said = '' %}{% endif %}"
        "{{ '<|start_header_id|>system<|end_header_id|>\\n\\nToday: ' + date_string + '\\n\\n' + said + '<|eot_id|>' }}"
        "{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\\n\\n' }}"
        "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] | trim + '<|eot_id|>' }}{% endgeneration %}"
        "{% else %}{{ m['content'] | trim + '<|eot_id|>' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}",
        {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"},
        ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        "bytes",
    ),
    "qwen3": (  # earlier answers lose their thoughts, the last has some, be they empty; lines that write nothing
        "{% if tools %}\n  {{ tools | tojson }}\n  {% endif %}\n"
        "  {% for tool in [1] %}\n    {% break %}\n  {% endfor %}\n"
        "{% for m in messages %}{% if m['role'] != 'assistant' %}"
        "{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}{% else %}"
        "{% set said = m['content'].split('</think>')[-1].lstrip('\\n') %}"
        "{% set thought = '' %}{% if '</think>' in m['content'] %}"
        "{% set thought = m['content'].split('</think>')[0].split('<think>')[-1].strip('\\n') %}{% endif %}"
        "{{ '<|im_start|>assistant\\n' }}{% generation %}"
        "{{ ('<think>\\n' + thought + '\\n</think>\\n\\n' if loop.last else '') + said + '<|im_end|>' }}"
        "{% endgeneration %}{{ '\\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}",
        {"bos_token": None, "eos_token": "<|im_end|>"},
        ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"),
        "bytes",
    ),
    "gemma3": (  # the system's message stands in the first question; a model's turn ends in a line of its own
        "{{ bos_token }}{% set first = '' %}{% if messages[0]['role'] == 'system' %}"
        "{% set first = messages[0]['content'] + '\\n\\n' %}{% set messages = messages[1:] %}{% endif %}"
        "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('roles must alternate') }}{% endif %}"
        "{% if m['role'] == 'assistant' %}{{ '<start_of_turn>model\\n' }}{% generation %}"
        "{{ m['content'] | trim + '<end_of_turn>' }}{% endgeneration %}{{ '\\n' }}{% else %}"
        "{{ '<start_of_turn>user\\n' + (first if loop.first else '') + m['content'] | trim + '<end_of_turn>\\n' }}"
        "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}",
        {"bos_token": "<bos>", "eos_token": "<eos>"},
        ("<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"),
        "spaces",
    ),
    "mistral": (  # no system, and no head of an answer: it follows the question
        "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + '[/INST]' }}"
        "{% elif m['role'] == 'assistant' %}{% generation %}{{ ' ' + m['content'] + eos_token }}{% endgeneration %}"
        "{% else %}{{ raise_exception('no system here') }}{% endif %}{% endfor %}",
        {"bos_token": "<s>", "eos_token": "</s>"},
        ("<unk>", "<s>", "</s>", "[INST]", "[/INST]"),
        "words",
    ),
    "llama2": (  # [INST] is text; each pair of turns has its begin and its end
        "{% set first = '' %}{% if messages[0]['role'] == 'system' %}"
        "{% set first = '<<SYS>>\\n' + messages[0]['content'] + '\\n<</SYS>>\\n\\n' %}{% set messages = messages[1:] %}"
        "{% endif %}{% for m in messages %}{% if m['role'] == 'user' %}"
        "{{ bos_token + '[INST] ' + (first if loop.first else '') + m['content'] + ' [/INST]' }}{% else %}"
        "{% generation %}{{ ' ' + m['content'] + ' ' + eos_token }}{% endgeneration %}{% endif %}{% endfor %}",
        {"bos_token": {"content": "<s>", "__type": "AddedToken"}, "eos_token": "</s>"},
        ("<unk>", "<s>", "</s>"),
        "legacy words",
    ),
}


def tokenizer(kind: str, added: tuple[str, ...]) -> Tokenizer:
    """Byte pairs over bytes (Llama 3, Qwen), or over characters whose spaces are written as in SentencePiece."""
    made = Tokenizer(models.BPE(byte_fallback=kind != "bytes", unk_token=None if kind == "bytes" else "<unk>"))
    alphabet = [f"<0x{n:02X}>" for n in range(256)]
    if kind == "bytes":
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        made.decoder, alphabet = decoders.ByteLevel(), []
    elif kind == "spaces":
        made.normalizer = normalizers.Replace(" ", "▁")
        made.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    elif kind == "words":
        made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=True)
    else:
        made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    first = [*dict.fromkeys(["<unk>", *added] if kind != "bytes" else added), *alphabet]
    trainer = trainers.BpeTrainer(
        vocab_size=len(first) + 140 + 256 * (kind == "bytes"),
        special_tokens=first,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet() if kind == "bytes" else [],
        show_progress=False,
    )
    made.train_from_iterator(TEXT.splitlines(keepends=True), trainer)
    if kind != "spaces":  # what tokenizers put in front of texts, but not of what a template writes
        first_token = next(name for name in added if name in ("<|begin_of_text|>", "<s>", "<|im_start|>"))
        known = [(first_token, first.index(first_token))]
        front = processors.TemplateProcessing(f"{first_token} $A", special_tokens=known)
        level = [processors.ByteLevel(trim_offsets=False)] if kind == "bytes" else []
        made.post_processor = processors.Sequence([*level, front])
    values = json.loads(made.to_str())
    names = {"<unk>", *added}
    values["added_tokens"] = [token for token in values["added_tokens"] if token["content"] in names]
    for token in values["added_tokens"]:
        token["special"] = "think" not in token["content"]
    return Tokenizer.from_str(json.dumps(values))


def messages(turns: list[tuple[str, str]]) -> list[dict[str, str]]:
    roles = {"system": "system", "human": "user", "gpt": "assistant"}
    return [{"role": roles[speaker], "content": text} for speaker, text in turns]


def make(folder: Path) -> None:
    today = {"date_string": "26 Jul 2024"}
    for name, (marked, settings, added, kind) in FAMILIES.items():
        case = folder / name
        case.mkdir(parents=True, exist_ok=True)
        plain = re.sub(r"{% (end)?generation %}", "", marked)
        tokenizer(kind, added).save(str(case / "tokenizer.json"))
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", **settings}
        (case / "tokenizer_config.json").write_text(json.dumps(settings, indent=1) + "\n")
        (case / "chat_template.jinja").write_text(plain)
        (case / "marked.jinja").write_text(marked)
        theirs = transformers.AutoTokenizer.from_pretrained(case)
        assert theirs.chat_template == plain
        cases = []
        for turns in TURNS:
            if name == "mistral" and turns[0][0] == "system":
                continue
            found = theirs.apply_chat_template(messages(turns), return_dict=True, **today)
            masked = theirs.apply_chat_template(
                messages(turns), chat_template=marked, return_dict=True, return_assistant_tokens_mask=True, **today
            )
            assert masked["input_ids"] == found["input_ids"]
            prompt = theirs.apply_chat_template(
                messages(turns[:-1]), add_generation_prompt=True, return_dict=True, **today
            )
            ids, mask = found["input_ids"], masked["assistant_masks"]
            cases.append({"turns": turns, "ids": ids, "mask": mask, "prompt": prompt["input_ids"]})
        (case / "cases.json").write_text(json.dumps(cases) + "\n")


if __name__ == "__main__":
    make(Path(sys.argv[1]))
