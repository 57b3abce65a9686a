"""The seccomp programs, run by an interpreter of classic BPF that knows nothing of how they are built, on
both architectures; and the numbers they use, against the kernel's headers.
"""

from __future__ import annotations

import errno
import os
import re
import struct
from pathlib import Path

import pytest

from rewards.sandbox.filters import Instruction, child_filter, zygote_filter
from rewards.sandbox.syscalls import ALLOWED, CHECKED, COMMANDS, COMPILERS, LANDLOCK, number

X86, ARM = 0, 1
AUDIT = {X86: 0xC000003E, ARM: 0xC00000B7}
ALLOW, KILL = "allow", "kill"


def verdict(program: list[Instruction], architecture: int, call: int, *arguments: int) -> object:
    """What the kernel does with a call: "allow", "kill", or the errno."""
    padded = [argument & (2**64 - 1) for argument in (*arguments, 0, 0, 0, 0, 0, 0)[:6]]
    data = struct.pack("<IIQ6Q", call, AUDIT.get(architecture, architecture), 0, *padded)
    position, value = 0, 0
    while True:
        code, if_true, if_false, constant = program[position]
        assert 0 <= if_true < 256 and 0 <= if_false < 256
        position += 1
        if code == 0x20:
            (value,) = struct.unpack_from("<I", data, constant)
        elif code == 0x54:
            value &= constant
        elif code == 0x15:
            position += if_true if value == constant else if_false
        elif code == 0x35:
            position += if_true if value >= constant else if_false
        elif code == 0x06:
            action = constant & 0xFFFF0000
            return {0x7FFF0000: ALLOW, 0x80000000: KILL}.get(action, constant & 0xFFFF)
        else:
            raise AssertionError(f"unknown instruction {code:#x}")


# From the kernel's tables: (x86-64, aarch64).
NEVER = {
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "socket": (41, 198),
    "connect": (42, 203),
    "bind": (49, 200),
    "execve": (59, 221),
    "execveat": (322, 281),
    "unshare": (272, 97),
    "setns": (308, 268),
    "mount": (165, 40),
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "userfaultfd": (323, 282),
    "keyctl": (250, 219),
    "add_key": (248, 217),
    "kexec_load": (246, 104),
    "init_module": (175, 105),
    "io_uring_setup": (425, 425),
    "pidfd_open": (434, 434),
    "pidfd_getfd": (438, 438),
    "pidfd_send_signal": (424, 424),
    "tkill": (200, 130),
    "rt_sigqueueinfo": (129, 138),
    "rt_tgsigqueueinfo": (297, 240),
    "shmget": (29, 194),
    "msgget": (68, 186),
    "semget": (64, 190),
    "mq_open": (240, 180),
    "memfd_create": (319, 279),
    "unlinkat": (263, 35),
    "mkdirat": (258, 34),
    "renameat2": (316, 276),
    "fchmodat": (268, 53),
    "symlinkat": (266, 36),
    "ftruncate": (77, 46),
    "readlinkat": (267, 78),
    "setuid": (105, 146),
    "setpgid": (109, 154),
    "setsid": (112, 157),
    "chroot": (161, 51),
    "personality": (135, 92),
    "setpriority": (141, 140),
    "sched_setaffinity": (203, 122),
    "clone3": (435, 435),
    "openat2": (437, 437),
    "kcmp": (312, 272),
    "process_madvise": (440, 440),
}


@pytest.mark.parametrize("architecture", [X86, ARM])
@pytest.mark.parametrize("opens", [True, False])
def test_calls_that_reach_others_are_refused(architecture: int, opens: bool) -> None:
    program = zygote_filter(architecture, opens=opens)
    for name, numbers in NEVER.items():
        assert verdict(program, architecture, numbers[architecture]) in (errno.EPERM, errno.ENOSYS), name


@pytest.mark.parametrize("architecture", [X86, ARM])
def test_every_call_number_without_an_entry_is_refused(architecture: int) -> None:
    program = zygote_filter(architecture, opens=False)
    known = {numbers[architecture] for table in (ALLOWED, CHECKED) for numbers in table.values()}
    for call in range(600):
        if call not in known:
            assert verdict(program, architecture, call) in (errno.EPERM, errno.ENOSYS), call


@pytest.mark.parametrize("architecture", [X86, ARM])
def test_other_calling_conventions_are_refused(architecture: int) -> None:
    program = zygote_filter(architecture, opens=True)
    i386, read = 0x40000003, number("read", architecture)
    assert read is not None
    assert verdict(program, architecture, read) == ALLOW
    assert verdict(program, i386, read) == KILL
    assert verdict(program, 1 - architecture, read) == KILL
    assert verdict(program, architecture, read | 0x40000000) == errno.ENOSYS  # x32


