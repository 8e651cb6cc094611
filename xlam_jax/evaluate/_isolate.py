"""Runs a Python program without access to the network, to other processes, and to files other than Python's own.

A standalone script without imports from the project: `sandbox` starts it with `python -I -c`. Its first argument is
JSON: `program` (source text), `parent` (process id; this process is killed when its parent dies), `paths` (mounted
read-only), `disk_mb`, `memory_mb`. The remaining arguments are passed to the program. If any part of the set-up fails,
the program does not run: the script prints the reason on stderr, in one line, and exits with code 1.

The outer process waits for the program. The program is process 1 of a new process namespace, so that its threads
cannot outlive it. Three layers protect the machine:

    namespaces       users, network, mounts, processes, IPC: its root is a folder in memory with read-only bind mounts
    seccomp          it can start threads, but no processes, programs or namespaces; it cannot allocate memory outside
                     its address space (memfd, System V and POSIX IPC), or use kernel interfaces that are newer than
                     this filter
    resource limits  address space, threads, open files. Root is exempt from some of them, so a sandbox that root starts
                     runs as nobody
"""

import ctypes
import errno
import json
import os
import platform
import resource
import signal
import struct
import sys
from collections.abc import Sequence
from typing import NoReturn

NOBODY = 65534
"""User and group id of the program where root starts it."""
THREADS = 64
OPEN_FILES = 256
"""Limits the kernel's buffers for pipes and sockets: 64 KiB per pipe, as larger ones are refused."""
FILES = 4096
"""Number of files that the program can create; their metadata does not count as disk space."""

NEW_NAMESPACES = (
    ("user", 0x10000000),
    ("mnt", 0x00020000),
    ("pid", 0x20000000),
    ("net", 0x40000000),
    ("ipc", 0x08000000),
    ("uts", 0x04000000),
)
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC = 1, 2, 4, 8
MS_REMOUNT, MS_BIND, MS_REC, MS_PRIVATE = 1 << 5, 1 << 12, 1 << 14, 1 << 18
MNT_DETACH = 2
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_NAME, PR_GET_NAME, PR_SET_SECCOMP, PR_CAPBSET_DROP = 1, 4, 15, 16, 22, 24
PR_SET_NO_NEW_PRIVS = 38
CAPABILITY_VERSION = 0x20080522
CLONE_THREAD = 0x10000
F_SETLK, F_SETLKW, F_OFD_SETLK, F_OFD_SETLKW, F_SETPIPE_SZ = 6, 7, 37, 38, 1031
AF_UNIX, AF_INET, AF_INET6 = 1, 2, 10

AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
FIRST_UNKNOWN = {"x86_64": 335, "aarch64": 294}
"""System calls from this number on are refused with ENOSYS, so that glibc and Python use older ones. Among them are
io_uring, pidfd, clone3, the new mount interface, and all future ones."""
NUMBERS = {
    "clone": (56, 220),
    "prctl": (157, 167),
    "fcntl": (72, 25),
    "socket": (41, 198),
    "socketpair": (53, 199),
    "capset": (126, 91),
    "pivot_root": (155, 41),
}
REFUSED = {
    # other processes and programs
    "fork": (57, None), "vfork": (58, None), "execve": (59, 221), "execveat": (322, 281), "ptrace": (101, 117),
    "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "kcmp": (312, 272),
    # namespaces and mounts
    "unshare": (272, 97), "setns": (308, 268), "mount": (165, 40), "umount2": (166, 39), "pivot_root": (155, 41),
    "chroot": (161, 51), "name_to_handle_at": (303, 264), "open_by_handle_at": (304, 265),
    # memory and objects that are not charged to the address space, or that all processes of a user share
    "memfd_create": (319, 279), "shmget": (29, 194), "shmat": (30, 196), "semget": (64, 190), "msgget": (68, 186),
    "mq_open": (240, 180), "io_setup": (206, 0), "inotify_init": (253, None), "inotify_init1": (294, 26),
    "fanotify_init": (300, 262), "add_key": (248, 217), "request_key": (249, 218), "keyctl": (250, 219),
    # wide kernel interfaces that a calculation does not need
    "bpf": (321, 280), "perf_event_open": (298, 241), "userfaultfd": (323, 282), "personality": (135, 92),
    "modify_ldt": (154, None), "syslog": (103, 116), "quotactl": (179, 60), "acct": (163, 89), "reboot": (169, 142),
}  # fmt: skip
"""Name → number on x86_64, and on aarch64."""

