"""Loopback stores: S3, simulated by moto, and GCS, with the few JSON API calls that TensorStore and gcsfs make."""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import json
import logging
import re
import threading
import time
from collections.abc import Callable, Iterator
from hashlib import md5
from typing import Any
from urllib.parse import unquote

import pytest

from mono_jax.storage import buckets
from mono_jax.storage.objects import ObjectPath, forget_buckets

NEEDED = "needs moto[s3], flask and flask-cors (pip install -e .[dev])"
BUCKET = "bucket"


@dataclasses.dataclass
class Store:
    """A running store with one bucket.

    Attributes:
      scheme: gs or s3.
      address: of the server.
      requests: (method, path and query) so far.
      fault: called with each request before it is served; if it returns a number, that is the response status.
    """

    scheme: str
    address: str
    requests: list[tuple[str, str]] = dataclasses.field(default_factory=list)
    fault: Callable[[str, str], int | None] = lambda method, path: None

    def folder(self, name: str) -> ObjectPath:
        return ObjectPath(f"{self.scheme}://{BUCKET}/{name}")

    @property
    def environment(self) -> dict[str, str]:
        """Environment variables through which a process finds the store."""
        if self.scheme == "gs":
            return {"STORAGE_EMULATOR_HOST": self.address, "GCE_METADATA_ROOT": "127.0.0.1:1"}
        credentials = {"AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x", "AWS_DEFAULT_REGION": "us-east-1"}
        return {"AWS_ENDPOINT_URL": self.address, **credentials}

    @contextlib.contextmanager
    def found(self) -> Iterator[Store]:
        """Lets this process find the store inside the context."""
        with pytest.MonkeyPatch.context() as patch:
            for name, value in self.environment.items():
                patch.setenv(name, value)
            patch.setenv("TENSORSTORE_GCS_HTTP_URL", self.address if self.scheme == "gs" else "")
            patch.setattr(buckets, "RETRIES", {"max_retries": 1, "initial_delay": "10ms", "max_delay": "10ms"})
            forget_buckets()
            yield self
        forget_buckets()
        self.fault = lambda method, path: None


