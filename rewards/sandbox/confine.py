"""Confinement of the calling process by the kernel: seccomp filters, Landlock, privileges, resource limits.

Runs inside the zygote and its children. Standard library only, no compiler, no package, no user namespace.
Sources: Linux Documentation/userspace-api/seccomp_filter.rst and landlock.rst;
include/uapi/linux/{filter,seccomp,landlock}.h.
"""

from __future__ import annotations

import ctypes
import os
import platform
import resource
import socket
import stat
import struct
from collections.abc import Iterable, Sequence
from typing import Any

from rewards.sandbox.filters import MACHINES, PID_SLOT, PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP, Instruction
from rewards.sandbox.syscalls import number

ARCHITECTURE = MACHINES.index(platform.machine()) if platform.machine() in MACHINES else -1
PR_SET_DUMPABLE = 4
LANDLOCK_ALL_FILES = {1: 0x1FFF, 2: 0x3FFF, 3: 0x7FFF, 4: 0x7FFF}  # ABI -> rights; 5 and up: 0xFFFF
LANDLOCK_EXECUTE, LANDLOCK_WRITE, LANDLOCK_READ, LANDLOCK_READ_DIR = 1, 2, 4, 8
LANDLOCK_FILE_RIGHTS = 7 | 1 << 14 | 1 << 15  # execute, write, read, truncate, device commands
LANDLOCK_EVERYTHING = 0xFFFF
MAX_PENDING_SIGNALS = 256

# PyDLL keeps the interpreter lock: no call here waits, and fork must not release it.
_libc = ctypes.PyDLL(None, use_errno=True)


def _check(result: int, what: str) -> int:
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{what}: {os.strerror(code)}")
    return result


def fork() -> int:
    """fork(2) without Python's at-fork hooks, which touch 180 pages (0.4 ms); for one thread only."""
    return _check(_libc.fork(), "fork")


def prctl(option: int, argument: int = 0) -> int:
    return _check(_libc.prctl(option, argument, 0, 0, 0), f"prctl({option})")


class Filter:
    """A seccomp program in the kernel's form; process ids are patched in just before it is installed."""

    def __init__(self, program: Sequence[Instruction]) -> None:
        code = b"".join([struct.pack("<HBBI", *instruction) for instruction in program])
        self._buffer = ctypes.create_string_buffer(code, len(code))
        self._header = struct.pack("<HxxxxxxQ", len(program), ctypes.addressof(self._buffer))
        self._pid_slots = [8 * i + 4 for i, instruction in enumerate(program) if instruction[3] == PID_SLOT]

    def for_this_process(self) -> None:
        """Writes this process's id into the program."""
        for slot in self._pid_slots:
            struct.pack_into("<I", self._buffer, slot, os.getpid())

    def install(self) -> None:
        """Adds the filter to this thread and all that it starts. Raises OSError without seccomp."""
        self.for_this_process()
        _check(_libc.prctl(PR_SET_SECCOMP, 2, self._header, 0, 0), "seccomp filter")


def landlock_abi() -> int:
    """The Landlock version of this kernel; 0 if it is absent or disabled."""
    if ARCHITECTURE < 0:
        return 0
    return max(0, _libc.syscall(number("landlock_create_ruleset", ARCHITECTURE), None, ctypes.c_size_t(0), 1))


def _landlock(name: str, *arguments: Any, path: str = "") -> int:
    call = number(f"landlock_{name}", ARCHITECTURE)
    return _check(_libc.syscall(call, *arguments), f"landlock_{name} {path}".rstrip())


def restrict_files(rules: Iterable[tuple[str, int]], abi: int) -> None:
    """Landlock: no ports, abstract sockets or outside signals; no files except `rules` (path, rights)."""
    handled = LANDLOCK_ALL_FILES.get(abi, 0xFFFF)
    # Files; bind and connect; abstract sockets and signals.
    fields = [handled, 3 if abi >= 4 else 0, 3 if abi >= 6 else 0]
    attributes = struct.pack("<3Q", *fields)[: 8 if abi < 4 else 16 if abi < 6 else 24]
    ruleset = _landlock("create_ruleset", attributes, ctypes.c_size_t(len(attributes)), 0)
    for path, rights in rules:
        try:
            opened = os.open(path, os.O_PATH | os.O_CLOEXEC)
        except OSError:
            continue
        fitting = handled if stat.S_ISDIR(os.fstat(opened).st_mode) else handled & LANDLOCK_FILE_RIGHTS
        _landlock("add_rule", ruleset, 1, struct.pack("<Qi", rights & fitting, opened), 0, path=path)
        os.close(opened)
    prctl(PR_SET_NO_NEW_PRIVS, 1)
    _landlock("restrict_self", ruleset, 0)
    os.close(ruleset)


