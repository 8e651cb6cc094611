"""Finding a process's place from flags and launcher variables; agreement between hosts; the launch files."""

import io
import json
import re
import shutil
import socket
import subprocess
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import jsonschema
import pytest
import yaml
from jax._src import cloud_tpu_init
from jax._src.clusters import cloud_tpu_cluster
from support import ROOT, deadline

from xlam_jax import config as configs
from xlam_jax import train
from xlam_jax.errors import STOPPED, UserError
from xlam_jax.launch import free_ports
from xlam_jax.parallel import distributed
from xlam_jax.parallel.distributed import Place, agree, check_shared, find
from xlam_jax.parallel.hub import Hub
from xlam_jax.parallel.link import LOST, Hosts, Link
from xlam_jax.progress import Progress
from xlam_jax.training import run_folder
from xlam_jax.training.facts import code_digest, facts_of_run
from xlam_jax.training.restore import restore_newest
from xlam_jax.training.save import Checkpoints
from xlam_jax.weights import checkpoint

JOBSET = {
    "JOBSET_NAME": "xlam",
    "REPLICATED_JOB_NAME": "workers",
    "JOB_INDEX": "1",
    "JOB_COMPLETION_INDEX": "2",
    "NUM_PROCESSES": "8",
    "PODS_PER_JOB": "4",
}
SLURM = {
    "SLURM_JOB_ID": "4097",
    "SLURM_STEP_NODELIST": "gpu[003,007-009],big1",
    "SLURM_STEP_NUM_NODES": "4",
    "SLURM_NTASKS": "4",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "0",
}
SHARED_NODES = SLURM | {
    "SLURM_NTASKS": "16",
    "SLURM_PROCID": "6",
    "SLURM_LOCALID": "2",
    "CUDA_VISIBLE_DEVICES": "0,1,2,3",
}
MPI = {
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
}
MPI_4 = MPI | {"OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911"}
GKE_TPU = {
    "JAX_PLATFORMS": "tpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost,host-b",
    "TPU_WORKER_ID": "1",
    "MEGASCALE_COORDINATOR_ADDRESS": "localhost",
    "MEGASCALE_NUM_SLICES": "2",
    "MEGASCALE_SLICE_ID": "1",
}


def seek(environment: Mapping[str, str], monkeypatch: pytest.MonkeyPatch, *flags: object) -> Place | None:
    """Returns the place found with these variables and flags only."""
    for name in list(distributed.os.environ):
        if re.match("JOBSET|JOB_|SLURM|OMPI|MASTER|TPU_|CUDA_VIS|MEGASCALE", name):
            monkeypatch.delenv(name)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    parsed = train.parser().parse_args(["--config", "x", "--join-timeout", "5", *map(str, flags)])
    return find(parsed, environment)


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        (JOBSET, Place("JobSet xlam", "xlam-workers-0-0.xlam", 8476, 8, 6)),
        (SLURM, Place("SLURM job 4097", "gpu003", 61442, 4, 3)),
        (SLURM | {"SLURM_JOB_ID": "4095"}, Place("SLURM job 4095", "gpu003", 61442, 4, 3)),
        (SHARED_NODES, Place("SLURM job 4097", "gpu003", 61442, 16, 6, [2])),
        (SHARED_NODES | {"CUDA_VISIBLE_DEVICES": "2"}, Place("SLURM job 4097", "gpu003", 61442, 16, 6)),
        (MPI | {"MASTER_ADDR": "node0"}, Place("Open MPI", "node0", 8476, 4, 1, [1])),
        (MPI | {"MASTER_ADDR": "node0", "MASTER_PORT": "99"}, Place("Open MPI", "node0", 99, 4, 1, [1])),
        (MPI | {"MASTER_ADDR": "node0", "OMPI_COMM_WORLD_LOCAL_SIZE": "1"}, Place("Open MPI", "node0", 8476, 4, 1)),
        (MPI_4, Place("Open MPI", "10.96.0.1", 63808, 4, 1, [1])),
        ({}, None),
        (SLURM | {"SLURM_NTASKS": "1"}, None),
        (MPI | {"OMPI_COMM_WORLD_SIZE": "1"}, None),
        (JOBSET | {"NUM_PROCESSES": "1", "PODS_PER_JOB": "1", "JOB_INDEX": "0", "JOB_COMPLETION_INDEX": "0"}, None),
    ],
)  # fmt: skip
def test_launchers(monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], expected: Place | None):
    assert seek({"JAX_PLATFORMS": "cpu"} | environment, monkeypatch) == expected


