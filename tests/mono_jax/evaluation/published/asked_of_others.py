"""Run by the Python of the other packages: reads lines {"scorer": name, "cases": [...]}, writes {"scores": [...]}.

Functions are called as the packages' own commands call them: lmms-eval strips answers, files are in-memory tables, a
judge's replies are part of the case, and a guess is "".
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import io
import json
import os
import re
import runpy
import sys
import traceback
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["OPENAI_API_KEY"] = "none"  # modules create a client on import, which is not used
os.environ.pop("VERBOSE", None)  # changes what VLMEvalKit reads
SCORERS: dict[str, Callable[..., Any]] = {}


def scorer(function: Callable[..., Any]) -> Callable[..., Any]:
    SCORERS[function.__name__] = function
    return function


# lmms-eval


@scorer
def lmms_normal(text: str) -> str:
    from lmms_eval.tasks._task_utils.vqa_eval_metric import EvalAIAnswerProcessor

    return EvalAIAnswerProcessor()(text)


@scorer
def lmms_vqa(answer: str, truths: list[str]) -> float:
    from lmms_eval.tasks.textvqa.utils import textvqa_process_results

    return textvqa_process_results({"answers": list(truths), "question_id": 0}, [answer.strip()])["exact_match"]


@scorer
def lmms_anls(answer: str, truths: list[str]) -> float:
    from lmms_eval.api.metrics import anls

    return anls(references=truths, predictions=[answer.strip()])["anls"]


@scorer
def lmms_relaxed(answer: str, truths: list[str]) -> float:
    """For a single truth, since it supports only one."""
    from lmms_eval.tasks.chartqa.utils import chartqa_process_results

    return chartqa_process_results({"type": "human_test", "answer": truths[0]}, [answer.strip()])["relaxed_overall"]


@scorer
def lmms_gqa(answer: str, truth: str) -> float:
    from lmms_eval.api.metrics import exact_match_fn

    both = {"predictions": [answer.strip()], "references": [truth]}
    return float(exact_match_fn(**both, ignore_case=True, ignore_punctuation=True)["exact_match"])


@scorer
def lmms_contains(answer: str, truths: list[str], category: str) -> float:
    from lmms_eval.tasks.ocrbench.utils import ocrbench_process_results

    source = "HME100k" if category.startswith("Handwritten Math") else "another"
    row = {"answer": truths, "dataset": source, "question_type": category}
    return ocrbench_process_results(row, [answer.strip()])["ocrbench_accuracy"]["score"]


@scorer
def lmms_mmmu_choice(answer: str, options: dict[str, str]) -> str:
    from lmms_eval.tasks._task_utils import mmmu_mcq_utils
    from lmms_eval.tasks.mmmu.utils import mmmu_process_results

    mmmu_mcq_utils.random = types.SimpleNamespace(choice=lambda choices: "")
    row = {"id": "validation_Art_1", "question_type": "multiple-choice", "answer": "A"}
    row["options"] = str(list(options.values()))
    return mmmu_process_results(row, [answer.strip()])["mmmu_acc"]["parsed_pred"][0]


@scorer
def lmms_mmmu_open(answer: str, truths: list[str]) -> float:
    from lmms_eval.tasks.mmmu.utils import eval_open, mmmu_process_results

    row = {"id": "validation_Art_1", "question_type": "open", "answer": truths}
    return float(eval_open(truths, mmmu_process_results(row, [answer.strip()])["mmmu_acc"]["parsed_pred"][0]))


@scorer
def lmms_science(answer: str, truth: str, options: dict[str, str]) -> float:
    from lmms_eval.tasks.scienceqa.utils import sqa_process_results

    row = {"choices": list(options.values()), "answer": list(options).index(truth)}
    return sqa_process_results(row, [answer.strip()])["exact_match"]


@scorer
def lmms_seed(answer: str, truth: str, options: dict[str, str]) -> float:
    from lmms_eval.tasks.seedbench.utils import seed_aggregation_result, seed_process_result

    row = {"answer": truth, "data_type": "image", "question_id": 0}
    return seed_aggregation_result([seed_process_result(row, [answer.strip()])["seed_all"]])


@scorer
def lmms_ai2d(answer: str, truth: str, options: dict[str, str]) -> float:
    from lmms_eval.tasks.ai2d.utils import MultiChoiceRegexFilter

    return lmms_gqa(MultiChoiceRegexFilter().apply([[answer]], [{}])[0], truth)


@scorer
def lmms_mme_word(answer: str) -> str:
    from lmms_eval.tasks.mme.utils import parse_pred_ans

    return parse_pred_ans(answer.strip()).replace("other", "")


@scorer
def lmms_mme(rows: list[list[str]]) -> dict[str, float]:
    """Rows of category, image, answer, truth."""
    from lmms_eval.tasks.mme.utils import mme_aggregate_results, mme_process_results

    found: dict[str, list] = {}
    for category, image, answer, truth in rows:
        row = {"category": category, "question_id": image, "answer": truth}
        for name, value in mme_process_results(row, [answer.strip()]).items():
            found.setdefault(name.split("_")[1], []).append(value)
    return {name: mme_aggregate_results(values) for name, values in found.items()}


@scorer
def lmms_pope(rows: list[list[str]]) -> dict[str, dict[str, float]]:
    """Rows of category, answer, truth: scores of each category."""
    from lmms_eval.tasks.pope import utils

    found: dict[str, list] = {}
    for category, answer, truth in rows:
        row = {"answer": truth, "question_id": 0}
        found.setdefault(category, []).append(utils.pope_process_results(row, [answer.strip()])["pope_f1_score"])
    return {
        category: {"f1": utils.pope_aggregate_f1_score(results), "accuracy": utils.pope_aggregate_accuracy(results)}
        for category, results in found.items()
    }


@scorer
def lmms_hallusion(rows: list[list[str]]) -> dict[str, float]:
    """Rows of subcategory, set, figure, question, answer, truth."""
    from lmms_eval.tasks.hallusion_bench.evaluate_hb import hb_aggregation_result_intern

    names = ("subcategory", "set_id", "figure_id", "question_id", "model_prediction", "gt_answer")
    results = [{"category": "VD"} | dict(zip(names, row)) for row in rows]
    return {metric: 100 * hb_aggregation_result_intern(results, metric) for metric in ("aAcc", "fAcc", "qAcc")}


@scorer
def lmms_box(answer: str, box: list[float], width: float, height: float) -> float:
    from lmms_eval.tasks.refcoco.utils_rec import refcoco_bbox_rec_acc05, refcoco_bbox_rec_process_result

    shares = [edge / of for edge, of in zip(box, (width, height, width, height))]
    row = {"question_id": 0, "answer": "", "bbox": shares}
    try:
        found = refcoco_bbox_rec_process_result(row, [answer.strip()])
        return float(refcoco_bbox_rec_acc05([found["refcoco_ACC@0.5"]]))
    except ZeroDivisionError:
        return 0.0


@scorer
def lmms_math_vista(extracted: str, truth: str, options: dict[str, str], kinds: list[Any]) -> float:
    from lmms_eval.tasks.mathvista.mathvista_evals import MathVistaEvaluator

    found = MathVistaEvaluator().normalize_extracted_answer(extracted, list(options.values()), *kinds)
    return float(MathVistaEvaluator().safe_equal(found, truth))


@scorer
def lmms_mm_vet(rows: list[list[Any]]) -> dict[str, float]:
    """Rows of category and the judge's replies, of which the first one is a grade. It prints means to two decimals."""
    from lmms_eval.tasks.mmvet import utils

    results, printed = [], []
    for category, replies in rows:
        utils.get_chat_response = lambda *args, reply=replies[0], **rest: (reply, "scripted")
        row = {"question_id": 0, "question": "", "answer": "", "capability": category}
        results.append(utils.mmvet_process_results(row, [""])["gpt_eval_score"])
    utils.eval_logger = types.SimpleNamespace(info=printed.append)
    found = {"grade": utils.mmvet_aggregate_results(results)}
    for line in printed[1:7]:  # then by combination
        name, value = line.removeprefix("Score for ").split(": ")
        found[name] = float(value)
    return found


