"""The zygote: a fresh, warm Python process that confines itself, then forks one child per program.

`rewards.sandbox` starts one per core as `python -I -S -B -X utf8 zygote.py OPTIONS`. The zygote never reads a
program, an input or a test: it passes file descriptors on, and each child reads its own source. It runs one
job at a time. A job names its programs, which all end with the first one, or when their time is up
(`rewards.sandbox.reaper.Meter`).

A program controls all of its process, including memory that the process shares with others. A child therefore
shares nothing that it could write: memory is copied on write, inputs are sealed, descriptors are its own, and
judges run code that was imported before the first program (`tests/rewards/test_sandbox_leftovers.py`).

Job (JSON, descriptors beside it): {"programs": [{"module", "fds": [stdin, stdout, stderr, source, extra]},
...], "timeout_s", "memory_bytes", "output_bytes"}; descriptors are indices, -1 = closed. Of two programs
the first judges the second, through a pipe each way. A judge is trusted: its process serves many jobs,
which saves a fork. Answer: {"timed_out", "programs": [{"status", "killed", "cpu_s", "max_rss_kib"}, ...]}.
"""

from __future__ import annotations

import _signal  # pyright: ignore[reportMissingImports]
import contextlib
import fcntl
import gc
import importlib.machinery
import json
import math
import mmap
import os
import resource
import signal
import site
import socket
import sys
import types
from typing import TYPE_CHECKING, Any, NoReturn, cast

if TYPE_CHECKING:
    from rewards.sandbox import archive, confine, filters, judging, reaper
    from rewards.sandbox import command as sandbox_command

# The zygote's descriptors: received ones and pipes are numbered from FIRST_FREE.
NULL, FIRST_FREE, CONTROL = 7, 8, 64
MAX_MESSAGE, MAX_DESCRIPTORS = 1 << 16, 128
SERVANT_CPU_S = 3600
PACKAGES = ("sandbox", "code")  # of `rewards`, whose modules run here
FIRST_OWN_UID, NUM_TASKS = 1_879_048_192, 192
RESERVED_TASKS = 1024  # for zygotes and judges: the kernel counts per user, and programs may use up theirs
WARM_ROUNDS = 30
PROBE_COMMAND = {"command": ["/bin/true"], "folder": "/lib", "compiles": False, "address_space": True}

# Modules that most programs import. Others come from the archive: each module here slows down every fork.
WARM_MODULES = """
    array bisect cmath collections.abc contextlib copy ctypes datetime enum functools heapq io itertools json
    math operator random re resource signal string struct threading time types typing weakref
""".split()  # noqa: SIM905
# Extension modules that archived modules need; loading them later would open a file.
EXTENSION_MODULES = """
    _blake2 _contextvars _csv _decimal _hashlib _posixsubprocess _socket binascii fcntl select unicodedata
    zlib
""".split()  # noqa: SIM905
READABLE = ("/usr/share/zoneinfo", "/etc/localtime", "/dev/urandom", "/dev/random", "/dev/zero")


def main() -> None:
    options = json.loads(sys.argv[1])
    # Signal dispositions and masks outlive exec; the owner's must not hide the ends of our children.
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    control = socket.socket(fileno=fcntl.fcntl(options["control"], fcntl.F_DUPFD, CONTROL))
    os.close(options["control"])
    try:
        _die_with_parent(options["parent"])
        abi, num_tasks = _prepare(options)
        zygote = Zygote(options["limits"], abi, num_tasks, commands=options["commands"])
        breach = zygote.probe(opens=abi > 0)
        if breach:
            raise PermissionError(f"a confined process could {breach}")
    except Exception as error:
        control.send(json.dumps({"refused": f"{type(error).__name__}: {error}"}).encode())
        return
    tier = "landlock+seccomp" if abi else "seccomp"
    control.send(json.dumps({"tier": tier, "landlock_abi": abi, "gid": os.getegid()}).encode())
    zygote.serve(control, options["parent"])