def test_neighbouring_jobs_of_a_node_share_no_port(monkeypatch: pytest.MonkeyPatch):
    ports: list[int] = []
    for job in range(5000, 5010):
        place = seek({"JAX_PLATFORMS": "cpu"} | SLURM | {"SLURM_JOB_ID": str(job)}, monkeypatch)
        assert place
        ports += [place.port, place.port + 1]
    assert len(set(ports)) == 20
    assert all(1024 < port < 65536 for port in ports)


@pytest.fixture
def tpu_vm(monkeypatch: pytest.MonkeyPatch) -> None:
    """Simulates what JAX detects on import on a TPU VM."""
    for module in (cloud_tpu_init, cloud_tpu_cluster):
        monkeypatch.setattr(module, "running_in_cloud_tpu_vm", True)


@pytest.mark.usefixtures("tpu_vm")
def test_a_tpu_pod_in_gke(monkeypatch: pytest.MonkeyPatch):
    assert seek(GKE_TPU, monkeypatch) == Place("TPU pod", "localhost", 8482, 4, 3)
    alone = {"TPU_WORKER_HOSTNAMES": "localhost", "MEGASCALE_NUM_SLICES": "1"}
    alone |= {"TPU_WORKER_ID": "0", "MEGASCALE_SLICE_ID": "0"}
    assert seek(GKE_TPU | alone, monkeypatch) is None


@pytest.mark.usefixtures("tpu_vm")
def test_a_tpu_pod_of_vms(monkeypatch: pytest.MonkeyPatch):
    metadata = {"agent-worker-number": "2", "tpu-env": "ZONE: 'z'", "worker-network-endpoints": "localhost,b,c,d"}
    monkeypatch.setattr(cloud_tpu_cluster, "get_metadata", lambda key: (metadata[key], 200))
    assert seek({"JAX_PLATFORMS": ""}, monkeypatch) == Place("TPU pod", "localhost", 8482, 4, 2)
    assert seek({"JAX_PLATFORMS": "cpu"}, monkeypatch) is None


@pytest.mark.parametrize("environment", [JOBSET, SLURM, MPI_4, {}])
def test_flags_come_first(monkeypatch: pytest.MonkeyPatch, environment: dict[str, str]):
    flags = ["--coordinator", "[fd00::1]:80", "--num-processes", 2, "--process-id", 1]
    assert seek(environment, monkeypatch, *flags) == Place("flags", "fd00::1", 80, 2, 1)


