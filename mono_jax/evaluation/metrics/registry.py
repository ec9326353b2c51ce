"""Metrics by name, for benchmarks and configs."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence

from mono_jax.errors import unknown_key
from mono_jax.evaluation.judges import NoJudge
from mono_jax.evaluation.metrics import boxes, choices, mmmu, short_answers, vqa, yes_no
from mono_jax.evaluation.metrics.captions.scores import BLEU_OF, captions
from mono_jax.evaluation.metrics.judged import Memory, math_vista, mm_vet
from mono_jax.evaluation.metrics.metric import Answered, Metric, mean_of

METRICS: dict[str, Metric] = {
    "exact_match": mean_of(short_answers.exact_match),
    "gqa": mean_of(short_answers.gqa),
    "relaxed_accuracy": mean_of(short_answers.relaxed),
    "anls": mean_of(short_answers.anls, "ANLS", is_share=False),
    "contains": mean_of(short_answers.contains),
    "vqa_accuracy": mean_of(vqa.accuracy, is_share=False),
    "multiple_choice": mean_of(choices.right_choice),
    "circular": choices.circular,
    "mmmu": mean_of(mmmu.right),
    "mme": yes_no.mme,
    "hallusion": yes_no.hallusion,
    "pope": yes_no.pope,
    "grounding": mean_of(boxes.grounded, "precision@0.5"),
    "captions": captions,
}
JUDGED = {"math_vista": math_vista, "mm_vet": mm_vet}  # need a judge
# What metrics give beside their headline, if the examples have it and more of it is better: of the share of answers
# "yes", which pope gives too, it is not.
FURTHER = {
    "circular": ("accuracy",),
    "mme": ("perception", "cognition"),
    "hallusion": ("fAcc", "qAcc"),
    "pope": ("accuracy",),
    "captions": (*(f"BLEU-{n}" for n in BLEU_OF), "ROUGE-L"),
}
# Metrics that score several examples as one, and which ones: an incomplete set would score too high, or not at all.
SETS: dict[str, Callable[[Answered], Hashable]] = {
    "circular": choices.question_of,
    "mme": yes_no.image_of,
    "hallusion": yes_no.set_of,
}
# The categories of an example, for metrics whose examples may be in several at once; others: ``Answered.category``.
CATEGORIES: dict[str, Callable[[Answered], Sequence[str]]] = {"pope": yes_no.pope_categories}


def find_metric(name: str, judge: Memory | None = None) -> Metric:
    """The metric ``name``; without a judge, metrics that need one raise when called. Raises ConfigError."""
    if name in METRICS:
        return METRICS[name]
    if name in JUDGED:
        return JUDGED[name](judge or Memory(NoJudge()))
    raise unknown_key("metric", name, [*METRICS, *JUDGED])
