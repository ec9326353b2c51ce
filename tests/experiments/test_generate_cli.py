"""experiments/generate.py: from a folder, a prompt and image files to text, and one-line errors."""

from __future__ import annotations

import dataclasses
import io
import json
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from data_pipelines.batch import TileGeometry
from data_pipelines.encoding.chat import ChatEncoder, word
from data_pipelines.encoding.decoding import ImageLimits
from data_pipelines.encoding.patches import image_patches
from data_pipelines.encoding.tiling import Tiling
from data_pipelines.encoding.tokenizer import Tokenizer
from data_pipelines.errors import DataError
from data_pipelines.special_tokens import END_TOKENS
from experiments import generate as command
from mono_jax import cli
from mono_jax.errors import ConfigError, GenerationError
from mono_jax.generation import chat, options
from mono_jax.generation.decode import Generator, Session
from mono_jax.generation.options import Sampling, default_sampling
from mono_jax.generation.prompts import Prompt
from mono_jax.generation.questions import Questions
from mono_jax.models.presets import preset
from mono_jax.models.transformer import Model
from mono_jax.weights.model_folder import Origin, find_model, load_model, save_model
from mono_jax.weights.prompt_format import PromptFormat
from tests.tiny_folder import tiny_folder


@pytest.fixture(scope="module")
def tokenizer(golden_dir: Path) -> Tokenizer:
    return Tokenizer(golden_dir / "chat")


