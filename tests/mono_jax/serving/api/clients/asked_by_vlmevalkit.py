"""Run by the Python of the clients: VLMEvalKit's own OpenAIWrapper, with and without streaming."""

from __future__ import annotations

import base64
import io
import json
import os
import sys
import tempfile

from PIL import Image

job = json.load(sys.stdin)
sys.stdout, out = sys.stderr, sys.stdout  # progress bars

from vlmeval.api.gpt import OpenAIWrapper  # noqa: E402
from vlmeval.smp import encode_image_to_base64  # noqa: E402

result: dict[str, list] = {"answers": [], "streamed": [], "sent": []}
models = {
    name: OpenAIWrapper(
        model=job["model"],
        api_base=f"{job['url']}/v1/chat/completions",
        key="none",
        retry=1,
        max_tokens=job["tokens"],
        stream=name == "streamed",
    )
    for name in ("answers", "streamed")
}
with tempfile.TemporaryDirectory() as folder:
    for asked in job["asked"]:
        content = []
        sent = []
        for number, picture in enumerate(asked["pictures"]):
            file = os.path.join(folder, f"{number}.png")
            with open(file, "wb") as stream:
                stream.write(base64.b64decode(picture))
            content.append({"type": "image", "value": file})
            image = Image.open(io.BytesIO(base64.b64decode(picture)))
            sent.append(encode_image_to_base64(image, target_size=-1))  # it converts them to JPEG
        content.append({"type": "text", "value": asked["text"]})
        for name, model in models.items():
            result[name].append(model.generate(content))
        result["sent"].append(sent)
json.dump(result, out)
