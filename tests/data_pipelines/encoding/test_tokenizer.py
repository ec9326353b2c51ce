import itertools
import json
import shutil

import fsspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipelines.encoding.chat import ChatEncoder
from data_pipelines.encoding.tokenizer import Tokenizer
from data_pipelines.errors import DataError


@pytest.fixture(scope="module")
def tokenizer(golden_dir):
    return Tokenizer(golden_dir / "chat")


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
    assert [tokenizer.name(number) for number in (1, 7)] == ["<s>", "<IMG_CONTEXT>"]
    assert tokenizer.decode([tokenizer.vocab_size + 5, *tokenizer.encode("kite")]) == "kite"


def test_added_tokens_may_stand_in_tokenizer_config(tmp_path, golden_dir):
    (tmp_path / "tokenizer.model").write_bytes((golden_dir / "chat/tokenizer.model").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text('{"added_tokens_decoder": {"700": {"content": "<x>"}}}')
    tokenizer = Tokenizer(tmp_path)
    assert tokenizer.encode("<x>a")[0] == 700 and tokenizer.vocab_size == 701
    assert tokenizer.digest != Tokenizer(golden_dir / "chat").digest


def test_decode_gives_text_back(tokenizer):
    text = "Where is <ref>the dog</ref>? 谢谢<|im_end|>"
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_ids_beyond_the_tokenizer_have_no_text(tokenizer):
    """A model's vocabulary may be padded."""
    ids = tokenizer.encode("a <ref>b")
    assert tokenizer.decode([ids[0], tokenizer.vocab_size + 1, *ids[1:], tokenizer.vocab_size]) == "a <ref>b"


def test_tokens_have_names(tokenizer):
    assert [tokenizer.name(number) for number in (tokenizer.bos, tokenizer.eos)] == ["<s>", "</s>"]
    assert tokenizer.name(tokenizer.id("<IMG_CONTEXT>")) == "<IMG_CONTEXT>"


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


@pytest.mark.parametrize("name", ["", "/tokenizer.model"])
def test_a_url_stands_for_its_files(golden_dir, tokenizer, tmp_path, monkeypatch, name):
    """Only those of the tokenizer are fetched, whatever else lies there."""
    monkeypatch.setenv("MONO_JAX_CACHE", str(tmp_path))
    store = fsspec.filesystem("memory")
    for file in ("tokenizer.model", "added_tokens.json"):
        store.pipe_file(f"/tokens/{file}", (golden_dir / "chat" / file).read_bytes())
    store.pipe_file("/tokens/model.safetensors", b"large")
    fetched = Tokenizer(f"memory://tokens{name}")
    assert fetched.digest == tokenizer.digest and fetched.added == tokenizer.added
    assert not list(tmp_path.rglob("*.safetensors"))
    store.pipe_file("/nothing/config.json", b"{}")
    with pytest.raises(DataError, match=r"memory://nothing: no tokenizer\.model"):
        Tokenizer("memory://nothing")


PARTS = ("Where", " is", " the dog", "?", "\n\nx", "<|eot_id|>", "<|im_end|>", "<extra>", " 42", "ab")


@pytest.fixture(scope="module")
def several(golden_dir, tmp_path_factory):
    """SentencePiece and two of Hugging Face's, with a token that only added_tokens.json knows."""
    found = []
    for name in ("chat", "chat_templates/llama3", "chat_templates/mistral"):
        folder = shutil.copytree(golden_dir / name, tmp_path_factory.mktemp("tokenizer") / "files")
        file = folder / "added_tokens.json"
        added = json.loads(file.read_text()) if file.is_file() else {}
        file.write_text(json.dumps(added | {"<extra>": 2000}))
        found.append(Tokenizer(folder))
    return found


@given(st.lists(st.tuples(st.sampled_from(PARTS), st.booleans()), max_size=12))
@settings(deadline=None, max_examples=60)
def test_marked_tokens_are_those_with_a_marked_character(several, marked_parts):
    """By what more of the text each further token decodes to."""
    text, spans = "", []
    for part, is_marked in marked_parts:
        spans += [(len(text), len(text) + len(part))] if is_marked else []
        text += part
    inside = {place for first, last in spans for place in range(first, last)}
    for tokenizer in several:
        ids, marks = tokenizer.marked(text, spans)
        assert list(tokenizer.encode(text)) == ids and len(marks) == len(ids)
        ends = [len(tokenizer.decode(ids[:number])) for number in range(len(ids) + 1)]
        if ends[-1] == len(text):
            places = [set(range(first, last)) for first, last in itertools.pairwise(ends)]
            assert marks == [bool(place & inside) for place in places]


class _Counted(list):
    """Counts the elements that are read."""

    read = 0

    def __iter__(self):
        self.read += len(self)
        return super().__iter__()

    def __getitem__(self, place):
        found = super().__getitem__(place)
        self.read += len(found)
        return found


def test_each_part_of_a_text_looks_at_its_own_spans(tokenizer):
    """Conversations of many turns, and strangers' texts of many special tokens, would take the product of both."""
    text = "x<|im_end|>" * 500
    spans = _Counted((start, start + 6) for start in range(0, len(text), 11))
    ids, _ = tokenizer.marked(text, spans)
    assert list(ids) == list(tokenizer.encode(text))
    assert spans.read <= 5 * len(spans)


def test_an_answer_to_come_needs_no_marks(golden_dir, monkeypatch):
    """Of a tokenizer without special tokens each span encodes all that stands before it."""
    tokenizer, spans = Tokenizer(golden_dir / "chat"), []
    turns = [("human", "a"), ("gpt", "b"), ("human", "c")]
    expected = ChatEncoder(tokenizer).conversation(turns)[0]
    monkeypatch.setattr(
        tokenizer,
        "marked",
        lambda text, of: spans.extend(of) or (tokenizer.encode(text), [False] * len(tokenizer.encode(text))),
    )
    found, mask = ChatEncoder(tokenizer).conversation(turns, answer=True)
    assert list(found[: len(expected)]) == list(expected) and spans == [] and not mask.any()


def test_no_token_is_longer_than_the_longest(several):
    for tokenizer in several:
        text = "the dog <|im_end|> is\n\n <extra> 42"
        assert len(text) <= tokenizer.longest * len(tokenizer.encode(text))
        names = [tokenizer.name(number) for number in (*range(500), *tokenizer.added.values())]
        assert tokenizer.longest >= max(len(name) for name in names if name is not None)


def test_long_texts_have_the_tokens_of_short_ones(several, monkeypatch):
    """By a call that lets other threads work."""
    text = "Where is the dog?\n\n 42 <extra>" * 40
    for tokenizer in several:
        expected = list(tokenizer.encode(text))
        monkeypatch.setattr("data_pipelines.encoding.tokenizer.LONG_CHARS", 10)
        monkeypatch.setattr("data_pipelines.encoding.tokenizer.CACHED_CHARS", 0)
        assert list(tokenizer.encode(text)) == expected
        monkeypatch.undo()
