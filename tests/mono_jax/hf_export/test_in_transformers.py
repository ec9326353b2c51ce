"""Exported folders in transformers, in a process without this project, compute the same as our code.

Needs transformers (pip install -e .[families]). To test another release, make a virtual environment with it and torch,
and set MONO_JAX_OTHER_PYTHON to its interpreter.
"""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

OTHER_PYTHON = os.environ.get("MONO_JAX_OTHER_PYTHON")
if not OTHER_PYTHON:
    pytest.importorskip("torch")
    pytest.importorskip("transformers", minversion="5.0")

from data_pipelines.encoding.chat import ChatEncoder  # noqa: E402
from mono_jax.generation.decode import Generator  # noqa: E402
from mono_jax.generation.options import Sampling  # noqa: E402
from mono_jax.generation.prompts import Prompt  # noqa: E402
from mono_jax.models.architecture import Architecture  # noqa: E402
from tests.mono_jax.hf_export import load_in_transformers  # noqa: E402
from tests.mono_jax.hf_export.exports import CASES, VISION, Exported, export, pictures  # noqa: E402

TOLERANCE = 2e-4
TOKENS = 6
COUNTS = (0, 1, 3)  # images of a prompt
VARIANTS = {  # in addition to CASES: name -> family, changes
    "no_experts": ("llama", {"visual_attention_experts": False, "visual_ffn_experts": False}),
    "native": ("gemma3", {"vision": dataclasses.replace(VISION, native=True), "bidirectional_images": True}),
    "published": (
        "internlm2",
        {
            "layout": "own",
            "visual_attention_experts": False,
            "rope_scaling": None,
            "vision": dataclasses.replace(VISION, tile_size=48, ps_version="v1"),
        },
    ),
}
NAMES = [*CASES, *VARIANTS]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return pictures(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory, golden_dir: Path, images: list[Path]) -> dict[str, Exported]:
    """All models, each loaded and run by one process of transformers."""
    made = {}
    for name in NAMES:
        family, changes = VARIANTS.get(name, (name, {}))
        made[name] = export(tmp_path_factory.mktemp(name), golden_dir, family, **changes)
    folder = tmp_path_factory.mktemp("elsewhere")
    folders = [str(each.folder) for each in made.values()]
    print(elsewhere(folder, load_in_transformers.__file__, str(TOKENS), str(images[0].parent), *folders))
    return made


def elsewhere(folder: Path, *arguments: str) -> str:
    """What Python prints with ``arguments`` in ``folder``, without this project."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {"HF_HOME": str(folder), "HF_MODULES_CACHE": str(folder / "modules"), "HF_HUB_OFFLINE": "1"}
    command = [OTHER_PYTHON or sys.executable, *arguments]
    run = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    return run.stdout


def found(model: Exported) -> dict[str, np.ndarray]:
    return dict(np.load(model.folder.parent / "computed.npz", allow_pickle=True))


def continued(prompt: Prompt, tokens: np.ndarray) -> Prompt:
    return dataclasses.replace(prompt, input_ids=np.concatenate([prompt.input_ids, tokens]))


def likeliest(config: Architecture, logits: np.ndarray) -> list[int]:
    """The next token at each of the last ``TOKENS`` positions except the very last; never a placeholder."""
    logits = logits[-TOKENS - 1 : -1].copy()
    logits[:, config.image_token_id] = -np.inf
    return logits.argmax(-1).tolist()


@pytest.mark.parametrize("name", NAMES)
def test_ids_logits_and_tokens_are_ours(exported: dict[str, Exported], images: list[Path], name: str):
    """Greedy tokens: each is the likeliest one after the previous ones.

    Dynamic scaling changes the angles of cached keys with the length, so there the reference is our own generation.
    """
    model, theirs = exported[name], found(exported[name])
    prompts = [model.prompt(load_in_transformers.QUESTION, images[:count]) for count in COUNTS]
    chosen = [theirs[f"greedy{count}"] for count in COUNTS]
    scaling = model.config.rope_scaling
    if dynamic := scaling is not None and scaling.type == "dynamic":
        generator = Generator(model.config, model.params, jnp.float32)
        wanted = [answer.tokens for answer in generator.generate(prompts, Sampling(max_new_tokens=TOKENS))]
        ours = model.logits(prompts)
    else:
        ours = model.logits([continued(prompt, tokens) for prompt, tokens in zip(prompts, chosen)])
        wanted = [likeliest(model.config, logits) for logits in ours]
    assert len({token for row in wanted for token in row}) > 1
    for row, count in enumerate(COUNTS):
        np.testing.assert_array_equal(theirs[f"ids{count}"], prompts[row].input_ids)
        logits = theirs[f"logits{count}"]
        assert len(ours[row]) == len(logits) + (0 if dynamic else TOKENS)
        np.testing.assert_allclose(logits, ours[row][: len(logits)], rtol=TOLERANCE, atol=TOLERANCE)
        if count == 3:  # saved by transformers, and loaded again
            np.testing.assert_array_equal(theirs["saved"], logits)
        for way in (chosen[row], theirs[f"uncached{count}"], theirs["batch"][row]):
            assert list(way) == list(wanted[row])


def test_the_example_of_the_guide_runs(exported: dict[str, Exported], images: list[Path], tmp_path: Path):
    guide = Path(__file__).parents[3] / "docs" / "serving.md"
    examples = re.findall(r"```py\n(.*?)```", guide.read_text(encoding="utf-8"), re.S)
    (example,) = (example for example in examples if "from transformers import" in example)
    (tmp_path / "exported").symlink_to(exported["qwen3"].folder)
    (tmp_path / "cat.jpg").write_bytes(images[0].read_bytes())
    assert elsewhere(tmp_path, "-c", example).strip()


@pytest.mark.parametrize("name", NAMES)
def test_each_expert_computes_its_own_tokens_only(exported: dict[str, Exported], name: str):
    """Rows passed to the first layer's FFNs: text, then visual."""
    model, theirs = exported[name], found(exported[name])
    for count in COUNTS:
        visual = int((theirs[f"ids{count}"] == model.config.image_token_id).sum())
        rows = [len(theirs[f"ids{count}"]) - visual, visual]
        if not model.config.visual_ffn_experts:
            rows = [sum(rows), 0]
        assert list(theirs[f"rows{count}"]) == [number for number in rows if number]