libc = ctypes.CDLL(None, use_errno=True)


def main() -> None:
    """Sets up the sandbox and runs the program in it."""
    settings = json.loads(sys.argv[1])
    program = compile(settings["program"], "<program>", "exec")
    try:
        filter_ = system_call_filter(platform.machine())
        end_with_parent(settings["parent"])
        can_be_nobody = enter_namespaces()
        if child := os.fork():
            wait_for(child)
        build_root(settings["paths"], settings["disk_mb"])
        give_up_rights(can_be_nobody, settings["memory_mb"], settings["disk_mb"], filter_)
    except OSError as error:
        print(f"{error.filename}: {error.strerror}" if error.filename else error.strerror, file=sys.stderr, flush=True)
        os._exit(1)
    sys.argv = ["program", *sys.argv[2:]]
    exec(program, {"__name__": "__main__"})


def check(result: int, call: str) -> None:
    """Raises `OSError` if a libc call failed."""
    if result:
        number = ctypes.get_errno()
        raise OSError(number, f"{call}: {os.strerror(number)}")


def end_with_parent(parent: int) -> None:
    """Has the kernel kill this process when its parent dies, even by SIGKILL."""
    check(libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0), "prctl")
    if os.getppid() != parent:
        os._exit(1)


def wait_for(child: int) -> NoReturn:
    """Waits for the program and exits with its code. Closes this process's copies of the program's pipes."""
    null = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(null, stream)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    os._exit(code if code >= 0 else 128 - code)


def enter_namespaces() -> bool:
    """Moves this process into new namespaces; returns whether the program can run as `NOBODY` there."""
    process = os.getpid()
    as_nobody = os.geteuid() == 0 and all(is_mapped(f"/proc/self/{kind}_map", NOBODY) for kind in ("uid", "gid"))
    waiting, begin = os.pipe()
    writer = os.fork()
    if writer == 0:  # only a process outside of the namespace may map more than one user
        os.close(begin)
        if os.read(waiting, 1):
            try:
                write_maps(process, as_nobody)
            except OSError as error:
                print(f"{error.filename}: {error.strerror}{suggest_fix(error, '', '')}", file=sys.stderr, flush=True)
                os._exit(1)
        os._exit(0)
    os.close(waiting)
    limits = {kind: f"user.max_{kind}_namespaces" for kind, _ in NEW_NAMESPACES}
    maxima = {kind: read_setting(limit) for kind, limit in limits.items()}
    for kind, flag in NEW_NAMESPACES:
        try:
            check(libc.unshare(flag), f"unshare ({kind} namespace)")
        except OSError as error:
            raise OSError(error.errno, f"{error.strerror}{suggest_fix(error, limits[kind], maxima[kind])}") from None
        if kind == "user":
            os.write(begin, b"x")
            if os.waitpid(writer, 0)[1]:
                os._exit(1)  # it has printed the reason
    os.close(begin)
    return as_nobody


def read_setting(name: str) -> str:
    """Returns a kernel setting; empty if it does not exist."""
    try:
        with open(f"/proc/sys/{name.replace('.', '/')}", encoding="ascii") as file:
            return file.read().strip()
    except OSError:
        return ""


