"""The process that runs sympy. Its owner starts this file with `python -I` and kills it when it is late.

It reads lines {"gold": ..., "prediction": ...} and answers {"read": "gold"}, then {"equal": true | false |
null}, with null for a text that sympy cannot read. It ends when its input does.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import sys
from typing import Any

MAX_MEMORY_BYTES = 1536 * 1024**2
MAX_CPU_SECONDS = 300
WARM_UP = (
    r"\frac{x^2+1}{\sqrt{2}} + \sin(x)",
    r"\gcd(x, y)",
    r"\int_0^1 x dx",
    r"\lim_{x \to 0} \frac{\sin x}{x}",
)


def limit_resources() -> None:
    """Limits memory and CPU time and forbids writing files and core dumps: the process can only compute."""
    for kind, limit in (
        (resource.RLIMIT_AS, MAX_MEMORY_BYTES),
        (resource.RLIMIT_CPU, MAX_CPU_SECONDS),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0),
    ):
        with contextlib.suppress(ValueError, OSError):  # a lower limit is already in force
            resource.setrlimit(kind, (limit, limit))


def worked_out(gold: Any) -> Any:
    """A gold with its integrals and limits worked out; a slow gold is not the prediction's fault."""
    import sympy

    return gold.doit() if isinstance(gold, sympy.Expr) else gold


def equal(gold: Any, prediction: Any) -> bool:
    """Whether two sympy objects are the same value, the first of them worked out."""
    import sympy

    for item in (gold, prediction):
        if item is None or (isinstance(item, sympy.Basic) and item.has(sympy.nan, sympy.zoo)):
            return False
    if isinstance(gold, sympy.Expr) and isinstance(prediction, sympy.Expr):
        difference = gold - prediction.doit()
        return difference == 0 or sympy.simplify(difference) == 0
    if isinstance(gold, sympy.MatrixBase) and isinstance(prediction, sympy.MatrixBase):
        return gold.shape == prediction.shape and sympy.simplify(gold - prediction) == sympy.zeros(
            *gold.shape
        )
    return type(gold) is type(prediction) and gold == prediction


def main() -> None:
    limit_resources()
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # output of libraries must not look like an answer
    from latex2sympy2_extended import latex2sympy

    for text in WARM_UP:  # at first use the parser builds tables and sympy imports modules
        equal(worked_out(latex2sympy(text)), latex2sympy("1"))
    print(json.dumps({"ready": True}), file=out)
    for line in sys.stdin:
        request = json.loads(line)
        verdict: bool | None = None
        try:
            gold = worked_out(latex2sympy(request["gold"]))
            print(json.dumps({"read": "gold"}), file=out)
            verdict = bool(equal(gold, latex2sympy(request["prediction"])))
        except Exception:  # the parser may raise anything; it means that the text cannot be read
            verdict = None
        print(json.dumps({"equal": verdict}), file=out)


if __name__ == "__main__":
    main()
