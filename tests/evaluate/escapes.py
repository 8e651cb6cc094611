# ruff: noqa: E501
"""Code that tries to escape from the sandbox, or to use more resources than allowed.

Each snippet prints `ESCAPED` when it succeeds. Run as a script, this module executes all of them as the current user
and prints JSON: the output of each, and the state of the machine before and after. `test_sandbox` runs it as root and
as nobody.
"""

import asyncio
import contextlib
import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

MEMORY_MB = 400
"""Memory limit of the sandbox in these tests, in addition to its files."""
SECRET = "XLAM_TEST_SECRET"
PR_SET_CHILD_SUBREAPER = 36

PRELUDE = """
import ctypes, fcntl, mmap, os, platform, resource, signal, socket, stat, struct, subprocess, sys, threading, time
libc = ctypes.CDLL(None, use_errno=True)
ARM = platform.machine() == "aarch64"
def call(x86, arm, *arguments):
    return libc.syscall(arm if ARM else x86, *arguments)
def escaped(*what):
    print("ESCAPED", *what)
def devices():
    for fd in range(64):
        try:
            if stat.S_ISCHR(os.fstat(fd).st_mode):
                yield fd
        except OSError:
            pass
def tries(step, limit):
    done = 0
    try:
        while done < limit and step() is not False:
            done += 1
    except (OSError, RuntimeError, MemoryError, PermissionError):
        pass
    return done
keep = []
"""

