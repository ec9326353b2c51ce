"""A server with the scripted engine in a separate process; takes a tokenizer FOLDER and prints its port."""

from __future__ import annotations

import sys

from data_pipelines.encoding.tokenizer import Tokenizer
from mono_jax.serving.api.server import Server, bind, run
from mono_jax.serving.api.service import Service
from mono_jax.serving.api.settings import ApiConfig
from tests.mono_jax.serving.api.scripted import ScriptedEngine
from tests.tiny_folder import tiny_config


def main(folder: str) -> None:
    tokenizer = Tokenizer(folder)
    engine = ScriptedEngine(tokenizer, tiny_config(tokenizer))
    engine.start()
    with bind("127.0.0.1", 0) as place:
        config = ApiConfig(drain_s=1, body_timeout_s=2, max_body=1_000_000)
        run(Server(Service(engine, config), ready=lambda: print(place.getsockname()[1], flush=True)), place)
    engine.close()


if __name__ == "__main__":
    main(sys.argv[1])
