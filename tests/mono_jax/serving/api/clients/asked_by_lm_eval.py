"""Run by the Python of the clients: lm-evaluation-harness's own local-completions and local-chat-completions."""

from __future__ import annotations

import json
import sys

from lm_eval.api.instance import Instance
from lm_eval.models.openai_completions import LocalChatCompletion, LocalCompletionsAPI

job = json.load(sys.stdin)
sys.stdout, out = sys.stderr, sys.stdout  # progress bars


def asked(kind: str, *arguments: object) -> list[Instance]:
    return [Instance(request_type=kind, doc={}, arguments=each, idx=i) for i, each in enumerate(zip(*arguments))]


texts = LocalCompletionsAPI(
    model=job["model"], base_url=f"{job['url']}/v1/completions", num_concurrent=4, max_length=512, batch_size=3
)
pairs = job["pairs"]
chat = LocalChatCompletion(model=job["model"], base_url=f"{job['url']}/v1/chat/completions", num_concurrent=4)
questions = [chat.apply_chat_template([{"role": "user", "content": text}]) for text in job["questions"]]
until = [{"until": [], "max_gen_toks": job["tokens"], "do_sample": False}] * len(questions)
result = {
    "backend": texts.tokenizer_backend,
    "likelihoods": texts.loglikelihood(asked("loglikelihood", *zip(*pairs))),
    "rolling": texts.loglikelihood_rolling(asked("loglikelihood_rolling", [pairs[0][0] + pairs[0][1]])),
    "answers": chat.generate_until(asked("generate_until", questions, until)),
}
json.dump(result, out)
