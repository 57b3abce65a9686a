"""One zygote process from its owner's side: each way to start, run and end, and what each leaves behind."""

from __future__ import annotations

import fcntl
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rewards.sandbox import process as sandbox_process
from rewards.sandbox.process import (
    Limits,
    Program,
    SandboxError,
    Zygote,
    ZygoteDied,
    memory_file,
    read_file,
)
from rewards.sandbox.sandbox import Sandbox

PATIENT = Limits(timeout_s=60.0)


def options() -> dict[str, Any]:
    return {
        "modules": ["rewards.sandbox.script"],
        "judges": [],
        "packages": [],
        "path": [],
        "landlock": True,
        "commands": False,
        "limits": {"memory_bytes": 1 << 30, "output_bytes": 8 << 20},
    }


def script(source: str, **kwargs: Any) -> Program:
    return Program("rewards.sandbox.script", source.encode(), **kwargs)


def open_descriptors() -> set[str]:
    return set(os.listdir("/proc/self/fd"))


def is_gone(pid: int) -> bool:
    return not Path(f"/proc/{pid}").exists()


@pytest.fixture
def zygote() -> Iterator[Zygote]:
    made = Zygote(options())
    yield made
    made.close(kill=True)


def stand_in(folder: Path, body: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Starts a shell script where Python is expected."""
    path = folder / "python"
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(path))


def test_a_start_that_fails_says_why_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Zygote(options()).close(kill=True)
    before = open_descriptors()
    monkeypatch.setattr(sys, "executable", "")
    with pytest.raises(SandboxError, match=r"sys\.executable is empty"):
        Zygote(options())
    monkeypatch.setattr(sys, "executable", str(tmp_path / "missing"))
    with pytest.raises(SandboxError, match=r"cannot start .*missing: .*No such file"):
        Zygote(options())
    stand_in(tmp_path, "echo the last word >&2; exit 3", monkeypatch)
    with pytest.raises(SandboxError, match="did not start: exit status 3 the last word"):
        Zygote(options())
    assert open_descriptors() == before


def test_a_process_that_never_says_hello_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = open_descriptors()
    stand_in(tmp_path, f"echo $$ > {tmp_path}/pid; exec sleep 600", monkeypatch)
    monkeypatch.setattr(sandbox_process, "START_TIMEOUT_S", 5.0)  # the shell must have started by then
    with pytest.raises(SandboxError, match="did not start: no answer within 5 s"):
        Zygote(options())
    assert is_gone(int((tmp_path / "pid").read_text()))
    assert open_descriptors() == before


def test_a_module_that_cannot_be_imported_is_named() -> None:
    with pytest.raises(SandboxError, match=r"No module named 'rewards\.no_such_module'"):
        Zygote({**options(), "modules": ["rewards.no_such_module"]})


@pytest.mark.parametrize(
    ("source", "exit_code", "signal_number"),
    [
        ("pass", 0, None),
        ("raise SystemExit(255)", 255, None),
        ("1 / 0", 1, None),
        ("import os; os._exit(3)", 3, None),
        ("import os; os.abort()", None, signal.SIGABRT),
        ("import ctypes; ctypes.string_at(0)", None, signal.SIGSEGV),
    ],
)
def test_the_end_of_a_program_is_reported(
    zygote: Zygote, source: str, exit_code: int | None, signal_number: int | None
) -> None:
    (result,) = zygote.run([script(source)], PATIENT)
    assert (result.exit_code, result.signal) == (exit_code, signal_number)
    assert not (result.timed_out or result.killed or result.truncated)


def test_a_program_at_its_deadline_is_late_and_one_that_ends_before_is_not(zygote: Zygote) -> None:
    for source in ("while True: pass", "import time; time.sleep(600)", "import sys; sys.stdin.read()"):
        started = time.monotonic()
        program = script("import time\n" + source + "\ntime.sleep(600)")
        (late,) = zygote.run([program], Limits(timeout_s=0.5))
        assert late.timed_out and late.killed and late.exit_code is None, source
        assert 0.5 <= time.monotonic() - started < 30
    (result,) = zygote.run([script("print(1)")], PATIENT)
    assert (result.stdout, result.timed_out) == (b"1\n", False)


def test_time_is_wall_clock_and_cpu_time_is_measured(zygote: Zygote) -> None:
    work = "import time\nend = time.process_time() + 0.3\nwhile time.process_time() < end: pass"
    (busy,) = zygote.run([script(work)], PATIENT)
    (idle,) = zygote.run([script("import time; time.sleep(0.3)")], PATIENT)
    assert busy.cpu_s >= 0.3 > idle.cpu_s
    (large,) = zygote.run([script("x = b'x' * (64 << 20)")], PATIENT)
    assert large.max_rss_mib > idle.max_rss_mib + 32


def test_outputs_are_kept_apart_or_in_order(zygote: Zygote) -> None:
    source = "import sys\nprint(1, flush=True)\nprint(2, file=sys.stderr, flush=True)\nprint(3)"
    (apart,) = zygote.run([script(source)], PATIENT)
    (joined,) = zygote.run([script(source, one_output=True)], PATIENT)
    assert (apart.stdout, apart.stderr) == (b"1\n3\n", b"2\n")
    assert joined.stdout == b"1\n2\n3\n"


def test_bytes_pass_unchanged(zygote: Zygote) -> None:
    data = bytes(range(256)) * 4096
    echo = "import sys; sys.stdout.buffer.write(sys.stdin.buffer.read())"
    (result,) = zygote.run([script(echo, stdin=data)], PATIENT)
    assert result.stdout == data
    (result,) = zygote.run([script("# " + "é" * 500_000 + "\nprint('ü')")], PATIENT)
    assert result.stdout == "ü\n".encode()


def test_an_output_at_its_cap_is_cut_and_said_to_be(zygote: Zygote) -> None:
    fill = "import os\nfor _ in range(16): os.write(1, b'x' * 65536)"
    (exact,) = zygote.run([script(fill)], Limits(timeout_s=60.0, output_mib=2))
    assert len(exact.stdout) == 1 << 20 and not exact.truncated
    (cut,) = zygote.run([script(fill + "\nos.write(1, b'x')")], Limits(timeout_s=60.0, output_mib=1))
    assert len(cut.stdout) == 1 << 20 and cut.truncated


def test_jobs_and_accidents_leave_descriptors_flat(zygote: Zygote) -> None:
    zygote.run([script("pass")], PATIENT)
    before = open_descriptors()
    for source in ("print(1)", "import os; os.abort()", "def"):
        zygote.run([script(source, stdin=b"x")], PATIENT)
    zygote.process.kill()
    zygote.process.wait()
    for _ in range(3):
        with pytest.raises(ZygoteDied):
            zygote.run([script("pass", stdin=b"x")], PATIENT)
    assert open_descriptors() == before


def test_death_in_mid_run_is_told_apart_from_the_programs_end(zygote: Zygote) -> None:
    threading.Timer(0.3, zygote.process.kill).start()
    with pytest.raises(ZygoteDied, match="exit status -9"):
        zygote.run([script("import time; time.sleep(600)")], PATIENT)


def test_a_zygote_that_falls_silent_is_taken_for_dead_and_replaced(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with Sandbox(num_workers=1) as sandbox:
        (pid,) = sandbox.zygote_pids()
        os.kill(pid, signal.SIGSTOP)
        monkeypatch.setattr(sandbox_process, "GRACE_S", 0.5)
        assert sandbox.run("print(1)", limits=Limits(timeout_s=0.7)).stdout == b"1\n"
        assert is_gone(pid) and pid not in sandbox.zygote_pids()
    assert "no answer within 4 s); attempt 1 of 3" in caplog.text


def test_a_program_that_ends_each_zygote_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    with Sandbox(num_workers=1) as sandbox:
        before = Zygote.run

        def run(self: Zygote, *arguments: Any) -> Any:
            self.process.kill()
            return before(self, *arguments)

        monkeypatch.setattr(Zygote, "run", run)
        with pytest.raises(SandboxError, match="died 3 times"):
            sandbox.run("print(1)")
        monkeypatch.undo()
        assert sandbox.run("print(1)").stdout == b"1\n"


def test_an_idle_zygote_leaves_by_itself_and_a_busy_one_is_killed() -> None:
    before = open_descriptors()
    idle = Zygote(options())
    idle.run([script("pass")], PATIENT)
    idle.close(kill=False)
    idle.close(kill=False)
    assert idle.process.returncode == 0
    busy = Zygote(options())
    os.kill(busy.process.pid, signal.SIGSTOP)
    busy.close(kill=True)
    assert busy.process.returncode == -signal.SIGKILL
    assert open_descriptors() == before


def test_close_ends_what_still_runs() -> None:
    sandbox = Sandbox(num_workers=1)
    errors: list[BaseException] = []

    def run() -> None:
        try:
            sandbox.run("import time; time.sleep(600)", limits=Limits(timeout_s=600.0))
        except SandboxError as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    time.sleep(0.5)
    pids = sandbox.zygote_pids()
    sandbox.close()
    thread.join(30)
    assert not thread.is_alive() and len(errors) == 1
    assert all(map(is_gone, pids))


def test_secrets_of_the_owner_do_not_reach_the_zygote(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COHORT_TEST_SECRET", "hunter2")
    made = Zygote(options())
    try:
        if os.geteuid() == 0:  # its environment is readable by root only
            environment = Path(f"/proc/{made.process.pid}/environ").read_bytes()
            assert b"PATH=" in environment and b"hunter2" not in environment
        (result,) = made.run([script("import os; print(*sorted(os.environ))")], PATIENT)
        assert b"COHORT" not in result.stdout
    finally:
        made.close(kill=True)


def test_a_memory_file_starts_at_its_start_and_is_not_inherited() -> None:
    descriptor = memory_file(b"abcdef")
    try:
        assert fcntl.fcntl(descriptor, fcntl.F_GETFD) & fcntl.FD_CLOEXEC
        assert read_file(descriptor, 4) == b"abcd"
        assert read_file(descriptor, 100) == b"abcdef"
        assert os.read(descriptor, 100) == b"abcdef"
        assert not os.fstat(descriptor).st_mode & 0o111 or os.uname().release < "6.3"
    finally:
        os.close(descriptor)
