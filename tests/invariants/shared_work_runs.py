"""`python shared_work_runs.py CONFIG OUT`: two processes train what they sampled, or share it out.

OUT/own is deterministic, so nothing moves, and gradients are summed at the end; OUT/shared is not.
"""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

from killed_runs import PR_SET_CHILD_SUBREAPER, in_forks

import recipes.grpo

WORDS = ("optimizer.schedule=constant", "optimizer.lr=1e-4", "train.steps=2", "train.num_minibatches=2")
WORDS += ("sampling.max_completion_length=4", "evaluation.every=0")


def main(config: str, out: str) -> None:
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)
    for name, deterministic in (("own", "true"), ("shared", "false")):
        words = [config, f"run_dir={Path(out) / name}", *WORDS, f"train.deterministic={deterministic}"]
        codes, _ = in_forks(lambda rank, words=words: recipes.grpo.main(words), 2)
        assert codes == [0, 0], (name, codes)


if __name__ == "__main__":
    main(*sys.argv[1:])
