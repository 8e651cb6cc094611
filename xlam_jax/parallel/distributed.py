"""Where the other processes of a run are: from flags, or from the variables that a launcher sets; and joining them.

Two ports of host 0 are used: the coordinator's, which is JAX's own, and the next one, for `link`.
"""

import argparse
import hashlib
import json
import math
import os
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from xlam_jax.errors import UserError
from xlam_jax.parallel.link import SECRET, Hosts, Hub, Link, connect, host_name, relay

FLAGS = ("--coordinator", "--num-processes", "--process-id")
PORT = 8476
"""Of the coordinator, where a launcher leaves the choice."""
LOCAL = ("localhost", "127.0.0.1")
"""Names of a coordinator that other machines cannot reach: then the ports are open to this machine alone."""
OF_JOBS = 61440
"""From here on JAX derives ports from the numbers of jobs, one each; ours are two each, so that jobs that follow each
other can share a node."""
SHOWN = 10
"""Differences that a message lists at most."""
LAG = 10.0
"""Seconds that a network file system may take to show what another host has written."""
NO_PROXY = "no_grpc_proxy"
"""The variable that keeps gRPC from asking a web proxy for other processes."""
FOREVER = 10**6
"""Seconds: JAX's own check of heartbeats is never to come before that of `link`, which says who is lost."""


class Place(NamedTuple):
    """This process among those of a run."""

    told_by: str
    """Who said so, for the log."""
    host: str
    """Of process 0, as it is reached from here."""
    port: int
    processes: int
    process: int
    devices: list[int] | None = None
    """Which of this machine's GPUs are this process's; None: all that it sees."""

    def __str__(self) -> str:
        return f"process {self.process} of {self.processes}, coordinator {self.host}:{self.port} ({self.told_by})"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of a run of several processes."""
    group = parser.add_argument_group("several processes", "needed only where no launcher is recognized")
    group.add_argument("--coordinator", metavar="HOST:PORT", help="address at which process 0 can be reached")
    group.add_argument("--num-processes", type=int, metavar="N", help="how many there are")
    group.add_argument("--process-id", type=int, metavar="I", help="which one this is, from 0 on")
    group.add_argument(
        "--join-timeout", type=float, default=300, metavar="S", help="seconds to wait for the others (default: 300)"
    )


def find(arguments: argparse.Namespace, environment: Mapping[str, str]) -> Place | None:
    """Finds this process's place; None for a run of one process.

    Looked at in this order: the flags; JobSet (Kubernetes); SLURM; Open MPI; a TPU pod. Raises `UserError` for flags or
    variables that do not go together.
    """
    given = [arguments.coordinator, arguments.num_processes, arguments.process_id]
    if any(one is not None for one in given):
        missing = [flag for flag, one in zip(FLAGS, given, strict=True) if one is None]
        if missing:
            raise UserError(f"{' and '.join(missing)} missing: {', '.join(FLAGS)} are given together or not at all")
        place = _explicit("flags", *given)
    else:
        known = (_jobset, _slurm, _open_mpi, _tpu_pod)
        place = next((place for one in known if (place := one(environment, arguments.join_timeout))), None)
    return place if place and place.processes > 1 else None


def _explicit(told_by: str, coordinator: str, processes: int, process: int) -> Place:
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65535:
        raise UserError(f"--coordinator is {coordinator!r}; HOST:PORT is needed, such as node0:{PORT}")
    if not 0 <= process < processes:
        raise UserError(f"--process-id is {process}, and --num-processes {processes}; ids go from 0 to {processes - 1}")
    return Place(told_by, host.strip("[]"), int(port), processes, process)


def _jobset(environment: Mapping[str, str], _: float) -> Place | None:
    """Kubernetes JobSet: pod 0 of the first job is the coordinator, at the name that the headless service gives it.

    Kubernetes itself sets JOB_COMPLETION_INDEX; the manifest passes on the others, as configs/launch/jobset.yaml does.
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
    return _explicit(f"JobSet {name}", f"{name}-{job}-0-0.{name}:{PORT}", count, process)


def _slurm(environment: Mapping[str, str], timeout: float) -> Place | None:
    """SLURM, inside `srun`: JAX knows how to read the list of nodes."""
    if "SLURM_STEP_NODELIST" not in environment or _number(environment, "SLURM_NTASKS", 1) < 2:
        return None
    alone = _number(environment, "SLURM_NTASKS") == _number(environment, "SLURM_STEP_NUM_NODES", 0)
    local = None if alone else _number(environment, "SLURM_LOCALID", 0)
    return _detected("slurm", f"SLURM job {environment.get('SLURM_JOB_ID', '?')}", timeout, _share(environment, local))


def _open_mpi(environment: Mapping[str, str], timeout: float) -> Place | None:
    """Open MPI, inside `mpirun`; from version 5 on it does not say where rank 0 is."""
    if _number(environment, "OMPI_COMM_WORLD_SIZE", 1) < 2:
        return None
    size, rank = (_number(environment, f"OMPI_COMM_WORLD_{name}") for name in ("SIZE", "RANK"))
    alone = _number(environment, "OMPI_COMM_WORLD_LOCAL_SIZE", 1) == 1
    devices = _share(environment, None if alone else _number(environment, "OMPI_COMM_WORLD_LOCAL_RANK", 0))
    if "OMPI_MCA_orte_hnp_uri" in environment and "MASTER_ADDR" not in environment:
        return _detected("ompi", "Open MPI", timeout, devices)
    if "MASTER_ADDR" not in environment:
        raise UserError(
            f"Open MPI, rank {rank} of {size}: this version does not say where rank 0 is; pass it on: "
            f"mpirun -x MASTER_ADDR=HOST …, or give {', '.join(FLAGS)}"
        )
    address = f"{environment['MASTER_ADDR']}:{_number(environment, 'MASTER_PORT', PORT)}"
    return _explicit("Open MPI", address, size, rank)._replace(devices=devices)


