"""Chat templates that tokenizers bring, against what transformers made of them (tests/reference)."""

import json
import shutil

import numpy as np
import pytest

from data_pipelines.encoding.chat import ChatEncoder
from data_pipelines.encoding.templates.jinja import JinjaTemplate
from data_pipelines.encoding.tokenizer import Tokenizer
from data_pipelines.errors import BadSample, DataError
from data_pipelines.special_tokens import OWN_TEMPLATE

FAMILIES = ("gemma3", "llama2", "llama3", "mistral", "qwen3", "smollm2")
ENDS = {"gemma3": "<end_of_turn>", "llama2": "</s>", "llama3": "<|eot_id|>", "mistral": "</s>"}
CHATML = (
    "{{ bos_token }}{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.fixture(params=FAMILIES)
def family(request, golden_dir):
    return golden_dir / "chat_templates" / request.param


def cases_of(folder):
    return json.loads((folder / "cases.json").read_text("utf-8"))


def test_ids_and_masks_equal_those_of_transformers(family, tmp_path):
    """Whether the template marks what is the assistant's, or does not."""
    marked = shutil.copytree(family, tmp_path / "marked")
    shutil.copyfile(family / "marked.jinja", marked / "chat_template.jinja")
    encoders = [ChatEncoder(Tokenizer(folder), OWN_TEMPLATE) for folder in (family, marked)]
    for case in cases_of(family):
        for encoder in encoders:
            ids, mask = encoder.conversation(case["turns"])
            assert ids.tolist() == case["ids"]
            assert mask.tolist() == case["mask"] and 0 < sum(case["mask"]) < len(ids)
            assert encoder.conversation(case["turns"][:-1], answer=True)[0].tolist() == case["prompt"]


def test_what_follows_an_answer_is_what_training_has_there(family):
    encoder = ChatEncoder(Tokenizer(family), OWN_TEMPLATE)
    assert encoder.tokenizer.decode([encoder.end]) == ENDS.get(family.name, "<|im_end|>")
    first, question = [("human", "Hi"), ("gpt", "Ja")], ("human", "so?")
    whole = encoder.template.write([*first, question], answer=True)
    follows = whole.text[whole.ends[1] :]
    assert encoder.next_question("so? ").tolist() == list(encoder.tokenizer.encode(follows))


def test_the_tokenizer_has_images_too(golden_dir, tmp_path):
    """Tokens of added_tokens.json, which tokenizer.json does not know, are cut out; the rest is as without them."""
    folder = shutil.copytree(golden_dir / "chat_templates/llama3", tmp_path / "seeing")
    plain = Tokenizer(folder)
    names = ("<img>", "</img>", "<IMG_CONTEXT>")
    added = {name: plain.vocab_size + number for number, name in enumerate(names)}
    (folder / "added_tokens.json").write_text(json.dumps(added))
    chat = ChatEncoder(Tokenizer(folder), OWN_TEMPLATE)
    ids, mask = chat.conversation([("human", "What?"), ("gpt", "é"), ("human", "Und?"), ("gpt", "x")], [3, 1])
    text = chat.tokenizer.decode(ids)
    assert text.count("<img><IMG_CONTEXT><IMG_CONTEXT><IMG_CONTEXT></img>\n<img><IMG_CONTEXT></img>\nWhat?") == 1
    assert chat.tokenizer.decode(ids[mask > 0]) == "é<|eot_id|>x<|eot_id|>"
    later = chat.next_question("<image>?", [2])
    assert chat.tokenizer.decode(later).startswith("<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n<img><IMG_")
    with pytest.raises(BadSample, match="image_count_mismatch"):
        chat.next_question("<image>?")


def test_the_releases_template_in_jinja_is_the_same(golden_dir, tmp_path):
    """Over its SentencePiece model, whose begin token the template names."""
    folder = shutil.copytree(golden_dir / "chat", tmp_path / "chat")
    added = json.loads((folder / "added_tokens.json").read_text()) | {"<s>": 1}
    (folder / "added_tokens.json").write_text(json.dumps(added))
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "chat_template": CHATML}))
    tokenizer = Tokenizer(folder)
    fixed, jinja = ChatEncoder(tokenizer, system_message=""), ChatEncoder(tokenizer, OWN_TEMPLATE)
    for case in cases_of(golden_dir / "chat"):
        turns = [(turn["from"], turn["value"]) for turn in case["conversations"]]
        images = case.get("image_tokens", ())
        for found, expected in zip(jinja.conversation(turns, images), fixed.conversation(turns, images)):
            np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"chat_template.jinja": "{% for"}, r"jinja: its chat template cannot be read"),
        ({"chat_template.jinja": "{{ messages[0].name.first }}"}, r"chat template fails \('dict object' has no attrib"),
        ({"chat_template.jinja": "{{ strftime_now('%d') }}"}, "'strftime_now' is undefined"),
        ({"chat_template.jinja": "{{ ''.__class__.mro() }}"}, "chat template fails .*unsafe"),
        ({"chat_template.jinja": "{{ messages.append(1) }}"}, "chat template fails .*unsafe"),
        ({"chat_template.jinja": "{{ messages[0].content[0] }}"}, "writes 0 of 1 turns' texts"),
        ({"chat_template.jinja": None}, "has no chat template, neither chat_template.jinja nor"),
        ({"chat_template.jinja": None, "tokenizer_config.json": '{"chat_template": ['}, "cannot be read"),
        ({"tokenizer_config.json": '{"bos_token": "<nil>"}'}, "its bos_token '<nil>' is not a token"),
    ],
)
def test_templates_that_cannot_be_used_are_refused(golden_dir, tmp_path, change, message):
    folder = shutil.copytree(golden_dir / "chat_templates/llama3", tmp_path / "llama3")
    for name, text in change.items():
        (folder / name).unlink()
        if text is not None:
            (folder / name).write_text(text)
    with pytest.raises(DataError, match=message) as error:
        ChatEncoder(Tokenizer(folder), OWN_TEMPLATE)
    assert "\n" not in str(error.value) and str(folder) in str(error.value)