# VLMEvalKit


@scorer
def vlm_choice(answer: str, options: dict[str, str]) -> str:
    from vlmeval.utils.matching_util import can_infer

    return can_infer(answer, dict(options)) or ""


@scorer
def vlm_circular(groups: list[list[list[Any]]]) -> dict[str, float]:
    """For each question, its orders: answer, truth, options."""
    import pandas as pd
    from vlmeval.dataset.utils.multiple_choice import eval_circular_group, eval_vanilla

    whole, each = [], []
    for orders in groups:
        rows = [{"prediction": answer, "GT": truth, "question": "?"} | options for answer, truth, options in orders]
        table = pd.DataFrame(rows)
        whole.append(eval_circular_group(None, table)["hit"])
        each += [eval_vanilla(None, table.iloc[i])["hit"] for i in range(len(table))]
    return {"circular": 100 * sum(whole) / len(whole), "accuracy": 100 * sum(each) / len(each)}


def _vlm_line(answer: str, truths: list[str], method: str, dataset: str) -> float:
    from vlmeval.dataset.utils.vqa_eval import hit_calculate, process_line

    found = process_line({"answer": str(truths), "prediction": answer}, method=method)
    return float(hit_calculate([found], dataset)[0])


for _name, _method, _dataset in (
    ("vqa", "vqa_score", "TextVQA_VAL"),
    ("anls", "anls", "DocVQA_VAL"),
    ("relaxed", "relaxed_accuracy", "ChartQA_TEST"),
    ("exact", "accuracy", "OCRVQA_TEST"),
):
    SCORERS[f"vlm_{_name}"] = functools.partial(_vlm_line, method=_method, dataset=_dataset)