@contextlib.contextmanager
def served(scheme: str) -> Iterator[Store]:
    """A loopback store."""
    pytest.importorskip("moto", reason=NEEDED)
    pytest.importorskip("flask_cors", reason=NEEDED)
    from werkzeug.serving import make_server

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    app = _s3() if scheme == "s3" else Gcs()
    store = Store(scheme, "")

    def watched(environ: dict[str, Any], start_response: Any) -> Any:
        request = environ["REQUEST_METHOD"], unquote(f"{environ['PATH_INFO']}?{environ['QUERY_STRING']}")
        store.requests.append(request)
        if (status := store.fault(*request)) is not None:
            environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
            start_response(f"{status} Fault", [("Content-Length", "0")])
            return [b""]
        return app(environ, start_response)

    server = make_server("127.0.0.1", 0, watched, threaded=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    store.address = f"http://127.0.0.1:{server.server_port}"
    if scheme == "s3":
        import boto3

        keys = {"aws_access_key_id": "x", "aws_secret_access_key": "x", "region_name": "us-east-1"}
        boto3.client("s3", endpoint_url=store.address, **keys).create_bucket(Bucket=BUCKET)
    yield store
    server.shutdown()


def _s3() -> Any:
    from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app

    return DomainDispatcherApplication(create_backend_app)


class Gcs:
    """A WSGI application with one in-memory bucket: media, metadata, single-request uploads, lists, deletion."""

    def __init__(self) -> None:
        self._objects: dict[str, tuple[bytes, int]] = {}  # content, generation
        self._lock = threading.Lock()
        self._generation = 0

    def __call__(self, environ: dict[str, Any], start_response: Any) -> list[bytes]:
        from werkzeug.wrappers import Request, Response

        request = Request(environ)
        with self._lock:
            status, body, headers = self._answer(request)
        if not isinstance(body, bytes):
            body, headers = json.dumps(body).encode(), {"Content-Type": "application/json"}
        return list(Response(body, status, headers)(environ, start_response))

    def _answer(self, request: Any) -> tuple[int, Any, dict[str, str]]:
        # The name stays encoded in the path because it may contain slashes.
        path = (request.environ.get("RAW_URI") or request.environ["REQUEST_URI"]).partition("?")[0]
        place = re.fullmatch(r"(/upload|/download)?/storage/v1/b/([^/]+)(/o(?:/(.*))?)?", path)
        if not place or unquote(place[2]) != BUCKET:
            return 404, {"error": {"code": 404, "message": "The specified bucket does not exist."}}, {}
        if request.method == "POST":
            return self._upload(request)
        if place[3] is None:
            return 200, {"kind": "storage#bucket", "name": BUCKET}, {}
        if not place[4]:
            return 200, self._list(request.args), {}
        name, condition = unquote(place[4]), request.args.get("ifGenerationMatch")
        content, generation = self._objects.get(name, (None, 0))
        if condition not in (None, str(generation)):
            return 412, {"error": {"code": 412, "message": "Precondition Failed"}}, {}
        if content is None:
            return 404, {"error": {"code": 404, "message": f"No such object: {BUCKET}/{name}"}}, {}
        if request.method == "DELETE":
            del self._objects[name]
            return 204, b"", {}
        if request.args.get("alt") != "media":
            return 200, self._metadata(name), {}
        if request.args.get("ifGenerationNotMatch") == str(generation):
            return 304, b"", {"x-goog-generation": str(generation)}
        headers = {"x-goog-generation": str(generation), "ETag": str(generation)}
        if (asked := request.headers.get("Range")) is None:
            return 200, content, headers
        first, _, last = asked.removeprefix("bytes=").partition("-")
        part = content[int(first) : int(last) + 1 if last else None]
        if not part:
            return 416, b"", {"Content-Range": f"bytes */{len(content)}"}
        headers["Content-Range"] = f"bytes {first}-{int(first) + len(part) - 1}/{len(content)}"
        return 206, part, headers

    def _upload(self, request: Any) -> tuple[int, Any, dict[str, str]]:
        name, content = request.args.get("name"), request.get_data()
        if request.args["uploadType"] == "multipart":  # metadata, then the content
            border = re.search(r"boundary=['\"]?([^'\";]+)", request.headers["Content-Type"])[1].encode()
            metadata, media = (
                part.split(b"\r\n\r\n" if b"\r\n\r\n" in part else b"\n\n", 1)[1]
                for part in content.split(b"--" + border)[1:3]
            )
            name, content = json.loads(metadata)["name"], media.removesuffix(b"\n").removesuffix(b"\r")
        if request.args.get("ifGenerationMatch") not in (None, str(self._objects.get(name, (b"", 0))[1])):
            return 412, {"error": {"code": 412, "message": "Precondition Failed"}}, {}
        self._generation += 1
        self._objects[name] = content, self._generation
        return 200, self._metadata(name), {}

    def _list(self, args: Any) -> dict[str, Any]:
        first, last, prefix = args.get("startOffset", ""), args.get("endOffset"), args.get("prefix", "")
        names = sorted(n for n in self._objects if n.startswith(prefix) and n >= first and (not last or n < last))
        folders: dict[str, None] = {}
        if border := args.get("delimiter"):
            below = {n: n.removeprefix(prefix).partition(border) for n in names}
            folders = dict.fromkeys(prefix + part[0] + border for part in below.values() if part[1])
            names = [n for n in names if not below[n][1]]
        begin, size = int(args.get("pageToken", 0)), int(args.get("maxResults", 1000))
        page: dict[str, Any] = {
            "kind": "storage#objects",
            "items": [self._metadata(n) for n in names[begin : begin + size]],
        }
        page |= {"prefixes": list(folders)} if folders else {}
        return page | ({"nextPageToken": str(begin + size)} if begin + size < len(names) else {})

    def _metadata(self, name: str) -> dict[str, Any]:
        content, generation = self._objects[name]
        made = time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime())
        digest = base64.b64encode(md5(content).digest()).decode()
        facts = {"size": str(len(content)), "generation": str(generation), "md5Hash": digest, "metageneration": "1"}
        facts |= {"etag": str(generation), "timeCreated": made, "updated": made, "storageClass": "STANDARD"}
        return {"kind": "storage#object", "id": f"{BUCKET}/{name}", "name": name, "bucket": BUCKET, **facts}
