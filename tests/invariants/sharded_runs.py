"""`python sharded_runs.py CONFIG OUT`: whole runs of processes that split the weights.

OUT/two is trained by two processes. OUT/moved repeats its steps 3 and 4 with one process and the others with
four, from the records. In OUT/writer and OUT/sender the second of two processes fails as it writes a
checkpoint, and as its engine loads the weights. Each process's words are in OUT/NAME-of-SIZE-RANK.log.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from killed_runs import PR_SET_CHILD_SUBREAPER, Ends, in_forks

import recipes.grpo
import rl.driver
from rollout.transformers import TransformersEngine

WORDS = ("optimizer.schedule=constant", "optimizer.lr=1e-4", "checkpoint.keep=9")
FAILS_AT = 7  # a tensor of the stream, counted from 1


def train(config: str, out: Path, name: str, size: int, *words: str, fail: Callable[[], Any] = int) -> Ends:
    """A run of `size` processes; the last one calls `fail` first."""

    def work(rank: int) -> int:
        log = os.open(out / f"{name}-of-{size}-{rank}.log", os.O_CREAT | os.O_WRONLY)
        os.dup2(log, 1)
        os.dup2(log, 2)
        if rank == size - 1:
            fail()
        return recipes.grpo.main([config, f"run_dir={out / name}", *WORDS, *words])

    return in_forks(work, size)


def fail_to_write() -> None:
    """The disk is full for this process from its first checkpoint on."""
    save = rl.driver.save

    def full(*given: Any, **named: Any) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, resource.RLIM_INFINITY))
        save(*given, **named)

    rl.driver.save = full


def fail_to_send() -> None:
    """The engine breaks off in the middle of the third version."""
    update = TransformersEngine.update_weights

    def breaking(self: TransformersEngine, weights: Iterator[Any], *, version: int) -> None:
        def until_it_breaks() -> Iterator[Any]:
            for number, pair in enumerate(weights, 1):
                if version == 2 and number == FAILS_AT:
                    raise RuntimeError("no memory is left")
                yield pair

        update(self, until_it_breaks(), version=version)

    TransformersEngine.update_weights = breaking  # type: ignore[method-assign]


def main(config: str, out_dir: str) -> None:
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)
    out, ends = Path(out_dir), {}
    ends["two"] = train(config, out, "two", 2)
    shutil.copytree(out / "two", out / "moved")
    (out / "moved" / "result.json").unlink()
    for step in (4, 6):
        shutil.rmtree(out / "moved" / "checkpoints" / f"step-{step:06d}")
    ends["one goes on"] = train(config, out, "moved", 1, "train.steps=4")
    ends["four go on"] = train(config, out, "moved", 4)
    ends["writer"] = train(
        config, out, "writer", 2, "checkpoint.every=0", "train.steps=2", fail=fail_to_write
    )
    ends["sender"] = train(config, out, "sender", 2, fail=fail_to_send)
    (out / "ends.json").write_text(json.dumps(ends))


if __name__ == "__main__":
    main(*sys.argv[1:])
