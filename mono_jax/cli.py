"""What the commands of ``experiments`` share: ``data_pipelines.cli``, with the errors of ``mono_jax`` on one line as
well.

A command's ``main(argv=None)`` parses with ``parser(__doc__, EXAMPLES)``, then imports what it needs, makes one call
and, with ``--json``, ends with ``json_line(result)``. ``run(main)`` runs it.
"""

from __future__ import annotations

import argparse
import contextlib
import os
from collections.abc import Callable
from typing import Any, NoReturn, TypeVar, get_args

from data_pipelines import cli as command
from data_pipelines.cli import USER_ERROR, fail, json_line
from data_pipelines.cli import make_parser as parser
from data_pipelines.strict.fields import default_of, fields_of, kinds_of, rule_of
from mono_jax.errors import ClusterError, MonoJaxError

Config = TypeVar("Config")

__all__ = [
    "USER_ERROR",
    "add_cluster_flags",
    "add_config_flags",
    "add_format_flags",
    "add_prompt_flags",
    "alone",
    "byte_size",
    "config_of",
    "fail",
    "joined",
    "json_line",
    "parser",
    "positive",
    "run",
]


def run(main: Callable[[], int | None]) -> NoReturn:
    """``data_pipelines.cli.run`` that also handles the errors of ``mono_jax``."""
    command.run(main, errors=(MonoJaxError,))


def add_cluster_flags(to: argparse.ArgumentParser) -> None:
    """Flags of commands that several processes run together; see ``mono_jax.parallel.distributed``."""
    group = to.add_argument_group(
        "several processes",
        "detected on SLURM, Open MPI, TPU pods and GKE; otherwise give these to each process, or set the JAX_... "
        "variables",
    )
    group.add_argument("--coordinator", metavar="HOST:PORT", help="address of process 0 (JAX_COORDINATOR_ADDRESS)")
    group.add_argument("--processes", type=int, metavar="N", help="number of processes (JAX_NUM_PROCESSES)")
    group.add_argument("--process", type=int, metavar="I", help="index of this process, 0 to N - 1 (JAX_PROCESS_ID)")


def add_format_flags(to: argparse.ArgumentParser) -> None:
    """How prompts are built; the defaults come from the model's folder; see ``mono_jax.generation.chat.open_model``."""
    add = to.add_argument
    add("--max_tiles", type=positive, help="maximum tiles of an image (the model's own)")
    add("--template", help="chat template (the model's own)")
    add("--system_message", help='the system turn (the template\'s own); "" = none')
    add("--tokenizer", metavar="PATH", help="folder or file (default: in the model's folder)")


def add_prompt_flags(to: argparse.ArgumentParser) -> None:
    """``add_format_flags``, and how the model computes."""
    add_format_flags(to)
    add = to.add_argument
    add("--dtype", choices=("bfloat16", "float32"), help="default: bfloat16, on a CPU float32")
    add("--max_length", type=positive, default=32768, help="most tokens of a prompt and its answer (%(default)s)")


def add_config_flags(to: Any, cls: type) -> None:
    """Adds a flag for each field of a config of numbers, strings and booleans; ``config_of`` reads them.

    to: a parser, or a group of one.
    """
    for name, spec in fields_of(cls).items():
        default, rule = default_of(spec), rule_of(spec)
        about: dict[str, Any] = {"default": default, "help": rule.help.replace("%", "%%") + " (%(default)s)"}
        if isinstance(default, bool):
            to.add_argument(f"--{name}", action=argparse.BooleanOptionalAction, **about)
        else:
            choices = get_args(kinds_of(cls)[name]) or None  # of a Literal
            metavar = None if choices else "N" if isinstance(default, int | float) else "TEXT"
            to.add_argument(f"--{name}", type=type(default), choices=choices, metavar=metavar, **about)


def config_of(args: argparse.Namespace, cls: type[Config]) -> Config:
    """The config that the flags describe; raises what ``cls`` raises for invalid values."""
    return cls(**{name: getattr(args, name) for name in fields_of(cls)})


def joined(args: argparse.Namespace) -> contextlib.AbstractContextManager[bool]:
    """Joins the other processes of the run by the flags of ``add_cluster_flags``; yields whether this is the first
    process."""
    from mono_jax.parallel import distributed  # after parsing: --help does not need it

    return distributed.joined(distributed.find(args.coordinator, args.processes, args.process))


def alone(command: str, args: argparse.Namespace | None = None) -> None:
    """Raises ClusterError if several processes were started, because they would overwrite each other's files.

    ``args``: of a command with ``add_cluster_flags``.
    """
    from mono_jax.parallel import distributed

    flags = () if args is None else (args.coordinator, args.processes, args.process)
    environment = dict(os.environ)
    if not distributed.started_by_srun(environment):
        environment.pop("SLURM_NTASKS", None)  # this is the batch script's own process, whatever else the job may start
    if (cluster := distributed.find(*flags, environment=environment)) is not None:
        raise ClusterError(
            f"{command} runs in one process, but several were started (found by {cluster.found_by}): start only one, "
            "or set JAX_NUM_PROCESSES=1 if there is only one"
        )


def positive(text: str) -> int:
    """The type of an argument that is a whole number, at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: give a whole number, at least 1")
    return int(text)


def byte_size(text: str) -> int:
    """The type of an argument that is a number of bytes: 5GB, 500MB, 1e9."""
    units = {"KB": 10**3, "MB": 10**6, "GB": 10**9}
    number, unit = (text[:-2], units[text[-2:].upper()]) if text[-2:].upper() in units else (text, 1)
    try:
        size = int(float(number) * unit)
    except ValueError:
        size = 0
    if size <= 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size: write 5GB, 500MB or a number of bytes")
    return size