CHANGES_DEVICES = {
    "chmod": "os.chmod('/dev/null', 0o622)",
    "chmod by descriptor": "os.fchmod(os.open('/dev/null', os.O_RDWR), 0o622)",
    "chmod of inherited descriptors": "[os.fchmod(fd, 0o622) for fd in devices()]",
    "chmod by libc": "libc.chmod(b'/dev/null', 0o622) or escaped()",
    "times": "os.utime('/dev/null', (1, 1))",
    "times by descriptor": "os.utime(os.open('/dev/null', os.O_WRONLY), (1, 1))",
    "times of inherited descriptors": "[os.utime(fd, (1, 1)) for fd in devices()]",
    "owner": "os.chown('/dev/null', 1, 1)",
    "extended attribute": "os.setxattr('/dev/null', 'user.x', b'x')",
    "remount writable": "libc.mount(None, b'/dev/null', None, ctypes.c_ulong(32 | 4096), None) or escaped()",
    "another name": "os.link('/dev/null', '/tmp/null')",
    "a device of its own": "os.mknod('/tmp/null', 0o666 | stat.S_IFCHR, os.makedev(1, 3)); escaped()",
    "a disk": "os.mknod('/tmp/disk', 0o666 | stat.S_IFBLK, os.makedev(8, 0)); escaped()",
    "devices of the machine": "[escaped(one) for one in ('mem', 'kmsg', 'tty', 'fuse', 'kvm') if os.path.exists('/dev/' + one)]",
}
CHANGES_FILES = {
    "a module of Python": "open(os.__file__, 'a').write('#')",
    "rights of a module": "os.chmod(os.__file__, 0o777)",
    "times of a module": "os.utime(os.__file__, (1, 1))",
    "no module any more": "os.unlink(os.__file__)",
    "a program": "open('/usr/bin/x', 'w')",
    "a start-up file of Python": "open(os.path.dirname(os.__file__) + '/sitecustomize.py', 'w')",
    "remounted": "libc.mount(None, b'/usr', None, ctypes.c_ulong(32 | 4096), None) or escaped(); open('/usr/x', 'w')",
    "unmounted": "libc.umount2(b'/usr', 2) or escaped()",
    "a root of its own": "libc.chroot(b'/tmp') or escaped()",
    "another root": "call(155, 41, b'/tmp', b'/tmp') or escaped()",
    "the old root": "[escaped(one) for one in ('/old', '/proc/1', '/etc/passwd', '/home', '/root/.ssh') if os.path.exists(one)]",
    "above the root": "[escaped(one) for one in ('etc', 'proc', 'home') if os.path.exists('/' + '../' * 40 + one)]",
    "a proc of its own": "libc.mount(b'proc', b'/tmp', b'proc', ctypes.c_ulong(0), None) or escaped()",
    "by handle": "call(303, 264, -100, b'/', ctypes.create_string_buffer(struct.pack('Ii', 128, 0), 256), ctypes.byref(ctypes.c_int()), 0) or escaped()",
    "the user's secrets": f"[escaped(one) for one in os.environ if {SECRET!r} in one]",
}
REACHES = {
    "a server": "socket.create_connection(('127.0.0.1', PORT), 2); escaped()",
    "an abstract socket": "socket.socket(socket.AF_UNIX).connect('\\0' + NAME); escaped()",
    "the network": "socket.socket(type=socket.SOCK_DGRAM).connect(('127.0.0.1', PORT)); escaped()",
    "the kernel's own sockets": "socket.socket(16, socket.SOCK_RAW); escaped()",
    "the hypervisor": "socket.socket(40, socket.SOCK_STREAM); escaped()",
    "packets": "socket.socket(17, socket.SOCK_RAW); escaped()",
    "a victim": "os.kill(VICTIM, 9)",
    "all processes": "os.kill(-1, 9)",
    "priorities of the user": "os.setpriority(os.PRIO_USER, 0, 19); os.getpriority(os.PRIO_PROCESS, VICTIM); escaped()",
    "memory of others": "libc.ptrace(16, VICTIM, 0, 0) or escaped()",
    "the parent's end": "libc.prctl(1, 0, 0, 0, 0) or escaped()",
    "core dumps": "libc.prctl(4, 1, 0, 0, 0) or escaped()",
    "kernel messages": "libc.klogctl(3, ctypes.create_string_buffer(99), 99) >= 0 and escaped()",
}
GAINS = {
    "users": "libc.unshare(0x10000000) or escaped()",
    "users by a thread": "call(56, 220, 0x10000000 | 17, 0, 0, 0, 0) == 0 and os._exit(0)",
    "users by clone3": "r = call(435, 435, ctypes.create_string_buffer(struct.pack('8Q', 0x10000000, 0, 0, 0, 17, 0, 0, 0)), 64)\nif r == 0: os._exit(0)\nr > 0 and escaped()",
    "mounts": "libc.unshare(0x20000) or escaped()",
    "all namespaces": "libc.unshare(0x7E020000) or escaped()",
    "another user": "os.setresuid(1, 1, 1); escaped()",
    "rights": "call(126, 91, struct.pack('Ii', 0x20080522, 0), b'\\xff' * 24) or escaped()",
    "higher limits": "resource.setrlimit(resource.RLIMIT_AS, (1 << 40, 1 << 40)); escaped()",
    "a program by the kernel": "call(321, 280, 5, ctypes.create_string_buffer(128), 128) >= 0 and escaped()",
    "a key ring": "call(248, 217, b'user', b'xlam', b'x', 1, -3) > 0 and escaped()",
}
TAKES_PROCESSES = {
    "os.fork": "pid = os.fork()\nif pid == 0: time.sleep(60)\nescaped()",
    "os.system": "os.system('true') or escaped()",
    "subprocess": "subprocess.run([sys.executable, '-c', '']); escaped()",
    "posix_spawn": "os.posix_spawn(sys.executable, [sys.executable, '-c', ''], {}); escaped()",
    "exec": "libc.execv(b'/bin/true', (ctypes.c_char_p * 2)(b'true', None))",
    "many by libc": "def fork():\n    pid = libc.fork()\n    if pid == 0: time.sleep(60)\n    return pid > 0\ntries(fork, 200) and escaped()",
    "many by clone": "def fork():\n    pid = call(56, 220, 17, 0, 0, 0, 0)\n    if pid == 0: time.sleep(60)\n    return pid > 0\ntries(fork, 200) and escaped()",
    "threads": "threading.stack_size(1 << 16)\nn = tries(lambda: threading.Thread(target=time.sleep, args=(60,), daemon=True).start(), 300)\nn > 64 and escaped(n)",
}
"""Includes processes that would outlive the sandbox."""
TAKES_MEMORY = {
    "an object": "keep.append(b'x' * (1 << 30)); escaped()",
    "mappings": "def more(): keep.append(mmap.mmap(-1, 32 << 20)); keep[-1].write(b'x' * (32 << 20))\nn = tries(more, 32)\nn * 32 > 400 and escaped(n)",
    "files without a name": "f = os.memfd_create('x')\nn = tries(lambda: os.write(f, b'x' * (32 << 20)) == 32 << 20, 16)\nn and escaped(n)",
    "secret memory": "call(447, 447, 0) >= 0 and escaped()",
    "System V memory": "def more():\n    i = libc.shmget(0, ctypes.c_size_t(32 << 20), 0o1600)\n    return i >= 0 and keep.append(i)\nn = tries(more, 16)\nn and escaped(n)",
    "System V messages": "libc.msgget(0, 0o1600) >= 0 and escaped()",
    "POSIX messages": "call(240, 180, b'x', os.O_CREAT | os.O_RDWR, 0o600, 0) >= 0 and escaped()",
    "files": "f = os.open('/tmp/a', os.O_CREAT | os.O_WRONLY)\nn = tries(lambda: os.write(f, b'x' * (8 << 20)) == 8 << 20, 32)\nn > 8 and escaped(n)",
    "small files": "n = tries(lambda: keep.append(os.close(os.open(f'/tmp/f{len(keep)}', os.O_CREAT))), 20_000)\nn > 5_000 and escaped(n)",
    "open files": "n = tries(lambda: keep.append(os.open('/dev/null', os.O_RDONLY)), 5_000)\nn > 300 and escaped(n)",
    "pipes": "def more(): a, b = os.pipe(); keep.append((a, b)); return fcntl.fcntl(b, 1031, 1 << 20)\ntries(more, 200) and escaped()",
    "locks": "f = os.open('/tmp/l', os.O_CREAT | os.O_RDWR)\nn = tries(lambda: keep.append(fcntl.lockf(f, fcntl.LOCK_EX, 1, 2 * len(keep))), 20_000)\nn and escaped(n)",
    "watches": "libc.inotify_init1(0) >= 0 and escaped()",
    "asynchronous reads": "call(206, 0, 64, ctypes.byref(ctypes.c_ulong())) == 0 and escaped()",
    "io_uring": "call(425, 425, 8, ctypes.create_string_buffer(120)) >= 0 and escaped()",
}
MISLEADS = {
    "nested JSON": "[os.write(fd, b'[' * 200_000 + b'\\n') for fd in range(3, 12)]",
    "no JSON": "[os.write(fd, b'junk\\n') for fd in range(3, 12)]",
    "no end": "[os.write(fd, b'[' * (4 << 20)) for fd in range(3, 12)]",
    "not a text": "[os.write(fd, b'7\\n') for fd in range(3, 12)]",
    "closed": "os.closerange(0, 64)",
}
"""Attacks on the process that reads the output."""
OUTLIVES = {
    "its time": "while True: pass",
    "its parent": "libc.prctl(1, 0, 0, 0, 0); os.setsid()\nwhile True: pass",
    "signals": "[signal.signal(n, lambda *_: 0) for n in range(1, 32) if n not in (9, 19)]\nwhile True: pass",
}
"""Code that tries to run longer than its time limit."""
ESCAPES = {
    f"{group}: {name}": code
    for group, codes in {
        "changes a device": CHANGES_DEVICES,
        "changes a file": CHANGES_FILES,
        "reaches": REACHES,
        "gains": GAINS,
        "takes processes": TAKES_PROCESSES,
        "takes memory": TAKES_MEMORY,
        "misleads": MISLEADS,
    }.items()
    for name, code in codes.items()
}


