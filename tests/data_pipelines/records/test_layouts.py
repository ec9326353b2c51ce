"""Records of public layouts: what is read of each, and what is refused by name."""

from __future__ import annotations

import base64
import json
from typing import Any

import pytest

from data_pipelines.errors import BadSample
from data_pipelines.records import names
from data_pipelines.records.layouts import Reading, from_record
from data_pipelines.records.pictures import image_link
from data_pipelines.records.raw_sample import RawSample
from data_pipelines.records.turns import speaker_of
from tests.data_pipelines.shard_tools import encoded

JPEG = encoded()
BASE64 = base64.b64encode(JPEG).decode()
TALK = [{"from": "human", "value": "what?"}, {"from": "gpt", "value": "noise"}]
SAID = (("human", "what?"), ("gpt", "noise"))
YES = ("gpt", "yes")
SEEN = (("human", "<image>\nwhat?"), ("gpt", "noise"))
USER = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what?"}]}
ASSISTANT = {"role": "assistant", "content": [{"type": "text", "text": "noise"}]}


def asked(question: str) -> list[dict[str, str]]:
    return [{"from": "human", "value": question}, TALK[1]]


SPELLED = ["imagePath", "images_url", "img_file_path", "photo_src", "picture.uri", "image-path", "screenshot_b64"]


@pytest.mark.parametrize("name", [*names.IMAGE_FIELDS, *SPELLED, "file_name", "path", "Image", "image_1"])
@pytest.mark.parametrize(
    ("value", "refs"),
    [
        ("a.jpg", ("a.jpg",)),
        (["a.jpg", None, "b.png"], ("a.jpg", "b.png")),
        (f"data:image/jpeg;base64,{BASE64}", (JPEG,)),
        (BASE64, (JPEG,)),
        (BASE64.translate(str.maketrans("+/", "-_")), (JPEG,)),
        (JPEG, (JPEG,)),
        (list(JPEG), (JPEG,)),
        ({"bytes": JPEG, "path": None}, (JPEG,)),
        ({"bytes": None, "path": "a.jpg"}, ("a.jpg",)),
        ({"bytes": BASE64}, (JPEG,)),
        ([{"url": "http://x/a.jpg"}], ("http://x/a.jpg",)),
        ("data::x.jpg", ("data::x.jpg",)),
    ],
)
def test_images_under_all_names_and_in_all_forms(name: str, value: Any, refs: tuple) -> None:
    if name in names.FILE_FIELDS and not isinstance(value, str):
        return
    if name in names.FILE_FIELDS and value[-4:] != ".jpg":
        with pytest.raises(BadSample, match="unread_image_field"):
            from_record({name: value, "conversations": TALK})
        return
    assert from_record({name: value, "conversations": TALK}) == RawSample(conversations=SAID, image_refs=refs)
    assert from_record({name: value, "text": "words"}) == RawSample(caption="words", image_refs=refs)


@pytest.mark.parametrize("nothing", [None, "", [], [None], {"bytes": None, "path": None}, float("nan")])
def test_columns_filled_with_nothing_are_absent(nothing: Any) -> None:
    record = {"image": nothing, "images": ["a.jpg"], "conversations": None, "messages": [USER, ASSISTANT]}
    assert from_record(record) == RawSample(conversations=SEEN, image_refs=("a.jpg",))
    turns = [{"from": "human", "value": "what?", "role": None}, {"from": None, "role": "assistant", "content": "noise"}]
    assert from_record({"image": nothing, "conversations": turns}) == RawSample(conversations=SAID)
    assert from_record({"image": nothing, "caption": None, "text": "plain"}) == RawSample(text="plain")


def test_of_several_fields_the_one_that_fits_the_marks_counts() -> None:
    record = {"image": "a.jpg", "images": ["a.jpg", "b.jpg"]}
    two = [{"from": "human", "value": "<image><image>?"}, {"from": "gpt", "value": "!"}]
    assert from_record(record | {"conversations": two}).image_refs == ("a.jpg", "b.jpg")
    assert from_record(record | {"conversations": TALK}).image_refs == ("a.jpg",)


