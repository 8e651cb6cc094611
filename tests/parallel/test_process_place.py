"""The place of a process in a run, from flags and from variables of JobSet, SLURM, Open MPI and TPU pods."""

import re

import pytest
from jax._src import cloud_tpu_init
from jax._src.clusters import cloud_tpu_cluster
from places import seek

from xlam_jax.errors import UserError
from xlam_jax.parallel.distributed import Place

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