def test_which_process_this_is():
    assert str(Place("flags", "node0", 8476, 4, 1)) == "process 1 of 4, coordinator node0:8476 (flags)"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--coordinator", "a:1"], "--num-processes and --process-id missing: --coordinator, --num-processes,"),
        (["--process-id", 0], "--coordinator and --num-processes missing"),
        (["--coordinator", "a", "--num-processes", 2, "--process-id", 0], "--coordinator is 'a'; HOST:PORT is needed"),
        (["--coordinator", ":1", "--num-processes", 2, "--process-id", 0], "--coordinator is ':1'"),
        (["--coordinator", "a:65535", "--num-processes", 2, "--process-id", 0], "--coordinator is 'a:65535'"),
        (["--coordinator", "a:1", "--num-processes", 2, "--process-id", 2], "--process-id is 2, and --num-processes 2"),
        (["--coordinator", "a:1", "--num-processes", 0, "--process-id", 0], "--process-id is 0, and --num-processes 0"),
    ],
)
def test_wrong_flags(monkeypatch: pytest.MonkeyPatch, flags: list[object], message: str):
    with pytest.raises(UserError, match=re.escape(message)):
        seek({}, monkeypatch, *flags)


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        (MPI, "Open MPI, rank 1 of 4: this version does not say where rank 0 is; pass it on: mpirun -x MASTER_ADDR="),
        (MPI | {"OMPI_COMM_WORLD_SIZE": "four"}, "the variable OMPI_COMM_WORLD_SIZE is 'four', and a number is needed"),
        ({k: v for k, v in JOBSET.items() if k != "NUM_PROCESSES"}, "JOBSET_NAME is set and NUM_PROCESSES is not"),
        (JOBSET | {"NUM_PROCESSES": "4"}, "--process-id is 6, and --num-processes 4"),
        (SLURM | {"SLURM_PROCID": "x"}, "SLURM job 4097: its variables can't be read"),
        (MPI_4 | {"OMPI_MCA_orte_hnp_uri": "?"}, "Open MPI: its variables can't be read"),
    ],
)
def test_variables_that_do_not_fit(monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], message: str):
    with pytest.raises(UserError, match=re.escape(message)):
        seek({"JAX_PLATFORMS": "cpu"} | environment, monkeypatch)


# ---- what hosts compare ---------------------------------------------------------------------------------------------


def together(values: list[Any], ask: Any) -> list[str | None]:
    """Calls `ask(hosts, value)` on one host per value; returns each host's error message, None for none."""
    port = free_ports()
    Hub(port, len(values), timeout=deadline(20))

    def one(process: int) -> str | None:
        hosts = Link(("localhost", port), process, len(values), timeout=deadline(20))
        try:
            ask(hosts, values[process])
        except UserError as error:
            return str(error)
        finally:
            hosts.close()
        return None

    with ThreadPoolExecutor(len(values)) as pool:
        return list(pool.map(one, range(len(values))))


def test_hosts_agree():
    assert together([{"a": [1, None], "b": 2.5}] * 3, agree) == [None] * 3
    agree(Hosts(), {"a": 1})


def test_hosts_that_differ_are_told_all_values_and_who_has_them():
    values = [{"same": 0, "rate": 0.1, "only": True}, {"same": 0, "rate": 0.2}, {"same": 0, "rate": 0.1}]
    name = socket.gethostname()
    assert set(together([*values, values[2]], agree)) == {
        "the hosts differ; start all of them with the same code, config and data:\n"
        f"  only: true on host 0 ({name}), missing on host 1 ({name}) and host 2 ({name}) and 1 more\n"
        f"  rate: 0.1 on host 0 ({name}) and host 2 ({name}) and 1 more, 0.2 on host 1 ({name})"
    }


def test_many_differences_are_counted():
    first, second = ({f"key {at:02}": at + host for at in range(15)} for host in range(2))
    message = together([first, second], agree)[0]
    assert message
    assert len(message.splitlines()) == 12
    assert message.endswith("\n  and 5 more")


def test_what_is_compared(short_config: Path, tmp_path: Path):
    def facts(*overrides: str) -> dict[str, Any]:
        return facts_of_run(configs.load(short_config, ["output_dir=x", *overrides]))

    reference = facts()
    for same in ("train.log_every=7", "data.cache=/elsewhere", "track.to=[tensorboard]"):
        assert facts(same) == reference
    differ = ("train.learning_rate=0.5", "seed=1", "mesh.tensor=2", "model.overrides.hidden_size=64", "output_dir=y")
    for other in differ:
        assert facts(other) != reference