@pytest.mark.parametrize("name", ["internlm2", "native"])
def test_images_in_a_later_turn(exported: dict[str, Exported], images: list[Path], name: str):
    """With the cache of the previous turn, as in our code, and (if angles do not change) without it."""
    model, theirs = exported[name], found(exported[name])
    if model.config.rope_scaling is None:
        assert list(theirs["second_cached"]) == list(theirs["second_whole"])
    first = model.prompt(load_in_transformers.QUESTION, [])
    session = Generator(model.config, model.params, jnp.float32).session()
    sampling = Sampling(max_new_tokens=TOKENS)
    [answer] = session.turn([first], sampling)
    start = len(first.input_ids) + len(answer.tokens)
    np.testing.assert_array_equal(theirs["second_ids"][:start], [*first.input_ids, *answer.tokens])
    shown = model.prompt(load_in_transformers.QUESTION, images[:2])
    turn = dataclasses.replace(shown, input_ids=theirs["second_ids"][start:])
    [answer] = session.turn([turn], sampling)
    assert list(answer.tokens) == list(theirs["second_cached"])


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_tokens_in_bfloat16(exported: dict[str, Exported], images: list[Path], name: str):
    """Ours are equal where the two best logits differ by more than bfloat16 rounding."""
    model, theirs = exported[name], found(exported[name])
    prompts = [model.prompt(load_in_transformers.QUESTION, images[:count]) for count in COUNTS]
    chosen = [theirs[f"half{count}"] for count in COUNTS]
    ours = model.logits([continued(prompt, tokens) for prompt, tokens in zip(prompts, chosen)], jnp.bfloat16)
    clear = [theirs[f"half_margins{count}"] > 0.1 for count in COUNTS]
    assert np.sum(clear) > TOKENS
    for logits, tokens, sure in zip(ours, chosen, clear):
        np.testing.assert_array_equal(np.array(likeliest(model.config, logits))[sure], tokens[sure])


@pytest.mark.parametrize("name", ["qwen3", "native"])
def test_beams_take_the_tiles_of_their_own_row(exported: dict[str, Exported], images: list[Path], name: str):
    """The mean log-probability of each beam equals ours for its tokens; the beams are the same in a batch."""
    model, theirs = exported[name], found(exported[name])
    for row, count in enumerate(COUNTS):
        np.testing.assert_array_equal(theirs["beams"][2 * row : 2 * row + 2], theirs[f"beams{count}"])
    prompt = model.prompt(load_in_transformers.QUESTION, images)
    for logits, tokens, score in zip(
        model.logits([continued(prompt, tokens) for tokens in theirs["beams3"]]), theirs["beams3"], theirs["scores3"]
    ):
        chances = jax.nn.log_softmax(logits[-TOKENS - 1 : -1])[np.arange(TOKENS), tokens]
        assert abs(chances.mean() - score) < 1e-3


@pytest.mark.parametrize("name", CASES)
def test_the_tokenizer_alone_writes_the_prompt(exported: dict[str, Exported], name: str):
    model, theirs = exported[name], found(exported[name])
    encoder = ChatEncoder(model.tokenizer, model.form.template, model.form.system_message)
    wanted = encoder.template.write([("human", load_in_transformers.QUESTION)], model.form.system_message)
    begin = "" if encoder.template.begins or model.tokenizer.bos is None else "<s>"
    assert str(theirs["text"]) == begin + wanted.text
    if model.tokenizer.decode(model.tokenizer.encode(wanted.text)) == wanted.text:  # two golden ones have no decoder
        assert str(theirs["round_trip"]) == str(theirs["text"])