def suggest_fix(error: OSError, limit: str, maximum: str) -> str:
    """Returns what to change when a namespace is refused. `maximum` is the value of the setting `limit` outside; it
    differs inside of a namespace."""
    if error.errno in (errno.ENOSPC, errno.EUSERS):
        return f"; not the disk: the limit of namespaces is reached; raise it: sysctl {limit} (now {maximum})"
    for name, blocking in (
        ("kernel.unprivileged_userns_clone", "0"),
        ("kernel.apparmor_restrict_unprivileged_userns", "1"),
    ):
        if read_setting(name) == blocking:
            return f"; this system does not allow it to users: sysctl {name} (now {blocking})"
    return "; containers may not allow it" if error.errno == errno.EPERM else ""


def is_mapped(path: str, number: int) -> bool:
    """Returns whether a user or group id exists in this process's user namespace."""
    with open(path, encoding="ascii") as lines:
        return any(int(first) <= number < int(first) + int(count) for first, _, count in map(str.split, lines))


def write_maps(process: int, as_nobody: bool) -> None:
    """Maps this user and group to root in the user namespace of `process` (its id), for the set-up.

    `as_nobody` also makes the ids of nobody available there.
    """
    for kind, own in (("uid", os.geteuid()), ("gid", os.getegid())):
        if kind == "gid" and not as_nobody:
            write(f"/proc/{process}/setgroups", "deny")
        second = f"\n{NOBODY} {NOBODY} 1" if as_nobody else ""
        write(f"/proc/{process}/{kind}_map", f"0 {own} 1{second}")


def write(path: str, text: str) -> None:
    file = os.open(path, os.O_WRONLY)
    try:
        os.write(file, text.encode())
    except OSError as error:
        raise OSError(error.errno, error.strerror, path) from None
    finally:
        os.close(file)


def mount(source: str | None, target: str, kind: str | None, flags: int, options: str | None = None) -> None:
    words = [None if value is None else value.encode() for value in (source, target, kind)]
    check(libc.mount(*words, ctypes.c_ulong(flags), None if options is None else options.encode()), f"mount {target}")


def build_root(paths: Sequence[str], disk_mb: int) -> None:
    """Mounts a file system in memory as the root of this process, with read-only bind mounts of `paths`."""
    os.umask(0o022)
    mount(None, "/", None, MS_REC | MS_PRIVATE)
    root = "/proc"  # a folder that every Linux has, and that contains none of the paths
    mount("tmpfs", root, "tmpfs", MS_NOSUID | MS_NODEV, f"size={disk_mb}m,nr_inodes={FILES},mode=755")
    for folder in ("/tmp", "/dev"):
        os.mkdir(root + folder)
    os.chmod(f"{root}/tmp", 0o1777)
    os.close(os.open(f"{root}/dev/null", os.O_CREAT | os.O_WRONLY))
    for path in paths:
        os.makedirs(root + path, exist_ok=True)
        bind(path, root + path, MS_NODEV)
    bind("/dev/null", f"{root}/dev/null", MS_NOEXEC)
    os.chdir(root)
    check(libc.syscall(number("pivot_root"), b".", b"."), "pivot_root")  # mounts the old root over the new one
    check(libc.umount2(b".", MNT_DETACH), "umount /")
    os.chdir("/tmp")


def bind(path: str, target: str, flags: int) -> None:
    """Mounts a folder or device so that its attributes cannot be changed through `target`."""
    mount(path, target, None, MS_BIND)
    inherited = os.statvfs(path).f_flag & (MS_NODEV | MS_NOEXEC)  # a user namespace may not clear them
    mount(None, target, None, MS_REMOUNT | MS_BIND | MS_RDONLY | MS_NOSUID | flags | inherited)


