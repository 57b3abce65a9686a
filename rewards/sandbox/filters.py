"""The seccomp programs that confine zygotes and their children, as classic BPF instructions.

Pure: a program is a list of (code, jump if true, jump if false, constant). `rewards.sandbox.confine`
installs them. Sources: Linux Documentation/userspace-api/seccomp_filter.rst;
include/uapi/linux/{filter,seccomp,audit}.h.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable, Sequence
from functools import partial

from rewards.sandbox.syscalls import ALLOWED, COMMANDS, COMPILERS, number

Instruction = tuple[int, int, int, int]

MACHINES = ("x86_64", "aarch64")  # their positions are the columns of `rewards.sandbox.syscalls`
AUDIT_ARCHITECTURES = (0xC000003E, 0xC00000B7)
LOAD, JUMP_EQUAL, JUMP_AT_LEAST, AND, RETURN = 0x20, 0x15, 0x35, 0x54, 0x06
ALLOW, ERRNO, KILL_PROCESS = 0x7FFF0000, 0x00050000, 0x80000000
NUMBER_OFFSET, ARCHITECTURE_OFFSET, FIRST_ARGUMENT_OFFSET = 0, 4, 16
X32_BIT = 0x40000000
# From this number on the architectures agree, and C libraries expect ENOSYS from a kernel without the call.
FIRST_NEW_CALL = 424
PID_SLOT = 0x7E57F1D5  # stands for the process id; above any real one

CLONE_THREAD, CLONE_NEW_NAMESPACES = 0x10000, 0x7E020080
WRITING_OPEN_FLAGS = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
AF_UNIX, SOCK_STREAM, SOCK_TYPE_MASK = 1, 1, 0xF
MSG_OOB = 1  # unneeded, and kernels had a use after free there (CVE-2025-38236)
# F_SETOWN, F_SETSIG and FIOSETOWN are absent: they make the kernel send any signal to any process of the
# user.
FCNTL_COMMANDS = (0, 1, 2, 3, 4, 1030, 1032)  # DUPFD, GETFD, SETFD, GETFL, SETFL, DUPFD_CLOEXEC, GETPIPE_SZ
FCNTL_LOCKS = (5, 6, 7)
# TCGETS, window, FIONREAD, NBIO, NCLEX, CLEX
IOCTL_COMMANDS = (0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451)
PR_SET_PDEATHSIG, PR_SET_NAME, PR_GET_NAME, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS = 1, 15, 16, 22, 38
PR_SET_VMA, PR_SET_CHILD_SUBREAPER = 0x53564D41, 36


def zygote_filter(architecture: int, *, opens: bool, commands: bool = False) -> list[Instruction]:
    """The allow list that a zygote and its children share: no sockets but a stream pair, no other process.

    `opens=False` refuses every open, for kernels without Landlock: no file can be read or created. With True,
    Landlock decides. `commands=True` adds what compilers and interpreters need, safe only with Landlock.
    """
    block = partial(_block, architecture)
    program: list[Instruction] = [
        (LOAD, 0, 0, ARCHITECTURE_OFFSET),
        (JUMP_EQUAL, 1, 0, AUDIT_ARCHITECTURES[architecture]),
        _returns(KILL_PROCESS),
        (LOAD, 0, 0, NUMBER_OFFSET),
        (JUMP_AT_LEAST, 0, 1, X32_BIT),
        _returns(ERRNO | errno.ENOSYS),
    ]
    listed = [*ALLOWED, "clone", "kill", "tgkill", "wait4", "seccomp"]
    if commands:
        listed += [*COMMANDS, *COMPILERS]
        listed += ["landlock_create_ruleset", "landlock_add_rule", "landlock_restrict_self"]
    for name in listed:
        program += block(name, [_returns(ALLOW)])
    for name, flags_index in (("open", 1), ("openat", 2)):
        # Acts as if there were no files: reading finds none, and writing is not permitted.
        flags = [(LOAD, 0, 0, FIRST_ARGUMENT_OFFSET + 8 * flags_index), (AND, 0, 0, WRITING_OPEN_FLAGS)]
        refused = [(JUMP_EQUAL, 0, 1, 0), _returns(ERRNO | errno.ENOENT), _returns(ERRNO | errno.EACCES)]
        program += block(name, [_returns(ALLOW)] if opens else [*flags, *refused])
    program += block("fcntl", _argument_in(1, (*FCNTL_COMMANDS, *(FCNTL_LOCKS if commands else ()))))
    program += block("ioctl", _argument_in(1, IOCTL_COMMANDS))
    # Through sendto, a datagram pair could reach any datagram socket of the host; a stream pair cannot.
    family = [(LOAD, 0, 0, FIRST_ARGUMENT_OFFSET), (JUMP_EQUAL, 1, 0, AF_UNIX), _returns(ERRNO | errno.EPERM)]
    program += block("socketpair", [*family, *_argument_in(1, (SOCK_STREAM,), mask=SOCK_TYPE_MASK)])
    options = (PR_SET_PDEATHSIG, PR_SET_NAME, PR_GET_NAME, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS, PR_SET_VMA)
    program += block("prctl", _argument_in(0, options))
    program += block("prlimit64", _argument_in(0, (0,)))
    program.append((JUMP_AT_LEAST, 0, 1, FIRST_NEW_CALL))
    return [*program, _returns(ERRNO | errno.ENOSYS), _returns(ERRNO | errno.EPERM)]


def child_filter(architecture: int, *, commands: bool = False, compiles: bool = False) -> list[Instruction]:
    """What a child also loses: new processes (threads stay), signals to others, prctl, more filters, and
    sending descriptors. The kernel counts descriptors in flight per user; a child could use up all.

    `commands` is as for the zygote; `compiles=True` lets a command fork and change files.
    """
    program, block = [(LOAD, 0, 0, NUMBER_OFFSET)], partial(_block, architecture)
    if compiles:
        program += block("clone", _argument_in(0, (0,), mask=CLONE_NEW_NAMESPACES))
        program += block("setpgid", [_returns(ERRNO | errno.EPERM)])
    else:
        program += block("clone", _argument_in(0, (CLONE_THREAD,), mask=CLONE_THREAD))
        for name in COMPILERS if commands else ():
            program += block(name, [_returns(ERRNO | errno.EPERM)])
        program += block("wait4", [_returns(ERRNO | errno.ECHILD)])
    for name in ("kill", "tgkill"):
        program += block(name, _argument_in(0, (PID_SLOT,)))
    program += block("prctl", _argument_in(0, (PR_SET_NAME, PR_GET_NAME, PR_SET_VMA)))
    program += block("sendto", _argument_in(3, (0,), mask=MSG_OOB))
    for name in ("sendmsg", "seccomp"):
        program += block(name, [_returns(ERRNO | errno.EPERM)])
    return [*program, _returns(ALLOW)]


def _returns(action: int) -> Instruction:
    return (RETURN, 0, 0, action)


def _block(architecture: int, name: str, body: Sequence[Instruction]) -> list[Instruction]:
    """`body`, which returns on every path, for the call `name`; empty if the architecture lacks the call."""
    call = number(name, architecture)
    return [] if call is None else [(JUMP_EQUAL, 0, len(body), call), *body]


def _argument_in(index: int, values: Iterable[int], mask: int | None = None) -> list[Instruction]:
    """Allows the call if the argument's low 32 bits (after `mask`) are one of `values`, else EPERM."""
    body: list[Instruction] = [(LOAD, 0, 0, FIRST_ARGUMENT_OFFSET + 8 * index)]
    if mask is not None:
        body.append((AND, 0, 0, mask))
    for value in values:
        body += [(JUMP_EQUAL, 0, 1, value), _returns(ALLOW)]
    return [*body, _returns(ERRNO | errno.EPERM)]