@pytest.fixture(scope="module")
def folder(golden_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder(golden_dir, tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """64 x 32 pixels: two tiles and a thumbnail."""
    path = tmp_path_factory.mktemp("images") / "noise.png"
    Image.fromarray(np.random.default_rng(1).integers(0, 256, (32, 64, 3), np.uint8)).save(path)
    return path


def last_json(text: str) -> dict[str, Any]:
    return json.loads(text.splitlines()[-1])


def run(capsys: pytest.CaptureFixture[str], *flags: str) -> dict[str, Any]:
    command.main([*flags, "--max_new_tokens=6", "--dtype=float32", "--json"])
    return last_json(capsys.readouterr().out)


def test_an_answer_is_the_models(
    folder: Path, picture: Path, tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    """The prompt is what the data pipeline would make of the conversation, and the text what the model generates."""
    result = run(capsys, f"--model={folder}", f"--image={picture}", "--prompt=what is this")
    patches = image_patches(picture.read_bytes(), Tiling(TileGeometry(32, 8), 1, 2), ImageLimits())
    assert len(patches) == 48
    ids, _ = ChatEncoder(tokenizer).conversation([("human", "what is this")], [48], answer=True)
    config, params = load_model(folder)
    stops = (tokenizer.eos, *(tokenizer.id(name) for name in END_TOKENS))
    [expected] = Generator(config, params, jnp.float32).generate([Prompt(ids, patches)], Sampling(6, stop_tokens=stops))
    [turn] = result["turns"]
    assert result["text"] == turn["text"] == tokenizer.decode(expected.tokens).strip()
    assert (turn["new_tokens"], turn["finish"]) == (len(expected.tokens), expected.finish)
    assert (turn["prompt_tokens"], turn["visual_tokens"]) == (len(ids), 48)
    assert 0 < turn["seconds_to_first_token"] <= turn["seconds"]


def test_turns(
    folder: Path,
    picture: Path,
    tokenizer: Tokenizer,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A later turn closes the previous answer; its images are tiled by the same rules as those of the first turn."""
    seen: list[Prompt] = []
    original = chat.Chat._prompt

    def prompt(self: chat.Chat, *args: Any) -> Prompt:
        seen.append(original(self, *args))
        return seen[-1]

    monkeypatch.setattr(chat.Chat, "_prompt", prompt)
    lines = f"/image {picture.parent}/missing.png\nlost?\n\n/image {picture}\nand <image> here?\n/quit\nnever asked\n"
    monkeypatch.setattr("sys.stdin", io.StringIO(lines))
    command.main(
        [f"--model={folder}", "--prompt=hello", "--interactive", "--max_new_tokens=6", "--max_tiles=1", "--json"]
    )
    out, err = capsys.readouterr()
    assert err == f"error: {picture.parent}/missing.png: No such file or directory\n"
    turns = last_json(out)["turns"]
    assert [turn["prompt"] for turn in turns] == ["hello", "and <image> here?"]
    assert [turn["visual_tokens"] for turn in turns] == [0, 16]
    text = tokenizer.decode(np.concatenate([one.input_ids for one in seen]))
    context = "<IMG_CONTEXT>" * 16
    assert text.count("system") == 1
    assert "<|im_start|>user\nhello<|im_end|><|im_start|>assistant\n<|im_end|><|im_start|>user" in text
    assert text.endswith(f"and <img>{context}</img> here?<|im_end|><|im_start|>assistant\n")
    assert [len(one.input_ids) for one in seen] == [turn["prompt_tokens"] for turn in turns]


@pytest.mark.parametrize("images", [(1, 0, 1, 0), (0, 1, 1), (2, 1, 3), (1, 1, 0, 1), (2, 0)])
@pytest.mark.parametrize("max_tiles", [1, 2, 5])
def test_images_of_all_turns_are_tiled_as_those_of_one_sample(
    images: tuple[int, ...], max_tiles: int, folder: Path, picture: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in training and by the server, which see the whole conversation; a turn that cannot be asked changes nothing.

    The context is compared after every turn, whether earlier turns were read again for it or not.
    """
    opened = chat.open_model(str(folder), None, dtype="float32", max_tiles=max_tiles, max_length=1024)
    encoder = ChatEncoder(opened.tokenizer, opened.form.template, opened.form.system_message)
    tiling = chat.tiling_of(opened.generator.config, opened.form)
    questions = Questions(encoder, tiling)
    talk = chat.Chat(opened.generator, opened.tokenizer, opened.form, Sampling(3))
    read: list[Prompt] = []
    turn = Session.turn

    def reading(session: Session, prompts: list[Prompt], *args: Any, **options: Any) -> Any:
        earlier = [*read] if session.lengths[0] else []
        answer = turn(session, prompts, *args, **options)
        read[:] = [*earlier, *prompts]
        return answer

    monkeypatch.setattr(Session, "turn", reading)
    turns: list[tuple[str, str]] = []
    for number, count in enumerate(images):
        before = len(read)
        for bad in (f"{picture}.missing", str(folder / "config.json")):
            with pytest.raises(DataError):
                talk.ask("what?", [str(picture), bad])
        with pytest.raises(GenerationError, match="do not fit"):
            talk.ask("what? " * 999, [str(picture)])
        answer = talk.ask(f"what is {number}?", [str(picture)] * count)
        turns += [("human", "<image>\n" * count + f"what is {number}?"), ("gpt", word(answer.text))]
        whole = questions.prompt(turns[:-1], [("picture", picture.read_bytes())] * sum(images[: number + 1]))
        seen = [one.patches for one in read if one.patches is not None]
        assert np.array_equal(np.concatenate(seen), whole.patches) if seen else whole.patches is None
        changed = tiling.shared(sum(images[:number])) != tiling.shared(sum(images[: number + 1]))
        retold = bool(sum(images[:number])) and changed
        assert len(read) == (1 if retold or not number else before + 1)
        if retold:
            assert np.array_equal(read[0].input_ids, whole.input_ids)


def test_plain_text_goes_on_as_it_stands(
    folder: Path, tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    result = run(capsys, f"--model={folder}", "--template=none", "--prompt=once upon a time", "--temperature=1.5")
    assert result["turns"][0]["prompt_tokens"] == 1 + len(tokenizer.encode("once upon a time"))


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, PromptFormat()),
        ({"use_thumbnail": False, "max_dynamic_patch": 12}, PromptFormat(thumbnail=False, max_tiles=12)),
        ({"dynamic_image_size": False, "max_dynamic_patch": 12}, PromptFormat(max_tiles=1)),
    ],
)
def test_habits_of_a_hugging_face_folder(tmp_path: Path, values: dict[str, Any], expected: PromptFormat) -> None:
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert chat.prompt_format(tmp_path) == expected


def test_habits_of_a_run(tmp_path: Path) -> None:
    """The model folder of a workdir is prompted as in training."""
    (tmp_path / "model").mkdir()
    data = {"system_message": "", "max_tiles": 1, "thumbnail": False, "batch_size": 8}
    (tmp_path / "config.json").write_text(json.dumps({"stage": "S2", "data": data}))
    assert chat.prompt_format(tmp_path / "model") == PromptFormat(system_message="", max_tiles=1, thumbnail=False)
    assert chat.prompt_format(tmp_path / "other") == PromptFormat()
    (tmp_path / "model" / "model.json").write_text("{}")
    assert find_model(tmp_path) == tmp_path / "model"
    assert find_model(tmp_path / "model") == tmp_path / "model"


def test_what_a_run_left_in_model_json_comes_first(tmp_path: Path) -> None:
    """It overrides the config.json of the initial weights and the run's own next to the folder."""
    prompt = PromptFormat(system_message="Look.", max_tiles=2)
    config = preset("tiny_mono")
    params = Model(config).init(jax.random.key(0))
    origin = Origin({"max_dynamic_patch": 6}, prompt, "bfloat16")
    save_model(tmp_path / "model", config, params, origin=origin)
    (tmp_path / "config.json").write_text(json.dumps({"data": {"max_tiles": 3}}))
    assert chat.prompt_format(find_model(tmp_path)) == prompt
    assert chat.prompt_format(tmp_path / "model", max_tiles=1, system_message=None) == dataclasses.replace(
        prompt, max_tiles=1
    )


@pytest.mark.parametrize(
    ("values", "flags", "expected"),
    [
        ({"eos_token_id": 7, "temperature": 0.6, "top_p": 0.9}, {}, Sampling(stop_tokens=(7,))),
        (
            {"eos_token_id": [7, 8], "do_sample": True, "temperature": 0.6, "top_p": 0.9, "max_new_tokens": 9},
            {},
            Sampling(9, 0.6, 0, 0.9, stop_tokens=(7, 8)),
        ),
        ({"do_sample": True, "top_k": 50}, {"top_k": 2, "seed": 3}, Sampling(256, 1.0, 2, 1.0, 3)),
        ({"do_sample": True, "temperature": 0.6}, {"temperature": 0.0}, Sampling()),
        ({"repetition_penalty": 1.3}, {}, Sampling(repetition_penalty=1.3)),
        ({"suppress_tokens": [7, 9], "eos_token_id": None}, {}, Sampling(banned_tokens=(7, 9))),
        ({"repetition_penalty": None, "suppress_tokens": None, "min_p": None}, {}, Sampling()),
    ],
)
def test_generation_config_says_how_tokens_are_drawn(
    tmp_path: Path, values: dict[str, Any], flags: dict[str, Any], expected: Sampling
) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps(values))
    assert default_sampling(tmp_path, **flags) == expected


@pytest.mark.parametrize(
    "values",
    [
        {"eos_token_id": "</s>"},
        {"eos_token_id": [-1]},
        {"do_sample": True, "top_p": "high"},
        {"max_new_tokens": 0},
        {"repetition_penalty": "high"},
        {"repetition_penalty": 0.0},
        {"suppress_tokens": [3, 2**40]},
        {"suppress_tokens": [True]},
    ],
)
def test_a_generation_config_of_nonsense_is_named(tmp_path: Path, values: dict[str, Any]) -> None:
    file = tmp_path / "generation_config.json"
    file.write_text(json.dumps(values))
    with pytest.raises(ConfigError, match=f"{file}: {list(values)[-1]} is "):
        default_sampling(tmp_path)


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"num_beams": 1, "no_repeat_ngram_size": 0, "do_sample": True, "min_p": 0.0, "typical_p": 1.0}, []),
        ({"min_p": 0.1, "typical_p": 0.9, "epsilon_cutoff": 1e-4, "eta_cutoff": 1e-4}, []),  # nothing is drawn
        (
            {"do_sample": True, "min_p": 0.1, "typical_p": 0.9, "num_beams": 4},
            ["min_p = 0.1", "typical_p = 0.9", "num_beams = 4"],
        ),
        ({"no_repeat_ngram_size": 3, "bad_words_ids": [[5]]}, ["no_repeat_ngram_size = 3", "bad_words_ids = [[5]]"]),
        ({"_from_model_config": True, "pad_token_id": 2, "transformers_version": "5", "temperature": 0.5}, []),
    ],
)
def test_keys_that_would_change_answers_elsewhere_are_named(
    values: dict[str, Any], named: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps(values))
    default_sampling(tmp_path)
    warnings = [record.message for record in caplog.records if record.name == options.__name__]
    assert len(warnings) == bool(named)
    assert sum(" = " in part for warning in warnings for part in warning.split(", ")) == len(named)
    assert all(name in warnings[0] for name in named)


