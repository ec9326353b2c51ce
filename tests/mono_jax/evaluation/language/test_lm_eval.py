"""lm-evaluation-harness itself runs models of this project, on task files in the benchmarks' own layouts, offline."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed: pip install '.[lm-eval]'")

from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.tasks import TaskManager

from data_pipelines.encoding.chat import ChatEncoder
from data_pipelines.recipes.real.catalogue import Options
from data_pipelines.recipes.real.language_tasks import RECIPES, word_questions
from mono_jax.errors import GenerationError
from mono_jax.evaluation.language.lm_eval_model import MonoJaxLM
from mono_jax.generation.options import Sampling
from mono_jax.generation.prompts import Prompt
from mono_jax.models.presets import preset
from mono_jax.weights.model_folder import Origin, save_model
from mono_jax.weights.prompt_format import PromptFormat
from tests.data_pipelines.recipes.real.wordnet import write_wordnet
from tests.mono_jax.helpers import random_params

ROOT = Path(__file__).parents[4]
SENTENCES = [
    "A class holds its attributes in a dictionary.", "The module returns a list of strings.",
    "Raises ValueError if the file is empty.", "Each thread has its own stack.",
]  # fmt: skip
# The layouts of MMLU (letters), HellaSwag (endings), an open question, and a text whose perplexity is measured.
TASKS = {
    "letters": """
output_type: multiple_choice
doc_to_text: "{{question}}\\nA. {{choices[0]}}\\nB. {{choices[1]}}\\nC. {{choices[2]}}\\nD. {{choices[3]}}\\nAnswer:"
doc_to_choice: ["A", "B", "C", "D"]
doc_to_target: answer
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
""",
    "endings": """
output_type: multiple_choice
doc_to_text: "{{ctx}}"
doc_to_target: "{{label}}"
doc_to_choice: "{{endings}}"
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
""",
    "free": """
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{choices[0]}}"
generation_kwargs: {until: ["\\n", "."], max_gen_toks: 8, do_sample: false}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
""",
    "perplexity": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{page}}"
metric_list:
  - {metric: word_perplexity, aggregation: weighted_perplexity, higher_is_better: false}
  - {metric: bits_per_byte, aggregation: bits_per_byte, higher_is_better: false}
""",
}


