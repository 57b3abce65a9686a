"""A run that SIGKILLs itself on entering the training phase for the N-th time.

`python killed_run.py MODULE N ARGUMENT...` takes the arguments of recipes.llada or recipes.grpo. A process of
its own, since a fork of one that has computed may crash inside torch.
"""

from __future__ import annotations

import importlib
import os
import signal
import sys

from rl.phases import Phases


def kill_on_entry(phase: str, number: int) -> None:
    entries = []
    original = Phases.__call__

    def entering(self: Phases, name: str):
        entries.append(name)
        if entries.count(phase) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(self, name)

    Phases.__call__ = entering


if __name__ == "__main__":
    kill_on_entry("train", int(sys.argv[2]))
    sys.exit(importlib.import_module(sys.argv[1]).main(sys.argv[3:]))