def test_end_tokens_of_generation_config_end_an_answer(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """If the first token of an answer is made an end token, the answer ends at once."""
    shutil.copytree(folder, tmp_path / "model")
    config, params = load_model(folder)
    form = ChatEncoder(Tokenizer(folder))
    ids, _ = form.conversation([("human", "hello")], answer=True)
    [free] = Generator(config, params, jnp.float32).generate([Prompt(ids)], Sampling(1))
    values = {"eos_token_id": free.tokens[0]}
    (tmp_path / "model" / "generation_config.json").write_text(json.dumps(values))
    assert run(capsys, f"--model={tmp_path / 'model'}", "--prompt=hello")["turns"][0]["new_tokens"] == 0


def bad_flags(folder: Path, picture: Path, tmp_path: Path) -> list[tuple[list[str], str]]:
    ask = [f"--model={folder}", "--prompt=x"]
    broken = tmp_path / "broken.png"
    broken.write_bytes(picture.read_bytes()[:500])
    return [
        ([f"--model={tmp_path / 'none'}", "--prompt=x"], f"{tmp_path / 'none'}: no such folder"),
        ([f"--model={tmp_path}", "--prompt=x"], f"{tmp_path}: not a model folder"),
        ([f"--model={folder}"], "give a --prompt, or --interactive"),
        ([*ask, f"--image={tmp_path / 'no.png'}"], "no.png: No such file"),
        ([*ask, f"--image={broken}"], f"{broken}: truncated_image"),
        ([*ask, f"--image={folder / 'config.json'}"], "config.json: not_an_image"),
        ([*ask, f"--image={picture}", "--template=none"], "images need a chat template"),
        ([*ask, "--template=internlm2-chart"], "did you mean 'internlm2-chat'?"),
        ([*ask, "--max_tiles=0"], "max_tiles is 0"),
        ([*ask, "--temprature=1"], "unrecognized arguments: --temprature=1; see"),
        ([*ask, "--top_p=2"], "top_p is 2.0: it must be"),
        ([*ask, "--max_length=30"], "do not fit the cache of 30 tokens"),
        ([*ask, "--tokenizer=/none"], "give --tokenizer=FOLDER"),
        ([f"--model={folder}", "--prompt=<image>"], "image_count_mismatch"),
    ]


@pytest.mark.parametrize("number", range(14))
def test_bad_input_is_one_line(
    folder: Path, picture: Path, tmp_path: Path, number: int, capsys: pytest.CaptureFixture[str]
) -> None:
    flags, message = bad_flags(folder, picture, tmp_path)[number]
    with pytest.raises(SystemExit) as caught:
        cli.run(lambda: command.main(flags))
    assert caught.value.code == 2
    out, err = capsys.readouterr()
    assert err.startswith("error: ") and err.count("\n") == 1
    assert message in err
    assert out == ""


def test_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        command.main(["--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    for flag in ("--model", "--image", "--interactive", "--top_p", "examples:", "/image FILE"):
        assert flag in text


def test_json_line_is_strict(capsys: pytest.CaptureFixture[str]) -> None:
    cli.json_line({"a": np.float32(1.5), "b": [float("nan"), jnp.arange(2)], "c": Path("x"), "d": None, 1: True})
    assert json.loads(capsys.readouterr().out) == {"a": 1.5, "b": [None, [0, 1]], "c": "x", "d": None, "1": True}


def test_a_full_disk_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    def full() -> None:
        raise OSError(28, "No space left on device", "/data/x")

    with pytest.raises(SystemExit) as caught:
        cli.run(full)
    assert caught.value.code == 2
    assert capsys.readouterr().err == "error: /data/x: No space left on device\n"
