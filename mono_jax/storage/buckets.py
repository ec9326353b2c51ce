"""gs:// and s3:// buckets, accessed through TensorStore: credentials, timeouts, and errors on one line.

TensorStore reads and writes the arrays anyway; if it also handles small objects, a run needs only one kind of
credentials and no further package. S3 is configured by the variables that AWS's own tools read (AWS_ENDPOINT_URL,
AWS_REGION, AWS_PROFILE, AWS_ACCESS_KEY_ID, ...), GCS by Google's (GOOGLE_APPLICATION_CREDENTIALS,
STORAGE_EMULATOR_HOST, ...).
"""

from __future__ import annotations

import functools
import os
import re
import socket
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from data_pipelines.errors import StorageError
from data_pipelines.io.storage import patiently

T, R = TypeVar("T"), TypeVar("R")

SCHEMES = ("gs", "s3")
ANSWER_SECONDS = 120.0  # timeout of one request, retries included
ARRAY_SECONDS = 900.0  # timeout of an array, which takes many requests
RETRIES = {
    "max_retries": 4,
    "initial_delay": "200ms",
    "max_delay": "3s",
}  # TensorStore's own retries for each request
_QUIET_SECONDS = "30"  # after which TensorStore's own reader gives up a silent connection
_HOST_KEYS = {
    "gs": ("metadata.google.internal", 80),
    "s3": ("169.254.169.254", 80),
}  # metadata servers with the machine's own credentials


class OutOfRange(Exception):
    """An object ends before the requested range."""


class Unreadable(Exception):
    """The stored data is not a valid part of an array."""


def bucket_spec(scheme: str, bucket: str) -> dict[str, Any]:
    """TensorStore's spec of a bucket as a key-value store. Raises StorageError if there are no credentials."""
    _set_defaults()
    if scheme == "gs":
        if not (emulator := _gcs_emulator()):
            _check_credentials("gs", bucket)
        else:
            os.environ["TENSORSTORE_GCS_HTTP_URL"] = emulator
        return {"driver": "gcs", "bucket": bucket}
    spec: dict[str, Any] = {"driver": "s3", "bucket": bucket}
    if endpoint := os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL"):
        spec |= {"endpoint": endpoint, "aws_region": "us-east-1"}
    if region := os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION"):
        spec["aws_region"] = region
    if "AWS_ACCESS_KEY_ID" in os.environ:
        return spec | {"aws_credentials": {"type": "environment"}}  # avoids a search that complains about missing files
    _check_credentials("s3", bucket)
    return spec


def _set_defaults() -> None:
    for name in ("TENSORSTORE_CURL_LOW_SPEED_TIME_SECONDS", "TENSORSTORE_CURL_CONNECT_TIMEOUT_SECONDS"):
        os.environ.setdefault(name, _QUIET_SECONDS)
    os.environ.setdefault("TENSORSTORE_CURL_LOW_SPEED_LIMIT_BYTES", "1")


def _gcs_emulator() -> str:
    """The emulator's address, from the variables of both libraries that read gs://; "" = none."""
    if address := os.environ.get("TENSORSTORE_GCS_HTTP_URL", ""):
        return address
    address = os.environ.get("STORAGE_EMULATOR_HOST", "")
    return address if not address or "://" in address else f"http://{address}"


def _check_credentials(scheme: str, bucket: str) -> None:
    """Raises StorageError if there are none anywhere: TensorStore would search, print many lines of complaints, and
    continue."""
    home = Path.home()
    if scheme == "gs":
        variables = ("GOOGLE_APPLICATION_CREDENTIALS", "GOOGLE_AUTH_TOKEN_FOR_TESTING")
        files = [
            Path(os.environ.get("CLOUDSDK_CONFIG", home / ".config/gcloud"), "application_default_credentials.json")
        ]
        fix = "run 'gcloud auth application-default login', or set GOOGLE_APPLICATION_CREDENTIALS"
    else:
        variables = (
            *("AWS_PROFILE", "AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE", "AWS_WEB_IDENTITY_TOKEN_FILE"),
            *("AWS_CONTAINER_CREDENTIALS_RELATIVE_URI", "AWS_CONTAINER_CREDENTIALS_FULL_URI"),
        )
        files = [home / ".aws/credentials", home / ".aws/config"]
        fix = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or run 'aws configure'"
    if any(name in os.environ for name in variables) or any(file.is_file() for file in files) or _on_cloud(scheme):
        return
    raise denied(f"{scheme}://{bucket}", f"no credentials: {fix}")


@functools.cache
def _on_cloud(scheme: str) -> bool:
    """Whether this machine can ask its cloud for credentials."""
    if scheme == "s3" and os.environ.get("AWS_EC2_METADATA_DISABLED", "").lower() == "true":
        return False
    host, _, port = os.environ.get("GCE_METADATA_ROOT", "").partition(":") if scheme == "gs" else ("", "", "")
    address = (host, int(port or 80)) if host else _HOST_KEYS[scheme]
    try:
        socket.create_connection(address, timeout=2).close()
    except OSError:
        return False
    return True


def denied(url: str, detail: str) -> StorageError:
    """A StorageError that retrying will not change."""
    error = StorageError(url, detail)
    error.exhausted = True
    return error


@functools.cache
def context() -> Any:
    """TensorStore's context for all requests of this process."""
    import tensorstore as ts

    return ts.Context({"gcs_request_retries": RETRIES, "s3_request_retries": RETRIES})


def asked(url: str, question: Callable[[], Any], seconds: float = ANSWER_SECONDS) -> Any:
    """The result of the future that ``question`` returns, retried as by ``storage.patiently``.

    Raises StorageError (immediately if access is denied or something does not exist), OutOfRange and Unreadable.
    """

    def ask() -> Any:
        try:
            return question().result(timeout=seconds)
        except StorageError:
            raise
        except TimeoutError:
            raise StorageError(url, f"no answer within {seconds:.0f} s") from None
        except Exception as error:  # TensorStore raises ValueError for nearly everything
            if str(error).startswith("OUT_OF_RANGE"):
                raise OutOfRange from None
            if str(error).startswith(("FAILED_PRECONDITION", "NOT_FOUND: Error opening")):
                raise Unreadable(_line(str(error))) from None
            raise _storage_error(url, str(error)) from None

    return patiently(ask)


def in_threads(function: Callable[[T], R], items: Iterable[T], threads: int = 8) -> list[R]:
    """``[function(item) for item in items]``, several at a time; after an error no further calls are started."""
    pool = ThreadPoolExecutor(threads)
    try:
        return list(pool.map(function, items))
    finally:
        pool.shutdown(cancel_futures=True)


def _storage_error(url: str, text: str) -> StorageError:
    status = re.search(r"\[http_response_code='(\d+)'\]", text)
    line = _line(text) + (f" (HTTP {status[1]})" if status else "")
    if text.startswith(("PERMISSION_DENIED", "UNAUTHENTICATED")) or "credentials" in text:
        return denied(url, f"access denied: {line}: check your credentials")
    if text.startswith(("NOT_FOUND", "Invalid")):
        return denied(url, f"{line}: check the bucket's name")
    return StorageError(url, line)


def _line(text: str) -> str:
    """TensorStore's message without its status and the request's details."""
    text = re.sub(r"\[[\w-]+='.*?(?<!\\)'\]", "", text, flags=re.DOTALL)
    text = re.sub(r"^[A-Z_]+: (All \d+ retry attempts failed: )?", "", " ".join(text.split()))
    return text[:200]