def main() -> None:
    os.environ[SECRET] = "x"
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)  # so that `descendants` includes orphans
    from xlam_jax.evaluate import sandbox

    if problem := sandbox.find_problem():
        print(json.dumps({"problem": problem}))
        return
    print(json.dumps(asyncio.run(attempts())))


async def attempts() -> dict[str, Any]:
    """Runs all escapes in turn."""
    from xlam_jax.evaluate.sandbox import Sandbox

    outputs, usage = {}, {}
    with contextlib.ExitStack() as stack:
        victim = stack.enter_context(subprocess.Popen(["sleep", "600"]))
        stack.callback(victim.kill)
        server = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        abstract = stack.enter_context(socket.socket(socket.AF_UNIX))
        abstract.bind(f"\0{(name := f'xlam-{os.getpid()}')}")
        for listening in (server, abstract):
            listening.listen()
            listening.setblocking(False)
        own_pids = {victim.pid}
        before = read_state(victim.pid)
        stack.callback(restore, before["/dev/null"])
        prelude = f"{PRELUDE}VICTIM, PORT, NAME = {victim.pid}, {server.getsockname()[1]}, {name!r}\n"
        async with Sandbox(seconds=20, memory_mb=MEMORY_MB) as session:
            for escape, code in ESCAPES.items():
                try:
                    outputs[escape] = await session.run(prelude + code)
                except Exception as error:
                    outputs[escape] = f"ESCAPED {error!r}"
                usage[escape] = measure_usage(own_pids)
                if escape.startswith(("takes", "misleads")):  # each gets a new session
                    await session._end()
                    await all_ended(own_pids)  # a killed process may need time to return its memory
        for escape, code in OUTLIVES.items():
            session = Sandbox(seconds=60, memory_mb=MEMORY_MB)
            await session.run(prelude)
            session._seconds = 0.5
            try:
                outputs[escape] = await asyncio.wait_for(session.run(code), 30)
            except TimeoutError:
                outputs[escape] = "ESCAPED: it does not end"
            await all_ended(own_pids)
            for pid in set(descendants()) - own_pids:
                outputs[escape] += f" ESCAPED {pid}"
                os.kill(pid, signal.SIGKILL)
        for listening in (server, abstract):
            with contextlib.suppress(BlockingIOError):
                listening.accept()
                outputs[f"{listening}"] = "ESCAPED"
        if victim.poll() is not None:
            outputs["the victim"] = "ESCAPED"
        after = read_state(victim.pid)
        return {"outputs": outputs, "usage": usage, "before": before, "after": after}


