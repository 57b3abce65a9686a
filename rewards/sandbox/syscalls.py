"""System call numbers by name, x86-64 then aarch64; "-" and None where the architecture lacks the call.

Sources: Linux arch/x86/entry/syscalls/syscall_64.tbl and include/uapi/asm-generic/unistd.h;
`tests/rewards/test_sandbox_filters.py` compares them with the kernel headers of the machine.
"""

from __future__ import annotations

Table = dict[str, tuple[int | None, int | None]]


def _table(text: str) -> Table:
    rows = (entry.split() for entry in text.split(","))
    return {name: (None if a == "-" else int(a), None if b == "-" else int(b)) for name, a, b in rows}


# Calls that a Python program, its threads and the zygote need. None of them names another process, a file or
# an address.
ALLOWED = _table("""
    read 0 63, write 1 64, readv 19 65, writev 20 66, pread64 17 67, pwrite64 18 68, preadv 295 69,
    pwritev 296 70, preadv2 327 286, pwritev2 328 287, close 3 57, close_range 436 436, lseek 8 62,
    fstat 5 80, stat 4 -, lstat 6 -, newfstatat 262 79, statx 332 291, access 21 -, faccessat 269 48,
    faccessat2 439 439, getcwd 79 17, umask 95 166, dup 32 23, dup2 33 -, dup3 292 24, pipe 22 -,
    pipe2 293 59, poll 7 -, ppoll 271 73, select 23 -, pselect6 270 72, epoll_create 213 -,
    epoll_create1 291 20, epoll_ctl 233 21, epoll_wait 232 -, epoll_pwait 281 22, epoll_pwait2 441 441,
    eventfd 284 -, eventfd2 290 19, sendto 44 206, recvfrom 45 207, sendmsg 46 211, recvmsg 47 212,
    shutdown 48 210, getsockopt 55 209, getsockname 51 204, getpeername 52 205, mmap 9 222, mprotect 10 226,
    munmap 11 215, mremap 25 216, brk 12 214, madvise 28 233, msync 26 227, membarrier 324 283,
    futex 202 98, futex_waitv 449 449, set_robust_list 273 99, set_tid_address 218 96, rseq 334 293,
    gettid 186 178, getpid 39 172, getppid 110 173, getpgrp 111 -, getuid 102 174, geteuid 107 175,
    getgid 104 176, getegid 108 177, getresuid 118 148, getresgid 120 150, getgroups 115 158,
    sched_yield 24 124, sched_getaffinity 204 123, sched_getparam 143 121, sched_getscheduler 145 120,
    sched_get_priority_max 146 125, sched_get_priority_min 147 126, getcpu 309 168, rt_sigaction 13 134,
    rt_sigprocmask 14 135, rt_sigreturn 15 139, rt_sigsuspend 130 133, rt_sigpending 127 136,
    rt_sigtimedwait 128 137, sigaltstack 131 132, pause 34 -, alarm 37 -, getitimer 36 102,
    setitimer 38 103, restart_syscall 219 128, nanosleep 35 101, clock_nanosleep 230 115,
    clock_gettime 228 113, clock_getres 229 114, gettimeofday 96 169, time 201 -, times 100 153,
    getrusage 98 165, getrlimit 97 163, setrlimit 160 164, sysinfo 99 179, uname 63 160, getrandom 318 278,
    exit 60 93, exit_group 231 94
""")

# Calls allowed for some arguments only, or named otherwise in `rewards.sandbox.confine`.
CHECKED = _table("""
    open 2 -, openat 257 56, creat 85 -, fcntl 72 25, ioctl 16 29, socketpair 53 199, clone 56 220,
    prctl 157 167, prlimit64 302 261, kill 62 129, tgkill 234 131, wait4 61 260, seccomp 317 277
""")

# Calls that programs in other languages also need; Landlock checks their paths.
COMMANDS = _table("""
    execve 59 221, readlink 89 -, readlinkat 267 78, getdents 78 -, getdents64 217 61, chdir 80 49,
    fchdir 81 50, fadvise64 221 223, statfs 137 43, fstatfs 138 44, sendfile 40 71, arch_prctl 158 -,
    capget 125 90, pkey_alloc 330 289, pkey_free 331 290, pkey_mprotect 329 288, get_mempolicy 239 236,
    mincore 27 232
""")

# Calls that only their compilers need; Landlock does not check all of them (chmod, for one).
COMPILERS = _table("""
    fork 57 -, vfork 58 -, waitid 247 95, mkdir 83 -, mkdirat 258 34, rmdir 84 -, unlink 87 -,
    unlinkat 263 35, rename 82 -, renameat 264 38, renameat2 316 276, chmod 90 -, fchmod 91 52,
    fchmodat 268 53, ftruncate 77 46, truncate 76 45, fallocate 285 47, fsync 74 82, fdatasync 75 83,
    utimensat 280 88, copy_file_range 326 285, flock 73 32, setpgid 109 154
""")

LANDLOCK = _table("""
    landlock_create_ruleset 444 444, landlock_add_rule 445 445, landlock_restrict_self 446 446
""")


_ALL = ALLOWED | CHECKED | COMMANDS | COMPILERS | LANDLOCK


def number(name: str, architecture: int) -> int | None:
    """The number of a listed call; `architecture` is 0 for x86-64, 1 for aarch64."""
    return _ALL[name][architecture]
