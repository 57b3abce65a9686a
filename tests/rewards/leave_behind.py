"""Runs each program of `code_leftovers` and then honest and wrong ones, in one worker. Run as a program:

python leave_behind.py TIER  ->  {"wrong": [...], "tier"} on stdout; "wrong" names what went wrong
"""

from __future__ import annotations

import json
import sys
from typing import Any

from code_leftovers import CALLS, CALLS_AND_NEW_JUDGE, LEFTOVERS, RIGHT, SNAPSHOT, WRONG

from rewards.code import CodeOptions, code_sandbox, grade
from rewards.sandbox import Limits

HOSTILE = CodeOptions(timeout_s=0.7)
HONEST = CodeOptions(timeout_s=30.0)


def main() -> None:
    wrong: list[str] = []
    with code_sandbox(num_workers=1, tier=sys.argv[1]) as sandbox:  # pyright: ignore

        def score(code: str, tests: dict[str, Any], options: CodeOptions) -> float | None:
            return grade(f"```python\n{code}```", tests, options=options, sandbox=sandbox).score

        def snapshot() -> str:
            result = sandbox.run(SNAPSHOT, limits=Limits(timeout_s=30))
            return (result.stdout + result.stderr).decode()

        first, zygotes = snapshot(), sandbox.zygote_pids()
        if len(first.splitlines()) != 20 or "Traceback" in first:
            wrong.append(f"no snapshot: {first[-300:]}")
        for name, attack in LEFTOVERS.items():
            for tests in (CALLS, CALLS_AND_NEW_JUDGE):
                found = [
                    score(WRONG + attack, tests, HOSTILE),
                    score(WRONG, CALLS, HONEST),
                    score(RIGHT, CALLS, HONEST),
                ]
                if found != [0.0, 0.0, 1.0]:
                    wrong.append(f"{name}: attack, wrong and right solution got {found}")
            sandbox.run(attack, limits=Limits(timeout_s=1))
            if (now := snapshot()) != first:
                pairs = zip(first.splitlines(), now.splitlines(), strict=False)
                wrong.append(f"{name}: {[pair for pair in pairs if pair[0] != pair[1]]}"[:500])
        if sandbox.zygote_pids() != zygotes:
            wrong.append("a zygote died")
        tier = sandbox.tier
    print(json.dumps({"wrong": wrong, "tier": tier}))


if __name__ == "__main__":
    main()