async def all_ended(ignored: set[int]) -> None:
    """Waits until the sandbox's processes have ended, or 300 s, which is enough on a busy machine."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(300):
            while set(descendants()) - ignored:
                await asyncio.sleep(0.01)


def read_state(victim: int) -> dict[str, Any]:
    """Returns the state of the machine that code in a sandbox must not change."""

    def look(path: str) -> list[int]:
        status = os.stat(path)
        return [status.st_mode, status.st_uid, status.st_gid, status.st_mtime_ns, status.st_nlink, status.st_size]

    files = ["/dev/null", "/dev/zero", os.__file__, sysconfig.get_paths()["stdlib"], sys.prefix, "/usr", "/usr/bin"]
    texts = ["self/mounts", "sysvipc/shm", "sysvipc/msg", "sysvipc/sem", "sys/kernel/hostname"]
    return {
        **{path: look(path) for path in files},
        **{path: Path("/proc", path).read_text() for path in texts},
        "priority": os.getpriority(os.PRIO_PROCESS, victim),
        "temporary files": sorted(name for name in os.listdir(tempfile.gettempdir()) if name.startswith("sandbox-")),
    }


def restore(device: list[int]) -> None:
    """Repairs /dev/null if an escape has changed it."""
    mode, user, group, changed, *_ = device
    if read_state(os.getpid())["/dev/null"] != device:
        os.chmod("/dev/null", mode)
        os.chown("/dev/null", user, group)
        os.utime("/dev/null", ns=(changed, changed))


def descendants() -> list[int]:
    """Returns the ids of running processes that this process or its descendants have started."""
    parents = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            with contextlib.suppress(OSError):
                state, parent, *_ = (folder / "stat").read_text().rpartition(")")[2].split()
                if state not in "ZX":
                    parents[int(folder.name)] = int(parent)
    pids = [os.getpid()]
    for pid in pids:
        pids += [child for child, parent in parents.items() if parent == pid]
    return pids[1:]


def measure_usage(ignored: set[int]) -> dict[str, int]:
    """Returns the number of processes and threads of the sandbox, and their peak memory in MB."""
    processes, threads, peak = 0, 0, 0
    for pid in descendants():
        if pid in ignored:
            continue
        with contextlib.suppress(OSError):
            status = dict(line.split(":\t", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
            processes += 1
            threads += int(status.get("Threads", "0"))
            peak += int(status.get("VmHWM", "0 kB").split()[0]) >> 10
    return {"processes": processes, "threads": threads, "peak": peak}


if __name__ == "__main__":
    main()