@pytest.mark.parametrize("speaker", names.ROLES)
@pytest.mark.parametrize("spelling", ["{}", "<|{}|>", "{}:", " {} "])
def test_speakers(speaker: str, spelling: str) -> None:
    kind = names.ROLES[speaker]
    before = {"human": [], "gpt": [{"from": "user", "value": "q"}], "system": []}[kind]
    after = {"human": [{"from": "gpt", "value": "a"}], "gpt": [], "system": TALK}[kind]
    for name in (speaker, speaker.upper(), speaker.title()):
        turns = [*before, {"role": spelling.format(name), "text": "said"}, *after]
        assert (kind, "said") in from_record({"conversations": turns}).conversations


@pytest.mark.parametrize(
    ("spelling", "speaker"),
    [
        *((name, "gpt") for name in ("gpt-3.5-turbo", "GPT4o", "Qwen2-VL", "internvl2", "assistant_gpt4v", "Bot 2")),
        *((name, "human") for name in ("user1", "User 2", "human_1:", "### Human")),
        *((name, None) for name in ("tool", "function_call", "observation", "speaker1", "airline", "glmer", "1", "")),
    ],
)
def test_speakers_with_numbers_and_names_of_models(spelling: str, speaker: str | None) -> None:
    assert speaker_of(spelling) == speaker


@pytest.mark.parametrize(
    ("record", "turns"),
    [
        ({"conversations": json.dumps(TALK)}, SAID),
        ({"conversations": str(TALK)}, SAID),
        ({"conversations": str(TALK).replace("}, {", "}\n {")}, SAID),  # as NumPy prints it
        ({"conversations": {"from": ["human", "gpt"], "value": ["what?", "noise"]}}, SAID),
        ({"conversations": [TALK]}, SAID),
        ({"conversations": [{"From": "Human", "Value": "what?"}, {"From": "GPT", "Value": "noise"}]}, SAID),
        ({"contents": [{"role": "user", "parts": [{"text": "what?"}]}, {"role": "model", "parts": ["noise"]}]}, SAID),
        ({"qa": [{"q": "what?", "a": "noise"}]}, SAID),
        ({"instruction": "now?", "output": "yes", "history": [["what?", "noise"]]}, (*SAID, ("human", "now?"), YES)),
        ({"conversation": TALK}, SAID),
        ({"messages": [["what?", "noise"]]}, SAID),
        ({"texts": [{"user": "what?", "assistant": "noise", "source": "s"}]}, SAID),
        ({"system": "be brief", "conversations": TALK}, (("system", "be brief"), *SAID)),
        ({"question": "what?", "answer": "noise"}, SAID),
        ({"query": "what?", "label": ["noise"]}, SAID),
        ({"question": "what?", "answers": ["no", "noise", "noise"]}, SAID),
        ({"question": "what?", "answers": [{"answer": "noise"}, {"answer": "no"}, {"answer": "noise"}]}, SAID),
        ({"instruction": "what?", "input": "", "output": "noise"}, SAID),
        ({"instruction": "what?", "input": "here", "output": "noise"}, (("human", "what?\nhere"), SAID[1])),
        ({"prompt": [{"role": "user", "content": "what?"}], "completion": [ASSISTANT]}, SAID),
        ({"question": "how many?", "answer": 3}, (("human", "how many?"), ("gpt", "3"))),
    ],
)
def test_conversations_and_questions(record: dict, turns: tuple) -> None:
    assert from_record(record | {"image": "a.jpg"}) == RawSample(conversations=turns, image_refs=("a.jpg",))
    assert from_record(record) == RawSample(conversations=turns)


