import json

import numpy as np
import pytest

from data_pipelines.encoding.text import ChatEncoder, Tokenizer, clean_caption
from data_pipelines.errors import BadSample, DataError


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


def test_hugging_face_file_gives_the_same_interface(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    model = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>", byte_fallback=True))
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    special = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<img>", "</img>", "<IMG_CONTEXT>"]
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=special,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    model.train_from_iterator(["a red kite over the grey sea"] * 4, trainer)
    model.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer(tmp_path)
    chat = ChatEncoder(tokenizer, system_message="")
    ids, mask = chat.conversation([("human", "a kite?"), ("gpt", "yes: é")], [2])
    assert tokenizer.bos == special.index("<s>") and ids[0] == tokenizer.bos
    assert np.count_nonzero(ids == tokenizer.id("<IMG_CONTEXT>")) == 2
    assert tokenizer.decode(ids[mask > 0]) == "yes: é<|im_end|>"
    assert tokenizer.vocab_size == model.get_vocab_size()


def test_added_tokens_may_stand_in_tokenizer_config(tmp_path, golden_dir):
    (tmp_path / "tokenizer.model").write_bytes((golden_dir / "chat/tokenizer.model").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text('{"added_tokens_decoder": {"700": {"content": "<x>"}}}')
    tokenizer = Tokenizer(tmp_path)
    assert tokenizer.encode("<x>a")[0] == 700 and tokenizer.vocab_size == 701
    assert tokenizer.digest != Tokenizer(golden_dir / "chat").digest


def test_decode_gives_text_back(tokenizer):
    text = "Where is <ref>the dog</ref>? 谢谢<|im_end|>"
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_missing_things_are_named(tmp_path, tokenizer):
    with pytest.raises(DataError, match=r"no tokenizer\.model"):
        Tokenizer(tmp_path)
    with pytest.raises(DataError, match="did you mean '<IMG_CONTEXT>'"):
        tokenizer.id("<IMG_CONTEX>")
    with pytest.raises(DataError, match="did you mean 'internlm2-chat'"):
        ChatEncoder(tokenizer, "internlm2_chat")
    (tmp_path / "tokenizer.model").write_bytes(b"nonsense")
    with pytest.raises(DataError, match="cannot be read"):
        Tokenizer(tmp_path)


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


def test_captions_are_cleaned():
    assert clean_caption("A &amp;amp; b&nbsp;&lt;br&gt;<b>x</b>\x00 \n\n y<|im_end|> ") == "A & b x y"
    assert (
        clean_caption("<ref>dog</ref><box>[[1, 2, 3, 4]]</box> 2 < 3 > 1")
        == "<ref>dog</ref><box>[[1, 2, 3, 4]]</box> 2 < 3 > 1"
    )
    assert clean_caption("see <image> <IMG_CONTEXT> </s> now") == "see now"
    assert clean_caption("<|action_start|><|plugin|> a <quad>cat</quad> | 3 <|| 2") == "a cat | 3 <|| 2"
    assert clean_caption("one two three", max_chars=8) == "one two"
    assert clean_caption("x" * 20, max_chars=8) == "x" * 8
    with pytest.raises(BadSample, match="empty_caption"):
        clean_caption("<br> \u200b&nbsp;")


def test_pieces_cover_a_text_once(tokenizer):
    chat = ChatEncoder(tokenizer)
    ids = chat.plain("the grey sea and the red kite " * 9)
    pieces = [chat.piece(ids, number, 10) for number in range(-(-len(ids) // 9))]
    np.testing.assert_array_equal(np.concatenate([piece[1:] for piece, _ in pieces]), ids)
    for piece, mask in pieces:
        assert len(piece) <= 10 and piece[0] == tokenizer.bos and mask.tolist() == [0] + [1] * (len(piece) - 1)
