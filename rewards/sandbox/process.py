"""The owner's side of one zygote process: start, run, end. `rewards.sandbox.zygote` is the other side."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rewards.sandbox.pack import build_archive
from rewards.sandbox.reaper import SHARE

START_TIMEOUT_S = 60.0
LEAVE_S = 2.0  # given to an idle zygote to exit by itself
GRACE_S = 10.0  # a zygote silent for longer past the deadline counts as dead
MFD_NOEXEC_SEAL = 8
SEALS = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL


class SandboxError(RuntimeError):
    """A fault of the machine or of this library, never of the untrusted program."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What one program may use.

    Attributes:
        timeout_s: measured outside the program, without what it waits for a processor that others keep busy
            (`reaper.own_seconds`). CPU time is limited to one second more.
        memory_mib: address space.
        output_mib: each of stdout and stderr.
    """

    timeout_s: float = 5.0
    memory_mib: int = 1024
    output_mib: int = 8

    def in_bytes(self) -> dict[str, int]:
        return {"memory_bytes": self.memory_mib << 20, "output_bytes": self.output_mib << 20}

    def __post_init__(self) -> None:
        for name, least in (("timeout_s", 0.01), ("memory_mib", 64), ("output_mib", 1)):
            if not getattr(self, name) >= least:
                raise ValueError(f"{name}={getattr(self, name)} is below {least}; use for example {Limits()}")


@dataclass(frozen=True, slots=True)
class Program:
    """A program to run: `module.main(source)` in a fork of the zygote.

    Attributes:
        judge: it is the first of two programs, is trusted, and writes its verdict to descriptor 5.
        one_output: stderr goes to the same file as stdout.
    """

    module: str
    source: bytes
    stdin: bytes = b""
    judge: bool = False
    one_output: bool = False


@dataclass(frozen=True, slots=True)
class Command:
    """A command to run in `folder`: an absolute path and its arguments.

    Attributes:
        compiles: it may use the system's compilers, start processes and write `folder`; else only read.
        address_space: False: the memory limit counts data, not addresses.
    """

    command: tuple[str, ...]
    folder: str
    stdin: bytes = b""
    compiles: bool = False
    address_space: bool = True


@dataclass(frozen=True, slots=True)
class RunResult:
    """How one program ended.

    Attributes:
        exit_code, signal: 0..255, or the signal that ended it; the other is None.
        timed_out: it was still running at the deadline, or ran out of CPU time.
        killed: the sandbox ended it: at the deadline, or because the program it served had ended.
        truncated: stdout or stderr reached its cap.
        extra: the bytes that it wrote to descriptor 5.
    """

    exit_code: int | None
    signal: int | None
    timed_out: bool
    killed: bool
    stdout: bytes
    stderr: bytes
    extra: bytes
    truncated: bool
    cpu_s: float
    max_rss_mib: float


class ZygoteDied(Exception):
    """The zygote ended or fell silent; its programs can be run again in another."""


class Zygote:
    """The owner's side of one zygote process, for one thread at a time. SandboxError if no tier works."""

    def __init__(self, options: dict[str, Any]) -> None:
        if not sys.executable:
            raise SandboxError("sys.executable is empty: the sandbox does not know which Python to start")
        self.socket, far_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.errors = memory_file()
        archive = memory_file(_archive(tuple(options["judges"])))
        settings = {**options, "control": far_end.fileno(), "archive": archive, "parent": os.getpid()}
        try:
            self.process = _start(settings, self.errors)
        except BaseException:
            self._close_descriptors()
            raise
        finally:
            far_end.close()
            os.close(archive)
        try:
            hello = self._receive(START_TIMEOUT_S)
            if "refused" in hello:
                raise SandboxError(
                    "no confinement works here, so untrusted code is not run: "
                    f"{hello['refused']}. If the kernel refused: it must offer "
                    "seccomp filters (CONFIG_SECCOMP_FILTER) and let an unprivileged process install one"
                )
        except BaseException as error:
            self.close(kill=True)
            if isinstance(error, ZygoteDied):
                raise SandboxError(f"the sandbox process did not start: {error}") from error
            raise
        self.tier, self.landlock_abi, self.gid = hello["tier"], hello["landlock_abi"], hello["gid"]

    def run(self, programs: Sequence[Program | Command], limits: Limits) -> list[RunResult]:
        files: list[int] = []

        def add(data: bytes = b"") -> int:
            files.append(memory_file(data))
            return len(files) - 1

        def describe(program: Program | Command) -> dict[str, Any]:
            if isinstance(program, Command):
                shared = {"command": program.command, "folder": program.folder, "compiles": program.compiles}
                fds = [add(program.stdin), add(), add(), -1, -1]
                return {**shared, "address_space": program.address_space, "fds": fds}
            source = add(program.source)
            if program.judge:
                return {"module": program.module, "fds": [-1, -1, -1, source, add()]}
            stdin, stdout = add(program.stdin), add()
            stderr = stdout if program.one_output else add()
            return {"module": program.module, "fds": [stdin, stdout, stderr, source, -1]}

        try:
            described = [describe(program) for program in programs]
            job = {"programs": described, "timeout_s": limits.timeout_s, **limits.in_bytes()}
            try:
                socket.send_fds(self.socket, [json.dumps(job).encode()], files)
            except OSError as error:
                raise ZygoteDied(f"sending to it: {error}") from error
            answer = self._receive(limits.timeout_s / SHARE + GRACE_S)
            pairs = zip(described, answer["programs"], strict=True)
            return [
                _result(given, done, files=files, timed_out=answer["timed_out"], limits=limits)
                for given, done in pairs
            ]
        finally:
            for descriptor in files:
                os.close(descriptor)

    def _receive(self, timeout_s: float) -> dict[str, Any]:
        self.socket.settimeout(timeout_s)
        try:
            message = self.socket.recv(1 << 16)
        except TimeoutError:
            raise ZygoteDied(f"no answer within {timeout_s:.0f} s") from None
        except OSError as error:
            raise ZygoteDied(str(error)) from error
        if not message:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(1)
            last_words = read_file(self.errors, 4096).decode(errors="replace").strip().splitlines()[-1:]
            raise ZygoteDied(f"exit status {self.process.poll()} {''.join(last_words)}")
        return json.loads(message)

    def close(self, *, kill: bool) -> None:
        """Ends the process and everything in it: at once, or, if idle, after it has reaped its judges."""
        self._close_descriptors()
        with contextlib.suppress(subprocess.TimeoutExpired):
            if not kill:
                self.process.wait(LEAVE_S)
                return
        self.process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(GRACE_S)

    def _close_descriptors(self) -> None:
        self.socket.close()
        if self.errors >= 0:
            os.close(self.errors)
            self.errors = -1


