"""Finds the other processes of a run, from flags or from the variables that a launcher sets, and joins them.

A run uses two ports of host 0: that of JAX's coordinator, and the next one, for the control channel (`link`).
"""

import argparse
import json
import math
import os
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from xlam_jax.digest import hex_digest
from xlam_jax.errors import UserError
from xlam_jax.parallel.link import SECRET, Hosts, Link, connect, host_name, relay

FLAGS = ("--coordinator", "--num-processes", "--process-id")
PORT = 8476
"""Default port of the coordinator."""
LOCAL = ("localhost", "127.0.0.1")
"""Names of a coordinator that other machines can't reach: the ports then accept connections from this machine only."""
JOB_PORTS = 61440
"""JAX derives the port from a launcher's job id: one port per job, from this one on. We need two per job, so that jobs
with successive ids can share a node."""
SHOWN = 10
"""Maximum number of differences that a message lists."""
LAG = 10.0
"""Seconds after which a file that one host wrote must be visible to all others on a network file system."""
NO_PROXY = "no_grpc_proxy"
"""Environment variable with the addresses that gRPC connects to without a web proxy."""
DISABLED = 10**6
"""Heartbeat timeout of JAX's coordinator in seconds: it must not act before `link`, which names the lost host."""


class Place(NamedTuple):
    """This process among those of a run."""

    source: str
    """Launcher or flags that the other fields come from; for the log."""
    host: str
    """Address of process 0."""
    port: int
    """Port of JAX's coordinator on process 0; the control channel uses the next one."""
    processes: int
    process: int
    devices: list[int] | None = None
    """Indices of this machine's GPUs that belong to this process; None: all that are visible."""

    def __str__(self) -> str:
        return f"process {self.process} of {self.processes}, coordinator {self.host}:{self.port} ({self.source})"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of a run of several processes."""
    group = parser.add_argument_group("several processes", "only needed if no launcher is detected")
    group.add_argument("--coordinator", metavar="HOST:PORT", help="address at which process 0 can be reached")
    group.add_argument("--num-processes", type=int, metavar="N", help="number of processes")
    group.add_argument("--process-id", type=int, metavar="I", help="index of this process, from 0")
    group.add_argument(
        "--join-timeout", type=float, default=300, metavar="S", help="seconds to wait for the others (default: 300)"
    )


def find(arguments: argparse.Namespace, environment: Mapping[str, str]) -> Place | None:
    """Returns this process's place, or None for a run of one process.

    Sources in order of precedence: the flags; JobSet (Kubernetes); SLURM; Open MPI; a TPU pod. Raises `UserError` for
    flags or variables that are incomplete or contradict each other.
    """
    values = [arguments.coordinator, arguments.num_processes, arguments.process_id]
    if any(value is not None for value in values):
        missing = [flag for flag, value in zip(FLAGS, values, strict=True) if value is None]
        if missing:
            raise UserError(f"{' and '.join(missing)} missing: {', '.join(FLAGS)} are given together or not at all")
        place = _make_place("flags", *values)
    else:
        launchers = (_find_jobset, _find_slurm, _find_open_mpi, _find_tpu_pod)
        places = (launcher(environment, arguments.join_timeout) for launcher in launchers)
        place = next(filter(None, places), None)
    return place if place and place.processes > 1 else None


def _make_place(source: str, coordinator: str, processes: int, process: int) -> Place:
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65535:
        raise UserError(f"--coordinator is {coordinator!r}; HOST:PORT is needed, such as node0:{PORT}")
    if not 0 <= process < processes:
        raise UserError(f"--process-id is {process}, and --num-processes {processes}; ids go from 0 to {processes - 1}")
    return Place(source, host.strip("[]"), int(port), processes, process)


def _find_jobset(environment: Mapping[str, str], _: float) -> Place | None:
    """Kubernetes JobSet: pod 0 of the first job is the coordinator, under the name that the headless service gives it.

    Kubernetes itself sets JOB_COMPLETION_INDEX; the manifest must set the others, as configs/launch/jobset.yaml does.
    """
    if "JOBSET_NAME" not in environment or "JOB_COMPLETION_INDEX" not in environment:
        return None
    name, job = environment["JOBSET_NAME"], environment.get("REPLICATED_JOB_NAME", "workers")
    if "NUM_PROCESSES" not in environment:
        raise UserError(
            "JOBSET_NAME is set and NUM_PROCESSES is not; set it to the number of pods in the JobSet's spec"
        )
    count = _number(environment, "NUM_PROCESSES")
    pods = _number(environment, "PODS_PER_JOB", count)
    process = _number(environment, "JOB_INDEX", 0) * pods + _number(environment, "JOB_COMPLETION_INDEX")
    return _make_place(f"JobSet {name}", f"{name}-{job}-0-0.{name}:{PORT}", count, process)


def _find_slurm(environment: Mapping[str, str], timeout: float) -> Place | None:
    """SLURM, inside `srun`. JAX parses the node list."""
    if "SLURM_STEP_NODELIST" not in environment or _number(environment, "SLURM_NTASKS", 1) < 2:
        return None
    one_per_node = _number(environment, "SLURM_NTASKS") == _number(environment, "SLURM_STEP_NUM_NODES", 0)
    devices = _pick_gpu(environment, None if one_per_node else _number(environment, "SLURM_LOCALID", 0))
    return _detect("slurm", f"SLURM job {environment.get('SLURM_JOB_ID', '?')}", timeout, devices)


def _find_open_mpi(environment: Mapping[str, str], timeout: float) -> Place | None:
    """Open MPI, inside `mpirun`. Since version 5 it does not provide the address of rank 0."""
    if _number(environment, "OMPI_COMM_WORLD_SIZE", 1) < 2:
        return None
    size, rank = (_number(environment, f"OMPI_COMM_WORLD_{name}") for name in ("SIZE", "RANK"))
    one_per_node = _number(environment, "OMPI_COMM_WORLD_LOCAL_SIZE", 1) == 1
    devices = _pick_gpu(environment, None if one_per_node else _number(environment, "OMPI_COMM_WORLD_LOCAL_RANK", 0))
    if "OMPI_MCA_orte_hnp_uri" in environment and "MASTER_ADDR" not in environment:
        return _detect("ompi", "Open MPI", timeout, devices)
    if "MASTER_ADDR" not in environment:
        raise UserError(
            f"Open MPI, rank {rank} of {size}: this version does not say where rank 0 is; pass it on: "
            f"mpirun -x MASTER_ADDR=HOST …, or give {', '.join(FLAGS)}"
        )
    address = f"{environment['MASTER_ADDR']}:{_number(environment, 'MASTER_PORT', PORT)}"
    return _make_place("Open MPI", address, size, rank)._replace(devices=devices)


def _find_tpu_pod(environment: Mapping[str, str], timeout: float) -> Place | None:
    """A TPU VM in a slice of several, or a GKE pod without JobSet's variables. JAX reads the metadata."""
    if environment.get("JAX_PLATFORMS", "tpu").split(",")[0] not in ("tpu", ""):
        return None
    import jax  # noqa: F401  its import looks for TPU chips
    from jax._src.cloud_tpu_init import running_in_cloud_tpu_vm  # there is no public name

    return _detect(None, "TPU pod", timeout, None) if running_in_cloud_tpu_vm else None


