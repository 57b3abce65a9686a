"""What one job leaves for the next: nothing in memory, descriptors, files, environment or finders."""

from __future__ import annotations

import json
import mmap
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from code_leftovers import CALLS
from settings import ENVIRONMENT, ROOT, SETTINGS, SHARED, in_setting

from rewards.code.grader import CodeOptions, code_sandbox, grade
from rewards.sandbox.process import memory_file
from rewards.sandbox.sandbox import Limits
from tests.waiting import wait_until

LEAVE = Path(__file__).with_name("leave_behind.py")
HELD = 200 << 20
SLOW = f"import time\ndef add(a, b):\n    held = b'x' * {HELD}\n    time.sleep(60)\n"


@pytest.mark.skipif(not (SHARED / "container_like.py").exists(), reason="needs ../shared/cases")
@pytest.mark.parametrize("setting", SETTINGS)
def test_a_program_changes_nothing_for_the_next_one_or_for_its_judge(setting: str, tmp_path: Path) -> None:
    prefix, python = in_setting(setting, tmp_path)
    done = subprocess.run(
        [*prefix, python, str(LEAVE), "auto"],
        cwd="/",
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    report = json.loads(done.stdout)
    assert report["wrong"] == []
    assert report["tier"] == ("seccomp" if "without Landlock" in setting else report["tier"])


@pytest.fixture(scope="module")
def processes():
    """Process ids while a solution is under way: "zygote", "judge", "program"."""
    with code_sandbox(num_workers=1) as sandbox:
        options = CodeOptions(timeout_s=60)
        tests = [f"```python\n{SLOW}```", CALLS]
        thread = threading.Thread(target=grade, args=tests, kwargs={"options": options, "sandbox": sandbox})
        thread.start()
        (zygote,) = sandbox.zygote_pids()
        wait_until(lambda: len(child_pids(zygote)) == 2, "the program starts")
        children = child_pids(zygote)
        # Where it answers, it has closed what it was not given.
        wait_until(lambda: resident_bytes(children[1]) > HELD, "it answers")
        yield {"zygote": zygote, "judge": children[0], "program": children[1]}
        os.kill(children[1], 9)
        thread.join(30)


def resident_bytes(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * mmap.PAGESIZE


def child_pids(pid: int) -> list[int]:
    return sorted(int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split())


def descriptors(pid: int) -> dict[int, str]:
    """Descriptor -> what it is open on, the inode included."""
    folder = Path(f"/proc/{pid}/fd")
    return {
        int(entry.name): f"{os.readlink(entry)} {os.stat(entry).st_ino}" for entry in sorted(folder.iterdir())
    }


needs_root = pytest.mark.skipif(os.getuid() != 0, reason="only root may look into a sandboxed process")


@needs_root
def test_a_program_shares_no_memory_that_it_could_make_writable(processes):
    for name, pid in processes.items():
        shared = []
        for block in Path(f"/proc/{pid}/smaps").read_text().split("VmFlags:"):
            flags = block.split("\n", 1)[0].split()
            if "sh" in flags and "mw" in flags:  # shared, and may become writable
                shared.append(flags)
        assert shared == [], name


@needs_root
def test_a_program_holds_five_descriptors_of_which_its_judge_shares_the_pipes_alone(processes):
    program, judge = descriptors(processes["program"]), descriptors(processes["judge"])
    assert list(program) == [0, 1, 2, 3, 4]
    assert [what.split(":")[0] for what in program.values()] == ["/memfd", "/memfd", "/memfd", "pipe", "pipe"]
    shared = set(program.values()) & set(judge.values())
    assert sorted(shared) == sorted([program[3], program[4]])
    own = {what for number, what in descriptors(processes["zygote"]).items() if number not in range(8, 64)}
    assert len(own) == 3 and not set(program.values()) & own  # /dev/null, its errors, its owner's socket


@needs_root
def test_a_program_has_a_user_and_an_environment_that_say_nothing(processes):
    program = processes["program"]
    names = {
        line.partition("=")[0] for line in Path(f"/proc/{program}/environ").read_text().split("\0") if line
    }
    assert names == {"PATH", "MALLOC_ARENA_MAX", "OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS"}
    assert os.readlink(f"/proc/{program}/cwd") == "/"
    uid = 1_879_048_192 + processes["zygote"]
    assert f"Uid:\t{uid}\t{uid}\t{uid}\t{uid}" in Path(f"/proc/{program}/status").read_text()


def test_an_input_of_a_program_cannot_be_changed_by_who_holds_it():
    descriptor = memory_file(b"print(1)")
    try:
        for attempt in (
            lambda: os.pwrite(descriptor, b"x", 0),
            lambda: os.ftruncate(descriptor, 0),
            lambda: mmap.mmap(descriptor, 0, flags=mmap.MAP_SHARED, prot=mmap.PROT_WRITE),
        ):
            with pytest.raises(PermissionError):
                attempt()
        assert os.pread(descriptor, 99, 0) == b"print(1)"
    finally:
        os.close(descriptor)


def test_a_solution_cannot_take_the_threads_that_the_tests_need():
    holding = "import _thread, time\n_thread.stack_size(32768)\ntry:\n    while True:\n"
    holding += "        _thread.start_new_thread(time.sleep, (60,))\nexcept RuntimeError: pass\n"
    threaded = "import threading, time\ntime.sleep(1)\nfound = []\n"  # it holds them all by then, as a rule
    threaded += "thread = threading.Thread(target=lambda: found.append(add(2, 3)))\n"
    threaded += "thread.start()\nthread.join()\nassert found == [5]"
    with code_sandbox(num_workers=1) as sandbox:
        for answer, score in (("a + b", 1.0), ("0", 0.0)):
            code = f"```python\n{holding}def add(a, b):\n    return {answer}\n```"
            reward = grade(
                code, {**CALLS, "code": threaded}, options=CodeOptions(timeout_s=60), sandbox=sandbox
            )
            assert reward.score == score, reward


def test_a_program_cannot_queue_all_signals_that_its_user_may_have_pending():
    count = (
        "import ctypes, os, signal\nsignal.pthread_sigmask(signal.SIG_BLOCK, range(34, 65))\n"
        "system_call = {'x86_64': 234, 'aarch64': 131}[os.uname().machine]  # tgkill\n"
        "call, pid, queued = ctypes.CDLL(None).syscall, os.getpid(), 0\n"
        "while queued < 5000 and call(system_call, pid, pid, 40) == 0: queued += 1\nprint(queued)"
    )
    with code_sandbox(num_workers=1) as sandbox:
        result = sandbox.run(count, limits=Limits(timeout_s=30))
    assert 0 < int(result.stdout) <= 256, result


def test_memory_that_children_would_share_is_found_before_the_first_program():
    code = (
        "import mmap, os, tempfile\n"
        "from rewards.sandbox.confine import writable_shared_memory\n"
        "assert writable_shared_memory() == [], writable_shared_memory()\n"
        "private = mmap.mmap(-1, 4096, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)\n"
        "fd = os.memfd_create('readable')\n"
        "os.write(fd, bytes(4096))\n"
        "shared = mmap.mmap(fd, 4096, prot=mmap.PROT_READ)\n"
        "rights = lambda: [line.split()[1] for line in open('/proc/self/maps') if 'memfd:readable' in line]\n"
        "before = rights()\n"
        "print(writable_shared_memory(), shared[0], before, rights())  # put back as they were\n"
    )
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert found.stdout == "['/memfd:readable (deleted)'] 0 ['r--s'] ['r--s']\n", found.stderr


def test_the_sandbox_leaves_no_bytecode_beside_its_modules(tmp_path):
    package = tmp_path / "rewards"
    shutil.copytree(ROOT / "rewards", package, ignore=shutil.ignore_patterns("__pycache__"))
    code = (
        "import rewards.sandbox.zygote\n"
        f"assert rewards.sandbox.zygote.__file__.startswith({str(package)!r})\n"
        "from rewards.sandbox import Sandbox\n"
        "with Sandbox(num_workers=1) as sandbox: print(sandbox.run('print(7)').stdout)"
    )
    environment = {**ENVIRONMENT, "PYTHONPATH": f"{tmp_path}:{ROOT}"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd="/", env=environment, capture_output=True, text=True, timeout=60
    )
    assert done.stdout == "b'7\\n'\n", done.stderr
    assert not list(package.rglob("__pycache__"))