def drop_privileges(own_uid: int, gid: int) -> bool:
    """If root, becomes a user that owns nothing and drops all capabilities. True if it is now `own_uid`."""
    own = False
    for uid, group in ((own_uid, gid), (65534, 65534)):  # a user namespace may map only few ids
        try:
            os.setgroups([])
            os.setresgid(group, group, group)
            os.setresuid(uid, uid, uid)
        except OSError:
            continue
        own = uid == own_uid
        break
    capset = (126, 91)[ARCHITECTURE]
    header, nothing = struct.pack("<Ii", 0x20080522, 0), bytes(24)
    if _libc.syscall(capset, header, nothing) and os.geteuid() == 0:
        _check(-1, "capset")
    return own


def count_user_tasks() -> int:
    """The number of this user's processes and threads, which RLIMIT_NPROC counts together."""
    uid, total = os.getuid(), 0
    for entry in filter(str.isdigit, os.listdir("/proc")):
        try:
            if os.stat(f"/proc/{entry}").st_uid == uid:
                total += len(os.listdir(f"/proc/{entry}/task"))
        except OSError:
            continue
    return total


def writable_shared_memory() -> list[str]:
    """Names of memory mappings that this process shares and could write to, as mprotect shows.

    Forks inherit them: siblings could read what one child writes there.
    """
    found = []
    with open("/proc/self/maps") as file:
        for line in file.read().splitlines():
            addresses, rights, _, _, _, *name = line.split(maxsplit=5)
            if rights[3] != "s":
                continue
            start, end = (int(address, 16) for address in addresses.split("-"))
            where, length = ctypes.c_void_p(start), ctypes.c_size_t(end - start)
            before = sum(bit for bit, letter in ((1, "r"), (2, "w"), (4, "x")) if letter in rights)
            if _libc.mprotect(where, length, before | 2) == 0:
                _libc.mprotect(where, length, before)
                found.append(name[0] if name else "unnamed")
    return found


def limit_memory_and_output(memory_bytes: int, output_bytes: int) -> None:
    """Sets hard limits for this process and its children; memory is on top of current use."""
    with open("/proc/self/statm") as file:
        mapped = int(file.read().split()[0]) * resource.getpagesize()
    lower_limit(resource.RLIMIT_AS, memory_bytes + mapped)
    lower_limit(resource.RLIMIT_FSIZE, output_bytes)


def limit_tasks_and_descriptors(num_tasks: int) -> None:
    """Sets hard limits for this process and its children, never above the current ones."""
    lower_limit(resource.RLIMIT_NPROC, num_tasks)
    lower_limit(resource.RLIMIT_SIGPENDING, MAX_PENDING_SIGNALS)  # per user, who may also run the trainer
    lower_limit(resource.RLIMIT_NOFILE, 72)
    lower_limit(resource.RLIMIT_CORE, 0)
    # For the main thread of a recursive program; the hard limit stays, because contest programs raise it.
    hard = resource.getrlimit(resource.RLIMIT_STACK)[1]
    resource.setrlimit(resource.RLIMIT_STACK, (128 << 20 if hard == resource.RLIM_INFINITY else hard, hard))


def lower_limit(limit: int, value: int) -> None:
    hard = resource.getrlimit(limit)[1]
    value = value if hard == resource.RLIM_INFINITY else min(value, hard)
    resource.setrlimit(limit, (value, value))


def breach(opens: bool) -> str:
    """Names a forbidden thing that this disposable process can still do; empty if there is none."""
    attempts = {
        "read /etc/passwd": lambda: os.open("/etc/passwd", os.O_RDONLY),
        "read /proc/self/maps": lambda: os.open("/proc/self/maps", os.O_RDONLY),
        "create a file in /tmp": lambda: os.open("/tmp/PWNED_probe", os.O_CREAT | os.O_WRONLY, 0o600),
        "open a TCP socket": lambda: socket.socket(socket.AF_INET),
        "open a UNIX socket": lambda: socket.socket(socket.AF_UNIX),
        "fork": lambda: os.fork() or os._exit(0),
        "signal its parent": lambda: os.kill(os.getppid(), 0),
        "execute a program": lambda: os.execv("/proc/self/exe", ["python", "-c", "pass"]),
    }
    if not opens:
        attempts["open a file"] = lambda: os.open("/dev/null", os.O_RDONLY)
    for what, attempt in attempts.items():
        try:
            attempt()
        except OSError:
            continue
        return what
    return ""