@pytest.mark.parametrize(
    "options", [{"A": "cat", "B": "dog", "C": None}, {"choices": ["cat", "dog"]}, {"options": "['cat', 'dog']"}]
)
@pytest.mark.parametrize("answer", ["B", 1, "dog", ["dog"]])
def test_multiple_choice(options: dict, answer: object) -> None:
    question = "Look.\nwhich?\nA. cat\nB. dog\nAnswer with the option's letter from the given choices directly."
    asked = from_record({"question": "which?", "answer": "a bird", **options}).conversations
    assert asked == (("human", "which?\nA. cat\nB. dog"), ("gpt", "a bird"))  # no letter
    record = {"index": 0, "image": BASE64, "hint": "Look.", "question": "which?", "answer": answer, **options}
    assert from_record(record) == RawSample(conversations=(("human", question), ("gpt", "B")), image_refs=(JPEG,))


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image", "image": "a.jpg"},
        {"type": "image_url", "image_url": {"url": "a.jpg"}},
        {"type": "image_url", "image_url": "a.jpg", "text": None},
        {"type": "input_image", "image_url": "a.jpg"},
        {"type": "image", "path": "a.jpg"},
        {"type": "image", "source": {"type": "base64", "media_type": "image/jpeg", "data": BASE64}},
        {"image": "a.jpg"},
    ],
)
def test_typed_content_holds_its_images(part: dict) -> None:
    record = {"messages": [{"role": "user", "content": [part, {"type": "text", "text": "what?"}]}, ASSISTANT]}
    assert from_record(record) == RawSample(conversations=SEEN, image_refs=(JPEG if "source" in part else "a.jpg",))


def test_typed_content_numbers_its_images() -> None:
    parts = [{"type": "image", "index": 1, "text": None}, {"type": "text", "text": "or"}, {"type": "image", "index": 0}]
    record = {"images": ["a.jpg", "b.jpg"], "messages": [{"role": "user", "content": parts}, ASSISTANT]}
    assert from_record(record).image_refs == ("b.jpg", "a.jpg")
    assert from_record(record).conversations[0] == ("human", "<image>\nor\n<image>")


MARKS = [
    "<|image|>",
    "<|image_1|>",
    "<|vision_start|><|image_pad|><|vision_end|>",
    "<ImageHere>",
    "<img><ImageHere></img>",
]
MARKS += [
    "<IMAGE>",
    "<Image>",
    "<image/>",
    "<image />",
    "<image></image>",
    "<im_start><image><im_end>",
    "<ImageContent>",
]
MARKS += ["<image_placeholder>", "<image_token>", "<start_of_image>"]
LOOSE = ["[IMG]", "[image]", "[Image 1]", "{image}", "{{image}}", "<picture>"]


@pytest.mark.parametrize("mark", [*MARKS, *LOOSE])
def test_marks_of_all_spellings(mark: str) -> None:
    for reading in (Reading(), Reading(images=2)):
        sample = from_record({"images": ["a.jpg", "b.jpg"], "conversations": asked(f"{mark} or {mark}?")}, reading)
        (_, question), _ = sample.conversations
        assert question.split() == ["<image>", "or", "<image>?"] or question.split() == [
            "<image>",
            "or",
            "<image>",
            "?",
        ]
    talk = {"conversations": asked(f"{mark}?")}
    if mark in LOOSE:  # words, where they are not as many as images
        assert from_record(talk).conversations[0][1] == f"{mark}?"
        assert from_record({**talk, "images": ["a.jpg", "b.jpg"]}).conversations[0][1] == f"{mark}?"


@pytest.mark.parametrize("mark", ["<image{}>", "<image-{}>", "<image_{}>", "<image {}>", "<image:{}>"])
@pytest.mark.parametrize("base", [0, 1])
def test_numbered_marks_place_their_images(mark: str, base: int) -> None:
    first, second = mark.format(base), mark.format(base + 1)
    talk = [{"from": "human", "value": f"{second} or {first}? See {second}."}, {"from": "gpt", "value": "!"}]
    found = from_record({"images": ["a.jpg", "b.jpg"], "conversations": talk})
    assert found.image_refs == ("b.jpg", "a.jpg")
    assert found.conversations[0][1] == f"<image> or <image>? See image {base + 1}."
    for images in ([], ["a.jpg"]):
        with pytest.raises(BadSample, match="image_count_mismatch"):
            from_record({"images": images, "conversations": talk})
    with pytest.raises(BadSample, match="another order"):
        from_record({"conversations": talk}, Reading(images=2))
    placed = [{"from": "human", "value": f"<image><image> {second}?"}, {"from": "gpt", "value": "!"}]
    assert (
        from_record({"images": ["a.jpg", "b.jpg"], "conversations": placed}).conversations[0][1] == placed[0]["value"]
    )