@pytest.mark.parametrize("architecture", [X86, ARM])
def test_arguments_decide_where_a_call_has_a_harmless_and_a_harmful_use(architecture: int) -> None:
    program = zygote_filter(architecture, opens=False)

    def asked(name: str, *arguments: int) -> object:
        call = number(name, architecture)
        assert call is not None
        return verdict(program, architecture, call, *arguments)

    assert asked("fcntl", 3, 3) == ALLOW  # F_GETFL
    assert asked("fcntl", 3, 8) == errno.EPERM  # F_SETOWN
    assert asked("fcntl", 3, 10) == errno.EPERM  # F_SETSIG
    assert asked("fcntl", 3, 1031) == errno.EPERM  # F_SETPIPE_SZ
    assert asked("ioctl", 0, 0x5401) == ALLOW  # TCGETS
    assert asked("ioctl", 0, 0x5412) == errno.EPERM  # TIOCSTI
    assert asked("ioctl", 0, 0x8901) == errno.EPERM  # FIOSETOWN
    assert asked("socketpair", 1, 1 | 0o2000000) == ALLOW  # AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC
    assert asked("socketpair", 1, 2) == errno.EPERM  # SOCK_DGRAM
    assert asked("socketpair", 1, 5) == errno.EPERM  # SOCK_SEQPACKET
    assert asked("socketpair", 16, 1) == errno.EPERM  # AF_NETLINK
    assert asked("prlimit64", 0, 3) == ALLOW
    assert asked("prlimit64", 17, 3) == errno.EPERM
    assert asked("prctl", 4, 1) == errno.EPERM  # PR_SET_DUMPABLE
    assert asked("openat", -100, 0, os.O_RDONLY) == errno.ENOENT
    assert asked("openat", -100, 0, os.O_WRONLY | os.O_CREAT) == errno.EACCES
    assert asked("openat", -100, 0, os.O_RDONLY | os.O_CREAT) == errno.EACCES


@pytest.mark.parametrize("architecture", [X86, ARM])
def test_a_child_can_start_threads_but_no_process_and_signal_itself_only(architecture: int) -> None:
    pid = 0x7E57F1D5  # the slot for the process id, before it is filled in
    program = child_filter(architecture)

    def asked(name: str, *arguments: int) -> object:
        call = number(name, architecture)
        assert call is not None
        return verdict(program, architecture, call, *arguments)

    assert asked("clone", 0x3D0F00) == ALLOW  # the flags of pthread_create
    assert asked("clone", 0x1200011) == errno.EPERM  # those of fork
    assert asked("clone", 0x4111) == errno.EPERM  # those of vfork
    for name in ("kill", "tgkill"):
        assert asked(name, pid, 9) == ALLOW
        for other in (1, 0, -1, -pid, pid + 1):
            assert asked(name, other, 9) == errno.EPERM
    assert asked("prctl", 1, 0) == errno.EPERM  # PR_SET_PDEATHSIG
    assert asked("prctl", 22, 2) == errno.EPERM  # PR_SET_SECCOMP
    assert asked("seccomp", 1) == errno.EPERM
    assert asked("sendmsg", 3) == errno.EPERM  # it sends descriptors; plain bytes go by sendto
    assert asked("sendto", 3) == asked("sendto", 3, 0, 1, 0x4000) == asked("recvmsg", 3) == ALLOW
    assert asked("sendto", 3, 0, 1, 0x4001) == errno.EPERM  # MSG_NOSIGNAL | MSG_OOB


@pytest.mark.parametrize("architecture", [X86, ARM])
def test_a_command_can_be_executed_but_cannot_reach_others_or_change_files(architecture: int) -> None:
    programs = (
        zygote_filter(architecture, opens=True, commands=True),
        child_filter(architecture, commands=True),
    )

    def asked(name: str, *arguments: int) -> set[object]:
        call = NEVER[name][architecture] if name in NEVER else number(name, architecture)
        assert call is not None
        return {verdict(program, architecture, call, *arguments) for program in programs} - {ALLOW}

    assert asked("execve") == asked("openat") == asked("getdents64") == set()
    for name in sorted(set(NEVER) - {"execve", "readlinkat"}):
        assert asked(name), name
    for name in ("fchmod", "fchmodat", "utimensat", "fallocate", "flock", "waitid"):
        assert asked(name) == {errno.EPERM}, name
    compiler = child_filter(architecture, commands=True, compiles=True)
    clone, setpgid = number("clone", architecture), number("setpgid", architecture)
    assert clone is not None and setpgid is not None
    assert verdict(compiler, architecture, clone, 0x1200011) == ALLOW
    assert verdict(compiler, architecture, clone, 0x10000011) == errno.EPERM  # CLONE_NEWUSER
    assert verdict(compiler, architecture, setpgid) == errno.EPERM


@pytest.mark.parametrize(
    ("architecture", "header"),
    [(X86, "/usr/include/x86_64-linux-gnu/asm/unistd_64.h"), (ARM, "/usr/include/asm-generic/unistd.h")],
)
def test_numbers_equal_those_of_the_kernel_headers(architecture: int, header: str) -> None:
    if not Path(header).exists():
        pytest.skip(f"no {header}")
    found = dict(re.findall(r"#define __NR(?:3264)?_(\w+) (\d+)", Path(header).read_text()))
    found.setdefault("newfstatat", found.get("fstatat"))
    for table in (ALLOWED, CHECKED, COMMANDS, COMPILERS, LANDLOCK):
        for name, numbers in table.items():
            expected = found.get(name)
            assert numbers[architecture] == (None if expected is None else int(expected)), name
