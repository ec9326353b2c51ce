import json

import numpy as np
import pytest

from data_pipelines.encoding.chat import ChatEncoder
from data_pipelines.encoding.tokenizer import Tokenizer
from data_pipelines.errors import BadSample


@pytest.fixture(scope="module")
def tokenizer(golden_dir):
    return Tokenizer(golden_dir / "chat")


@pytest.fixture(scope="module")
def cases(golden_dir):
    return json.loads((golden_dir / "chat/cases.json").read_text("utf-8"))


def turns(case):
    return [(turn["from"], turn["value"]) for turn in case["conversations"]]


def test_ids_and_labels_equal_reference(tokenizer, cases):
    for case in cases:
        ids, mask = ChatEncoder(tokenizer).conversation(turns(case), case.get("image_tokens", ()))
        assert ids.tolist() == case["input_ids"]
        assert np.where(mask > 0, ids, -100).tolist() == case["labels"]


def test_prompt_equals_reference(tokenizer, cases):
    for case in cases:
        question = next(text for speaker, text in turns(case) if speaker == "human")
        ids, mask = ChatEncoder(tokenizer).conversation(
            [("human", question)], case.get("image_tokens", ()), answer=True
        )
        prompt = case["first_turn_prompt"]
        for tokens in case.get("image_tokens", ()):
            prompt = prompt.replace("<image>", "<img>" + "<IMG_CONTEXT>" * tokens + "</img>", 1)
        assert ids.tolist() == [tokenizer.bos, *tokenizer.encode(prompt)]
        assert not mask.any()


@pytest.mark.parametrize(
    ("given", "images", "reason"),
    [
        ([("gpt", "hello")], [], "bad_conversation"),
        ([("human", "a"), ("human", "b")], [], "bad_conversation"),
        ([("human", "<image> and <image>"), ("gpt", "b")], [4], "image_count_mismatch"),
        ([("human", "<image>"), ("gpt", "b")], [], "image_count_mismatch"),
        ([("human", "a <IMG_CONTEXT> b"), ("gpt", "b")], [4], "image_token_in_text"),
        ([("human", "a <IMG_CONTEXT> b"), ("gpt", "b")], [], "image_token_in_text"),
    ],
)
def test_bad_conversations_have_reasons(tokenizer, given, images, reason):
    with pytest.raises(BadSample) as error:
        ChatEncoder(tokenizer).conversation(given, images)
    assert error.value.reason == reason


def test_system_message_can_be_set_and_left_out(tokenizer):
    talk = [("human", "hi"), ("gpt", "ho")]
    none = tokenizer.decode(ChatEncoder(tokenizer, system_message="").conversation(talk)[0][1:])
    assert none == "<|im_start|>user\nhi<|im_end|><|im_start|>assistant\nho<|im_end|>"
    own = tokenizer.decode(ChatEncoder(tokenizer).conversation([("system", "be brief"), *talk])[0][1:])
    assert own == "<|im_start|>system\nbe brief<|im_end|>" + none


def test_images_without_a_place_come_first(tokenizer):
    chat = ChatEncoder(tokenizer, system_message="")
    unplaced = chat.conversation([("human", "which?"), ("gpt", "x")], [1, 2])[0]
    placed = chat.conversation([("human", "<image>\n<image>\nwhich?"), ("gpt", "x")], [1, 2])[0]
    np.testing.assert_array_equal(unplaced, placed)


def test_placeholders_are_never_trained_on(tokenizer):
    ids, mask = ChatEncoder(tokenizer).conversation([("human", "draw"), ("gpt", "here: <image>")], [3])
    assert not mask[ids == tokenizer.id("<IMG_CONTEXT>")].any()
    assert tokenizer.decode(ids[mask > 0]) == "here: <img></img><|im_end|>"


def test_pieces_cover_a_text_once(tokenizer):
    chat = ChatEncoder(tokenizer)
    ids = chat.plain("the grey sea and the red kite " * 9)
    pieces = [chat.piece(ids, number, 10) for number in range(-(-len(ids) // 9))]
    np.testing.assert_array_equal(np.concatenate([piece[1:] for piece, _ in pieces]), ids)
    for piece, mask in pieces:
        assert len(piece) <= 10 and piece[0] == tokenizer.bos and mask.tolist() == [0] + [1] * (len(piece) - 1)


def test_documents_have_their_images_where_the_text_says(tokenizer):
    chat = ChatEncoder(tokenizer)
    ids, mask = chat.document("before\n<image>\nafter", [3])
    image = [tokenizer.id(name) for name in ("<img>", *["<IMG_CONTEXT>"] * 3, "</img>")]
    before, after = tokenizer.encode("before\n"), tokenizer.encode("\nafter")
    assert ids.tolist() == [tokenizer.bos, *before, *image, *after]
    assert mask.tolist() == [0, *[1] * len(before), *[0] * 5, *[1] * len(after)]
    with pytest.raises(BadSample, match="image_count_mismatch"):
        chat.document("no mark", [3])


def test_a_conversation_goes_on_as_if_it_had_been_one(tokenizer):
    chat = ChatEncoder(tokenizer)
    first, later = [("human", "Where {}?"), ("gpt", "There {}.")], ("human", "What {}?")
    whole = chat.template.write([*first, later], answer=True)
    assert [whole.text[:end].rpartition("\n")[2] for end in whole.ends[::2]] == ["Where {}?", "What {}?"]
    assert whole.text[: whole.ends[1]].endswith("There {}.")
    assert chat.next_question(" What {}?").tolist() == list(tokenizer.encode(whole.text[whole.ends[1] :]))
    unplaced = chat.next_question("What?", [2, 1])
    np.testing.assert_array_equal(unplaced, chat.next_question("<image>\n<image>\nWhat?", [2, 1]))
    assert chat.end == tokenizer.id("<|im_end|>") and chat.template.write(first).text.endswith("There {}.<|im_end|>")
