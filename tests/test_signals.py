"""Effects of signals on a run: the first stops it, a second Ctrl-C ends it, and no traceback is printed."""

import signal
import subprocess
import sys
from collections.abc import Sequence

import pytest
from support import ROOT, deadline

PROGRAM = """
import hashlib, signal, sys, time
from xlam_jax import cli, errors
from xlam_jax.signals import Stop

if sys.argv[1] != "ignored":  # as at a prompt; what a shell starts in the background ignores SIGINT
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)

def main():
    if sys.argv[1] == "without":
        print("ready", flush=True)
        time.sleep(1000)
    with Stop() as stop:
        if sys.argv[1] != "early":
            stop.save_first(lambda line: print(line, file=sys.stderr, flush=True))
        print("ready", flush=True)
        if sys.argv[1] == "late":
            hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)  # as a long step: no handler in Python runs meanwhile
        while not stop.requested:
            time.sleep(0.01)
        print("saved", stop.name, flush=True)
        return errors.STOPPED

cli.run(main)
"""


def run(
    case: str, *numbers: signal.Signals, until: Sequence[str] = (), before: Sequence[str] = ()
) -> tuple[int, str, str]:
    """Runs a program and sends it signals, one after the other; the first after `until` appears on its stderr."""
    process = subprocess.Popen(
        [*before, sys.executable, "-c", PROGRAM, case],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout
    assert process.stderr
    assert process.stdout.readline() == "ready\n"
    said = ""
    for number in numbers:
        process.send_signal(number)
        for text in until:
            if text not in said:
                said += process.stderr.readline()
    out, err = process.communicate(timeout=deadline(120))
    return process.returncode, out, said + err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_the_first_signal_saves_and_ends(number: signal.Signals):
    code, out, err = run("loop", number)
    assert (code, out) == (75, f"saved {number.name}\n")
    assert "Traceback" not in err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_before_the_first_step_ends_at_once(number: signal.Signals):
    message = f"stopped by {number.name} before the first step; run the same command to start again\n"
    assert run("early", number) == (75, "", message)


def test_a_second_ctrl_c_ends_a_long_step_at_once():
    code, out, err = run("late", signal.SIGINT, signal.SIGINT, until=["SIGINT: the run saves after this step and ends"])
    assert (code, out) == (130, "")
    assert err.endswith("interrupted twice: ended at once, nothing was saved\n")
    assert "Traceback" not in err


def test_a_signal_that_is_ignored_stays_ignored():
    """As in processes started with nohup."""
    code, out, _ = run("ignored", signal.SIGHUP, signal.SIGTERM, before=["sh", "-c", 'trap "" HUP; exec "$@"', "sh"])
    assert (code, out) == (75, "saved SIGTERM\n")


def test_ctrl_c_prints_no_traceback_in_any_command():
    assert run("without", signal.SIGINT) == (130, "", "interrupted\n")
