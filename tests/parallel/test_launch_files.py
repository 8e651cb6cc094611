"""The files in configs/launch: their scripts run, they fit the schemas of their systems, and set what is read."""

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from places import seek
from support import ROOT

from xlam_jax import config as configs
from xlam_jax import train
from xlam_jax.errors import STOPPED
from xlam_jax.parallel import distributed
from xlam_jax.parallel.distributed import Place, find
from xlam_jax.parallel.link import LOST

FILES = ROOT / "configs/launch"


def commands(text: str) -> list[str]:
    """Returns the training commands of a launch file, with continuation lines joined."""
    return re.findall(r"-m xlam_jax\.train(.*)", text.replace("\\\n", " "))


@pytest.mark.parametrize("name", ["tpu_vm.sh", "slurm.sbatch"])
def test_scripts_are_bash(name: str):
    subprocess.run(["bash", "-n", FILES / name], check=True)


def test_the_tpu_script_passes_arguments_on(tmp_path: Path):
    """Fakes gcloud, which runs the workers' commands here, and python, which records its arguments."""
    bin_, home, received = (tmp_path / name for name in ("bin", "home", "received"))
    scripts = {
        "gcloud": 'case $4 in scp) cp -r "$6" "$HOME" ;; ssh) cd "$HOME" && bash -c "${@: -1}" ;; esac',
        "python3": "exit 0",
        "python": f'printf "%s\\n" "$@" >> {received}; codes=(0 3 75 0); '
        f"exit ${{codes[$(grep -c xlam_jax.train {received})]}}",
        "sleep": "exit 0",
    }
    uv = home / ".local/bin/uv"
    uv.parent.mkdir(parents=True)
    programs = {bin_ / name: body for name, body in scripts.items()}
    for path, body in (programs | {uv: "mkdir -p .venv/bin; > .venv/bin/activate"}).items():
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"#!/bin/bash\n{body}\n")
        path.chmod(0o755)
    done = subprocess.run(
        [FILES / "tpu_vm.sh", "slice", "zone", "--config", "a b.yaml", "data.sources=[{name: x, files: ['*.jsonl']}]"],
        cwd=ROOT, env={"PATH": f"{bin_}:/usr/bin:/bin", "HOME": str(home)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (
        received.read_text().splitlines()
        == ["-m", "xlam_jax.train", "--config", "a b.yaml", "data.sources=[{name: x, files: ['*.jsonl']}]"] * 3
    )
    assert (home / "xlam_jax/pyproject.toml").exists()


@pytest.mark.parametrize(
    ("codes", "state", "requeued"),
    [
        ([0, 0], "RUNNING", False),
        ([3, 3], "RUNNING", True),
        ([137, 3], "RUNNING", True),
        ([75, 75], "RUNNING", True),
        ([75, 75], "COMPLETING", False),  # after scancel
        ([2, 2], "RUNNING", False),
        ([3, 1], "RUNNING", False),
        ([1, 137], "RUNNING", False),
    ],
)
def test_the_slurm_script_continues_what_was_lost_or_stopped(
    tmp_path: Path, codes: list[int], state: str, requeued: bool
):
    programs = {
        # like srun: one task per node, and the highest exit code
        "srun": f"""
            while [[ $1 == --* ]]; do echo "$1" >> {tmp_path}/options; shift; done
            highest=0
            for code in {" ".join(map(str, codes))}; do
                CODE=$code "$@"; code=$?; ((code > highest)) && highest=$code
            done
            exit $highest""",
        "python": f'echo "$@" >> {tmp_path}/called; exit $CODE',
        "squeue": f"echo {state}",
        "scontrol": f'echo "$@" > {tmp_path}/requeued',
    }
    for name, body in programs.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    env = {"PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_JOB_ID": "12", "SLURM_CPUS_PER_TASK": "32"}
    done = subprocess.run(["bash", FILES / "slurm.sbatch", "--config", "a b"], env=env, check=False)
    assert done.returncode == (1 if 1 in codes else max(codes))
    assert (tmp_path / "requeued").exists() == requeued
    assert (tmp_path / "called").read_text() == "-m xlam_jax.train --config a b\n" * 2
    assert "--cpus-per-task=32" in (tmp_path / "options").read_text().split()


# ---- the schemas of the systems that read them ----------------------------------------------------------------------


SCHEMAS = Path(__file__).parent / "launch_schemas"


def schema(name: str) -> dict[str, Any]:
    return json.loads((SCHEMAS / name).read_text(encoding="utf-8"))


def closed(node: Any) -> Any:
    """Returns a Kubernetes schema without additional properties, as the API server applies it with `kubectl
    --validate=strict`."""
    if not isinstance(node, dict):
        return node
    node = {key: closed(value) for key, value in node.items()}
    if "properties" in node:
        node["properties"] = {name: closed(value) for name, value in node["properties"].items()}
        node.setdefault("additionalProperties", False)
    if node.pop("x-kubernetes-int-or-string", False):
        node["type"] = ["integer", "string"]
    return node


def test_the_jobset_fits_its_schema():
    jobset = yaml.safe_load((FILES / "jobset.yaml").read_text())
    validator = jsonschema.Draft202012Validator(closed(schema("jobset.json")))
    validator.validate(jobset)
    jobset["spec"]["failurePolicy"]["maxRestart"] = 20
    with pytest.raises(jsonschema.ValidationError, match="maxRestart"):
        validator.validate(jobset)


def test_the_jobset_is_started_again_but_for_errors():
    jobset = yaml.safe_load((FILES / "jobset.yaml").read_text())
    job = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]
    (rule,) = job["podFailurePolicy"]["rules"]
    assert rule["action"] == "FailJob"
    assert rule["onExitCodes"] == {"containerName": "train", "operator": "In", "values": [1, 2]}
    assert job["backoffLimit"] == 0  # any other code fails the job too, and JobSet restarts all of them
    (other,) = jobset["spec"]["failurePolicy"]["rules"]
    assert (other["action"], other["onJobFailureReasons"]) == ("FailJobSet", ["PodFailurePolicy"])


def test_the_skypilot_task_fits_its_schema():
    task = yaml.safe_load((FILES / "skypilot.yaml").read_text())
    schemas = schema("skypilot.json")
    jsonschema.validate(task, schemas["task"])
    jsonschema.validate(task["resources"], schemas["resources"])
    # SkyPilot restarts if the exit code of any node is one of these; after an error, all nodes have its code
    assert task["resources"]["job_recovery"] == {"recover_on_exit_codes": [LOST, STOPPED]}
    with pytest.raises(jsonschema.ValidationError, match="recover_on_exit_code'"):
        jsonschema.validate({"job_recovery": {"recover_on_exit_code": [3]}}, schemas["resources"])


def test_the_slurm_script_uses_options_that_exist():
    options, text = schema("slurm.json"), (FILES / "slurm.sbatch").read_text()
    of_sbatch = re.findall(r"^#SBATCH --([\w-]+)", text, re.MULTILINE)
    (called,) = re.findall(r"^srun (.*?) bash", text, re.MULTILINE)
    of_srun = re.findall(r"--([\w-]+)", called)
    assert len(of_sbatch) > 5
    assert len(of_srun) > 2
    assert set(of_sbatch) <= set(options["sbatch"])
    assert set(of_srun) <= set(options["srun"])


def test_the_slurm_script_starts_one_process_a_node():
    text = (FILES / "slurm.sbatch").read_text()
    options = dict(re.findall(r"^#SBATCH --([\w-]+)(?:=(.*))?$", text, re.MULTILINE))
    assert options["ntasks-per-node"] == "1"
    assert options["signal"].startswith("TERM@")
    assert "srun" in text


def test_the_jobset_sets_what_is_read(monkeypatch: pytest.MonkeyPatch):
    (jobset,) = yaml.safe_load_all((FILES / "jobset.yaml").read_text())
    (job,) = jobset["spec"]["replicatedJobs"]
    spec = job["template"]["spec"]
    (container,) = spec["template"]["spec"]["containers"]
    labels = {
        "jobset.sigs.k8s.io/jobset-name": jobset["metadata"]["name"],
        "jobset.sigs.k8s.io/replicatedjob-name": job["name"],
        "jobset.sigs.k8s.io/job-index": "0",
    }
    environment = {"JOB_COMPLETION_INDEX": "15"}  # set by Kubernetes for an Indexed job
    assert spec["completionMode"] == "Indexed"
    for one in container["env"]:
        if "value" in one:
            environment[one["name"]] = one["value"]
        else:
            path = one["valueFrom"]["fieldRef"]["fieldPath"]
            environment[one["name"]] = labels[path.removeprefix("metadata.annotations['").removesuffix("']")]
    assert seek(environment, monkeypatch) == Place("JobSet xlam", "xlam-workers-0-0.xlam", 8476, 16, 15)
    assert spec["completions"] == spec["parallelism"] == int(environment["PODS_PER_JOB"])
    assert int(environment["NUM_PROCESSES"]) == job["replicas"] * spec["completions"]
    assert {port["containerPort"] for port in container["ports"]} == {distributed.PORT, distributed.PORT + 1}
    assert spec["template"]["spec"]["restartPolicy"] == "Never"
    assert container["command"][:3] == ["python", "-m", "xlam_jax.train"]
    parsed = train.parser().parse_intermixed_args(container["command"][3:])
    configs.load(parsed.config, parsed.overrides)


def test_the_skypilot_task_sets_the_flags(monkeypatch: pytest.MonkeyPatch):
    task = yaml.safe_load((FILES / "skypilot.yaml").read_text())
    (command,) = commands(task["run"])
    said = subprocess.run(
        ["bash", "-c", f"printf '%s\\n' {command}"], capture_output=True, text=True, check=True,
        env={"SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2", "SKYPILOT_NUM_NODES": "2", "SKYPILOT_NODE_RANK": "1",
             "PATH": "/usr/bin:/bin"},
    ).stdout  # fmt: skip
    words = said.splitlines()
    parsed = train.parser().parse_intermixed_args(words)
    configs.load(parsed.config, parsed.overrides)
    assert find(parsed, {}) == Place("flags", "10.0.0.1", 8476, 2, 1)


def test_the_page_names_every_file():
    page = (ROOT / "docs/launch.md").read_text(encoding="utf-8")
    for path in FILES.iterdir():
        assert f"configs/launch/{path.name}" in page
    assert "docs/launch.md" in (ROOT / "README.md").read_text(encoding="utf-8")
