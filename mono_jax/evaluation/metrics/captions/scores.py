"""Scores of captions: from texts to CIDEr-D, BLEU-1 to 4 and ROUGE-L."""

from __future__ import annotations

import functools
from collections.abc import Sequence

from data_pipelines.errors import DataError
from mono_jax.evaluation.metrics.captions.ngrams import CiderD, N, bleu, bleu_alone, bleu_counts, rouge_l
from mono_jax.evaluation.metrics.captions.ptb import tokenize
from mono_jax.evaluation.metrics.metric import Answered, Measure, measure

BLEU_OF = {n: (functools.partial(bleu, n=n), functools.partial(bleu_alone, n=n)) for n in range(1, N + 1)}


def captions(examples: Sequence[Answered]) -> dict[str, Measure]:
    """ "CIDEr" (100 times CIDEr-D), "BLEU-1" to "BLEU-4" of the whole corpus, "ROUGE-L".

    ``truths`` are the reference captions of the image. CIDEr weights n-grams by how few images of this set have them in
    their references, so it is not comparable between sets. Raises DataError if references are missing.
    """
    if bare := [example.id for example in examples if not example.truths]:
        raise DataError(f"example {bare[0]}: no reference caption")
    given = [tokenize(example.answer) for example in examples]
    references = [[tokenize(truth) for truth in example.truths] for example in examples]
    cider = CiderD(references)
    units = [example.unit for example in examples]
    counts = [bleu_counts(tokens, of_image) for tokens, of_image in zip(given, references)]
    result = {
        "CIDEr": measure(((unit, (cider(*pair), 1)) for unit, *pair in zip(units, given, references)), highest=1000),
    }
    result |= {f"BLEU-{n}": measure(zip(units, counts), value, alone=alone) for n, (value, alone) in BLEU_OF.items()}
    result["ROUGE-L"] = measure((unit, (rouge_l(*pair), 1)) for unit, *pair in zip(units, given, references))
    return result