def test_code_is_compared_by_content(tmp_path: Path):
    for name in ("xlam_jax/parallel", "converters"):
        (tmp_path / name).mkdir(parents=True)
    empty = code_digest(tmp_path)
    (tmp_path / "converters/one.py").write_text("1")
    first = code_digest(tmp_path)
    (tmp_path / "converters/one.py").write_text("2")
    assert len({empty, first, code_digest(tmp_path)}) == 3


def test_a_folder_that_one_host_does_not_see(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(distributed, "LAG", 0.3)
    files = [tmp_path / str(host) / "config.yaml" for host in range(3)]
    for host in (0, 1):
        files[host].parent.mkdir()
        files[host].write_text("a")
    messages = together(list(files), check_shared)
    assert all(message and f"what host 0 writes is not seen by host 2 ({socket.gethostname()})" in message
               for message in messages)  # fmt: skip
    # a network file system may lag
    late = threading.Timer(0.1, lambda: (files[2].parent.mkdir(), files[2].write_text("a")))
    monkeypatch.setattr(distributed, "LAG", 5.0)
    late.start()
    assert together(list(files), check_shared) == [None] * 3


def test_the_newest_checkpoint_that_all_see_is_taken(tmp_path: Path):
    def seen(steps: Sequence[Sequence[int]]) -> tuple[list[int], list[str], list[str | None]]:
        runs = [tmp_path / "-".join(map(str, ("run", *own))) for own in steps]
        for run, own in zip(runs, steps, strict=True):
            for step in own:
                (run / "checkpoints" / str(step) / "params").mkdir(parents=True, exist_ok=True)
            (run / "checkpoints" / "99.orbax-checkpoint-tmp").mkdir(parents=True, exist_ok=True)  # incomplete
        taken, log = [], io.StringIO()

        def ask(hosts: Hosts, run: Path) -> None:
            taken.append(run_folder.newest_step(run, hosts, Progress(log, quiet=not hosts.first).line))

        messages = together(runs, ask)
        return taken, log.getvalue().splitlines(), messages

    assert seen([[], []]) == ([0, 0], [], [None, None])
    assert seen([[3, 6], [3, 6]]) == ([6, 6], [], [None, None])
    taken, reports, _ = seen([[3, 6], [3, 6, 9], [3, 6]])
    name = socket.gethostname()
    assert taken == [6, 6, 6]
    assert len(reports) == 1
    assert f"host 1 ({name}) sees 3, 6, 9" in reports[0]
    assert reports[0].endswith("continuing from 6, which all of them see")
    taken, _, messages = seen([[3, 6], []])
    assert taken == []
    assert all(message and f"host 1 ({name}) sees none); output_dir must be on a file system" in message
               for message in messages)  # fmt: skip


def test_hosts_fall_back_together(tmp_path: Path):
    """If one host finds a damaged checkpoint, all hosts take the older one."""
    saves = Checkpoints(tmp_path / "0", keep=2, metadata={})
    for step in (1, 2):
        saves.save(step, {"params": {"w": jnp.full(8, step)}}, {})
    saves.wait()
    saves.close()
    shutil.copytree(tmp_path / "0", tmp_path / "1")
    (tmp_path / "1/checkpoints/2/params/manifest.ocdbt").write_bytes(b"")
    restored, said = [], io.StringIO()

    def restore(hosts: Hosts, run: Path) -> None:
        report = Progress(said, quiet=not hosts.first).line
        items = {"params": {"w": jnp.zeros(8)}}
        restored.append(restore_newest(run, 2, items, on_damage="fallback", hosts=hosts, report=report))

    assert together([tmp_path / "0", tmp_path / "1"], restore) == [None, None]
    assert [(one.step, one.items["params"]["w"].tolist()) for one in restored] == [(1, [1] * 8)] * 2
    assert f"{tmp_path}/1/checkpoints/2 is damaged: params/w can't be read" in said.getvalue()
    assert checkpoint.whole_steps(tmp_path / "0") == [1]  # its first host renames for all


# ---- the files that users start from --------------------------------------------------------------------------------

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