@pytest.fixture(scope="module")
def folder(sets: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with random weights, and a tokenizer."""
    folder = tmp_path_factory.mktemp("model")
    config = preset("tiny_mono", vocab_size=1035, image_token_id=1028)
    tokenizer = [file for file in Path(sets["tokenizer"]).iterdir() if file.is_file()]
    origin = Origin(prompt=PromptFormat(system_message=""))
    save_model(folder / "model", config, random_params(config), extra_files=tokenizer, origin=origin)
    return folder / "model"


@pytest.fixture(scope="module")
def lm(folder: Path) -> MonoJaxLM:
    with pytest.MonkeyPatch.context() as patch:
        first = jax.devices()[:1]
        patch.setattr(jax, "device_count", lambda: len(first))
        return MonoJaxLM(str(folder), max_length=64, batch_size=4)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    documents = [
        {
            "question": f"Which sentence is number {number}?", "choices": SENTENCES, "answer": number,
            "ctx": sentence[:12], "endings": [other[12:] for other in SENTENCES], "label": str(number),
            "page": " ".join([sentence] * 8),
        }
        for number, sentence in enumerate(SENTENCES)
    ]  # fmt: skip
    (folder / "data.jsonl").write_text("".join(json.dumps(document) + "\n" for document in documents))
    source = (
        f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: {folder / 'data.jsonl'}}}}}\ntest_split: test\n"
    )
    for name, text in TASKS.items():
        (folder / f"{name}.yaml").write_text(f"task: mono_{name}\n{source}{text}")
    return folder


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path_factory.getbasetemp() / "hf"))


def request(kind: str, *arguments: Any) -> Instance:
    return Instance(request_type=kind, doc={}, arguments=arguments, idx=0)


def by_hand(lm: MonoJaxLM, context: str, continuation: str) -> tuple[float, bool]:
    """Tokens of the whole text after the begin token, without those of the context; each token requested separately."""
    whole = [lm.prefix_token_id, *lm._tokenizer.encode(context + continuation)]
    start = len(lm._tokenizer.encode(context)) + 1
    asked = lm._likelihoods([(whole[:place], [whole[place]]) for place in range(start, len(whole))])
    return sum(value for value, _ in asked), all(greedy for _, greedy in asked)


def test_continuations_are_scored_after_their_context(lm: MonoJaxLM):
    pairs = [("A class", " holds its"), ("", "The module"), ("Each thread has its own ", "stack."), ("x", " y")]
    found = lm.loglikelihood([request("loglikelihood", *pair) for pair in pairs], disable_tqdm=True)
    for pair, (value, greedy) in zip(pairs, found):
        context, continuation = pair[0].rstrip(), pair[0][len(pair[0].rstrip()) :] + pair[1]
        expected, likeliest = by_hand(lm, context, continuation)
        assert value == pytest.approx(expected, abs=1e-3) and greedy == likeliest


def test_greedy_continuations_are_flagged(lm: MonoJaxLM):
    context = lm.tok_encode("A class holds")
    [answer] = lm._generator.generate([Prompt(context)], Sampling(max_new_tokens=4))
    other = [*answer.tokens[:3], (answer.tokens[3] + 1) % 1000]
    asked = [(None, context, tokens) for tokens in (answer.tokens, other)]
    assert [greedy for _, greedy in lm._loglikelihood_tokens(asked, disable_tqdm=True)] == [True, False]


def test_a_text_longer_than_the_context_is_scored_in_windows(lm: MonoJaxLM):
    """Each token once: the first 64 after the begin token, then 64 at a time, the last ones with a full context."""
    text = " ".join(SENTENCES * 4)
    ids = lm._tokenizer.encode(text)
    assert len(ids) > 130 and len(ids) % 64
    [found] = lm.loglikelihood_rolling([request("loglikelihood_rolling", text)], disable_tqdm=True)
    expected, inputs = 0.0, [lm.prefix_token_id, *ids]
    for place in range(1, len(inputs)):
        full = (place - 1) // 64 == (len(ids) - 1) // 64  # in the last window
        start = max(0, len(inputs) - 1 - 64) if full else (place - 1) // 64 * 64
        expected += lm._likelihoods([(inputs[start:place], [inputs[place]])])[0][0]
    assert found == pytest.approx(expected, abs=1e-2)
    short = lm.loglikelihood_rolling([request("loglikelihood_rolling", SENTENCES[0])], disable_tqdm=True)
    assert short == [pytest.approx(by_hand(lm, "", SENTENCES[0])[0], abs=1e-3)]


def test_answers_end_before_the_first_stop_text(lm: MonoJaxLM):
    contexts = ["A class", "The module returns a list of", "Each thread"]
    whole = lm.generate_until(
        [request("generate_until", text, {"max_gen_toks": 12}) for text in contexts], disable_tqdm=True
    )
    for text, answer in zip(contexts, whole):
        [result] = lm._generator.generate([Prompt(lm.tok_encode(text))], Sampling(12, stop_tokens=tuple(lm._ends)))
        assert answer == lm._tokenizer.decode(result.tokens)
        for stop in {answer[3:5], answer[-1:], answer[2:3]} - {""}:
            options = {"until": [stop, "never"], "max_gen_toks": 12}
            [cut] = lm.generate_until([request("generate_until", text, options)], disable_tqdm=True)
            assert cut == answer[: answer.index(stop)]
    with pytest.raises(GenerationError, match="num_beams"):
        lm.generate_until([request("generate_until", "A", {"num_beams": 4})], disable_tqdm=True)


def test_chat_is_written_as_in_training(lm: MonoJaxLM):
    turns = [("user", "Hi"), ("assistant", "Yes"), ("user", "?")]
    text = lm.apply_chat_template([{"role": role, "content": content} for role, content in turns])
    encoder = ChatEncoder(lm._tokenizer, lm._form.template, lm._form.system_message)
    ids, _ = encoder.conversation([("human", "Hi"), ("gpt", "Yes"), ("human", "?")], answer=True)
    assert lm.tok_encode(text) == ids.tolist()


def test_the_harness_runs_its_kinds_of_tasks(lm: MonoJaxLM, tasks: Path):
    names = [f"mono_{name}" for name in TASKS]
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    found = simple_evaluate(lm, tasks=names, task_manager=manager, bootstrap_iters=0, num_fewshot=0)
    letters, endings, free, perplexity = (found["results"][name] for name in names)
    scores = lambda contexts, options: np.array(  # noqa: E731
        [[by_hand(lm, context, option)[0] for option in options(number)] for number, context in enumerate(contexts)]
    )
    marked = "\n".join(f"{letter}. {sentence}" for letter, sentence in zip("ABCD", SENTENCES))
    asked = [f"Which sentence is number {number}?\n{marked}\nAnswer:" for number in range(4)]
    right = scores(asked, lambda number: [f" {letter}" for letter in "ABCD"]).argmax(axis=1) == np.arange(4)
    assert letters["acc,none"] == right.mean()
    of_endings = scores([sentence[:12] for sentence in SENTENCES], lambda n: [f" {other[12:]}" for other in SENTENCES])
    assert endings["acc,none"] == (of_endings.argmax(axis=1) == np.arange(4)).mean()
    assert 0 <= endings["acc_norm,none"] <= 1 and free["exact_match,none"] == 0
    pages = [" ".join([sentence] * 8) for sentence in SENTENCES]
    sums = lm.loglikelihood_rolling([request("loglikelihood_rolling", page) for page in pages], disable_tqdm=True)
    size = sum(len(page.encode()) for page in pages)
    assert perplexity["bits_per_byte,none"] == pytest.approx(-sum(sums) / size / np.log(2), rel=1e-6)


def test_the_task_of_the_real_sets_runs(lm: MonoJaxLM, tmp_path: Path):
    """Accuracy is the share of words whose right definition is the likeliest of four."""
    root = write_wordnet(tmp_path / "packages")
    RECIPES["word_meaning"](Options(limit=8), tmp_path, [root])
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    found = simple_evaluate(lm, tasks=["word_meaning"], task_manager=manager, bootstrap_iters=0)
    likeliest = []
    for question in (questions := word_questions(root, 8, seed=0)):
        context = f'The {question["part"]} "{question["word"]}" means:'
        likeliest.append(int(np.argmax([by_hand(lm, context, f" {choice}")[0] for choice in question["choices"]])))
    right = np.mean([place == question["answer"] for place, question in zip(likeliest, questions)])
    assert found["results"]["word_meaning"]["acc,none"] == right
    kept = [sample["filtered_resps"] for sample in found["samples"]["word_meaning"]]
    assert [int(np.argmax([value for value, _ in each])) for each in kept] == likeliest


# Runs a script as if torch were not installed.
WITHOUT_TORCH = """
import runpy, sys
from importlib.machinery import PathFinder
class NoTorch(PathFinder):
    @classmethod
    def find_spec(cls, name, *rest):
        return None if name.partition(".")[0] == "torch" else super().find_spec(name, *rest)
sys.meta_path[:] = [NoTorch if finder is PathFinder else finder for finder in sys.meta_path]
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.slow
def test_the_command_runs_the_harness_without_torch(folder: Path, tasks: Path, tmp_path: Path):
    """As users call it: with lm_eval's own flags and result files."""
    command = [sys.executable, "-c", WITHOUT_TORCH, "experiments/lm_eval.py", "--model_args", f"pretrained={folder}"]
    command += ["--tasks", "mono_letters,mono_free", "--include_path", str(tasks), "--output_path", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    [file] = tmp_path.rglob("results_*.json")
    results = json.loads(file.read_text())
    assert set(results["results"]) == {"mono_letters", "mono_free"} and results["config"]["model"] == "mono_jax"
