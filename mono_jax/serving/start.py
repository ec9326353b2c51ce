"""``experiments/serve.py``: from a model folder to a server, and its shutdown."""

from __future__ import annotations

import dataclasses
import importlib.util
import ipaddress
import os
import resource
from collections.abc import Mapping, Sequence
from typing import Any

from mono_jax import cli
from mono_jax.errors import ConfigError, GenerationError

PACKAGES = ("fastapi", "uvicorn", "prometheus_client", "aiohttp")  # of the extra "serve"
KEY = "MONO_JAX_API_KEY"


def check_packages() -> None:
    """Raises ConfigError that names the extra if one of its packages is not installed."""
    if missing := [name for name in PACKAGES if importlib.util.find_spec(name) is None]:
        raise ConfigError(f"serving needs {', '.join(missing)}: pip install '.[serve]'")


def keys_of(given: Sequence[str] | None, environment: Mapping[str, str]) -> list[str]:
    """The API keys of the flags, or else the variable. Raises ConfigError for an empty key: it would admit anyone."""
    where, keys = ("--api_key", given) if given else (KEY, environment[KEY].split(",") if KEY in environment else [])
    keys = [key.strip() for key in keys]
    if not all(keys):
        raise ConfigError(f"{where} has an empty key: give one, or leave {where} out to admit everyone")
    return keys


def raise_open_files() -> int:
    """Lets this process open as many files as the system permits, since each connection is one.

    Returns how many; 0: any number.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    except (OSError, ValueError):  # a system with a lower limit than the one that it names
        hard = soft
    return 0 if hard == resource.RLIM_INFINITY else hard


def serve(args: Any) -> tuple[dict[str, Any], bool]:
    """Serves until it is stopped.

    Returns what ``--json`` prints, and whether a thread hangs, so that the process would not end by itself. Raises
    GenerationError once the engine has failed, so that a process supervisor can start another one.
    """
    check_packages()
    from mono_jax.generation.chat import PROMPT_FLAGS
    from mono_jax.serving.api.requests.fetching import Fetcher
    from mono_jax.serving.api.server import Server, bind, run
    from mono_jax.serving.api.service import Service
    from mono_jax.serving.api.settings import ApiConfig
    from mono_jax.serving.contract import EngineConfig
    from mono_jax.serving.engine import Engine

    config, api = cli.config_of(args, EngineConfig), cli.config_of(args, ApiConfig)
    keys = keys_of(args.api_key, os.environ)
    place = bind(args.host, args.port)  # a port that is taken is noticed now; connections are refused until warmed up
    prompt = {name: getattr(args, name) for name in PROMPT_FLAGS}
    engine = Engine.open(args.model, config, name=args.name, tokenizer=args.tokenizer, **prompt)
    engine.start()
    try:
        of_images = raise_open_files() // 2  # the others are for clients
        fetcher = Fetcher(api.max_body, api.fetch_timeout_s, connections=of_images) if api.image_urls else None
        service = Service(engine, api, fetcher)
        host, port = place.getsockname()[:2]
        url = f"http://{f'[{host}]' if ':' in host else host}:{port}"

        def ready() -> None:
            print(f"{engine.name} is served at {url}/v1, with a page at {url}/", flush=True)
            if not keys and not ipaddress.ip_address(host).is_loopback:
                print(f"anyone who can reach {host} can use the model: --api_key or {KEY} requires a key", flush=True)

        run(Server(service, keys, ready, failed=lambda: engine.closed is not None), place)
        failure = engine.closed
    finally:
        engine.close(drain=False)
    if failure is not None:
        raise GenerationError(failure)
    stats = dataclasses.asdict(engine.stats())
    wanted = ("requests", "refused", "tokens_in", "tokens_cached", "tokens_out", "compilations")
    return {"model": engine.name, "url": url, **{name: stats[name] for name in wanted}}, service.hangs