def test_control_tokens_in_turns_are_words_of_nobody() -> None:
    talk = [
        {"from": "human", "value": "a<|im_end|>b <IMG_CONTEXT>"},
        {"from": "gpt", "value": "<img>c</s><box>d</box>"},
    ]
    assert from_record({"conversations": talk}).conversations == (("human", "a b  "), ("gpt", " c <box>d</box>"))


def test_several_captions_give_each_sample_one() -> None:
    record = {"image": "a.jpg", "captions": ["one", "two", " ", None]}
    drawn = [from_record(record, Reading(key=str(key))).caption for key in range(200)]
    assert 70 < drawn.count("one") < 130 and set(drawn) == {"one", "two"}
    assert drawn == [from_record(record, Reading(key=str(key))).caption for key in range(200)]
    assert drawn != [from_record(record, Reading(key=str(key), seed=1)).caption for key in range(200)]


ANSWER = {"from": "gpt", "value": "noise"}
MARKED = (("human", "<image>\nwhat?"), ("gpt", "noise"))


@pytest.mark.parametrize(
    ("record", "refs", "turns"),
    [
        ({"image_id": "a.jpg", "conversations": TALK}, 1, None),
        ({"image": "a.jpg", "image2": "b.jpg", "image3": None, "conversations": TALK}, 2, None),
        ({"image": "a.jpg", "image_2": "b.jpg", "conversations": TALK}, 2, None),
        ({"image": "a.jpg", "image1": "b.jpg", "conversations": TALK}, 1, None),
        ({"image": "['a.jpg', \"b'.jpg\"]", "conversations": TALK}, 2, None),
        ({"image": '["a.jpg", "b.jpg"]', "conversations": TALK}, 2, None),
        ({"image": "[1].jpg", "conversations": TALK}, 1, None),
        ({"conversations": [{"from": "human", "value": "what?", "image": "a.jpg"}, ANSWER]}, 1, MARKED),
        ({"messages": [{"role": "user", "content": "what?", "images": ["a.jpg"]}, ANSWER]}, 1, MARKED),
        ({"messages": [{"role": "user", "content": "<image>\nwhat?", "images": ["a.jpg"]}, ANSWER]}, 1, MARKED),
        ({"conversations": [{"from": "human", "value": "<img>im/a.jpg</img>\nwhat?"}, ANSWER]}, 1, MARKED),
        (
            {"image": "a.jpg", "conversations": [{"from": "human", "value": "<img> a.jpg </img>\nwhat?"}, ANSWER]},
            1,
            MARKED,
        ),
    ],
)
def test_no_image_is_passed_over(record: dict, refs: int, turns: tuple | None) -> None:
    sample = from_record(record)
    assert len(sample.image_refs) == refs
    assert turns is None or sample.conversations == turns
    # The same images from elsewhere, as in an archive or where only texts are read.
    assert from_record(record, Reading(images=refs)).conversations == sample.conversations


def test_images_of_several_turns_keep_their_order() -> None:
    first = {"role": "user", "content": "what?", "images": ["a.jpg", "b.jpg"]}
    second = {"role": "user", "content": "and <image>?", "image": {"path": "c.jpg"}}
    third = {"role": "user", "content": "<img>d.jpg</img> too?"}
    answer = {"role": "assistant", "content": "noise"}
    sample = from_record({"messages": [first, answer, second, answer, third, answer]})
    assert sample.image_refs == ("a.jpg", "b.jpg", "c.jpg", "d.jpg")
    questions = [text for speaker, text in sample.conversations if speaker == "human"]
    assert questions == ["<image>\n<image>\nwhat?", "and <image>?", "<image> too?"]


