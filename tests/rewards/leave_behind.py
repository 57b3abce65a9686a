"""Runs each program of `code_leftovers`, and honest and wrong ones: after it in the same worker, or beside it
in another one. Run as a program:

python leave_behind.py TIER  ->  {"wrong": [...], "tier"} on stdout; "wrong" names what went wrong
"""

from __future__ import annotations

import json
import sys
import threading
import time
from typing import Any

from code_leftovers import CALLS, CALLS_AND_NEW_JUDGE, HOLDINGS, LEFTOVERS, RIGHT, SNAPSHOT, WRONG

from rewards.code.grader import CodeOptions, code_sandbox, grade
from rewards.sandbox.sandbox import Limits

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
    wrong += beside_holdings()
    print(json.dumps({"wrong": wrong, "tier": tier}))


def beside_holdings() -> list[str]:
    """What goes wrong in one worker while a program in another one holds all that it can get."""
    wrong: list[str] = []
    with code_sandbox(num_workers=2, tier=sys.argv[1]) as sandbox:  # pyright: ignore
        sandbox.map(lambda _: sandbox.run("import time; time.sleep(0.5)"), range(2))  # both workers start
        zygotes = sandbox.zygote_pids()
        for name, attack in HOLDINGS.items():
            hold = threading.Thread(target=sandbox.run, args=[attack], kwargs={"limits": Limits(timeout_s=2)})
            hold.start()
            time.sleep(1)
            found = [
                grade(f"```python\n{code}```", tests, options=HONEST, sandbox=sandbox).score
                for tests in (CALLS, CALLS_AND_NEW_JUDGE)
                for code in (WRONG, RIGHT)
            ]
            if found != [0.0, 1.0, 0.0, 1.0]:
                wrong.append(f"beside {name}: wrong and right solutions got {found}")
            hold.join()
        if len(zygotes) != 2 or sorted(sandbox.zygote_pids()) != sorted(zygotes):
            wrong.append("a zygote died beside a holding")
    return wrong


if __name__ == "__main__":
    main()