@scorer
def vlm_gqa(answer: str, truth: str) -> float:
    return _vlm_line(answer, [truth], "accuracy", "GQA_TestDev_Balanced")


def _rated(module: Any, rating: Callable[[str], Any], rows: list[dict[str, Any]]) -> Any:
    """Its result for a table that it believes to have loaded."""
    import pandas as pd

    module.load = lambda name: pd.DataFrame(rows)
    return rating("table.tsv")


@scorer
def vlm_contains(answer: str, truths: list[str], category: str) -> float:
    from vlmeval.dataset.utils import ocrbench

    scores: list[dict[str, float]] = []
    ocrbench.tqdm = iter
    ocrbench.dump = lambda found, name: scores.append(found)
    ocrbench.logger.setLevel("ERROR")
    _rated(ocrbench, ocrbench.OCRBench_eval, [{"prediction": answer, "answer": str(truths), "category": category}])
    return float(scores[0]["Final Score"])


@scorer
def vlm_word(answer: str) -> str:
    from vlmeval.dataset.utils.yorn import YOrN_Extraction

    return YOrN_Extraction(answer).lower().replace("unknown", "")


@scorer
def vlm_mme(rows: list[list[str]]) -> dict[str, float]:
    """Rows of category, image, answer, truth."""
    from vlmeval.dataset.utils import yorn

    table = [
        {"category": category, "image_path": image, "score": vlm_word(answer) == truth.lower()}
        for category, image, answer, truth in rows
    ]
    found = _rated(yorn, yorn.MME_rating, table).iloc[0]
    return {"perception": float(found["perception"]), "cognition": float(found["reasoning"])}