def test_interleaved_documents() -> None:
    record = {"texts": ["before", None, "after <image>"], "images": [None, "a.jpg", None]}
    assert from_record(record) == RawSample(text="before\n<image>\nafter  ", image_refs=("a.jpg",))


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"video": "a.mp4", "conversations": TALK}, "unread_video"),
        ({"videos": ["a.mp4"], "image": "a.jpg", "conversations": TALK}, "unread_video"),
        ({"file_name": "a.mp4", "text": "words"}, "unread_video"),
        ({"media": {"path": "clips/a.webm"}, "conversations": TALK}, "unread_video"),
        ({"audio": {"bytes": b"RIFF", "path": None}, "text": "words"}, "unread_audio"),
        ({"file": "a.wav", "text": "words"}, "unread_audio"),
        ({"conversations": [{"from": "human", "value": "<video>\nwhat?"}, TALK[1]]}, "unread_video"),
        ({"messages": [{"role": "user", "content": [{"type": "video"}]}, ASSISTANT]}, "unread_video"),
        ({"messages": [{"role": "user", "content": [{"type": "input_audio"}]}, ASSISTANT]}, "unread_audio"),
        ({"thing": "a/b.jpg", "conversations": TALK}, "unread_image_field"),
        ({"metadata": {"w": 3, "img_path": "a.jpg"}, "conversations": TALK}, "unread_image_field"),
        ({"metadata": {"source": {"clip": ["a.mp4"]}}, "conversations": TALK}, "unread_video"),
        ({"wav_path": "a", "conversations": TALK}, "unread_audio"),
        ({"mp4": b"0000", "conversations": TALK}, "unread_video"),
        ({"conversations": [{**TALK[0], "attachments": ["a.jpg"]}, TALK[1]]}, "unread_image_field"),
        ({"conversations": [{**TALK[0], "video": "a.mp4"}, TALK[1]]}, "unread_video"),
        ({"conversations": [{**TALK[0], "audio": "a"}, TALK[1]]}, "unread_audio"),
        (
            {"conversations": [{"from": "human", "value": "data:image/png;base64,aaaa what?"}, TALK[1]]},
            "unread_image_field",
        ),
        (
            {"conversations": [{"from": "human", "value": "<image> ?", "images": ["a", "b"]}, TALK[1]]},
            "image_count_mismatch",
        ),
        ({"url": "http://x/a.png?size=1", "text": "words"}, "unread_image_field"),
        ({"blob": JPEG, "conversations": TALK}, "unread_image_field"),
        ({"frames": [{"bytes": JPEG}], "conversations": TALK}, "unread_image_field"),
        ({"image_id": 262148, "question": "what?", "answer": "noise"}, "unread_image_field"),
        ({"coco_image_id": "COCO_1", "conversations": TALK}, "unread_image_field"),
        ({"image_id": 5, "text": "words"}, "unread_image_field"),
        ({"qas": [{"image_id": 5, "question": "what?", "answer": "noise"}]}, "unread_image_field"),
        ({"video_id": "v_1", "question": "what?", "answer": "noise"}, "unread_video"),
        ({"conversations": asked("<speech>\nwhat?")}, "unread_audio"),
        ({"conversations": asked("<|AUDIO|>\nwhat?")}, "unread_audio"),
        ({"conversations": asked("<|vision_start|><|video_pad|><|vision_end|> what?")}, "unread_video"),
        ({"image": 5, "conversations": TALK}, "bad_image_field"),
        ({"image": "data:image/svg+xml,<svg>", "conversations": TALK}, "bad_image_field"),
        ({"image": "data:image/png;base64,???", "conversations": TALK}, "bad_image_field"),
        ({"conversations": asked("![it](x.jpg)\nwhat?")}, "unread_image_tag"),
        ({"conversations": asked("what?\n  ![](https://x/y 'title')  ")}, "unread_image_tag"),
        ({"messages": [["what is in ![it](x.jpg)", "noise"]]}, "unread_image_tag"),
        ({"conversations": asked('<img alt="it" src="x.jpg"/> what?')}, "unread_image_tag"),
        ({"question": "what?\n<IMG SRC=x.jpg>\nNo?", "answer": "noise"}, "unread_image_tag"),
        ({"pdf": "a.pdf", "conversations": TALK}, "unread_document"),
        ({"document": b"%PDF-1.7 ", "conversations": TALK}, "unread_document"),
        ({"image": "a.jpg", "question": "what?", "answer": ""}, "nothing_to_train"),
        ({"question": "what?", "image": None}, "nothing_to_train"),
        ({"conversations": TALK[:1]}, "nothing_to_train"),
        ({"conversations": [TALK[0], {"from": "gpt", "value": " "}]}, "nothing_to_train"),
        ({"conversations": [{"from": "gpt", "value": "what?"}, {"from": "human", "value": "x"}]}, "nothing_to_train"),
        ({"conversations": [{"from": "gpt", "value": "<image>?"}, *TALK]}, "bad_conversation"),
        ({"conversations": [{"from": "function", "value": "x"}, *TALK]}, "bad_conversation"),
        ({"conversations": [{"value": "x"}, *TALK]}, "bad_conversation"),
        ({"conversations": "what?"}, "bad_conversation"),
        ({"image": "a.jpg", "note": 3}, "no_caption"),
    ],
)
@pytest.mark.usefixtures("no_pyav")
def test_what_is_not_read_has_a_reason(record: dict, reason: str) -> None:
    with pytest.raises(BadSample) as error:
        from_record(record)
    assert error.value.reason == reason and (error.value.detail or reason == "no_caption")


