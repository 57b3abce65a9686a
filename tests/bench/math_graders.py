"""This project's math grader against math-verify on the same rows, in one process, one after the other.

    python -m tests.bench.math_graders [cases.jsonl] [--no-math-verify] [--hostile]

Each row is graded once, with cold verdict caches. math-verify 0.9 runs as its README shows: the gold in a
box if it is bare, default parsing and its own five-second alarms. Rows of category hang/malicious take it
seconds each and are left out of its columns unless --hostile asks for them. Throughput is compared on the
rows that both get right.
"""

from __future__ import annotations

import argparse
import json
import logging
import time
from collections.abc import Callable
from pathlib import Path

from rewards.math.grader import grade

CASES = Path(__file__).parents[3] / "shared" / "cases" / "math.jsonl"
HOSTILE = "hang/malicious"


def math_verify_says(prediction: str, gold: str) -> bool:
    from math_verify import parse, verify

    boxed = gold if "$" in gold or "\\boxed" in gold or "\\[" in gold else f"\\boxed{{{gold}}}"
    return bool(verify(parse(boxed), parse(prediction)))


def measure(rows: list[dict], says: Callable[[str, str], bool]) -> list[tuple[bool, float]]:
    """(verdict, seconds) of each row; an exception is a "no"."""
    results = []
    for row in rows:
        started = time.perf_counter()
        try:
            verdict = says(row["prediction"], row["gold"])
        except Exception:
            verdict = False
        results.append((verdict, time.perf_counter() - started))
    return results


def report(name: str, rows: list[dict], results: list[tuple[bool, float]]) -> None:
    for tier in ("core", "policy", "all"):
        kept = [
            (row, verdict)
            for row, (verdict, _) in zip(rows, results, strict=True)
            if tier in (row["tier"], "all")
        ]
        right = sum(verdict == row["expected"] for row, verdict in kept)
        false_positives = sum(verdict and not row["expected"] for row, verdict in kept)
        false_negatives = sum(row["expected"] and not verdict for row, verdict in kept)
        print(
            f"{name:12} {tier:7} n {len(kept):4}  accuracy {right / len(kept):.4f}  "
            f"FP {false_positives:3}  FN {false_negatives:3}"
        )
    times = sorted(seconds * 1e3 for _, seconds in results)
    print(
        f"{name:12} median {times[len(times) // 2]:.3f} ms  mean {sum(times) / len(times):.3f} ms  "
        f"p99 {times[len(times) * 99 // 100]:.3f} ms  slowest {times[-1]:.1f} ms"
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("cases", nargs="?", type=Path, default=CASES)
    parser.add_argument("--no-math-verify", action="store_true")
    parser.add_argument("--hostile", action="store_true")
    arguments = parser.parse_args()
    logging.disable(logging.CRITICAL)
    everything = [json.loads(line) for line in arguments.cases.read_text().splitlines()]
    tame = [row for row in everything if row.get("category") != HOSTILE]

    grade("\\boxed{\\int_0^1 y dy}", "\\int_0^1 x dx")  # starts sympy, as the first row that needs it would
    ours = measure(everything, lambda prediction, gold: grade(prediction, gold).score == 1.0)
    report("cohort", everything, ours)
    hostile = [
        seconds for row, (_, seconds) in zip(everything, ours, strict=True) if row.get("category") == HOSTILE
    ]
    if hostile:
        print(f"{'cohort':12} hostile n {len(hostile)}  slowest {max(hostile) * 1e3:.1f} ms")
    if arguments.no_math_verify:
        return
    math_verify_says("\\boxed{1}", "1")
    rows = everything if arguments.hostile else tame
    theirs = measure(rows, math_verify_says)
    report("math-verify", rows, theirs)
    of_row = {row["id"]: result for row, result in zip(everything, ours, strict=True)}
    both = [
        (of_row[row["id"]][1], seconds)
        for row, (verdict, seconds) in zip(rows, theirs, strict=True)
        if verdict == row["expected"] == of_row[row["id"]][0]
    ]
    mine, other = (sum(column) for column in zip(*both, strict=True))
    speeds = f"{len(both) / mine:.0f}/s against {len(both) / other:.0f}/s"
    print(f"rows both get right: {len(both)}; {speeds}: x{other / mine:.1f}")


if __name__ == "__main__":
    main()
