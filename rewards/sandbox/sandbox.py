"""Runs untrusted programs: bounded, confined by the kernel, many per second.

A `Sandbox` keeps one warm zygote process per core (`rewards.sandbox.zygote`) and forks from it. Inputs and
outputs travel in anonymous memory files: nothing is written to disk, the caller pumps no pipes, and no output
exceeds its cap.

There are two tiers, and a probe that tries forbidden actions picks the best that holds: "landlock+seccomp";
"seccomp", for kernels without Landlock, which refuses every open. Both work without privileges, in containers
that forbid user namespaces, on x86-64 and aarch64 (where the filters are tested, but were never run). If
neither works, the sandbox does not start. Programs in other languages need Landlock. Without root all workers
share one user's limit of threads.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Literal, Self, TypeVar

from rewards.sandbox.process import Command, Limits, Program, RunResult, SandboxError, Zygote, ZygoteDied

log = logging.getLogger(__name__)

Tier = Literal["auto", "landlock+seccomp", "seccomp"]
Item = TypeVar("Item")
Result = TypeVar("Result")
ACQUIRE_TIMEOUT_S = 600.0
MAX_ATTEMPTS = 3


class Sandbox:
    """A pool of zygotes. Thread-safe; a process forked from the one that made it must make its own.

    Args:
        num_workers: programs at a time; default: the number of cores that this process may use.
        tier: "auto" takes the best tier that passes the probe.
        modules: of `rewards`, whose `main(source) -> exit status` programs may name.
        judges: of `rewards`, whose `main(source)` judging programs may name, and what those import of it.
        limits: of a program where `run` gives none; those of `run` may be tighter, or longer, not larger.
        commands: run programs in other languages (`run_command`) instead of Python; needs Landlock.
        packages: third-party modules to import beforehand, such as "numpy"; no others can be imported.

    Raises:
        SandboxError: no tier works on this machine; the message says why.
    """

    def __init__(
        self,
        *,
        num_workers: int | None = None,
        tier: Tier = "auto",
        modules: Sequence[str] = (),
        judges: Sequence[str] = (),
        packages: Sequence[str] = (),
        limits: Limits = Limits(),  # noqa: B008
        commands: bool = False,
    ) -> None:
        self.num_workers = num_workers or len(os.sched_getaffinity(0))
        self._options = {
            "modules": ["rewards.sandbox.script", *modules],
            "judges": list(judges),
            "packages": list(packages),
            "path": [path for path in sys.path if path] if packages else [],
            "landlock": tier != "seccomp",
            "commands": commands,
            "limits": limits.in_bytes(),
        }
        self.limits = limits
        self._wanted = tier
        self._pid = os.getpid()
        self._lock, self._slots = threading.Lock(), threading.Semaphore(self.num_workers)
        self._idle: list[Zygote] = []
        self._all: set[Zygote] = set()
        self._closed = False
        first = self._start()
        self.tier: str = first.tier
        self.landlock_abi: int = first.landlock_abi
        self._gid = first.gid
        self._idle.append(first)
        level = logging.INFO if self.tier == "landlock+seccomp" else logging.WARNING
        found = (self.tier, self.landlock_abi, self.num_workers)
        log.log(level, "code sandbox: tier %s (Landlock ABI %d), %d workers", *found)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends all zygotes and everything in them; safe to call twice."""
        with self._lock:
            self._closed = True
            idle, busy = self._idle, self._all.difference(self._idle)
            self._idle, self._all = [], set()
        if os.getpid() == self._pid:
            for zygote in [*busy, *idle]:
                zygote.close(kill=zygote in busy)

    def zygote_pids(self) -> list[int]:
        with self._lock:
            return [zygote.process.pid for zygote in self._all]

    def run(
        self, source: str | bytes, *, stdin: str | bytes = b"", limits: Limits | None = None
    ) -> RunResult:
        """Runs a Python script to its end or its deadline."""
        source = source.encode("utf-8", "surrogatepass") if isinstance(source, str) else source
        stdin = stdin.encode("utf-8", "surrogatepass") if isinstance(stdin, str) else stdin
        return self.run_programs([Program("rewards.sandbox.script", source, stdin)], limits=limits)[0]

    def run_command(self, command: Command, *, limits: Limits | None = None) -> RunResult:
        """Runs a command of another language; the sandbox must be made with `commands=True`."""
        return self.run_programs([command], limits=limits)[0]

    def give(self, folder: str) -> None:
        """Lets commands use a folder that this process made, and read its files."""
        if os.geteuid() == 0:
            os.chown(folder, -1, self._gid)
            os.chmod(folder, 0o770)
            for entry in os.scandir(folder):
                os.chmod(entry, 0o644)  # regardless of the owner's umask

    def run_programs(
        self, programs: Sequence[Program | Command], *, limits: Limits | None = None
    ) -> list[RunResult]:
        """Runs programs at once, two joined by pipes both ways. All end with the first, or at the deadline.

        A zygote that dies meanwhile is replaced, and the programs are run again.

        Raises:
            SandboxError: three zygotes died of the programs, or no zygote became free.
        """
        limits = limits or self.limits
        for attempt in range(1, MAX_ATTEMPTS + 1):
            zygote = self._acquire()
            alive = False
            try:
                results = zygote.run(programs, limits)
                alive = True
                return results
            except ZygoteDied as error:
                tries = f"attempt {attempt} of {MAX_ATTEMPTS}"
                log.warning("code sandbox: a zygote died (%s); %s", error, tries)
            finally:
                self._release(zygote, alive)
        raise SandboxError(f"the zygote died {MAX_ATTEMPTS} times while it ran a program; see the warnings")

    def map(self, fn: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
        """`[fn(item) for item in items]` with a thread per worker; for an `fn` that runs programs here."""
        listed = list(items)
        num_threads = min(self.num_workers, len(listed))
        if num_threads <= 1:
            return [fn(item) for item in listed]
        with ThreadPoolExecutor(num_threads, thread_name_prefix="sandbox") as pool:
            return list(pool.map(fn, listed))

    def _start(self) -> Zygote:
        zygote = Zygote(self._options)
        if self._wanted not in ("auto", zygote.tier):
            zygote.close(kill=True)
            offer = f"this machine offers {zygote.tier!r}"
            raise SandboxError(f"tier {self._wanted!r} is not available here ({offer}); use tier='auto'")
        with self._lock:
            self._all.add(zygote)
        return zygote

    def _acquire(self) -> Zygote:
        if os.getpid() != self._pid:
            here = os.getpid()
            raise SandboxError(f"this sandbox belongs to process {self._pid}; start one in process {here}")
        if not self._slots.acquire(timeout=ACQUIRE_TIMEOUT_S):
            raise SandboxError(f"no sandbox worker became free within {ACQUIRE_TIMEOUT_S:.0f} s")
        try:
            with self._lock:
                if self._closed:
                    raise SandboxError("the sandbox is closed")
                if self._idle:
                    return self._idle.pop()
            return self._start()
        except BaseException:
            self._slots.release()
            raise

    def _release(self, zygote: Zygote, alive: bool) -> None:
        with self._lock:
            keep = alive and not self._closed
            if keep:
                self._idle.append(zygote)
            else:
                self._all.discard(zygote)
        self._slots.release()
        if not keep:
            zygote.close(kill=True)