@pytest.mark.parametrize(
    "record",
    [
        {"text": "see a.jpg", "url": "http://x/page.html", "path": "src/a.py"},
        {"text": "the <video> tag", "clip": 0.3, "video": False},
        {"text": "words", "question": "q", "answer": "a"},
        {"text": "what was said", "video_id": "v_1", "image_id": None},
    ],
)
def test_plain_text_stays_plain_text(record: dict) -> None:
    assert from_record(record) == RawSample(text=record["text"])


# What stands in text as text does; where it is shown by a tag, the index counts it.
LINKED = [
    ("why does ![it](x.jpg) not show?", "![it](x.jpg)"),
    ('<p>mend</p>\n<img src="x.jpg">\n</div>', '<img src="x.jpg">'),
    ("how do I write `![it](x.jpg)`?", ""),
    ("mend\n```html\n<img src='x.jpg'>\n```", ""),
    ("```\n![](x.jpg)", ""),
    ("![it] (x.jpg) and <image src=x>", ""),
]


@pytest.mark.parametrize(("question", "link"), LINKED)
def test_tags_of_images_in_text_that_is_about_them(question: str, link: str) -> None:
    assert from_record({"conversations": asked(question)}).conversations[0][1] == question
    assert image_link(question) == link


def test_tags_beside_images_and_in_answers_and_text() -> None:
    tag = "![it](x.jpg)"
    assert from_record({"conversations": asked(f"<image>\n{tag}"), "image": "a.jpg"}).image_refs == ("a.jpg",)
    assert from_record({"conversations": [TALK[0], {"from": "gpt", "value": tag}]}).conversations[1][1] == tag
    assert from_record({"text": tag}) == RawSample(text=tag)
    assert from_record({"text": "words", "document": "reports/a.pdf", "image": "a.jpg"}).caption == "words"
    assert from_record({"text": "words", "document": "all the words", "doc": "see a.pdf"}).text == "words"


def test_identity_tells_forms_and_speakers_apart() -> None:
    talks = [RawSample(conversations=SAID), RawSample(conversations=(("gpt", "what?"), ("human", "noise")))]
    texts = [RawSample(caption="what?\nnoise"), RawSample(text="what?\nnoise")]
    assert len({sample.identity for sample in (*talks, *texts)}) == 4
