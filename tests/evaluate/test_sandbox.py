"""The sandbox for a model's code: escapes, limits, and messages on machines that do not allow a sandbox."""

import json
import os
import platform
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from escapes import ESCAPES, MEMORY_MB, OUTLIVES
from support import ROOT, wait_until

from xlam_jax.evaluate import sandbox

needs_sandbox = pytest.mark.skipif(bool(sandbox.find_problem()), reason=f"no sandbox here: {sandbox.find_problem()}")
NOBODY = """
set -e
keep=$1; shift; blocked=$1; shift
at=0
for path in "$@"; do at=$((at + 1)); mkdir "$keep/$at"; mount --bind "$path" "$keep/$at"; done
for folder in $blocked; do mount -t tmpfs -o mode=755 tmpfs "$folder"; done
at=0
for path in "$@"; do at=$((at + 1)); mkdir -p "$path"; mount --bind "$keep/$at" "$path"; done
exec setpriv --reuid=65534 --regid=65534 --clear-groups "$PYTHON" -B "$SCRIPT"
"""
"""Runs a script as nobody, in separate mounts in which nobody can search the folders above Python's."""


def script(user: str, folder: Path) -> list[str]:
    """Returns the command that runs `escapes.py` as a user."""
    path = str(ROOT / "tests/evaluate/escapes.py")
    if os.geteuid():
        if user == "root":
            pytest.skip("root is not available: only other users are tested")
        return [sys.executable, "-B", path]
    if user == "root":
        return [sys.executable, "-B", path]
    if not shutil.which("setpriv") or not shutil.which("unshare"):
        pytest.skip("setpriv or unshare (util-linux) is missing; they are needed to run as nobody")
    packages = [Path(place) for place in sys.path if place and Path(place).is_dir()]
    paths = {Path(sys.base_prefix), Path(sys.prefix), ROOT, *packages}
    paths = [place for place in paths if not any(place != other and place.is_relative_to(other) for other in paths)]
    blocked = {above for place in paths for above in place.parents if not above.stat().st_mode & 0o001}
    hidden = [str(place) for place in paths if any(place.is_relative_to(above) for above in blocked)]
    (keep := folder / "keep").mkdir()
    outer = " ".join(
        str(place) for place in blocked if not any(place != other and other in place.parents for other in blocked)
    )
    return ["unshare", "--mount", "sh", "-c", NOBODY, "sh", str(keep), outer, *hidden]


@needs_sandbox
@pytest.mark.parametrize("user", ["root", "nobody"])
def test_no_code_escapes_or_exceeds_its_limits(user: str, tmp_path: Path) -> None:
    assert len(ESCAPES) >= 64
    variables = os.environ | {"PYTHONPATH": str(ROOT), "PYTHON": sys.executable}
    variables["SCRIPT"] = str(ROOT / "tests/evaluate/escapes.py")
    process = subprocess.run(script(user, tmp_path), capture_output=True, text=True, env=variables, cwd="/")
    assert process.returncode == 0, process.stderr
    result: dict[str, Any] = json.loads(process.stdout)
    assert "problem" not in result, result
    assert {name: output for name, output in result["outputs"].items() if "ESCAPED" in output} == {}
    assert result["after"] == result["before"]
    for name, usage in result["usage"].items():
        assert usage["processes"] <= 2, name  # the outer one waits, the inner one runs the code
        assert usage["threads"] <= 66, name
        assert usage["peak"] < MEMORY_MB + 64, name
    for name in OUTLIVES:
        assert result["outputs"][name].startswith("Timed out")


ENDLESS = """
import asyncio
from xlam_jax.evaluate.sandbox import Sandbox

async def run():
    async with Sandbox(seconds=1000) as session:
        print(await session.run("1 + 1"), flush=True)
        await session.run("while True: pass")

asyncio.run(run())
"""


@needs_sandbox
def test_code_ends_with_the_process_that_started_it() -> None:
    with subprocess.Popen([sys.executable, "-c", ENDLESS], stdout=subprocess.PIPE, cwd=ROOT, text=True) as starter:
        assert starter.stdout
        assert starter.stdout.readline() == "2\n"
        children = Path(f"/proc/{starter.pid}/task/{starter.pid}/children")
        (outside,) = map(int, children.read_text().split())
        (inside,) = map(int, Path(f"/proc/{outside}/task/{outside}/children").read_text().split())
        starter.send_signal(signal.SIGKILL)
    wait_until(lambda: not is_running(outside) and not is_running(inside))


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


@needs_sandbox
@pytest.mark.parametrize("kind", ["user", "net", "pid"])
def test_a_limit_of_namespaces_is_not_reported_as_a_full_disk(kind: str) -> None:
    code = "from xlam_jax.evaluate import sandbox; print(sandbox.find_problem())"
    inner = f'echo 0 > /proc/sys/user/max_{kind}_namespaces && exec "$0" -c "$1"'
    command = ["unshare", "--user", "--map-root-user", "sh", "-c", inner, sys.executable, code]
    process = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    if process.returncode:
        pytest.skip(f"the limit cannot be set here: {process.stderr}")
    assert process.stdout == (
        f"unshare ({kind} namespace): No space left on device; not the disk: the limit of namespaces is reached; "
        f"raise it: sysctl user.max_{kind}_namespaces (now 0)\n"
    )


def test_no_sandbox_without_a_filter_for_the_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    from xlam_jax.evaluate import _isolate

    for machine in ("x86_64", "aarch64"):
        assert len(_isolate.system_call_filter(machine)) % 8 == 0
    monkeypatch.setattr(platform, "machine", lambda: "riscv64")
    with pytest.raises(OSError, match="riscv64"):
        _isolate.system_call_filter(platform.machine())
