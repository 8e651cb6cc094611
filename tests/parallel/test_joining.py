"""Hosts that join a run: missing and surplus ones, strangers, other secrets and configs, ports that are in use."""

import contextlib
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from host_processes import AT_MOST, Group
from support import ROOT, Commands, deadline

from xlam_jax.launch import free_ports
from xlam_jax.parallel.hub import WARNINGS, Hub
from xlam_jax.parallel.link import connect


@pytest.mark.nightly
def test_a_host_that_never_comes_is_named(group: Group):
    group.start(4, port=free_ports(), processes=(0, 1, 3), timeout=3)
    for code, _, err in group.ended():
        assert code == 2
        assert err == (
            "error: 3 of 4 processes joined within 3 s; missing: process 2; were all of them started, and can they "
            "reach host 0?\n"
        )


def test_hosts_that_count_differently(group: Group):
    port = free_ports()
    group.start(3, port=port, processes=(0,))
    group.start(2, port=port, processes=(1,))
    for code, _, err in group.ended():
        assert code == 2
        assert err.startswith("error: host 1 (")
        assert "is one of 2 processes, and host 0 expects 3" in err


def test_two_processes_with_one_id(group: Group):
    group.start(3, port=free_ports(), processes=(0, 1, 1))
    for code, _, err in group.ended():
        assert (code, "two processes have the id 1" in err) == (2, True)


STRANGE = [
    b"",
    b"\0" * 100 + b"\n",
    b"GET / HTTP/1.1\r\nHost: here\r\n\r\n",
    b"[" * 100_000 + b"\n",
    b"x" * 100_000,
    b"null\n[1]\n7\n",
    b'{"hello": 1, "name": "x", "count": 3}\n',
    b'{"hello": 1, "name": "x", "count": 9}\n{"failed": "x", "code": 2}\n',
    b'{"hello": 1, "name": "x", "count": 3, "proof": "' + b"0" * 64 + b'"}\n{"bye": true}\n',
    b'{"hello": [], "name": {}, "count": null, "proof": "\xc3\xa9"}\n',
    b'{"failed": "x", "code": 2}\n',
    b'{"step": 1, "asked": true}\n',
]
"""What other programs may send to the port."""


def call_as_strangers(port: int) -> None:
    """Connects and sends the given bytes; some connections then stay open and silent."""
    for sent in STRANGE:
        with socket.create_connection(("localhost", port)) as stranger, contextlib.suppress(OSError):
            stranger.sendall(sent)
            stranger.shutdown(socket.SHUT_WR)
            while stranger.recv(4096):
                pass


@pytest.mark.parametrize("secret", ["", "of this run"])
def test_strangers_do_not_stop_a_run(group: Group, secret: str):
    port = free_ports()
    group.start(3, port=port, processes=(0, 2), secret=secret)
    with connect(("localhost", port), 60):  # says nothing
        call_as_strangers(port)
        group.start(3, port=port, processes=(1,), secret=secret)
        group.met()
        call_as_strangers(port)
        group.start(3, port=port, processes=(1,), secret=secret)  # left over, or of another run
        late = group.started.pop()
        _, err = late.communicate(timeout=AT_MOST)
        assert late.returncode == 2
        assert "arrived after all 3 processes of the run had joined" in err
        group.started[1].terminate()
        ended = group.ended()
    assert [code for code, *_ in ended] == [0] * 3
    assert len({out for _, out, _ in ended}) == 1
    assert ended[0][2].count("warning: refused: ") == WARNINGS
    assert [err for *_, err in ended[1:]] == [""] * 2


def test_a_host_with_another_secret_is_refused_and_the_run_begins_without_it(group: Group):
    port = free_ports()
    group.start(2, port=port, processes=(0,), secret="of this run")
    for wrong in ("", "of another run"):
        group.start(2, port=port, processes=(1,), secret=wrong)
        refused = group.started.pop()
        _, err = refused.communicate(timeout=AT_MOST)
        assert refused.returncode == 2
        assert "has another XLAM_JAX_SECRET than host 0; set the variable to one value on all hosts" in err
    group.start(2, port=port, processes=(1,), secret="of this run")
    group.met()
    group.started[0].terminate()
    assert [code for code, *_ in group.ended()] == [0] * 2


def test_a_coordinator_on_this_machine_is_open_to_it_alone():
    for local, bound in ((True, {"127.0.0.1"}), (False, {"::", "0.0.0.0"})):
        hub = Hub(free_ports(), 2, timeout=0, local=local)
        assert hub.server.getsockname()[0] in bound


def test_processes_of_one_launch_share_a_secret(commands: Commands):
    code = (
        "import sys; from xlam_jax.launch import Processes\n"
        "say = 'import os; print(os.environ[\"XLAM_JAX_SECRET\"])'\n"
        "sys.exit(Processes([[sys.executable, '-c', say]] * 2, [None] * 2).wait())"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stderr == f"[1] {done.stdout}"
    assert len(done.stdout.strip()) == 64


def test_a_port_that_is_taken(group: Group):
    port = free_ports()
    with socket.create_server(("", port)):
        group.start(2, port=port, processes=(0,))
        ((code, _, err),) = group.ended()
    assert (code, f"port {port} of this machine is not available" in err) == (2, True)


@pytest.mark.deadlines
def test_a_coordinator_that_never_answers(commands: Commands, short_config: Path, tmp_path: Path):
    flags = ["--num-processes", 2, "--process-id", 1, "--join-timeout", 1]
    port = free_ports()
    began = time.monotonic()
    said = commands.fails(
        "xlam_jax.train", "--config", short_config, f"output_dir={tmp_path}/run", "--coordinator", f"localhost:{port}",
        *flags,
    )  # fmt: skip
    assert time.monotonic() - began < deadline(5)
    assert f"the coordinator, host 0 at localhost:{port + 1}, did not answer within 1 s" in said
    with socket.create_server(("", port + 1)):  # accepts connections and sends nothing
        said = commands.fails(
            "xlam_jax.train", "--config", short_config, f"output_dir={tmp_path}/run", "--coordinator",
            f"localhost:{port}", *flags,
        )  # fmt: skip
    assert f"host 0 at localhost:{port + 1} accepted the connection and sent nothing for 1 s" in said
    assert not (tmp_path / "run").exists()


def test_hosts_with_different_configs(commands: Commands, short_config: Path, tmp_path: Path):
    where = ["--coordinator", f"localhost:{free_ports()}", "--num-processes", 2]
    started = [
        commands.start(
            "xlam_jax.train", "--config", short_config, f"output_dir={tmp_path}/run", *where, "--process-id", process,
            f"train.learning_rate={rate}", f"data.cache={tmp_path}/{process}",
        )
        for process, rate in enumerate((0.001, 0.002))
    ]  # fmt: skip
    for process in started:
        _, err = process.communicate(timeout=AT_MOST)
        assert process.returncode == 2
        # each host detects it, or learns it from the other
        assert err.count("error: ") - err.count("stopped: the hosts differ") <= 1, err
        assert "Traceback" not in err
        assert "the hosts differ; start all of them with the same code, config and data" in err
        name = socket.gethostname()
        assert f"train.learning_rate: 0.001 on host 0 ({name}), 0.002 on host 1 ({name})" in err
        assert "data.cache" not in err
    assert not (tmp_path / "run").exists()