def _die_with_parent(parent: int) -> None:
    """Ends this process when the process `parent` ends, even by kill -9.

    The kernel signals when the *thread* that started us ends, so the handler checks for the process.
    """
    signal.signal(signal.SIGHUP, lambda *_: os._exit(0) if os.getppid() != parent else None)
    confine.prctl(filters.PR_SET_PDEATHSIG, signal.SIGHUP)
    if os.getppid() != parent:
        os._exit(0)


def _prepare(options: dict[str, Any]) -> tuple[int, int]:
    """Imports what programs may use, then confines this process. Returns the Landlock version in use (0:
    none) and the number of this user's tasks at which a program can still start one more.
    """
    if confine.ARCHITECTURE < 0:
        machine = os.uname().machine
        raise NotImplementedError(f"no system call table for {machine}; x86_64 and aarch64 have one")
    commands = options["commands"]
    for name in () if commands else (*WARM_MODULES, *options["modules"]):
        importlib.import_module(name)
    site.setquit()  # `exit` and `quit`, which -S leaves out
    sys.path += options["path"]
    for name in [*EXTENSION_MODULES, *options["packages"]]:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    # Private: what a child writes to its copy after mprotect stays invisible to judges and later children.
    packed = mmap.mmap(options["archive"], 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ)
    os.close(options["archive"])
    builtin, frozen = importlib.machinery.BuiltinImporter, importlib.machinery.FrozenImporter
    sys.meta_path[:] = [builtin, frozen, cast(Any, archive.ArchiveFinder(packed))]  # no imports from files
    for known in (sys.path, sys.path_hooks, sys.path_importer_cache):
        known.clear()
    for name in ("rewards", *(f"rewards.{wing}" for wing in PACKAGES)):
        sys.modules[name].__path__ = []
    for name in () if commands else options["judges"]:
        importlib.import_module(name)  # before the first program runs
    if shared := confine.writable_shared_memory():
        raise PermissionError(
            f"programs could write into memory that they share with their judges: {', '.join(shared)}; "
            "leave out the package that maps it"
        )
    sys.argv = [""]
    for descriptor in range(3, FIRST_FREE):
        os.dup2(0, descriptor)
    os.closerange(FIRST_FREE, CONTROL)
    os.chdir("/")
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")  # out of memory, the kernel kills a sandboxed program before the trainer
    # Zygotes for commands share a group, and so folders, but not a user, whose tasks would count together.
    is_own = confine.drop_privileges(FIRST_OWN_UID + os.getpid(), FIRST_OWN_UID + options["parent"])
    num_tasks = NUM_TASKS if is_own else confine.count_user_tasks() + 1024
    confine.prctl(confine.PR_SET_DUMPABLE, 0)
    confine.prctl(filters.PR_SET_PDEATHSIG, signal.SIGHUP)  # a change of user has cleared it
    confine.prctl(filters.PR_SET_NO_NEW_PRIVS, 1)
    confine.prctl(filters.PR_SET_CHILD_SUBREAPER, 1)  # we reap what a compiler leaves behind
    confine.limit_tasks_and_descriptors(num_tasks + RESERVED_TASKS)
    abi = confine.landlock_abi() if options["landlock"] else 0
    if commands and not abi:
        raise NotImplementedError("programs in languages other than Python need Landlock (Linux 5.13)")
    if not commands:  # commands get their own rules, which these would restrict further
        confine.limit_memory_and_output(**options["limits"])
        if abi:
            rights = confine.LANDLOCK_READ | confine.LANDLOCK_READ_DIR
            null = ("/dev/null", confine.LANDLOCK_READ | confine.LANDLOCK_WRITE)
            confine.restrict_files([null, *((path, rights) for path in READABLE)], abi)
    confine.Filter(filters.zygote_filter(confine.ARCHITECTURE, opens=abi > 0, commands=commands)).install()
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})
    return abi, num_tasks


