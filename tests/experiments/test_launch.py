"""Launch scripts and lock files: they parse, start a command that exists, and fit the package."""

from __future__ import annotations

import configparser
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from experiments import train
from mono_jax.parallel.distributed import ENVIRONMENT, Cluster, find
from mono_jax.parallel.watch import PEER_LOST
from mono_jax.training.callbacks.stopping import PREEMPTED

ROOT = Path(__file__).parents[2]
LAUNCH = ROOT / "experiments/launch"
SETUP = configparser.ConfigParser()
SETUP.read(ROOT / "setup.cfg")
# The lock file of each set of extras.
LOCKS = {"cpu": "demo dev fast", "gpu_cuda13": "gpu cloud", "gpu_cuda12": "gpu_cuda12 cloud", "tpu": "tpu cloud"}


def requirements(extra: str | None = None) -> list[Requirement]:
    text = SETUP["options.extras_require"][extra] if extra else SETUP["options"]["install_requires"]
    return [Requirement(line) for line in text.splitlines() if line and not line.startswith("#")]


@pytest.mark.parametrize("lock", LOCKS)
def test_locked_versions_are_within_the_bounds(lock: str):
    lines = (ROOT / f"requirements/{lock}.txt").read_text().splitlines()
    locked = [Requirement(line) for line in lines if line and not line.startswith("#")]
    assert all(re.fullmatch(r"==[^,*]+", str(each.specifier)) and not each.url for each in locked)
    for wanted in [*requirements(), *(each for extra in LOCKS[lock].split() for each in requirements(extra))]:
        found = [each for each in locked if canonicalize_name(each.name) == canonicalize_name(wanted.name)]
        assert found, f"{wanted} is not in requirements/{lock}.txt: make lock"
        for each in found:
            assert wanted.specifier.contains(str(each.specifier)[2:]), f"{each} is outside {wanted}: make lock"


def test_the_test_command_installs_the_locked_versions():
    assert "-c requirements/cpu.txt" in (ROOT / "requirements.txt").read_text().splitlines()


@pytest.mark.parametrize("script", ["slurm.sbatch", "tpu_pod.sh"])
def test_shell_scripts_parse(script: str):
    subprocess.run(["bash", "-n", LAUNCH / script], check=True)


def test_slurm_queues_a_stopped_run_again(tmp_path: Path):
    """Runs the script itself, with SLURM commands that record their arguments."""
    for name, body in {"srun": 'echo "srun $*" >> said; exit $CODE', "scontrol": 'echo "scontrol $*" >> said'}.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    for code, restarts, requeued in ((0, 0, 0), (2, 0, 0), (PREEMPTED, 0, 1), (PEER_LOST, 3, 1), (PREEMPTED, 50, 0)):
        (tmp_path / "said").unlink(missing_ok=True)
        env = {"PATH": f"{tmp_path}:/usr/bin:/bin", "CODE": str(code), "SLURM_JOB_ID": "7"}
        env |= {"SLURM_RESTART_COUNT": str(restarts), "PYTHON": "python"}
        command = ["bash", str(LAUNCH / "slurm.sbatch"), "c.py:S1.1", "/runs/a", "--config.steps=5"]
        assert subprocess.run(command, cwd=tmp_path, env=env, check=False).returncode == code
        said = (tmp_path / "said").read_text()
        assert "experiments/train.py --config=c.py:S1.1 --workdir=/runs/a --config.steps=5" in said
        assert said.count("scontrol requeue 7") == requeued


def pod(file: str) -> dict[str, Any]:
    jobs = yaml.safe_load((LAUNCH / file).read_text())["spec"]["replicatedJobs"][0]["template"]["spec"]
    assert jobs["parallelism"] == jobs["completions"] and jobs["backoffLimit"] == 0
    return jobs


@pytest.mark.parametrize("file", ["gke_tpu.yaml", "gke_gpu.yaml"])
def test_jobs_of_kubernetes_start_train(file: str):
    container = pod(file)["template"]["spec"]["containers"][0]
    assert container["args"][0] == "experiments/train.py"
    parsed_by_train(container["args"][1:])
    names = {each["name"] for each in pod(file)["template"]["spec"]["volumes"]}
    assert {mount["name"] for mount in container["volumeMounts"]} == names


def test_pods_with_gpus_find_each_other():
    container = pod("gke_gpu.yaml")["template"]["spec"]["containers"][0]
    said = {each["name"]: each.get("value", "3") for each in container["env"]}
    assert set(said) == set(ENVIRONMENT)
    count = pod("gke_gpu.yaml")["parallelism"]
    assert find(environment=said) == Cluster(said[ENVIRONMENT[0]], count, 3, "environment variables")
    job = yaml.safe_load((LAUNCH / "gke_gpu.yaml").read_text())
    name, replicated = job["metadata"]["name"], job["spec"]["replicatedJobs"][0]["name"]
    assert said[ENVIRONMENT[0]].split(":")[0] == f"{name}-{replicated}-0-0.{name}"


def test_skypilot_starts_train_on_every_node(tmp_path: Path):
    task = yaml.safe_load((LAUNCH / "skypilot.yaml").read_text())
    script = task["run"].replace(".venv/bin/python", "printf '%s\\n'")
    env = {"PATH": "/usr/bin:/bin", "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2", "SKYPILOT_NUM_NODES": "2"}
    env |= {"SKYPILOT_NODE_RANK": "1", "CONFIG": "c.py", "WORKDIR": "/data/run"}
    said = subprocess.run(["bash", "-ec", script], env=env, capture_output=True, text=True, check=True).stdout
    args = parsed_by_train(said.splitlines()[1:])
    found = find(args["coordinator"], args["processes"], args["process"])
    assert found == Cluster("10.0.0.1:12345", 2, 1, "flags")


def test_the_image_installs_what_exists():
    text = (LAUNCH / "Dockerfile").read_text()
    for target, lock in re.findall(r"TARGET=(\w+) --build-arg LOCK=(\w+)", text):
        assert target in SETUP["options.extras_require"] and (ROOT / f"requirements/{lock}.txt").is_file()
    assert "requirements/${LOCK}.txt" in text


@pytest.mark.parametrize("file", sorted(path.name for path in LAUNCH.iterdir()))
def test_configs_that_comments_name_build(file: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(ROOT)
    for config in re.findall(r"experiments/configs/[\w.]+\.py\S*", (LAUNCH / file).read_text()):
        assert train.config_file.load(config).stage


def parsed_by_train(arguments: list[str]) -> dict[str, Any]:
    """The flags as parsed by train.py, which exits if one is unknown."""
    seen: dict[str, Any] = {}

    class Seen(Exception):
        pass

    def look(parser: Any, argv: list[str], *_: Any) -> None:
        parser.add_argument("--config")
        seen.update(vars(parser.parse_args(argv)))
        raise Seen

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Seen):
        patch.setattr(train.config_file, "parse", look)
        train.main(arguments)
    return seen