@scorer
def vlm_pope(rows: list[list[str]]) -> dict[str, dict[str, float]]:
    """Rows of category, answer, truth: scores of each category."""
    from vlmeval.dataset.utils import yorn

    table = [
        {"category": category, "answer": truth.title(), "extracted": (said := vlm_word(answer).title())}
        | {"score": said == truth.title()}
        for category, answer, truth in rows
    ]
    found = _rated(yorn, yorn.POPE_rating, table)
    return {
        row["split"]: {"f1": row["Overall"] / 100, "accuracy": row["acc"] / 100}
        for _, row in found.iterrows()
        if row["split"] != "Overall"
    }


@scorer
def vlm_hallusion(rows: list[list[str]]) -> dict[str, float]:
    """Rows of subcategory, set, figure, question, answer, truth."""
    from vlmeval.dataset.utils import yorn

    table = [
        {"l2-category": category, "index": "_".join(("VD", category, "1", *numbers))}
        | {"score": vlm_word(answer) == {"1": "yes", "0": "no"}[truth]}
        for category, *numbers, answer, truth in rows
    ]
    found = _rated(yorn, yorn.Hallusion_rating, table).iloc[0]
    return {metric: float(found[metric]) for metric in ("aAcc", "fAcc", "qAcc")}


@scorer
def vlm_box(answer: str, box: list[float], width: float, height: float) -> float:
    import numpy as np
    from vlmeval.dataset.refcoco import RefCOCODataset

    found = RefCOCODataset._parse_prediction(answer)
    if found is None:
        return 0.0
    found = RefCOCODataset._to_absolute(found, width, height)
    return float(RefCOCODataset._compute_iou(found, np.array(box)) >= RefCOCODataset.IOU_THRESHOLD)


@scorer
def vlm_mm_vet(rows: list[list[Any]]) -> dict[str, float]:
    """Rows of category and the judge's replies, in turn."""
    from vlmeval.dataset.utils import mmvet

    table = []
    for category, replies in rows:
        left = iter(replies)
        judge = types.SimpleNamespace(generate=functools.partial(lambda left, prompt, temperature: next(left), left))
        line = {"question": "", "answer": "", "prediction": ""}
        table.append({"category": category, "score": mmvet.MMVet_auxeval(judge, line)["score"]})
    found, _ = _rated(mmvet, mmvet.MMVet_acc, table)
    return {name.replace("Overall", "grade"): value for name, value in zip(found["Category"], found["acc"])}


# InternVL: internvl_chat/eval, which holds copies of M4C's, LLaVA's, MMMU's and MME's code


def _printed(function: Callable[..., Any], *arguments: Any) -> dict[str, list[float]]:
    """Its lines "name: number"."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        function(*arguments)
    found: dict[str, list[float]] = {}
    for name, number in re.findall(r"^\s*(.+?)\s*: ([\d.e-]+)\s*$", out.getvalue(), re.MULTILINE):
        found.setdefault(name, []).append(float(number))
    return found


@scorer
def internvl_normal(text: str) -> str:
    from vqa.textvqa_eval import EvalAIAnswerProcessor

    return EvalAIAnswerProcessor()(text)


@scorer
def internvl_vqa(answer: str, truths: list[str]) -> float:
    from vqa import textvqa_eval

    textvqa_eval.tqdm = lambda rows, **rest: rows
    return textvqa_eval.TextVQAAccuracyEvaluator().eval_pred_list([{"pred_answer": answer, "gt_answers": truths}])


@scorer
def internvl_gqa(answer: str, truth: str) -> float:
    """What is passed to GQA's evaluation, which compares it with the truth."""
    import vqa

    Path("given.json").write_text(json.dumps([{"questionId": 0, "answer": answer}]))
    sys.argv = ["", "--src", "given.json", "--dst", "handed.json"]
    runpy.run_path(str(Path(next(iter(vqa.__path__))) / "convert_gqa_for_eval.py"))
    return float(json.loads(Path("handed.json").read_text())[0]["prediction"] == truth)