def _start(settings: dict[str, Any], errors: int) -> subprocess.Popen[bytes]:
    program = str(Path(__file__).with_name("zygote.py"))
    command = [sys.executable, "-I", "-S", "-B", "-X", "utf8", program, json.dumps(settings)]
    one = dict.fromkeys(("MALLOC_ARENA_MAX", "OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS"), "1")
    try:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=errors,
            env={"PATH": "/usr/bin:/bin", **one},
            pass_fds=(settings["control"], settings["archive"]),
            start_new_session=True,  # Ctrl-C and Ctrl-Z are for the owner only
        )
    except OSError as error:
        raise SandboxError(f"cannot start {sys.executable}: {error}") from error


def memory_file(data: bytes = b"") -> int:
    """An anonymous file in memory, at position 0; with data it is an input and sealed against change."""
    flags = os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING
    try:
        descriptor = os.memfd_create("sandbox", flags | MFD_NOEXEC_SEAL)
    except OSError:  # kernels before 6.3 do not know the last flag
        descriptor = os.memfd_create("sandbox", flags)
    written = 0
    while written < len(data):
        written += os.pwrite(descriptor, data[written:], written)
    if data:
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, SEALS)
    return descriptor


def read_file(descriptor: int, max_bytes: int) -> bytes:
    return os.pread(descriptor, min(max_bytes, os.fstat(descriptor).st_size), 0)


def _result(
    given: dict[str, Any], done: dict[str, Any], *, files: list[int], timed_out: bool, limits: Limits
) -> RunResult:
    _, stdout, stderr, _, extra = given["fds"]
    cap = limits.output_mib << 20
    outputs = [read_file(files[index], cap) if index >= 0 else b"" for index in (stdout, stderr, extra)]
    status = done["status"]
    ended_by = os.WTERMSIG(status) if os.WIFSIGNALED(status) else None
    out_of_cpu = ended_by in (signal.SIGXCPU, signal.SIGKILL) and done["cpu_s"] >= limits.timeout_s
    return RunResult(
        exit_code=os.WEXITSTATUS(status) if os.WIFEXITED(status) else None,
        signal=ended_by,
        timed_out=(timed_out and done["killed"]) or out_of_cpu,
        killed=done["killed"],
        stdout=outputs[0],
        stderr=outputs[1],
        extra=outputs[2],
        truncated=max(len(outputs[0]), len(outputs[1])) >= cap,
        cpu_s=done["cpu_s"],
        max_rss_mib=done["max_rss_kib"] / 1024,
    )


_archive = functools.cache(build_archive)