class Zygote:
    """Forks confined children. `limits` ("memory_bytes", "output_bytes") already apply to this process."""

    def __init__(self, limits: dict[str, int], abi: int, num_tasks: int, *, commands: bool) -> None:
        self.pid = os.getpid()
        self.abi = abi
        self.num_tasks = num_tasks
        self.commands = commands
        self.limits = limits
        hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
        self.max_cpu_s = 1 << 30 if hard == resource.RLIM_INFINITY else hard
        self.filter = confine.Filter(filters.child_filter(confine.ARCHITECTURE))
        self.servants: dict[str, reaper.Servant] = {}
        self._warm_up()
        gc.collect()
        gc.freeze()

    def _warm_up(self) -> None:
        """Runs what every child runs first, so that each has less to specialise, cache and copy."""
        for module in list(sys.modules.values()):
            if module.__name__.startswith("rewards.") and hasattr(module, "warm_up"):
                module.warm_up()
        for _ in range(WARM_ROUNDS):
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            self.filter.for_this_process()

    def probe(self, *, opens: bool) -> str:
        """Names a forbidden thing that a confined child can still do; empty if there is none."""
        read_end, write_end = os.pipe()
        pid = confine.fork()
        if pid == 0:
            try:
                if self.commands:
                    self._confine_command({**PROBE_COMMAND, **self.limits}, 5)
                else:
                    self._confine_child({"timeout_s": 5, **self.limits}, 5)
                os.write(write_end, (confine.breach(opens) or "nothing").encode())
            except BaseException as error:
                os.write(write_end, f"not be confined: {type(error).__name__}: {error}".encode())
            finally:
                os._exit(0)
        os.close(write_end)
        finding = os.read(read_end, 4096).decode()
        os.close(read_end)
        os.waitpid(pid, 0)
        return "" if finding == "nothing" else finding or "not report back"

    def serve(self, control: socket.socket, parent: int) -> None:
        """Runs jobs until the other end closes."""
        while True:
            message, fds, _, _ = socket.recv_fds(control, MAX_MESSAGE, 16)
            if not message or os.getppid() != parent:
                for servant in self.servants.values():
                    reaper.kill(servant.pid)
                return
            try:
                answer = self._run(json.loads(message), fds)
            finally:
                for descriptor in fds:
                    os.close(descriptor)
            control.send(json.dumps(answer).encode())

    def _run(self, job: dict[str, Any], fds: list[int]) -> dict[str, Any]:
        *judges, program = job["programs"]
        if not judges:
            pid = confine.fork()
            if pid == 0:
                self._become(program, job, fds, (-1, -1))
            ended = reaper.wait_for(pid, reaper.Meter(job["timeout_s"], pid))
            if "command" in program:
                reaper.end_group(pid)  # processes that a compiler left behind
            return {"timed_out": ended["killed"], "programs": [ended]}
        servant = self._servant(judges[0]["module"])
        pipes = [*os.pipe(), *os.pipe()]
        pid = confine.fork()
        if pid == 0:
            self._become(program, job, fds, (pipes[2], pipes[1]))
        meter = reaper.Meter(job["timeout_s"], pid, servant.pid)
        *_, source, extra = judges[0]["fds"]
        socket.send_fds(servant.socket, [b"job"], [fds[source], fds[extra], pipes[0], pipes[3]])
        for descriptor in pipes:
            os.close(descriptor)
        judged = servant.wait(meter)
        if not servant.alive:
            del self.servants[judges[0]["module"]]
        return {"timed_out": judged["killed"], "programs": [judged, reaper.kill(pid)]}

    def _servant(self, module: str) -> reaper.Servant:
        """The process that runs this judge's `main` for one job after another; forked if there is none."""
        if module not in self.servants:
            near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
            pid = confine.fork()
            if pid == 0:
                self._become_servant(module, far)
            far.close()
            self.servants[module] = reaper.Servant(pid, near)
        return self.servants[module]

    def _become(
        self, program: dict[str, Any], job: dict[str, Any], fds: list[int], links: tuple[int, int]
    ) -> NoReturn:
        """Turns the forked child into the program."""
        status = 70
        try:
            given = [fds[index] if index >= 0 else -1 for index in program["fds"]]
            numbers = (0, 1, 2, judging.SOURCE, judging.EXTRA, judging.LINK_IN, judging.LINK_OUT)
            for target, descriptor in zip(numbers, [*given, *links], strict=True):
                # Not the zygote's /dev/null: processes that inherit an open file share its flags.
                os.dup2(descriptor, target) if descriptor >= 0 else os.close(target)
            os.closerange(NULL, MAX_DESCRIPTORS)
            cpu_s = math.ceil(job["timeout_s"]) + 1
            if not program.get("compiles"):
                confine.lower_limit(resource.RLIMIT_NPROC, self.num_tasks)
            if "command" in program:
                os.closerange(3, NULL)
                signal.pthread_sigmask(signal.SIG_SETMASK, ())
                self._confine_command({**program, **job}, cpu_s)
                sandbox_command.become_command(program)
            source = os.pread(judging.SOURCE, os.fstat(judging.SOURCE).st_size, 0)
            os.close(judging.SOURCE)
            self._confine_child(job, cpu_s)
            status = sys.modules[program["module"]].main(source)
        except BaseException:
            sys.excepthook(*sys.exc_info())  # pyright: ignore[reportArgumentType]
        finally:
            os._exit(status)

    def _confine_command(self, program: dict[str, Any], cpu_s: int) -> None:
        sandbox_command.enter_command(program, self.abi)
        self._end_with_zygote_and_limit(cpu_s)
        compiles = program["compiles"]
        confine.Filter(filters.child_filter(confine.ARCHITECTURE, commands=True, compiles=compiles)).install()

    def _become_servant(self, module: str, control: socket.socket) -> NoReturn:
        """Turns the forked child into a judge, whose module was imported before any program ran."""
        try:
            for target in (2, judging.LINK_IN, judging.LINK_OUT, judging.EXTRA, judging.SOURCE):
                os.dup2(0, target)
            os.dup2(control.fileno(), NULL)
            os.closerange(FIRST_FREE, MAX_DESCRIPTORS)
            control = socket.socket(fileno=NULL)
            self._confine_child({"timeout_s": 0, **self.limits}, SERVANT_CPU_S)
            judging.serve(sys.modules[module].main, control)
        finally:
            os._exit(0)

    def _end_with_zygote_and_limit(self, cpu_s: int) -> None:
        confine.prctl(filters.PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != self.pid:
            os._exit(0)
        _signal.signal(signal.SIGHUP, 0)  # SIG_DFL; the wrapper in `signal` builds enumerations
        cpu_s = min(cpu_s, self.max_cpu_s)
        resource.setrlimit(resource.RLIMIT_CPU, (cpu_s, cpu_s))

    def _confine_child(self, job: dict[str, Any], cpu_s: int) -> None:
        self._end_with_zygote_and_limit(cpu_s)
        saved = self.limits["memory_bytes"] - job["memory_bytes"]
        if saved > 0:
            confine.lower_limit(resource.RLIMIT_AS, resource.getrlimit(resource.RLIMIT_AS)[1] - saved)
        if job["output_bytes"] < self.limits["output_bytes"]:
            confine.lower_limit(resource.RLIMIT_FSIZE, job["output_bytes"])
        self.filter.install()


if __name__ == "__main__":
    # The packages' own code is not run: it imports modules that a zygote must not hold.
    rewards = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    for name, folder in (("rewards", ""), *((f"rewards.{wing}", wing) for wing in PACKAGES)):
        package = sys.modules[name] = types.ModuleType(name)
        package.__path__ = [os.path.join(rewards, folder)]
    from rewards.sandbox import archive, confine, filters, judging, reaper
    from rewards.sandbox import command as sandbox_command

    main()