def give_up_rights(as_nobody: bool, memory_mb: int, disk_mb: int, filter_: bytes) -> None:
    """Drops rights, resources, system calls and open files with which the program could undo the set-up or exhaust the
    machine."""
    null = os.open(os.devnull, os.O_RDWR)  # the read-only mount: the program could change the machine's own device
    os.dup2(null, 2)
    os.closerange(3, OPEN_FILES)
    for capability in range(64):
        libc.prctl(PR_CAPBSET_DROP, capability, 0, 0, 0)
    if as_nobody:
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
    header, none = struct.pack("=Ii", CAPABILITY_VERSION, 0), bytes(24)
    check(libc.syscall(number("capset"), header, none), "capset")
    for limit, value in (
        (resource.RLIMIT_AS, memory_mb << 20),
        (resource.RLIMIT_NPROC, THREADS),
        (resource.RLIMIT_NOFILE, OPEN_FILES),
        (resource.RLIMIT_FSIZE, disk_mb << 20),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_MEMLOCK, 0),
        (resource.RLIMIT_SIGPENDING, 256),
    ):
        lower(limit, value)
    check(libc.prctl(PR_SET_DUMPABLE, 0, 0, 0, 0), "prctl")  # no core dump for the machine's handler
    check(libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0), "prctl")  # the change of user has cleared it
    check(libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "prctl")
    rules = ctypes.create_string_buffer(filter_, len(filter_))
    program = struct.pack("@HP", len(filter_) // 8, ctypes.addressof(rules))
    check(libc.prctl(PR_SET_SECCOMP, 2, program, 0, 0), "seccomp")


def lower(limit: int, value: int) -> None:
    """Sets the soft and the hard limit of a resource to `value`, or to the present hard limit if that is lower."""
    hard = resource.getrlimit(limit)[1]
    value = value if hard == resource.RLIM_INFINITY else min(value, hard)
    resource.setrlimit(limit, (value, value))


def number(name: str) -> int:
    """Returns the number of a system call on this machine."""
    return NUMBERS[name][list(AUDIT_ARCH).index(platform.machine())]


def system_call_filter(machine: str) -> bytes:
    """Returns the system call filter as a classic BPF program. Raises `OSError` for an unknown processor."""
    if machine not in AUDIT_ARCH:
        raise OSError(errno.ENOSYS, f"seccomp: the filter does not support the processor {machine}")
    at = list(AUDIT_ARCH).index(machine)
    load, jump_equal, jump_from, jump_if_set, ret = 0x20, 0x15, 0x35, 0x45, 0x06
    allow, refuse, kill = 0x7FFF0000, 0x00050000, 0x80000000
    rules: list[tuple[int, int, int, int]] = [
        (load, 0, 0, 4),
        (jump_equal, 1, 0, AUDIT_ARCH[machine]),
        (ret, 0, 0, kill),
        (load, 0, 0, 0),
        (jump_from, 0, 1, FIRST_UNKNOWN[machine]),
        (ret, 0, 0, refuse | errno.ENOSYS),
    ]
    for numbers in REFUSED.values():
        if (refused := numbers[at]) is not None:
            rules += [(jump_equal, 0, 1, refused), (ret, 0, 0, refuse | errno.EPERM)]

    def by_argument(name: str, argument: int, test: int, values: Sequence[int], if_equal: int, otherwise: int) -> None:
        checks = [(test, len(values) - index, 0, value) for index, value in enumerate(values)]
        instructions = [(load, 0, 0, 16 + 8 * argument), *checks, (ret, 0, 0, otherwise), (ret, 0, 0, if_equal)]
        rules.extend([(jump_equal, 0, len(instructions), NUMBERS[name][at]), *instructions])

    by_argument("clone", 0, jump_if_set, [CLONE_THREAD], allow, refuse | errno.EPERM)
    by_argument("prctl", 0, jump_equal, [PR_SET_NAME, PR_GET_NAME], allow, refuse | errno.EPERM)
    for name in ("socket", "socketpair"):  # refuses netlink, and those of virtual machines and cryptography
        by_argument(name, 0, jump_equal, [AF_UNIX, AF_INET, AF_INET6], allow, refuse | errno.EAFNOSUPPORT)
    locks = [F_SETLK, F_SETLKW, F_OFD_SETLK, F_OFD_SETLKW]  # they take kernel memory without a limit
    by_argument("fcntl", 1, jump_equal, [*locks, F_SETPIPE_SZ], refuse | errno.EPERM, allow)
    rules.append((ret, 0, 0, allow))
    return b"".join(struct.pack("=HBBI", *rule) for rule in rules)


if __name__ == "__main__":
    main()