def _tpu_pod(environment: Mapping[str, str], timeout: float) -> Place | None:
    """A TPU VM of a slice of several, or a pod of GKE without JobSet's variables: from the metadata that JAX reads."""
    if environment.get("JAX_PLATFORMS", "tpu").split(",")[0] not in ("tpu", ""):
        return None
    import jax  # noqa: F401  it looks for chips when it is imported
    from jax._src.cloud_tpu_init import running_in_cloud_tpu_vm

    return _detected(None, "TPU pod", timeout, None) if running_in_cloud_tpu_vm else None


def _detected(method: str | None, told_by: str, timeout: float, devices: list[int] | None) -> Place | None:
    """What JAX's own detection says."""
    from jax._src.clusters import ClusterEnv

    try:
        found = ClusterEnv.auto_detect_unset_distributed_params(None, None, None, None, method, int(timeout))
    except (KeyError, ValueError, RuntimeError, OSError) as error:
        raise UserError(f"{told_by}: its variables can't be read ({error!r}); give {', '.join(FLAGS)}") from None
    address, count, process, _ = found
    if address is None or count is None or process is None:
        return None
    host, _, port = address.rpartition(":")
    if port.isdigit() and int(port) >= OF_JOBS:
        port = OF_JOBS + 2 * ((int(port) - OF_JOBS) % 2047)
    return _explicit(told_by, f"{host}:{port}", count, process)._replace(devices=devices)


def _share(environment: Mapping[str, str], local: int | None) -> list[int] | None:
    """Where a node runs several processes and each sees all its GPUs, the one with this process's number."""
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
    """Meets the other processes, compares `facts`, which must be the same on all of them, and starts JAX among them;
    touches no device.

    Raises `UserError` when not all are there within `timeout` seconds; ends all of them when they differ.
    """
    if place is None:
        return Hosts()
    secret = os.environ.get(SECRET, "")
    if place.process == 0:
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
    """Starts JAX's own coordination. What it does when a host is lost is kept out of the way of `link`."""
    import jax

    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.config.update("jax_enable_preemption_service", False)  # it would take SIGTERM; `Hosts.stops` is for that
    everywhere = "[::]" if socket.has_dualstack_ipv6() else "0.0.0.0"
    bound = "127.0.0.1" if place.host in LOCAL else everywhere
    port = place.port
    if place.process:
        port = relay(lambda: connect((place.host, place.port), timeout))
    jax.config.update("jax_check_proxy_envs", False)  # they do not matter here:
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
        heartbeat_timeout_seconds=FOREVER,
        shutdown_timeout_seconds=60,
    )


def digest(text: str) -> str:
    """A short name of a text by its content."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def agree(hosts: Hosts, mine: Mapping[str, Any]) -> None:
    """Raises `UserError` on every host when what they found differs, with each value and who has it.

    All hosts call it together.
    """
    text = json.dumps(mine, sort_keys=True, default=str)
    if len(set(hosts.gather(digest(text)))) == 1:
        return
    found: list[dict[str, Any]] = hosts.gather(json.loads(text))
    lines = []
    for key in sorted(set().union(*found)):
        by_value: dict[str, list[int]] = {}
        for process, one in enumerate(found):
            by_value.setdefault(json.dumps(one[key]) if key in one else "missing", []).append(process)
        if len(by_value) > 1:
            each = (f"{value} on {_listed(hosts, which)}" for value, which in by_value.items())
            lines.append(f"{key}: " + ", ".join(each))
    more = [f"and {len(lines) - SHOWN} more"] if len(lines) > SHOWN else []
    raise UserError(
        "the hosts differ; start all of them with the same code, config and data:\n  "
        + "\n  ".join([*lines[:SHOWN], *more])
    )


def _listed(hosts: Hosts, processes: Sequence[int]) -> str:
    shown = " and ".join(host_name(one, hosts.names[one]) for one in processes[:2])
    return shown + (f" and {len(processes) - 2} more" if len(processes) > 2 else "")


def check_shared(hosts: Hosts, file: Path) -> None:
    """Raises `UserError` on every host when one of them does not see a file that host 0 has written just now."""
    written = hosts.gather(_read(file))[0]
    until = time.monotonic() + LAG
    while _read(file) != written and time.monotonic() < until:
        time.sleep(0.1)
    blind = [process for process, seen in enumerate(hosts.gather(_read(file) == written)) if not seen]
    if blind:
        raise UserError(
            f"{file.parent}: what host 0 writes is not seen by {_listed(hosts, blind)}; output_dir must be on a file "
            "system that all hosts share"
        )


def _read(file: Path) -> str | None:
    return digest(file.read_text(encoding="utf-8")) if file.exists() else None
