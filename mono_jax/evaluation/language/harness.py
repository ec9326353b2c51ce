"""The command line of lm-evaluation-harness, extended by the model ``mono_jax``."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from mono_jax.errors import ConfigError

MODEL = "mono_jax"


def run(flags: Sequence[str]) -> None:
    """Runs ``lm_eval run`` with these flags; the model is ``MODEL`` unless they name another.

    Raises ConfigError if the harness is not installed.
    """
    _without_commands()
    try:
        from lm_eval.__main__ import cli_evaluate
        from lm_eval.api.registry import model_registry
    except ImportError as error:
        raise ConfigError(f"lm-evaluation-harness is missing ({error}): pip install '.[lm-eval]'") from None
    if MODEL not in model_registry:
        model_registry.register(MODEL, target="mono_jax.evaluation.language.lm_eval_model:MonoJaxLM")
    named = any(flag == "--model" or flag.startswith(("--model=", "-M")) for flag in flags)
    sys.argv = ["lm_eval", "run", *([] if named else ["--model", MODEL]), *flags]
    cli_evaluate()


def _without_commands() -> None:
    """Removes the started script's folder from the path: it has scripts named like packages the harness imports."""
    script = Path(sys.argv[0]).resolve().parent
    sys.path[:] = [entry for entry in sys.path if not (entry and Path(entry).resolve() == script)]