@scorer
def internvl_mmmu_choice(answer: str, options: dict[str, str]) -> str:
    from mmmu import eval_utils

    eval_utils.random = types.SimpleNamespace(choice=lambda choices: "")
    return eval_utils.parse_multi_choice_response(answer, list(options), options)


@scorer
def internvl_mmmu_open(answer: str, truths: list[str]) -> float:
    from mmmu import eval_utils

    return float(eval_utils.eval_open(truths, eval_utils.parse_open_response(answer)))


@scorer
def internvl_mme_word(answer: str) -> str:
    from mme.calculation import calculate_metrics

    return calculate_metrics().parse_pred_ans(answer.lower()).replace("other", "")


@scorer
def internvl_mme(rows: list[list[str]]) -> dict[str, float]:
    """Rows of category, image, answer, truth."""
    from mme.calculation import calculate_metrics

    files: dict[str, list[str]] = {}
    for category, image, answer, truth in sorted(rows, key=lambda row: row[1]):
        files.setdefault(category, []).append("\t".join((image, "?", truth, answer)))
    for category, lines in files.items():
        Path(f"{category}.txt").write_text("\n".join(lines))
    return dict(zip(("perception", "cognition"), _printed(calculate_metrics().process_result, ".")["total score"]))


@scorer
def internvl_pope(rows: list[list[str]]) -> dict[str, dict[str, float]]:
    """Rows of category, answer, truth: scores of each category."""
    from pope.eval_pope import eval_pope

    found = {}
    for category in {row[0] for row in rows}:
        mine = [row for row in rows if row[0] == category]
        Path("labels.json").write_text("\n".join(json.dumps({"label": truth}) for _, _, truth in mine))
        printed = _printed(eval_pope, [{"text": answer} for _, answer, _ in mine], "labels.json")
        found[category] = {"f1": printed["F1 score"][0], "accuracy": printed["Accuracy"][0]}
    return found


# pycocoevalcap


def _coco_tokens(captions: dict[str, list[str]]) -> dict[str, list[str]]:
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    return PTBTokenizer().tokenize({name: [{"caption": text} for text in texts] for name, texts in captions.items()})


@scorer
def coco_captions(corpora: list[list[list[Any]]]) -> list[dict[str, float]]:
    """For each corpus, rows of answer, truths. Java starts only twice for all of them."""
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    rows = {f"{number}/{row}": of for number, corpus in enumerate(corpora) for row, of in enumerate(corpus)}
    every_answer = _coco_tokens({name: [answer] for name, (answer, _) in rows.items()})
    every_truth = _coco_tokens({name: truths for name, (_, truths) in rows.items()})
    found = []
    for number in range(len(corpora)):
        names = [name for name in rows if name.startswith(f"{number}/")]
        both = {name: every_truth[name] for name in names}, {name: every_answer[name] for name in names}
        of_one = {"CIDEr": Cider().compute_score(*both)[0], "ROUGE-L": Rouge().compute_score(*both)[0]}
        of_one |= {f"BLEU-{n}": value for n, value in enumerate(Bleu(4).compute_score(*both, verbose=0)[0], 1)}
        found.append({name: 100 * float(value) for name, value in of_one.items()})
    return found


PACKAGES = {"lmms": "lmms_eval", "vlm": "vlmeval", "internvl": "vqa.textvqa_eval", "coco": "pycocoevalcap"}


def replied(job: dict[str, Any]) -> dict[str, Any]:
    name, cases = job["scorer"], job["cases"]
    try:
        importlib.import_module(PACKAGES[name.partition("_")[0]])
        return {"scores": [SCORERS[name](*case) for case in cases]}
    except ImportError as error:
        return {"missing": str(error)}
    except Exception:
        return {"fault": traceback.format_exc()}


if __name__ == "__main__":
    sys.stdout, out = sys.stderr, sys.stdout  # progress bars
    for line in sys.stdin:
        print(json.dumps(replied(json.loads(line)), default=float), file=out, flush=True)