TURN = "{% for m in messages %}<|end_header_id|>{{ m.content }}"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (
            TURN + "{% endfor %}{% if add_generation_prompt %}So: {% endif %}",
            "has '<|en' before an answer, but 'So: ' before",
        ),
        (TURN.replace("<|end_header_id|>", "") + " {% endfor %}", "no special token after an answer"),
        (TURN + "{{ m.content }}<|eot_id|>{% endfor %}", "writes 4 of 2 turns' texts"),
    ],
)
def test_an_answer_that_cannot_be_told_from_the_rest_is_not_trained_on(golden_dir, source, message):
    tokenizer = Tokenizer(golden_dir / "chat_templates/llama3")
    template = JinjaTemplate(source, {}, tokenizer.added, "here")
    with pytest.raises(DataError, match="here: its chat template") as error:
        template.write([("human", "a"), ("gpt", "b")])
    assert message in str(error.value)


def test_what_a_template_refuses_is_a_bad_sample(golden_dir):
    tokenizer = Tokenizer(golden_dir / "chat_templates/mistral")
    with pytest.raises(BadSample, match="no system here") as error:
        ChatEncoder(tokenizer, OWN_TEMPLATE).conversation([("system", "x"), ("human", "a"), ("gpt", "b")])
    assert error.value.reason == "bad_conversation"
    with pytest.raises(DataError, match=r"data\.system_message: the template takes none"):
        ChatEncoder(tokenizer, OWN_TEMPLATE, "Be brief.")
    with pytest.raises(BadSample, match="noncharacter"):
        ChatEncoder(tokenizer, OWN_TEMPLATE).conversation([("human", "a"), ("gpt", "b\ufdd0")])


def test_the_template_of_several_that_is_called_default_counts(golden_dir, tmp_path):
    folder = shutil.copytree(golden_dir / "chat_templates/smollm2", tmp_path / "smollm2")
    config, source = folder / "tokenizer_config.json", folder / "chat_template.jinja"
    several = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": source.read_text()}]
    config.write_text(json.dumps(json.loads(config.read_text()) | {"chat_template": several}))
    source.unlink()
    turns = [("human", "a"), ("gpt", "b")]
    found = ChatEncoder(Tokenizer(folder), OWN_TEMPLATE).conversation(turns)[0]
    expected = ChatEncoder(Tokenizer(golden_dir / "chat_templates/smollm2"), OWN_TEMPLATE).conversation(turns)[0]
    np.testing.assert_array_equal(found, expected)


def test_the_identity_of_data_knows_the_template(golden_dir):
    tokenizer = Tokenizer(golden_dir / "chat_templates/llama3")
    digests = {JinjaTemplate(source, {}, tokenizer.added, "").digest for source in ("a", "b")}
    assert len(digests) == 2 and ChatEncoder(Tokenizer(golden_dir / "chat")).template.digest == ""
