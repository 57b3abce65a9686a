"""The sandbox as a machine part: bounded, repeatable, alive after every accident, gone when its owner is."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from rewards.code.grader import CodeOptions, code_sandbox, grade
from rewards.sandbox.sandbox import Limits, Sandbox, SandboxError
from rl.types import Reward
from tests.waiting import wait_until

ROOT = Path(__file__).resolve().parents[2]
ADD = "def add(a, b): return a + b"
ADD_TESTS = {"type": "asserts", "entry_point": "add", "code": "assert add(2, 3) == 5"}
PATIENT = CodeOptions(timeout_s=60.0)


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    with code_sandbox(num_workers=2) as made:
        yield made


def is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state not in "ZX"


def children_of(pid: int) -> set[int]:
    found = set()
    for entry in filter(str.isdigit, os.listdir("/proc")):
        try:
            fields = Path(f"/proc/{entry}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == pid:
            found |= {int(entry), *children_of(int(entry))}
    return found


def resources(pids: list[int]) -> dict[str, int]:
    """What this process and the zygotes hold."""
    statuses = [Path(f"/proc/{pid}/status").read_text().splitlines() for pid in pids]
    memory = [int(line.split()[1]) for lines in statuses for line in lines if line.startswith("VmRSS")]
    return {
        "descriptors": len(os.listdir("/proc/self/fd")),
        "threads": threading.active_count(),
        "memory_kib": sum(memory),
    }


def test_a_script_runs_with_input_output_and_status(sandbox: Sandbox) -> None:
    source = "import sys\nprint(input()[::-1])\nprint('note', file=sys.stderr)\nsys.exit(7)"
    result = sandbox.run(source, stdin="abc\n")
    assert (result.stdout, result.stderr, result.exit_code, result.signal) == (b"cba\n", b"note\n", 7, None)
    assert not result.timed_out and not result.killed and not result.truncated


def test_time_memory_output_files_and_tasks_are_bounded(sandbox: Sandbox) -> None:
    late = sandbox.run("import time; time.sleep(60)", limits=Limits(timeout_s=0.3))
    assert late.timed_out and late.killed and late.signal == signal.SIGKILL
    big = sandbox.run("x = bytearray(200 << 20)", limits=Limits(memory_mib=100))
    assert big.exit_code == 1 and b"MemoryError" in big.stderr
    assert sandbox.run("x = bytearray(200 << 20)").exit_code == 0
    loud = sandbox.run("import os\nwhile True: os.write(1, b'x' * 65536)", limits=Limits(output_mib=1))
    assert loud.truncated and len(loud.stdout) == 1 << 20 and b"File too large" in loud.stderr
    many = sandbox.run("import os\nn = 0\ntry:\n    while True: os.dup(0); n += 1\nexcept OSError: print(n)")
    assert 32 <= int(many.stdout) <= 128
    start = "threading.Thread(target=time.sleep, args=(60,), daemon=True).start(); n += 1"
    tasks = sandbox.run(
        f"import threading, time\nthreading.stack_size(65536)\nn = 0\ntry:\n    while n < 5000: {start}\n"
        "except RuntimeError: pass\nprint(n)",
        limits=Limits(timeout_s=60.0),
    )
    assert 16 <= int(tasks.stdout) <= 2000


def test_limits_that_could_not_hold_are_refused() -> None:
    with pytest.raises(ValueError, match="timeout_s=-1 is below"):
        Limits(timeout_s=-1)
    with pytest.raises(ValueError, match="memory_mib=1 is below 64"):
        Limits(memory_mib=1)


def test_runs_do_not_see_each_other(sandbox: Sandbox) -> None:
    leave = "import builtins, os, sys\nbuiltins.mark = sys.mark = 1\nos.environ['MARK'] = '1'"
    look = (
        "import builtins, os, sys\n"
        "print(hasattr(builtins, 'mark'), hasattr(sys, 'mark'), 'MARK' in os.environ, len(sys.argv),"
        " sorted(os.environ))"
    )
    for _ in range(4):
        sandbox.run(leave)
    expected = "False False False 1 ['MALLOC_ARENA_MAX', 'OMP_NUM_THREADS', 'OPENBLAS_NUM_THREADS', 'PATH']\n"
    assert sandbox.run(look).stdout.decode() in (expected, expected.replace("['", "['LC_CTYPE', '"))


def test_a_program_holds_its_own_three_descriptors_only() -> None:
    look = (
        "import os\nfor d in range(9000):\n    try: print(d, os.fstat(d).st_rdev)\n    except OSError: pass"
    )
    many = [os.open("/dev/zero", os.O_RDONLY) for _ in range(200)]  # high numbers for what zygotes inherit
    try:
        with Sandbox(num_workers=1) as sandbox:
            found = sandbox.run(look, stdin="x").stdout.decode()
    finally:
        for descriptor in many:
            os.close(descriptor)
    assert found == "0 0\n1 0\n2 0\n"


def test_signals_that_the_owner_ignores_or_blocks_do_not_disturb() -> None:
    program = textwrap.dedent("""
        import signal
        from rewards.sandbox.sandbox import Limits, Sandbox
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP, signal.SIGCHLD, signal.SIGALRM})
        with Sandbox(num_workers=1) as sandbox:
            print(sandbox.run("print(4)").stdout, sandbox.run("1 / 0").exit_code)
    """)
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, timeout=60)
    assert done.stdout == b"b'4\\n' 1\n", done.stderr


def test_tests_that_change_their_interpreter_do_not_change_the_next_grade() -> None:
    spoil = {**ADD_TESTS, "code": "import builtins\nbuiltins.sorted = len\nassert add(2, 3) == 5"}
    check = {**ADD_TESTS, "code": "assert sorted([add(1, 1)]) == [2]"}
    with code_sandbox(num_workers=1) as alone:
        grades = [
            grade(ADD, tests, options=PATIENT, sandbox=alone).score for tests in (spoil, check, spoil, check)
        ]
    assert grades == [1.0, 1.0, 1.0, 1.0]


def test_a_solution_that_ruins_one_grade_leaves_the_next_alone(sandbox: Sandbox) -> None:
    ruin = "import ctypes\ndef add(a, b): ctypes.memset(id(5), 0, 64); return [0] * 4_000_000"
    for _ in range(3):
        assert grade(ruin, ADD_TESTS, options=CodeOptions(timeout_s=1.0), sandbox=sandbox).score == 0.0
        assert grade(ADD, ADD_TESTS, options=PATIENT, sandbox=sandbox).score == 1.0


def test_kill_9_of_zygotes_in_mid_batch_loses_nothing() -> None:
    options = CodeOptions(timeout_s=60.0)
    codes = [
        ADD + f"\nimport time; time.sleep(0.02)  # {i}" if i % 2 else f"def add(a, b): return {i}"
        for i in range(60)
    ]
    with code_sandbox(num_workers=2) as sandbox:
        started = itertools.count(1)
        killed: set[int] = set()

        def one(code: str) -> Reward:
            if next(started) in (10, 25, 40):  # so far apart that no program is hit three times
                for pid in sandbox.zygote_pids():
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
                    killed.add(pid)
            return grade(code, ADD_TESTS, options=options, sandbox=sandbox)

        rewards = sandbox.map(one, codes)
    assert len(killed) >= 3
    assert [reward.score for reward in rewards] == [float(i % 2 or i == 5) for i in range(60)]


def test_an_idle_zygote_that_died_is_replaced() -> None:
    with Sandbox(num_workers=1) as alone:
        os.kill(alone.zygote_pids()[0], signal.SIGKILL)
        assert alone.run("print(1)").stdout == b"1\n"


def test_nothing_survives_a_kill_9_of_the_owner() -> None:
    program = textwrap.dedent("""
        import threading, time
        from rewards.code.grader import CodeOptions, code_sandbox, grade
        from rewards.sandbox.sandbox import Limits, Sandbox
        sandbox = code_sandbox(num_workers=2)
        loop = "import signal\\nfor s in range(1, 65):\\n    try: signal.signal(s, signal.SIG_IGN)\\n"
        loop += "    except Exception: pass\\nwhile True: pass"
        tests = {"type": "asserts", "entry_point": "f", "code": "assert f()"}
        threading.Thread(target=sandbox.run, args=(loop,), kwargs={"limits": Limits(timeout_s=600)}).start()
        grade(loop, tests, options=CodeOptions(timeout_s=600), sandbox=sandbox)
    """)
    owner = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, start_new_session=True)
    try:
        # two zygotes, a judge and two programs
        wait_until(lambda: len(children_of(owner.pid)) >= 5, "all processes run")
        family = children_of(owner.pid)
    finally:
        owner.kill()
        owner.wait()
    wait_until(lambda: not any(map(is_alive, family)), "all processes are gone")


def test_an_interrupt_from_the_terminal_does_not_reach_zygotes() -> None:
    program = textwrap.dedent("""
        import os, signal
        from rewards.sandbox.sandbox import Sandbox
        signal.signal(signal.SIGINT, lambda *_: None)
        with Sandbox(num_workers=1) as sandbox:
            before = sandbox.zygote_pids()
            os.killpg(0, signal.SIGINT)
            print(sandbox.run("print(3)").stdout, sandbox.zygote_pids() == before)
    """)
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, timeout=60, start_new_session=True)
    assert done.stdout == b"b'3\\n' True\n", done.stderr


def test_a_zygote_outlives_the_thread_that_started_it() -> None:
    made: list[Sandbox] = []
    thread = threading.Thread(target=lambda: made.append(Sandbox(num_workers=1)))
    thread.start()
    thread.join()
    with made[0] as sandbox:
        pid = sandbox.zygote_pids()[0]
        assert sandbox.run("print(2)").stdout == b"2\n"
        assert sandbox.zygote_pids() == [pid]


def test_many_threads_may_share_one_sandbox(sandbox: Sandbox) -> None:
    results: dict[int, bytes] = {}

    def work(number: int) -> None:
        for _ in range(3):
            results[number] = sandbox.run(f"print({number})", limits=Limits(timeout_s=60.0)).stdout

    threads = [threading.Thread(target=work, args=(number,)) for number in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {number: f"{number}\n".encode() for number in range(12)}


def test_map_keeps_the_order_and_passes_errors_on(sandbox: Sandbox) -> None:
    assert sandbox.map(lambda x: x * x, range(20)) == [x * x for x in range(20)]
    with pytest.raises(ZeroDivisionError):
        sandbox.map(lambda x: 1 // x, [1, 0])


def test_a_closed_sandbox_and_one_of_another_process_refuse(sandbox: Sandbox) -> None:
    closed = Sandbox(num_workers=1)
    closed.close()
    closed.close()
    with pytest.raises(SandboxError, match="closed"):
        closed.run("print(1)")
    read_end, write_end = os.pipe()
    if os.fork() == 0:
        try:
            sandbox.run("print(1)")
        except SandboxError as error:
            os.write(write_end, str(error).encode())
        finally:
            os._exit(0)
    os.wait()
    assert f"belongs to process {os.getpid()}" in os.read(read_end, 1000).decode()


def test_it_refuses_with_a_reason_where_the_kernel_refuses_filters() -> None:
    """prctl(PR_SET_NO_NEW_PRIVS) and seccomp filters that deny seccomp: what a hardened container may do."""
    program = textwrap.dedent("""
        import ctypes, struct
        from rewards.sandbox.sandbox import Sandbox, SandboxError
        from rewards.sandbox.confine import ARCHITECTURE, Filter, prctl
        deny = [(0x20, 0, 0, 0), (0x15, 0, 4, (157, 167)[ARCHITECTURE]), (0x20, 0, 0, 16), (0x15, 0, 1, 22),
                (0x06, 0, 0, 0x50001), (0x06, 0, 0, 0x7FFF0000), (0x06, 0, 0, 0x7FFF0000)]
        prctl(38, 1)
        Filter(deny).install()
        try:
            Sandbox(num_workers=1)
        except SandboxError as error:
            print(error)
    """)
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert "no confinement works here, so untrusted code is not run: PermissionError" in done.stdout, (
        done.stderr
    )
    assert "seccomp filter: Operation not permitted" in done.stdout


def test_the_tier_in_use_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", "rewards.sandbox"), Sandbox(num_workers=1, tier="seccomp") as weak:
        assert weak.tier == "seccomp"
    assert "tier seccomp (Landlock ABI 0), 1 workers" in caplog.text


def test_it_starts_from_a_process_with_torch_threads() -> None:
    torch = pytest.importorskip("torch")
    a = torch.randn(256, 256)
    assert (a @ a).shape == (256, 256)
    with Sandbox(num_workers=1) as sandbox:
        assert sandbox.run("import threading\nprint(threading.active_count())").stdout == b"1\n"
        assert sandbox.run("import torch").exit_code == 1


def test_named_packages_can_be_imported_and_no_others() -> None:
    pytest.importorskip("numpy")
    options = CodeOptions(timeout_s=60.0)
    code = "import numpy as np\ndef add(a, b): return np.array([a, b]).sum()"
    with code_sandbox(num_workers=1, packages=["numpy", "no_such_package"]) as sandbox:
        assert grade(code, ADD_TESTS, options=options, sandbox=sandbox).score == 1.0
    with code_sandbox(num_workers=1) as sandbox:
        assert "No module named 'numpy'" in grade(code, ADD_TESTS, options=options, sandbox=sandbox).detail


def test_a_thousand_runs_leave_memory_descriptors_and_processes_flat() -> None:
    programs = [
        ADD,
        "def add(a, b): return [a] * 1000",
        "def add(a, b): raise ValueError",
        "def add(a",
        "import os; os._exit(1)",
    ]
    with code_sandbox(num_workers=2) as sandbox:

        def one(number: int) -> None:
            grade(programs[number % len(programs)], ADD_TESTS, options=PATIENT, sandbox=sandbox)

        def is_idle() -> bool:  # a zygote keeps one forked child in waiting; others are not reaped yet
            return all(len(children_of(pid)) <= 1 for pid in sandbox.zygote_pids())

        sandbox.map(one, range(200))
        wait_until(is_idle, "only waiting children are left of 200 runs")
        before = resources([os.getpid(), *sandbox.zygote_pids()])
        sandbox.map(one, range(800))
        wait_until(is_idle, "only waiting children are left of 1,000 runs")
        after = resources([os.getpid(), *sandbox.zygote_pids()])
        assert len(sandbox.zygote_pids()) == 2
    growth_kib = after.pop("memory_kib") - before.pop("memory_kib")
    assert all(after[name] <= before[name] for name in after), (before, after)
    assert growth_kib < 4096, f"{growth_kib} KiB in 800 runs"
