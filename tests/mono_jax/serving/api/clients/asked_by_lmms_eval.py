"""Run by the Python of the clients: lmms-eval's own model "openai"."""

from __future__ import annotations

import base64
import io
import json
import sys

from PIL import Image

job = json.load(sys.stdin)
sys.stdout, out = sys.stderr, sys.stdout  # progress bars

from lmms_eval.api.instance import Instance  # noqa: E402
from lmms_eval.models.chat.openai import OpenAICompatible  # noqa: E402

model = OpenAICompatible(
    model_version=job["model"], base_url=f"{job['url']}/v1", api_key="none", max_retries=1, num_concurrent=8
)


def to_messages(asked: dict[str, object]) -> list[dict[str, object]]:
    images = [{"type": "image", "url": Image.open(io.BytesIO(base64.b64decode(each)))} for each in asked["pictures"]]
    return [{"role": "user", "content": [*images, {"type": "text", "text": asked["text"]}]}]


model.task_dict = {"task": {"test": job["asked"]}}
parameters = {"max_new_tokens": job["tokens"], "temperature": 0}
requests = [
    Instance(
        request_type="generate_until",
        arguments=(asked["text"], to_messages, parameters, number, "task", "test"),
        idx=number,
        metadata={"task": "task", "doc_id": number, "repeats": 1},
    )
    for number, asked in enumerate(job["asked"])
]
json.dump({"answers": [each.text for each in model.generate_until(requests)]}, out)
