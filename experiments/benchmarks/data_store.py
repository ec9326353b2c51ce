"""A loopback object store for the data benchmark: S3, simulated by moto in its own process, with added latency."""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import time
from collections.abc import Iterator
from typing import Any

BUCKET = "bucket"
_KEYS = {"AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x", "AWS_DEFAULT_REGION": "us-east-1"}


@contextlib.contextmanager
def store(latency_s: float) -> Iterator[str]:
    """The URL of a bucket that this process can reach inside the context; each response takes ``latency_s`` longer.

    Raises ImportError if moto or s3fs is missing.
    """
    import moto.moto_server  # noqa: F401
    import s3fs

    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe(duplex=False)
    server = context.Process(target=_serve, args=(there, latency_s), daemon=True)
    server.start()
    before = {name: os.environ.get(name) for name in ("AWS_ENDPOINT_URL", *_KEYS)}
    os.environ.update(_KEYS, AWS_ENDPOINT_URL=here.recv())
    try:
        s3fs.S3FileSystem.clear_instance_cache()
        s3fs.S3FileSystem().mkdir(BUCKET)
        yield f"s3://{BUCKET}"
    finally:
        server.terminate()
        server.join()
        for name, value in before.items():
            os.environ.pop(name)
            os.environ.update({name: value} if value is not None else {})


def _serve(to: Any, latency_s: float) -> None:
    from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import make_server

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    app = DomainDispatcherApplication(create_backend_app)

    def late(environ: Any, start_response: Any) -> Any:
        time.sleep(latency_s)
        return app(environ, start_response)

    server = make_server("127.0.0.1", 0, late, threaded=True)
    to.send(f"http://127.0.0.1:{server.server_port}")
    server.serve_forever()


def upload(folder: str, url: str) -> None:
    """Copies the files of a folder and of its subfolders."""
    import fsspec

    fsspec.filesystem("s3").put(folder.rstrip("/") + "/", url.rstrip("/") + "/", recursive=True)
