"""Hosts that are killed, hang, fail or are asked to stop: the others end, and name the lost one."""

import signal
import socket
import time

import pytest
from host_processes import Group

from xlam_jax.errors import STOPPED
from xlam_jax.launch import free_ports
from xlam_jax.parallel.link import LOST


@pytest.mark.parametrize(
    ("lost", "signal_sent", "why"),
    [
        (2, signal.SIGKILL, "closed its connection without a message: it was killed"),
        (0, signal.SIGKILL, "closed its connection without a message: it was killed"),
        pytest.param(1, signal.SIGSTOP, "sent no heartbeat for 6 s: it hangs", marks=pytest.mark.nightly),
        pytest.param(0, signal.SIGSTOP, "sent no heartbeat for 6 s: it hangs", marks=pytest.mark.nightly),
    ],
)
def test_a_lost_host_is_named_by_all_others(group: Group, lost: int, signal_sent: signal.Signals, why: str):
    group.start(4, port=free_ports())
    group.met()
    gone = group.started.pop(lost)
    gone.send_signal(signal_sent)
    ended = group.ended()
    gone.kill()
    gone.communicate()
    for code, _, err in ended:
        assert code == LOST
        assert [line.startswith(f"error: host {lost} (") and why in line for line in err.splitlines()] == [True], err


@pytest.mark.parametrize("heard", [True, False])
def test_a_host_that_fails_says_why_to_all(group: Group, heard: bool):
    group.start(3, port=free_ports())
    group.met()
    failing = group.started[1]
    assert failing.stderr
    if not heard:  # its terminal is gone
        failing.stderr.close()
        failing.stderr = None
    failing.send_signal(signal.SIGUSR1)
    me = f"host 1 ({socket.gethostname()})"
    for process, (code, _, err) in enumerate(group.ended()):
        if process != 1:
            assert code == 1  # not the code of a lost host: a restart would reach the same error
            assert err == f"error: {me} stopped: RuntimeError: boom; this host ends with code 1\n"
        else:
            assert code == 1
            assert not heard or err.startswith("Traceback")
            assert not heard or err.endswith(f"error: {me}: RuntimeError: boom\n")


def test_a_host_that_is_stopped_early_stops_all(group: Group):
    group.start(3, port=free_ports())
    group.met()
    group.started[1].send_signal(signal.SIGUSR2)
    me = f"host 1 ({socket.gethostname()})"
    for process, (code, _, err) in enumerate(group.ended()):
        assert code == STOPPED
        if process == 1:
            assert err == f"{me}: stopped by SIGUSR2 before the first step\n"
        else:
            assert err.startswith(
                f"{me} stopped: stopped by SIGUSR2 before the first step; this host ends with code 75, so"
            )


def test_all_stop_after_the_same_step_when_one_is_asked(group: Group):
    group.start(4, port=free_ports())
    group.met()
    time.sleep(0.5)
    group.started[2].terminate()
    ended = group.ended()
    assert [(code, err) for code, _, err in ended] == [(0, "")] * 4
    assert len({out for _, out, _ in ended}) == 1