def _detect(method: str | None, source: str, timeout: float, devices: list[int] | None) -> Place | None:
    """Returns the place that JAX's cluster detection reports."""
    from jax._src.clusters import ClusterEnv  # there is no public name

    try:
        address, count, process, _ = ClusterEnv.auto_detect_unset_distributed_params(
            None, None, None, None, method, int(timeout)
        )
    except (KeyError, ValueError, RuntimeError, OSError) as error:
        raise UserError(f"{source}: its variables can't be read ({error!r}); give {', '.join(FLAGS)}") from None
    if address is None or count is None or process is None:
        return None
    host, _, port = address.rpartition(":")
    if port.isdigit() and int(port) >= JOB_PORTS:
        port = JOB_PORTS + 2 * ((int(port) - JOB_PORTS) % 2047)
    return _make_place(source, f"{host}:{port}", count, process)._replace(devices=devices)


def _pick_gpu(environment: Mapping[str, str], local: int | None) -> list[int] | None:
    """Returns the GPU with this process's index on its node, `local`, if each process of the node sees all GPUs."""
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    return None if local is None or (visible is not None and "," not in visible) else [local]


def _number(environment: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = environment.get(name)
    if text is None and default is not None:
        return default
    if text is None or not text.isdigit():
        raise UserError(f"the variable {name} is {text!r}, and a number is needed; give {', '.join(FLAGS)} instead")
    return int(text)


def join(place: Place | None, timeout: float, facts: Mapping[str, Any]) -> Hosts:
    """Waits for the other processes, compares `facts`, and initializes JAX's distributed runtime; uses no device.

    `facts` must be the same on all hosts: ends all of them if they differ. Raises `UserError` if not all hosts join
    within `timeout` seconds.
    """
    if place is None:
        return Hosts()
    secret = os.environ.get(SECRET, "")
    if place.process == 0:
        from xlam_jax.parallel.hub import Hub  # asyncio takes a while to import

        Hub(place.port + 1, place.processes, timeout=timeout, secret=secret, local=place.host in LOCAL)
    address = ("localhost" if place.process == 0 else place.host, place.port + 1)
    hosts = Link(address, place.process, place.processes, timeout=timeout, secret=secret)
    try:
        if hosts.first:
            print(f"{hosts.me} is {place}", file=sys.stderr, flush=True)
        agree(hosts, facts)
        _initialize(place, timeout)
    except BaseException as error:
        hosts.fail(error)
    return hosts


def _initialize(place: Place, timeout: float) -> None:
    """Initializes JAX's coordination, so that `link` and not JAX acts when a host is lost."""
    import jax

    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.config.update("jax_enable_preemption_service", False)  # it takes over SIGTERM; see `Hosts.stops`
    everywhere = "[::]" if socket.has_dualstack_ipv6() else "0.0.0.0"
    bound = "127.0.0.1" if place.host in LOCAL else everywhere
    port = place.port
    if place.process:
        port = relay(lambda: connect((place.host, place.port), timeout))
    jax.config.update("jax_check_proxy_envs", False)  # no proxy is used:
    direct = os.environ.get(NO_PROXY)
    os.environ[NO_PROXY] = f"{direct},127.0.0.1" if direct else "127.0.0.1"
    jax.distributed.initialize(
        coordinator_address=f"127.0.0.1:{port}",
        num_processes=place.processes,
        process_id=place.process,
        local_device_ids=place.devices,
        cluster_detection_method="deactivate",
        coordinator_bind_address=f"{bound}:{place.port}",
        initialization_timeout=math.ceil(timeout),
        heartbeat_timeout_seconds=DISABLED,
        shutdown_timeout_seconds=60,
    )


def agree(hosts: Hosts, facts: Mapping[str, Any]) -> None:
    """Checks that `facts` are the same on all hosts; all hosts call it together.

    Raises `UserError` on every host if they differ, with each value and the hosts that have it.
    """
    text = json.dumps(facts, sort_keys=True, default=str)
    if len(set(hosts.gather(hex_digest(text, length=16)))) == 1:
        return
    by_host: list[dict[str, Any]] = hosts.gather(json.loads(text))
    lines = []
    for key in sorted(set().union(*by_host)):
        by_value: dict[str, list[int]] = {}
        for process, own in enumerate(by_host):
            by_value.setdefault(json.dumps(own[key]) if key in own else "missing", []).append(process)
        if len(by_value) > 1:
            each = (f"{value} on {_list_hosts(hosts, processes)}" for value, processes in by_value.items())
            lines.append(f"{key}: " + ", ".join(each))
    more = [f"and {len(lines) - SHOWN} more"] if len(lines) > SHOWN else []
    raise UserError(
        "the hosts differ; start all of them with the same code, config and data:\n  "
        + "\n  ".join([*lines[:SHOWN], *more])
    )


def _list_hosts(hosts: Hosts, processes: Sequence[int]) -> str:
    names = " and ".join(host_name(process, hosts.names[process]) for process in processes[:2])
    return names + (f" and {len(processes) - 2} more" if len(processes) > 2 else "")


def check_shared(hosts: Hosts, file: Path) -> None:
    """Checks that all hosts see a file that host 0 has just written; all hosts call it together.

    Raises `UserError` on every host if one does not.
    """
    written = hosts.gather(_digest_file(file))[0]
    deadline = time.monotonic() + LAG
    while _digest_file(file) != written and time.monotonic() < deadline:
        time.sleep(0.1)
    visible = hosts.gather(_digest_file(file) == written)
    if not all(visible):
        blind = [process for process, sees in enumerate(visible) if not sees]
        raise UserError(
            f"{file.parent}: what host 0 writes is not seen by {_list_hosts(hosts, blind)}; output_dir must be on a "
            "file system that all hosts share"
        )


def _digest_file(file: Path) -> str | None:
    return hex_digest(file.read_text(encoding="utf-8"), length=16) if file.exists() else None
